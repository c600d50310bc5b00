"""Who may speak for many vehicles: the credentials of a relay, and the paper that says for which ones.

A relay's credentials open its own subjects alone, as a vehicle's do; the NATS server enforces it. For which vehicles it
may speak stands in a paper in the cell's data folder, which the cell looks at again every few seconds: who takes it
away, or a vehicle out of it, ends that. Files of secrets are written with mode 0600.

Called by: ``server.feed``, ``cli``. Must not: open connections.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from motorpool import wire
from motorpool.errors import SetupError, TrustError
from motorpool.trust.credentials import CellIdentity, write_secret
from motorpool.trust.nkeys import USER, KeyPair, issue, user_claims

FOLDER: Final = "relays"  # in the data folder
MAX_PAPER_BYTES: Final = 256 * 1024 * 1024
_Id = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]


def relay_inbox(relay_id: str) -> str:
    """The prefix under which replies reach a relay."""
    return f"_INBOX.r.{relay_id}"


class RelayCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a relay needs to connect. ``jwt`` and ``seed`` are secret."""

    relay_id: str
    urls: list[str]
    jwt: str
    seed: str

    def __repr__(self) -> str:
        return f"RelayCredentials(relay_id={self.relay_id!r})"

    @property
    def inbox(self) -> str:
        """The prefix under which replies reach this relay."""
        return relay_inbox(self.relay_id)


class RelayPaper(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For which vehicles a relay may speak: those of the list, or every one that is enrolled."""

    relay_id: _Id
    vehicles: frozenset[_Id] = frozenset()
    every: bool = False

    def allows(self, vehicle_id: str) -> bool:
        """Whether the relay may speak for this one, if it is enrolled."""
        return self.every or vehicle_id in self.vehicles


def enrol_relay(identity: CellIdentity, relay_id: str, urls: list[str], issued_s: int) -> RelayCredentials:
    """Credentials for one relay, good for its own subjects alone. Raises CallerError for an id that cannot be one."""
    wire.check_id(relay_id, "relay_id")
    user = KeyPair.generate(USER)
    claims = user_claims(
        publish=[wire.feed_subject(relay_id, "sheet")],
        subscribe=[wire.feed_subject(relay_id, "answer"), f"{relay_inbox(relay_id)}.>"],
    )
    jwt = issue(KeyPair.from_seed(identity.account_seed), user.public, relay_id, claims, issued_s)
    return RelayCredentials(relay_id=relay_id, urls=urls, jwt=jwt, seed=user.seed)


def paper_path(folder: Path, relay_id: str) -> Path:
    """Where the paper of a relay lies; ``folder`` is that of all relays."""
    return folder / f"{wire.check_id(relay_id, 'relay_id')}.json"


def save_paper(folder: Path, paper: RelayPaper) -> None:
    """Write down for which vehicles a relay may speak, in the place of what was written before."""
    write_secret(paper_path(folder, paper.relay_id), msgspec.json.encode(paper))


def load_paper(path: Path) -> RelayPaper:
    """Read a paper; raises TrustError if it is none, or another relay's."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PAPER_BYTES + 1)
        paper = msgspec.json.decode(data, type=RelayPaper)
    except FileNotFoundError as error:
        raise TrustError("there is no paper of such a relay", code="unknown_relay") from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"{path.name} is no paper of a relay: write it again", code="relay_paper_invalid") from error
    if paper.relay_id != path.stem:
        raise TrustError(f"{path.name} is the paper of another relay", code="relay_paper_invalid")
    return paper


def save_relay_credentials(path: Path, credentials: RelayCredentials) -> None:
    """Keep a relay's credentials in a file of mode 0600."""
    write_secret(path, msgspec.json.encode(credentials))


def load_relay_credentials(path: Path) -> RelayCredentials:
    """Read a relay's credentials; raises SetupError or TrustError with what to do."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RelayCredentials)
    except FileNotFoundError as error:
        raise SetupError(f"there are no credentials at {path.name}: have the operator make them") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"{path.name} holds no credentials of a relay: have the operator make them again") from error
