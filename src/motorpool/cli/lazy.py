"""Groups of commands that are imported when they are called: a vehicle's agent has no use for the customer's client.

Called by: ``cli.main``, ``cli.sim``.
"""

from __future__ import annotations

import importlib
from typing import ClassVar

import click

from motorpool.cli import extras


class LazyGroup(click.Group):
    """``places`` says where each command is: module of this package, and attribute; in the order of the help."""

    places: ClassVar[dict[str, str]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names."""
        del ctx
        return list(self.places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None if there is none of that name. One that lacks a package says so when it is run."""
        del ctx
        place = self.places.get(cmd_name)
        if place is None:
            return None
        module, attribute = place.split(":")
        try:
            found: click.Command = getattr(importlib.import_module(f"motorpool.cli.{module}"), attribute)
        except ModuleNotFoundError as error:
            lacks = extras.missing(error)
            if lacks is None:
                raise
            return extras.placeholder(cmd_name, lacks)
        return found
