"""What owners ask of the control plane: their key's enrolment, their statement, and their word to the vehicle.

An owner proves to have the key that was given at enrolment by signing a challenge. What allows work must be signed by
that key again, each time, and the vehicle checks it itself: neither the operator nor this program can make it. What
only restricts needs no more than the token. Must not: log a key, a code or a document, or show another vehicle.

Called by: ``server.openai.app``.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from sqlite3 import Connection, Row
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from motorpool.core.attribution import UG_PER_G, UWH_PER_WH
from motorpool.errors import AuthenticationError, CallerError, ConflictError, NotFoundError, TrustError
from motorpool.server.cell import Cell
from motorpool.server.openai.decoding import decode
from motorpool.server.openai.exchange import Exchange
from motorpool.server.owner.sessions import Sessions, Throttle, code_digest
from motorpool.store import owners
from motorpool.store.owners import Word
from motorpool.trust.consent import CLOCK_TOLERANCE_MS, MAX_DOCUMENT_BYTES, check_consent
from motorpool.trust.owneraccess import answers_challenge, open_resume, public_key
from motorpool.types import ModelTier, Reason
from motorpool.wire import OwnerAct

MAX_MINUTES: Final = 7 * 24 * 60
DEFAULT_PAUSE_MINUTES: Final = 60
DEFAULT_NEED_CAR_MINUTES: Final = 12 * 60
STATEMENT_DAYS: Final = 31
MAX_STATEMENT_DAYS: Final = 366
_MINUTE_MS: Final = 60_000
_FIRST_DAY: Final = date(1970, 1, 1)
Text = Annotated[str, Meta(min_length=1, max_length=256)]
VehicleId = Annotated[str, Meta(min_length=1, max_length=64)]


class NewOwner(msgspec.Struct, frozen=True, kw_only=True):
    """The body of an enrolment: the code of the link, and the owner's public key in hexadecimal."""

    code: Text
    owner_key: Text


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a request for a challenge."""

    vehicle_id: VehicleId


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answered challenge; ``signature`` is base64."""

    vehicle_id: VehicleId
    nonce: Annotated[str, Meta(max_length=1024)]
    signature: Text


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """For how long the vehicle shall not work."""

    minutes: Annotated[int, Meta(ge=1, le=MAX_MINUTES)] | None = None


class StatementDay(msgspec.Struct, frozen=True, kw_only=True):
    """One day (UTC) of the statement; days without work are left out."""

    date: str
    earned_micro: int
    lines_done: int
    tokens_generated: int
    energy_wh: float
    co2_g: float


class OwnerView(msgspec.Struct, frozen=True, kw_only=True):
    """A vehicle as its owner sees it. ``state`` is ``offline`` while the vehicle is silent."""

    vehicle_id: str
    name: str
    state: str
    reasons: list[Reason]
    permit_w: int
    tier: ModelTier | None
    battery_fed: bool
    consent_withdrawn_at: int | None
    paused_until: int | None
    currency: str
    earned_micro: int
    lines_done: int
    tokens_generated: int
    energy_wh: float
    co2_g: float
    statement: list[StatementDay]


_new_owner: Final = msgspec.json.Decoder(NewOwner)
_asked: Final = msgspec.json.Decoder(Asked)
_answer: Final = msgspec.json.Decoder(Answer)
_pause: Final = msgspec.json.Decoder(Pause)


class Owner(msgspec.Struct, frozen=True):
    """Who asks: the vehicle, its row in the books, and the owner's public key."""

    vehicle_id: str
    row: Row
    key: bytes


class OwnerRoutes:
    """The routes under /v1/owner."""

    def __init__(self, cell: Cell, currency: str) -> None:
        self._cell = cell
        self._currency = currency
        self._sessions = Sessions(cell.now_ms)
        self._throttle = Throttle(cell.now_ms)

    # -- who is asking -------------------------------------------------------------------------------------------------

    async def enrol(self, exchange: Exchange, _: str) -> None:
        """POST /v1/owner/enrol: register an owner's key with the one-time code of the enrolment link."""
        self._throttle.take(exchange.address)
        new = decode(_new_owner, await exchange.json(MAX_DOCUMENT_BYTES))
        if public_key(new.owner_key) is None:
            raise CallerError(
                "owner_key is no public key: it is the content of owner.pub", code="invalid_value", param="owner_key"
            )
        digest, now_ms = code_digest(new.code), self._cell.now_ms()
        vehicle_id = await self._cell.write(lambda db: owners.use_code(db, digest, new.owner_key, now_ms))
        if vehicle_id is None:
            raise AuthenticationError(
                "this code is unknown, used or over: ask the operator for a new link", code="invalid_enrolment_code"
            )
        await exchange.answer_object({"vehicle_id": vehicle_id})

    async def challenge(self, exchange: Exchange, _: str) -> None:
        """POST /v1/owner/challenge: a nonce for the owner's key to sign; the same for vehicles that do not exist."""
        self._throttle.take(exchange.address)
        asked = decode(_asked, await exchange.json(MAX_DOCUMENT_BYTES))
        nonce, expires_ms = self._sessions.challenge(asked.vehicle_id)
        await exchange.answer_object({"nonce": nonce, "expires_at": expires_ms // 1000})

    async def token(self, exchange: Exchange, _: str) -> None:
        """POST /v1/owner/token: a token for an answered challenge."""
        self._throttle.take(exchange.address)
        answer = decode(_answer, await exchange.json(MAX_DOCUMENT_BYTES))
        text = owners.owner_key(self._cell.reader, answer.vehicle_id)
        key = public_key(text)
        is_open = self._sessions.is_open(answer.vehicle_id, answer.nonce)
        if key is None or not is_open or not answers_challenge(key, answer.vehicle_id, answer.nonce, answer.signature):
            raise AuthenticationError(
                "this is no answer of the owner's key to an open challenge of this vehicle", code="invalid_signature"
            )
        token, expires_ms = self._sessions.token(answer.vehicle_id, text, answer.nonce)
        await exchange.answer_object({"token": token, "expires_at": expires_ms // 1000})

    def _owner(self, exchange: Exchange, vehicle_id: str) -> Owner:
        """Who asks; raises AuthenticationError, and NotFoundError for a vehicle that is not this owner's."""
        allowed, key = self._sessions.owner_of(exchange.header(b"authorization"))
        row = owners.find_vehicle(self._cell.reader, allowed)
        if row is None or row["owner_key"] != key:
            raise AuthenticationError(
                "the vehicle is no longer enrolled with this owner's key", code="invalid_owner_token"
            )
        if vehicle_id != allowed:
            raise NotFoundError("there is no such vehicle of yours", code="vehicle_not_found", param="vehicle_id")
        return Owner(allowed, row, bytes.fromhex(key))

    # -- the statement -------------------------------------------------------------------------------------------------

    async def show(self, exchange: Exchange, vehicle_id: str) -> None:
        """GET /v1/owner/vehicles/{vehicle_id}."""
        owner = self._owner(exchange, vehicle_id)
        text = exchange.query().get("days", str(STATEMENT_DAYS))
        if not text.isascii() or not text.isdigit() or len(text) > 3 or not 1 <= int(text) <= MAX_STATEMENT_DAYS:
            raise CallerError(f"days must be from 1 to {MAX_STATEMENT_DAYS}", code="invalid_value", param="days")
        await exchange.answer_object(self._view(owner, int(text)))

    def _view(self, owner: Owner, days: int) -> OwnerView:
        row, state = owner.row, self._cell.vehicle_state(owner.vehicle_id)
        paused_ms, withdrawn_ms = row["paused_until_ms"], row["withdrawn_ms"]
        return OwnerView(
            vehicle_id=owner.vehicle_id,
            name=row["name"],
            state="offline" if state is None else state.state.value,
            reasons=[] if state is None else state.reasons,
            permit_w=0 if state is None else state.permit_w,
            tier=state.tier if state is not None and state.permit_w else None,
            battery_fed=state is not None and state.battery_fed,
            consent_withdrawn_at=None if withdrawn_ms is None else withdrawn_ms // 1000,
            paused_until=paused_ms // 1000 if paused_ms > self._cell.now_ms() else None,
            currency=self._currency,
            earned_micro=row["earned_micro"],
            lines_done=row["lines_done"],
            tokens_generated=row["tokens_generated"],
            energy_wh=row["energy_uwh"] / UWH_PER_WH,
            co2_g=row["co2_ug"] / UG_PER_G,
            statement=[_shown(day) for day in owners.days(self._cell.reader, owner.vehicle_id, days)],
        )

    # -- the owner's word ----------------------------------------------------------------------------------------------

    async def consent(self, exchange: Exchange, vehicle_id: str) -> None:
        """POST /v1/owner/vehicles/{vehicle_id}/consent: a signed consent or withdrawal, handed on to the vehicle."""
        owner = self._owner(exchange, vehicle_id)
        document = await exchange.json(MAX_DOCUMENT_BYTES)
        now_ms = self._cell.now_ms()
        verdict = check_consent(document, owner.key, vehicle_id, now_ms, withdrawn_ms=owner.row["withdrawn_ms"])
        if verdict.withdrawn_ms is not None:
            await self._withdraw(exchange, owner, document, verdict.withdrawn_ms)
            return
        if verdict.grant is None:
            raise TrustError(
                f"this is no consent of this vehicle's owner that holds: {verdict.refusal}",
                code="invalid_consent",
            )
        dated_ms = verdict.grant.granted_ms

        def change(db: Connection) -> bool:
            if not owners.save_word(db, vehicle_id, Word(kind=owners.CONSENT, dated_ms=dated_ms, document=document)):
                return False
            owners.restore_consent(db, vehicle_id)
            return True

        await self._done(exchange, owner, change, "the owner has given a new consent")

    async def _withdraw(self, exchange: Exchange, owner: Owner, document: bytes, withdrawn_ms: int) -> None:
        # One that is dated far ahead would make every later consent void.
        if withdrawn_ms > self._cell.now_ms() + CLOCK_TOLERANCE_MS:
            raise TrustError("the withdrawal is dated in the future: set the clock", code="invalid_consent")
        word = Word(kind=owners.CONSENT, dated_ms=withdrawn_ms, document=document)

        def change(db: Connection) -> bool:
            if not owners.save_word(db, owner.vehicle_id, word):
                return False
            owners.withdraw(db, owner.vehicle_id, withdrawn_ms)
            return True

        await self._done(exchange, owner, change, "the owner has withdrawn the consent")

    async def pause(self, exchange: Exchange, vehicle_id: str) -> None:
        """POST /v1/owner/vehicles/{vehicle_id}/pause."""
        await self._ask(exchange, vehicle_id, OwnerAct.PAUSE, DEFAULT_PAUSE_MINUTES)

    async def need_car(self, exchange: Exchange, vehicle_id: str) -> None:
        """POST /v1/owner/vehicles/{vehicle_id}/need-car: the owner needs the car now."""
        await self._ask(exchange, vehicle_id, OwnerAct.NEED_CAR, DEFAULT_NEED_CAR_MINUTES)

    async def _ask(self, exchange: Exchange, vehicle_id: str, act: OwnerAct, default_minutes: int) -> None:
        owner = self._owner(exchange, vehicle_id)
        minutes = decode(_pause, await exchange.json(MAX_DOCUMENT_BYTES) or b"{}").minutes or default_minutes
        now_ms = self._cell.now_ms()
        word = Word(kind=act.value, dated_ms=now_ms, until_ms=now_ms + minutes * _MINUTE_MS)

        def change(db: Connection) -> bool:
            owners.save_word(db, vehicle_id, word)
            owners.pause(db, vehicle_id, owners.latest_pause_ms(db, vehicle_id, now_ms)[1])
            return True

        said = "the owner needs the car" if act is OwnerAct.NEED_CAR else "the owner has paused it"
        await self._done(exchange, owner, change, f"{said}, for {minutes} minutes")

    async def resume(self, exchange: Exchange, vehicle_id: str) -> None:
        """POST /v1/owner/vehicles/{vehicle_id}/resume: a signed end of all pauses, handed on to the vehicle."""
        owner = self._owner(exchange, vehicle_id)
        document = await exchange.json(MAX_DOCUMENT_BYTES)
        resume = open_resume(document, owner.key, vehicle_id)
        now_ms = self._cell.now_ms()
        if resume is None or resume.resumed_ms > now_ms + CLOCK_TOLERANCE_MS:
            raise TrustError(
                "this is no end of a pause that this vehicle's owner has signed, or it is dated in the future",
                code="invalid_resume",
            )

        def change(db: Connection) -> bool:
            if resume.resumed_ms < owners.latest_pause_ms(db, vehicle_id, now_ms)[0]:
                return False
            word = Word(kind=owners.RESUME, dated_ms=resume.resumed_ms, document=document)
            owners.drop_pauses(db, vehicle_id, resume.resumed_ms)
            owners.pause(db, vehicle_id, 0)
            return owners.save_word(db, vehicle_id, word)

        await self._done(exchange, owner, change, "the owner has ended the pause")

    async def _done(self, exchange: Exchange, owner: Owner, change: Callable[[Connection], bool], what: str) -> None:
        """Write the owner's word down, do as it says, and show what holds now."""
        if not await self._cell.write(change):
            raise ConflictError("a later word of the owner is here already: date it later", code="owner_word_too_old")
        await self._cell.owner_spoke(owner.vehicle_id, what)
        row = owners.find_vehicle(self._cell.reader, owner.vehicle_id)
        await exchange.answer_object(self._view(Owner(owner.vehicle_id, row or owner.row, owner.key), STATEMENT_DAYS))


def _shown(day: owners.Day) -> StatementDay:
    return StatementDay(
        date=date_of(day.day),
        earned_micro=day.earned_micro,
        lines_done=day.lines_done,
        tokens_generated=day.tokens_generated,
        energy_wh=day.energy_uwh / UWH_PER_WH,
        co2_g=day.co2_ug / UG_PER_G,
    )


def date_of(day: int) -> str:
    """The date (UTC) of a day counted from 1970, as 2026-01-31."""
    return (_FIRST_DAY + timedelta(days=day)).isoformat()
