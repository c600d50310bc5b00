"""A stand-in for the KUKSA databroker: a server that speaks ``kuksa.val.v2`` for one simulated car.

Decides: what a databroker would answer: current values at once, then changes; NOT_FOUND, UNAUTHENTICATED and
PERMISSION_DENIED as the service's text says. Must not: be used in a vehicle; it is for tests and demonstrations, since
the real broker comes as a container only.
Called by: tests, and by hand: ``python -m motorpool.agent.signals.broker --port 0 --vss 6`` prints its address and the
folder of its car's owner in one line of JSON; ``motorpool car X ACTION --dir FOLDER`` then plays the owner.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import grpc
import grpc.aio
import msgspec

from motorpool.agent.signals import speak, vss
from motorpool.agent.signals.car import CarSpec, SimulatedCar
from motorpool.agent.signals.kuksa_proto import types_pb2, val_pb2
from motorpool.agent.signals.owner_port import OwnerPort
from motorpool.agent.signals.source import SignalSource
from motorpool.agent.signals.vss import Kind, Value

TICK_S: Final = 0.2
HEARTBEAT_MS: Final = 1_000
NAME: Final = "motorpool stand-in"
BUFFERED: Final = 1_000  # messages to a slow subscriber; then the oldest is dropped
_TYPES: Final = {
    Kind.BOOL: types_pb2.DATA_TYPE_BOOLEAN,
    Kind.NUMBER: types_pb2.DATA_TYPE_DOUBLE,
    Kind.TEXT: types_pb2.DATA_TYPE_STRING,
    Kind.TEXTS: types_pb2.DATA_TYPE_STRING_ARRAY,
}


class Scope(StrEnum):
    """What a token allows."""

    READ = "read"
    PROVIDE = "provide"


class StandIn:
    """The broker and, in one, the provider that reads the car every ``TICK_S`` and whenever its owner acts.

    ``tokens`` maps a token to its scope; None: everybody may do everything. ``without`` are paths that this car does
    not know. ``credentials`` (of grpc) turn TLS on. ``provides`` False freezes the provider: the broker goes on with
    the values that it has.
    """

    def __init__(
        self,
        car: SignalSource,
        clock: Callable[[], int],
        *,
        version: int = 6,
        tokens: Mapping[str, Scope] | None = None,
        without: frozenset[str] = frozenset(),
        credentials: Any = None,
    ) -> None:
        self._car = car
        self._clock = clock
        self._version = version
        self._tokens = tokens
        self._without = without
        self._credentials = credentials
        self._points: dict[str, Any] = {}
        self._published: set[str] = set()  # a value that a client published stays
        self._queues: list[tuple[frozenset[str], asyncio.Queue[dict[str, Any]]]] = []
        self._server: Any = None
        self._ticker: asyncio.Task[None] | None = None
        self.provides = True
        self.calls: list[str] = []
        self.address = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> None:
        """Serve on the loopback interface."""
        self.tick()
        self._car.on_change(self.tick)
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self._handlers(),))
        wanted = f"127.0.0.1:{port}"
        if self._credentials is None:
            port = self._server.add_insecure_port(wanted)
        else:
            port = self._server.add_secure_port(wanted, self._credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        self._ticker = asyncio.create_task(self._tick_on())

    async def stop(self) -> None:
        """Close every connection and stop."""
        if self._ticker is not None:
            self._ticker.cancel()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
            del server  # grpc ends a server once more when it is collected, which needs the loop
            await asyncio.sleep(0)

    # -- the provider --------------------------------------------------------------------------------------------------

    async def _tick_on(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Read the car and send what has changed."""
        if not self.provides:
            return
        now_ms = self._clock()
        said = speak.values(self._car.read(now_ms), self._version)
        said[vss.HEARTBEAT] = float(now_ms // HEARTBEAT_MS)
        changed = {}
        for path, value in said.items():
            if path in self._without or path in self._published:
                continue
            if path not in self._points or _value(self._points[path]) != value:
                changed[path] = point(value, now_ms)
        self._send(changed)

    def publish(self, path: str, value: Value | None, at_ms: int | None = None) -> None:
        """Give ``path`` a value that stays, whatever the car says."""
        self._published.add(path)
        self._send({path: point(value, self._clock() if at_ms is None else at_ms)})

    def _send(self, changed: dict[str, Any]) -> None:
        self._points.update(changed)
        for paths, queue in self._queues:
            mine = {path: data for path, data in changed.items() if path in paths}
            if mine:
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(mine)

    # -- the service ---------------------------------------------------------------------------------------------------

    def _handlers(self) -> Any:
        unary: dict[str, tuple[Any, Any]] = {
            "GetValue": (self._get_value, val_pb2.GetValueRequest),
            "GetValues": (self._get_values, val_pb2.GetValuesRequest),
            "ListMetadata": (self._list_metadata, val_pb2.ListMetadataRequest),
            "GetServerInfo": (self._get_server_info, val_pb2.GetServerInfoRequest),
            "PublishValue": (self._publish_value, val_pb2.PublishValueRequest),
            "Actuate": (self._actuate, val_pb2.ActuateRequest),
            "BatchActuate": (self._actuate, val_pb2.BatchActuateRequest),
        }
        streams: dict[str, tuple[Any, Any]] = {
            "Subscribe": (self._subscribe, val_pb2.SubscribeRequest),
            "SubscribeById": (self._subscribe_by_id, val_pb2.SubscribeByIdRequest),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                answer, request_deserializer=request.FromString, response_serializer=_encoded
            )
            for name, (answer, request) in unary.items()
        }
        for name, (answers, request) in streams.items():
            methods[name] = grpc.unary_stream_rpc_method_handler(
                answers, request_deserializer=request.FromString, response_serializer=_encoded
            )
        return grpc.method_handlers_generic_handler("kuksa.val.v2.VAL", methods)

    async def _allow(self, context: Any, call: str, scope: Scope = Scope.READ) -> None:
        self.calls.append(call)
        if self._tokens is None:
            return
        header = dict(context.invocation_metadata()).get("authorization", "")
        has = self._tokens.get(header.removeprefix("Bearer "))
        if has is None:
            await _refuse(context, grpc.StatusCode.UNAUTHENTICATED, "no such token")
        if scope is not Scope.READ and has is not scope:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, "the token's scope does not allow it")

    def _ids(self) -> list[str]:
        return sorted(self._points)

    async def _path(self, context: Any, signal_id: Any) -> str:
        """The path that an id or a path names."""
        if signal_id.WhichOneof("signal") == "id":
            path = dict(enumerate(self._ids())).get(signal_id.id, "")
        else:
            path = str(signal_id.path)
        if path not in self._points:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, "no such path")
        return path

    async def _get_value(self, request: Any, context: Any) -> Any:
        await self._allow(context, "GetValue")
        return val_pb2.GetValueResponse(data_point=self._points[await self._path(context, request.signal_id)])

    async def _get_values(self, request: Any, context: Any) -> Any:
        await self._allow(context, "GetValues")
        paths = [await self._path(context, signal_id) for signal_id in request.signal_ids]
        if not paths:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "no path")
        return val_pb2.GetValuesResponse(data_points=[self._points[path] for path in paths])

    async def _list_metadata(self, request: Any, context: Any) -> Any:
        await self._allow(context, "ListMetadata")
        found = []
        for number, path in enumerate(self._ids()):
            if path == request.root or path.startswith(f"{request.root}."):
                entry = vss.entry_of(path)
                kind = types_pb2.DATA_TYPE_UNSPECIFIED if entry is None else _TYPES[entry.kind]
                found.append(types_pb2.Metadata(path=path, id=number, data_type=kind))
        if not found:
            await _refuse(context, grpc.StatusCode.NOT_FOUND, "no such branch")
        return val_pb2.ListMetadataResponse(metadata=found)

    async def _get_server_info(self, _request: Any, context: Any) -> Any:
        await self._allow(context, "GetServerInfo")
        return val_pb2.GetServerInfoResponse(name=NAME, version="2")

    async def _publish_value(self, request: Any, context: Any) -> Any:
        await self._allow(context, "PublishValue", Scope.PROVIDE)
        path = await self._path(context, request.signal_id)
        value = _value(request.data_point)
        entry = vss.entry_of(path)
        if value is not None and entry is not None and vss.checked(entry.kind, value) is None:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "the value has another type than the path")
        self.publish(path, value)
        return val_pb2.PublishValueResponse()

    async def _actuate(self, _request: Any, context: Any) -> Any:
        await self._allow(context, "Actuate")
        await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, "nobody may actuate this car")

    async def _subscribe(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._allow(context, "Subscribe")
        paths = [await self._path(context, types_pb2.SignalID(path=path)) for path in request.signal_paths]
        async for entries in self._changes(paths):
            yield val_pb2.SubscribeResponse(entries=entries)

    async def _subscribe_by_id(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._allow(context, "SubscribeById")
        paths = [await self._path(context, types_pb2.SignalID(id=number)) for number in request.signal_ids]
        numbers = dict(zip(paths, request.signal_ids, strict=True))
        async for entries in self._changes(paths):
            yield val_pb2.SubscribeByIdResponse(entries={numbers[path]: data for path, data in entries.items()})

    async def _changes(self, paths: list[str]) -> AsyncIterator[dict[str, Any]]:
        """All values now, then what changes."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(BUFFERED)
        place = (frozenset(paths), queue)
        self._queues.append(place)
        try:
            yield {path: self._points[path] for path in paths}
            while True:
                yield await queue.get()
        finally:
            self._queues.remove(place)


async def _refuse(context: Any, code: grpc.StatusCode, text: str) -> NoReturn:
    await context.abort(code, text)
    raise AssertionError  # abort raises


def _encoded(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def point(value: Value | None, at_ms: int) -> Any:
    """A Datapoint. None is a path without a value."""
    data = types_pb2.Datapoint()
    data.timestamp.FromMilliseconds(at_ms)
    if value is None:
        return data
    if isinstance(value, bool):
        data.value.bool = value
    elif isinstance(value, int):
        data.value.int32 = value
    elif isinstance(value, float):
        data.value.double = value
    elif isinstance(value, str):
        data.value.string = value
    else:
        data.value.string_array.values.extend(value)
        data.value.string_array.SetInParent()
    return data


def _value(data: Any) -> Value | None:
    kind = data.value.WhichOneof("typed_value")
    if kind is None:
        return None
    value: Value = getattr(data.value, kind)
    return tuple(value.values) if kind.endswith("_array") else value  # type: ignore[union-attr]


async def serve(folder: Path, port: int, version: int) -> None:
    """A broker with a simulated car whose owner is played through the port in ``folder``, until a signal ends it."""
    from motorpool.agent.loop import Clock  # noqa: PLC0415  # only the program needs the agent

    clock = Clock()
    car = SimulatedCar(CarSpec(), clock())
    owner, broker = OwnerPort(folder, car, clock), StandIn(car, clock, version=version)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await owner.start()
    await broker.start(port)
    line = msgspec.json.encode({"address": broker.address, "dir": str(folder), "vss": version})
    sys.stdout.write(line.decode() + "\n")
    sys.stdout.flush()
    await stopped.wait()
    await broker.stop()
    await owner.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m motorpool.agent.signals.broker", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--vss", type=int, choices=(5, 6), default=6, help="spelling of the paths")
    parser.add_argument("--dir", type=Path, help="folder of the owner's port (default: a new one)")
    options = parser.parse_args()
    if options.dir is not None:
        asyncio.run(serve(options.dir, options.port, options.vss))
        return
    with tempfile.TemporaryDirectory(prefix="motorpool-broker-") as folder:
        asyncio.run(serve(Path(folder), options.port, options.vss))


if __name__ == "__main__":
    main()
