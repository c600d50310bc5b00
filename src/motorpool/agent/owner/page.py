"""The owner's page: a small server inside the agent, for the owner's phone and nobody else.

Decides: who is let in. Must not: hold a key of the owner's, reach beyond the desk, or keep the guard waiting: what
reads or writes files runs in a thread, connections and requests are bounded.
Called by: ``agent.main``, where the page is enabled; this module is imported only then.

Whoever is not paired gets one page that says so, and what is needed to pair: no state, no name of the car. A paired
phone has a cookie that no script can read and no other site can use; every change needs a header as well, which no
other site can send. Grants are signed on the phone; what only restricts needs no signature.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from motorpool.agent import enrolment
from motorpool.agent.owner import acts, pairing, tls
from motorpool.agent.owner.desk import OwnerDesk
from motorpool.agent.owner.entries import EntryKind
from motorpool.agent.owner.gate import Gate
from motorpool.errors import AuthenticationError, CallerError, MotorpoolError, SetupError
from motorpool.trust.consent import MAX_DOCUMENT_BYTES
from motorpool.trust.credentials import write_secret

COOKIE: Final = "motorpool_owner"
HEADER: Final = "X-Motorpool-Owner"
COOKIE_S: Final = 400 * 86_400  # browsers keep none for longer
STRANGERS_A_SECOND: Final = 5.0  # requests of all who are not paired, together
PAIRED_A_SECOND: Final = 30.0
BURST: Final = 40.0
MAX_ENTRIES: Final = 500
STATIC: Final = Path(__file__).with_name("static")
PUBLIC: Final = frozenset(
    {"/pair", "/pair.js", "/style.css", "/manifest.json", "/icon.svg", "/icon-192.png", "/icon-512.png", "/car-ca.crt"}
)
FILES: Final = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/key.js": ("key.js", "text/javascript"),
    "/form.js": ("form.js", "text/javascript"),
    "/sw.js": ("sw.js", "text/javascript"),
    "/pair": ("pair.html", "text/html"),
    "/pair.js": ("pair.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/manifest.json": ("manifest.json", "application/manifest+json"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/icon-192.png": ("icon-192.png", "image/png"),
    "/icon-512.png": ("icon-512.png", "image/png"),
}
SAFE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")


class PageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where the page is served. Anything but this computer itself is served over HTTPS alone.

    ``names`` are further names under which a phone may ask for it, as ``car.local``; the first of them, or ``host``, is
    the one in the link. ``port`` 0 takes any.
    """

    host: str = "127.0.0.1"
    port: int = 8710
    names: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Is it for this computer alone. Raises SetupError for a host that is no address."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError as error:
            raise SetupError("the page's host is an address of this computer, as 192.168.4.1") from error
        return address.is_loopback

    @property
    def name(self) -> str:
        """The name in the link."""
        return self.names[0] if self.names else ("localhost" if self.is_local else self.host)


class _Bucket:
    """So many requests a second, and a burst."""

    def __init__(self, a_second: float) -> None:
        self._a_second = a_second
        self._left, self._at_s = BURST, 0.0

    def take(self, now_s: float) -> bool:
        self._left = min(BURST, self._left + (now_s - self._at_s) * self._a_second)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class _Act(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    act: str
    minutes: int = 60


class _Secret(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    secret: str


class _PublicKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    public: str


class OwnerPage:
    """The page of one vehicle. ``start`` raises SetupError when the address is taken or impossible."""

    def __init__(self, desk: OwnerDesk, spec: PageSpec) -> None:
        self._desk = desk
        self._spec = spec
        self._phones = pairing.load_phones(desk.agent_dir)
        self._phones_stamp: tuple[int, ...] | None = None
        self._files = {path: (STATIC / name).read_bytes() for path, (name, _) in FILES.items()}
        self._strangers, self._paired = _Bucket(STRANGERS_A_SECOND), _Bucket(PAIRED_A_SECOND)
        self._runner: web.AppRunner | None = None
        self._gate: Gate | None = None
        self._names: set[str] = set()
        self._authority: bytes | None = None
        self.url = ""

    # -- its life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Serve, and leave word of the address for ``motorpool owner pair``."""
        context, fingerprint = None, None
        directory, spec = self._desk.agent_dir, self._spec
        if not spec.is_local:
            context, fingerprint = await asyncio.to_thread(tls.server_context, directory, spec.name, self._desk.clock())
            self._authority = tls.authority_pem(directory)
        app = web.Application(middlewares=[self._guarded], client_max_size=MAX_DOCUMENT_BYTES)
        app.router.add_routes(self._routes())
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, keepalive_timeout=20.0, lingering_time=0.0
        )
        await self._runner.setup()
        assert self._runner.server is not None
        self._gate = Gate(self._runner.server, context)
        try:
            port = self._gate.start(spec.host, spec.port)
        except OSError as error:
            await self._runner.cleanup()
            raise SetupError(
                f"the owner's page cannot be served at {spec.host} port {spec.port}: {error.strerror}",
                code="owner_page_address",
            ) from error
        name = f"[{spec.name}]" if ":" in spec.name else spec.name
        self.url = f"{'http' if context is None else 'https'}://{name}:{port}"
        self._names = {f"{one}:{port}" for one in (name, *spec.names, *(("127.0.0.1",) if context is None else ()))}
        address = pairing.PageAddress(url=self.url, ca_sha256=fingerprint)
        await asyncio.to_thread(write_secret, directory / pairing.PAGE_NAME, msgspec.json.encode(address))

    async def close(self) -> None:
        """Serve no more."""
        if self._gate is not None:
            await self._gate.close()
        if self._runner is not None:
            await self._runner.cleanup()
        (self._desk.agent_dir / pairing.PAGE_NAME).unlink(missing_ok=True)

    def _routes(self) -> list[web.RouteDef]:
        return [
            *(web.get(path, self._static) for path in FILES),
            web.get("/car-ca.crt", self._ca),
            web.get("/api/state", self._state),
            web.get("/api/papers", self._papers),
            web.get("/api/log", self._log),
            web.get("/api/statement", self._statement),
            web.post("/api/act", self._act),
            web.post("/api/consent", self._consent),
            web.post("/api/enrol", self._enrol),
            web.post("/api/pair", self._pair),
            web.post("/api/unpair", self._unpair),
        ]

    # -- who is let in -------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the name, the phone and the header; every answer forbids whatever the page does not need."""
        try:
            response = await self._checked(request, handler)
        except MotorpoolError as error:
            response = web.json_response(error.envelope(), status=error.status)
        except web.HTTPException as error:
            response = web.json_response({"error": {"message": error.reason}}, status=error.status)
        response.headers.update(SAFE_HEADERS)
        return response

    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        now_s = asyncio.get_running_loop().time()
        if request.host not in self._names:  # another site's name that leads here is not for us
            raise web.HTTPMisdirectedRequest
        token = request.cookies.get(COOKIE, "")
        paired = bool(token) and pairing.is_paired(self._known_phones(), token)
        if not (self._paired if paired else self._strangers).take(now_s):
            raise web.HTTPTooManyRequests
        if request.method not in {"GET", "HEAD"}:
            origin = request.headers.get("Origin")
            if request.headers.get(HEADER) != "1" or origin not in {None, f"{request.scheme}://{request.host}"}:
                raise web.HTTPForbidden(reason="this was not asked by the page itself")
        if not paired and request.path not in PUBLIC and request.path != "/api/pair":
            if request.path == "/":
                return web.Response(body=self._files["/pair"], content_type="text/html", status=403)
            raise AuthenticationError("this phone is not paired: use a new link from the car", code="not_paired")
        return await handler(request)

    def _known_phones(self) -> tuple[pairing.Phone, ...]:
        """The paired phones, read anew when the file has changed."""
        try:
            stat = (self._desk.agent_dir / pairing.PHONES_NAME).stat()
        except OSError:
            self._phones_stamp, self._phones = None, ()
            return ()
        stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if stamp != self._phones_stamp:
            self._phones_stamp, self._phones = stamp, pairing.load_phones(self._desk.agent_dir)
        return self._phones

    # -- what is served ------------------------------------------------------------------------------------------------

    async def _static(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._files[request.path],
            content_type=FILES[request.path][1],
            charset="utf-8" if FILES[request.path][1].startswith("text/") else None,
        )

    async def _ca(self, _: web.Request) -> web.Response:
        """The car's own authority, for the phone to install."""
        if self._authority is None:
            raise web.HTTPNotFound
        return web.Response(body=self._authority, content_type="application/x-x509-ca-cert")

    async def _state(self, _: web.Request) -> web.Response:
        return _json(self._desk.state(self._desk.clock()))

    async def _papers(self, _: web.Request) -> web.Response:
        desk = self._desk
        return _json(await asyncio.to_thread(enrolment.papers, desk.agent_dir, desk.vehicle_id, desk.clock()))

    async def _log(self, request: web.Request) -> web.Response:
        try:
            since_ms = int(request.query.get("since_ms", "0"))
            limit = int(request.query.get("limit", "100"))
        except ValueError as error:
            raise CallerError("since_ms and limit are numbers") from error
        limit = max(1, min(limit, MAX_ENTRIES))
        return _json({"entries": await asyncio.to_thread(self._desk.entries, since_ms, limit)})

    async def _statement(self, _: web.Request) -> web.Response:
        return _json({"weeks": await asyncio.to_thread(self._desk.statement, self._desk.clock())})

    async def _act(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Act)
        directory, now_ms = self._desk.agent_dir, self._desk.clock()
        if asked.act == "pause":
            await asyncio.to_thread(acts.pause, directory, now_ms, asked.minutes * 60_000)
        elif asked.act == "need_car":
            await asyncio.to_thread(acts.need_car, directory, now_ms)
        elif asked.act == "resume":
            await asyncio.to_thread(acts.resume, directory, now_ms)
        elif asked.act == "withdraw":
            await asyncio.to_thread(enrolment.take_consent_back, directory, self._desk.vehicle_id, now_ms=now_ms)
        else:
            raise CallerError("the page knows no such act", param="act")
        return await self._looked()

    async def _consent(self, request: web.Request) -> web.Response:
        """A paper that the phone has signed."""
        data = await request.read()
        desk = self._desk
        now_ms = desk.clock()
        await asyncio.to_thread(enrolment.place_consent, desk.agent_dir, desk.vehicle_id, data, now_ms=now_ms)
        return await self._looked()

    async def _enrol(self, request: web.Request) -> web.Response:
        """The phone's key becomes the owner's, if the car has no owner yet."""
        asked = await _body(request, _PublicKey)
        try:
            public = base64.b64decode(asked.public, validate=True)
        except binascii.Error as error:
            raise CallerError("the key is not in base64", param="public") from error
        await asyncio.to_thread(enrolment.enrol_public_key, self._desk.agent_dir, public)
        self._desk.log.tell(EntryKind.PAGE, "a phone's key was enrolled as the owner's", self._desk.clock(), by="owner")
        return _json({"enrolled": True})

    async def _pair(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Secret)
        now_ms = self._desk.clock()
        token = await asyncio.to_thread(pairing.redeem, self._desk.agent_dir, asked.secret, now_ms)
        if token is None:
            raise AuthenticationError(
                "this link was used already or is too old: make a new one", code="pairing_refused"
            )
        self._desk.log.tell(EntryKind.PAGE, "a phone was paired", now_ms, by="owner")
        response = _json({"paired": True})
        secure = request.scheme == "https"
        response.set_cookie(COOKIE, token, max_age=COOKIE_S, path="/", httponly=True, samesite="Strict", secure=secure)
        return response

    async def _unpair(self, request: web.Request) -> web.Response:
        await asyncio.to_thread(pairing.forget, self._desk.agent_dir, request.cookies[COOKIE])
        self._desk.log.tell(EntryKind.PAGE, "a phone was unpaired", self._desk.clock(), by="owner")
        response = _json({"paired": False})
        response.del_cookie(COOKIE, path="/")
        return response

    async def _looked(self) -> web.Response:
        """The state after the guard has looked again."""
        self._desk.look_now()
        await asyncio.sleep(0)  # the guard's turn is the next one
        await asyncio.sleep(0)
        return _json(self._desk.state(self._desk.clock()))


async def _body(request: web.Request, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CallerError("this is not what the page sends") from error


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
