"""Server-sent events: what is said as it is made, to one client, for as long as it listens.

`encode` makes one event. `EventStream` sends them: it ends what makes them when the client goes away, and lets a fault
after the headers be told as an event of the protocol, since the status has long been sent.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from freehold.serve.errors import ApiError, api_error
from freehold.serve.journal import log_failure

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE_SECONDS = 15.0
_KEEP_ALIVE = b": still here\n\n"


def dumps(value: Any) -> str:
    """JSON as it goes on the wire: one line, compact."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def encode(data: Any, event: str | None = None) -> bytes:
    """One event. `data` is anything that JSON has, or JSON as text."""
    text = data if isinstance(data, str) else dumps(data)
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {text}\n\n".encode(errors="replace")


class EventStream(Response):
    """Sends what `chunks` yields, each a whole number of events. `fault` makes the last chunk of an error; `keep_alive`
    is sent while there is nothing to say."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        fault: Callable[[ApiError], bytes],
        headers: Mapping[str, str] | None = None,
        keep_alive: bytes = _KEEP_ALIVE,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._fault = fault
        self._still_here = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last = time.monotonic()
        sending = asyncio.ensure_future(self._send(send))
        others = [asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(self._keep_alive(send))]
        try:
            await asyncio.wait((sending, *others), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, *others):
                task.cancel()
            await asyncio.gather(sending, *others, return_exceptions=True)
            await self._chunks.aclose()
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._last = time.monotonic()
        except Exception as error:  # noqa: BLE001 - whatever it is, the client waits for an end
            log_failure("a stream failed", error)
            await send({"type": "http.response.body", "body": self._fault(api_error(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """While a long prompt is read nothing is said, and proxies lose patience."""
        while True:
            await asyncio.sleep(_KEEP_ALIVE_SECONDS)
            if time.monotonic() - self._last >= _KEEP_ALIVE_SECONDS:
                await send({"type": "http.response.body", "body": self._still_here, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
