"""`freehold serve` as a process on the loopback, and clients of it that notice how far they were told."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

WAIT = 60


class Process:
    """A server over a data directory. Use it with `with`, which kills what is still alive."""

    def __init__(self, folder: Path, script: Path | None, *options: str) -> None:
        """Of a script; of a model, by the options, where that is None."""
        says = [] if script is None else ["--script", str(script)]
        command = [sys.executable, "-m", "freehold", "serve", *says, "--port", "0", *options]
        self._log = folder / "server.log"
        self._errors = self._log.open("a+b")
        start = self._errors.seek(0, os.SEEK_END)
        environment = {**os.environ, "FREEHOLD_DATA": str(folder / "data")}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._errors, env=environment)
        self.address = "127.0.0.1", self._port(start)

    def _port(self, start: int) -> int:
        while self.process.poll() is None:
            said = self._log.read_bytes()[start:]
            if b"serving on http://127.0.0.1:" in said and said.endswith(b"\n"):
                return int(re.split(rb"\D", said.partition(b"http://127.0.0.1:")[2], maxsplit=1)[0])
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
        raise AssertionError(self.log)

    @property
    def log(self) -> str:
        """What all servers over this directory have logged."""
        return self._log.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._errors.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request and its JSON. Raises OSError or HTTPException where the server dies over it."""
        connection = http.client.HTTPConnection(*self.address, timeout=WAIT)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"} if content else {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def events(self, method: str, path: str, body: Any = None) -> Iterator[dict[str, Any]]:
        """The events of a stream as they come, [DONE] being `{"type": "[DONE]"}`."""
        connection = http.client.HTTPConnection(*self.address, timeout=WAIT)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"} if content else {})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            for line in answer:
                if line.startswith(b"data: ") and line.endswith(b"\n"):
                    data = line.removeprefix(b"data: ").strip()
                    yield {"type": "[DONE]"} if data == b"[DONE]" else json.loads(data)
        finally:
            connection.close()

    def exchange(self, sent: bytes) -> bytes:
        """What comes back for these bytes until the server closes."""
        with socket.create_connection(self.address, WAIT) as client:
            with suppress(ConnectionError):
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
            received = b""
            with suppress(ConnectionResetError):
                while data := client.recv(2**16):
                    received += data
            return received


def write_script(path: Path, *turns: Mapping[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, turns)))
    return path
