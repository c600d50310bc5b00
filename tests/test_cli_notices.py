"""The notices of third parties name what is installed, and the documents of the demo are what their index says."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from motorpool.cli import documents

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "src" / "motorpool" / "examples"


def test_the_notices_are_up_to_date() -> None:
    command = [sys.executable, "tools/notices.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_document_of_the_demo_has_a_stated_origin() -> None:
    with (EXAMPLES / "recalls.csv").open(newline="") as stream:
        index = {row["campaign"]: row for row in csv.DictReader(stream)}
    found = documents.read_documents([EXAMPLES / "recalls"])
    assert len(found) >= 60
    assert {document.name.removesuffix(".txt") for document in found} == set(index)
    for document in found:
        campaign = document.name.removesuffix(".txt")
        assert document.text.endswith(f"\n\nNHTSA recall campaign {campaign}\n")
        assert index[campaign]["source"] == f"https://www.nhtsa.gov/recalls?nhtsaId={campaign}"


def test_the_documents_differ_and_are_short_enough_for_the_demo() -> None:
    texts = [document.text for document in documents.read_documents([EXAMPLES / "recalls"])]
    assert len(set(texts)) == len(texts)
    assert max(len(text.split()) for text in texts) <= 135
