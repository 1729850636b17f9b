"""One client's connection: uvicorn's, on httptools, with an end to every wait.

uvicorn waits for ever for a head that never ends, for a client that does not read, and for the last bytes of a
connection that it closes. Here each has its time, after which the connection is aborted: what was not read is thrown
away, and the request's app is told that its client has gone. A head has a size, a server has so many connections, and
what is no HTTP is answered in the API's shape. httptools refuses what can be read as two requests; there is no
WebSocket. The time of a body is `serve.bodies`' to watch.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from freehold.errors import UsageError
from freehold.serve.errors import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Seconds a head may take to come, a client to go on reading, a connection to stay idle, and a body that nobody
    wants to end by itself; then sizes.

    Raises UsageError for values out of range.
    """

    head_seconds: float = 10.0
    write_seconds: float = 30.0
    idle_seconds: float = 30.0
    discard_seconds: float = 2.0
    head_bytes: int = 32 * 2**10
    headers: int = 100
    connections: int = 4096

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} of a connection must be more than 0, got {getattr(self, name)!r}")


class Connection(HttpToolsProtocol):
    """Made by the server for each client that it accepts."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], *, limits: ConnectionLimits
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._limits = limits
        self.timeout_keep_alive = limits.idle_seconds  # type: ignore[assignment]  # call_later takes parts of seconds
        self._in_head, self._head_bytes = True, 0
        self._refusal = ApiError(400, "this is not an HTTP request")
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # What comes in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            transport.abort()
        else:
            self._start("head", self._limits.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and not self._answering():
            if self._head_bytes > self._limits.head_bytes + len(data):  # a header that does not end is not shown to us
                self._refusal = self._head_too_large()
                self.send_400_response("")
            elif "head" not in self._timers:
                self._start("head", self._limits.head_seconds, self._head_is_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_size = 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)
        if len(self.headers) > self._limits.headers:
            self._refuse(ApiError(431, f"a request may have {self._limits.headers} headers"))

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() not in ("1.0", "1.1"):  # 0.9: the parser takes a line without a version
            self._refuse(self._refusal)
        self._in_head, self._head_bytes = False, 0
        self._stop("head")
        super().on_headers_complete()
        if self.parser.should_upgrade():  # nothing is upgraded to, and the parser reads nothing after this
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._in_head = True
        self._stop("discard")
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self._limits.head_bytes:
            self._refuse(self._head_too_large())

    def _head_too_large(self) -> ApiError:
        return ApiError(431, f"a request's line and headers may have {self._limits.head_bytes} bytes together")

    def _refuse(self, refusal: ApiError) -> None:
        """Out of the parser's callback; uvicorn answers what the parser fails at with `send_400_response`."""
        self._refusal = refusal
        raise refusal

    def _head_is_late(self) -> None:
        if self._answering():  # bytes came while it ran: they wait until it is done
            return
        if self._head_bytes:
            self._refusal = ApiError(408, f"the request's head did not arrive in {self._limits.head_seconds:g} s")
            self.send_400_response("")
        else:
            self._close()

    def _unsupported_upgrade_warning(self) -> None:
        """An offer to speak something else is simply not taken up."""

    # What goes out

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write", self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop("write")
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif not self._in_head:  # a body that nobody wants any more; a small one is soon through
            self._start("discard", self._limits.discard_seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if self._answering() and self.cycle.response_started:  # nothing fits between the pieces of an answer
            self.transport.abort()
            return
        refusal = self._refusal
        content = json.dumps(refusal.openai()).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self.transport.write(STATUS_LINE[refusal.status] + head + content)
        self._close()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close(self) -> None:
        """What was written is still sent, if the client reads it in time."""
        self.transport.close()
        self._start("close", self._limits.write_seconds, self.transport.abort)

    def _start(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, self._ring, name, action)

    def _ring(self, name: str, action: Callable[[], None]) -> None:
        del self._timers[name]
        action()

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
