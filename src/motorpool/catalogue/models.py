"""The models that Motorpool knows: where each file comes from, what it must be, what it costs.

Decides: whether a catalogue is well-formed, and whether a file is the one that it names. Must not: read the
environment (the command line does), load a model. Fetching is done by ``fetch``. Called by: cli, server, agent.
"""

from __future__ import annotations

import errno
import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import msgspec

from motorpool.errors import ModelFileError, NotFoundError, SetupError

NULL_MODEL: Final = "null"
USER_FILE: Final = "models.toml"  # in the data folder, or in the configuration folder
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PROJECT = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9.!+_-]+")
_LOCAL = re.compile(r"http://(127\.0\.0\.1|localhost|\[::1\])[:/]")


class FileSource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="file", forbid_unknown_fields=True):
    """A file that is already on this machine."""

    path: str


class HttpsSource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="https", forbid_unknown_fields=True):
    """A file on a web server."""

    url: str


class PackageSource(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="package", forbid_unknown_fields=True
):
    """A file inside a Python wheel; pip fetches the wheel from wherever it is configured to."""

    project: str
    version: str
    member: str


class BertPackageSource(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="bert_package", forbid_unknown_fields=True
):
    """A sentence encoder in a Python wheel, as its makers publish it, which is converted here.

    ``member`` is a zip archive in the wheel, ``sha256`` and ``size_bytes`` are that archive's; the model's own are
    those of the file that the conversion makes of it, which is the same everywhere.
    """

    project: str
    version: str
    member: str
    sha256: str
    size_bytes: int


Source = FileSource | HttpsSource | PackageSource | BertPackageSource


class _Named(msgspec.Struct, frozen=True):
    id: str


class Model(_Named, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model. ``source`` is None for a model that needs no file.

    ``context_tokens`` is what one request can hold, prompt and answer together. Prices are in millionths of the
    currency unit for a million tokens. ``licence`` is an SPDX identifier. ``dimensions`` are the numbers of a vector
    of a model that makes embeddings, 0 for one that makes none; with ``min_dimensions`` customers may ask for shorter
    ones, down to so many, as the first numbers of a vector mean most (Matryoshka). ``generates``: it answers in text.
    """

    name: str = ""
    source: Source | None = None
    sha256: str = ""
    size_bytes: int = 0
    licence: str = ""
    parameters: int = 0
    context_tokens: int = 2048
    input_micro: int = 30_000
    output_micro: int = 60_000
    created_s: int = 0
    owned_by: str = "motorpool"
    dimensions: int = 0
    min_dimensions: int = 0
    generates: bool = True


class Catalogue:
    """All known models by id."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.models: dict[str, Model] = {}
        for model in models:
            if model.id in self.models:
                raise SetupError(f"the model {model.id} is in the catalogue twice", code="invalid_catalogue")
            self.models[model.id] = model

    @staticmethod
    def builtin() -> Catalogue:
        """The models that come with Motorpool."""
        text = resources.files("motorpool.catalogue").joinpath("builtin.toml").read_text(encoding="utf-8")
        return Catalogue(parse_models(text, "the built-in catalogue"))

    @staticmethod
    def load(folders: Iterable[Path]) -> Catalogue:
        """The built-in models and those in a ``models.toml`` in each folder; raise SetupError naming file and field."""
        models = list(Catalogue.builtin().models.values())
        for folder in folders:
            path = folder / USER_FILE
            try:
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError) as error:
                raise SetupError(f"{path} cannot be read: {error}", code="invalid_catalogue") from error
            models += parse_models(text, str(path))
        return Catalogue(models)

    def get(self, model_id: str) -> Model:
        """One model; raise NotFoundError ``model_not_found``."""
        model = self.models.get(model_id)
        if model is None:
            raise NotFoundError(
                f"there is no model {model_id[:128]!r} here; `motorpool models list` and GET /v1/models name those "
                "that there are",
                code="model_not_found",
                param="model",
            )
        return model


def parse_models(text: str, origin: str) -> list[Model]:
    """Read ``[[model]]`` tables; raise SetupError that names the origin, the model and the field."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{origin} is not TOML: {error}", code="invalid_catalogue") from error
    unknown = sorted(set(document) - {"model"})
    if unknown:
        raise _invalid(origin, f"{unknown[0]} is unknown; models stand in [[model]] tables")
    tables = document.get("model", [])
    if not isinstance(tables, list):
        raise _invalid(origin, "models stand in [[model]] tables, with double brackets")
    return [_model(table, f"{origin}, model {number}") for number, table in enumerate(tables, start=1)]


def models_dir(environ: Mapping[str, str]) -> Path:
    """Where model files are kept: $MOTORPOOL_MODELS, else in the user's cache folder."""
    if environ.get("MOTORPOOL_MODELS"):
        return Path(environ["MOTORPOOL_MODELS"]).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".cache")
    return Path(cache) / "motorpool" / "models"


def catalogue_dirs(environ: Mapping[str, str], data_dir: Path | None) -> list[Path]:
    """The folders in which a user's ``models.toml`` is looked for."""
    config = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".config")
    return [Path(config) / "motorpool", *([] if data_dir is None else [data_dir])]


def model_path(model: Model, folder: Path) -> Path | None:
    """Where the file of a model is, or would be; None if the model needs none."""
    source = model.source
    if source is None:
        return None
    if isinstance(source, FileSource):
        return Path(source.path).expanduser()
    if isinstance(source, BertPackageSource):
        return folder / model.id.replace("/", "--") / f"{model.id.rsplit('/', 1)[-1]}.gguf"
    last = source.member if isinstance(source, PackageSource) else source.url.split("?", 1)[0]
    return folder / model.id.replace("/", "--") / last.rsplit("/", 1)[-1]


def verify(model: Model, folder: Path) -> Path:
    """The checked file of a model; raise ModelFileError that says what is wrong with it and what to do."""
    path = model_path(model, folder)
    if path is None:
        raise ModelFileError(f"the model {model.id} has no file", code="model_file_missing")
    try:
        size = path.stat().st_size
        if size != model.size_bytes:
            raise mismatch(model, path, f"it has {size} bytes instead of {model.size_bytes}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(model, path, error) from error
    if digest != model.sha256:
        raise mismatch(model, path, f"its SHA-256 is {digest} instead of {model.sha256}")
    return path


def mismatch(model: Model, path: Path, why: str) -> ModelFileError:
    """The error for a file that is not the one that the catalogue names."""
    if isinstance(model.source, FileSource):
        remedy = "Put the right file there, or correct sha256 and size_bytes in the catalogue."
    else:
        remedy = f"Fetch it again with: motorpool models pull {model.id} --force"
    return ModelFileError(f"{path} is not the model {model.id} of the catalogue: {why}. {remedy}")


def _unreadable(model: Model, path: Path, error: OSError) -> ModelFileError:
    if error.errno != errno.ENOENT:
        return ModelFileError(f"the file of {model.id}, {path}, cannot be read: {error.strerror}")
    remedy = (
        "Put it there, or correct its path in the catalogue."
        if isinstance(model.source, FileSource)
        else f"Fetch it with: motorpool models pull {model.id}"
    )
    return ModelFileError(f"the file of {model.id}, {path}, is not there. {remedy}", code="model_file_missing")


def _model(table: Any, origin: str) -> Model:
    if isinstance(table, dict) and isinstance(table.get("id"), str):
        origin += f" ({table['id'][:128]})"
    try:
        model = msgspec.convert(table, Model)
    except msgspec.ValidationError as error:
        raise _invalid(origin, str(error)) from error
    for field, fault in _faults(model):
        raise _invalid(origin, f"{field} {fault}")
    return model


def _faults(model: Model) -> Iterable[tuple[str, str]]:
    """What is wrong with the values of a model: field and fault."""
    if not _ID.fullmatch(model.id) or ".." in model.id:
        yield "id", "must be 1 to 128 letters, digits, '.', '_', '-' or '/'"
    for field in ("parameters", "input_micro", "output_micro", "created_s", "dimensions", "min_dimensions"):
        if getattr(model, field) < 0:
            yield field, "must not be negative"
    if model.context_tokens < 1:
        yield "context_tokens", "must be at least 1"
    if model.min_dimensions > model.dimensions:
        yield "min_dimensions", "must not be more than dimensions"
    if not model.generates and not model.dimensions:
        yield "dimensions", "is missing; a model that generates no text makes embeddings"
    if not model.licence:
        yield "licence", "is missing; give its SPDX identifier"
    if model.source is None:
        if model.id != NULL_MODEL:
            yield "source", "is missing"
        return
    if not _SHA256.fullmatch(model.sha256):
        yield "sha256", "must be 64 lower-case hexadecimal digits"
    if model.size_bytes < 1:
        yield "size_bytes", "must be the size of the file"
    yield from _source_faults(model.source)


def _source_faults(source: Source) -> Iterable[tuple[str, str]]:
    if isinstance(source, FileSource):
        if not Path(source.path).expanduser().is_absolute():
            yield "source.path", "must be an absolute path, or one that begins with ~/"
    elif isinstance(source, HttpsSource):
        if not source.url.startswith("https://") and not _LOCAL.match(source.url):
            yield "source.url", "must begin with https:// (http:// is for this machine alone)"
        if not re.fullmatch(r"[A-Za-z0-9._-]+", source.url.split("?", 1)[0].rsplit("/", 1)[-1]):
            yield "source.url", "must end in a file name"
    else:
        if not _PROJECT.fullmatch(source.project):
            yield "source.project", "is no name of a Python project"
        if not _VERSION.fullmatch(source.version):
            yield "source.version", "is no version"
        if not source.member or source.member.endswith("/") or ".." in source.member.split("/"):
            yield "source.member", "must be the path of a file in the wheel"
        if isinstance(source, BertPackageSource) and not _SHA256.fullmatch(source.sha256):
            yield "source.sha256", "must be 64 lower-case hexadecimal digits"


def _invalid(origin: str, fault: str) -> SetupError:
    return SetupError(f"{origin}: {fault}", code="invalid_catalogue")
