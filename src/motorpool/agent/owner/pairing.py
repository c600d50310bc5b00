"""Which phones belong to the owner: a one-time secret from the car's command line, then a token that the phone keeps.

Decides: whether a secret or a token is good. Must not: keep either in clear, or sign anything.
Called by: ``agent.owner.page`` (redeeming and checking), the command line (making a secret).

Whoever can read or write the agent's folder can pair a phone; nobody on the network can without the link.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Final

import msgspec

from motorpool.errors import SetupError
from motorpool.trust.credentials import write_secret

PAIRING_NAME: Final = "owner-pairing.json"
PHONES_NAME: Final = "owner-phones.json"
PAGE_NAME: Final = "owner-page.json"  # where the running page is
PAIRING_MS: Final = 10 * 60_000
MAX_PHONES: Final = 8
SECRET_BYTES: Final = 24


class _Offer(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    until_ms: int


class Phone(msgspec.Struct, frozen=True, kw_only=True):
    """A phone that was paired. The token itself is on the phone alone."""

    sha256: str
    paired_ms: int


class PageAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the running agent serves the owner's page; ``ca_sha256`` is the fingerprint of the car's own authority."""

    url: str
    ca_sha256: str | None = None


def offer_pairing(agent_dir: Path, now_ms: int) -> str:
    """A new one-time secret, good for ten minutes; an earlier one that nobody used is void."""
    secret = secrets.token_urlsafe(SECRET_BYTES)
    write_secret(
        agent_dir / PAIRING_NAME, msgspec.json.encode(_Offer(sha256=_digest(secret), until_ms=now_ms + PAIRING_MS))
    )
    return secret


def redeem(agent_dir: Path, secret: str, now_ms: int) -> str | None:
    """The token for a phone that brought the secret; None if it is wrong, used or too old. The secret is spent."""
    path = agent_dir / PAIRING_NAME
    try:
        offer = msgspec.json.decode(path.read_bytes(), type=_Offer)
    except (OSError, msgspec.DecodeError):
        return None
    if not hmac.compare_digest(offer.sha256, _digest(secret)):
        return None
    path.unlink(missing_ok=True)
    if not offer.until_ms - PAIRING_MS <= now_ms < offer.until_ms:
        return None
    token = secrets.token_urlsafe(SECRET_BYTES)
    phones = (*load_phones(agent_dir), Phone(sha256=_digest(token), paired_ms=now_ms))[-MAX_PHONES:]
    _save(agent_dir, phones)
    return token


def is_paired(phones: tuple[Phone, ...], token: str) -> bool:
    """Is this the token of one of the phones."""
    digest = _digest(token)
    return any([hmac.compare_digest(phone.sha256, digest) for phone in phones])  # noqa: C419  # all are compared


def forget(agent_dir: Path, token: str | None) -> None:
    """Unpair one phone, or all with None."""
    kept = [] if token is None else [one for one in load_phones(agent_dir) if one.sha256 != _digest(token)]
    _save(agent_dir, tuple(kept))


def load_phones(agent_dir: Path) -> tuple[Phone, ...]:
    """The paired phones; none if that cannot be read."""
    try:
        return msgspec.json.decode((agent_dir / PHONES_NAME).read_bytes(), type=tuple[Phone, ...])
    except (OSError, msgspec.DecodeError):
        return ()


def load_address(agent_dir: Path) -> PageAddress:
    """Where the page is. Raises SetupError when none is served."""
    try:
        return msgspec.json.decode((agent_dir / PAGE_NAME).read_bytes(), type=PageAddress)
    except (OSError, msgspec.DecodeError) as error:
        raise SetupError(
            "no page for the owner is served here: start the agent with its page enabled, then pair again",
            code="no_owner_page",
        ) from error


def _save(agent_dir: Path, phones: tuple[Phone, ...]) -> None:
    write_secret(agent_dir / PHONES_NAME, msgspec.json.encode(phones))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
