"""One attempt on llama.cpp, from the request body to the final event. Runs in a worker thread.

Decides: how a request becomes a generation, and how an answer that was begun elsewhere is continued. Must not: touch
the event loop; ``post`` does. Called by: ``llama``.

Where a continued answer is byte for byte the unbroken one: chat and text completions without tools, also under
``response_format``, whose checkpoint has the id of every token. The prompt is then the same template text followed by
exactly the tokens that were generated, and a grammar goes on where they end (``llama_rest``). This holds for greedy
answers and for those with a ``seed``. Five things bound it:

* Vehicles with another processor reckon otherwise in the last bits (their fingerprint differs), and two tokens that are
  that close may change places. On equal ones it makes no difference what was read together, as batches are kept short
  (``llama.BATCH_TOKENS``).
* Without all ids (``-1`` in the checkpoint, or ids whose text is not the carried text) the text itself is continued;
  it may be cut into other tokens than the ones that were generated.
* With tools the carried text goes to llama.cpp as the beginning of the assistant's message, because only its chat route
  finds the calls. If a call had begun, the whole message is generated once more, unseen as far as the customer has it
  (``calls``); so that it comes out the same, an answer with tools is drawn with a seed of its own if it names none.
* llama.cpp tells nobody the state of its random numbers. So an answer with a seed and a temperature is drawn in
  segments of SEGMENT tokens, each with a seed of its own that follows from the request's; who continues it draws the
  tokens of the broken segment again, which nobody sees, and goes on. If one of them comes out otherwise, for the first
  reason, the rest is drawn from where the customer's text ends. With tools, or without all ids, it is drawn anew.
* Without a seed nothing is promised: the rest is drawn anew.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from motorpool.agent.runtime import answer
from motorpool.agent.runtime.answer import Choice, Entry
from motorpool.agent.runtime.calls import Calls
from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Progressed, Work
from motorpool.agent.runtime.flow import Flow, Piece
from motorpool.agent.runtime.llama_chunks import CHUNK, Chunk, TokenCount
from motorpool.agent.runtime.llama_grammar import Grammars, Handle, closed
from motorpool.agent.runtime.llama_rest import GrammarError, Rest
from motorpool.agent.runtime.llama_socket import LlamaSocket, refusal
from motorpool.agent.runtime.request import Body, ChatBody, parse, stops_of
from motorpool.agent.runtime.spec import EngineSpec
from motorpool.errors import CallerError, EngineError, MotorpoolError
from motorpool.types import Usage
from motorpool.wire import Checkpoint, Delta

_SAMPLING: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
_TOOLS: Final = ("tools", "tool_choice", "parallel_tool_calls")
_SEED_BITS: Final = 0xFFFF_FFFF  # which llama.cpp itself takes for "any"
_SEED_STEP: Final = 0x9E37_79B1
SEGMENT: Final = 32  # tokens that are drawn with one seed


class Server(Protocol):
    """What is used of xllamacpp's server."""

    def handle_completions(self, prompt: bytes, res: Callable[[bytes], bool]) -> object:
        """Run a text completion; the callback gets JSON and stops the generation by returning True."""

    def handle_chat_completions(self, prompt: bytes, res: Callable[[bytes], bool]) -> object:
        """Run a chat completion in the same way."""

    def handle_embeddings(self, request: dict[str, Any]) -> dict[str, Any]:
        """Make embeddings, or return an ``error``."""


class Model(msgspec.Struct, kw_only=True):
    """What all attempts of one loaded model share.

    ``embeds``: it makes embeddings and no text; ``edges`` are then the tokens that an input begins and ends with.
    """

    spec: EngineSpec
    server: Server
    socket: LlamaSocket
    fingerprint: str
    grammars: Grammars = msgspec.field(default_factory=Grammars)
    embeds: bool = False
    edges: tuple[list[int], list[int]] = ([], [])


class _Cancelled(Exception):  # noqa: N818  # no error: it carries the news through llama.cpp's callback
    """The attempt is not wanted any more."""


class Run:
    """One attempt."""

    def __init__(self, model: Model, work: Work, post: Callable[[list[EngineEvent]], None]) -> None:
        self._model = model
        self._work = work
        self._post = post
        self._cancelled = threading.Event()
        self.holds = answer.holds(work)  # it only reads, and then keeps its slot

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled.is_set()

    @cancelled.setter
    def cancelled(self, wanted: bool) -> None:
        if wanted:
            self._cancelled.set()

    def run(self) -> None:
        """Run to the end and post the final event, whatever it is."""
        key = self._work.key
        try:
            self._post([self._answer()])
        except _Cancelled:
            self._post([Cancelled(key=key)])
        except CallerError as error:
            self._post([answer.failed(key, error)])
        except MotorpoolError as error:
            self._post([answer.failed(key, broken(error.message))])
        except Exception as error:  # noqa: BLE001  # a foreign library may raise anything; the attempt must end
            self._post([answer.failed(key, broken(f"llama.cpp failed: {type(error).__name__}"))])

    def _answer(self) -> EngineEvent:
        body = parse(self._work.kind, self._work.body)
        if isinstance(body, ChatBody) and body.may_call_tools and body.logprobs:
            raise CallerError(
                "logprobs cannot be had together with tools on this model", code="unsupported_value", param="logprobs"
            )
        prompts = [self._template(body)] if isinstance(body, ChatBody) else body.prompts
        if not all(prompts):
            raise CallerError("prompt is empty", code="invalid_value", param="prompt")
        repeats = body.n or 1
        before = answer.carried_choices(self._work, len(prompts) * repeats)
        ends = answer.carried_ends(self._work, len(before))
        if self.holds:
            at = next((index for index, end in enumerate(ends) if end is None), 0)
            return self._hold(_Generation(self, body, prompts[at // repeats], at, at % repeats), before[at])
        choices: list[Choice] = []
        usage = Usage()
        for prompt in prompts:
            for repeat in range(repeats):
                index = len(choices)
                generation = _Generation(self, body, prompt, index, repeat)
                choices.append(generation.run(before[index], ends[index]))
                usage = Usage(
                    prompt_tokens=usage.prompt_tokens + (generation.prompt_tokens if repeat == 0 else 0),
                    completion_tokens=usage.completion_tokens + generation.tokens,
                    cached_tokens=usage.cached_tokens + (generation.cached_tokens if repeat == 0 else 0),
                    carried_tokens=usage.carried_tokens + generation.carried_tokens,
                )
        return answer.finished(self._work, self._model.spec.model, self._model.fingerprint, choices, usage)

    def _hold(self, generation: _Generation, carried: Checkpoint | None) -> EngineEvent:
        """Read the prompt, say so, and keep the slot with what was read until somebody takes it over."""
        generation.read(carried)
        self._post([Progressed(key=self._work.key, deltas=[])])
        self._cancelled.wait(answer.HOLD_S)
        return Cancelled(key=self._work.key)

    def _template(self, body: ChatBody) -> str:
        """The prompt; raise CallerError for tools that the model would never hear of."""
        messages = msgspec.json.encode(body.messages)
        extra = {} if body.chat_template_kwargs is None else {"chat_template_kwargs": body.chat_template_kwargs}
        plain = self._model.socket.template(messages, extra)
        if not body.may_call_tools:
            return plain
        tools = {name: getattr(body, name) for name in _TOOLS if getattr(body, name) is not None}
        try:
            prompt = self._model.socket.template(messages, extra | tools)
        except EngineError as error:  # llama.cpp takes malformed tools for a failure of its own
            raise CallerError("tools cannot be read", code="invalid_value", param="tools") from error
        if prompt == plain:
            raise CallerError("this model knows no tools", code="unsupported_parameter", param="tools")
        return prompt

    @property
    def model(self) -> Model:
        """The model that it runs on."""
        return self._model

    @property
    def work(self) -> Work:
        """What is to be run."""
        return self._work

    def progress(self, delta: Delta) -> None:
        """Tell what is new."""
        self._post([Progressed(key=self._work.key, deltas=[delta])])


class _Generation:
    """One choice of an attempt."""

    def __init__(self, run: Run, body: Body, prompt: str | list[int], index: int, repeat: int) -> None:
        self._run = run
        self._body = body
        self._prompt = prompt
        self._index = index
        self._repeat = repeat
        self._socket = run.model.socket
        self._entries: list[Entry] = []
        self._calls = Calls(seed=self._name)
        self._again = ""  # text that the customer has, and that is generated once more with the call after it
        self._uncounted = 0  # tokens of the same
        self._count = TokenCount(lambda text: self._socket.tokens(text, prompt=False), body.top)
        self._flow = Flow(stops_of(body))
        self._reason: str | None = None
        self._error: dict[str, Any] | None = None
        self._failure: Exception | None = None
        self._made = 0
        self._mute = False  # what comes is for nobody
        self._fed: list[int] = []  # ids of all tokens so far
        self._replay: list[int] = []  # those that are drawn once more
        self._segment_ends: int | None = None
        self._paused = False  # at the end of a segment, or where a replay went another way
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.carried_tokens = 0
        self.tokens = 0

    def run(self, carried: Checkpoint | None, ended: str | None) -> Choice:
        """Generate; return the whole choice. ``ended`` says why it had come to its end already."""
        ids: list[int] = []
        if carried is not None:
            ids = self._resume(carried)
        limit = self._body.limit_tokens
        again = carried is not None and bool(carried.calls)
        left = None if limit is None else limit - (0 if again else self.carried_tokens)
        if ended is not None:
            self._reason = ended
        elif self._flow.stopped:
            self._reason = "stop"
        elif left is not None and left <= 0:
            self._reason = "length"
        else:
            self._generate(carried, ids, left)
        if self.prompt_tokens == 0:
            self.prompt_tokens = self._count_prompt()
        if ended is None:
            self._give_out(self._flow.end(), self._finish_reason())
        return Choice(
            index=self._index,
            text=self._flow.text,
            finish_reason=self._finish_reason(),
            entries=None if self._body.top is None else self._entries,
            tool_calls=self._calls.whole(),
            echo=self._echo(),
        )

    def read(self, carried: Checkpoint | None) -> None:
        """Have llama.cpp read the prompt and what is carried, so that a slot of it knows them."""
        self._mute = True
        ids = [] if carried is None else self._resume(carried)
        self._generate(carried, ids, 1)

    def _resume(self, carried: Checkpoint) -> list[int]:
        """Take over what was generated before; return its ids if they can be continued exactly."""
        self._flow = Flow(stops_of(self._body), carried.text)
        self._entries = answer.unpack_entries(carried.logprobs)
        self._calls = Calls(carried.calls, self._name)
        if self._calls.begun:
            self._again, self._uncounted = carried.text, carried.tokens
        self.carried_tokens = self.tokens = carried.tokens
        ids = carried.token_ids
        if self._calls_tools or not ids or len(ids) != carried.tokens or min(ids) < 0:
            return []
        try:
            return ids if self._socket.text(ids) == carried.text else []
        except MotorpoolError:  # ids that this model does not have
            return []

    @property
    def _name(self) -> str:
        """What this choice is called on every vehicle."""
        return f"{self._run.work.response_id}/{self._index}"

    @property
    def _calls_tools(self) -> bool:
        """Whether a tool parser is at work, which only the chat route of llama.cpp has."""
        return isinstance(self._body, ChatBody) and self._body.may_call_tools

    @property
    def _shaped(self) -> bool:
        """Whether a grammar or a tool parser is at work."""
        return isinstance(self._body, ChatBody) and (self._body.may_call_tools or self._body.wants_json)

    @property
    def _draws(self) -> bool:
        """Whether a seed promises that the same is drawn again."""
        return self._body.seed is not None and self._body.temperature != 0 and not self._mute

    def _generate(self, carried: Checkpoint | None, ids: list[int], left: int | None) -> None:
        text = "" if carried is None else carried.text
        rest = self._grammar()
        if rest is not None and not rest.advance(text):
            rest = None  # not under this grammar so far: llama.cpp's own parser has more patience
        self._fed = list(ids)
        if self._shaped and rest is None:
            again = self._calls.begun
            shaped = self._shaped_for("" if again else text)
            self._call(self._run.model.server.handle_chat_completions, self._request(left) | shaped)
            if self._again or not (self._error or self._mute or self._calls.caught_up):
                raise EngineError("llama.cpp has made another answer than before")
            self._settle(0, exact=carried is None or again)
        elif rest is not None and rest.is_over:
            self._reason = "stop"
        elif self._draws and (carried is None or ids):
            self._draw(text, left)
        else:
            request = self._request(left) | {"prompt": self._continued(text, ids)}
            if rest is not None:
                request["grammar"] = rest.grammar()
            self._call(self._run.model.server.handle_completions, request | {"logprobs": self._tops})
            self._settle(len(ids), exact=bool(ids) or carried is None)

    def _draw(self, text: str, left: int | None) -> None:
        """Generate in segments, each with a seed of its own, from the beginning of the one that was broken."""
        server = self._run.model.server
        limit = None if left is None else left + len(self._fed)
        number, start = self._segment_of(text)
        self._replay = self._fed[start:]
        cached: int | None = None
        while True:
            self._segment_ends, self._paused = (number + 1) * SEGMENT, False
            self._count = TokenCount(lambda found: self._socket.tokens(found, prompt=False), self._body.top)
            begun = self._fed[:start]
            assert self._body.seed is not None
            request = self._request(None if limit is None else limit - start)
            prompt = self._prompt if isinstance(self._prompt, list) else [self._prompt]
            request |= {"prompt": [*prompt, *begun] if begun else self._prompt, "logprobs": self._tops}
            request["seed"] = _seed(self._body.seed, self._repeat, number)
            rest = self._grammar()
            if rest is not None and rest.advance(self._socket.text(begun) if begun else ""):
                request["grammar"] = rest.grammar()
            self._call(server.handle_completions, request)
            cached = self.cached_tokens if cached is None else cached
            if not self._paused:
                break
            if not self._replay:
                number += 1
            self._replay = []
            start = len(self._fed)
        self.cached_tokens = cached
        self._settle(start, exact=True)

    def _segment_of(self, text: str) -> tuple[int, int]:
        """The segment that the carried tokens end in, and how many tokens lie before it: always whole characters."""
        count = len(self._fed)
        for number in range(count // SEGMENT, 0, -1):
            for start in range(number * SEGMENT, min(count, (number + 1) * SEGMENT - 1) + 1):
                found = self._socket.text(self._fed[:start])
                if text.startswith(found):
                    return number, start
        return 0, 0

    def _request(self, left: int | None) -> dict[str, Any]:
        """What every request to llama.cpp has."""
        request: dict[str, Any] = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "timings_per_token": True,
            "return_progress": True,  # so that a request can be cancelled while its prompt is read
            "cache_prompt": True,
        }
        if left is not None:
            request["max_tokens"] = left
        for name in _SAMPLING:
            value = getattr(self._body, name)
            if value is not None:
                request[name] = value
        if self._body.seed is not None:
            request["seed"] = _seed(self._body.seed, self._repeat, 0)
        elif self._calls_tools:
            drawn = int.from_bytes(hashlib.sha256(self._run.work.response_id.encode()).digest()[:4], "big")
            request["seed"] = _seed(drawn, self._repeat, 0)
        return request

    @property
    def _tops(self) -> int:
        """Alternatives to ask for: one at least, as the ids of the tokens come with the logprobs."""
        return max(1, self._body.top or 0)

    def _shaped_for(self, text: str) -> dict[str, Any]:
        """The fields of the chat route, for an answer that begins with ``text``."""
        shape = self._shape(text)
        if "tools" not in shape:  # llama.cpp does not stream both; the ids stay unknown then
            shape |= {"logprobs": True, "top_logprobs": self._tops}
        return shape

    def _grammar(self) -> Rest | None:
        """The grammar of an answer in JSON at its beginning; raise CallerError if a schema cannot be followed."""
        body = self._body
        if not isinstance(body, ChatBody) or not body.wants_json:
            return None
        assert body.response_format is not None
        model = self._run.model
        grammar = model.grammars.of(body.response_format, model.server.handle_chat_completions)
        if body.may_call_tools or grammar is None:
            return None
        try:
            return Rest(grammar)
        except GrammarError:
            return None

    def _continued(self, text: str, ids: list[int]) -> str | list[Any]:
        if not text:
            return self._prompt
        if isinstance(self._prompt, str):
            return [self._prompt, *ids] if ids else self._prompt + text
        rest: list[Any] = list(ids) if ids else [text]
        return [*self._prompt, *rest]

    def _shape(self, text: str) -> dict[str, Any]:
        """The fields of the chat route."""
        assert isinstance(self._body, ChatBody)
        messages = list(self._body.messages)
        if text:
            messages.append({"role": "assistant", "content": text})
        fields: dict[str, Any] = {"messages": messages}
        for name in (*(_TOOLS if self._body.may_call_tools else ()), "chat_template_kwargs"):
            if getattr(self._body, name) is not None:
                fields[name] = getattr(self._body, name)
        if self._body.response_format is not None:
            fields["response_format"] = closed(self._body.response_format)
        return fields

    def _call(self, handle: Handle, request: dict[str, Any]) -> None:
        if self._run.cancelled:
            raise _Cancelled
        try:
            handle(msgspec.json.encode(request), self._on_chunk)
        except (ValueError, RuntimeError) as error:  # what xllamacpp raises for a request that llama.cpp refuses
            raise refusal(str(error), self._blamed) from error
        if self._run.cancelled:
            raise _Cancelled
        if self._failure is not None:
            raise self._failure
        if self._reason is None and self._error is None and not self._flow.stopped and not self._paused:
            raise EngineError("llama.cpp ended an answer without a reason")

    def _on_chunk(self, data: bytes) -> bool:
        """Called by xllamacpp for every token. It drops exceptions, so they are kept until it has returned."""
        try:
            return self._read(CHUNK.decode(data))
        except Exception as error:  # noqa: BLE001  # whatever it is, ``_call`` raises it
            self._failure = error
            return True

    def _read(self, chunk: Chunk) -> bool:
        """Take in a chunk; return whether the generation shall stop."""
        if chunk.error is not None:
            self._error = chunk.error
            return True
        if chunk.timings is not None:
            self.prompt_tokens = chunk.timings.cache_n + chunk.timings.prompt_n
            self.cached_tokens = chunk.timings.cache_n
        if chunk.usage is not None:
            self._made = chunk.usage.completion_tokens
        if chunk.choices:
            self._take(chunk)
        return self._run.cancelled or self._flow.stopped or self._paused

    def _take(self, chunk: Chunk) -> None:
        choice = chunk.choices[0]
        piece = self._count.piece(chunk)
        if piece is not None and not self._mute:
            self._got(piece)
        if choice.delta.tool_calls and not self._mute:
            self._called(choice.delta.tool_calls)
        if choice.finish_reason is not None:
            if self._replay:  # it ended before it came to where the customer's text ends: another way
                self._paused = True
            else:
                self._reason = choice.finish_reason

    def _called(self, parts: list[dict[str, Any]]) -> None:
        """Parts of tool calls, with the tokens that they are made of."""
        if self._again:
            raise EngineError("llama.cpp has made another answer than before")
        calls, ids = self._calls.feed(parts), self._new(self._count.silent())
        self.tokens += len(ids)
        if calls or ids:
            self._run.progress(Delta(index=self._index, text="", token_ids=ids, calls=calls))

    def _new(self, ids: list[int]) -> list[int]:
        """Those of these tokens that nobody has counted before."""
        known = min(self._uncounted, len(ids))
        self._uncounted -= known
        return ids[known:]

    def _over_again(self, piece: Piece) -> Piece | None:
        """What of a piece of text comes after the text that the customer has."""
        text = piece.text[len(self._again) :]
        if not (piece.text.startswith(self._again) or self._again.startswith(piece.text)):
            raise EngineError("llama.cpp has made another answer than before")
        self._again = self._again[len(piece.text) :]
        ids = self._new(piece.ids)
        return Piece(text=text, ids=ids, entries=[]) if text or ids else None

    def _got(self, piece: Piece) -> None:
        """Text that llama.cpp has made: new, or drawn once more to get back to where another vehicle was."""
        if self._again:
            rest = self._over_again(piece)
            if rest is None:
                return
            piece = rest
        count = len(piece.ids)
        if self._replay:
            if self._replay[:count] == piece.ids:
                del self._replay[:count]
            else:
                self._paused = True
            return
        self._fed += piece.ids
        self._give_out(self._flow.feed(piece), None)
        ends = self._segment_ends
        self._paused = ends is not None and len(self._fed) >= ends and min(self._fed[-count:], default=0) >= 0

    def _give_out(self, pieces: list[Piece], finish_reason: str | None) -> None:
        if self._mute:
            return
        if not pieces and finish_reason is None:
            return
        entries = [entry for piece in pieces for entry in piece.entries]
        ids = [number for piece in pieces for number in piece.ids]
        self._entries += entries
        self.tokens += len(ids)
        self._run.progress(
            Delta(
                index=self._index,
                text="".join(piece.text for piece in pieces),
                token_ids=ids,
                logprobs=answer.pack_entries(entries),
                finish_reason=finish_reason,
            )
        )

    def _settle(self, carried_ids: int, *, exact: bool) -> None:
        """Bring the counts of one run of llama.cpp to those of the whole answer."""
        if self._error is not None:
            if self._error.get("type") != "exceed_context_size_error":
                raise self._refused(self._error)
            if not self.carried_tokens and not self._fed:
                count, room = (int(self._error.get(name, 0)) for name in ("n_prompt_tokens", "n_ctx"))
                raise answer.context_length_exceeded(self._run.work.kind, count, room)
            self._reason = "length"  # an unbroken run would have ended here too: the context is full
        if exact and self.prompt_tokens:
            self.prompt_tokens -= carried_ids
        else:
            self.prompt_tokens = self._count_prompt()
        self.cached_tokens = min(self.cached_tokens, self.prompt_tokens)
        if self._reason is not None and not self._flow.stopped:
            rest = self._new(self._count.rest(self._made, ended=self._reason != "length"))
            if rest:
                self._give_out([Piece(text="", ids=rest, entries=[])], None)

    def _refused(self, error: dict[str, Any]) -> MotorpoolError:
        if int(error.get("code", 500)) >= 500:
            return EngineError("llama.cpp failed")
        if isinstance(self._prompt, list) and "invalid tokens" in str(error.get("message")):
            return CallerError("prompt holds tokens that the model does not have", code="invalid_value", param="prompt")
        return refusal(error, self._blamed)

    @property
    def _blamed(self) -> str | None:
        """The field that is most likely at fault if llama.cpp refuses the request."""
        body = self._body
        return "response_format" if isinstance(body, ChatBody) and body.wants_json and not body.tools else None

    def _count_prompt(self) -> int:
        if isinstance(self._prompt, str):
            return len(self._socket.tokens(self._prompt, prompt=True))
        return len(self._prompt)

    def _finish_reason(self) -> str:
        return "stop" if self._flow.stopped else self._reason or "stop"

    def _echo(self) -> str:
        if not getattr(self._body, "echo", False):
            return ""
        return self._prompt if isinstance(self._prompt, str) else self._socket.text(self._prompt)


def _seed(seed: int, repeat: int, segment: int) -> int:
    """The seed of one segment of one choice; that of the first one of all is the request's own."""
    found = (seed + repeat + segment * _SEED_STEP) & _SEED_BITS
    return found if found != _SEED_BITS else _SEED_BITS >> 1


def broken(message: str) -> MotorpoolError:
    """An error of ours, not of the request: status 500."""
    return MotorpoolError(message, code="engine_error")
