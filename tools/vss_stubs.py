"""Make the Python modules of kuksa.val.v2 from the .proto files beside them.

Needs a compiler that the project does not install: ``uv run --with grpcio-tools==1.82.1 tools/vss_stubs.py``.
``--check`` only tells whether the modules in the tree are what the compiler makes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "src" / "motorpool" / "agent" / "signals" / "kuksa_proto"
PACKAGE = "motorpool.agent.signals.kuksa_proto"
NAMES = ("types", "val")
MARK = "# ruff: noqa\n# mypy: ignore-errors\n# fmt: off\n"  # generated code is not held to the rules for written code


def make() -> dict[str, str]:
    """The text of each generated file by its name."""
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "in", Path(folder) / "out"
        source = root / "kuksa" / "val" / "v2"
        source.mkdir(parents=True)
        out.mkdir()
        for name in NAMES:
            (source / f"{name}.proto").write_text((HERE / f"{name}.proto").read_text("utf-8"), "utf-8")
        files = [f"kuksa/val/v2/{name}.proto" for name in NAMES]
        options = [f"-I{root}", f"--python_out={out}", f"--pyi_out={out}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options, *files], check=True)
        made = {
            f"{name}_pb2{end}": (out / "kuksa" / "val" / "v2" / f"{name}_pb2{end}").read_text("utf-8")
            for name in NAMES
            for end in (".py", ".pyi")
        }
    ours = f"from {PACKAGE} import"
    return {name: MARK + text.replace("from kuksa.val.v2 import", ours) for name, text in made.items()}


def main() -> int:
    """Write the files, or compare them."""
    made = make()
    if "--check" in sys.argv:
        stale = [name for name, text in made.items() if (HERE / name).read_text("utf-8") != text]
        print(f"stale: {', '.join(stale)}" if stale else "the modules are up to date")
        return 1 if stale else 0
    for name, text in made.items():
        (HERE / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
