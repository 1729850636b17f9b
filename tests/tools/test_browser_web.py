"""The web as a source: what is fetched, over which connection, and what never is.

Servers here are real ones, on a Unix socket: a transport of httpx's own goes there whatever the address says, so that
a request can be made to a public address without a network. What it was asked for is written down first.
"""

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
import subprocess
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from freehold.errors import UsageError
from freehold.tools.base import ToolError
from freehold.tools.browser.addresses import is_public
from freehold.tools.browser.engines import Exa, Searxng, YouCom
from freehold.tools.browser.web import Web
from tests.tools.conftest import Browse

PUBLIC, OTHER = "93.184.216.34", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # made once, since reading root certificates takes long
Write = Callable[[bytes], Awaitable[None]]
Respond = Callable[[str, Write], Awaitable[None]]


def answer(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    lines = {"Content-Type": "text/html", "Content-Length": str(len(body)), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


async def streamed(body: bytes) -> AsyncIterator[bytes]:
    yield body


class Site:
    """A server on a Unix socket, and a Web that can only reach it. `requests` is what it was asked for."""

    def __init__(self, folder: Path, respond: Respond | dict[str, bytes], **settings: Any) -> None:
        self.requests: list[str] = []
        self.asked: list[tuple[str, str | None]] = []  # the addresses connected to, and the names given in TLS
        self.looked_up: list[str] = []
        self.answers: dict[str, Sequence[str]] = {}
        self.later_answers: dict[str, Sequence[str]] = {}  # from the second look-up on
        self._path, self._respond = folder / "s", respond
        self._tls: ssl.SSLContext | None = settings.pop("server_tls", None)
        self._verify = settings.pop("verify", TRUSTS_NOBODY)
        engine = settings.pop("engine", Searxng("http://127.0.0.1:9"))
        self.web = Web(engine=engine, resolve=self._resolve, transport=self._transport, **settings)

    def _transport(self) -> httpx.AsyncBaseTransport:
        return _Noted(self.asked, httpx.AsyncHTTPTransport(uds=str(self._path), verify=self._verify, trust_env=False))

    async def _resolve(self, name: str, port: int) -> Sequence[str]:
        again = name in self.looked_up
        self.looked_up.append(name)
        return (
            self.later_answers.get(name, [PUBLIC]) if again and self.later_answers else self.answers.get(name, [PUBLIC])
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def write(data: bytes) -> None:
                writer.write(data)
                await writer.drain()

            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                if isinstance(self._respond, dict):
                    await write(self._respond.get(head.split(" ")[1], answer(b"no", "404 Not Found")))
                else:
                    await self._respond(head, write)

        async def serve_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

        serving: set[asyncio.Task[None]] = set()

        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            serving.add(asyncio.create_task(serve_and_close(reader, writer)))

        server = await asyncio.start_unix_server(begin, self._path, ssl=self._tls)
        try:
            yield
        finally:
            server.close()
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)

    def fetch(self, url: str, **options: Any) -> Any:
        async def run() -> Any:
            async with self.running():
                return await self.web.fetch(url, **options)

        return asyncio.run(run())

    def refusal(self, url: str) -> str:
        with pytest.raises(ToolError) as caught:
            self.fetch(url)
        return str(caught.value)


class _Noted(httpx.AsyncBaseTransport):
    def __init__(self, asked: list[tuple[str, str | None]], inner: httpx.AsyncHTTPTransport) -> None:
        self._asked, self._inner = asked, inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._asked.append((request.url.host, request.extensions.get("sni_hostname")))
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


ARTICLE = b"""<html><head><title>News of the day</title></head><body><nav><a href="/x">Nav</a></nav>
<article><h1>Head</h1>
<p>The zeppelin has landed in the harbour, and <a href="/more?a=1#b">more of it</a> is told by others, at length, for
everybody who wants to read about airships and the people who fly them across the sea in the middle of the night.</p>
<p>A second paragraph with <a href="https://other.example/">a link elsewhere</a> makes this long enough for an article,
as the extractor sees it, which counts words and the density of links before it decides.</p></article></body></html>"""


def test_a_page_is_fetched_from_the_address_that_was_checked_under_its_own_name(tmp_path: Path) -> None:
    site = Site(tmp_path, {"/news?q=1": answer(ARTICLE)})
    content = site.fetch("http://example.com/news?q=1#part")
    assert site.asked == [(PUBLIC, "example.com")]
    assert site.looked_up == ["example.com"]
    assert "\r\nHost: example.com\r\n" in site.requests[0]
    assert "cookie" not in site.requests[0].lower()
    assert (content.title, content.shown) == ("News of the day", "http://example.com/news?q=1#part")
    assert "【0†more of it】" in content.text
    assert "【1†a link elsewhere†other.example】" in content.text
    assert content.links == ("http://example.com/more?a=1#b", "https://other.example/")
    assert site.fetch("http://example.com/news?q=1", as_source=True).text.startswith("<html><head><title>News")


def test_tls_is_spoken_with_the_name_and_the_certificate_must_be_its_own(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x"
    files = ["-addext", "subjectAltName=DNS:example.com", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    names: list[str | None] = []
    server.sni_callback = lambda connection, name, context: names.append(name)
    verify = ssl.create_default_context(cafile=str(certificate))
    pages = {"/": answer(b"<p>private talk")}
    assert Site(tmp_path, pages, server_tls=server, verify=verify).fetch("https://example.com/").text == "private talk"
    assert names == ["example.com"]
    assert "its certificate is not good" in Site(tmp_path, pages, server_tls=server, verify=verify).refusal(
        "https://other.example/"
    )
    assert "its certificate is not good" in Site(tmp_path, pages, server_tls=server).refusal("https://example.com/")


PRIVATE = (
    "127.0.0.1 127.1.2.3 0.0.0.0 10.0.0.1 100.64.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.168.1.1 192.0.0.8 "
    "192.0.2.1 192.88.99.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 "
    "::1 :: fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 "
    "64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b:1::1 2002:7f00:1:: 2001:0:1::1 2001:db8::1 100::1 3fff::1 5f00::1 nonsense"
)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_no_address_of_a_private_network_is_connected_to(tmp_path: Path, address: str) -> None:
    assert not is_public(address)
    site = Site(tmp_path, {"/": answer(b"secret")})
    site.answers["inner.example"] = [address]
    site.answers["mixed.example"] = [PUBLIC, address]
    for name in ("inner.example", "mixed.example"):
        assert "is an address of a private network or of this machine" in site.refusal(f"http://{name}/")
    if "%" not in address and address != "nonsense":
        literal = f"[{address}]" if ":" in address else address
        assert "is an address of a private network" in site.refusal(f"http://{literal}/")
    assert (site.asked, site.requests) == ([], [])


def test_public_addresses_are(tmp_path: Path) -> None:
    for address in (PUBLIC, OTHER, "8.8.8.8", "1.1.1.1", "64:ff9b::808:808", "::ffff:8.8.8.8", "2a00:1450:4001::200e"):
        assert is_public(address)
    site = Site(tmp_path, {"/": answer(b"<p>six")})
    assert site.fetch(f"http://[{OTHER}]/").text == "six"
    assert site.asked == [(OTHER, None)]
    assert f"Host: [{OTHER}]" in site.requests[0]


def test_a_name_is_looked_up_once_so_that_a_later_answer_changes_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, {"/": answer(b"<p>public page")})
    site.answers["rebind.example"], site.later_answers["rebind.example"] = [PUBLIC], ["127.0.0.1"]
    assert site.fetch("http://rebind.example/").text == "public page"
    assert site.asked == [(PUBLIC, "rebind.example")]
    assert "private network" in site.refusal("http://rebind.example/")  # asked anew, answered otherwise
    assert len(site.asked) == 1


def test_the_real_way_to_this_machine_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        web = Web(engine=Searxng("http://127.0.0.1:9"))
        for url in (
            f"http://127.0.0.1:{port}/",
            "http://localhost/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.0.0.1/",
            "http://0177.0.0.1/",
            "http://[::ffff:7f00:1]/",
            "http://①②⑦.0.0.1/",
        ):
            with pytest.raises(ToolError):
                asyncio.run(web.fetch(url))
        with pytest.raises(BlockingIOError):
            server.accept()
        web.close()


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.1/admin", "private network"),
        ("//169.254.169.254/latest/meta-data", "private network"),
        ("http://inner.example/", "private network"),
        ("http://[::ffff:10.0.0.1]/", "private network"),
        ("file:///etc/passwd", "only http:// and https://"),
        ("gopher://example.com/_x", "only http:// and https://"),
        ("http://user:pw@example.com/", "name or password"),
        ("http://example.com:22/", "port 22 is not open"),
        ("http://[::1", "broke off"),  # httpx itself looks at where it is not to go
        ("/loop", "again and again"),
    ],
)
def test_redirects_are_checked_like_the_first_address(tmp_path: Path, location: str, reason: str) -> None:
    pages = {"/": answer(b"", "302 Found", Location=location), "/loop": answer(b"", "307 T", Location="/loop")}
    site = Site(tmp_path, pages)
    site.answers["inner.example"] = ["192.168.0.1"]
    assert reason in site.refusal("http://example.com/")
    assert {address for address, _ in site.asked} == {PUBLIC}
    assert len(site.requests) <= 6


def test_a_good_redirect_is_followed_and_cited_where_it_led(tmp_path: Path) -> None:
    site = Site(
        tmp_path, {"/": answer(b"", "301 M", Location="http://b.example/p", Set_Cookie="a=b"), "/p": answer(b"<p>here")}
    )
    content = site.fetch("http://a.example/")
    assert (content.url, content.text) == ("http://b.example/p", "here")
    assert [name for _, name in site.asked] == ["a.example", "b.example"]
    assert "cookie" not in site.requests[1].lower()


@pytest.mark.parametrize(
    "url",
    [
        "http://user@example.com/",
        "http://example.com:8080/",
        "https://example.com:80/",
        "ftp://example.com/",
        "http:///nohost",
        "http://exa mple.com/",
        "http://example.com\\@127.0.0.1/",
        "http://example.com/\nHost: x",
        "http://" + "a" * 3000 + ".com/",
        "http://[::1/",
        "http://./",
        "http://xn--/",
    ],
)
def test_addresses_of_another_form_are_refused_before_anything_is_looked_up(tmp_path: Path, url: str) -> None:
    site = Site(tmp_path, {})
    assert site.refusal(url).endswith((".", ">"))
    assert (site.looked_up, site.asked) == ([], [])


def test_what_is_no_readable_page_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    pages = {
        "/png": answer(b"x", Content_Type="image/png"),
        "/pdf": answer(b"%PDF", Content_Type="application/pdf"),
        "/nul": answer(b"<p>\0\1\2"),
        "/gone": answer(b"x", "410 Gone"),
        "/says": answer(b"x", Content_Length="999999999999"),
        "/bomb": answer(bomb, Content_Encoding="gzip"),
        "/twice": answer(gzip.compress(bomb), Content_Encoding="gzip, gzip"),
        "/br": answer(b"x", Content_Encoding="br"),
        "/torn": answer(b"\x1f\x8b nothing", Content_Encoding="gzip"),
        "/short": answer(b"x", Content_Length="100"),
        "/head": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        "/junk": b"220 smtp ready\r\n",
    }
    for path, reason in {
        "/png": "is no text but image/png",
        "/pdf": "is no text but application/pdf",
        "/nul": "is no text",
        "/gone": "HTTP 410",
        "/says": "is larger than 1 MiB",
        "/bomb": "is larger than 1 MiB",
        "/twice": "compressed in a way that was not asked for",
        "/br": "compressed in a way that was not asked for",
        "/torn": "is damaged",
        "/short": "broke off",
        "/head": "broke off",
        "/junk": "broke off",
    }.items():
        assert reason in Site(tmp_path, pages, max_bytes=1 << 20).refusal(f"http://example.com{path}"), path


def test_endless_and_slow_pages_end(tmp_path: Path) -> None:
    async def endless(head: str, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            await write(b"more and more " * 1000)

    async def silent(head: str, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        await asyncio.Event().wait()

    async def dripping(head: str, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            await write(b".")
            await asyncio.sleep(0.01)

    assert "larger than 1 MiB" in Site(tmp_path, endless, max_bytes=1 << 20).refusal("http://example.com/")
    for respond in (silent, dripping):
        assert "takes longer than 0.2 seconds" in Site(tmp_path, respond, seconds=0.2).refusal("http://example.com/")


def test_a_fetch_that_is_cancelled_closes_its_connection(tmp_path: Path) -> None:
    reached, closed = asyncio.Event(), asyncio.Event()

    async def hangs(head: str, write: Write) -> None:
        reached.set()
        try:
            while True:
                await write(b"HTTP/1.1 200 OK\r\n" if not closed.is_set() else b"")
                await asyncio.sleep(0.005)
        except OSError:
            closed.set()
            raise

    async def run() -> None:
        site = Site(tmp_path, hangs)
        async with site.running():
            task = asyncio.create_task(site.web.fetch("http://example.com/"))
            await asyncio.wait_for(reached.wait(), 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(closed.wait(), 20)

    asyncio.run(run())


def test_texts_are_read_by_their_type_charset_and_compression(tmp_path: Path) -> None:
    pages = {
        "/latin": answer("<p>Gr\u00fc\u00dfe".encode("latin-1"), Content_Type="text/html; charset=iso-8859-1"),
        "/lies": answer(b"<p>plain \xff", Content_Type="text/html; charset=zlib"),
        "/json": answer(b'{"a": [1]}', Content_Type="application/json"),
        "/md": answer(b"# T\n[x](/y)", Content_Type="text/markdown"),
        "/gz": answer(gzip.compress(b"<p>packed"), Content_Encoding="gzip"),
        "/deflate": answer(zlib.compress(b"<p>packed"), Content_Encoding="deflate"),
        "/raw": answer(zlib.compress(b"<p>packed")[2:-4], Content_Encoding="deflate"),
        "/base": answer(b"<base href=/sub/><p><a href=x>y</a>"),
        "/none": b"HTTP/1.1 200 OK\r\n\r\n<p>bare",
    }
    assert Site(tmp_path, pages).fetch("http://example.com/base").links == ("http://example.com/sub/x",)
    expected = {"/latin": "Grüße", "/lies": "plain ÿ", "/json": '{"a": [1]}', "/md": "# T\n【0†x】", "/none": "bare"}
    for path, text in {**expected, "/gz": "packed", "/deflate": "packed", "/raw": "packed"}.items():
        assert Site(tmp_path, pages).fetch(f"http://example.com{path}").text == text, path


def test_a_page_of_the_web_is_searched_opened_and_cited(browse: Browse, tmp_path: Path) -> None:
    found: dict[str, list[Any]] = {
        "results": [{"url": "http://example.com/news", "title": "News【1†x】\n", "content": "of the zeppelin"}]
    }
    found["results"] += [{"url": "javascript:x", "title": "t"}, {"url": 7}, "x"]
    seen: list[httpx.Request] = []

    def engine(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=streamed(json.dumps(found).encode()))

    searxng = Searxng("http://127.0.0.1:8888/", transport=lambda: httpx.MockTransport(engine))
    site = Site(tmp_path, {"/news": answer(ARTICLE)}, engine=searxng)
    browsing = browse(site.web)
    assert browsing.browser.namespace.description.endswith("sources=web (default: web)")
    running = site.running()
    browsing.run(running.__aenter__())
    assert browsing("search", query="zeppelin").split("\n\n")[1].split("\n")[-1] == (
        "L4:   * 【0†News〖1‡x〗†example.com】 of the zeppelin"
    )
    assert str(seen[0].url) == "http://127.0.0.1:8888/search?q=zeppelin&format=json"
    page = browsing("open", id=0)
    assert page.startswith("[1] News of the day (http://example.com/news)\n**viewing lines [0 - ")
    assert "L1: URL: http://example.com/news" in page
    (citation,) = browsing.session.citations("【1†L4】")
    assert citation.url == "http://example.com/news"
    assert "[0 - " in browsing("open", id="http://example.com/news", view_source=True)
    browsing.run(running.__aexit__(None, None, None))


def test_engines_are_asked_in_their_own_ways_and_keys_stay_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[httpx.Request] = []
    answers: list[tuple[int, bytes]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        status, body = answers.pop()
        return httpx.Response(status, content=streamed(body), headers={"Location": "http://evil.example/"})

    def transport() -> httpx.MockTransport:
        return httpx.MockTransport(respond)

    for variable in ("EXA_API_KEY", "YDC_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match="Exa needs a key: set EXA_API_KEY"):
        Exa()
    with pytest.raises(UsageError, match=r"You.com needs a key: set YDC_API_KEY"):
        YouCom()
    with pytest.raises(UsageError, match="SearXNG's address must be a URL"):
        Searxng("localhost:8080")
    monkeypatch.setenv("EXA_API_KEY", "sk-secret")
    exa, you = Exa(transport=transport), YouCom(api_key="sk-secret", transport=transport)

    answers.append(
        (200, json.dumps({"results": [{"url": "https://a.b/", "title": None, "summary": "S"}] * 3}).encode())
    )
    hits = asyncio.run(exa.search("q", 2))
    assert [(hit.url, hit.title, hit.place, hit.summary) for hit in hits] == [("https://a.b/", "a.b", "a.b", "S")] * 2
    assert json.loads(seen[-1].content) == {"query": "q", "numResults": 2, "contents": {"summary": True}}
    assert (seen[-1].url.host, seen[-1].headers["x-api-key"]) == ("api.exa.ai", "sk-secret")
    web = [{"url": "https://w/", "title": "W", "snippets": ["a", "b"]}]
    news = [{"url": "https://n/", "title": "N", "description": "d"}]
    answers.append((200, json.dumps({"results": {"web": web, "news": news}}).encode()))
    assert [(hit.title, hit.summary) for hit in asyncio.run(you.search("q", 9))] == [("W", "a b"), ("N", "d")]
    assert str(seen[-1].url) == "https://api.ydc-index.io/v1/search?query=q&count=9"
    for status, body, reason in (
        (401, b"sk-secret", "refuses the search"),
        (429, b"", "too often"),
        (500, b"", r"failed \(HTTP 500\)"),
        (302, b"", r"failed \(HTTP 302\)"),
        (200, b"<html>", "did not answer with results"),
        (200, b"[" * 100_000, "did not answer with results"),
        (200, b"[]", "did not answer with results"),
        (200, b" " * 5_000_000, "too much"),
    ):
        answers.append((status, body))
        with pytest.raises(ToolError, match=reason) as caught:
            asyncio.run(exa.search("q", 2))
        assert "sk-secret" not in str(caught.value)
    assert {request.url.host for request in seen} == {"api.exa.ai", "api.ydc-index.io"}
    answers.append((200, b'{"results": {"a": 1}}'))
    assert asyncio.run(exa.search("q", 2)) == []
