"""Which names this server answers to, and which web pages may talk to it.

A page of any site can send a browser here: by a name that it lets resolve to our address (DNS rebinding), or simply by
a request across origins. So the `Host` header must be a name under which the server is known, and a request with an
`Origin` must come from a page of this very server, unless its origin was named. Programs send no `Origin`.
`Hosts` checks both and touches nothing else; what origins that were named may read is up to CORS (serve.guard).
"""

import ipaddress
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from freehold.errors import UsageError
from freehold.serve.errors import ApiError
from freehold.serve.refusal import answer, values

_HOST = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?)\.?(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(r"(https?)://([^/?#@\s]+)")
_PORTS = {"http": 80, "https": 443}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Hosts:
    """Middleware. `allowed` are the names besides the loopback's and the address that a connection came in at."""

    def __init__(self, app: ASGIApp, *, allowed: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        self._app = app
        self._allowed = {host_name(name) for name in (*_LOOPBACK, *allowed)}
        self._origins = {origin(name) for name in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check_origin(scope, self._check_host(scope))
            except ApiError as refusal:
                return await answer(refusal, scope, send)
        return await self._app(scope, receive, send)

    def _check_host(self, scope: Scope) -> tuple[str, int | None]:
        given = values(scope, b"host")
        if len(given) != 1:
            raise ApiError(400, f"a request must have one Host header, and this one has {len(given) or 'none'}")
        parts = _HOST.fullmatch(given[0].lower())
        if parts is None or (parts[2] is not None and int(parts[2]) > 65535):
            raise ApiError(400, "the Host header is not a host name, with or without a port")
        name = parts[1].decode()
        if name not in self._allowed and name != _local_address(scope):
            raise ApiError(
                421,
                f"this server is not known as {name[:100]!r}: use localhost or its address, or start it with "
                f"--allowed-host {name[:100]}",
                code="unknown_host",
            )
        return name, int(parts[2]) if parts[2] else None

    def _check_origin(self, scope: Scope, host: tuple[str, int | None]) -> None:
        given = values(scope, b"origin")
        if not given:
            return
        try:
            (named,) = given
            asked_by = origin(named.decode("ascii"))
        except ValueError:  # two of them, not a web page's (`null`), or not in ASCII
            asked_by = None
        if asked_by is None:
            raise ApiError(403, "a request from a web page without an origin of its own is refused", code="origin")
        name, port = host
        scheme = asked_by.partition(":")[0]
        if asked_by in self._origins or asked_by == _origin_text(scheme, name, port or _PORTS[scheme]):
            return
        raise ApiError(
            403,
            f"a web page of {asked_by[:200]} may not use this server unless it is started with "
            f"--cors-origin {asked_by[:200]}",
            code="origin",
        )


def host_name(name: str) -> str:
    """A name as it stands in a Host header: lower case, an IPv6 address in brackets. Raises UsageError for others."""
    text = name.strip().lower()
    try:
        text = _address_text(text.strip("[]"))
    except ValueError:
        parts = _HOST.fullmatch(text.encode("ascii", "replace"))
        if parts is None or parts[2] is not None:
            raise UsageError(f"a host's name is wanted, such as box.example or 192.168.1.5, got {name!r}") from None
        text = parts[1].decode()
    return text


def origin(text: str) -> str:
    """An origin as browsers send it, with its port written out. Raises UsageError for what is none."""
    parts = _ORIGIN.fullmatch(text.strip().rstrip("/").lower())
    authority = _HOST.fullmatch(parts[2].encode("ascii", "replace")) if parts else None
    if parts is None or authority is None or (authority[2] is not None and int(authority[2]) > 65535):
        raise UsageError(f"an origin is wanted, such as https://chat.example or http://localhost:3000, got {text!r}")
    return _origin_text(parts[1], authority[1].decode(), int(authority[2] or _PORTS[parts[1]]))


def _origin_text(scheme: str, name: str, port: int) -> str:
    return f"{scheme}://{name}" if port == _PORTS[scheme] else f"{scheme}://{name}:{port}"


def _local_address(scope: Scope) -> str | None:
    """The address that this connection came in at, which no name can be made to stand for in a Host header."""
    server = scope.get("server")
    try:
        return _address_text(server[0]) if server else None
    except ValueError:
        return None


def _address_text(text: str) -> str:
    address = ipaddress.ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or address
    return f"[{address}]" if address.version == 6 else str(address)
