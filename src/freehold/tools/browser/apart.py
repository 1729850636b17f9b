"""HTML is read in a process of its own, because there are pages on which a reader works for hours.

libxml2 compares each attribute of an element with all others; trafilatura looks at tables over and over. No thread can
be stopped at that, a process can: each page has `MAX_SECONDS`, memory has a limit, and the process has no network where
the kernel can refuse it and none of our environment. It serves one page after another, for whoever asks next, and ends
when nobody has asked for a minute, or when we do. It is no sandbox against a page that takes libxml2 over: such code
could read what this user can.
"""

import atexit
import json
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from freehold.tools.browser import markup

MAX_SECONDS = 30.0  # of computing
PATIENCE = 10  # so many times as long may pass on a busy machine
_IDLE_SECONDS = 60.0
_MAX_IDLE = 2
_MAX_MEMORY = 2 << 30
_MAX_ANSWER = 512 << 20  # bytes
_TICK = 0.05
_LENGTH = struct.Struct("<Q")
_CHILD = "import importlib, sys; sys.path.insert(0, sys.argv[1]); importlib.import_module(sys.argv[2]).tell()"


class UnreadableError(Exception):
    """A file that cannot be read; the message is the reason, as the end of a sentence that names the file."""


def too_slow(seconds: float) -> UnreadableError:
    return UnreadableError(f"it takes more than {seconds:.0f} seconds to read")


def command(module: str) -> list[str]:
    """What runs `tell` of a module of this package in a process of its own."""
    return [sys.executable, "-P", "-c", _CHILD, str(Path(__file__).parents[3]), f"{__package__}.{module}"]


def environment() -> dict[str, str]:
    return {"PATH": os.defpath, "LANG": "C.UTF-8"}


def confine() -> None:
    """What every such process does before it reads what others wrote."""
    from freehold import airgap
    from freehold.errors import FreeholdError

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(FreeholdError):  # where the kernel cannot, it does without
        airgap.close_network()


def limit_cpu(seconds: float) -> None:
    """End this process when it has computed for so long from now on, even if nobody is left to end it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, hard))


def of_html(
    html: str, base_url: str, resolve: markup.Resolve, *, article_only: bool = False, stopped: Callable[[], bool]
) -> markup.Text:
    """As markup.of_html; `resolve` goes along to the other process. Raises UnreadableError."""
    request = pickle.dumps((html, base_url, resolve, article_only, MAX_SECONDS), protocol=pickle.HIGHEST_PROTOCOL)
    until = time.monotonic() + PATIENCE * MAX_SECONDS
    reader, is_fresh = _readers.take()
    while True:
        try:
            answer = reader.ask(request, until, stopped)
            break
        except (OSError, EOFError):
            if reader.end() == -signal.SIGXCPU:
                raise too_slow(MAX_SECONDS) from None
            if is_fresh:
                raise UnreadableError("the HTML reader broke off, at damage or at its limit of memory") from None
            reader, is_fresh = _Reader(), True  # the other one may have gone for want of work
        except BaseException:
            reader.end()
            raise
    _readers.give_back(reader)
    text, title, links = json.loads(answer)
    return markup.Text(text, title, tuple(links))


def tell() -> None:
    """The child of `of_html`: a request at a time from standard input, a socket, whose answers go there too."""
    confine()
    connection = socket.socket(fileno=0)
    connection.settimeout(_IDLE_SECONDS)
    with suppress(OSError, EOFError):
        while True:
            size = _LENGTH.unpack(_received(connection, _LENGTH.size, lambda: connection.settimeout(None)))[0]
            html, base_url, resolve, article_only, seconds = pickle.loads(_received(connection, size, lambda: None))
            limit_cpu(seconds)
            found = markup.of_html(html, base_url, resolve, article_only=article_only)
            answer = json.dumps(found).encode()
            connection.sendall(_LENGTH.pack(len(answer)) + answer)
            connection.settimeout(_IDLE_SECONDS)


def _received(connection: socket.socket, size: int, begun: Callable[[], None]) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (part := connection.recv(min(size - len(data), 1 << 20))):
            raise EOFError
        begun()
        data += part
    return bytes(data)


class _Reader:
    """One such process, from this side."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(_TICK)
        with theirs:
            self._process = subprocess.Popen(
                command("apart"),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(),
            )

    @property
    def is_there(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, until: float, stopped: Callable[[], bool]) -> bytes:
        """Raises UnreadableError when it is time or nobody wants the answer, OSError or EOFError when it ended."""

        def check() -> None:
            if stopped():
                raise UnreadableError("reading it was stopped")
            if time.monotonic() > until:
                raise too_slow(MAX_SECONDS)

        rest = memoryview(_LENGTH.pack(len(request)) + request)
        while rest:
            check()
            with suppress(TimeoutError):
                rest = rest[self._connection.send(rest) :]
        answer, size = bytearray(), _LENGTH.size
        while len(answer) < size:
            check()
            try:
                part = self._connection.recv(1 << 20)
            except TimeoutError:
                continue
            if not part:
                raise EOFError
            answer += part
            if len(answer) >= _LENGTH.size:
                size = _LENGTH.size + _LENGTH.unpack_from(answer)[0]
                if size > _MAX_ANSWER:
                    raise EOFError
        return bytes(answer[_LENGTH.size :])

    def end(self) -> int:
        """How it ended, as subprocess has it."""
        self._connection.close()
        self._process.kill()
        return self._process.wait()


class _Readers:
    """Those that wait for work. For any thread."""

    def __init__(self) -> None:
        self._lock, self._idle = threading.Lock(), list[_Reader]()

    def take(self) -> tuple[_Reader, bool]:
        """A reader, and whether it was started for this."""
        while True:
            with self._lock:
                reader = self._idle.pop() if self._idle else None
            if reader is None:
                return _Reader(), True
            if reader.is_there:
                return reader, False
            reader.end()

    def give_back(self, reader: _Reader) -> None:
        with self._lock:
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(reader)
                return
        reader.end()

    def end(self) -> None:
        while self._idle:
            self._idle.pop().end()


_readers = _Readers()
atexit.register(_readers.end)
