"""Builds what a vehicle machine is told and what it should ask for, and drives one step by step."""

from __future__ import annotations

from typing import Any

import msgspec

from motorpool.agent.runtime.engine import Finished, Progressed
from motorpool.core.vehicle import VehicleMachine
from motorpool.core.vehicle_events import (
    Arrived,
    Attempt,
    Command,
    EngineReady,
    Event,
    LimitEngine,
    PublishState,
    PublishWork,
    StartEngine,
    VehicleConfig,
    VerdictGiven,
    WakeAt,
)
from motorpool.types import (
    Kind,
    ModelTier,
    Permit,
    Reason,
    ReasonCode,
    ReturnReason,
    Usage,
    VehicleState,
)
from motorpool.wire import (
    Delta,
    Grant,
    Item,
    Open,
    ResultItem,
    Results,
    Returned,
    ReturnItem,
    State,
)

CONFIG = VehicleConfig(model="m")
FOR_EVER_MS = 10**9
DOOR = (Reason(code=ReasonCode.DOOR_OPEN),)
GONE = (Reason(code=ReasonCode.DOOR_OPEN), Reason(code=ReasonCode.NOT_PLUGGED_IN))


def permit(
    watts_w: int = 100, until_ms: int = FOR_EVER_MS, tier: ModelTier = ModelTier.FULL, **also: Any
) -> VerdictGiven:
    allowed = Permit(watts_w=watts_w, until_ms=until_ms, tier=tier)
    return VerdictGiven(permit=allowed, soc_pct=80.0, plugged=True, **also)


def denial(reasons: tuple[Reason, ...] = DOOR) -> VerdictGiven:
    return VerdictGiven(permit=None, reasons=reasons, soc_pct=80.0, plugged=True)


START: list[Command] = [StartEngine(model="m"), LimitEngine(watts_w=100)]
READY = EngineReady(model="m", slots=2, fingerprint="null")


def grant(*lines: int, lease: str = "l1", ttl_ms: int = 600_000, **changes: Any) -> Arrived:
    message = Grant(
        lease_id=lease,
        incarnation="inc",
        job_id="job",
        kind=Kind.CHAT,
        model="m",
        ttl_ms=ttl_ms,
        items=[Item(line=line, body=b"body%d" % line) for line in lines],
    )
    return Arrived(message=msgspec.structs.replace(message, **changes))


def attempt(line: int, lease: str = "l1", number: int = 1) -> Attempt:
    return Attempt(
        key=f"{number}-{line}", kind=Kind.CHAT, body=b"body%d" % line, response_id=f"chatcmpl-{lease}-{line}"
    )


def finished(*keys: str, tokens: int = 3, body: bytes = b"{}") -> list[Finished]:
    return [
        Finished(key=key, status=200, body=body, usage=Usage(prompt_tokens=5, completion_tokens=tokens)) for key in keys
    ]


def grown(key: str, *texts: str, index: int = 0, logprobs: bytes = b"") -> Progressed:
    deltas = [Delta(index=index, text=text, token_ids=[len(text)], logprobs=logprobs) for text in texts]
    return Progressed(key=key, deltas=deltas)


def result(line: int, tokens: int = 3) -> ResultItem:
    return ResultItem(line=line, status=200, body=b"{}", prompt_tokens=5, completion_tokens=tokens)


def results(number: int, *items: ResultItem, lease: str = "l1", energy_mwh: int = 0) -> PublishWork:
    return PublishWork(
        message=Results(
            incarnation="inc",
            message_id=f"inc-{number}",
            lease_id=lease,
            job_id="job",
            items=list(items),
            energy_mwh=energy_mwh,
        )
    )


def returned(number: int, reason: ReturnReason, *items: ReturnItem, lease: str = "l1") -> PublishWork:
    return PublishWork(
        message=Returned(
            incarnation="inc",
            message_id=f"inc-{number}",
            lease_id=lease,
            job_id="job",
            reason=reason,
            items=list(items),
        )
    )


def opened(request: str = "r1", *, attempt: int = 0, stream: bool = True, **changes: Any) -> Arrived:
    message = Open(request_id=request, attempt=attempt, kind=Kind.CHAT, model="m", stream=stream, body=b"live")
    return Arrived(message=msgspec.structs.replace(message, **changes))


class Driver:
    """Hands events in at increasing times, validates after each, and drops what a test does not look at."""

    def __init__(self, config: VehicleConfig = CONFIG) -> None:
        self.machine = VehicleMachine(config, "inc")
        self.now_ms = 1_000_000
        self.states: list[State] = []

    def raw(self, event: Event, after_ms: int = 0) -> list[Command]:
        self.now_ms += after_ms
        commands = self.machine.handle(event, self.now_ms)
        self.machine.validate()
        return commands

    def do(self, event: Event, after_ms: int = 0) -> list[Command]:
        """The commands but State messages and wishes for time."""
        kept: list[Command] = []
        for command in self.raw(event, after_ms):
            if isinstance(command, PublishState) and isinstance(command.message, State):
                self.states.append(command.message)
            elif not isinstance(command, WakeAt):
                kept.append(command)
        return kept

    def ready(self) -> Driver:
        self.do(permit())
        self.do(READY)
        assert self.machine.state is VehicleState.READY
        return self
