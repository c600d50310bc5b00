"""The owner's papers in the agent's folder: the pinned public key and the consent.

Decides: which file holds what. Must not: judge a consent (``trust.consent`` does).
Called by: ``agent.main`` (reading), the command line (enrolling an owner, giving consent, taking it back).

``owner.pub`` is pinned at enrolment. ``owner.key`` is the owner's own; on one machine it lies beside it, on a real
vehicle it is on the owner's phone. ``consent.json`` holds the latest grant or withdrawal; no file is no consent.
``withdrawal.json`` keeps the newest withdrawal, so that a grant which was taken back stays so: whoever puts the old
``consent.json`` back, even while no agent runs, brings nothing back.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from motorpool.core.guard import ConsentView
from motorpool.errors import SetupError
from motorpool.trust.consent import (
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


def give_consent(agent_dir: Path, vehicle_id: str, limits: ConsentLimits, *, now_ms: int, expires_ms: int) -> None:
    """Sign a consent for computing with the owner's key and put it in place; it is newer than every withdrawal."""
    key = enrol_owner(agent_dir)
    withdrawn_ms = _withdrawn_ms(_read(agent_dir / WITHDRAWAL_NAME), key.public, vehicle_id, now_ms)
    grant = ConsentGrant(
        vehicle_id=vehicle_id,
        purposes=(PURPOSE_COMPUTE,),
        limits=limits,
        granted_ms=now_ms if withdrawn_ms is None else max(now_ms, withdrawn_ms + 1),
        expires_ms=expires_ms,
    )
    write_secret(agent_dir / CONSENT_NAME, grant_consent(key, grant))


def take_consent_back(agent_dir: Path, vehicle_id: str, *, now_ms: int) -> None:
    """Sign a withdrawal and put it in place of the consent; the agent sees it within its next look.

    It covers the consent that is in place even if the clock was set back since that was given.
    """
    key = enrol_owner(agent_dir)
    verdict = check_consent(_read(agent_dir / CONSENT_NAME), key.public, vehicle_id, now_ms)
    granted_ms = now_ms if verdict.document is None else verdict.document.granted_ms
    withdrawal = ConsentWithdrawal(vehicle_id=vehicle_id, withdrawn_ms=max(now_ms, granted_ms))
    data = withdraw_consent(key, withdrawal)
    write_secret(agent_dir / CONSENT_NAME, data)
    write_secret(agent_dir / WITHDRAWAL_NAME, data)


class ConsentFile:
    """Looks at the consent whenever asked, and reads it anew when the file has changed."""

    def __init__(self, path: Path, public_key_path: Path, vehicle_id: str) -> None:
        self._path = path
        self._vehicle_id = vehicle_id
        self._public_key_path = public_key_path
        self._public_key = _read(public_key_path)
        self._seen: tuple[int, ...] | None = None
        self._data: bytes | None = None
        self._verdict: ConsentVerdict | None = None
        self._withdrawn_ms = _withdrawn_ms(_read(self._kept), self._public_key, vehicle_id, 0)

    @property
    def _kept(self) -> Path:
        return self._path.with_name(WITHDRAWAL_NAME)

    def view(self, now_ms: int) -> ConsentView:
        """The verdict as the guard takes it. A file that cannot be read is no consent."""
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
        verdict = self._verdict
        if verdict is None or verdict.grant is None or now_ms >= verdict.grant.expires_ms:
            verdict = check_consent(
                self._data, self._public_key, self._vehicle_id, now_ms, withdrawn_ms=self._withdrawn_ms
            )
            self._verdict = verdict
            if verdict.withdrawn_ms is not None and verdict.withdrawn_ms > (self._withdrawn_ms or 0):
                self._withdrawn_ms = verdict.withdrawn_ms
                self._keep_withdrawal()
        return verdict.view()

    def _keep_withdrawal(self) -> None:
        """Remember beyond this process what the owner took back. It holds now whether or not that succeeds."""
        assert self._data is not None
        try:
            write_secret(self._kept, self._data)
        except OSError as error:
            log.warning("%s: the withdrawal of the consent could not be kept: %s", self._vehicle_id, error.strerror)


def _withdrawn_ms(data: bytes | None, public_key: bytes | None, vehicle_id: str, now_ms: int) -> int | None:
    """When a kept withdrawal was signed; None for anything that is no withdrawal by this owner for this vehicle."""
    return check_consent(data, public_key, vehicle_id, now_ms).withdrawn_ms


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
