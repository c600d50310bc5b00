"""Runs one batch through the official ``openai`` client, so that running the same command again goes on where it was.

A state file beside the output names the batch. Before anything is created it holds a random run id, which the batch
carries as metadata: a crash between creating the batch and writing its id down costs nothing, the batch is found again.

Decides: whether to hand in or to come back, and whether each line was answered exactly once.
Must not: print (the caller gets every change of state) or guess a result.
Called by: ``cli.batch`` and ``cli.demo``.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import openai
from openai.types import Batch

from motorpool.cli.output import write_whole
from motorpool.errors import SetupError

ENDED: Final = ("completed", "failed", "expired", "cancelled")
RUN_ID_KEY: Final = "motorpool_run"
OUTAGE_S: Final = 60.0
LISTED_BATCHES: Final = 1000  # how far back a batch is looked for by its run id


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where and how a batch may run, as ``motorpool`` of POST /v1/batches has it; the default asks for nothing."""

    regions: list[str] = []
    min_trust: int = 0
    priority: Literal["standard", "flex"] = "standard"

    @property
    def asked(self) -> dict[str, Any]:
        """What is sent: nothing of it if nothing was asked for, so that any server with OpenAI's API can be used."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    @property
    def words(self) -> str:
        """The same for people; empty if nothing was asked for."""
        where = f"only in {', '.join(self.regions)}" if self.regions else ""
        trust = f"on vehicles of trust {self.min_trust} or more" if self.min_trust else ""
        how = "when there is room (flex)" if self.priority == "flex" else ""
        return ", ".join(filter(None, (where, trust, how)))


NO_TERMS: Final = Terms()


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the state file beside the output."""

    version: int = 1
    run_id: str
    input_sha256: str
    base_url: str
    documents: int
    batch_id: str | None = None
    terms: Terms = NO_TERMS


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What came back, counted line by line against what was handed in."""

    handed_in: int
    completed: int
    failed: int
    missing: int
    doubled: int
    unknown: int
    prompt_tokens: int
    completion_tokens: int


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """One result with the name of its document; ``answer`` is the text, ``error`` says what went wrong."""

    document: str
    status: int
    answer: str | None
    parsed: Any = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: dict[str, Any] | None = None


def state_path(output: Path) -> Path:
    """Where the state of a run stands: beside its output."""
    return output.with_name(f"{output.name}.motorpool-state.json")


def load_state(output: Path) -> RunState | None:
    """The state of an earlier run to this output, or None; raise SetupError if it cannot be read."""
    path = state_path(output)
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except msgspec.MsgspecError as error:
        raise SetupError(f"{path} cannot be read: delete it to start again", code="state_unreadable") from error


def check_same(output: Path, state: RunState, digest: str, base_url: str, terms: Terms) -> None:
    """Raise SetupError if an earlier run, whose batch is at the server, was another one than this."""
    path = state_path(output)
    if state.input_sha256 != digest:
        raise SetupError(
            f"{path} belongs to a run with other documents, another prompt, model or limit: "
            "choose another -o, or delete that file to start anew",
            code="state_of_another_run",
        )
    if state.terms != terms:
        raise SetupError(
            f"{path} belongs to a run with another --region, --min-trust or --flex, and its batch keeps those: "
            "give the same ones, choose another -o, or cancel that batch and delete that file to start anew",
            code="state_of_other_terms",
        )
    if state.base_url.rstrip("/") != base_url.rstrip("/"):
        raise SetupError(
            f"{path} belongs to a run at {state.base_url}: give that --base-url, or delete the file to start anew",
            code="state_of_another_server",
        )


def save_state(output: Path, state: RunState) -> None:
    """Write the state file."""
    write_whole(state_path(output), msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")


def hand_in(
    client: openai.OpenAI, data: bytes, output: Path, *, window: str, documents: int, terms: Terms = NO_TERMS
) -> tuple[Batch, bool]:
    """The batch of this input: the one of an earlier run if there is one (True), else a new one (False).

    Raises SetupError when the server no longer knows the earlier batch, or did not take the terms.
    """
    base_url, digest = str(client.base_url), hashlib.sha256(data).hexdigest()
    state = load_state(output)
    if state is not None:
        if state.batch_id is not None:
            check_same(output, state, state.input_sha256, base_url, state.terms)  # no other server knows its batch
        earlier = _find(client, state, output)
        if earlier is not None and not nothing_ran(earlier):
            check_same(output, state, digest, base_url, terms)
            _check_taken(client, earlier, terms, output)
            return earlier, True
    # Here either nothing was ever handed in under this state, or the server refused it before a line had run.
    state = RunState(
        run_id=secrets.token_hex(12), input_sha256=digest, base_url=base_url, documents=documents, terms=terms
    )
    save_state(output, state)
    name = f"{output.stem}.jsonl"
    uploaded = client.files.create(file=(name, io.BytesIO(data)), purpose="batch")
    batch = client.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window=window,  # type: ignore[arg-type]  # Motorpool takes more windows than OpenAI's client names
        metadata={RUN_ID_KEY: state.run_id},
        extra_body={"motorpool": terms.asked} if terms.asked else None,
    )
    save_state(output, msgspec.structs.replace(state, batch_id=batch.id))
    _check_taken(client, batch, terms, output)
    return batch, False


def told(batch: Batch) -> dict[str, Any]:
    """What Motorpool says of a batch beside OpenAI's fields; empty from another server."""
    extra = (batch.model_extra or {}).get("motorpool")
    return extra if isinstance(extra, dict) else {}


def terms_of(batch: Batch) -> Terms:
    """The terms of a batch, as its server tells them."""
    fields = {name: value for name, value in told(batch).items() if name in Terms.__struct_fields__ and value}
    try:
        return msgspec.convert(fields, Terms)
    except msgspec.ValidationError:
        return NO_TERMS  # whatever server this is


def _check_taken(client: openai.OpenAI, batch: Batch, terms: Terms, output: Path) -> None:
    """Raise SetupError, after cancelling the batch, if the server did not take the terms: no document goes anywhere."""
    fields = told(batch)
    same = all(
        set(fields.get(name) or ()) == set(value) if name == "regions" else fields.get(name) == value
        for name, value in terms.asked.items()
    )
    if same:
        return
    try:
        client.batches.cancel(batch.id)
        end = "was cancelled"
    except openai.APIStatusError as error:
        end = f"could not be cancelled ({error.status_code})"
    state_path(output).unlink(missing_ok=True)
    raise SetupError(
        f"this server does not know --region, --min-trust and --flex: batch {batch.id} {end}", code="terms_not_taken"
    )


def nothing_ran(batch: Batch) -> bool:
    """Whether a batch was refused as a whole, so that handing it in again is no repetition."""
    counts = batch.request_counts
    return batch.status == "failed" and (counts is None or counts.completed + counts.failed == 0)


def _find(client: openai.OpenAI, state: RunState, output: Path) -> Batch | None:
    if state.batch_id is not None:
        try:
            return client.batches.retrieve(state.batch_id)
        except openai.NotFoundError as error:
            path = state_path(output)
            raise SetupError(
                f"the server does not know batch {state.batch_id} of {path}: delete that file to start anew",
                code="batch_unknown",
            ) from error
    for number, batch in enumerate(client.batches.list(limit=100)):
        if (batch.metadata or {}).get(RUN_ID_KEY) == state.run_id:
            save_state(output, msgspec.structs.replace(state, batch_id=batch.id))
            return batch
        if number >= LISTED_BATCHES:
            break
    return None


def waits(batch: Batch) -> bool:
    """Whether no vehicle could run this batch now. Only Motorpool says so; another server is taken to have room."""
    return told(batch).get("vehicles") == 0


def follow(
    client: openai.OpenAI,
    batch: Batch,
    on_change: Callable[[Batch], None],
    *,
    poll_s: float = 1.0,
    on_outage: Callable[[], None] = lambda: None,
    clock_s: Callable[[], float] = time.monotonic,
) -> Batch:
    """Poll until the batch has ended; ``on_change`` sees every answer.

    A server that does not answer is waited for, up to OUTAGE_S; ``on_outage`` hears of it once.
    """
    on_change(batch)
    silent_since_s: float | None = None
    while batch.status not in ENDED:
        time.sleep(poll_s)
        try:
            batch = client.batches.retrieve(batch.id)
        except (openai.APIConnectionError, openai.InternalServerError):
            now_s = clock_s()
            if silent_since_s is None:
                silent_since_s = now_s
                on_outage()
            if now_s - silent_since_s > OUTAGE_S:
                raise
            continue
        silent_since_s = None
        on_change(batch)
    return batch


class Estimate:
    """The time left of a batch, from how fast lines finished lately. Times in seconds of a clock that only grows.

    The first line takes longest (engines load, prompts are read): what came before it says nothing of the rest.
    """

    WINDOW_S: Final = 60.0

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def left_s(self, now_s: float, done: int, total: int) -> float | None:
        """Note ``done`` at ``now_s``; return the seconds left, None while nothing can be said yet."""
        if done >= total:
            return 0.0
        if done > 0 and (not self._seen or self._seen[-1][1] != done):
            self._seen.append((now_s, done))
        while len(self._seen) > 2 and self._seen[1][0] < now_s - self.WINDOW_S:
            self._seen.pop(0)
        if not self._seen:
            return None
        first_s, first_done = self._seen[0]
        if done <= first_done or now_s <= first_s:
            return None
        return (total - done) * (now_s - first_s) / (done - first_done)


def result_lines(client: openai.OpenAI, batch: Batch) -> Iterator[bytes]:
    """The lines of the output and the error file, streamed."""
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id is None:
            continue
        with client.files.with_streaming_response.content(file_id) as response:
            rest = b""
            for piece in response.iter_bytes():
                *lines, rest = (rest + piece).split(b"\n")  # only a line feed ends a line
                yield from (line for line in lines if line.strip())
            if rest.strip():
                yield rest


def join(names: list[str], lines: Iterable[bytes], *, parse: bool) -> tuple[list[Joined], Tally]:
    """Put each result beside the name of its document, in the order of the input, and count what is wrong.

    ``parse`` also reads the answers as JSON (a schema was asked for).
    """
    wanted = set(names)
    results: dict[str, Joined] = {}
    doubled = unknown = 0
    for line in lines:
        joined = _join_line(line, parse=parse)
        if joined.document not in wanted:
            unknown += 1
        elif joined.document in results:
            doubled += 1
        else:
            results[joined.document] = joined
    ordered = [results[name] for name in names if name in results]
    completed = [item for item in ordered if item.error is None]
    tally = Tally(
        handed_in=len(names),
        completed=len(completed),
        failed=len(ordered) - len(completed),
        missing=len(names) - len(ordered),
        doubled=doubled,
        unknown=unknown,
        prompt_tokens=sum(item.prompt_tokens for item in completed),
        completion_tokens=sum(item.completion_tokens for item in completed),
    )
    return ordered, tally


def _join_line(line: bytes, *, parse: bool) -> Joined:
    row = msgspec.json.decode(line, type=dict[str, Any])
    name = str(row.get("custom_id"))
    response = row.get("response") or {}
    status = int(response.get("status_code") or 0)
    body = response.get("body") or {}
    if status != 200:
        error = row.get("error") or body.get("error") or {"code": "no_answer", "message": "no answer and no reason"}
        return Joined(document=name, status=status, answer=None, error=error)
    choice = body["choices"][0]
    answer = choice["message"]["content"] or ""
    usage = body.get("usage") or {}
    parsed: Any = None
    if parse:
        try:
            parsed = msgspec.json.decode(answer)
        except msgspec.DecodeError:
            parsed = None  # cut off by the token limit: the text is there, and finish_reason says why
    return Joined(
        document=name,
        status=status,
        answer=answer,
        parsed=parsed,
        finish_reason=choice.get("finish_reason"),
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
    )


def write_results(output: Path, results: list[Joined]) -> None:
    """Write the joined results as JSONL, whole or not at all."""
    encoder = msgspec.json.Encoder()
    write_whole(output, b"".join(encoder.encode(result) + b"\n" for result in results))
