"""What keeps undelivered messages safe, in memory and sealed on disk, and how they get into the stream in the end."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from motorpool.agent import delivery
from motorpool.agent.delivery import Delivery
from motorpool.agent.spool import BLOCK_BYTES, KEY_NAME, DiskSpool, MemorySpool, Spool, kept_key
from motorpool.bus import BusError

MB = 1024 * 1024
SECRET = b"an answer that is nobody's business"


def disk(folder: Path, max_bytes: int = MB, on_written: Callable[[int], None] = lambda _: None) -> DiskSpool:
    return DiskSpool(folder / "spool", kept_key(folder / KEY_NAME), max_bytes, on_written)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "spool").iterdir())


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_messages_outlive_the_process_sealed_and_in_their_order(tmp_path: Path) -> None:
    spool = disk(tmp_path)
    for number in (1, 2, 10):
        assert spool.put(f"inc-{number}", SECRET + b"%d" % number)
    assert spool.put("inc-1", b"twice is once")
    assert all(SECRET not in path.read_bytes() for path in files(tmp_path))
    assert {stat.S_IMODE(path.stat().st_mode) for path in [*files(tmp_path), tmp_path / KEY_NAME]} == {0o600}
    assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
    after = disk(tmp_path)
    assert after.waiting() == ["inc-1", "inc-2", "inc-10"]
    assert [after.read(name) for name in after.waiting()] == [SECRET + b"1", SECRET + b"2", SECRET + b"10"]
    after.remove("inc-2")
    after.remove("inc-2")
    assert after.read("inc-2") is None
    assert disk(tmp_path).waiting() == ["inc-1", "inc-10"]


def test_one_message_sealed_twice_looks_different(tmp_path: Path) -> None:
    sealed = []
    for _ in range(2):
        spool = disk(tmp_path)
        spool.put("inc-1", SECRET)
        sealed.append(files(tmp_path)[0].read_bytes())
        spool.remove("inc-1")
    assert sealed[0] != sealed[1]


def test_nothing_is_written_before_there_is_something_to_keep(tmp_path: Path) -> None:
    spool = disk(tmp_path)
    assert spool.waiting() == []
    assert spool.read("inc-1") is None
    spool.remove("inc-1")
    assert list(tmp_path.iterdir()) == []


def _changed(path: Path) -> None:
    sealed = bytearray(path.read_bytes())
    sealed[-1] ^= 1
    path.write_bytes(sealed)


@pytest.mark.parametrize(
    "damage",
    [
        _changed,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"MPS1"),
        lambda path: path.write_bytes(b"something else altogether, of about the same length"),
        lambda path: path.write_bytes((path.parent / "inc-2.msg").read_bytes()),  # sealed, but under another id
        lambda path: (path.parent.parent / KEY_NAME).write_bytes(b"k" * 32),
        lambda path: (path.parent.parent / KEY_NAME).write_bytes(b"short"),
        lambda path: (path.parent.parent / KEY_NAME).unlink(),
        lambda path: path.unlink(),
    ],
)
def test_what_cannot_be_opened_is_dropped_with_one_line_in_the_log(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    spool = disk(tmp_path)
    spool.put("inc-1", SECRET)
    spool.put("inc-2", SECRET)
    after = disk(tmp_path)
    damage(tmp_path / "spool" / "inc-1.msg")
    assert after.read("inc-1") is None
    assert after.read("inc-1") is None
    assert caplog.text.count("is dropped") == 1
    assert SECRET.decode() not in caplog.text
    assert not (tmp_path / "spool" / "inc-1.msg").exists()
    assert after.put("inc-3", SECRET)
    assert after.read("inc-3") == SECRET


def test_half_messages_and_what_is_none_of_ours_are_cleared_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = disk(tmp_path)
    spool.put("inc-1", SECRET)
    folder = tmp_path / "spool"
    (folder / "inc-2.msg.part").write_bytes(b"half")
    (folder / "not a name.msg").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    (folder / "inc-9.msg").symlink_to(tmp_path / KEY_NAME)
    (folder / "folder").mkdir()
    assert disk(tmp_path).waiting() == ["inc-1"]
    assert [path.name for path in files(tmp_path)] == ["folder", "inc-1.msg"]
    assert (tmp_path / KEY_NAME).exists()
    assert caplog.text.count("is dropped from the spool") == 3


def test_it_is_bounded_in_whole_blocks_and_counts_what_the_flash_takes(tmp_path: Path) -> None:
    written: list[int] = []
    spool = disk(tmp_path, 4 * BLOCK_BYTES, written.append)
    assert spool.put("inc-1", b"x")
    assert spool.put("inc-2", b"x" * BLOCK_BYTES)
    assert written == [2 * BLOCK_BYTES, 3 * BLOCK_BYTES]
    assert not spool.put("inc-3", b"x" * BLOCK_BYTES)
    assert spool.put("inc-4", b"x")
    assert not disk(tmp_path, 4 * BLOCK_BYTES).put("inc-5", b"x")  # what was left counts
    spool.remove("inc-2")
    assert spool.put("inc-3", b"x" * BLOCK_BYTES)
    assert written[-2:] == [BLOCK_BYTES, 3 * BLOCK_BYTES]


def test_a_disk_that_takes_nothing_is_a_full_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool").write_bytes(b"")  # where the folder should be
    spool = DiskSpool(tmp_path / "spool", kept_key(tmp_path / KEY_NAME), MB)
    assert not spool.put("inc-1", SECRET)
    assert "could not be kept on disk" in caplog.text
    assert not disk(tmp_path / "other").put("../inc-1", SECRET)
    assert not (tmp_path / "other").exists()


def test_memory_is_bounded_as_well() -> None:
    spool = MemorySpool(10)
    assert spool.put("a", b"12345")
    assert spool.put("a", b"12345")
    assert spool.put("b", b"12345")
    assert not spool.put("c", b"1")
    assert (spool.waiting(), spool.read("b"), spool.read("c")) == (["a", "b"], b"12345", None)
    spool.remove("a")
    assert spool.put("c", b"1")


# -- into the stream ---------------------------------------------------------------------------------------------------


class Stream:
    """A durable stream that a test can cut off, and everything that a Delivery says."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.up = True
        self.refusing = False
        self.got: list[tuple[str, bytes]] = []
        self.published: list[str] = []
        self.full: list[bool] = []
        self.failed: list[BaseException] = []
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self._changed.set()

    async def send(self, data: bytes, message_id: str) -> None:
        if self.refusing:
            raise BusError("the durable stream did not confirm")
        self.got.append((message_id, data))

    def _on_published(self, message_id: str) -> None:
        self.published.append(message_id)
        self.changed()

    def _on_full(self, full: bool) -> None:
        self.full.append(full)
        self.changed()

    def _watch(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.failed.append(error)
        self.changed()

    def ids(self) -> list[str]:
        return [message_id for message_id, _ in self.got]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    @asynccontextmanager
    async def delivering(self, after_s: float = 3.0) -> AsyncIterator[Delivery]:
        one = Delivery(
            name="v1",
            spool=Told(self.spool, asyncio.get_running_loop(), self.changed),
            ready=lambda: self.up,
            send=self.send,
            on_published=self._on_published,
            on_full=self._on_full,
            watch=self._watch,
            spool_after_s=after_s,
        )
        one.start()
        one.link_changed(up=self.up)
        try:
            yield one
        finally:
            await one.close()
        assert self.failed == []


class Told:
    """A spool that says when something has changed in it."""

    def __init__(self, spool: Spool, loop: asyncio.AbstractEventLoop, changed: Callable[[], None]) -> None:
        self._spool = spool
        self._loop = loop
        self._changed = changed
        self.read = spool.read
        self.waiting = spool.waiting

    def put(self, message_id: str, data: bytes) -> bool:
        kept = self._spool.put(message_id, data)
        self._loop.call_soon_threadsafe(self._changed)
        return kept

    def remove(self, message_id: str) -> None:
        self._spool.remove(message_id)
        self._loop.call_soon_threadsafe(self._changed)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "RETRY_MIN_S", 0.01)
    monkeypatch.setattr(delivery, "RETRY_MAX_S", 0.02)
    monkeypatch.setattr(delivery, "SETTLE_S", 0.01)


def test_with_a_link_nothing_touches_the_flash(tmp_path: Path) -> None:
    async def scenario() -> None:
        stream = Stream(disk(tmp_path))
        async with stream.delivering() as one:
            for number in range(100):
                one.add(f"inc-{number}", SECRET)
            await stream.until(lambda: len(stream.published) == 100)
        assert sorted(stream.ids()) == sorted(f"inc-{number}" for number in range(100))

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_without_a_link_messages_are_kept_and_delivered_once_it_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        spool = disk(tmp_path)
        stream = Stream(spool)
        stream.up = False
        async with stream.delivering(0.0) as one:
            for number in range(20):
                one.add(f"inc-{number}", b"%d" % number)
            await stream.until(lambda: len(spool.waiting()) == 20)
            stream.up = True
            one.link_changed(up=True)
            await stream.until(lambda: len(stream.published) == 20 and not spool.waiting())
        assert sorted(stream.got) == sorted((f"inc-{number}", b"%d" % number) for number in range(20))
        assert files(tmp_path) == []

    asyncio.run(scenario())


def test_what_the_stream_does_not_confirm_is_kept_even_with_a_link(tmp_path: Path) -> None:
    async def scenario() -> None:
        spool = disk(tmp_path)
        stream = Stream(spool)
        stream.refusing = True
        async with stream.delivering(0.02) as one:
            one.add("inc-1", SECRET)
            await stream.until(lambda: spool.waiting() == ["inc-1"])
            stream.refusing = False
            await stream.until(lambda: stream.published == ["inc-1"] and not spool.waiting())
        assert stream.got == [("inc-1", SECRET)]

    asyncio.run(scenario())


def test_the_next_process_delivers_what_was_left_under_the_same_ids_before_anything_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        stream = Stream(disk(tmp_path))
        stream.up = False
        async with stream.delivering(600) as one:  # too short for the spool: kept at the end
            for number in range(12):
                one.add(f"old-{number}", b"%d" % number)
        stream = Stream(disk(tmp_path))
        stream.up = False
        async with stream.delivering() as one:
            one.add("new-1", SECRET)
            assert one.is_behind
            waiting = asyncio.create_task(one.catch_up())
            stream.up = True
            await waiting
            assert not one.is_behind
            assert set(stream.ids()) >= {f"old-{number}" for number in range(12)}
            assert stream.ids()[0].startswith("old-")
            await stream.until(lambda: stream.published == ["new-1"])
        assert sorted(stream.got) == sorted([("new-1", SECRET), *((f"old-{n}", b"%d" % n) for n in range(12))])
        assert files(tmp_path) == []

    asyncio.run(scenario())


def test_what_was_left_and_cannot_be_delivered_holds_nothing_up_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "CATCH_UP_S", 0.05)
    disk(tmp_path).put("old-1", SECRET)

    async def scenario() -> None:
        stream = Stream(disk(tmp_path))
        stream.refusing = True
        async with stream.delivering() as one:
            await one.catch_up()
            assert one.is_behind

    caplog.set_level("INFO")
    asyncio.run(scenario())
    assert "goes on beside 1 messages" in caplog.text
    assert disk(tmp_path).waiting() == ["old-1"]


def test_a_full_spool_is_told_and_its_messages_are_not_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        spool = disk(tmp_path, 2 * BLOCK_BYTES)
        stream = Stream(spool)
        stream.up = False
        async with stream.delivering(0.0) as one:
            for number in range(5):
                one.add(f"inc-{number}", b"%d" % number)
            await stream.until(lambda: stream.full == [True])
            assert len(spool.waiting()) == 2
            stream.up = True
            await stream.until(lambda: len(stream.published) == 5 and stream.full == [True, False])
            await stream.until(lambda: not spool.waiting())
        assert sorted(stream.ids()) == [f"inc-{number}" for number in range(5)]

    asyncio.run(scenario())


def test_a_message_that_the_disk_lost_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        spool = disk(tmp_path)
        stream = Stream(spool)
        stream.up = False
        async with stream.delivering(0.0) as one:
            one.add("inc-1", SECRET)
            await stream.until(lambda: spool.waiting() == ["inc-1"])
            _changed(files(tmp_path)[0])
            stream.up = True
            await stream.until(lambda: stream.published == ["inc-1"])
        assert stream.got == []

    asyncio.run(scenario())


def test_a_message_that_is_delivered_while_it_is_being_kept_does_not_stay(tmp_path: Path) -> None:
    class Slow(DiskSpool):
        def __init__(self) -> None:
            super().__init__(tmp_path / "spool", kept_key(tmp_path / KEY_NAME), MB)
            self.begun = threading.Event()
            self.may_end = threading.Event()

        def put(self, message_id: str, data: bytes) -> bool:
            self.begun.set()
            assert self.may_end.wait(10)
            return super().put(message_id, data)

    async def scenario() -> None:
        spool = Slow()
        stream = Stream(spool)
        stream.up = False
        async with stream.delivering(0.0) as one:
            one.add("inc-1", SECRET)
            assert await asyncio.to_thread(spool.begun.wait, 10)
            stream.up = True
            await stream.until(lambda: stream.published == ["inc-1"])
            spool.may_end.set()
            await stream.until(lambda: (tmp_path / "spool").exists() and files(tmp_path) == [])
            await stream.until(lambda: one._keeper is None)
        assert files(tmp_path) == []

    asyncio.run(scenario())
