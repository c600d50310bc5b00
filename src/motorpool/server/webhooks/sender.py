"""One attempt to tell a webhook something.

Decides: whether an answer is a yes. Must not: follow redirects, read what is answered, go through a proxy, or log an
address, a body or a secret. Called by: ``worker``, ``server.openai.webhooks``.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

import httpx
import msgspec

from motorpool.errors import CallerError
from motorpool.server.webhooks import signing, targets
from motorpool.store.webhooks import Policy, Webhook

TOTAL_S: Final = 15.0
CONNECT_S: Final = 5.0
GONE: Final = 410
USER_AGENT: Final = "Motorpool-Webhooks/1"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended: with this HTTP status, 0 if there was none; ``what`` is for the delivery log."""

    status: int
    what: str

    @property
    def is_yes(self) -> bool:
        """The webhook has taken it."""
        return 200 <= self.status < 300


class Sender:
    """Sends events. ``resolve`` and ``context`` are the machine's own unless a test gives others."""

    def __init__(self, resolve: targets.Resolve = targets.resolve, context: ssl.SSLContext | None = None) -> None:
        self._resolve = resolve
        self._context = context
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close what is open."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def send(self, webhook: Webhook, policy: Policy, body: bytes, *, message_id: str, now_ms: int) -> Outcome:
        """Try once. Never raises for what the other end does."""
        secrets = [webhook.secret]
        if webhook.old_secret is not None and now_ms < webhook.old_until_ms:
            secrets.append(webhook.old_secret)
        headers = signing.headers(body, message_id=message_id, secrets=secrets, now_s=now_ms // 1000)
        try:
            async with asyncio.timeout(TOTAL_S):
                target = await targets.find(webhook.url, policy, self._resolve)
                return await self._post(target, body, headers)
        except CallerError:
            return Outcome(status=0, what="its address is not allowed")
        except TimeoutError:
            return Outcome(status=0, what="no answer in time")
        except (OSError, httpx.HTTPError, UnicodeError) as error:
            return Outcome(status=0, what=f"no answer ({type(error).__name__})")

    async def _post(self, target: targets.Target, body: bytes, headers: dict[str, str]) -> Outcome:
        """Connect to an address that was checked, under the name that the certificate must have."""
        address = target.addresses[0]
        netloc = f"[{address}]:{target.port}" if ":" in address else f"{address}:{target.port}"
        request = self._started().build_request(
            "POST",
            f"{target.scheme}://{netloc}{target.path}",
            content=body,
            headers={
                **headers,
                "host": target.authority,
                "content-type": "application/json",
                "user-agent": USER_AGENT,
                "connection": "close",
            },
            extensions={"sni_hostname": target.host},
        )
        response = await self._started().send(request, stream=True)
        await response.aclose()  # what it says besides its status is nobody's business here
        return Outcome(status=response.status_code, what=f"HTTP {response.status_code}")

    def _started(self) -> httpx.AsyncClient:
        if self._client is None:
            # Reading the certificates takes longer than an attempt, so one client serves all.
            self._client = httpx.AsyncClient(
                verify=self._context or ssl.create_default_context(),
                trust_env=False,
                follow_redirects=False,
                timeout=httpx.Timeout(TOTAL_S, connect=CONNECT_S),
            )
        return self._client
