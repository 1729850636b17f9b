"""The web as a source, for who switches it on: an engine to search by, and pages fetched and turned into text.

Each hop of a fetch, redirects too, is checked by addresses.py and then made to the very address that was checked, with
the name in the Host header and in TLS, whose certificate must be that name's. Pages are bounded in bytes, before and
after decompression, and in time; what is no text is refused. No cookies, no proxies, no scripts, no other requests.
"""

import asyncio
import re
import zlib
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from freehold.tools.base import ToolError
from freehold.tools.browser import addresses, apart, markup
from freehold.tools.browser.content import Content, Hit, one_line, plain, shown_address
from freehold.tools.browser.engines import MakeTransport, SearchEngine, client_over
from freehold.tools.browser.threads import Stopped, Threads

if TYPE_CHECKING:
    import ssl

    import httpx

_MAX_HOPS = 6
_MAX_ARTICLE = 2 << 20  # bytes: of larger pages the whole text is taken, which needs less time
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_HTML_TYPES = frozenset(("text/html", "application/xhtml+xml"))
_TEXT_TYPE = re.compile(r"text/[\w.+-]+|application/(?:[\w.-]+\+)?(?:json|xml|yaml|x-ndjson|javascript|toml)")
_CHARSET = re.compile(r"charset\s*=\s*\"?([\w.:-]{1,40})", re.IGNORECASE)
_HEADERS = {
    "User-Agent": "freehold-browser",
    "Accept": "text/html,application/xhtml+xml,text/*;q=0.9,application/json;q=0.8,*/*;q=0.1",
    "Accept-Language": "en,*;q=0.5",
    "Accept-Encoding": "gzip, deflate",
}


class _Answer(NamedTuple):
    url: str
    media_type: str
    charset: str | None
    data: bytes


class Web:
    """Made once, for all conversations. `max_bytes` is of a page, `seconds` of all that opening one takes.

    `resolve` looks up names; `transport` makes what connections are made with.
    """

    local = False

    def __init__(
        self,
        *,
        engine: SearchEngine,
        name: str = "web",
        max_bytes: int = 8 << 20,
        seconds: float = 30.0,
        resolve: addresses.Resolve = addresses.resolve,
        transport: MakeTransport | None = None,
    ) -> None:
        self.name, self._engine = name, engine
        self._max_bytes, self._seconds = max_bytes, seconds
        self._resolve, self._make_transport = resolve, transport
        self._threads = Threads("web")
        self._tls: ssl.SSLContext | None = None

    def has(self, address: str) -> bool:
        return address.startswith(("http://", "https://"))

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        return await self._engine.search(query, topn)

    async def fetch(self, address: str, *, as_source: bool = False) -> Content:
        shown = one_line(address, 200)
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._get(address)
                return await self._threads.run(lambda stopped: _content(answer, as_source, stopped))
        except TimeoutError:
            raise ToolError(f"`{shown}` takes longer than {self._seconds:g} seconds. Open another page.") from None

    def close(self) -> None:
        self._threads.close()

    async def _get(self, address: str) -> _Answer:
        url = addresses.checked_url(address)
        for _ in range(_MAX_HOPS):
            found = await self._hop(url)
            if isinstance(found, _Answer):
                return found
            url = found
        raise ToolError(f"`{one_line(address, 200)}` is redirected again and again. Open another page.")

    async def _hop(self, url: "httpx.URL") -> "_Answer | httpx.URL":
        """One request: an answer, or where it is redirected to."""
        import httpx

        shown = one_line(str(url), 200)
        host = url.raw_host.decode("ascii")
        places = await addresses.checked_addresses(url, self._resolve)
        for last, place in zip([*[False] * (len(places[:2]) - 1), True], places[:2], strict=True):
            transport = await self._transport()
            async with client_over(transport, self._seconds) as client:
                request = client.build_request(
                    "GET",
                    url.copy_with(host=place, fragment=None),
                    headers={"Host": f"[{host}]" if ":" in host else host, **_HEADERS},
                    extensions={} if place == host else {"sni_hostname": host},
                )
                try:
                    response = await client.send(request, stream=True)
                    try:
                        return await self._read(url, response)
                    finally:
                        await response.aclose()
                except httpx.ConnectError as error:
                    if last:
                        reason = "its certificate is not good" if "CERTIFICATE" in str(error) else "it does not answer"
                        raise ToolError(f"`{shown}` cannot be reached: {reason}. Open another page.") from None
                except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError):
                    raise ToolError(f"`{shown}` broke off while it was read. Try once more, or another page.") from None
        raise AssertionError("the last place returns or raises")

    async def _transport(self) -> "httpx.AsyncBaseTransport":
        import httpx

        if self._make_transport is not None:
            return self._make_transport()
        if self._tls is None:  # reads all root certificates, which takes a while
            self._tls = await self._threads.run(lambda stopped: httpx.create_ssl_context(trust_env=False))
        return httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False)

    async def _read(self, url: "httpx.URL", response: "httpx.Response") -> "_Answer | httpx.URL":
        shown = one_line(str(url), 200)
        if response.status_code in _REDIRECTS and (location := response.headers.get("location")):
            import httpx

            try:
                target = str(url.join(location))
            except (httpx.InvalidURL, ValueError):
                raise ToolError(f"`{shown}` is redirected to what is no URL. Open another page.") from None
            return addresses.checked_url(target)
        if response.status_code != 200:
            raise ToolError(f"`{shown}` is not there (HTTP {response.status_code}). Open another page.")
        said = response.headers.get("content-type", "text/html")
        media_type = said.partition(";")[0].strip().lower()
        if not _TEXT_TYPE.fullmatch(media_type) and media_type not in _HTML_TYPES:
            raise ToolError(f"`{shown}` is no text but {one_line(media_type, 80)}. Open another page.")
        data = bytearray()
        length = response.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise self._too_large(shown)
        inflate = _Inflate(response.headers.get("content-encoding", ""), shown)
        received = 0
        async for chunk in response.aiter_raw():
            received += len(chunk)
            data += inflate(chunk, self._max_bytes + 1 - len(data))
            if len(data) > self._max_bytes or received > self._max_bytes:
                raise self._too_large(shown)
        if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ToolError(f"`{shown}` is no text. Open another page.")
        charset = _CHARSET.search(said)
        return _Answer(str(url), media_type, charset[1] if charset else None, bytes(data))

    def _too_large(self, shown: str) -> ToolError:
        return ToolError(f"`{shown}` is larger than {self._max_bytes / 2**20:g} MiB. Open another page.")


class _Inflate:
    """Decompresses, never more than is asked for; what then is left would have been too much."""

    def __init__(self, encoding: str, shown: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ToolError(f"`{shown}` is compressed in a way that was not asked for. Open another page.")
        self._shown, self._raw = shown, encoding == "deflate"
        self._inflate = zlib.decompressobj(wbits=47) if encoding not in ("", "identity") else None

    def __call__(self, chunk: bytes, limit: int) -> bytes:
        if self._inflate is None:
            return chunk
        try:
            try:
                return self._inflate.decompress(chunk, limit)
            except zlib.error:
                if not self._raw:
                    raise
                self._inflate = zlib.decompressobj(wbits=-15)  # as some servers do it
                return self._inflate.decompress(chunk, limit)
            finally:
                self._raw = False
        except zlib.error:
            raise ToolError(f"`{self._shown}` is damaged: it cannot be decompressed. Open another page.") from None


def _content(answer: _Answer, as_source: bool, stopped: Stopped) -> Content:
    is_html = answer.media_type in _HTML_TYPES
    written = markup.decode(answer.data, answer.charset, is_html=is_html)
    if is_html and not as_source:
        resolve = markup.web_resolve(answer.url)
        article_only = len(answer.data) <= _MAX_ARTICLE
        try:
            found = apart.of_html(written, answer.url, resolve, article_only=article_only, stopped=stopped)
        except apart.UnreadableError as error:
            shown = one_line(answer.url, 200)
            raise ToolError(f"`{shown}` cannot be read: {error}. Open another page.") from None
    elif answer.media_type == "text/markdown" and not as_source:
        found = markup.of_markdown(written, answer.url, markup.web_resolve(answer.url))
    else:
        found = markup.of_text(written)
    name = PurePosixPath(unquote(answer.url.partition("?")[0])).name
    return Content(
        url=answer.url,
        shown=shown_address(answer.url),
        title=plain(found.title) or one_line(name),
        text=found.text,
        links=found.links,
        own_lines=not is_html,
    )
