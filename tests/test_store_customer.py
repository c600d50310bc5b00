"""Keys, files and batches in the books: what is stored, what is found, and by whom."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from motorpool.errors import AuthenticationError, CallerError, NotFoundError
from motorpool.server.openai.keys import KeyRing, create_key
from motorpool.store import customer
from motorpool.store.customer import BatchRow, FileRow, KeyRow
from motorpool.store.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "cell.db")
    yield opened
    opened.close()


@pytest.mark.parametrize(("table", "struct"), [("api_key", KeyRow), ("file", FileRow), ("batch", BatchRow)])
def test_rows_have_the_columns_of_their_table(database: Database, table: str, struct: type[msgspec.Struct]) -> None:
    columns = [row["name"] for row in database.reader.execute(f"PRAGMA table_info({table})")]
    assert sorted(columns) == sorted(struct.__struct_fields__)


# -- keys


def test_a_key_is_stored_hashed_and_shown_once(database: Database, tmp_path: Path) -> None:
    key, row = create_key(database.writer, "acme", "laptop", 5)
    assert key.startswith("mp-")
    assert len(key) == 46
    assert row.hash == hashlib.sha256(key.encode()).digest()
    assert key.endswith(row.hint)
    assert len(row.hint) == 4
    assert customer.list_keys(database.reader) == [row]
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.encode() not in stored
    assert key[:20].encode() not in stored


def test_two_keys_differ(database: Database) -> None:
    assert create_key(database.writer, "a", "", 1)[0] != create_key(database.writer, "a", "", 1)[0]


def test_a_revoked_key_is_listed_but_opens_nothing(database: Database) -> None:
    _, row = create_key(database.writer, "acme", "laptop", 5)
    assert customer.account_of_key(database.reader, row.hash) == "acme"
    assert customer.revoke_key(database.writer, row.key_id, 9).revoked_ms == 9
    assert customer.revoke_key(database.writer, row.key_id, 11).revoked_ms == 9
    assert customer.account_of_key(database.reader, row.hash) is None
    assert [key.revoked_ms for key in customer.list_keys(database.reader)] == [9]


def test_revoking_an_unknown_key_is_an_error(database: Database) -> None:
    with pytest.raises(NotFoundError) as caught:
        customer.revoke_key(database.writer, "key_none", 1)
    assert caught.value.code == "key_not_found"


def test_a_key_is_believed_for_its_time_and_no_longer(database: Database) -> None:
    now = [1_000]
    ring = KeyRing(lambda: database.reader, lambda: now[0], ttl_ms=5_000)
    key, row = create_key(database.writer, "acme", "", 0)
    header = f"Bearer {key}".encode()
    assert ring.account(header) == "acme"
    customer.revoke_key(database.writer, row.key_id, 1_000)
    now[0] += 4_999
    assert ring.account(header) == "acme"
    now[0] += 1
    with pytest.raises(AuthenticationError):
        ring.account(header)


def test_a_new_key_works_at_once_after_it_was_refused(database: Database) -> None:
    ring = KeyRing(lambda: database.reader, lambda: 0, ttl_ms=5_000)
    with pytest.raises(AuthenticationError):
        ring.account(b"Bearer mp-unknown")
    key, _ = create_key(database.writer, "acme", "", 0)
    assert ring.account(b"bearer " + key.encode()) == "acme"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"", "missing_api_key"),
        (b"Basic abc", "missing_api_key"),
        (b"Bearer ", "invalid_api_key"),
        (b"Bearer " + b"x" * 600, "invalid_api_key"),
        (b"Bearer mp-\xff", "invalid_api_key"),
    ],
)
def test_a_bad_header_is_told_apart(database: Database, header: bytes, code: str) -> None:
    ring = KeyRing(lambda: database.reader, lambda: 0, ttl_ms=5_000)
    with pytest.raises(AuthenticationError) as caught:
        ring.account(header)
    assert caught.value.code == code
    assert caught.value.status == 401


# -- files


def _file(file_id: str, created_ms: int = 0, **fields: object) -> FileRow:
    base = FileRow(
        file_id=file_id,
        account="acme",
        purpose="batch",
        filename="x.jsonl",
        bytes=3,
        blob=file_id,
        created_ms=created_ms,
    )
    return msgspec.structs.replace(base, **fields)


def _ids(page: tuple[list[FileRow], bool]) -> tuple[list[str], bool]:
    return [row.file_id for row in page[0]], page[1]


def test_files_are_listed_in_pages_both_ways(database: Database) -> None:
    # b and c were made in the same millisecond: the id decides.
    for file_id, created_ms in (("a", 1), ("c", 2), ("b", 2), ("d", 3)):
        customer.insert_file(database.writer, _file(file_id, created_ms))

    def page(after: str | None, newest_first: bool) -> tuple[list[str], bool]:
        return _ids(
            customer.list_files(database.reader, "acme", now_ms=9, limit=2, after=after, newest_first=newest_first)
        )

    assert page(None, True) == (["d", "c"], True)
    assert page("c", True) == (["b", "a"], False)
    assert page(None, False) == (["a", "b"], True)
    assert page("b", False) == (["c", "d"], False)
    assert page("d", False) == ([], False)


def test_files_are_filtered_by_purpose_and_account(database: Database) -> None:
    customer.insert_file(database.writer, _file("a"))
    customer.insert_file(database.writer, _file("b", purpose="evals"))
    customer.insert_file(database.writer, _file("c", account="other"))
    found = customer.list_files(database.reader, "acme", now_ms=0, limit=9, purpose="evals")
    assert _ids(found) == (["b"], False)
    with pytest.raises(NotFoundError):
        customer.customers_file(database.reader, "acme", "c", 0)
    with pytest.raises(CallerError, match="after"):
        customer.list_files(database.reader, "acme", now_ms=0, limit=9, after="c")


def test_a_file_is_gone_from_the_moment_it_expires(database: Database) -> None:
    customer.insert_file(database.writer, _file("a", expires_ms=100))
    assert customer.customers_file(database.reader, "acme", "a", 99).file_id == "a"
    with pytest.raises(NotFoundError):
        customer.customers_file(database.reader, "acme", "a", 100)
    assert _ids(customer.list_files(database.reader, "acme", now_ms=100, limit=9)) == ([], False)
    assert customer.expired_files(database.reader, 99, 9) == []
    assert [row.file_id for row in customer.expired_files(database.reader, 100, 9)] == ["a"]


def test_a_deleted_file_is_found_by_the_loop_alone(database: Database) -> None:
    customer.insert_file(database.writer, _file("a"))
    customer.delete_file(database.writer, "a", 7)
    with pytest.raises(NotFoundError):
        customer.customers_file(database.reader, "acme", "a", 7)
    found = customer.find_file(database.reader, "a")
    assert found is not None
    assert found.deleted_ms == 7
    assert customer.live_blobs(database.reader) == set()


# -- batches


def _batch(batch_id: str, created_ms: int = 0) -> BatchRow:
    return BatchRow(
        batch_no=0,
        batch_id=batch_id,
        account="acme",
        endpoint="/v1/chat/completions",
        input_file_id="a",
        completion_window="24h",
        status="validating",
        created_ms=created_ms,
        expires_ms=created_ms + 1,
    )


def test_an_open_batch_keeps_its_input_file(database: Database) -> None:
    customer.insert_file(database.writer, _file("a", expires_ms=100))
    row = customer.insert_batch(database.writer, _batch("batch_1"))
    assert customer.file_in_use(database.reader, "a")
    assert customer.expired_files(database.reader, 200, 9) == []
    assert customer.cancel_validation(database.writer, row.batch_no, 50)
    assert not customer.file_in_use(database.reader, "a")
    assert len(customer.expired_files(database.reader, 200, 9)) == 1


def test_a_batch_leaves_validating_once(database: Database) -> None:
    row = customer.insert_batch(database.writer, _batch("batch_1"))
    assert [found.batch_id for found in customer.validating_batches(database.reader)] == ["batch_1"]
    assert customer.fail_validation(database.writer, row.batch_no, "[]", 4)
    assert not customer.cancel_validation(database.writer, row.batch_no, 5)
    assert not customer.fail_validation(database.writer, row.batch_no, "[]", 6)
    found = customer.find_batch(database.reader, row.batch_no)
    assert found is not None
    assert (found.status, found.failed_ms, found.cancelled_ms) == ("failed", 4, None)
    assert customer.validating_batches(database.reader) == []


def test_batches_are_numbered_and_listed_newest_first(database: Database) -> None:
    rows = [customer.insert_batch(database.writer, _batch(f"batch_{n}", n)) for n in (1, 2, 3)]
    assert [row.batch_no for row in rows] == [1, 2, 3]
    page, more = customer.list_batches(database.reader, "acme", limit=2)
    assert ([row.batch_id for row in page], more) == (["batch_3", "batch_2"], True)
    page, more = customer.list_batches(database.reader, "acme", limit=2, after="batch_2")
    assert ([row.batch_id for row in page], more) == (["batch_1"], False)
    assert customer.list_batches(database.reader, "other", limit=2) == ([], False)
    with pytest.raises(NotFoundError):
        customer.customers_batch(database.reader, "other", "batch_1")
