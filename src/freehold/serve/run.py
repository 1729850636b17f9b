"""An ASGI app on sockets: bound, served by uvicorn, drained and closed.

Binding comes first and apart (`bind`), so that the network can be closed in between (freehold.airgap) and a wrong port
is known before a model is loaded. What would serve others than this machine without a key is refused before that
(`check_exposure`). SIGTERM and SIGINT drain: nobody new is accepted, requests that run may finish within
`drain_timeout`, and the exit code is 0; a second signal ends it at once. No access log, no proxies' headers, no server
header: who asks is the address that the connection came from.
"""

import asyncio
import dataclasses
import errno
import ipaddress
import os
import resource
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn import Server as UvicornServer

from freehold.errors import FreeholdError, UsageError
from freehold.log import logger
from freehold.serve.connection import Connection, ConnectionLimits
from freehold.serve.journal import quieten_uvicorn
from freehold.serve.keys import is_loopback

DRAIN_SECONDS = 60.0
_LAST_SECONDS = 2.0
"""For what was told to end: cancelled requests, and everything after a second signal."""
_SEND_BUFFER = 256 * 2**10
"""Of each connection, in the kernel: how far a stream may run ahead of its reader before that is noticed."""
_SPARE_DESCRIPTORS = 256
_BACKLOG = 2048
_LONGEST_IDLE = 32_767  # Linux takes no more

_BIND_ERRORS = {
    errno.EADDRINUSE: "is in use: choose another with --port, or --port 0 for any that is free",
    errno.EACCES: "may not be opened by this user: choose one above 1023 with --port",
    errno.EADDRNOTAVAIL: "cannot be opened, as this machine does not have that address: choose another with --host",
}


def check_exposure(host: str, port: int, *, has_keys: bool, allow_no_key: bool) -> None:
    """Raises UsageError for a host that others could reach, where nothing would be asked of them."""
    if has_keys or allow_no_key:
        return
    for _, address in _addresses(host, port):
        if not is_loopback(address[0]):
            raise UsageError(
                f"--host {host} would let other machines use this server without a key: make one with "
                "`freehold keys create`, or say --allow-no-key if that is what you want"
            )


def bind(host: str, port: int, *, write_seconds: float = ConnectionLimits().write_seconds) -> list[socket.socket]:
    """Sockets for every address of a host, all on one port. Raises UsageError where one cannot be had."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise UsageError(f"a port is a number from 0 to 65535, got {port!r}")
    sockets: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            listener = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # What is accepted inherits these: a dead or deaf client's connection ends even if nothing more is written.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":
                listener.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(max(1, int(write_seconds)), _LONGEST_IDLE)
                )
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_seconds * 1000))
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
            listener.bind(
                (address[0], sockets[0].getsockname()[1] if port == 0 and len(sockets) > 1 else port, *address[2:])
            )
            listener.listen(_BACKLOG)
    except OSError as error:
        for listener in sockets:
            listener.close()
        reason = _BIND_ERRORS.get(error.errno or 0, f"cannot be opened ({error.strerror}): choose another with --port")
        raise UsageError(f"port {port} on {host} {reason}") from None
    return sockets


def url_of(sockets: Sequence[socket.socket], *, tls: bool) -> str:
    """Where a browser on this machine finds the server."""
    host, port = sockets[0].getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        host = "localhost"
    elif address.version == 6:
        host = f"[{host}]"
    return f"{'https' if tls else 'http'}://{host}:{port}"


def tls_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """From PEM files; without a `key`, `cert` holds both. None where neither is given.

    Raises UsageError for files that are missing, are no PEM, are encrypted, or do not belong together.
    """
    if cert is None:
        if key is not None:
            raise UsageError("a key alone makes no TLS; give its certificate with --tls-cert")
        return None
    key = key or cert
    for option, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise UsageError(f"{option} {path} cannot be read ({error.strerror})") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)

    def no_password() -> str:
        raise UsageError(f"{key} is encrypted: decrypt the key into a file that only you can read")

    try:
        context.load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"the key in {key} is not the one of the certificate in {cert}") from None
        raise UsageError(f"{cert} and {key} are not a certificate and its key in PEM") from None
    return context


def serve(
    app: ASGIApp,
    sockets: Sequence[socket.socket],
    *,
    tls: ssl.SSLContext | None = None,
    limits: ConnectionLimits | None = None,
    drain_timeout: float = DRAIN_SECONDS,
    on_drain: Callable[[], None] = lambda: None,
    on_late: Callable[[], Awaitable[None]] | None = None,
    on_ready: Callable[[str], None] | None = None,
    loop: str = "auto",
) -> int:
    """Serve until a signal; returns the exit code. `on_drain` is where the app learns that it takes no more requests,
    and `on_late` where it ends those that still run when the time is over, so that their clients are told properly.

    `on_ready` is given the URL once connections are accepted; by default it goes to stderr. Raises FreeholdError where
    the app does not start.
    """
    server = Server(
        app,
        tls=tls,
        limits=limits,
        drain_timeout=drain_timeout,
        on_drain=on_drain,
        on_late=on_late,
        on_ready=on_ready,
        loop=loop,
    )
    server.run(sockets=[*sockets])
    return server.exit_code


class Server(UvicornServer):
    """uvicorn's, with a start, an end and signals of its own. `should_exit = True` drains it as SIGTERM does."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        tls: ssl.SSLContext | None = None,
        limits: ConnectionLimits | None = None,
        drain_timeout: float = DRAIN_SECONDS,
        on_drain: Callable[[], None] = lambda: None,
        on_late: Callable[[], Awaitable[None]] | None = None,
        on_ready: Callable[[str], None] | None = None,
        loop: str = "auto",
    ) -> None:
        self._limits = _within_descriptors(limits or ConnectionLimits())
        config = Config(
            app,
            http=Connection,
            ws="none",
            loop=loop,
            lifespan="on",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            workers=1,
        )
        super().__init__(config)
        quieten_uvicorn()
        self._tls, self._drain_timeout = tls, drain_timeout
        self._on_drain, self._on_late, self._on_ready = on_drain, on_late, on_ready or _announce
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets, "sockets are bound beforehand"
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_loop_trouble)
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise FreeholdError("the server's app did not start; the log says why")
        handshake = None if self._tls is None else self._limits.head_seconds
        self.servers = [
            await loop.create_server(
                self._connection, sock=listener, ssl=self._tls, backlog=_BACKLOG, ssl_handshake_timeout=handshake
            )
            for listener in sockets
        ]
        self.started = True
        self._on_ready(url_of(sockets, tls=self._tls is not None))

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, limits=self._limits)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._on_drain()
        loop = asyncio.get_running_loop()
        await self._wait(lambda: bool(self.server_state.tasks), loop.time() + self._drain_timeout)
        for connection in [*self.server_state.connections]:
            connection.shutdown()
        if self.server_state.tasks and self._on_late is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._on_late(), _LAST_SECONDS)
            await self._wait(lambda: bool(self.server_state.tasks), loop.time() + _LAST_SECONDS)
        if self.server_state.tasks:
            logger.warning("%d requests did not end within the drain time-out", len(self.server_state.tasks))
            for task in [*self.server_state.tasks]:
                task.cancel()
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*self.server_state.tasks, return_exceptions=True), _LAST_SECONDS)
        await self._wait(lambda: bool(self.server_state.connections), loop.time() + _LAST_SECONDS)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()
        await self.lifespan.shutdown()

    async def _wait(self, going_on: Callable[[], bool], deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while going_on() and not self.force_exit and loop.time() < deadline:
            await asyncio.sleep(0.02)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self.should_exit = True
            return
        self.force_exit = True
        self.exit_code = 128 + sig
        last = threading.Timer(_LAST_SECONDS, os._exit, [self.exit_code])  # whatever still holds it up
        last.daemon = True
        last.start()


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]]:
    name = host.strip().removeprefix("[").removesuffix("]")
    try:
        if not name:
            raise UsageError("--host must name an address; 0.0.0.0 and :: stand for all of this machine's")
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise UsageError(f"--host {host!r} is no address of this machine, and no name for one") from None
    unique = {address[:2]: (family, address) for family, _, _, _, address in found}
    return list(unique.values())  # type: ignore[arg-type]


def _within_descriptors(limits: ConnectionLimits) -> ConnectionLimits:
    """As many connections as the process may have open files for, with some to spare for everything else."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + _SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = limits.connections if soft == resource.RLIM_INFINITY else soft - _SPARE_DESCRIPTORS
    return dataclasses.replace(limits, connections=max(16, min(limits.connections, most)))


def _announce(url: str) -> None:
    sys.stderr.write(f"freehold: serving on {url}\n")
    sys.stderr.flush()


def _log_loop_trouble(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Without the context's objects: their reprs may hold what clients sent."""
    error = context.get("exception")
    if not isinstance(error, ConnectionError | ssl.SSLError):  # clients that go away are no news
        logger.error("in the event loop: %s (%s)", context.get("message"), type(error).__name__)
