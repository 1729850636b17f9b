"""A client of `freehold serve` that costs as little as can be: it counts events, and reads nothing in them.

Shared by bench/http_cost.py and bench/crowd.py. Measures nothing itself, and imports the standard library alone.
"""

import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contest import ContestError

_READY = re.compile(r"serving on http://127\.0\.0\.1:(\d+)")
_GRACE_SECONDS = 30


class HttpServer:
    """`freehold serve` in a process of its own, on a free port."""

    def __init__(self, model: str, arguments: Sequence[str], *, threads: int, log: Path) -> None:
        self.log = log
        options = ["--model", model, "--port", "0", "--threads", str(threads), *arguments]
        with log.open("wb") as words:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "freehold", "serve", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
            )
        self.pid = self._process.pid
        try:
            self.port = self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> int:
        while True:
            if found := _READY.search(self.log.read_text(errors="replace")):
                return int(found[1])
            try:
                status = self._process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            raise ContestError(f"freehold serve ended with status {status}:\n{self.log.read_text(errors='replace')}")

    def close(self) -> int:
        """End it as an operator would; its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


@contextmanager
def http_server(model: str, arguments: Sequence[str] = (), *, threads: int) -> Iterator[HttpServer]:
    with tempfile.TemporaryDirectory() as folder:
        server = HttpServer(model, arguments, threads=threads, log=Path(folder, "log"))
        try:
            yield server
        finally:
            server.close()


class Answer:
    """One streamed answer while it comes: `events` so far; `whole` once its last event, [DONE], has come."""

    def __init__(self) -> None:
        self.status = 0
        self.events = 0
        self.whole = False
        self.text = b""


async def stream(
    port: int, path: str, body: dict[str, Any], answer: Answer, *, stop_after: int | None = None, keep: bool = False
) -> None:
    """Read an answer's events, or vanish without a word after `stop_after` of them. `keep` keeps the text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        line = await reader.readline()
        answer.status = int(line.split()[1]) if line else 0
        while data := await reader.read(2**16):
            if keep:
                answer.text += data
            answer.events += data.count(b"data: ")
            answer.whole = answer.whole or b"data: [DONE]" in data
            if stop_after is not None and answer.events >= stop_after:
                writer.transport.abort()
                return
    finally:
        writer.close()


async def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST where there is something to send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = b"" if body is None else json.dumps(body).encode()
    kind = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    try:
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{kind}"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
        status = int((await reader.readline()).split()[1])
        _, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        return status, answer
    finally:
        writer.close()
