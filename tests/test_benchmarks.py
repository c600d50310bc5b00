"""The benchmarks' results are whole, and the docs say what the results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def report(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.report", *arguments], check=False, capture_output=True, text=True, cwd=cwd
    )


def test_the_docs_hold_the_tables_of_the_results() -> None:
    done = report("--check")
    assert done.returncode == 0, done.stderr


def test_a_result_that_the_docs_do_not_show_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "bench"
    (copy / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in ("__init__.py", "env.py", "report.py"):
        (copy / name).write_bytes((ROOT / "bench" / name).read_bytes())
    for path in RESULTS:
        (copy / "results" / path.name).write_bytes(path.read_bytes())
    docs = tmp_path / "docs" / "benchmarks.md"
    docs.write_bytes((ROOT / "docs" / "benchmarks.md").read_bytes())
    assert report("--check", cwd=tmp_path).returncode == 0
    changed = json.loads((copy / "results" / "batch.json").read_text())
    changed["figures"][0]["ours"] += 1_000
    (copy / "results" / "batch.json").write_text(json.dumps(changed))
    assert report("--check", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_figure_says_what_it_is(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["name"] == path.stem
    assert result["figures"]
    for figure in result["figures"]:
        assert {"name", "unit", "ours", "peers", "aim", "runs", "spread", "commit"} <= set(figure)
        for system, value in figure["peers"].items():
            low, high = figure["spread"][system]
            assert low <= value <= high
