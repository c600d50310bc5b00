"""A file of 200 MB goes up, is checked and comes down again, and the server's memory does not notice."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from tests.api_cell import MODEL, until

from motorpool.types import MAX_BATCH_BYTES, MAX_BATCH_LINES

ROOT = Path(__file__).resolve().parent.parent
LINE_BYTES = MAX_BATCH_BYTES // MAX_BATCH_LINES
HEAD = b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--xx\r\nContent-Disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'
END = b"\r\n--xx--\r\n"
MAX_GROWTH_BYTES = 48 * 1024 * 1024


def _lines() -> Iterator[bytes]:
    """The largest valid batch file, 100 lines at a time."""
    start = '{"custom_id":"request-%06d","method":"POST","url":"/v1/chat/completions","body":{"model":"%s","messages":'
    start += '[{"role":"user","content":"'
    end = '"}]}}\n'
    filler = "w" * (LINE_BYTES - len(start % (0, MODEL)) - len(end))
    for first in range(0, MAX_BATCH_LINES, 100):
        yield "".join(start % (n, MODEL) + filler + end for n in range(first, first + 100)).encode()


def _form(digest: hashlib._Hash) -> Iterator[bytes]:
    yield HEAD + FILE
    for piece in _lines():
        digest.update(piece)
        yield piece
    yield END


def _peak_bytes(pid: int) -> int:
    for row in Path(f"/proc/{pid}/status").read_text().splitlines():
        if row.startswith("VmHWM:"):
            return int(row.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/PID/status")


def test_the_largest_batch_file_never_sits_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.api_process", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            head = {"authorization": f"Bearer {ready['key']}"}
            with httpx.Client(base_url=ready["url"], headers=head, verify=False, trust_env=False, timeout=60) as http:
                _roundtrip(http, process.pid)
        finally:
            process.communicate(b"", timeout=20)
    assert process.returncode == 0


def _roundtrip(http: httpx.Client, pid: int) -> None:
    assert http.get("/v1/files").status_code == 200
    before = _peak_bytes(pid)
    sent = hashlib.sha256()
    size = LINE_BYTES * MAX_BATCH_LINES
    length = len(HEAD) + len(FILE) + size + len(END)
    file = http.post(
        "/v1/files",
        content=_form(sent),
        headers={"content-type": "multipart/form-data; boundary=xx", "content-length": str(length)},
    ).json()
    assert file["bytes"] == size > 199_000_000
    uploaded = _peak_bytes(pid) - before
    batch = http.post(
        "/v1/batches",
        json={"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    ).json()

    def validated() -> bool:
        status = http.get(f"/v1/batches/{batch['id']}").json()["status"]
        assert status in {"validating", "in_progress"}
        return bool(status == "in_progress")

    until(validated, "validation", limit_s=60)
    checked = _peak_bytes(pid) - before
    got = hashlib.sha256()
    with http.stream("GET", f"/v1/files/{file['id']}/content") as response:
        for piece in response.iter_bytes():
            got.update(piece)
    assert got.digest() == sent.digest()
    grown = _peak_bytes(pid) - before
    assert grown < MAX_GROWTH_BYTES, f"peak memory grew by {uploaded}, then {checked}, then {grown} bytes"
