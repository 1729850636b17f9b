"""Everything around the endpoints, put together in the one order that is right.

From the outside in: the journal (ids, log, 500), the server's names and pages' origins, CORS for origins that were
named (so that a page can read a refusal, and a preflight needs no key), the end of service, keys and rates, bodies.
Nothing of a request is read before its sender is known. Endpoints see only what came through, and `scope["state"]`
with `request_id` and `caller`.
"""

from collections.abc import Iterable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from freehold.serve.bodies import MAX_BODY_BYTES, MAX_UPLOAD_BYTES, READ_SECONDS, Bodies
from freehold.serve.errors import ApiError
from freehold.serve.gate import Gate
from freehold.serve.hosts import Hosts, origin
from freehold.serve.journal import Journal
from freehold.serve.keys import FREE_PATHS, KeyCheck, Keys
from freehold.serve.refusal import answer

_READABLE = (
    "x-request-id", "request-id", "retry-after", "x-freehold-warnings",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
)  # fmt: skip


def guard(
    app: ASGIApp,
    *,
    keys: Keys,
    gate: Gate,
    allowed_hosts: Iterable[str] = (),
    cors_origins: Iterable[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    receive_timeout: float = READ_SECONDS,
    log_content: bool = False,
) -> ASGIApp:
    """The app behind its guards. Raises UsageError for names and origins that are none."""
    origins = [*cors_origins]
    app = Bodies(app, max_bytes=max_body_bytes, max_upload_bytes=max_upload_bytes, read_seconds=receive_timeout)
    app = KeyCheck(app, keys=keys)
    app = _Ending(app, gate=gate)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=[origin(name) for name in origins],
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_READABLE,
        )
    app = Hosts(app, allowed=allowed_hosts, origins=origins)
    return Journal(_NoWebSockets(app), log_content=log_content)


class _Ending:
    """While the server drains, connections that are still there get a 503; its health can be asked to the last."""

    def __init__(self, app: ASGIApp, *, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in FREE_PATHS:
            try:
                self._gate.check_open()
            except ApiError as refusal:
                refusal.headers["connection"] = "close"
                return await answer(refusal, scope, send)
        return await self._app(scope, receive, send)


class _NoWebSockets:
    """No endpoint speaks WebSocket, and the guards inside check HTTP only: none gets past here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        return await self._app(scope, receive, send)
