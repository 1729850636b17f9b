"""What the comparisons of this folder share: contestants' processes, what they and others used, lists and tables.

A contestant runs in a process of its own, which is ended whatever happens here. Measures nothing itself, and imports
the standard library alone. Linux only: the figures come from /proc.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30
_GRACE_SECONDS = 10
_LAST_LINES = 15


class ContestError(Exception):
    """The comparison cannot be made; the message says why and what to do."""


class Usage(NamedTuple):
    """Of one process since it began."""

    cpu_seconds: float
    disk_reads: int


class Process:
    """A running contestant. Whatever it prints goes to a file, which is shown only if it fails.

    One with pipes is told to end by the end of its input, another by SIGTERM.
    """

    def __init__(self, name: str, command: Sequence[str], *, threads: int, pipes: bool = False) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else self._log,
                stderr=self._log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        except OSError as error:
            self._log.close()
            raise ContestError(f"{name}: {command[0]} cannot be started: {error.strerror}") from None

    def usage(self) -> Usage:
        # After the name, which may hold spaces, state is field 3; 12 is major faults, 14 and 15 are ticks (proc(5)).
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return Usage((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[9]))

    def close(self) -> None:
        """Ends the process, also in the middle of loading, and waits until its memory is free."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        else:
            self._process.terminate()
        try:
            self._process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def _ended(self) -> ContestError:
        """To be raised when the process has ended before it should."""
        status = self._process.wait()
        self._log.seek(0)
        last_words = self._log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        return ContestError("\n  ".join([f"{self.name} ended with status {status}:", *last_words]))


class Worker(Process):
    """A contestant that answers one line of JSON with another. Its first line, `ready`, says that it has loaded."""

    def __init__(self, name: str, command: Sequence[str], *, threads: int) -> None:
        super().__init__(name, command, threads=threads, pipes=True)
        try:
            self.ready = self._reply()
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the missing reply says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        return reply


def busy_seconds() -> float:
    """Of all cores together, since boot: everything but idle and waiting for the disk."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def machine_line(threads: int) -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores, {machine_bytes() / GIB:.1f} GiB; {threads} threads each"


def spread(values: Sequence[float]) -> str:
    low, middle, high = (f"{value:.3g}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, to be pasted into docs/performance.md; the first row is its head."""
    filled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    widths = [max(len(row[i]) for row in filled) for i in range(len(rows[0]))]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in filled]


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value
