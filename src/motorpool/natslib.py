"""Loads nats-py without aiohttp, which nats-py loads for WebSockets alone wherever it finds it: 10 MB in every vehicle.

Decides: nothing. Must not: keep aiohttp from anybody else, who imports it as ever after this.
Called by: ``bus``, before it imports nats-py.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

WEBSOCKET: Final = ("ws://", "wss://")
_ONLY_FOR_WEBSOCKETS: Final = ("aiohttp", "multidict")
_modules: dict[str, Any] = sys.modules  # a name with None in it cannot be imported, which is what nats-py provides for


def _load() -> None:
    hidden = [name for name in _ONLY_FOR_WEBSOCKETS if name not in _modules]
    _modules.update(dict.fromkeys(hidden))
    try:
        importlib.import_module("nats")
    finally:
        for name in hidden:
            del _modules[name]


def prepare(urls: list[str]) -> None:
    """Give nats-py what it needs for these addresses; raise ModuleNotFoundError where that is not installed."""
    if any(url.startswith(WEBSOCKET) for url in urls):
        transport = importlib.import_module("nats.aio.transport")
        for name in _ONLY_FOR_WEBSOCKETS:
            setattr(transport, name, importlib.import_module(name))


_load()
