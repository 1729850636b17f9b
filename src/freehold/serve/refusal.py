"""No, said in plain ASGI, before any endpoint runs.

What stands around the endpoints raises `ApiError` as they do, and writes it by `answer`. Its message names what was
wrong with the outside of a request (its headers, its size) and never quotes a secret or a content.
"""

import json
from typing import Any

from starlette.types import Scope, Send

from freehold.serve.errors import ApiError

ANTHROPIC_PATHS = "/v1/messages"


async def answer(refusal: ApiError, scope: Scope, send: Send) -> None:
    """The whole response, in the shape that clients of this path know."""
    content = json.dumps(body_of(refusal, scope)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **refusal.headers}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to try again: whole seconds, one at least."""
    return {"retry-after": str(max(1, -int(-seconds // 1)))}


def values(scope: Scope, name: bytes) -> list[bytes]:
    """Every value that the request has for a header."""
    return [value for key, value in scope["headers"] if key == name]


def speaks_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's shapes."""
    return path == ANTHROPIC_PATHS or path.startswith(f"{ANTHROPIC_PATHS}/")


def body_of(refusal: ApiError, scope: Scope) -> dict[str, Any]:
    """What is said, in the shape that clients of this path know."""
    if speaks_anthropic(scope["path"]):
        return refusal.anthropic() | {"request_id": scope.get("state", {}).get("request_id")}
    return refusal.openai()
