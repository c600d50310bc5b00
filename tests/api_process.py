"""The API of ``api_cell`` in a process of its own, so that its memory can be measured. Ends with its standard input.

python -m tests.api_process FOLDER
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.api_cell import LocalCell, Running

from motorpool.server.openai.settings import ApiSettings


def main() -> None:
    cell = LocalCell(Path(sys.argv[1]))
    cell.hold = asyncio.Event()  # batches stay in progress: only what the API does is to be measured
    with Running(cell, ApiSettings()) as running:
        print(json.dumps({"url": running.url, "key": running.key}), flush=True)  # noqa: T201 - the parent reads it
        sys.stdin.read()


if __name__ == "__main__":
    main()
