"""Signed releases of models and agents by The Update Framework (TUF): bytes in, verdict out.

Decides: whether a file is what the publishers released: named, with this SHA-256 and length, by targets that a
threshold of their keys signed, that snapshot and timestamp vouch for, none of it expired or older than seen before.
Anything else (unreadable, signed by too few or foreign keys, expired, rolled back, altered) is refused.
Must not: fetch, read files, or keep state. The root is pinned at installation; the caller keeps the ``Seen`` of the
last good verdict. Only the top-level targets count: delegations are not followed.
Called by: nothing in the running product yet; a library with its own tests. Needs the extra ``trust``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec

from motorpool.errors import SetupError

if TYPE_CHECKING:
    # Documented names of this module, which it takes from an inner one without saying so to type checkers.
    from tuf.api.metadata import MetaFile, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

# The most that a file of metadata may have, as the framework's own client has it.
MAX_BYTES: Final = {"root": 512_000, "timestamp": 16_384, "snapshot": 2_000_000, "targets": 5_000_000}
MAX_NEW_ROOTS: Final = 256


class Refusal(StrEnum):
    """Why a release is not to be used."""

    UNREADABLE = "unreadable"  # not metadata of the role that it should be, or too long
    SIGNATURE = "signature"  # signed by fewer of the role's keys than its threshold
    EXPIRED = "expired"  # metadata that must no longer be used
    ROLLED_BACK = "rolled_back"  # older than what was seen before, or a root out of turn
    MISMATCH = "mismatch"  # the parts of the metadata are not of one and the same release
    UNKNOWN_TARGET = "unknown_target"  # no such name in this release
    ALTERED_TARGET = "altered_target"  # another hash or length than was released


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The highest version of each role that was seen in a good release; 0 before the first."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0


class Papers(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of a release. ``root`` is the pinned one; ``new_roots`` lead on from it, each by one version."""

    root: bytes
    new_roots: tuple[bytes, ...] = ()
    timestamp: bytes
    snapshot: bytes
    targets: bytes


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it lies here: its name in the release, and what was measured of it."""

    name: str
    sha256: bytes
    length: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """``refusal`` is None for a release to use: then ``seen`` is what to keep, and it holds until ``until_ms``."""

    refusal: Refusal | None
    seen: Seen | None = None
    until_ms: int = 0


class _RefusedError(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def check_release(papers: Papers, target: Target, seen: Seen, now_ms: int) -> Verdict:
    """Judge a release and one file of it at ``now_ms``; never raises on what a publisher or a thief may send.

    Raise SetupError if the framework is not installed.
    """
    try:
        import tuf.api.metadata  # noqa: F401, PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise SetupError(
            "signed releases need The Update Framework: pip install 'motorpool[trust]'", code="extra_missing"
        ) from error
    try:
        return _check(papers, target, seen, now_ms)
    except _RefusedError as refused:
        return Verdict(refusal=refused.refusal)


def _check(papers: Papers, target: Target, seen: Seen, now_ms: int) -> Verdict:
    """The framework's own order: root, timestamp, snapshot, targets, file."""
    root = _final_root(papers)
    timestamp: Timestamp = _opened("timestamp", papers.timestamp, root)
    _same(timestamp.snapshot_meta, papers.snapshot)
    snapshot: Snapshot = _opened("snapshot", papers.snapshot, root)
    meta = snapshot.meta.get("targets.json")
    if meta is None:
        raise _RefusedError(Refusal.MISMATCH)
    _same(meta, papers.targets)
    targets: Targets = _opened("targets", papers.targets, root)
    same = snapshot.version == timestamp.snapshot_meta.version and targets.version == meta.version
    _need(same, Refusal.MISMATCH)
    now = Seen(root=root.version, timestamp=timestamp.version, snapshot=snapshot.version, targets=targets.version)
    _need(_goes_on(now, seen), Refusal.ROLLED_BACK)
    until_ms = min(int(part.expires.timestamp()) * 1000 for part in (root, timestamp, snapshot, targets))
    _need(_in_time(now_ms, until_ms), Refusal.EXPIRED)
    _need(target.name in targets.targets, Refusal.UNKNOWN_TARGET)
    _need(_is_released(targets, target), Refusal.ALTERED_TARGET)
    return Verdict(refusal=None, seen=now, until_ms=until_ms)


def _final_root(papers: Papers) -> Root:
    """The newest root: each is signed as itself and as the one before it demand. Old ones may have expired."""
    _need(len(papers.new_roots) <= MAX_NEW_ROOTS, Refusal.UNREADABLE)
    root: Root = _opened("root", papers.root, None)
    for data in papers.new_roots:
        newer: Root = _opened("root", data, root)
        _opened("root", data, newer)
        _need(newer.version == root.version + 1, Refusal.ROLLED_BACK)
        root = newer
    return root


def _opened(role: str, data: bytes, root: Root | None) -> Any:
    """The signed part of ``data``, if a threshold of the keys that ``root`` names for the role signed it.

    Without a ``root`` it is the pinned root, which must at least be signed as it demands itself.
    """
    from tuf.api.exceptions import RepositoryError, UnsignedMetadataError  # noqa: PLC0415 - an extra
    from tuf.api.metadata import Metadata  # noqa: PLC0415 - an extra

    _need(len(data) <= MAX_BYTES[role], Refusal.UNREADABLE)
    try:
        paper: Metadata[Any] = Metadata.from_bytes(data)
        signed = paper.signed
        _need(signed.type == role, Refusal.UNREADABLE)
        (root or signed).verify_delegate(role, paper.signed_bytes, paper.signatures)
    except UnsignedMetadataError as error:
        raise _RefusedError(Refusal.SIGNATURE) from error
    except (RepositoryError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # Fields of odd types that the framework takes in and stumbles over later.
        raise _RefusedError(Refusal.UNREADABLE) from error
    return signed


def _same(meta: MetaFile, data: bytes) -> None:
    """Is this the file that the role above it vouches for, where it names hashes and a length."""
    from tuf.api.exceptions import LengthOrHashMismatchError  # noqa: PLC0415 - an extra

    try:
        meta.verify_length_and_hashes(data)
    except LengthOrHashMismatchError as error:
        raise _RefusedError(Refusal.MISMATCH) from error


def _goes_on(now: Seen, seen: Seen) -> bool:
    return all(getattr(now, role) >= getattr(seen, role) for role in MAX_BYTES)


def _in_time(now_ms: int, until_ms: int) -> bool:
    return now_ms < until_ms


def _is_released(targets: Targets, target: Target) -> bool:
    released = targets.targets[target.name]
    return released.length == target.length and released.hashes.get("sha256") == target.sha256.hex()


def _need(holds: bool, refusal: Refusal) -> None:
    if not holds:
        raise _RefusedError(refusal)
