"""No, said to a client before any endpoint runs: a status, one clear sentence, and OpenAI's or Anthropic's shape.

The guards raise `RefusedError`; `answer` writes one. Its message names what was wrong in the request's outside (its
headers, its size) and never quotes a secret or a content.
"""

import json
from collections.abc import Sequence
from typing import Any

from starlette.types import Scope, Send

from freehold.errors import FreeholdError

Headers = Sequence[tuple[bytes, bytes]]

ANTHROPIC_PATHS = "/v1/messages"
_TYPES = {403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class RefusedError(FreeholdError):
    """A request that goes no further. `kind` and `code` are OpenAI's `type` and `code`; headers are ASGI's."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, kind: str | None = None, headers: Headers = ()
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, tuple(headers)
        self.kind = kind or _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")

    def body(self, path: str, request_id: str | None = None) -> dict[str, Any]:
        """What the client reads: in Anthropic's shape under its paths, in OpenAI's elsewhere."""
        if speaks_anthropic(path):
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return {"type": "error", "error": {"type": kind, "message": str(self)}, "request_id": request_id}
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}


async def answer(refusal: RefusedError, scope: Scope, send: Send) -> None:
    """The whole response."""
    content = json.dumps(refusal.body(scope["path"], scope.get("state", {}).get("request_id"))).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        *refusal.headers,
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    """The header that says when to try again: whole seconds, one at least."""
    return b"retry-after", str(max(1, -int(-seconds // 1))).encode()


def values(scope: Scope, name: bytes) -> list[bytes]:
    """Every value that the request has for a header."""
    return [value for key, value in scope["headers"] if key == name]


def speaks_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's shapes."""
    return path == ANTHROPIC_PATHS or path.startswith(f"{ANTHROPIC_PATHS}/")
