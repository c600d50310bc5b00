"""Invariant 22, the metadata: only a release that is signed by enough, in time, newest and unaltered is to be used."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, Key  # type: ignore[attr-defined]
from tests.invariant_world import many
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from motorpool.errors import SetupError
from motorpool.trust import releases
from motorpool.trust.releases import Papers, Refusal, Seen, Target, Verdict, check_release

NOW_MS = 1_790_000_000_000
DAY_MS = 86_400_000
NOW = datetime.fromtimestamp(NOW_MS // 1000, tz=UTC)
ROLES = ("root", "timestamp", "snapshot", "targets")
ABOVE = ("timestamp", "snapshot", "targets")
THRESHOLD = 2
Signers = tuple[CryptoSigner, ...]
KEYS: dict[str, Signers] = {role: tuple(CryptoSigner.generate_ed25519() for _ in range(3)) for role in ROLES}
NEW_KEYS: Signers = tuple(CryptoSigner.generate_ed25519() for _ in range(3))
FOREIGN: Signers = tuple(CryptoSigner.generate_ed25519() for _ in range(3))

NAME = "models/tiny-q4.gguf"
MODEL = b"the weights of a model"
TARGET = Target(name=NAME, sha256=hashlib.sha256(MODEL).digest(), length=len(MODEL))
VERSIONS = {"root": 3, "timestamp": 40, "snapshot": 12, "targets": 9}
SEEN = Seen(**VERSIONS)
DAYS = {"root": 300, "timestamp": 1, "snapshot": 7, "targets": 90}


def written(part: Any, signers: Signers) -> bytes:
    paper = Metadata(part)
    for signer in signers:
        paper.sign(signer, append=True)
    return paper.to_bytes()


def made_root(version: int, days: int, keys: dict[str, Signers], signers: Signers) -> bytes:
    roles = {role: Role([key.public_key.keyid for key in keys[role]], THRESHOLD) for role in ROLES}
    public: dict[str, Key] = {key.public_key.keyid: key.public_key for role in ROLES for key in keys[role]}
    root = Root(version=version, expires=NOW + timedelta(days=days), keys=public, roles=roles)
    return written(root, signers)


@cache
def released(
    *,
    versions: tuple[tuple[str, int], ...] = (),
    days: tuple[tuple[str, int], ...] = (),
    signers: tuple[tuple[str, Signers], ...] = (),
    hashes: tuple[tuple[str, str], ...] = (("sha256", TARGET.sha256.hex()),),
    vouched: tuple[tuple[str, int], ...] = (),
) -> Papers:
    """A release as its publishers make it, two of three signing each role; each argument makes a part of it odd."""
    version, day = VERSIONS | dict(versions), DAYS | dict(days)
    by = {role: KEYS[role][:THRESHOLD] for role in ROLES} | dict(signers)
    expires = {role: NOW + timedelta(days=day[role]) for role in ROLES}
    file = TargetFile(TARGET.length, dict(hashes), NAME)
    targets = written(
        Targets(version=version["targets"], expires=expires["targets"], targets={NAME: file}), by["targets"]
    )
    claimed = version | dict(vouched)
    meta = {"targets.json": MetaFile.from_data(claimed["targets"], targets, ["sha256"])}
    snapshot = written(Snapshot(version=version["snapshot"], expires=expires["snapshot"], meta=meta), by["snapshot"])
    link = MetaFile.from_data(claimed["snapshot"], snapshot, ["sha256"])
    timestamp = written(
        Timestamp(version=version["timestamp"], expires=expires["timestamp"], snapshot_meta=link), by["timestamp"]
    )
    root = made_root(version["root"], day["root"], KEYS, by["root"])
    return Papers(root=root, timestamp=timestamp, snapshot=snapshot, targets=targets)


GOOD = released()


def checked(papers: Papers = GOOD, target: Target = TARGET, seen: Seen = SEEN, now_ms: int = NOW_MS) -> Verdict:
    return check_release(papers, target, seen, now_ms)


def altered(papers: Papers, role: str, data: bytes) -> Papers:
    return msgspec.structs.replace(papers, **{role: data})


@pytest.mark.parametrize("seen", [Seen(), SEEN])
def test_a_release_of_enough_publishers_is_good_until_its_first_part_expires(seen: Seen) -> None:
    assert checked(seen=seen) == Verdict(refusal=None, seen=SEEN, until_ms=NOW_MS + DAY_MS)
    assert checked(now_ms=NOW_MS + DAY_MS - 1).refusal is None
    assert checked(now_ms=NOW_MS + DAY_MS).refusal is Refusal.EXPIRED


# Each is made once; the properties below pick from them.
WRONG: dict[str, tuple[Refusal, Papers]] = {
    **{
        f"{role}: {why}": (Refusal.SIGNATURE, released(signers=((role, by),)))
        for role in ROLES
        for why, by in {
            "nobody": (),
            "below the threshold": KEYS[role][:1],
            "one of them foreign": (KEYS[role][0], FOREIGN[0]),
            "foreign keys": FOREIGN,
            "another role's keys": KEYS[ROLES[ROLES.index(role) - 1]],
        }.items()
    },
    **{f"{role} expired": (Refusal.EXPIRED, released(days=((role, 0),))) for role in ROLES},
    **{
        f"{role} rolled back": (Refusal.ROLLED_BACK, released(versions=((role, VERSIONS[role] - 1),))) for role in ROLES
    },
    **{
        f"{role} is not the one vouched for": (Refusal.MISMATCH, released(vouched=((role, VERSIONS[role] + 1),)))
        for role in ("snapshot", "targets")
    },
    **{
        f"{role} of another release": (
            Refusal.MISMATCH,
            altered(GOOD, role, getattr(released(versions=((role, VERSIONS[role] + 1),)), role)),
        )
        for role in ("snapshot", "targets")
    },
    **{
        f"{role} in the place of the {place}": (
            Refusal.UNREADABLE if place in ("root", "timestamp") else Refusal.MISMATCH,
            altered(GOOD, place, getattr(GOOD, role)),
        )
        for role in ROLES
        for place in ROLES
        if role != place
    },
    "only a hash that nobody measured": (Refusal.ALTERED_TARGET, released(hashes=(("sha512", "00" * 64),))),
    "another file": (Refusal.ALTERED_TARGET, released(hashes=(("sha256", "00" * 32),))),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_wrong_release_gets_its_own_refusal(why: str) -> None:
    refusal, papers = WRONG[why]
    assert checked(papers) == Verdict(refusal=refusal)


OTHER_FILES: dict[str, tuple[Refusal, dict[str, Any]]] = {
    "another hash": (Refusal.ALTERED_TARGET, {"sha256": hashlib.sha256(b"x").digest()}),
    "no hash": (Refusal.ALTERED_TARGET, {"sha256": b""}),
    "longer": (Refusal.ALTERED_TARGET, {"length": TARGET.length + 1}),
    "not in it": (Refusal.UNKNOWN_TARGET, {"name": "models/other.gguf"}),
}


@pytest.mark.parametrize("why", OTHER_FILES)
def test_a_file_that_was_not_released_is_refused(why: str) -> None:
    refusal, changes = OTHER_FILES[why]
    assert checked(target=msgspec.structs.replace(TARGET, **changes)) == Verdict(refusal=refusal)


def test_a_snapshot_without_the_targets_vouches_for_nothing() -> None:
    expires = NOW + timedelta(days=1)
    snapshot = written(Snapshot(version=12, expires=expires, meta={"a.json": MetaFile(1)}), KEYS["snapshot"])
    timestamp = written(Timestamp(version=40, expires=expires, snapshot_meta=MetaFile(12)), KEYS["timestamp"])
    papers = msgspec.structs.replace(GOOD, snapshot=snapshot, timestamp=timestamp)
    assert checked(papers).refusal is Refusal.MISMATCH


def test_new_roots_lead_to_new_keys_and_the_old_ones_are_worth_nothing_then() -> None:
    keys = KEYS | {"root": NEW_KEYS, "timestamp": NEW_KEYS}
    both = (*KEYS["root"], *NEW_KEYS)
    good = released(days=(("root", -9),), signers=(("timestamp", NEW_KEYS),))  # the old root has expired
    turned = msgspec.structs.replace(good, new_roots=(made_root(4, 300, keys, both),))
    assert checked(turned).seen == msgspec.structs.replace(SEEN, root=4)
    assert checked(altered(turned, "timestamp", GOOD.timestamp)).refusal is Refusal.SIGNATURE
    assert checked(GOOD, seen=Seen(root=4)).refusal is Refusal.ROLLED_BACK
    for refusal, root in (
        (Refusal.SIGNATURE, made_root(4, 300, keys, NEW_KEYS)),  # not as the old root demands
        (Refusal.SIGNATURE, made_root(4, 300, keys, KEYS["root"])),  # not as the new one does
        (Refusal.ROLLED_BACK, made_root(5, 300, keys, both)),
        (Refusal.ROLLED_BACK, made_root(3, 300, keys, both)),
        (Refusal.EXPIRED, made_root(4, 0, keys, both)),
        (Refusal.UNREADABLE, GOOD.targets),
    ):
        assert checked(msgspec.structs.replace(turned, new_roots=(root,))).refusal is refusal


def test_there_is_an_end_to_new_roots_and_to_long_metadata() -> None:
    assert checked(msgspec.structs.replace(GOOD, new_roots=(GOOD.root,) * 257)).refusal is Refusal.UNREADABLE
    padded = GOOD.timestamp + b" " * releases.MAX_BYTES["timestamp"]
    assert Metadata.from_bytes(padded).signed.version == VERSIONS["timestamp"]
    assert checked(altered(GOOD, "timestamp", padded)).refusal is Refusal.UNREADABLE


def _always(*_: object) -> bool:
    return True


def _no_check(_meta: object, _data: bytes) -> None:
    return None


@pytest.mark.parametrize(
    ("name", "always", "wrong"),
    [
        ("_in_time", _always, [f"{role} expired" for role in ROLES]),
        ("_goes_on", _always, [f"{role} rolled back" for role in ROLES]),
        ("_is_released", _always, ["another file", "only a hash that nobody measured"]),
    ],
)
def test_each_check_is_needed(monkeypatch: pytest.MonkeyPatch, name: str, always: Any, wrong: list[str]) -> None:
    """Without it, a release that must be refused would be used."""
    monkeypatch.setattr(releases, name, always)
    assert all(checked(WRONG[why][1]).refusal is None for why in wrong)


def test_the_check_of_the_hash_of_metadata_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, two sets of targets of the same version could be told apart by nobody."""
    twin = altered(GOOD, "targets", released(hashes=(("sha256", "00" * 32),)).targets)
    assert checked(twin).refusal is Refusal.MISMATCH
    monkeypatch.setattr(releases, "_same", _no_check)
    assert checked(twin).refusal is Refusal.ALTERED_TARGET


def test_the_check_of_signatures_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Root, "verify_delegate", lambda *_: None)
    assert all(checked(papers).refusal is None for why, (_, papers) in WRONG.items() if "foreign keys" in why)


def test_without_the_framework_the_module_loads_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, motorpool.trust.releases; sys.exit(any(name.partition('.')[0] == 'tuf' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    monkeypatch.setitem(sys.modules, "tuf.api.metadata", None)
    with pytest.raises(SetupError, match=r"motorpool\[trust\]"):
        checked()


def _flipped(data: bytes) -> st.SearchStrategy[bytes]:
    at = st.integers(0, len(data) - 1)
    return st.one_of(
        st.builds(lambda i, bits: data[:i] + bytes([data[i] ^ bits]) + data[i + 1 :], at, st.integers(1, 255)),
        st.builds(lambda i: data[:i], at),
        st.builds(lambda i: data[:i] + data[i + 1 :], at),
    )


Attack = tuple[Papers, Target, Seen, int]
_roles = st.sampled_from(ABOVE)
_bytes = _roles.flatmap(lambda role: _flipped(getattr(GOOD, role)).map(lambda data: altered(GOOD, role, data)))
_garbage = st.builds(lambda role, data: altered(GOOD, role, data), _roles, st.binary(max_size=64))
_newer = st.builds(
    lambda role, by: msgspec.structs.replace(SEEN, **{role: VERSIONS[role] + by}),
    st.sampled_from(ROLES),
    st.integers(1, 2**40),
)
_other = st.one_of(
    st.binary(max_size=40).map(lambda sha256: {"sha256": sha256}),
    st.integers(0, 2**40).map(lambda length: {"length": length}),
    st.text(max_size=20).map(lambda name: {"name": name}),
).map(lambda changes: msgspec.structs.replace(TARGET, **changes))
attacks: st.SearchStrategy[Attack] = st.one_of(
    st.tuples(
        st.sampled_from([papers for _, papers in WRONG.values()]),
        st.just(TARGET),
        st.just(SEEN),
        st.integers(NOW_MS, NOW_MS + DAY_MS - 1),
    ),
    st.tuples(st.just(GOOD), st.just(TARGET), _newer, st.just(NOW_MS)),
    st.tuples(st.just(GOOD), _other.filter(lambda target: target != TARGET), st.just(SEEN), st.just(NOW_MS)),
    st.tuples(st.just(GOOD), st.just(TARGET), st.just(SEEN), st.integers(NOW_MS + DAY_MS, NOW_MS * 10)),
)


def _only_written_otherwise(papers: Papers) -> bool:
    """Is only the way of writing another, as the case of a signature's digits: the same words, signed the same."""
    mine, theirs = (Metadata.from_bytes(paper.timestamp) for paper in (GOOD, papers))
    signatures, others = (
        {keyid: bytes.fromhex(said.signature) for keyid, said in paper.signatures.items()} for paper in (mine, theirs)
    )
    return bool(mine.signed == theirs.signed) and signatures == others


@many
@given(attacks)
def test_invariant_22_nothing_but_the_newest_unaltered_release_of_enough_publishers_is_used(attack: Attack) -> None:
    papers, target, seen, now_ms = attack
    verdict = checked(papers, target, seen, now_ms)
    assert verdict.refusal is not None
    assert verdict.seen is None


@many
@given(_bytes | _garbage)
def test_invariant_22_no_altered_byte_of_the_metadata_gets_through(papers: Papers) -> None:
    verdict = checked(papers)
    if verdict.refusal is None:
        assert altered(papers, "timestamp", GOOD.timestamp) == GOOD
        assert _only_written_otherwise(papers)


@many
@given(
    st.builds(Seen, **{role: st.integers(0, VERSIONS[role]) for role in ROLES}),
    st.integers(NOW_MS, NOW_MS + DAY_MS - 1),
)
def test_invariant_22_the_newest_release_is_used_whatever_older_one_was_seen(seen: Seen, now_ms: int) -> None:
    assert checked(seen=seen, now_ms=now_ms) == Verdict(refusal=None, seen=SEEN, until_ms=NOW_MS + DAY_MS)
