"""The OpenAI-compatible API as one ASGI application: finds the route, checks the key, turns every failure into an error
in OpenAI's envelope. The owners' routes, which have keys of their own, are served beside it.

Written against ASGI itself: a chat completion passes no framework on its way. Must not: log a body, a key or a prompt.

Called by: ``server.main``, which serves it and calls ``resume`` at start and ``close`` at the end.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import traceback
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec

from motorpool.errors import MotorpoolError, NotFoundError
from motorpool.server.cell import Cell
from motorpool.server.openai import openapi
from motorpool.server.openai.batches import BatchRoutes
from motorpool.server.openai.embeddings import EmbeddingRoutes
from motorpool.server.openai.exchange import ClientGoneError, Exchange, MethodNotAllowedError, Receive, Scope, Send
from motorpool.server.openai.files import FileRoutes
from motorpool.server.openai.idempotency import NAME as IDEMPOTENCY_KEY
from motorpool.server.openai.idempotency import Idempotency, Incoming, Outgoing, Turn
from motorpool.server.openai.keys import KeyRing
from motorpool.server.openai.live import LiveRoutes
from motorpool.server.openai.models import ModelRoutes
from motorpool.server.openai.ratelimits import MeteredCell, RateLimits, work_for
from motorpool.server.openai.responses.routes import ResponseRoutes
from motorpool.server.openai.settings import ApiSettings
from motorpool.server.openai.validation import Validation
from motorpool.server.openai.webhooks import WebhookRoutes
from motorpool.server.owner.routes import OwnerRoutes
from motorpool.server.webhooks.worker import WebhookWorker

Handler = Callable[[Exchange, str], Awaitable[None]]
_log = logging.getLogger(__name__)
_PLACE = re.compile(r"\\\{[a-z_]+(\\:path)?\\\}")


class Route(msgspec.Struct, frozen=True):
    """One route: ``{name}`` stands for one segment of the path, ``{name:path}`` for any number of them."""

    method: str
    template: str
    handler: Handler
    needs_key: bool = True
    metered: bool = False  # it runs a model: the limits of a key count it

    @property
    def pattern(self) -> re.Pattern[str]:
        """What paths of this route look like."""
        text = _PLACE.sub(lambda found: "(.+)" if found[1] else "([^/]+)", re.escape(self.template).replace(":", r"\:"))
        return re.compile(text)


class Api:
    """The application."""

    def __init__(self, cell: Cell, settings: ApiSettings) -> None:
        self._cell = cell
        self._keys = KeyRing(lambda: cell.reader, cell.now_ms, settings.key_ttl_ms)
        self._limits = RateLimits(lambda: cell.reader, cell.now_ms, settings.key_ttl_ms)
        self._idempotency = Idempotency(cell, settings.max_body_bytes)
        self.validation = Validation(cell, settings)
        self.webhooks = WebhookWorker(cell)
        self._document = b""
        self.routes = self._make_routes(settings)
        self._fixed: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], Route]] = []
        for route in self.routes:
            if "{" in route.template:
                self._patterns.append((route.pattern, route))
            else:
                self._fixed.setdefault(route.template, {})[route.method] = route

    def _make_routes(self, settings: ApiSettings) -> list[Route]:
        metered = cast("Cell", MeteredCell(self._cell))
        live = LiveRoutes(metered, settings)
        self.responses = responses = ResponseRoutes(metered, settings)
        embeddings = EmbeddingRoutes(metered, settings)
        files = FileRoutes(self._cell, settings)
        batches = BatchRoutes(self._cell, settings, self.validation)
        models = ModelRoutes(self._cell)
        webhooks = WebhookRoutes(self._cell, settings, self.webhooks.sender)
        owner = OwnerRoutes(self._cell, settings.currency)
        return [
            Route("POST", "/v1/chat/completions", live.chat, metered=True),
            Route("POST", "/v1/completions", live.completion, metered=True),
            Route("POST", "/v1/embeddings", embeddings.create, metered=True),
            Route("POST", "/v1/responses", responses.create, metered=True),
            Route("GET", "/v1/responses/{response_id}", responses.show),
            Route("DELETE", "/v1/responses/{response_id}", responses.delete),
            Route("POST", "/v1/responses/{response_id}/cancel", responses.cancel),
            Route("GET", "/v1/responses/{response_id}/input_items", responses.input_items),
            Route("GET", "/v1/models", models.page),
            Route("GET", "/v1/models/{model:path}", models.show),
            Route("POST", "/v1/files", files.upload),
            Route("GET", "/v1/files", files.page),
            Route("GET", "/v1/files/{file_id}", files.show),
            Route("DELETE", "/v1/files/{file_id}", files.delete),
            Route("GET", "/v1/files/{file_id}/content", files.content),
            Route("POST", "/v1/batches", batches.create),
            Route("GET", "/v1/batches", batches.page),
            Route("GET", "/v1/batches/{batch_id}", batches.show),
            Route("POST", "/v1/batches/{batch_id}/cancel", batches.cancel),
            Route("POST", "/v1/webhook_endpoints", webhooks.create),
            Route("GET", "/v1/webhook_endpoints", webhooks.page),
            Route("GET", "/v1/webhook_endpoints/{webhook_endpoint_id}", webhooks.show),
            Route("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}", webhooks.update),
            Route("DELETE", "/v1/webhook_endpoints/{webhook_endpoint_id}", webhooks.delete),
            Route("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret", webhooks.rotate),
            Route("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}/test", webhooks.test),
            Route("GET", "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries", webhooks.deliveries),
            Route("GET", "/v1/webhook_event_types", webhooks.event_types),
            Route("POST", "/v1/owner/enrol", owner.enrol, needs_key=False),
            Route("POST", "/v1/owner/challenge", owner.challenge, needs_key=False),
            Route("POST", "/v1/owner/token", owner.token, needs_key=False),
            Route("GET", "/v1/owner/vehicles/{vehicle_id}", owner.show, needs_key=False),
            Route("POST", "/v1/owner/vehicles/{vehicle_id}/consent", owner.consent, needs_key=False),
            Route("POST", "/v1/owner/vehicles/{vehicle_id}/pause", owner.pause, needs_key=False),
            Route("POST", "/v1/owner/vehicles/{vehicle_id}/need-car", owner.need_car, needs_key=False),
            Route("POST", "/v1/owner/vehicles/{vehicle_id}/resume", owner.resume, needs_key=False),
            Route("GET", "/healthz", _health, needs_key=False),
            Route("GET", "/openapi.json", self._describe, needs_key=False),
        ]

    async def _describe(self, exchange: Exchange, _: str) -> None:
        """GET /openapi.json."""
        if not self._document:  # made when somebody asks for it: few cells are ever asked
            self._document = openapi.encoded()
        await exchange.answer(200, self._document)

    def resume(self) -> int:
        """Go on with the batches that a stop left in ``validating``, and with background responses; return how many."""
        self.webhooks.start()
        return self.validation.resume() + self.responses.resume()

    async def close(self) -> None:
        """Stop background work."""
        await self.webhooks.close()
        await self.validation.close()
        await self.responses.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            incoming, outgoing = Incoming(receive), Outgoing(send)
            await self._serve(Exchange(scope, incoming, outgoing, self._cell.now_ms), incoming, outgoing)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "no WebSocket is served here"})

    async def _serve(self, exchange: Exchange, incoming: Incoming, outgoing: Outgoing) -> None:
        turn: Turn | None = None
        try:
            route, argument = self._find(exchange.scope["method"], exchange.scope["path"])
            if route.needs_key:
                exchange.account = self._keys.account(exchange.header(b"authorization"))
                if route.method == "POST" and exchange.header(IDEMPOTENCY_KEY):
                    turn = await self._idempotency.begin(exchange, incoming, outgoing)
                if turn is not None and turn.kept is not None:
                    await turn.replay(exchange)
                    return
                if route.metered:
                    self._measure(exchange, outgoing)
            await route.handler(exchange, argument)
        except ClientGoneError:
            return
        except MotorpoolError as error:
            await self._tell(exchange, error)
        except Exception as error:  # noqa: BLE001 - the client gets an answer whatever happens
            await self._tell(exchange, self._unexpected(exchange, error))
        finally:
            if turn is not None:
                turn.over()

    def _measure(self, exchange: Exchange, outgoing: Outgoing) -> None:
        """Count a request that runs a model. Raises RateLimitError if its key has none left for now."""
        meter = self._limits.meter(exchange.header(b"authorization"))
        work_for(meter)
        if meter is not None:
            outgoing.extra = meter.headers
            meter.count_request()

    def _find(self, method: str, path: str) -> tuple[Route, str]:
        methods = self._fixed.get(path)
        if methods is not None:
            route = methods.get(method)
            if route is not None:
                return route, ""
            raise MethodNotAllowedError(", ".join(sorted(methods)))
        allowed: list[str] = []
        for pattern, route in self._patterns:
            found = pattern.fullmatch(path)
            if found:
                if route.method == method:
                    return route, found[1]
                allowed.append(route.method)
        if allowed:
            raise MethodNotAllowedError(", ".join(sorted(allowed)))
        raise NotFoundError("there is no such route: the routes are in docs/reference/api.md", code="unknown_route")

    async def _tell(self, exchange: Exchange, error: MotorpoolError) -> None:
        if exchange.responding:
            # Half a response is out: only breaking the connection tells the client that the rest is missing.
            _log.warning("%s: response broken off: %s", exchange.request_id, error.code)
            return
        if error.status >= 500:
            _log.warning("%s: answered %d %s", exchange.request_id, error.status, error.code)
        await exchange.answer_error(error)

    def _unexpected(self, exchange: Exchange, error: Exception) -> MotorpoolError:
        # The text of a foreign error may hold a customer's data; its type and place do not.
        frames = "".join(traceback.format_tb(error.__traceback__))
        _log.error("%s: unexpected %s\n%s", exchange.request_id, type(error).__name__, frames)
        if isinstance(error, sqlite3.Error):
            return MotorpoolError(f"the database failed: quote {exchange.request_id}", code="store_error")
        return MotorpoolError(f"internal error: quote {exchange.request_id}", code="internal_error")


async def _health(exchange: Exchange, _: str) -> None:
    """GET /healthz: the process serves requests."""
    await exchange.answer(200, b'{"status":"ok"}')


async def _lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def build_app(cell: Cell, settings: ApiSettings | None = None) -> Api:
    """The application for a cell. Build it inside a running event loop."""
    return Api(cell, settings or ApiSettings())
