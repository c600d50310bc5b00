"""How every command speaks: results on stdout, everything said on the way on stderr, errors as one line.

Decides: the form of messages and the exit codes. Must not: know any command.
Called by: every command.
"""

from __future__ import annotations

import errno
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from motorpool.errors import MotorpoolError, SetupError, StorageFullError

if TYPE_CHECKING:
    import openai
    from rich.console import Console

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_LINES_FAILED: Final = 3
EXIT_LINES_MISSING: Final = 4
EXIT_LINES_DOUBLED: Final = 5
EXIT_NOT_COMPLETED: Final = 6
EXIT_TOO_SLOW: Final = 7
EXIT_INTERRUPTED: Final = 130


def stderr_console() -> Console:
    """A console on today's stderr (tests replace it), without rich's own colouring of numbers and paths."""
    from rich.console import Console  # noqa: PLC0415  # agents and control planes never need it

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One line about what is being done, on stderr."""
    click.echo(f"{click.style('==>', bold=True)} {message}", err=True)


def print_json(value: Any) -> None:
    """One value as one line of JSON on stdout, for programs."""
    click.echo(msgspec.json.encode(value).decode())


def print_error(message: str) -> None:
    """The one line of an error; line breaks in foreign messages become spaces."""
    click.echo(f"motorpool: error: {' '.join(message.split())}", err=True)


def describe(error: BaseException) -> str | None:
    """What to tell a person about an expected failure, or None when it is our own bug and deserves a traceback."""
    if isinstance(error, MotorpoolError):
        return error.message
    api = sys.modules.get("openai")  # where it was never imported, it raised nothing
    if api is not None and isinstance(error, api.OpenAIError):
        return describe_api_error(error)
    if isinstance(error, OSError):
        return describe_os_error(error)
    return None


def describe_api_error(error: openai.OpenAIError) -> str:
    """An answer, or the lack of one, from the API that a command spoke to."""
    import openai  # noqa: PLC0415  # it is loaded already when one of its errors is here

    if isinstance(error, openai.APIConnectionError):
        return (
            f"cannot reach the API at {error.request.url.host}:{error.request.url.port}: "
            "is it running? Start everything on this machine with `motorpool dev`, or set --base-url"
        )
    if isinstance(error, openai.AuthenticationError):
        return (
            "the API does not accept this key (from --api-key, else OPENAI_API_KEY): make one with "
            "`motorpool keys create --data FOLDER`, FOLDER being that of this cell"
        )
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return f"the API answered {error.status_code}: {body.get('message') or error.message}"
    return str(error)


def describe_os_error(error: OSError) -> str:
    """A failure of the machine: a file that is missing, a disk that is full, an address in use."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{where and ', while writing' + where}: free some space, then run the same command again"
        )
    if error.errno == errno.EADDRINUSE:
        return f"the address{where} is already in use: choose another one with --port, or stop the program that has it"
    return f"{error.strerror or error}{where and ':' + where}"


def check_readable(path: Path, what: str) -> None:
    """Raise SetupError if ``path`` is not there or may not be read."""
    if not path.exists():
        raise SetupError(f"{what} {path} does not exist", code="file_missing")


def write_whole(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that it is there as a whole or not at all. Raises StorageFullError or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as stream:
            temporary.chmod(mode)
            stream.write(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"the disk is full: could not write {path}. Free some space and run it again"
            ) from error
        raise


class Number(click.FloatRange):
    """A number within bounds, as an option's type: a usage error for ``nan``, which every range lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail("this is no number", param, ctx)
        return number


def is_terminal() -> bool:
    """Whether a person is watching stderr, so that a live display makes sense."""
    return sys.stderr.isatty()
