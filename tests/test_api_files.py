"""Files over HTTP: uploads in any shape, limits, expiry, paging, downloads, a disk that is full."""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.api_cell import Running, serve, until

from motorpool.server.openai.files import expire_files, sweep_blobs
from motorpool.server.openai.settings import ApiSettings
from motorpool.server.openai.uploads import shown_name

SMALL = ApiSettings(max_file_bytes=3_000_000, max_batch_bytes=100_000)
DAY_MS = 24 * 3600 * 1000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, openai.OpenAI]]:
    with serve(tmp_path_factory.mktemp("api"), settings=SMALL) as running, running.client() as client:
        yield running, client


@pytest.fixture
def server(shared: tuple[Running, openai.OpenAI]) -> Iterator[Running]:
    """One server for all tests; each begins without files."""
    running = shared[0]
    yield running
    running.cell.ahead_ms = 0
    running.cell.write_error = None
    running.cell.database.writer.execute("DELETE FROM file")
    running.cell.blobs.sweep(set())


@pytest.fixture
def client(server: Running, shared: tuple[Running, openai.OpenAI]) -> openai.OpenAI:
    return shared[1]


def _stored(server: Running) -> list[str]:
    return sorted(path.name for path in server.cell.blobs.root.rglob("*") if path.is_file())


def _form(*parts: tuple[str, bytes | str, str | None]) -> tuple[bytes, str]:
    """A multipart body in exactly this order: (name, value, filename)."""
    body = b""
    for name, value, filename in parts:
        extra = f'; filename="{filename}"' if filename is not None else ""
        data = value if isinstance(value, bytes) else value.encode()
        body += f'--xx\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"
    return body + b"--xx--\r\n", "multipart/form-data; boundary=xx"


def _upload(server: Running, *parts: tuple[str, bytes | str, str | None]) -> httpx.Response:
    body, kind = _form(*parts)
    return _send(server, body, kind)


def _send(server: Running, body: Any, kind: str) -> httpx.Response:
    head = {"authorization": f"Bearer {server.key}", "content-type": kind}
    return server.http.post("/v1/files", content=body, headers=head)


def _refused(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


# -- uploads and downloads


def test_a_file_comes_back_as_it_went(client: openai.OpenAI) -> None:
    data = os.urandom(2_500_000)  # several pieces on the wire and on disk
    made = client.files.create(file=("data.bin", data), purpose="user_data")
    assert (made.bytes, made.filename, made.purpose, made.status) == (len(data), "data.bin", "user_data", "processed")
    assert made.expires_at is None
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data


def test_an_empty_file_is_a_file(client: openai.OpenAI) -> None:
    made = client.files.create(file=("empty", b""), purpose="evals")
    assert made.bytes == 0
    assert client.files.content(made.id).read() == b""


def test_fields_may_follow_the_file(server: Running) -> None:
    response = _upload(
        server,
        ("file", b"abc", "x.jsonl"),
        ("expires_after[seconds]", "3600", None),
        ("purpose", "batch", None),
        ("expires_after[anchor]", "created_at", None),
        ("something_else", "ignored", None),
    )
    made = response.json()
    assert (made["bytes"], made["purpose"]) == (3, "batch")
    assert made["expires_at"] - made["created_at"] == 3600


def test_a_body_may_come_one_byte_at_a_time(server: Running) -> None:
    body, kind = _form(("purpose", "evals", None), ("file", b"a\r\n--x\r\n--xy b", "x"))

    def pieces() -> Iterator[bytes]:
        for place in range(len(body)):
            yield body[place : place + 1]

    made = _send(server, pieces(), kind).json()
    head = {"authorization": f"Bearer {server.key}"}
    content = server.http.get(f"/v1/files/{made['id']}/content", headers=head)
    assert content.content == b"a\r\n--x\r\n--xy b"
    assert content.headers["content-length"] == "14"


def test_batch_files_expire_after_30_days_by_default(client: openai.OpenAI) -> None:
    made = client.files.create(file=("x.jsonl", b"{}"), purpose="batch")
    assert made.expires_at is not None
    assert made.expires_at - made.created_at == 30 * 24 * 3600
    kept = client.files.create(
        file=("x.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert kept.expires_at is not None
    assert kept.expires_at - kept.created_at == 7200


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\x.jsonl", "x.jsonl"),
        ("a\r\nSet-Cookie: b", "aSet-Cookie: b"),
        ("", "upload"),
        ("/", "upload"),
        ("n" * 300, "n" * 255),
        ("données 車.jsonl", "données 車.jsonl"),
    ],
)
def test_a_file_name_is_only_ever_shown(filename: str, shown: str) -> None:
    assert shown_name(filename) == shown


def test_a_hostile_file_name_touches_nothing(server: Running, client: openai.OpenAI) -> None:
    made = client.files.create(file=("../../../evil\u202e.txt", b"abc"), purpose="evals")
    assert made.filename == "evil\u202e.txt"
    assert _stored(server) == [made.id]
    assert list(server.cell.blobs.root.parent.parent.rglob("*evil*")) == []
    content = client.files.with_raw_response.content(made.id)
    assert content.headers["content-disposition"] == "attachment; filename*=UTF-8''evil%E2%80%AE.txt"


# -- uploads that are refused leave nothing


@pytest.mark.parametrize(
    ("parts", "refusal"),
    [
        ([("purpose", "batch", None)], (400, "missing_required_parameter", "file")),
        ([("file", b"abc", "x")], (400, "missing_required_parameter", "purpose")),
        ([("file", b"abc", "x"), ("purpose", "nonsense", None)], (400, "invalid_value", "purpose")),
        ([("purpose", "batch", None), ("file", b"x" * 100_001, "x")], (413, "file_too_large", "file")),
        ([("file", b"x" * 100_001, "x"), ("purpose", "batch", None)], (413, "file_too_large", "file")),
        ([("purpose", "evals", None), ("file", b"x" * 3_000_001, "x")], (413, "file_too_large", "file")),
        ([("purpose", "x" * 4097, None)], (413, "field_too_large", None)),
        ([("file", b"a", "x"), ("file", b"b", "y")], (400, "invalid_value", "file")),
        ([(f"f{n}", "", None) for n in range(33)], (400, "invalid_multipart", None)),
        (
            [("purpose", "batch", None), ("file", b"a", "x"), ("expires_after[seconds]", "3600", None)],
            (400, "invalid_value", "expires_after.anchor"),
        ),
        *[
            (
                [
                    ("purpose", "batch", None),
                    ("file", b"a", "x"),
                    ("expires_after[anchor]", "created_at", None),
                    ("expires_after[seconds]", seconds, None),
                ],
                (400, "invalid_value", "expires_after.seconds"),
            )
            for seconds in (
                "3599",
                "2592001",
                "-1",
                "1e4",
                "",
                "9" * 50,
                "0000000007200",
                "000000007200" + "0" * 40,
                "٣٦٠٠",
            )
        ],
    ],
)
def test_bad_forms_are_refused_by_name(server: Running, parts: Any, refusal: tuple[int, str, str | None]) -> None:
    assert _refused(_upload(server, *parts)) == refusal
    assert _stored(server) == []


def test_a_file_at_its_limit_is_accepted(server: Running) -> None:
    assert _upload(server, ("purpose", "batch", None), ("file", b"x" * 100_000, "x")).status_code == 200


def test_a_length_that_is_too_long_is_refused_unread(server: Running) -> None:
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
            "Content-Type: multipart/form-data; boundary=xx\r\nContent-Length: 99999999999\r\n\r\n".encode()
        )
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(65536)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 413 " in head
    error = json.loads(body)["error"]
    assert (error["code"], error["param"]) == ("file_too_large", "file")
    assert "limit of 3000000 bytes" in error["message"]


def test_what_follows_the_form_counts_too(server: Running) -> None:
    body, kind = _form(("purpose", "batch", None), ("file", b"abc", "x"))
    with socket.create_connection(server.listener.getsockname(), timeout=20) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
            f"Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        answer = b""
        for piece in (body, *[b"\r\n" * 5_000] * 10_000):
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            if select.select([connection], [], [], 0)[0]:
                while not answer.endswith(b"}}"):
                    answer += connection.recv(65536)
                break
    assert b" 413 " in answer
    assert b'"file_too_large"' in answer
    assert _stored(server) == []


def test_a_form_may_be_followed_by_a_little(server: Running) -> None:
    body, kind = _form(("purpose", "batch", None), ("file", b"x" * 100_000, "x"))
    assert _send(server, body + b"\r\n" * 1000, kind).status_code == 200


def test_a_length_of_many_digits_is_read(server: Running) -> None:
    body, kind = _form(("purpose", "evals", None), ("file", b"abc", "x"))
    with socket.create_connection(server.listener.getsockname(), timeout=20) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {'0' * 5000}{len(body)}\r\n\r\n".encode()
            + body
        )
        assert b" 200 " in connection.recv(100)


@pytest.mark.parametrize(
    ("body", "kind", "refusal"),
    [
        (b"{}", "application/json", (415, "unsupported_media_type", None)),
        (b"x", "multipart/form-data", (400, "invalid_multipart", None)),
        (b"no boundary here", "multipart/form-data; boundary=xx", (400, "invalid_multipart", None)),
        (b"", "multipart/form-data; boundary=xx", (400, "invalid_multipart", None)),
        (_form(("file", b"abc", "x"))[0][:-9], "multipart/form-data; boundary=xx", (400, "invalid_multipart", None)),
    ],
)
def test_broken_bodies_are_refused(
    server: Running, body: bytes, kind: str, refusal: tuple[int, str, str | None]
) -> None:
    assert _refused(_send(server, body, kind)) == refusal
    assert _stored(server) == []


def test_a_client_that_leaves_in_mid_upload_leaves_nothing(server: Running) -> None:
    body, kind = _form(("purpose", "evals", None), ("file", b"x" * 2_500_000, "x"))
    with socket.create_connection(server.listener.getsockname()) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        connection.sendall(body[:2_000_000])
        until(lambda: _stored(server), "the temporary file")
    until(lambda: not _stored(server), "its removal")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    def full(path: str, flags: int) -> int:
        os.close(os.open(path, flags, 0o600))
        return os.open("/dev/full", os.O_WRONLY)

    with serve(tmp_path, opener=full) as server:
        response = _upload(server, ("purpose", "evals", None), ("file", b"x" * 3_000_000, "x"))
        assert _refused(response) == (507, "storage_full", None)
        assert response.headers["x-should-retry"] == "false"
        assert _stored(server) == []


def test_a_file_whose_row_cannot_be_written_leaves_nothing(server: Running) -> None:
    server.cell.write_error = RuntimeError("no")
    response = _upload(server, ("purpose", "evals", None), ("file", b"abc", "x"))
    assert response.status_code == 500
    assert _stored(server) == []


# -- lists


def test_files_are_listed_in_pages(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}", b"x"), purpose="batch" if n % 2 else "evals").id for n in range(5)]
    listed = client.files.list()
    assert sorted(file.id for file in listed.data) == sorted(made)
    assert listed.has_more is False
    first = client.files.list(limit=2, order="asc")
    assert (len(first.data), first.has_more) == (2, True)
    assert [file.id for file in client.files.list(limit=2, order="asc")] == [
        file.id for file in reversed(client.files.list().data)
    ]  # iterating follows the pages to the end
    assert {file.purpose for file in client.files.list(purpose="evals")} == {"evals"}


def test_an_empty_list_has_its_keys(server: Running) -> None:
    head = {"authorization": f"Bearer {server.key}"}
    listed = server.http.get("/v1/files", headers=head).json()
    assert listed == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=x", "limit"),
        ("limit=00000000010000000", "limit"),
        (f"limit={'0' * 5000}1", "limit"),
        ("limit=%D9%A3", "limit"),
        ("order=up", "order"),
        ("after=a", "after"),
    ],
)
def test_bad_queries_are_refused_by_name(server: Running, query: str, param: str) -> None:
    head = {"authorization": f"Bearer {server.key}"}
    response = server.http.get(f"/v1/files?{query}", headers=head)
    assert _refused(response) == (400, "invalid_value", param)


# -- deletion, expiry, other accounts


def test_a_deleted_file_is_gone_with_its_bytes(server: Running, client: openai.OpenAI) -> None:
    made = client.files.create(file=("x", b"abc"), purpose="evals")
    gone = client.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    assert _stored(server) == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert caught.value.code == "file_not_found"


def test_an_account_sees_its_own_files_alone(server: Running, client: openai.OpenAI) -> None:
    made = client.files.create(file=("x", b"abc"), purpose="batch")
    with server.client(api_key=server.new_key("other")) as other:
        assert other.files.list().data == []
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert client.files.retrieve(made.id).id == made.id


def test_expired_files_go_and_others_stay(server: Running, client: openai.OpenAI) -> None:
    client.files.create(file=("x", b"abc"), purpose="batch")
    kept = client.files.create(file=("y", b"abc"), purpose="evals")
    assert server.call(expire_files(server.cell)) == 0
    server.cell.ahead_ms = 30 * DAY_MS
    assert [file.id for file in client.files.list().data] == [kept.id]
    assert server.call(expire_files(server.cell)) == 1
    assert server.call(expire_files(server.cell)) == 0
    assert _stored(server) == [kept.id]


def test_bytes_without_a_row_are_swept_at_start(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        kept = _upload(server, ("purpose", "evals", None), ("file", b"abc", "x")).json()["id"]
        (server.cell.blobs.root / "file-orphan").write_bytes(b"left by a crash")
        assert sweep_blobs(server.cell) == 1
        assert _stored(server) == [kept]


def test_a_download_goes_on_while_the_file_is_deleted(server: Running, client: openai.OpenAI) -> None:
    data = os.urandom(2_900_000)
    made = client.files.create(file=("x", data), purpose="user_data")
    head = {"authorization": f"Bearer {server.key}"}
    with server.http.stream("GET", f"/v1/files/{made.id}/content", headers=head) as response:
        client.files.delete(made.id)
        assert b"".join(response.iter_bytes()) == data
