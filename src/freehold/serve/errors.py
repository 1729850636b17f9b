"""Errors on the wire: what a client is told, in OpenAI's shape or Anthropic's.

`ApiError` is raised by endpoints; `api_error` makes one of any exception. What is nobody's fault but ours says so and
nothing else: no message of a bug ever reaches a client.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from freehold.errors import (
    ClosedError,
    ContextError,
    DiskError,
    FreeholdError,
    NotFoundError,
    OutOfMemoryError,
    SchemaError,
    StoreError,
    UnsupportedError,
    UsageError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_MOST_WARNINGS = 16
_ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error", 500: "api_error"}


class ApiError(Exception):
    """`status` and `message` are what the client sees; `param` is the field that was wrong, `code` a word for
    programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def openai(self) -> dict[str, Any]:
        """The body of OpenAI's API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body of Anthropic's API."""
        kind = _ANTHROPIC_TYPES.get(self.status, self.type if self.status < 500 else "api_error")
        named = self.param is None or self.param in self.message
        message = self.message if named else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": kind, "message": message}}


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Warnings in one header, which is there only if there are any: each once, and as many as clients read."""
    told = list(dict.fromkeys(warnings))
    if len(told) > _MOST_WARNINGS:
        told = [*told[:_MOST_WARNINGS], f"and {len(told) - _MOST_WARNINGS} more"]
    return {"x-freehold-warnings": "; ".join(told)} if told else {}


def api_error(error: BaseException, *, param: str | None = None) -> ApiError:
    """What a client is told of this exception; `param` is the field that it came from, where that is known."""
    match error:
        case ApiError():
            return error
        case ContextError():
            return ApiError(400, str(error), param=param, code="context_length_exceeded")
        case SchemaError():
            return ApiError(400, str(error), param=param, code="invalid_json_schema")
        case UsageError() | UnsupportedError():
            return ApiError(400, str(error), param=param)
        case NotFoundError():
            return ApiError(404, str(error), param=param, code="not_found")
        case ClosedError():
            return ApiError(503, "the server is shutting down; try again later", headers={"retry-after": "5"})
        case OutOfMemoryError():
            return ApiError(503, "the server is out of memory; try again later", headers={"retry-after": "5"})
        case DiskError():  # names and places of files are the operator's, and in the log
            return ApiError(507, "the server could not write to its disk; try again later", code="storage_failed")
        case StoreError():
            return ApiError(503, "the server's store is not to be had; try again later", headers={"retry-after": "5"})
        case FreeholdError():
            return ApiError(500, str(error), code="server_error")
    return ApiError(500, "the server failed to do this; its log says why", code="server_error")
