"""Where our own connections never go: link-local addresses and the metadata services of clouds.

What the user configures (an LLM, a judge, an embedding model) is asked with a key and answers into prompts, so an address that
hands out a machine's credentials must not be among them, neither by its number, nor by a name that resolves to it. A URL is
looked at where it is configured (`forbidden_url`), and the socket's own address where a connection has been made, before
anything is sent (`refuse_forbidden` as httpx's ``trace`` extension): so no spelling of an address and no change of a name's
answer gets past it. Redirects are not followed by any of our clients.

Loopback and private networks are allowed: local models live there. What the agent itself sends through the proxy is its own
business. Limits: a client of somebody else's (the Tinker SDK) is looked at by its URL only.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from metaclaw_core.errors import MetaClawError

_METADATA = frozenset(
    ipaddress.ip_address(a) for a in ("100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254")
)
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_METADATA_IS = "at a link-local or cloud metadata address"


class ForbiddenAddress(MetaClawError):
    """A connection led to an address that is never asked; nothing was sent."""


def forbidden_address(address: str) -> str | None:
    """Why nothing is ever sent to this IP address ("at a …"); None: it may be. Raises ValueError for a name."""
    ip = parse_ip(address)
    if ip.is_link_local or ip in _METADATA:
        return _METADATA_IS
    if ip.is_unspecified or ip.is_multicast:
        return "at no address of a server"
    return None


def forbidden_host(host: str) -> str | None:
    """The same for a host as a URL has it. A name is told by its spelling alone; its addresses are looked at when connecting."""
    if host.rstrip(".").lower() in _METADATA_NAMES:
        return _METADATA_IS
    try:
        return forbidden_address(host)
    except ValueError:
        return None


def forbidden_url(url: str) -> str | None:
    """The same for a URL; None also for what is no URL, which is another's to say."""
    try:
        return forbidden_host(urlsplit(url).hostname or "")
    except ValueError:
        return None


def parse_ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address without its zone, and the IPv4 address that an IPv6 one stands for. Raises ValueError for a name."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip
    return ip


async def refuse_forbidden(event: str, info: dict[str, Any]) -> None:
    """For a request of an `httpx.AsyncClient`: ``extensions={"trace": refuse_forbidden}``. Raises ForbiddenAddress."""
    if event == "connection.connect_tcp.complete":
        stream = info["return_value"]
        address = stream.get_extra_info("server_addr")[0]
        if (problem := forbidden_address(address)) is not None:
            await stream.aclose()
            raise ForbiddenAddress(f"{address} is {problem}; it is not asked.")
