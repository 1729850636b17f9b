"""The server on real sockets of the loopback: binding, TLS, clients that dawdle, and the end."""

import asyncio
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from freehold.errors import UsageError
from freehold.serve import run
from freehold.serve.bodies import Bodies
from freehold.serve.connection import Connection, ConnectionLimits

QUICK = ConnectionLimits(head_seconds=0.2, write_seconds=0.2, idle_seconds=0.2, discard_seconds=0.1)
PATIENT = ConnectionLimits(head_seconds=60, write_seconds=60, idle_seconds=60)
WAIT = 20


@dataclass
class App:
    """Says what it was asked, or keeps talking until the client has gone."""

    seen: list[str] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                stage = (await receive())["type"]
                await send({"type": f"{stage}.complete"})
            return
        self.seen.append(scope["path"])
        if scope["path"] == "/stream":
            await self._stream(receive, send)
        elif scope["path"] == "/unread":
            await _respond(send, b"enough")
        elif scope["path"] == "/large":
            await _respond(send, b"x" * 2**24)
        else:
            body = b""
            while (message := await receive())["type"] == "http.request":
                body += message["body"]
                if not message.get("more_body"):
                    break
            await _respond(send, scope["method"].encode() + b" " + body)

    async def _stream(self, receive: Receive, send: Send) -> None:
        await receive()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.started.set()
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
            await asyncio.sleep(0)
        if leaving.result()["type"] == "http.disconnect":
            self.gone.set()


async def _respond(send: Send, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Running:
    server: run.Server
    address: tuple[str, int]
    app: App
    url: str

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket(socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(WAIT)
        client.connect(self.address)
        return client

    def exchange(self, sent: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        with self.connect() as client:
            with suppress(ConnectionError):  # it may have heard enough before the end
                client.sendall(sent)
            return _until_closed(client)


@contextmanager
def running(*, limits: ConnectionLimits = PATIENT, loop: str = "auto", tls: ssl.SSLContext | None = None,
            wrap: Callable[[App], object] = lambda app: app, host: str = "127.0.0.1") -> Iterator[Running]:  # fmt: skip
    app, ready, urls = App(), threading.Event(), []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    sockets = run.bind(host, 0)
    address = sockets[0].getsockname()[:2]
    server = run.Server(wrap(app), limits=limits, loop=loop, tls=tls, on_ready=on_ready, drain_timeout=WAIT)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    try:
        assert ready.wait(WAIT)
        yield Running(server, address, app, urls[0])
    finally:
        server.should_exit = True
        thread.join(WAIT)
    assert not thread.is_alive()
    assert not server.server_state.connections and not server.server_state.tasks


def _until_closed(client: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionResetError):
        while data := client.recv(2**16):
            received += data
    return received


def _eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _make_certificate(tmp_path_factory.mktemp("tls"))


def _make_certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl makes the certificates")
    return cert, key


# --- binding ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_refused_with_the_remedy() -> None:
    with ExitStack() as stack:
        (taken,) = [stack.enter_context(one) for one in run.bind("127.0.0.1", 0)]
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} on 127\.0\.0\.1 is in use: choose another with --port"):
            run.bind("127.0.0.1", port)


def test_localhost_is_all_its_addresses_on_one_port() -> None:
    with ExitStack() as stack:
        sockets = [stack.enter_context(one) for one in run.bind("localhost", 0)]
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert run.url_of(sockets, tls=True) == f"https://{_authority(sockets[0])}"


def _authority(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("no.such.host.invalid", 0, "no address of this machine"),
        ("", 0, "must name an address"),
        ("192.0.2.1", 0, "does not have that address: choose another with --host"),
        ("127.0.0.1", 65536, "0 to 65535"),
    ],
)
def test_what_cannot_be_bound_is_named(host: str, port: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run.bind(host, port)


def test_a_client_may_be_waited_for_as_long_as_settings_allow() -> None:
    for listener in run.bind("127.0.0.1", 0, write_seconds=1e6):
        listener.close()


def test_beyond_the_loopback_a_key_or_a_word_is_asked_for() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        with pytest.raises(UsageError, match=r"`freehold keys create`, or say --allow-no-key"):
            run.check_exposure(host, 0, has_keys=False, allow_no_key=False)
        run.check_exposure(host, 0, has_keys=True, allow_no_key=False)
        run.check_exposure(host, 0, has_keys=False, allow_no_key=True)
    for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"):
        run.check_exposure(host, 0, has_keys=False, allow_no_key=False)


def test_ipv6_serves_and_says_so() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with running(host="::1") as server:
        assert server.url == f"http://[::1]:{server.address[1]}"
        assert server.exchange(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


# --- TLS ----------------------------------------------------------------------------------------------------------


def test_tls_serves_by_certificate_files(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with running(tls=run.tls_context(cert, key)) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection("127.0.0.1", server.address[1], context=trusting, timeout=WAIT)
        connection.request("POST", "/", b"hidden")
        assert connection.getresponse().read() == b"POST hidden"
        connection.close()


def test_tls_files_that_will_not_do_are_refused_with_the_reason(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    other = _make_certificate(tmp_path)[1]
    locked, junk = tmp_path / "locked.pem", tmp_path / "junk.pem"
    encrypt = ["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(encrypt, check=True, capture_output=True)
    junk.write_text("no certificate")
    for given, says in (
        ((tmp_path / "none.pem", key), r"--tls-cert .*none\.pem cannot be read \(No such file"),
        ((cert, tmp_path / "none.pem"), r"--tls-key .*none\.pem cannot be read"),
        ((cert, other), "is not the one of the certificate"),
        ((cert, locked), "is encrypted"),
        ((junk, key), "not a certificate and its key in PEM"),
        ((cert, cert), "not a certificate and its key in PEM"),
    ):
        with pytest.raises(UsageError, match=says):
            run.tls_context(*given)
    both = tmp_path / "both.pem"
    both.write_text(cert.read_text() + key.read_text())
    assert run.tls_context(both, both) is not None
    assert run.tls_context(both, None) is not None
    assert run.tls_context(None, None) is None
    with pytest.raises(UsageError, match="not a certificate and its key in PEM"):
        run.tls_context(cert, None)
    with pytest.raises(UsageError, match="a key alone makes no TLS"):
        run.tls_context(None, key)


# --- clients that dawdle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["asyncio", "uvloop", "tls"])
def test_who_stops_reading_a_stream_is_disconnected(way: str, certificate: tuple[Path, Path]) -> None:
    if way == "uvloop":
        pytest.importorskip("uvloop")
    tls = run.tls_context(*certificate) if way == "tls" else None
    with running(limits=QUICK, loop="asyncio" if way == "asyncio" else "auto", tls=tls) as server, ExitStack() as stack:
        client = stack.enter_context(server.connect(receive_buffer=4096))
        if tls:
            trusting = ssl.create_default_context(cafile=str(certificate[0]))
            client = stack.enter_context(trusting.wrap_socket(client, server_hostname="localhost"))
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        assert server.app.started.wait(WAIT)
        assert server.app.gone.wait(WAIT)  # aborted: what was not read did not have to go first


class Roomy(Connection):
    """Its transport takes whatever is written, so that what is left over at the end was never too much."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=2**30)
        super().connection_made(transport)


def test_who_never_reads_the_end_of_an_answer_does_not_keep_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Connection", Roomy)
    with running(limits=QUICK) as server, server.connect(receive_buffer=4096) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert _eventually(lambda: server.app.seen == ["/large"])
        assert _eventually(lambda: server.connections == 0)


def test_who_reads_slowly_but_reads_gets_all_of_it() -> None:
    limits = ConnectionLimits(head_seconds=0.2, write_seconds=10, idle_seconds=0.2)
    with running(limits=limits) as server, server.connect(receive_buffer=2**16) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while data := client.recv(2**18):
            received += len(data)
        assert received > 2**24


def test_a_head_that_does_not_end_is_not_waited_for() -> None:
    with running(limits=QUICK) as server:
        for start in (b"", b"GET / HTTP/1.1\r\nHos", b"\r\n\r\n"):
            answer = server.exchange(start)
            assert answer.startswith(b"HTTP/1.1 408") if start else answer == b""
            with server.connect() as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(2**16).startswith(b"HTTP/1.1 200")
                client.sendall(start)  # a second one, on a connection that was kept
                assert _until_closed(client).startswith(b"HTTP/1.1 408") or not start
        assert server.app.seen == ["/"] * 3


def test_a_body_that_does_not_end_is_not_waited_for() -> None:
    with running(wrap=lambda app: Bodies(app, read_seconds=0.2)) as server:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for half in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"):
            answer = server.exchange(head + half)
            assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.2 seconds" in answer
        assert server.app.seen == []


def test_a_body_that_nobody_reads_does_not_keep_the_connection() -> None:
    with running(limits=QUICK) as server, server.connect() as client:
        client.sendall(b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert client.recv(2**16).endswith(b"enough")
        client.sendall(b"a little more")  # which ends no wait
        assert _until_closed(client) == b""


def test_too_large_a_body_is_answered_and_not_just_cut_off() -> None:
    with running(wrap=lambda app: Bodies(app, max_bytes=1000)) as server:
        connection = http.client.HTTPConnection(*server.address, timeout=WAIT)
        connection.request("POST", "/", b"x" * 2**20, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "request_too_large")
        connection.request(
            "POST", "/", iter([b"x" * 500] * 10), {"Content-Type": "application/json"}, encode_chunked=True
        )
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "request_too_large")
        connection.close()


@pytest.fixture(scope="module")
def patient() -> Iterator[Running]:
    with running(wrap=Bodies) as server:
        yield server


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 400_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: 1\r\n" * 101 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: 1\r\n" % i for i in range(30_000)),
    ],
    ids=["endless header", "giant header", "giant path", "many headers", "endless headers"],
)
def test_giant_heads_are_refused(patient: Running, head: bytes) -> None:
    patient.app.seen.clear()
    assert patient.exchange(head).startswith(b"HTTP/1.1 431")
    assert patient.app.seen == []


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"Content-Length: 4\r\nContent-Length: 5",
        b"Content-Length: 4, 4",
        b"Content-Length: +4",
        b"Content-Length: 0x4",
        b"Content-Length: -4",
        b"Content-Length: 99999999999999999999999",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Host: x\r\n folded: y",
        b"A: b\nB: c",
        b"A: b\rB: c",
        b"A: \x00",
        b"A b: c",
        b": c",
        b"no colon",
    ],
)
def test_what_two_readers_could_take_for_two_requests_reaches_nobody(patient: Running, headers: bytes) -> None:
    patient.app.seen.clear()
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + headers
    answer = patient.exchange(request + b"\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
    assert patient.app.seen == []


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW / HTTP/1.1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused_in_the_shape_of_the_api(patient: Running, sent: bytes) -> None:
    head, _, body = patient.exchange(sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("offer", [b"Upgrade: websocket", b"Upgrade: h2c", b"Upgrade: h2c\r\nContent-Length: 0"])
def test_an_offer_to_speak_something_else_is_answered_in_http(patient: Running, offer: bytes) -> None:
    request = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\n" + offer + b"\r\n\r\n"
    assert patient.exchange(request).startswith(b"HTTP/1.1 200")


def test_more_connections_than_may_be_are_closed() -> None:
    with running(limits=ConnectionLimits(connections=16)) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(17)]
        assert _until_closed(clients[-1]) == b""
        clients[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert clients[0].recv(2**16).startswith(b"HTTP/1.1 200")


# --- the end ------------------------------------------------------------------------------------------------------

SERVER = """
import asyncio, sys
from freehold import airgap
from freehold.serve import journal, run
from freehold.serve.gate import Gate
from freehold.serve.guard import guard
from freehold.serve.keys import Keys

finish = asyncio.Event()

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for _ in range(2):
            stage = (await receive())["type"]
            if stage == "lifespan.shutdown":
                print("closed", flush=True)
            await send({"type": f"{stage}.complete"})
        return
    if scope["path"] == "/finish":
        finish.set()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/wait":
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await finish.wait()
    await send({"type": "http.response.body", "body": b" and done"})

def draining():
    gate.drain()
    if sys.argv[2] == "finish":
        asyncio.get_running_loop().call_later(0.5, finish.set)

gate = Gate(max_running=4, max_queue=4)
journal.start_logging(as_json=True)
sockets = run.bind("127.0.0.1", 0)
if sys.argv[3] == "airgap":
    airgap.close_network()
app = guard(app, keys=Keys(dict), gate=gate)
ready = lambda url: print(url, flush=True)
raise SystemExit(run.serve(app, sockets, drain_timeout=float(sys.argv[1]), on_drain=draining, on_ready=ready))
"""


@contextmanager
def server_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    command = [sys.executable, "-c", SERVER, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, ("127.0.0.1", int(process.stdout.readline().rpartition(":")[2]))
        finally:
            process.kill()


@contextmanager
def waiting_request(address: tuple[str, int]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(*address, timeout=WAIT)
    connection.request("GET", "/wait")
    response = connection.getresponse()
    assert response.read(5) == b"begun"
    yield response
    connection.close()


def test_sigterm_lets_requests_finish_and_takes_no_others() -> None:
    gap = "airgap" if sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64") else "open"
    with server_process("20", "finish", gap) as (process, address), waiting_request(address) as response:
        kept = http.client.HTTPConnection(*address, timeout=WAIT)
        kept.request("GET", "/")
        assert kept.getresponse().read() == b" and done"
        process.send_signal(signal.SIGTERM)
        assert _eventually(lambda: _refuses(address))
        kept.request("GET", "/")
        refused = kept.getresponse()
        assert (refused.status, refused.headers["retry-after"], refused.will_close) == (503, "10", True)
        assert json.loads(refused.read())["error"]["code"] == "draining"
        kept.close()
        assert response.read() == b" and done"
        out, log = process.communicate(timeout=WAIT)
        assert (process.returncode, out) == (0, "closed\n")
        statuses = [line["status"] for line in map(json.loads, log.splitlines()) if line["message"] == "request"]
        assert sorted(statuses) == [200, 200, 503]


def test_requests_that_do_not_end_are_ended_when_the_time_is_over() -> None:
    with server_process("0.2", "never", "open") as (process, address), waiting_request(address) as response:
        process.send_signal(signal.SIGINT)
        with pytest.raises(http.client.IncompleteRead):
            response.read()
        out, log = process.communicate(timeout=WAIT)
        assert (process.returncode, out) == (0, "closed\n")
        assert "1 requests did not end within the drain time-out" in log
        assert "Traceback" not in log


def test_a_second_signal_ends_it_at_once() -> None:
    with server_process("600", "never", "open") as (process, address), waiting_request(address):
        process.send_signal(signal.SIGTERM)
        assert _eventually(lambda: _refuses(address))
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 128 + signal.SIGTERM


def _refuses(address: tuple[str, int]) -> bool:
    with suppress(ConnectionResetError):
        try:
            socket.create_connection(address, timeout=WAIT).close()
        except ConnectionRefusedError:
            return True
    return False
