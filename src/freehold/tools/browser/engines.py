"""Search engines of the web: SearXNG, which one can run oneself, and Exa and You.com, with the user's key.

They are asked over their JSON APIs, at addresses that the user named or that are written here: these are trusted, may
lie in a private network, and see the query. What they answer is not trusted: it is bounded, checked and shown as text.
A key is sent to its own service alone, never follows a redirect, and is never shown.
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from freehold.errors import UsageError
from freehold.tools.base import ToolError
from freehold.tools.browser.content import Hit, one_line

if TYPE_CHECKING:
    import httpx

MakeTransport = Callable[[], "httpx.AsyncBaseTransport"]
_MAX_BYTES = 4 << 20
_SECONDS = 20.0


class SearchEngine(Protocol):
    """Whom the web is searched by."""

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        """The best first. Raises ToolError."""


class Searxng:
    """A SearXNG server, whose settings must allow the format json. Raises UsageError for what is no http(s) URL."""

    def __init__(self, url: str, *, transport: MakeTransport | None = None) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UsageError(f"SearXNG's address must be a URL such as http://127.0.0.1:8888, got {url!r}")
        self._url, self._transport = url.rstrip("/"), transport

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        params = {"q": query, "format": "json"}
        answer = await _ask("SearXNG", "GET", f"{self._url}/search", self._transport, params=params)
        return list(_hits(_list(answer, "results"), "content"))[:topn]


class Exa:
    """api.exa.ai, with the key in EXA_API_KEY if none is given. Raises UsageError without one."""

    _URL = "https://api.exa.ai/search"

    def __init__(self, *, api_key: str | None = None, transport: MakeTransport | None = None) -> None:
        self._key, self._transport = _key(api_key, "EXA_API_KEY", "Exa"), transport

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        body = {"query": query, "numResults": topn, "contents": {"summary": True}}
        answer = await _ask("Exa", "POST", self._URL, self._transport, key=self._key, body=body)
        return list(_hits(_list(answer, "results"), "summary"))[:topn]


class YouCom:
    """You.com's search, with the key in YDC_API_KEY if none is given. Raises UsageError without one."""

    _URL = "https://api.ydc-index.io/v1/search"

    def __init__(self, *, api_key: str | None = None, transport: MakeTransport | None = None) -> None:
        self._key, self._transport = _key(api_key, "YDC_API_KEY", "You.com"), transport

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        params = {"query": query, "count": str(topn)}
        answer = await _ask("You.com", "GET", self._URL, self._transport, key=self._key, params=params)
        results = answer.get("results")
        results = results if isinstance(results, dict) else {}
        hits = [*_hits(_list(results, "web"), "snippets"), *_hits(_list(results, "news"), "description")]
        return hits[:topn]


def engine_of(text: str) -> SearchEngine:
    """What a user names: `exa` or `you`, whose keys are in the environment, or the address of a SearXNG server.

    Keys cannot be typed: other users of a machine see what a command is started with. Raises UsageError.
    """
    match text.strip().lower():
        case "exa":
            return Exa()
        case "you" | "you.com":
            return YouCom()
        case named if "://" in named:
            return Searxng(text.strip())
    raise UsageError(f"the web is searched by exa, you, or the URL of a SearXNG server, got {text!r}")


def client_over(transport: "httpx.AsyncBaseTransport | None", seconds: float) -> "httpx.AsyncClient":
    """A client for one exchange, which tells nobody what was asked: httpx writes URLs, and so queries, to the log."""
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)
    return httpx.AsyncClient(transport=transport, timeout=seconds, trust_env=False, follow_redirects=False)


def _key(given: str | None, variable: str, service: str) -> str:
    key = given or os.environ.get(variable, "")
    if not key.strip():
        raise UsageError(f"{service} needs a key: set {variable}")
    if not key.strip().isascii() or not key.strip().isprintable():
        raise UsageError(f"the key in {variable} has characters that no key of {service} has")
    return key.strip()


async def _ask(
    service: str,
    method: str,
    url: str,
    transport: MakeTransport | None,
    *,
    key: str | None = None,
    params: Mapping[str, str] | None = None,
    body: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    import httpx

    headers = {"Accept": "application/json", "Accept-Encoding": "identity"} | ({"x-api-key": key} if key else {})
    data = b""
    try:
        async with (
            asyncio.timeout(_SECONDS),
            client_over(transport() if transport else None, _SECONDS) as client,
            client.stream(method, url, params=params, json=body, headers=headers) as response,
        ):
            if response.status_code != 200 or response.headers.get("content-encoding", "identity") != "identity":
                raise ToolError(_refused(service, response.status_code))
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > _MAX_BYTES:
                    raise ToolError(f"{service} answered with too much. Search for something else.")
        answer = json.loads(data)
    except (httpx.HTTPError, OSError, TimeoutError):
        raise ToolError(f"{service} cannot be reached now. Answer without it, or try once more.") from None
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ToolError(f"{service} did not answer with results. Tell the user that its address or settings are wrong.")
    return answer


def _refused(service: str, status: int) -> str:
    if status in (401, 402, 403):
        return f"{service} refuses the search (HTTP {status}). Tell the user to check its key, or that it allows JSON."
    if status == 429:
        return f"{service} was asked too often (HTTP 429). Go on without it."
    return f"{service} failed (HTTP {status}). Answer without it, or try once more."


def _list(answer: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = answer.get(name)
    return found if isinstance(found, list) else []


def _hits(results: Sequence[Any], summary: str) -> Iterator[Hit]:
    for result in results:
        url = result.get("url") if isinstance(result, dict) else None
        if not isinstance(url, str) or not url.startswith(("http://", "https://")) or len(url) > 2048:
            continue
        said = result.get(summary)
        said = " ".join(part for part in said if isinstance(part, str)) if isinstance(said, list) else said
        title = result.get("title")
        try:
            place = urlsplit(url).netloc.rpartition("@")[2]
        except ValueError:
            continue
        yield Hit(
            url=url,
            title=one_line(title) if isinstance(title, str) and title.strip() else place,
            place=place,
            summary=one_line(said, 500) if isinstance(said, str) else "",
        )
