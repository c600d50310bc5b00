"""Webhooks: what ends is told, signed, again and again until it was heard, and never to where it must not go."""

from __future__ import annotations

import asyncio
import datetime as dt
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import standardwebhooks
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from openai import InvalidWebhookSignatureError
from tests.api_cell import MODEL, LocalCell, Running, serve, until

from motorpool.cli.webhooks import webhooks
from motorpool.errors import CallerError
from motorpool.server.openai.webhooks import EventType, draft
from motorpool.server.webhooks import signing, targets
from motorpool.server.webhooks.sender import Sender
from motorpool.server.webhooks.worker import MAX_ATTEMPTS, WAITS_S, WebhookWorker, wait_ms
from motorpool.store import books
from motorpool.store import webhooks as store
from motorpool.store.database import Database
from motorpool.store.webhooks import EVENT_TYPES, Policy, Webhook

OPEN = Policy(private=True, http=True)
LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": MODEL, "messages": [{"role": "user", "content": "a very private question"}]},
}


class Receiver:
    """A server that keeps what it was told and answers with the statuses it was given, then with 200."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.heard: list[tuple[dict[str, str], bytes, str]] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's name
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.heard.append(({k.lower(): v for k, v in self.headers.items()}, body, self.path))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("location", "http://127.0.0.1:9/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the library's name
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as found:
        yield found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serve(tmp_path) as running:
        store.set_policy(running.cell.database.writer, OPEN)
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def run_batch(client: openai.OpenAI, line: dict[str, Any] = LINE) -> str:
    file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h").id


def code(error: openai.APIStatusError) -> tuple[int, str | None]:
    return error.status_code, error.code


# -- from the end of a batch to the customer's server ------------------------------------------------------------------


def test_the_end_of_a_batch_is_told_and_the_client_verifies_it(client: openai.OpenAI, receiver: Receiver) -> None:
    hook = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
    batch_id = run_batch(client)
    headers, body, path = until(lambda: receiver.heard, "the event")[0]
    event = client.webhooks.unwrap(body, headers, secret=hook.signing_secret)
    assert (event.type, event.data.id, event.object) == ("batch.completed", batch_id, "event")  # type: ignore[union-attr]
    assert event.created_at == client.batches.retrieve(batch_id).completed_at
    assert (path, headers["content-type"]) == ("/hook", "application/json")
    standardwebhooks.Webhook(hook.signing_secret).verify(body, headers)  # by the specification's own library
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers, secret=hook.signing_secret)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=signing.shown(bytes(32)))


def test_a_batch_that_fails_is_told_and_others_are_not_told(client: openai.OpenAI, server: Running) -> None:
    with (
        Receiver() as mine,
        Receiver() as other,
        Receiver() as deaf,
        server.client(api_key=server.new_key("x")) as them,
    ):
        client.webhooks.create(name="m", url=mine.url, event_types=["batch.failed", "batch.completed"])
        client.webhooks.create(name="d", url=deaf.url, event_types=["batch.expired"])
        them.webhooks.create(name="o", url=other.url, event_types=["batch.failed"])
        batch_id = run_batch(client, LINE | {"method": "GET"})
        until(lambda: mine.heard, "the event")
        event = json.loads(mine.heard[0][1])
        assert (event["type"], event["data"]) == ("batch.failed", {"id": batch_id})
        assert other.heard == deaf.heard == []
        assert server.cell.reader.execute("SELECT count(*) FROM delivery").fetchone()[0] == 1


def test_nothing_but_ids_is_sent(client: openai.OpenAI, receiver: Receiver) -> None:
    client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
    run_batch(client)
    _, body, _ = until(lambda: receiver.heard, "the event")[0]
    assert set(json.loads(body)) == {"id", "object", "created_at", "type", "data"}
    assert b"private" not in body


def test_the_log_of_deliveries_can_be_seen(client: openai.OpenAI, server: Running, receiver: Receiver) -> None:
    receiver.statuses = [500]
    hook = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
    batch_id = run_batch(client)

    def log() -> Any:
        head = {"authorization": f"Bearer {server.key}"}
        return server.http.get(f"/v1/webhook_endpoints/{hook.id}/deliveries", headers=head).json()["data"]

    (first,) = until(lambda: [row for row in log() if row["attempts"] == 1], "the first attempt")
    assert (first["status"], first["outcome"], first["subject_id"]) == ("pending", "HTTP 500", batch_id)
    assert first["next_attempt_at"] > first["created_at"]
    server.cell.ahead_ms += 60_000
    (second,) = until(lambda: [row for row in log() if row["status"] == "delivered"], "the second attempt")
    assert (second["attempts"], second["outcome"], second["next_attempt_at"]) == (2, "HTTP 200", None)
    ids = {headers["webhook-id"] for headers, _, _ in receiver.heard}
    assert ids == {first["event_id"]}
    assert receiver.heard[0][1] == receiver.heard[1][1]


def test_a_restart_forgets_no_delivery(tmp_path: Path, receiver: Receiver) -> None:
    receiver.statuses = [503]
    with serve(tmp_path) as running:
        store.set_policy(running.cell.database.writer, OPEN)
        with running.client() as client:
            client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
            run_batch(client)
        until(lambda: receiver.heard, "the first attempt")
    with serve(tmp_path) as running:
        running.cell.ahead_ms += 60_000
        until(lambda: len(receiver.heard) >= 2, "the second attempt")
    assert receiver.heard[0][1] == receiver.heard[1][1]


def test_background_responses_are_told(server: Running, client: openai.OpenAI, receiver: Receiver) -> None:
    client.webhooks.create(name="mine", url=receiver.url, event_types=["response.completed"])
    made = client.responses.create(model=MODEL, input="hello", background=True)
    until(lambda: receiver.heard, "the event")
    assert json.loads(receiver.heard[0][1])["data"] == {"id": made.id}
    client.responses.create(model=MODEL, input="hello")  # who waits for it needs no telling
    assert server.cell.reader.execute("SELECT count(*) FROM delivery").fetchone()[0] == 1


# -- the routes --------------------------------------------------------------------------------------------------------


def test_webhooks_are_made_listed_changed_and_deleted(client: openai.OpenAI) -> None:
    made = client.webhooks.create(name="one", url="https://example.org/a", event_types=["batch.failed", "batch.failed"])
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint is not None
    assert made.signing_secret_hint[-4:] == made.signing_secret.rstrip("=")[-4:]
    second = client.webhooks.create(name="two", url="https://example.org/b", event_types=["batch.completed"])
    assert [hook.id for hook in client.webhooks.list().data] == [second.id, made.id]
    first_page = client.webhooks.list(limit=1)
    assert [hook.id for hook in first_page] == [second.id, made.id]  # the client asks for the second page itself
    shown = client.webhooks.retrieve(made.id)
    assert (shown.name, shown.url, shown.event_types) == ("one", "https://example.org/a", ["batch.failed"])
    assert "signing_secret" not in shown.model_dump()
    changed = client.webhooks.update(made.id, name="uno", event_types=["batch.expired"])
    assert (changed.name, changed.url, changed.event_types) == ("uno", "https://example.org/a", ["batch.expired"])
    gone = client.webhooks.delete(made.id)
    assert (gone.deleted, gone.object) == (True, "webhook_endpoint.deleted")
    with pytest.raises(openai.NotFoundError) as caught:
        client.webhooks.retrieve(made.id)
    assert code(caught.value) == (404, "webhook_not_found")
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)


def test_a_webhook_belongs_to_its_account(client: openai.OpenAI, server: Running) -> None:
    made = client.webhooks.create(name="one", url="https://example.org/a", event_types=["batch.failed"])
    with server.client(api_key=server.new_key("others")) as them:
        assert them.webhooks.list().data == []
        for act in (them.webhooks.retrieve, them.webhooks.delete, them.webhooks.rotate_secret, them.webhooks.update):
            with pytest.raises(openai.NotFoundError):
                act(made.id)
        with pytest.raises(openai.NotFoundError):
            them.webhooks.test(made.id, event_type="batch.failed")
    assert client.webhooks.retrieve(made.id).name == "one"


def test_a_secret_is_changed_with_or_without_a_day_of_both(client: openai.OpenAI, receiver: Receiver) -> None:
    hook = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
    second = client.webhooks.rotate_secret(hook.id, keep_old_secret_active_for_24_hours=True)
    client.webhooks.test(hook.id, event_type="batch.completed")
    headers, body, _ = receiver.heard[-1]
    for secret in (hook.signing_secret, second.signing_secret):
        client.webhooks.unwrap(body, headers, secret=secret)
    third = client.webhooks.rotate_secret(hook.id)
    client.webhooks.test(hook.id, event_type="batch.completed")
    headers, body, _ = receiver.heard[-1]
    client.webhooks.unwrap(body, headers, secret=third.signing_secret)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=second.signing_secret)


def test_the_old_secret_ends_after_a_day(client: openai.OpenAI, server: Running, receiver: Receiver) -> None:
    hook = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
    client.webhooks.rotate_secret(hook.id, keep_old_secret_active_for_24_hours=True)
    server.cell.ahead_ms += 24 * 3600 * 1000 + 1
    client.webhooks.test(hook.id, event_type="batch.completed")
    assert len(receiver.heard[-1][0]["webhook-signature"].split()) == 1


def test_a_sample_event_can_be_sent(client: openai.OpenAI, receiver: Receiver) -> None:
    hook = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
    receiver.statuses = [418]
    result = client.webhooks.test(hook.id, event_type="batch.expired")
    assert (result.status_code, result.success, result.event_type) == (418, True, "batch.expired")
    event = client.webhooks.unwrap(receiver.heard[0][1], receiver.heard[0][0], secret=hook.signing_secret)
    assert event.type == "batch.expired"
    receiver.server.server_close()
    with pytest.raises(openai.BadRequestError) as caught:
        client.webhooks.test(hook.id, event_type="batch.expired")
    assert code(caught.value) == (400, "webhook_unreachable")


def test_what_is_no_webhook_is_refused(client: openai.OpenAI, server: Running) -> None:
    def refused(**body: Any) -> tuple[int, str, str]:
        head = {"authorization": f"Bearer {server.key}"}
        given = {"name": "n", "url": "https://example.org/", "event_types": ["batch.failed"]} | body
        response = server.http.post("/v1/webhook_endpoints", json=given, headers=head)
        return response.status_code, response.json()["error"]["code"], response.json()["error"]["param"]

    assert refused(event_types=[]) == (400, "invalid_value", "event_types")
    assert refused(event_types=["video.completed"])[:2] == (400, "invalid_value")
    assert refused(name="") == (400, "invalid_value", "name")
    assert refused(url="ftp://example.org") == (400, "invalid_webhook_url", "url")
    for number in range(store.MAX_WEBHOOKS):
        client.webhooks.create(name=str(number), url="https://example.org/", event_types=["batch.failed"])
    assert refused()[:2] == (409, "too_many_webhooks")


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "https://",
        "https:///x",
        "example.org",
        "https://user:pw@example.org/",
        "https://user@example.org/",
        "https://example.org/#part",
        "https://example.org:0/",
        "https://example.org:99999/",
        "https://exa mple.org/",
        "https://ex\u00e4mple.org/",
        "https://example.org/\n",
        "https://example.org\\@127.0.0.1/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0177.0.0.1/",
        "https://10.0.0.1/",
        "https://172.16.5.5/",
        "https://192.168.1.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://255.255.255.255/",
        "https://224.0.0.1/",
        "https://240.0.0.1/",
        "https://[::1]/",
        "https://[::]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fe80::1]/",
        "https://[fd00::1]/",
        "https://[ff02::1]/",
        "https://[2002:7f00:1::]/",
        "https://[64:ff9b::a00:1]/",
        "https://localhost/",
        "https://a.localhost/",
        "https://printer.local/",
        "https://metadata.google.internal/",
        "https://localhost./",
        "https://" + "a" * 3000,
    ],
)
def test_an_address_that_is_not_of_the_internet_is_refused(url: str) -> None:
    with pytest.raises(CallerError) as caught:
        targets.check_url(url, Policy())
    assert caught.value.code == "invalid_webhook_url"
    assert url not in caught.value.message


@pytest.mark.parametrize("url", ["https://example.org/a?b=c", "https://8.8.8.8:8443/", "https://[2606:4700::1111]/"])
def test_an_address_of_the_internet_is_taken(url: str) -> None:
    targets.check_url(url, Policy())


def test_what_the_operator_allows_is_taken() -> None:
    targets.check_url("http://127.0.0.1:5/", OPEN)
    targets.check_url("https://[::1]/", Policy(private=True))
    with pytest.raises(CallerError):
        targets.check_url("http://10.0.0.1/", Policy(private=True))
    with pytest.raises(CallerError):
        targets.check_url("http://127.0.0.1/", Policy(http=True))


@pytest.mark.parametrize("found", [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], [], ["::ffff:10.1.1.1"]])
def test_a_name_that_leads_inside_is_refused_when_it_is_used(found: list[str]) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == ("example.org", 443)
        return found

    async def run() -> None:
        webhook = draft(account="a", name="n", url="https://example.org/", event_types=["batch.failed"], now_ms=0)
        outcome = await Sender(resolve).send(webhook, Policy(), b"{}", message_id="m", now_ms=0)
        assert (outcome.status, outcome.what) == (0, "its address is not allowed")

    asyncio.run(run())


def certificate(folder: Path, host: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate for ``host``, and a client's that trusts it alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(2100, 1, 1, tzinfo=dt.UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + made.public_bytes(serialization.Encoding.PEM)
    (folder / "server.pem").write_bytes(pem)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "server.pem")
    return serving, ssl.create_default_context(cadata=made.public_bytes(serialization.Encoding.PEM).decode())


@pytest.mark.parametrize(("host", "told"), [("hooks.example.org", True), ("other.example.org", False)])
def test_the_certificate_must_be_that_of_the_name(tmp_path: Path, host: str, told: bool) -> None:
    """The connection goes to the address that was checked, and the certificate is checked for the name."""
    serving, trusting = certificate(tmp_path, "hooks.example.org")

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with Receiver(serving) as receiver:

        async def run() -> int:
            url = f"https://{host}:{receiver.port}/x?y=1"
            webhook = draft(account="a", name="n", url=url, event_types=["batch.failed"], now_ms=0)
            sender = Sender(resolve, trusting)
            try:
                outcome = await sender.send(webhook, OPEN, b"{}", message_id="m", now_ms=0)
            finally:
                await sender.close()
            return outcome.status

        assert asyncio.run(run()) == (200 if told else 0)
        assert [(headers["host"], path) for headers, _, path in receiver.heard] == (
            [(f"{host}:{receiver.port}", "/x?y=1")] if told else []
        )


# -- again and again ---------------------------------------------------------------------------------------------------


class World:
    """A cell with one webhook, and a worker that is driven by hand."""

    def __init__(self, root: Path, url: str) -> None:
        self.cell = LocalCell(root)
        store.set_policy(self.cell.database.writer, OPEN)
        self.webhook: Webhook = draft(
            account="acme", name="n", url=url, event_types=list(EVENT_TYPES), now_ms=self.cell.now_ms()
        )
        store.insert(self.cell.database.writer, self.webhook)
        self.worker = WebhookWorker(self.cell)

    def end_batch(self, number: int = 1, status: str = "completed") -> None:
        writer = self.cell.database.writer
        writer.execute(
            "INSERT INTO batch (batch_no, batch_id, account, endpoint, input_file_id, completion_window, status,"
            " created_ms, expires_ms) VALUES (?, ?, 'acme', '/v1/completions', 'f', '24h', 'in_progress', 0, 1)",
            (number, f"batch_{number}"),
        )
        books.set_status(writer, number, status, self.cell.now_ms())

    def log(self) -> list[store.Delivery]:
        return store.log_of(self.cell.reader, self.webhook.webhook_id, 100)

    async def close(self) -> None:
        await self.worker.close()
        await self.cell.close()


def drive(tmp_path: Path, url: str, test: Any) -> None:
    async def run() -> None:
        world = World(tmp_path, url)
        try:
            await test(world)
        finally:
            await world.close()

    asyncio.run(run())


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
def test_every_end_of_a_batch_makes_one_delivery(tmp_path: Path, receiver: Receiver, status: str) -> None:
    async def test(world: World) -> None:
        world.end_batch(status=status)
        books.set_status(world.cell.database.writer, 1, status, 5)  # written again after a crash
        await world.worker.settle()
        assert [json.loads(body)["type"] for _, body, _ in receiver.heard] == [f"batch.{status}"]
        assert [row.state for row in world.log()] == ["delivered"]

    drive(tmp_path, receiver.url, test)


def test_attempts_are_made_at_growing_intervals_and_then_no_more(tmp_path: Path, receiver: Receiver) -> None:
    async def test(world: World) -> None:
        receiver.statuses = [500] * 99
        world.end_batch()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            await world.worker.settle()
            (row,) = world.log()
            assert (row.attempts, len(receiver.heard)) == (attempt, attempt)
            await world.worker.settle()  # nothing is due
            assert len(receiver.heard) == attempt
            world.cell.ahead_ms += round(WAITS_S[min(attempt, len(WAITS_S)) - 1] * 1000 * 1.2)
        assert (row.state, row.outcome) == ("failed", "HTTP 500")
        assert len({body for _, body, _ in receiver.heard}) == 1
        assert len({headers["webhook-timestamp"] for headers, _, _ in receiver.heard}) == MAX_ATTEMPTS

    drive(tmp_path, receiver.url, test)


def test_waits_are_spread_but_never_far_off() -> None:
    for made, wait_s in enumerate(WAITS_S, start=1):
        waits = {wait_ms(made, number) for number in range(50)}
        assert len(waits) > 20
        assert all(0.89 * wait_s * 1000 <= wait <= 1.11 * wait_s * 1000 for wait in waits)
    assert 3 * 86_400 <= sum(WAITS_S) <= 4 * 86_400


def test_a_redirect_is_no_yes_and_is_not_followed(tmp_path: Path, receiver: Receiver) -> None:
    async def test(world: World) -> None:
        receiver.statuses = [302]
        world.end_batch()
        await world.worker.settle()
        assert [(row.state, row.outcome) for row in world.log()] == [("pending", "HTTP 302")]
        assert len(receiver.heard) == 1

    drive(tmp_path, receiver.url, test)


def test_a_server_that_says_it_is_gone_hears_no_more_until_the_webhook_is_changed(
    tmp_path: Path, receiver: Receiver
) -> None:
    async def test(world: World) -> None:
        receiver.statuses = [410]
        world.end_batch(1)
        await world.worker.settle()
        world.end_batch(2)
        await world.worker.settle()
        assert len(receiver.heard) == 1
        assert store.get(world.cell.reader, world.webhook.webhook_id).disabled_ms is not None
        store.update(world.cell.database.writer, world.webhook)
        world.end_batch(3)
        await world.worker.settle()
        assert len(receiver.heard) == 2

    drive(tmp_path, receiver.url, test)


def test_a_webhook_that_is_deleted_hears_no_more(tmp_path: Path, receiver: Receiver) -> None:
    async def test(world: World) -> None:
        world.end_batch()
        store.remove(world.cell.database.writer, world.webhook.webhook_id, 1)
        await world.worker.settle()
        assert receiver.heard == []
        row = world.cell.reader.execute("SELECT secret FROM webhook").fetchone()
        assert row[0] == b""

    drive(tmp_path, receiver.url, test)


def test_nobody_there_is_written_down_without_the_address(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="motorpool")

    async def test(world: World) -> None:
        world.end_batch()
        await world.worker.settle()
        (row,) = world.log()
        assert (row.state, row.attempts, row.outcome) == ("pending", 1, "no answer (ConnectError)")

    drive(tmp_path, "http://127.0.0.1:9/secret-path", test)
    assert "secret-path" not in caplog.text


def test_one_slow_webhook_does_not_hold_up_another(tmp_path: Path, receiver: Receiver) -> None:
    async def test(world: World) -> None:
        other = draft(account="acme", name="o", url=receiver.url, event_types=["batch.failed"], now_ms=0)
        for number in range(1, 31):
            world.end_batch(number)
        store.insert(world.cell.database.writer, other)
        world.end_batch(31, "failed")
        found = store.due(world.cell.reader, world.cell.now_ms(), 16)
        assert sum(row.webhook_id == world.webhook.webhook_id for row in found) == store.AT_ONCE
        assert sum(row.webhook_id == other.webhook_id for row in found) == 1

    drive(tmp_path, "http://127.0.0.1:9/", test)


def test_an_attempt_that_was_not_written_down_is_made_again(tmp_path: Path, receiver: Receiver) -> None:
    async def test(world: World) -> None:
        world.end_batch()
        (row,) = store.due(world.cell.reader, world.cell.now_ms(), 16)
        world.cell.write_error = CallerError("the process stopped here")
        await world.worker._deliver(row)
        world.cell.write_error = None
        await world.worker.settle()
        assert len(receiver.heard) == 2
        assert receiver.heard[0][1] == receiver.heard[1][1]
        assert [row.state for row in world.log()] == ["delivered"]

    drive(tmp_path, receiver.url, test)


def test_old_logs_are_dropped(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        for number in range(1, 6):
            world.end_batch(number)
        await world.worker.settle()
        monkeypatch.setattr(store, "MAX_ENDED", 3)
        writer = world.cell.database.writer
        assert store.prune(writer, world.cell.now_ms()) == 2
        assert store.prune(writer, world.cell.now_ms() + store.KEPT_MS + 1) == 3

    drive(tmp_path, receiver.url, test)


def test_the_routes_and_the_triggers_know_the_same_events() -> None:
    assert EventType.__args__ == EVENT_TYPES  # type: ignore[attr-defined]


# -- the operator's command --------------------------------------------------------------------------------------------


def test_the_operator_makes_sees_and_deletes_webhooks(tmp_path: Path) -> None:
    Database(tmp_path / "motorpool.db").close()

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(webhooks, [*arguments, "--data", str(tmp_path)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    made = json.loads(run("add", "https://example.org/x", "--account", "acme", "--event", "batch.failed", "--json"))
    assert made["signing_secret"].startswith("whsec_")
    (listed,) = json.loads(run("list", "--json"))
    assert (listed["account"], listed["webhook"]["id"]) == ("acme", made["id"])
    assert made["signing_secret"] not in run("list")
    assert json.loads(run("deliveries", made["id"], "--json")) == []
    with pytest.raises(CallerError):
        run("add", "http://127.0.0.1/")
    assert "may reach" in run("policy", "--private", "--http")
    assert run("add", "http://127.0.0.1/").startswith("whsec_")
    assert "may not reach" in run("policy", "--no-private")
    run("remove", made["id"])
    assert made["id"] not in run("list")
