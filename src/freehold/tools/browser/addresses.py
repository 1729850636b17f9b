"""Which addresses of the web may be fetched: public ones, by name or number, at the usual ports.

A page, or a model that has read one, may name any address: this machine's own services, the router, a cloud's metadata.
So a URL is checked for its form, its name resolved once, and every address that the name has must be public; whoever
connects then connects to an address that was checked here, not to the name.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from freehold.tools.base import ToolError
from freehold.tools.browser.content import one_line

if TYPE_CHECKING:
    import httpx

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Of a name and port, its addresses. Raises OSError."""

_MAX_URL = 2048
_IPV6_PUBLIC = ipaddress.ip_network("2000::/3")
_IPV6_NOT_PUBLIC = tuple(
    map(
        ipaddress.IPv6Network,
        # Protocols' own (Teredo with them), documentation, 6to4, documentation.
        ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
_IPV4_NOT_PUBLIC = tuple(map(ipaddress.IPv4Network, ("192.88.99.0/24", "192.0.0.0/24", "224.0.0.0/3")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def resolve(name: str, port: int) -> Sequence[str]:
    """As the system does it."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def checked_url(url: str) -> "httpx.URL":
    """A URL that may be looked up. Raises ToolError."""
    import httpx

    shown = one_line(url, 200)
    if len(url) > _MAX_URL:
        raise ToolError(f"`{shown}` is longer than {_MAX_URL} characters. Open another address.")
    if "\\" in url or any(c.isspace() or not c.isprintable() for c in url):
        raise ToolError(f"`{shown}` is no URL: it has characters that must be percent-encoded.")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
        _ = parsed.host  # which decodes the name, if it can
    except (httpx.InvalidURL, ValueError):
        raise ToolError(f"`{shown}` is no URL. Write it in full, such as https://example.com/page.") from None
    if parsed.scheme not in ("http", "https"):
        raise ToolError(f"`{shown}`: only http:// and https:// addresses can be opened.")
    if parsed.userinfo:
        raise ToolError(f"`{shown}` has a name or password in it. Open it without.")
    if parsed.port is not None:  # httpx leaves the usual ones out
        raise ToolError(
            f"`{shown}`: port {parsed.port} is not open to the browser, only 80 for http and 443 for https."
        )
    if not host.strip("."):
        raise ToolError(f"`{shown}` names no host. Write it in full, such as https://example.com/page.")
    return parsed


async def checked_addresses(url: "httpx.URL", resolve_name: Resolve) -> Sequence[str]:
    """Where a checked URL leads, all of it public. Raises ToolError."""
    host = url.raw_host.decode("ascii")
    shown = one_line(host, 200)
    try:
        ipaddress.ip_address(host)
        found: Sequence[str] = [host]
    except ValueError:
        try:
            found = await resolve_name(host, 443 if url.scheme == "https" else 80)
        except (OSError, UnicodeError):
            raise ToolError(f"There is no host `{shown}`, or its name cannot be looked up now.") from None
    if not found:
        raise ToolError(f"There is no host `{shown}`.")
    if not all(map(is_public, found)):
        raise ToolError(
            f"`{shown}` is an address of a private network or of this machine; the browser may not go there."
        )
    return list(dict.fromkeys(found))


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, by what is inside it where it carries another."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.scope_id is not None:
            return False
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if parsed in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        return parsed.is_global and parsed in _IPV6_PUBLIC and not any(parsed in net for net in _IPV6_NOT_PUBLIC)
    return parsed.is_global and not any(parsed in net for net in _IPV4_NOT_PUBLIC)
