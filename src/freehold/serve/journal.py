"""One line for each request, and an end for each exception.

A line has method, path, status, time, tokens, the key's id and the request's id: no query, no headers, and no contents
unless `log_content` asks for them. What a client sends reaches the log as printable ASCII, so that it cannot make lines
of its own. An exception that no endpoint caught becomes a 500 that tells its request's id and nothing else; the log has
the exception's type and where it was, and its message and source lines only with `log_content`, since messages quote.
"""

import asyncio
import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.errors import ClosedError, DiskError, StoreError
from freehold.log import NOTICE, logger
from freehold.serve.errors import ApiError, api_error
from freehold.serve.refusal import answer, retry_after, speaks_anthropic, values

_GIVEN_ID = re.compile(rb"[A-Za-z0-9._:/@+=-]{1,128}")
_GONE = 499  # what the log says where a client left before anything was sent; nobody reads it off the wire
_MOST_CONTENT = 64 * 2**10


class Journal:
    """Middleware, outermost. Puts `request_id` into `scope["state"]`; at the end reads `caller` there."""

    def __init__(
        self, app: ASGIApp, *, log_content: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._app, self._log_content, self._clock = app, log_content, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = _request_id(scope)
        status: int | None = None
        asked, told = bytearray(), bytearray()
        start = self._clock()

        async def receive_noting() -> Message:
            message = await receive()
            _keep(asked, message)
            return message

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = (b"x-request-id", b"request-id") if speaks_anthropic(scope["path"]) else (b"x-request-id",)
                ours = [(name, request_id.encode()) for name in names]
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            elif self._log_content:
                _keep(told, message)
            await send(message)

        try:
            await self._app(scope, receive_noting if self._log_content else receive, send_noting)
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            if status is None:
                headers = retry_after(10) | {"connection": "close"}
                await answer(
                    ApiError(503, "this server stopped before it could answer", headers=headers), scope, send_noting
                )
        except Exception as error:  # noqa: BLE001 — the last one who could say anything to the client
            logger.error("%s", _described(error, self._log_content), extra={"fields": {"request_id": request_id}})
            if status is None:
                failure = ApiError(
                    500, f"the server failed at this request, whose id is {request_id}", code="internal_error"
                )
                await answer(failure, scope, send_noting)
        finally:
            milliseconds = round((self._clock() - start) * 1000, 1)
            _log_request(scope, _GONE if status is None else status, milliseconds)
            if self._log_content:
                fields = {"request_id": request_id, "request": _text(asked), "response": _text(told)}
                logger.log(NOTICE, "content", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": _level(record),
            "message": record.getMessage(),
            **_fields(record),
        }
        return json.dumps(fields)


class TextLines(logging.Formatter):
    """One line for each record, its fields as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        return f"{_time(record)} {_level(record)} {_printable(record.getMessage())}{fields}"


def log_failure(what: str, error: BaseException) -> None:
    """That something failed for a reason of the server's own; nothing where it was the client's, or the end of service.

    The store's and the disk's errors name files and what is wrong with them, and nothing of what was to be written.
    """
    if isinstance(error, ApiError | ClosedError) or api_error(error).status < 500:
        return
    said = f"{type(error).__name__}: {error}" if isinstance(error, StoreError | DiskError) else _described(error, False)
    logger.error("%s: %s", what, said)


def start_logging(*, as_json: bool, level: int = NOTICE, stream: TextIO | None = None) -> None:
    """Everything that Freehold logs goes to stderr in this form, and what uvicorn has to say goes the same way."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else TextLines())
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
    quieten_uvicorn()


def quieten_uvicorn() -> None:
    """No access log, and of the rest what is a warning or worse: one line of it, without tracebacks."""
    logging.getLogger("uvicorn.access").handlers = []
    logging.getLogger("uvicorn.access").propagate = False
    for name in ("uvicorn", "asyncio"):
        foreign = logging.getLogger(name)
        foreign.handlers = [_Forwarded()]
        foreign.propagate = False
        foreign.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Forwarded(logging.Handler):
    """A library's records: who says it, and the exception's type and place. Messages of exceptions may quote."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        said = _described(error, in_full=False) if error is not None else record.getMessage().strip().partition("\n")[0]
        logger.log(record.levelno, "%s: %s", record.name, said)


def _log_request(scope: Scope, status: int, milliseconds: float) -> None:
    state = scope["state"]
    caller = state.get("caller")
    fields: dict[str, Any] = {
        "method": _printable(scope["method"])[:20],
        "path": _printable(scope.get("raw_path") or scope["path"])[:200],
        "status": status,
        "ms": milliseconds,
        "tokens": None if caller is None else caller.tally.tokens or None,
        "key": getattr(caller, "owner", "") or None,
        "request_id": state["request_id"],
    }
    known = {name: value for name, value in fields.items() if value is not None}
    logger.log(NOTICE, "request", extra={"fields": known})


def _request_id(scope: Scope) -> str:
    given = values(scope, b"x-request-id")
    if len(given) == 1 and _GIVEN_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return f"req_{uuid.uuid4().hex}"


def _described(error: BaseException, in_full: bool) -> str:
    """An exception for the log; in full where contents may be in it."""
    if in_full:
        return "".join(traceback.format_exception(error))
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}" if places else type(error).__name__


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """A record's own, and of its exception the type and the place."""
    error = record.exc_info[1] if record.exc_info else None
    failed = {} if error is None else {"error": _described(error, in_full=False)}
    return {**getattr(record, "fields", {}), **failed}


def _keep(kept: bytearray, message: Message) -> None:
    kept += message.get("body", b"")[: max(0, _MOST_CONTENT - len(kept))]


def _text(kept: bytearray) -> str:
    return kept.decode("utf-8", "replace")


def _printable(value: str | bytes) -> str:
    """Printable ASCII, the rest as escapes: nothing ends a line or moves a terminal's cursor."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return text if text.isascii() and text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _word(value: object) -> str:
    """A field's value, quoted where it would read as more than one."""
    text = _printable(str(value))
    return text if re.fullmatch(r'[^\s="]+', text) else json.dumps(text)


def _time(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _level(record: logging.LogRecord) -> str:
    return "notice" if record.levelno == NOTICE else record.levelname.lower()
