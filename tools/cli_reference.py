"""Writes docs/reference/cli.md: the help of every command, as the program itself gives it.

Run it after changing a command: ``.venv/bin/python tools/cli_reference.py``. A test compares the page with the code.
"""

from __future__ import annotations

from pathlib import Path

import click

from motorpool.cli.main import cli

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
HEAD = """# The command line

What `--help` says, command by command. This page is written by `tools/cli_reference.py` and compared with the program
by a test. Every command fails in one readable line on standard error: exit code 2 when the command line is at fault,
1 otherwise; `motorpool batch run` and `motorpool demo` say in their help what their other codes mean.
"""


def pages(command: click.Command, name: str, parent: click.Context | None = None) -> list[str]:
    """The help of a command and of everything below it."""
    settings = dict(command.context_settings) | {"max_content_width": 100, "terminal_width": 100}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    command._help_option = None  # noqa: SLF001  # click keeps that of the first caller, who may have had other names
    found = [f"## {context.command_path}\n\n```\n{command.get_help(context).rstrip()}\n```\n"]
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            below = command.get_command(context, child)
            if below is not None and not below.hidden:
                found.extend(pages(below, child, context))
    return found


def render() -> str:
    """The whole page."""
    return HEAD + "\n" + "\n".join(pages(cli, "motorpool"))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
