"""The commands one by one: what they print, and how they fail."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from pathlib import Path

import click
import msgspec
import pytest

from motorpool.cli import folders, main, output, running, watch
from motorpool.errors import SetupError, StorageFullError
from motorpool.store.database import Database


def commands(group: click.Group, *names: str) -> list[tuple[str, ...]]:
    context = click.Context(group)
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append((*names, name))
        if isinstance(command, click.Group):
            found += commands(command, *names, name)
    return found


@pytest.mark.parametrize("names", commands(main.cli), ids=" ".join)
def test_every_command_has_help_with_an_example(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([*names, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"motorpool {names[0]}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["batch", "run"], "Missing argument"),
        (["dev", "--vehicles", "many"], "is not a valid integer"),
        (["car", "1", "fly"], "'fly' is not one of"),
        (["consent", "give", "1", "--ready-by", "24:00"], "a time looks like 07:30"),
        (["consent", "give", "1", "--ready-by", "noon"], "a time looks like 07:30"),
        (["consent", "give", "1", "--floor", "nan"], "this is no number"),
        (["dev", "--null-rate", "nan"], "this is no number"),
        (["dev", "--null-rate", "-5"], "-5.0 is not in the range"),
        (["keys", "create", "--account", " "], "name an account"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("motorpool: error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.fixture
def nobody_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (running.ENV_BASE_URL, running.ENV_API_KEY, running.ENV_ADMIN_URL, running.ENV_ADMIN_KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "motorpool" / "dev"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch", "list"], "start `motorpool dev`, or give --base-url"),
        (["vehicles", "list"], "start `motorpool dev`, name the data folder of a running cell with --data, or give"),
        (["vehicles", "list", "--admin-url", "http://127.0.0.1:9"], "give --admin-key"),
        (
            ["vehicles", "list", "--admin-url", "http://127.0.0.1:9", "--admin-key", "k"],
            "is the control plane running?",
        ),
        (["batch", "list", "--base-url", "http://127.0.0.1:9/v1", "--api-key", "k"], "cannot reach the API"),
        (["car", "2", "drive-off"], "no `motorpool dev` runs"),
        (["consent", "withdraw", "2"], "no `motorpool dev` runs"),
        (["keys", "list"], "holds no books of a cell"),
        (["keys", "create"], "holds no books of a cell"),
        (["keys", "create", "--data", "no/such/folder"], "holds no books of a cell"),
        (["batch", "list", "--base-url", "http://127.0.0.1:9/v1", "--api-key", "k\u00fc"], "no key has"),
        (["vehicles", "list", "--admin-url", "http://127.0.0.1:9", "--admin-key", "k\u00fc"], "no key has"),
        (["models", "pull", "no-such-model"], "there is no model 'no-such-model'"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(
    nobody_runs: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del nobody_runs
    monkeypatch.setattr("motorpool.cli.batch.RETRIES", 0)
    assert main.run(arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_port_in_use_is_said_by_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main.run(["serve", "--data", str(tmp_path), "--port", port, "--admin-port", "0"]) == 1
    assert f"port {port} on 127.0.0.1 for the API cannot be used" in capsys.readouterr().err


def test_an_agent_without_credentials_says_how_to_get_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["agent", "--dir", str(tmp_path), "--model", "null"]) == 1
    assert "motorpool vehicles enrol" in capsys.readouterr().err


def test_a_model_that_is_not_here_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOTORPOOL_MODELS", str(tmp_path / "models"))
    assert main.run(["agent", "--dir", str(tmp_path), "--model", "smollm2-135m-instruct"]) == 1
    assert "motorpool models pull smollm2-135m-instruct" in capsys.readouterr().err


def test_a_key_is_shown_once_and_can_be_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path)]
    assert main.run(["keys", "create", *data, "--account", "acme", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main.run(["keys", "list", *data]) == 0
    listed = capsys.readouterr().out
    assert made["key"] not in listed
    assert made["key"][-4:] in listed
    assert made["key"].encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert main.run(["keys", "revoke", made["key_id"], *data]) == 0
    assert main.run(["keys", "list", *data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["revoked_ms"] is not None
    assert main.run(["keys", "revoke", "key_unknown", *data]) == 1
    assert "there is no key with this id" in capsys.readouterr().err


def test_the_models_say_whether_they_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOTORPOOL_MODELS", str(tmp_path))
    assert main.run(["models", "list", "--json"]) == 0
    states = {row["model"]["id"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert states == {
        "null": "needs no file",
        "smollm2-135m-instruct": "not fetched",
        "all-minilm-l6-v2": "not fetched",
    }
    assert main.run(["models", "list"]) == 0
    assert "98 MB" in capsys.readouterr().out


def test_a_wrong_model_file_is_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOTORPOOL_MODELS", str(tmp_path))
    place = tmp_path / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    place.parent.mkdir()
    place.write_bytes(b"something else")
    assert main.run(["models", "pull", "smollm2-135m-instruct"]) == 1
    said = capsys.readouterr().err
    assert "is not the model smollm2-135m-instruct" in said
    assert "--force" in said


def test_addresses_and_keys_of_a_running_dev_are_found(nobody_runs: Path) -> None:
    written = running.Running(
        base_url="http://b/v1", api_key="key", admin_url="http://a", admin_key="secret", data="d", pids={}, vehicles={}
    )
    output.write_whole(nobody_runs / running.DEV_FILE, msgspec.json.encode(written), mode=0o600)
    assert running.resolve_api(None, None) == ("http://b/v1", "key")
    assert running.resolve_admin(None, None) == ("http://a", "secret")
    assert running.resolve_api("http://other/v1", "mine") == ("http://other/v1", "mine")
    with pytest.raises(SetupError, match="no API key"):
        running.resolve_api("http://other/v1", None)  # a key is never sent to another server
    assert "secret" not in repr(written)


def test_a_cell_that_is_found_gets_its_own_key_and_not_that_of_the_environment(
    nobody_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = running.Running(
        base_url="http://b/v1", api_key="key", admin_url="http://a", admin_key="secret", data="d", pids={}, vehicles={}
    )
    output.write_whole(nobody_runs / running.DEV_FILE, msgspec.json.encode(written), mode=0o600)
    monkeypatch.setenv(running.ENV_API_KEY, "sk-of-another-service")
    assert running.resolve_api(None, None) == ("http://b/v1", "key")
    assert running.resolve_api(None, " mine\n") == ("http://b/v1", "mine")
    assert running.resolve_api("http://other/v1", None) == ("http://other/v1", "sk-of-another-service")
    monkeypatch.setenv(running.ENV_API_KEY, "")
    with pytest.raises(SetupError, match="no API key"):
        running.resolve_api("http://other/v1", None)


def test_a_folder_has_one_process_at_a_time(tmp_path: Path) -> None:
    with folders.take(tmp_path, "x.lock", "agent", "wait"):
        with pytest.raises(SetupError, match=rf"another agent \(process {os.getpid()}\) works in .*: stop it, or wait"):
            folders.take(tmp_path, "x.lock", "agent", "wait")
        folders.take(tmp_path, "other.lock", "agent", "wait").close()
    folders.take(tmp_path, "x.lock", "agent", "wait").close()


def test_the_books_are_for_their_owner_alone_whatever_the_folder_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    database = Database(tmp_path / "motorpool.db")
    database.writer.execute("CREATE TABLE t (x)")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    database.close()
    assert set(modes.values()) == {0o600}
    assert "motorpool.db-wal" in modes


def test_a_model_file_of_another_size_is_not_called_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOTORPOOL_MODELS", str(tmp_path))
    place = tmp_path / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    place.parent.mkdir()
    place.write_bytes(b"half of it")
    assert main.run(["models", "list"]) == 0
    assert "damaged" in capsys.readouterr().out


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageFullError, match="the disk is full: could not write"):
        output.write_whole(tmp_path / "out.jsonl", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space", "/d/f"), "the disk is full, while writing /d/f"),
        (OSError(errno.EADDRINUSE, "in use"), "already in use"),
        (PermissionError(errno.EACCES, "Permission denied", "/d/f"), "Permission denied: /d/f"),
    ],
)
def test_failures_of_the_machine_in_words(error: OSError, message: str) -> None:
    words = output.describe(error)
    assert words is not None
    assert message in words


def test_our_own_bugs_are_not_hidden() -> None:
    assert output.describe(ZeroDivisionError()) is None


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("2 drive-off", ("2", "drive-off")),
        ("car-2 Drive Off", ("2", "drive-off")),
        ("quit", "quit"),
        ("", watch.HELP),
    ],
)
def test_typed_lines_are_understood(line: str, meaning: tuple[str, str] | str) -> None:
    assert watch.understand(line) == meaning


def test_what_is_not_understood_is_said() -> None:
    assert str(watch.understand("2 fly")).startswith("not understood: 2 fly")
    assert "drive-off" in watch.understand("help")


def test_the_prompt_takes_keys_one_by_one() -> None:
    async def type_it() -> tuple[list[tuple[str, str]], str, bool]:
        played: list[tuple[str, str]] = []
        done = asyncio.Event()

        async def play(number: str, action: str) -> str:
            played.append((number, action))
            done.set()
            return "gone"

        stop = asyncio.Event()
        prompt = watch.Prompt(play, stop)
        prompt.feed("1 unplux\x7fg\r")
        await asyncio.wait_for(done.wait(), 10)
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
        prompt.feed("quit\r")
        return played, prompt.answer, stop.is_set()

    assert asyncio.run(type_it()) == ([("1", "unplug")], "gone", True)
