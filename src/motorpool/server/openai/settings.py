"""The bounds and times of the API, in one frozen value. The defaults are the documented ones; tests make them smaller.

Called by: ``server.main``, which builds it once, and every route.
"""

from __future__ import annotations

from typing import Final

import msgspec

from motorpool.types import MAX_BATCH_BYTES, MAX_BATCH_LINES, MAX_BODY_BYTES, MAX_FILE_BYTES

DAY_S: Final = 24 * 3600
MIN_EXPIRY_S: Final = 3600
MAX_EXPIRY_S: Final = 30 * DAY_S
MIN_WINDOW_S: Final = 15 * 60
MAX_WINDOW_S: Final = 7 * DAY_S
MAX_FILES_PAGE: Final = 10_000
MAX_BATCHES_PAGE: Final = 100
MAX_RETRY_AFTER_MS: Final = 120_000  # a client that reads more than this stops retrying altogether
API_VERSION: Final = "2020-10-01"  # what OpenAI sends as openai-version


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator or a test may set."""

    max_body_bytes: int = MAX_BODY_BYTES
    max_file_bytes: int = MAX_FILE_BYTES
    max_batch_bytes: int = MAX_BATCH_BYTES
    max_batch_lines: int = MAX_BATCH_LINES
    max_batch_errors: int = 100  # errors shown for an invalid batch file
    batch_file_days: int = 30  # how long batch files are kept when the customer says nothing
    key_ttl_ms: int = 5_000  # how long a key that was found good is believed
    currency: str = "EUR"  # of the owners' statements
    keep_alive_ms: int = 15_000  # silence in a stream after which a comment line is sent
