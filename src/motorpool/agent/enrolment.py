"""The owner's papers in the agent's folder: the pinned public key and the consent.

Decides: which file holds what. Must not: judge a consent (``trust.consent`` does).
Called by: ``agent.main`` (reading), the command line and the owner's page (enrolling, giving consent, taking it back).

``owner.pub`` is pinned at enrolment. ``owner.key`` is the owner's own; on one machine it lies beside it, on a real
vehicle it is on the owner's phone. ``consent.json`` holds the latest grant or withdrawal; no file is no consent.
``withdrawal.json`` keeps the newest withdrawal, so that a grant which was taken back stays so: whoever puts the old
``consent.json`` back, even while no agent runs, brings nothing back. ``granted.json`` keeps the newest grant that held:
an older one, with other limits, does not follow it. ``agent.owner.acts`` are merged into what the guard sees.
"""

from __future__ import annotations

import base64
import logging
import os
from pathlib import Path
from typing import Any, Final

import msgspec

from motorpool.agent.owner.acts import ActsFile, load_acts, withdraw_here
from motorpool.core.policy import ConsentView
from motorpool.errors import ConflictError, SetupError, TrustError
from motorpool.trust.consent import (
    CLOCK_TOLERANCE_MS,
    PURPOSE_COMPUTE,
    ConsentGrant,
    ConsentLimits,
    ConsentVerdict,
    ConsentWithdrawal,
    OwnerKey,
    check_consent,
    create_owner_key,
    grant_consent,
    owner_key,
    withdraw_consent,
)
from motorpool.trust.credentials import write_secret

PUBLIC_NAME: Final = "owner.pub"
PRIVATE_NAME: Final = "owner.key"
CONSENT_NAME: Final = "consent.json"
WITHDRAWAL_NAME: Final = "withdrawal.json"
GRANTED_NAME: Final = "granted.json"
PUBLIC_BYTES: Final = 32
log = logging.getLogger(__name__)


def enrol_owner(agent_dir: Path) -> OwnerKey:
    """The owner's key of this agent, made and pinned at the first call."""
    private, public = agent_dir / PRIVATE_NAME, agent_dir / PUBLIC_NAME
    if private.exists():
        key = owner_key(private.read_bytes())
        if not public.exists():  # the first call was cut off between the two files
            write_secret(public, key.public)
        return key
    if public.exists():
        raise SetupError(
            f"{agent_dir.name} has an owner already, whose key is not here: sign on the owner's device",
            code="owner_elsewhere",
        )
    key = create_owner_key()
    write_secret(private, key.private)
    write_secret(public, key.public)
    return key


def enrol_public_key(agent_dir: Path, public: bytes) -> None:
    """Pin the key of an owner whose private half is elsewhere, as on a phone; once and for all.

    Raises TrustError for bytes that are no key, ConflictError when another owner is enrolled.
    """
    if len(public) != PUBLIC_BYTES:
        raise TrustError("not a public key: 32 bytes are expected", code="owner_key_invalid")
    draft = agent_dir / f"{PUBLIC_NAME}.new"
    write_secret(draft, public)
    try:
        os.link(draft, agent_dir / PUBLIC_NAME)  # fails if there is one: nobody is enrolled over somebody else
    except FileExistsError as error:
        if _read(agent_dir / PUBLIC_NAME) != public:
            raise ConflictError("this car has an owner already, with another key", code="owner_enrolled") from error
    finally:
        draft.unlink()


def place_consent(agent_dir: Path, vehicle_id: str, data: bytes, *, now_ms: int) -> ConsentVerdict:
    """Put a paper in place that was signed elsewhere, if it is a withdrawal by the owner or a grant that holds now.

    Raises TrustError otherwise, and what was in place stays.
    """
    verdict = judge(agent_dir, vehicle_id, data, now_ms)
    if not verdict.valid and verdict.withdrawn_ms is None:
        reason = "" if verdict.refusal is None else verdict.refusal.value
        raise TrustError(f"this paper does not hold ({reason}): sign a new one", code="consent_refused")
    write_secret(agent_dir / CONSENT_NAME, data)
    _keep(agent_dir, verdict, data)
    return verdict


def judge(agent_dir: Path, vehicle_id: str, data: bytes | None, now_ms: int) -> ConsentVerdict:
    """What a paper is worth beside all that is kept in the folder."""
    public_key = _read(agent_dir / PUBLIC_NAME)
    withdrawn_ms = max(_withdrawn_ms(agent_dir, public_key, vehicle_id) or 0, load_acts(agent_dir).withdrawn_ms)
    newest_ms = _newest_ms(agent_dir, public_key, vehicle_id)
    return check_consent(data, public_key, vehicle_id, now_ms, withdrawn_ms=withdrawn_ms or None, newest_ms=newest_ms)


def read_consent(agent_dir: Path) -> bytes | None:
    """The paper in place; None if there is none."""
    return _read(agent_dir / CONSENT_NAME)


def current_grant(agent_dir: Path, vehicle_id: str, now_ms: int) -> ConsentGrant | None:
    """The owner's own grant that lies in the folder, whether or not it holds now."""
    return judge(agent_dir, vehicle_id, read_consent(agent_dir), now_ms).document


def papers(agent_dir: Path, vehicle_id: str, now_ms: int) -> dict[str, Any]:
    """What a device that signs has to know: whose key is pinned, the grant in place, and how new the next has to be."""
    public_key = _read(agent_dir / PUBLIC_NAME)
    grant = current_grant(agent_dir, vehicle_id, now_ms)
    return {
        "vehicle_id": vehicle_id,
        "now_ms": now_ms,
        "public": None if public_key is None else base64.b64encode(public_key).decode(),
        "key_in_car": (agent_dir / PRIVATE_NAME).exists(),
        "grant": None if grant is None else msgspec.to_builtins(grant),
        "next_grant_ms": _next_grant_ms(agent_dir, public_key, vehicle_id, now_ms),
    }


def give_consent(agent_dir: Path, vehicle_id: str, limits: ConsentLimits, *, now_ms: int, expires_ms: int) -> None:
    """Sign a consent for computing with the owner's key and put it in place.

    It is newer than every withdrawal and every grant that was seen.
    """
    key = enrol_owner(agent_dir)
    grant = ConsentGrant(
        vehicle_id=vehicle_id,
        purposes=(PURPOSE_COMPUTE,),
        limits=limits,
        granted_ms=_next_grant_ms(agent_dir, key.public, vehicle_id, now_ms),
        expires_ms=expires_ms,
    )
    write_secret(agent_dir / CONSENT_NAME, grant_consent(key, grant))


def confirm_consent(agent_dir: Path, vehicle_id: str, *, now_ms: int) -> ConsentGrant:
    """Sign the grant in place once more, with the same limits and the same end. Raises ConflictError without one."""
    grant = current_grant(agent_dir, vehicle_id, now_ms)
    if grant is None or now_ms >= grant.expires_ms:
        raise ConflictError(
            "there is no consent to confirm: give one with `motorpool owner grant`", code="nothing_to_confirm"
        )
    give_consent(agent_dir, vehicle_id, grant.limits, now_ms=now_ms, expires_ms=grant.expires_ms)
    return grant


def take_consent_back(agent_dir: Path, vehicle_id: str, *, now_ms: int) -> None:
    """Take every consent back; the agent sees it within its next look.

    Where the owner's key is here, a signed withdrawal takes the place of the consent. Where it is elsewhere, the car
    notes that the owner said so: taking back needs no key. Both cover the consent in place even if the clock was set
    back since that was given.
    """
    public_key = _read(agent_dir / PUBLIC_NAME)
    granted_ms = _granted_ms(_read(agent_dir / CONSENT_NAME), public_key, vehicle_id) or now_ms
    if public_key is not None and not (agent_dir / PRIVATE_NAME).exists():
        withdraw_here(agent_dir, now_ms, granted_ms)
        return
    key = enrol_owner(agent_dir)
    withdrawal = ConsentWithdrawal(vehicle_id=vehicle_id, withdrawn_ms=max(now_ms, granted_ms))
    data = withdraw_consent(key, withdrawal)
    write_secret(agent_dir / CONSENT_NAME, data)
    write_secret(agent_dir / WITHDRAWAL_NAME, data)


class ConsentFile:
    """Looks at the consent and the owner's acts whenever asked, and reads anew what has changed."""

    def __init__(self, path: Path, public_key_path: Path, vehicle_id: str) -> None:
        self._path = path
        self._vehicle_id = vehicle_id
        self._public_key_path = public_key_path
        self._public_key = _read(public_key_path)
        self._seen: tuple[int, ...] | None = None
        self._data: bytes | None = None
        self._verdict: ConsentVerdict | None = None
        self._view: ConsentView | None = None
        self._merged: tuple[ConsentView, int, ConsentView] | None = None
        self._acts = ActsFile(path.parent)
        self._acts_withdrawn_ms = 0
        self._withdrawn_ms = _withdrawn_ms(path.parent, self._public_key, vehicle_id)
        self._newest_ms = _newest_ms(path.parent, self._public_key, vehicle_id)

    def view(self, now_ms: int) -> ConsentView:
        """The verdict as the guard takes it. A file that cannot be read is no consent."""
        acts = self._acts()
        if acts.withdrawn_ms != self._acts_withdrawn_ms:
            self._acts_withdrawn_ms, self._verdict = acts.withdrawn_ms, None
        view = self._judged(now_ms)
        until_ms = acts.stopped_until_ms(now_ms)
        if until_ms == 0:
            return view
        merged = self._merged
        if merged is None or merged[0] is not view or merged[1] != until_ms:
            merged = view, until_ms, msgspec.structs.replace(view, paused_until_ms=until_ms)
            self._merged = merged
        return merged[2]

    def _judged(self, now_ms: int) -> ConsentView:
        try:
            stat = self._path.stat()
        except OSError:
            self._seen = self._verdict = None
            return ConsentView()
        seen = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
        if seen != self._seen:
            if self._public_key is None:  # the owner was enrolled after this agent had started
                self._public_key = _read(self._public_key_path)
            self._data = _read(self._path)
            self._seen = seen if self._data is not None else None
            self._verdict = None
        verdict, view = self._verdict, self._view
        if view is None or verdict is None or verdict.grant is None or now_ms >= verdict.grant.expires_ms:
            withdrawn_ms = max(self._withdrawn_ms or 0, self._acts_withdrawn_ms) or None
            verdict = check_consent(
                self._data,
                self._public_key,
                self._vehicle_id,
                now_ms,
                withdrawn_ms=withdrawn_ms,
                newest_ms=self._newest_ms,
            )
            self._verdict = verdict
            self._view = view = verdict.view()
            self._note(verdict)
        return view

    def _note(self, verdict: ConsentVerdict) -> None:
        """Remember beyond this process what the owner took back, and the newest grant. Both hold now in any case."""
        if verdict.withdrawn_ms is not None and verdict.withdrawn_ms > (self._withdrawn_ms or 0):
            self._withdrawn_ms = verdict.withdrawn_ms
        elif verdict.grant is not None and verdict.grant.granted_ms > (self._newest_ms or 0):
            self._newest_ms = verdict.grant.granted_ms
        else:
            return
        assert self._data is not None
        try:
            _keep(self._path.parent, verdict, self._data)
        except OSError as error:
            log.warning("%s: a paper of the owner's could not be kept: %s", self._vehicle_id, error.strerror)


def _next_grant_ms(agent_dir: Path, public_key: bytes | None, vehicle_id: str, now_ms: int) -> int:
    """The date for a new grant: newer than every withdrawal and grant that was seen, even if the clock was set back."""
    in_place_ms = _granted_ms(_read(agent_dir / CONSENT_NAME), public_key, vehicle_id) or 0
    seen_ms = (
        _withdrawn_ms(agent_dir, public_key, vehicle_id) or 0,
        load_acts(agent_dir).withdrawn_ms,
        _newest_ms(agent_dir, public_key, vehicle_id) or 0,
        in_place_ms if in_place_ms <= now_ms + CLOCK_TOLERANCE_MS else 0,  # one from the future never held
    )
    return max(now_ms, *(ms + 1 for ms in seen_ms))


def _keep(agent_dir: Path, verdict: ConsentVerdict, data: bytes) -> None:
    write_secret(agent_dir / (GRANTED_NAME if verdict.valid else WITHDRAWAL_NAME), data)


def _withdrawn_ms(agent_dir: Path, public_key: bytes | None, vehicle_id: str) -> int | None:
    """When the kept withdrawal was signed; None for anything that is no withdrawal by this owner for this vehicle."""
    return check_consent(_read(agent_dir / WITHDRAWAL_NAME), public_key, vehicle_id, 0).withdrawn_ms


def _newest_ms(agent_dir: Path, public_key: bytes | None, vehicle_id: str) -> int | None:
    """The date of the kept grant; None for anything that is no grant by this owner for this vehicle."""
    return _granted_ms(_read(agent_dir / GRANTED_NAME), public_key, vehicle_id)


def _granted_ms(data: bytes | None, public_key: bytes | None, vehicle_id: str) -> int | None:
    document = check_consent(data, public_key, vehicle_id, 0).document
    return None if document is None else document.granted_ms


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
