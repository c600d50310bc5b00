"""Where the models and their files are on this machine: the environment is read here and nowhere below.

Decides: which folders are looked at. Must not: fetch anything.
Called by: ``cli.models``, ``cli.serve``, ``cli.agent``, ``cli.demo``.
"""

from __future__ import annotations

import os
from pathlib import Path

from motorpool.catalogue import Catalogue, Model, catalogue_dirs, models_dir, verify


def models_folder() -> Path:
    """Where model files are kept: $MOTORPOOL_MODELS, else the user's cache folder."""
    return models_dir(os.environ)


def load_catalogue(data: Path | None = None) -> Catalogue:
    """The built-in models and the user's own, from the configuration folder and a data folder."""
    return Catalogue.load(catalogue_dirs(os.environ, data))


def fetched(model: Model) -> Path | None:
    """The checked file of a model, None if it needs none; raise ModelFileError that says how to get it."""
    return verify(model, models_folder())
