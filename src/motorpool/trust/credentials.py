"""Who may speak on the vehicle link: the cell's own identities, and the credentials of each vehicle.

A vehicle may publish on its own ``up`` subjects and subscribe to its own ``down`` subject and inbox, and
nothing else; the NATS server enforces it. Inboxes begin with a letter for whose they are, so that no vehicle, whatever
it is called, has the cell's. Files of secrets are written with mode 0600.

Called by: ``bus``, ``server``, ``cli``. Must not: open connections.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Final

import msgspec

from motorpool import wire
from motorpool.errors import SetupError, TrustError
from motorpool.trust.nkeys import ACCOUNT, OPERATOR, USER, KeyPair, account_claims, issue, operator_claims, user_claims

CELL_INBOX: Final = "_INBOX.c"
WATCH_INBOX: Final = "_INBOX.w"


class _Allowed(msgspec.Struct):
    """Subjects."""

    allow: list[str] = []


class _Claims(msgspec.Struct):
    """What a user may do."""

    pub: _Allowed = msgspec.field(default_factory=_Allowed)


class _Vouched(msgspec.Struct):
    """What is read of a JWT that the message server has checked."""

    name: str
    nats: _Claims = msgspec.field(default_factory=_Claims)


def vehicle_inbox(vehicle_id: str) -> str:
    """The prefix under which replies reach a vehicle."""
    return f"_INBOX.v.{vehicle_id}"


class VehicleCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a vehicle needs to connect. ``jwt`` and ``seed`` are secret."""

    vehicle_id: str
    urls: list[str]
    jwt: str
    seed: str

    def __repr__(self) -> str:
        return f"VehicleCredentials(vehicle_id={self.vehicle_id!r})"

    @property
    def inbox(self) -> str:
        """The prefix under which replies reach this vehicle."""
        return vehicle_inbox(self.vehicle_id)


class CellIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The seeds of a cell's operator, account, system account and own user. All are secret."""

    operator_seed: str
    account_seed: str
    system_seed: str
    user_seed: str
    issued_s: int

    def __repr__(self) -> str:
        return "CellIdentity()"

    @classmethod
    def generate(cls, issued_s: int) -> CellIdentity:
        """New random identities."""
        return cls(
            operator_seed=KeyPair.generate(OPERATOR).seed,
            account_seed=KeyPair.generate(ACCOUNT).seed,
            system_seed=KeyPair.generate(ACCOUNT).seed,
            user_seed=KeyPair.generate(USER).seed,
            issued_s=issued_s,
        )

    def server_config(self) -> str:
        """The part of a NATS server's configuration that makes it trust this cell's operator."""
        operator, account, system = (
            KeyPair.from_seed(seed) for seed in (self.operator_seed, self.account_seed, self.system_seed)
        )
        operator_jwt = issue(operator, operator.public, "motorpool", operator_claims(system.public), self.issued_s)
        account_jwt = issue(operator, account.public, "cell", account_claims(streams=True), self.issued_s)
        system_jwt = issue(operator, system.public, "SYS", account_claims(streams=False), self.issued_s)
        return (
            f"operator: {operator_jwt}\nsystem_account: {system.public}\nresolver: MEMORY\n"
            f"resolver_preload: {{\n  {account.public}: {account_jwt}\n  {system.public}: {system_jwt}\n}}\n"
        )

    @property
    def inbox(self) -> str:
        """The prefix under which replies reach the cell."""
        return CELL_INBOX

    def cell_jwt(self) -> str:
        """The cell's own user: everything in its account."""
        user = KeyPair.from_seed(self.user_seed)
        return issue(KeyPair.from_seed(self.account_seed), user.public, "cell", user_claims(), self.issued_s)

    @property
    def watched(self) -> list[str]:
        """Where the message server says who has connected to the cell's account, and whose connection has ended."""
        account = KeyPair.from_seed(self.account_seed).public
        return [f"$SYS.ACCOUNT.{account}.CONNECT", f"$SYS.ACCOUNT.{account}.DISCONNECT"]

    @property
    def connections(self) -> str:
        """Where the message server can be asked for the connections of the cell's account."""
        return f"$SYS.REQ.ACCOUNT.{KeyPair.from_seed(self.account_seed).public}.CONNZ"

    def watch_jwt(self) -> str:
        """The cell's user in the system account: it may hear of connections, ask for them, and nothing else."""
        user = KeyPair.from_seed(self.user_seed)
        claims = user_claims(publish=[self.connections], subscribe=[*self.watched, f"{WATCH_INBOX}.>"])
        return issue(KeyPair.from_seed(self.system_seed), user.public, "watch", claims, self.issued_s)

    def enrol(self, vehicle_id: str, urls: list[str], issued_s: int) -> VehicleCredentials:
        """Credentials for one vehicle, good for its own subjects alone."""
        wire.check_id(vehicle_id, "vehicle_id")
        user = KeyPair.generate(USER)
        claims = user_claims(
            publish=[wire.up_subject(vehicle_id, channel) for channel in ("state", "work", "live")],
            subscribe=[wire.down_subject(vehicle_id), f"{vehicle_inbox(vehicle_id)}.>"],
        )
        jwt = issue(KeyPair.from_seed(self.account_seed), user.public, vehicle_id, claims, issued_s)
        return VehicleCredentials(vehicle_id=vehicle_id, urls=urls, jwt=jwt, seed=user.seed)


def vehicle_in(jwt: str) -> str | None:
    """The vehicle that a user is; None for other users, as the cell's own, and for what cannot be read.

    For those JWTs alone that the message server has checked: their signatures are not looked at here.
    """
    body = jwt.split(".")[1] if jwt.count(".") == 2 else ""
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=_Vouched)
    except (msgspec.DecodeError, ValueError, RecursionError):  # the text may be anything, of any depth
        return None
    return found.name if wire.up_subject(found.name, "live") in found.nats.pub.allow else None


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def save_credentials(path: Path, credentials: VehicleCredentials) -> None:
    """Keep a vehicle's credentials in a file of mode 0600."""
    write_secret(path, msgspec.json.encode(credentials))


def load_credentials(path: Path) -> VehicleCredentials:
    """Read a vehicle's credentials; raises SetupError or TrustError with what to do."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=VehicleCredentials)
    except FileNotFoundError as error:
        raise SetupError(
            f"there are no credentials at {path.name}: enrol the vehicle with `motorpool vehicles enrol`"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"{path.name} holds no credentials: enrol the vehicle again") from error


def load_identity(path: Path, issued_s: int) -> CellIdentity:
    """The cell's identities, made at the first start."""
    if not path.exists():
        identity = CellIdentity.generate(issued_s)
        write_secret(path, msgspec.json.encode(identity))
        return identity
    try:
        return msgspec.json.decode(path.read_bytes(), type=CellIdentity)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"{path.name} does not hold a cell's identities: restore it from your copy") from error
