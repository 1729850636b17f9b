"""Server processes for clients, and processes in which clients run.

A client runs in a process of its own, because it may need an interpreter that has other libraries, and because its
warnings are not ours. Its process lives as long as the module's tests: importing a client is most of what it costs.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
_READY = "serving on "
_WAIT = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server that runs: where, and the file of what it says on stderr."""

    url: str
    log: Path

    def records(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Serving]:
    """`freehold serve` on a free port with a data directory of its own; SIGTERM has to end it with 0."""
    log = folder / "log"
    command = [sys.executable, "-c", "from freehold.cli.main import main; main()", "serve", "--port", "0", "--log-json"]
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env={**os.environ, "FREEHOLD_DATA": str(folder / "data")},
        )
        try:
            yield Serving(url=_url(server, log), log=log)
            server.send_signal(signal.SIGTERM)
            assert server.wait(_WAIT) == 0, log.read_text()
        finally:
            server.kill()
            server.wait()


def _url(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens, as soon as it does."""
    deadline = time.monotonic() + _WAIT
    while time.monotonic() < deadline and server.poll() is None:
        for line in log.read_text().splitlines(keepends=True):
            if line.endswith("\n") and (said := str(json.loads(line)["message"])).startswith(_READY):
                return said.removeprefix(_READY)
        time.sleep(0.02)
    raise AssertionError(f"the server does not serve: {log.read_text()}")


class Client:
    """A process that runs the functions of one of `programs/` by name. Use it with `with`."""

    def __init__(self, program: str, *, python: str = sys.executable, env: Mapping[str, str] | None = None) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [python, str(PROGRAMS / "main.py"), program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=bare_environment() | dict(env or {}),
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def does(self, step: str, url: str) -> None:
        """Run one function against a server; raises AssertionError with what the client said if it fails."""
        self._ask(step, url)

    def runs(self, code: str) -> None:
        """Run what somebody would type."""
        self._ask("", code)

    def _ask(self, step: str, url: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([step, url]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._stderr.seek(0)
            raise AssertionError(f"the client died: {self._stderr.read()}")
        failure = json.loads(answer)
        assert failure is None, failure


def bare_environment() -> dict[str, str]:
    """Without what could send a client elsewhere, lend it keys or lead it to our own modules."""
    foreign = ("OPENAI_", "ANTHROPIC_", "LITELLM_", "LLM_", "CODEX_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
    return {**kept, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


def steps_of(program: str) -> list[str]:
    """The functions of a program, which need not be importable here."""
    tree = ast.parse((PROGRAMS / f"{program}.py").read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [name for name in functions if not name.startswith("_")]
