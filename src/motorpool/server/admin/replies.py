"""How the operator's address answers, and reads what it is sent. Called by: ``server.admin``."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from motorpool.errors import CallerError

T = TypeVar("T")


def json_response(value: object, status: int = 200) -> Response:
    """Any of our structs as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def body_of(request: Request, kind: type[T]) -> T:
    """The JSON body of a request. Raises CallerError that says what is wrong with it."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CallerError(f"the body is not what is asked for here: {error}") from error
