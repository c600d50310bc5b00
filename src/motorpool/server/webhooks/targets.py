"""Which addresses a webhook may have: nothing that only the operator's own machines can reach.

A customer chooses the address and the cell connects to it, so that without this anybody could have the cell knock at
the doors of its own network. The name is resolved here and the connection goes to the very address that was checked: a
name that means something else a moment later leads nowhere else.

Called by: ``server.webhooks.sender``, ``server.openai.webhooks``, the ``motorpool webhooks`` command.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import SplitResult, urlsplit

import msgspec

from motorpool.errors import CallerError
from motorpool.store.webhooks import Policy

MAX_URL_CHARS: Final = 2048
MAX_ADDRESSES: Final = 16
_PORTS: Final = {"https": 443, "http": 80}
# IPv6 addresses that hold an IPv4 address, which is where the packets end up.
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL: Final = ipaddress.ip_network("64:ff9b:1::/48")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A checked address: ``url`` as the customer wrote it, its parts, and where to connect."""

    scheme: str
    host: str
    port: int
    path: str
    addresses: list[str]

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def check_url(url: str, policy: Policy) -> SplitResult:
    """The parts of a URL that a webhook may have, as far as they can be told without asking the network.

    Raises CallerError ``invalid_webhook_url`` that says what is wrong, and never repeats the URL.
    """
    if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise _wrong(f"is over {MAX_URL_CHARS} characters, or holds some that no URL has")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _wrong("is no URL") from None
    if parts.scheme not in _PORTS or (parts.scheme == "http" and not policy.http):
        raise _wrong("must begin with https://")
    if not parts.hostname:
        raise _wrong("names no host")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise _wrong("must hold no user, password or fragment")
    if port == 0:
        raise _wrong("has a port that cannot be")
    literal = _literal(parts.hostname)
    if literal is not None and not allowed(literal, policy):
        raise _wrong("must be reachable from the internet")
    if (
        literal is None
        and not policy.private
        and parts.hostname.rstrip(".").endswith(("localhost", ".local", ".internal"))
    ):
        raise _wrong("must be reachable from the internet")
    return parts


async def find(url: str, policy: Policy, resolve: Resolve) -> Target:
    """Where to connect. Raises CallerError ``invalid_webhook_url``; OSError if the name is unknown."""
    parts = check_url(url, policy)
    host = parts.hostname or ""
    port = parts.port or _PORTS[parts.scheme]
    addresses = await resolve(host, port)
    # All of them: a name with one address inside and one outside is no accident.
    if not addresses or not all(allowed(ipaddress.ip_address(one), policy) for one in addresses):
        raise _wrong("must be reachable from the internet")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(scheme=parts.scheme, host=host, port=port, path=path, addresses=addresses[:MAX_ADDRESSES])


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, by the machine's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]).split("%", 1)[0] for info in found))


def allowed(address: Address, policy: Policy) -> bool:
    """Whether a webhook may lead to an address."""
    inner = _inner(address)
    if inner.is_multicast or inner.is_unspecified:
        return False
    return policy.private or (address.is_global and inner.is_global and not inner.is_reserved)


def _inner(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64 or address in _NAT64_LOCAL:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:  # 127.1, 0x7f000001, 2130706433: forms that resolvers take as well
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _wrong(what: str) -> CallerError:
    return CallerError(f"url {what}", code="invalid_webhook_url", param="url")
