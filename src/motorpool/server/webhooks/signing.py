"""What is sent to a webhook and how it is signed, as Standard Webhooks and OpenAI's clients have it.

Pure: values in, bytes out. The body holds ids and times and nothing that was asked or answered.

Called by: ``server.webhooks.sender``, ``server.openai.webhooks``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Final

import msgspec

SECRET_BYTES: Final = 32
PREFIX: Final = "whsec_"


def shown(secret: bytes) -> str:
    """A secret as a customer keeps it."""
    return PREFIX + base64.b64encode(secret).decode("ascii")


def hint(secret: bytes) -> str:
    """What tells secrets apart without being one."""
    return f"{PREFIX}...{base64.b64encode(secret).decode('ascii').rstrip('=')[-4:]}"


def payload(*, event_id: str, kind: str, subject: str, happened_ms: int) -> bytes:
    """The body of an event; the same bytes at every attempt."""
    event = {
        "id": event_id,
        "object": "event",
        "created_at": happened_ms // 1000,
        "type": kind,
        "data": {"id": subject},
    }
    return msgspec.json.encode(event)


def headers(body: bytes, *, message_id: str, secrets: list[bytes], now_s: int) -> dict[str, str]:
    """The headers that prove who sent a body and when: one signature for each secret."""
    signed = f"{message_id}.{now_s}.".encode() + body
    signatures = [base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode() for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(now_s),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }
