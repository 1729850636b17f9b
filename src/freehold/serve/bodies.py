"""Request bodies: how large, how fast, of what type; and JSON read strictly.

`Bodies` reads a whole body before the app runs, so that a slow sender holds nothing but its bytes, and hands it on in
one piece. Uploads it hands on as they come, with the same bounds on time and a size of their own: whoever takes them
writes them to disk. `parse_json` refuses whatever two readers could take for two things (duplicate keys, NaN, numbers
out of range, lone surrogates) and whatever is made to cost more than its size (depth, giant numbers, millions of
values). Neither ever quotes a body in what it says. `StrictRoute` is for routers: what their endpoints get was read
so.
"""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.errors import UsageError
from freehold.serve.caller import caller_of
from freehold.serve.errors import ApiError
from freehold.serve.multipart import boundary_of
from freehold.serve.refusal import answer, retry_after, values

MAX_BODY_BYTES = 32 * 2**20
READ_SECONDS = 30.0
BYTES_PER_SECOND = 64 * 2**10
"""A body may take `READ_SECONDS`, and beyond that must come at least this fast."""
BODIES_HELD = 8
"""Bodies of the largest size that may be on their way in at once."""

UPLOAD_PATH = "/v1/files"
MAX_UPLOAD_BYTES = 512 * 2**20
UPLOADS_HELD = 32
UPLOADS_OF_ONE = 4
"""Uploads that may come at once, and of one caller."""

MAX_DEPTH = 100
MAX_VALUES = 1_000_000
_SMALL_BYTES = 2**18
"""Beyond this a body is parsed on a thread, while the event loop goes on."""
_SEARCHED_BYTES = 2**20
"""Up to here it is quicker to look for long numbers first than to look at each number."""
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1

_JSON_TYPE = re.compile(rb"application/(?:json|[a-z0-9.+-]+\+json)(?:\s*;\s*charset=\"?utf-?8\"?)?\s*", re.IGNORECASE)
_STRINGS = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL
)  # possessive, and the end may be missing: linear in any text
_BRACKETS = re.compile(rb"[\[\]{}]")
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


class Bodies:
    """Middleware. Answers 408, 413, 415 or 429 itself; a client that goes away meanwhile gets nothing."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int = MAX_BODY_BYTES,
        max_upload_bytes: int = MAX_UPLOAD_BYTES,
        read_seconds: float = READ_SECONDS,
    ) -> None:
        self._app, self._max_bytes, self._read_seconds = app, max_bytes, read_seconds
        self._max_upload_bytes = max_upload_bytes
        self._held = 0
        self._uploads: Counter[str] = Counter()  # by owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if scope["path"] == UPLOAD_PATH and scope["method"] not in ("GET", "DELETE"):
            # Of other methods nobody reads a body: the app knows none of them here.
            return await (self._upload if scope["method"] == "POST" else self._app)(scope, receive, send)
        try:
            announced = self._announced(scope, self._max_bytes, _check_type)
            body = await self._read(announced, receive) if announced else b""
            if body is None:
                return None
            if body and scope["method"] != "DELETE":
                _check_type(scope)
        except ApiError as refusal:
            return await answer(refusal, scope, send)
        pieces = [body]

        async def receive_at_once() -> Message:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": False}
            return await receive()

        del body  # the one who takes it is the one who holds it
        return await self._app(scope, receive_at_once if announced else receive, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not self._announced(scope, self._max_upload_bytes, _check_form):
                raise ApiError(400, "the request has no body; send a form with a file", param="file")
            _check_form(scope)
            owner = caller_of(Request(scope)).owner
            if self._uploads[owner] >= UPLOADS_OF_ONE:
                message = f"{UPLOADS_OF_ONE} uploads of yours are on their way; wait for one of them"
                raise ApiError(429, message, headers=retry_after(5))
            if self._uploads.total() >= UPLOADS_HELD:
                raise ApiError(429, "too many uploads at once", headers=retry_after(5))
        except ApiError as refusal:
            return await answer(refusal, scope, send)
        size, spent, over = 0, 0.0, False
        loop = asyncio.get_running_loop()

        async def receive_in_time() -> Message:
            """Raises ApiError, which is the app's to answer."""
            nonlocal size, spent, over
            if over:
                return await receive()
            began = loop.time()
            try:
                left = self._read_seconds + size / BYTES_PER_SECOND - spent
                # What came fast may not stand still for long.
                async with asyncio.timeout(min(left, self._read_seconds)):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            spent += loop.time() - began  # not what the one who takes it needs to write it down
            size += len(message.get("body", b""))
            if size > self._max_upload_bytes:
                raise _close(self._too_large(self._max_upload_bytes))
            over = not message.get("more_body", False)
            return message

        self._uploads[owner] += 1
        try:
            return await self._app(scope, receive_in_time, send)
        finally:
            self._uploads[owner] -= 1
            if not self._uploads[owner]:
                del self._uploads[owner]

    def _announced(self, scope: Scope, max_bytes: int, check: Callable[[Scope], None]) -> bool:
        """Whether there is a body. Raises ApiError for one that need not be read to be refused."""
        lengths, transfers = values(scope, b"content-length"), values(scope, b"transfer-encoding")
        if transfers and lengths:
            raise _close(ApiError(400, "a request has a Content-Length or a Transfer-Encoding, not both"))
        if len(lengths) > 1 or (lengths and not (lengths[0].isdigit() and len(lengths[0]) < 20)):
            raise _close(ApiError(400, "the Content-Length is not one number"))
        length = int(lengths[0]) if lengths else 0
        if length > max_bytes:
            raise self._too_large(max_bytes)
        if length and scope["method"] != "DELETE":
            check(scope)
        return bool(length or transfers)

    async def _read(self, announced: bool, receive: Receive) -> bytes | None:
        read, size = [], 0
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            while True:
                async with asyncio.timeout_at(start + self._read_seconds + size / BYTES_PER_SECOND):
                    message = await receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                size += len(piece)
                self._held += len(piece)
                if size > self._max_bytes:
                    raise self._too_large(self._max_bytes)
                if self._held > BODIES_HELD * self._max_bytes:
                    raise ApiError(429, "too many large requests at once", headers=retry_after(5))
                read.append(piece)
                if not message.get("more_body", False):
                    return b"".join(read)
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self._held -= size

    def _too_slow(self) -> ApiError:
        return _close(ApiError(408, f"the request's body did not arrive within {self._read_seconds:g} seconds"))

    def _too_large(self, most: int) -> ApiError:
        return ApiError(413, f"a request's body may have {most} bytes, and this one has more", code="request_too_large")


class StrictRoute(APIRoute):
    """A route whose body is read by `parse_json`; what that refuses is a 400 with its sentence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await inner(_StrictRequest(request.scope, request.receive))

        return handle


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return parse_json(body) if len(body) <= _SMALL_BYTES else await asyncio.to_thread(parse_json, body)
        except UsageError as error:
            raise HTTPException(400, str(error)) from None


def parse_json(data: bytes) -> Any:
    """A request's JSON, strictly. Raises UsageError, in words that quote nothing of it.

    Refused: what is not UTF-8, depth beyond 100, more than a million values, keys that an object has twice, NaN and
    infinities, integers beyond 64 bits, floats that overflow, and strings with half a surrogate pair.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the body is not UTF-8 ({error.reason} at byte {error.start})") from None
    _check_structure(data)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_float,
            parse_int=_integer if len(data) > _SEARCHED_BYTES or _LONG_NUMBER.search(data) else None,
        )
    except json.JSONDecodeError as error:
        raise UsageError(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if b"\\u" in data:
        _check_surrogates(value)
    return value


def _check_structure(data: bytes) -> None:
    """Before anything is built. The numbers of brackets and commas in all of it, cheaply counted, nearly always do."""
    opened = data.count(b"[") + data.count(b"{")
    if opened <= MAX_DEPTH and opened + data.count(b",") <= MAX_VALUES:
        return
    outside = _STRINGS.sub(b"", data)
    if outside.count(b"[") + outside.count(b"{") + outside.count(b",") > MAX_VALUES:
        raise UsageError(f"the body has more than {MAX_VALUES} values")
    depth = 0
    for bracket in _BRACKETS.finditer(outside):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _check_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text if not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    raise UsageError(
                        "a string of the body has half of a surrogate pair, which is no character"
                    ) from None
            case list() as items:
                waiting += items
            case dict() as fields:
                waiting += fields
                waiting += fields.values()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise UsageError("an object of the body has the same key twice")
    return fields


def _no_constant(name: str) -> float:
    raise UsageError(f"the body has {name}, which is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UsageError("a number of the body is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not _SMALLEST <= int(text) <= _LARGEST:
        raise UsageError("an integer of the body has more than 64 bits")
    return int(text)


def _check_form(scope: Scope) -> None:
    _check_encoding(scope)
    given = values(scope, b"content-type")
    if len(given) != 1 or boundary_of(given[0]) is None:
        raise ApiError(415, "the body must be a form: `Content-Type: multipart/form-data` with its boundary")


def _check_type(scope: Scope) -> None:
    _check_encoding(scope)
    given = values(scope, b"content-type")
    if len(given) != 1 or not _JSON_TYPE.fullmatch(given[0]):
        raise ApiError(415, "the body must be JSON, with the header `Content-Type: application/json`")


def _check_encoding(scope: Scope) -> None:
    if values(scope, b"content-encoding") not in ([], [b"identity"]):
        raise ApiError(415, "a compressed body is not read: send it as it is, without Content-Encoding")


def _close(refusal: ApiError) -> ApiError:
    """The rest of the body is not worth waiting for."""
    refusal.headers["connection"] = "close"
    return refusal


def _too_deep() -> UsageError:
    return UsageError(f"the body is nested more than {MAX_DEPTH} deep")
