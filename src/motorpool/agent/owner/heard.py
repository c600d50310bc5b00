"""What comes from the owner by way of the cell: signed papers, and wishes that the cell passes on.

Decides: what of it is done. A paper counts by its signature alone. A wish that the cell passes on only restricts, and
is done once: the cell repeats it until it sees the car rest, and a repetition must not undo what the owner said since.
The end of a pause needs the owner's signature, and must be later than what it ends.
Must not: let the cell allow anything, or log what a paper says.
Called by: ``agent.parts``, in a worker thread: all of it waits for the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from motorpool.agent.enrolment import PUBLIC_NAME, place_consent
from motorpool.agent.owner.acts import ACTS_NAME, MIN_PAUSE_MS, need_car, pause, resume
from motorpool.trust.consent import CLOCK_TOLERANCE_MS
from motorpool.trust.credentials import write_secret
from motorpool.trust.owneraccess import open_resume
from motorpool.wire import OwnerAct, OwnerAsked, OwnerDocument

HEARD_NAME: Final = "owner-heard.json"


class _Heard(msgspec.Struct, frozen=True, kw_only=True):
    """The date of the latest wish that was done, of the latest end of a pause, and the acts' file as that left it.

    ``since_ms`` is the date of the latest word that stands in that file, said in the car or passed on by the cell.
    """

    asked_ms: int = 0
    resumed_ms: int = 0
    acts_ns: int = 0
    since_ms: int = 0


class OwnerEar:
    """One vehicle's. ``hear`` returns whether anything has changed."""

    def __init__(self, agent_dir: Path, vehicle_id: str) -> None:
        self._dir = agent_dir
        self._vehicle_id = vehicle_id

    def hear(self, message: OwnerDocument | OwnerAsked, now_ms: int) -> bool:
        """Do what the owner said. Raises TrustError for a paper that does not hold, OSError for a full disk."""
        if isinstance(message, OwnerAsked):
            return self._rest(message, now_ms)
        public = self._public()
        ending = None if public is None else open_resume(message.document, public, self._vehicle_id)
        if ending is not None:
            return self._go_on(ending.resumed_ms, now_ms)
        place_consent(self._dir, self._vehicle_id, message.document, now_ms=now_ms)
        return True

    def _rest(self, message: OwnerAsked, now_ms: int) -> bool:
        heard = self._heard()
        left_ms = message.until_ms - now_ms
        if message.asked_ms <= max(heard.asked_ms, heard.resumed_ms) or left_ms < MIN_PAUSE_MS:
            return False
        since_ms = max(self._since_ms(heard), message.asked_ms)  # a wish dated back makes no word in the car older
        if message.act is OwnerAct.NEED_CAR:
            need_car(self._dir, now_ms)
        else:
            pause(self._dir, now_ms, left_ms)
        acts_ns = self._acts_ns()
        self._keep(msgspec.structs.replace(heard, asked_ms=message.asked_ms, acts_ns=acts_ns, since_ms=since_ms))
        return True

    def _go_on(self, resumed_ms: int, now_ms: int) -> bool:
        """End what was asked before ``resumed_ms``; what the owner has said in the car since then stands."""
        heard = self._heard()
        if not max(self._since_ms(heard), heard.resumed_ms) < resumed_ms <= now_ms + CLOCK_TOLERANCE_MS:
            return False
        resume(self._dir, now_ms)
        self._keep(msgspec.structs.replace(heard, resumed_ms=resumed_ms, acts_ns=self._acts_ns()))
        return True

    def _since_ms(self, heard: _Heard) -> int:
        acts_ns = self._acts_ns()
        return heard.since_ms if acts_ns == heard.acts_ns else acts_ns // 1_000_000

    def _public(self) -> bytes | None:
        try:
            return (self._dir / PUBLIC_NAME).read_bytes()
        except OSError:
            return None

    def _acts_ns(self) -> int:
        try:
            return (self._dir / ACTS_NAME).stat().st_mtime_ns
        except OSError:
            return 0

    def _heard(self) -> _Heard:
        try:
            return msgspec.json.decode((self._dir / HEARD_NAME).read_bytes(), type=_Heard)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return _Heard()  # then a wish may be done twice, which only restricts

    def _keep(self, heard: _Heard) -> None:
        write_secret(self._dir / HEARD_NAME, msgspec.json.encode(heard))
