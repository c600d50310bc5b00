"""What the owner says on the spot: "not now", "I need the car", "go on", and "stop until I sign again".

Decides: what those words mean until when. All but "go on" only restrict, so none needs a signature; "go on" lifts the
owner's own pause alone, and work still needs a consent that holds.
Must not: judge a consent, or lift anything that the owner did not say here.
Called by: ``agent.enrolment`` (which merges the acts into what the guard sees), ``agent.owner.desk``, the command line.

The acts are one small file in the agent's folder, written whole or not at all. A file that cannot be read is a pause
without an end, and whoever then says "go on" has to sign the consent again: nobody knows whether it was taken back.
"I need the car" holds until the car has been driven, or until "go on". Only the agent sees the car drive; it says so in
a file of its own, so that neither writes over the other.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from motorpool.errors import CallerError
from motorpool.trust.credentials import write_secret

ACTS_NAME: Final = "owner-acts.json"
DRIVEN_NAME: Final = "owner-driven.json"
LOCK_NAME: Final = "owner-acts.lock"
FOREVER_MS: Final = 1 << 53  # a pause whose end is an act, not a time
MIN_PAUSE_MS: Final = 60_000
MAX_PAUSE_MS: Final = 7 * 86_400_000
HOUR_MS: Final = 3_600_000
MAX_FILE_BYTES: Final = 4_096


class Acts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner has said, and what of it stands.

    ``paused_until_ms`` is 0 without a pause; ``need_car_ms`` is when the owner said so, 0 if not. ``withdrawn_ms``
    voids every consent that was signed up to then. ``unreadable``: the file is there and says nothing that makes sense.
    """

    paused_until_ms: int = 0
    need_car_ms: int = 0
    withdrawn_ms: int = 0
    unreadable: bool = False

    def stopped_until_ms(self, now_ms: int) -> int:
        """Until when there is no work, for the guard: 0 if nothing stands."""
        if self.unreadable or self.need_car_ms:
            return FOREVER_MS
        return self.paused_until_ms if self.paused_until_ms > now_ms else 0


_acts = msgspec.json.Decoder(Acts)
_driven = msgspec.json.Decoder(int)


def load_acts(agent_dir: Path) -> Acts:
    """The acts as they stand; "I need the car" no more once the car was driven since."""
    acts = _load(agent_dir)
    if acts.need_car_ms and acts.need_car_ms == _driven_ms(agent_dir):
        return msgspec.structs.replace(acts, need_car_ms=0)
    return acts


def pause(agent_dir: Path, now_ms: int, for_ms: int = HOUR_MS) -> Acts:
    """No work for a while. A pause never shortens an earlier one. Raises CallerError beyond a minute and a week."""
    if not MIN_PAUSE_MS <= for_ms <= MAX_PAUSE_MS:
        raise CallerError("a pause lasts from a minute to 7 days: to stop for longer, withdraw", code="pause_length")

    def longer(acts: Acts) -> Acts:
        return msgspec.structs.replace(acts, paused_until_ms=max(acts.paused_until_ms, now_ms + for_ms))

    return _change(agent_dir, longer)


def need_car(agent_dir: Path, now_ms: int) -> Acts:
    """No work until the car has been driven, or until "go on"."""

    def needed(acts: Acts) -> Acts:
        taken = _driven_ms(agent_dir)
        at_ms = max(now_ms, 1)
        return msgspec.structs.replace(acts, need_car_ms=at_ms if at_ms != taken else at_ms + 1)

    return _change(agent_dir, needed)


def resume(agent_dir: Path, now_ms: int) -> Acts:
    """Lift the owner's own pause and "I need the car".

    After a file that could not be read, the consent has to be signed again.
    """

    def lifted(acts: Acts) -> Acts:
        withdrawn_ms = max(acts.withdrawn_ms, now_ms) if acts.unreadable else acts.withdrawn_ms
        return Acts(withdrawn_ms=withdrawn_ms)

    return _change(agent_dir, lifted)


def withdraw_here(agent_dir: Path, now_ms: int, granted_ms: int = 0) -> Acts:
    """Void every consent signed up to now, without a key. ``granted_ms`` is the date of the one in place."""

    def withdrawn(acts: Acts) -> Acts:
        return msgspec.structs.replace(acts, withdrawn_ms=max(acts.withdrawn_ms, now_ms, granted_ms), unreadable=False)

    return _change(agent_dir, withdrawn)


def car_was_driven(agent_dir: Path, acts: Acts) -> None:
    """The agent saw the car drive: what the owner needed it for has begun, and this "I need the car" is over."""
    write_secret(agent_dir / DRIVEN_NAME, msgspec.json.encode(acts.need_car_ms))


class ActsFile:
    """Looks at the acts whenever asked, and reads them anew when one of the files has changed."""

    def __init__(self, agent_dir: Path) -> None:
        self._dir = agent_dir
        self._paths = (str(agent_dir / ACTS_NAME), str(agent_dir / DRIVEN_NAME))
        self._seen: tuple[object, ...] | None = None
        self._acts = Acts()

    def __call__(self) -> Acts:
        """What stands now."""
        seen = tuple(_stamp(path) for path in self._paths)
        if seen != self._seen:
            self._acts, self._seen = load_acts(self._dir), seen
        return self._acts


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        stat = os.stat(path)  # noqa: PTH116  # several times a second: without the detour over a Path
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _change(agent_dir: Path, change: Callable[[Acts], Acts]) -> Acts:
    """Change the file, one program at a time: the page and the command line may both be at it."""
    with _alone(agent_dir):
        acts = change(_load(agent_dir))
        write_secret(agent_dir / ACTS_NAME, msgspec.json.encode(acts))
    return load_acts(agent_dir)


@contextmanager
def _alone(agent_dir: Path) -> Iterator[None]:
    descriptor = os.open(agent_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _load(agent_dir: Path) -> Acts:
    try:
        data = (agent_dir / ACTS_NAME).read_bytes()
    except FileNotFoundError:
        return Acts()
    except OSError:
        return Acts(unreadable=True)
    if len(data) > MAX_FILE_BYTES:
        return Acts(unreadable=True)
    try:
        acts = _acts.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Acts(unreadable=True)
    if min(acts.paused_until_ms, acts.need_car_ms, acts.withdrawn_ms) < 0:
        return Acts(unreadable=True)
    return acts


def _driven_ms(agent_dir: Path) -> int:
    """Which "I need the car" is over; 0, so none, if that cannot be read."""
    try:
        return _driven.decode((agent_dir / DRIVEN_NAME).read_bytes()[:MAX_FILE_BYTES])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return 0
