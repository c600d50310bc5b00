"""One attempt at embeddings on llama.cpp. Runs in a worker thread.

Decides: how many inputs llama.cpp gets at a time, which bounds how long a cancelled attempt goes on. Must not: touch
the event loop, or log an input. Called by: ``llama``.

Vectors are the mean over the tokens at length 1, as the model's file says. A vector does not depend on the other
inputs of its request but in its last bits, as several are computed in one batch.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any, Final

from motorpool.agent.runtime import answer, embedding
from motorpool.agent.runtime.embedding import Input
from motorpool.agent.runtime.engine import Cancelled, EngineEvent, Work
from motorpool.agent.runtime.llama_run import Model, broken
from motorpool.agent.runtime.llama_socket import refusal
from motorpool.errors import CallerError, EngineError, MotorpoolError
from motorpool.types import Usage

GROUP_BYTES: Final = 2048  # of text in one call of llama.cpp: a second of one core at most, or a single input
INPUTS_A_SLOT: Final = 4  # so that no slot waits for the others at every call
_TOKEN_BYTES: Final = 4
_TOO_LONG: Final = re.compile(r"input \((\d+) tokens\) is too large")


class EmbedRun:
    """One attempt."""

    def __init__(self, model: Model, work: Work, post: Callable[[list[EngineEvent]], None]) -> None:
        self._model = model
        self._work = work
        self._post = post
        self.cancelled = False

    def run(self) -> None:
        """Run to the end and post the final event, whatever it is."""
        key = self._work.key
        try:
            self._post([self._answer() or Cancelled(key=key)])
        except CallerError as error:
            self._post([answer.failed(key, error)])
        except MotorpoolError as error:
            self._post([answer.failed(key, broken(error.message))])
        except Exception as error:  # noqa: BLE001  # a foreign library may raise anything; the attempt must end
            self._post([answer.failed(key, broken(f"llama.cpp failed: {type(error).__name__}"))])

    def _answer(self) -> EngineEvent | None:
        """The final event; None if it was cancelled."""
        body = embedding.parse(self._work.body)
        vectors: list[bytes] = []
        prompt_tokens = 0
        for group in groups(body.inputs, INPUTS_A_SLOT * self._model.spec.slots):
            if self.cancelled:
                return None
            found, tokens = self._embed(group, len(vectors))
            vectors += found
            prompt_tokens += tokens
        if self.cancelled:
            return None
        usage = Usage(prompt_tokens=prompt_tokens)
        return embedding.finished(self._work, self._model.spec.model, body, vectors, usage)

    def _embed(self, group: list[Input], first: int) -> tuple[list[bytes], int]:
        """The vectors of some inputs and their tokens; ``first`` is the place of the first one in the request."""
        inputs = [self._with_edges(part) if isinstance(part, list) else part for part in group]
        try:
            found = self._model.server.handle_embeddings({"input": inputs, "encoding_format": "base64"})
        except (ValueError, RuntimeError) as error:
            raise refusal(str(error), "input") from error
        if found.get("error"):
            raise self._refused(found["error"], inputs, first)
        data = sorted(found["data"], key=lambda item: int(item["index"]))
        if [item["index"] for item in data] != list(range(len(group))):
            raise EngineError("llama.cpp left out an embedding")
        return [base64.b64decode(item["embedding"]) for item in data], int(found["usage"]["prompt_tokens"])

    def _with_edges(self, tokens: list[int]) -> list[int]:
        """Tokens between the marks that the model was trained with; those that begin with one have them already."""
        begin, end = self._model.edges
        return tokens if tokens[:1] == begin else [*begin, *tokens, *end]

    def _refused(self, error: dict[str, Any], inputs: list[Input], first: int) -> MotorpoolError:
        said = str(error.get("message"))
        if _TOO_LONG.search(said) or error.get("type") == "exceed_context_size_error":
            for place, part in enumerate(inputs):
                count = len(self._model.socket.tokens(part, prompt=True)) if isinstance(part, str) else len(part)
                if count > self._model.spec.context_tokens:
                    return embedding.too_long(first + place, count, self._model.spec.context_tokens)
        if "invalid tokens" in said:
            return CallerError("input holds tokens that the model does not have", code="invalid_value", param="input")
        return EngineError("llama.cpp failed") if int(error.get("code", 500)) >= 500 else refusal(error, "input")


def groups(inputs: list[Input], most: int) -> list[list[Input]]:
    """The inputs in order, in groups of up to ``most`` and about GROUP_BYTES."""
    found: list[list[Input]] = []
    size = 0
    for part in inputs:
        length = len(part.encode()) if isinstance(part, str) else _TOKEN_BYTES * len(part)
        if not found or len(found[-1]) >= most or size + length > GROUP_BYTES:
            found.append([])
            size = 0
        found[-1].append(part)
        size += length
    return found
