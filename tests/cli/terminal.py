"""A command on a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

FREEHOLD = [sys.executable, "-c", "from freehold.cli.main import main; main()"]


class Terminal:
    """Typed at and read from as a person would."""

    def __init__(self, *arguments: str | Path) -> None:
        self.output = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
            os.execvpe(FREEHOLD[0], [*FREEHOLD, *map(str, arguments)], environment)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, *, seconds: float = 60) -> str:
        """Read until the new output matches; returns it and forgets it."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output, re.DOTALL):
            if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                pytest.fail(f"no {pattern!r} in {self.output!r}")
            self.output += os.read(self._fd, 4096).decode(errors="replace")
        seen, self.output = self.output, ""
        return seen

    def interrupt(self) -> None:
        os.kill(self._pid, signal.SIGINT)

    def interrupt_until(self, pattern: str) -> None:
        """Press Ctrl-C until it is answered: readline loses one that comes while it is drawing the prompt."""
        for _ in range(20):
            self.interrupt()
            if select.select([self._fd], [], [], 1.0)[0]:
                break
        self.wait_for(pattern)

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
