"""The ``motorpool`` command: puts the commands together and turns expected failures into one readable line.

Decides: exit codes of failures. Must not: do any work itself.
Called by: the ``motorpool`` script.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import click

from motorpool.cli import extras, output
from motorpool.cli.lazy import LazyGroup

# Where each command is. A vehicle's agent has no use for the customer's client, so each is imported when it is called.
COMMANDS: Final[dict[str, str]] = {
    "demo": "demo:demo",
    "dev": "dev:dev",
    "batch": "batch:batch",
    "vehicles": "operator:vehicles",
    "jobs": "jobs:jobs",
    "relays": "relays:relays",
    "sites": "sites:sites",
    "customers": "sites:customers",
    "car": "owner:car",
    "consent": "consent:consent",
    "owner": "owner_cmd:owner",
    "models": "models:models",
    "keys": "keys:keys",
    "webhooks": "webhooks:webhooks",
    "serve": "serve:serve",
    "agent": "agent:agent",
    "sim": "sim:sim",
    "plan": "plan:plan",
}


class Commands(LazyGroup):
    """The commands of ``motorpool``, in the order in which a newcomer meets them."""

    places = COMMANDS


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="motorpool", prog_name="motorpool")
def cli() -> None:
    """Parked electric vehicles as a compute cloud, behind an OpenAI-compatible API.

    \b
    Start here:
      motorpool demo                       a batch of real documents on three vehicles, one drives off
      motorpool dev                        everything on this machine until Ctrl-C
      motorpool batch run --help           hand in your own documents
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; expected failures become one line on stderr."""
    try:
        result = cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.UsageError as error:
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""
        output.print_error(f"{error.format_message()}{where}")
        return output.EXIT_USAGE
    except click.ClickException as error:
        output.print_error(error.format_message())
        return output.EXIT_ERROR
    except (click.Abort, KeyboardInterrupt):
        output.print_error("stopped")
        return output.EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; there is nobody left to tell
        return output.EXIT_ERROR
    except Exception as error:
        lacks = extras.missing(error) if isinstance(error, ImportError) else None
        words = output.describe(lacks or error)
        if words is None:
            raise
        output.print_error(words)
        return output.EXIT_ERROR
    return result if isinstance(result, int) else 0


def main() -> None:
    """The entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
