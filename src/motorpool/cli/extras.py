"""Which optional part of Motorpool a missing package belongs to, so that a person is told what to install.

Decides: the words for a package that is not here. Must not: import any of them, or hide a package of no extra: that
one is our own bug or a broken installation, and deserves its traceback.
Called by: ``cli.main``, when a command cannot be loaded or a part of it is missing while it runs.
"""

from __future__ import annotations

from typing import Any, Final

import click

from motorpool.errors import SetupError

# By the name that is imported. Where two extras bring a package, the one that a person is likelier to want.
EXTRAS: Final[dict[str, str]] = {
    "aiohttp": "page",
    "google": "vss",
    "grpc": "vss",
    "httptools": "server",
    "matplotlib": "plots",
    "numba": "fleet",
    "numpy": "server",
    "ocpp": "ocpp",
    "openai": "client",
    "python_multipart": "server",
    "rich": "client",
    "scipy": "fleet",
    "starlette": "server",
    "tuf": "trust",
    "uvicorn": "server",
    "xllamacpp": "llama",
}


def missing(error: ImportError) -> SetupError | None:
    """What to say of a package that is not installed; None if it belongs to no extra."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    extra = EXTRAS.get(error.name.partition(".")[0])
    if extra is None:
        return None
    return SetupError(f"this command needs: pip install 'motorpool[{extra}]'", code="extra_missing")


def placeholder(name: str, lacks: SetupError) -> click.Command:
    """Stands for a command that cannot be loaded: it is listed with what it needs, and fails with the same words."""

    def fail() -> Any:
        raise lacks

    return click.Command(
        name,
        callback=fail,
        short_help=lacks.message,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
