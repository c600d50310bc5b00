"""What the tests share. Anything that only one test file needs stays there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that tests can import what lies beside them, however pytest was started


@pytest.fixture(scope="session")
def model_file() -> Path:
    """The real model, checked against the catalogue. ``make test`` fetches it; a missing one is a failure."""
    from motorpool.catalogue import Catalogue, models_dir, verify  # noqa: PLC0415  # only these tests need it

    return verify(Catalogue.builtin().get("smollm2-135m-instruct"), models_dir(os.environ))
