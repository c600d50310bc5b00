"""The file store: complete or absent, never in between; a real full disk through /dev/full."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from motorpool.errors import StorageFullError, StoreError, TooLargeError
from motorpool.store.blobs import BlobStore


def _names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_file_is_visible_only_after_commit(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.writer() as writer:
        writer.write(b"one ")
        writer.write(memoryview(b"two"))
        assert not store.exists("file-1")
        assert writer.commit("file-1") == 7
    with store.open("file-1") as stream:
        assert stream.read() == b"one two"
    with store.map("file-1") as mapped:
        assert mapped[4:7] == b"two"
    assert _names(tmp_path) == ["file-1"]


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.writer() as writer:
        writer.write(b"x" * 1_000_000)
    assert _names(tmp_path) == []
    with pytest.raises(TypeError), store.writer() as writer:
        writer.write("not bytes")  # type: ignore[arg-type]
    assert _names(tmp_path) == []


def test_a_file_over_its_limit_is_refused_and_removed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.writer(limit_bytes=10) as writer:
        writer.write(b"x" * 10)
        with pytest.raises(TooLargeError, match="10 bytes") as caught:
            writer.write(b"x")
    assert caught.value.code == "file_too_large"
    assert _names(tmp_path) == []


def _full(path: str, flags: int) -> int:
    """The temporary file is really created, but what is written goes to a device that is always full."""
    os.close(os.open(path, flags, 0o600))
    return os.open("/dev/full", os.O_WRONLY)


def _put(store: BlobStore, data: bytes) -> None:
    with store.writer() as writer:
        writer.write(data)
        writer.commit("file-1")


@pytest.mark.parametrize("size", [10, 5_000_000])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    store = BlobStore(tmp_path, opener=_full)
    with pytest.raises(StorageFullError, match="full"):
        _put(store, b"x" * size)
    assert _names(tmp_path) == []


def test_commit_replaces_and_delete_may_be_repeated(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    for text in (b"first", b"second"):
        with store.writer() as writer:
            writer.write(text)
            writer.commit("out.jsonl")
    with store.open("out.jsonl") as stream:
        store.delete("out.jsonl")
        assert stream.read() == b"second"
    store.delete("out.jsonl")
    with pytest.raises(StoreError):
        store.open("out.jsonl")


def test_sweep_removes_what_a_crash_left(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    for name in ("kept", "orphan"):
        with store.writer() as writer:
            writer.commit(name)
    (tmp_path / "tmp" / "half").write_bytes(b"half a file")
    assert store.sweep({"kept"}) == 2
    assert _names(tmp_path) == ["kept"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "x\0"])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError):
        BlobStore(tmp_path).exists(name)


def test_an_empty_file_cannot_be_mapped(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.writer() as writer:
        writer.commit("empty")
    with pytest.raises(StoreError):
        store.map("empty")
