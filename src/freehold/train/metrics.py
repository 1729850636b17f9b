"""metrics.jsonl: one JSON object a line, as training goes on, for people, charts and servers that watch.

A line is written whole, with one write, or is the last one and cut off by a kill; who reads leaves that out. Lines have
a step, in order, so that a run that goes on from a checkpoint cuts off what came after it.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from freehold.disk import written_to
from freehold.errors import CheckpointError, DiskError

ENDINGS = ("early_stop", "stopped", "failed", "done")
"""Events after which a run has nothing more to say, unless it goes on."""


Report = Callable[[Mapping[str, Any]], None]
"""Called with every line, once it is written."""


class Line(NamedTuple):
    """What it says, and the byte after it."""

    value: dict[str, Any]
    end: int


class Journal:
    """Appends to a file, which is made where there is none, and tells `report`. Raises DiskError."""

    def __init__(self, path: Path, report: Report = lambda line: None) -> None:
        self._path = path
        self._report = report

    def event(self, event: str, step: int, *, quietly: bool = False, **more: object) -> None:
        """Something that happened; `quietly` where the disk may be what failed."""
        with suppress(DiskError) if quietly else nullcontext():
            self.write({"event": event, "step": step, **{name: str(value) for name, value in more.items()}})

    def write(self, line: Mapping[str, Any]) -> None:
        line = {**line, "time": time.time()}
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        with written_to(self._path):
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(handle).st_size
                if os.write(handle, data) != len(data):
                    os.ftruncate(handle, size)
                    raise OSError(errno.ENOSPC, "no space for a whole line")
            finally:
                os.close(handle)
        self._report(line)

    def cut_back(self, step: int) -> None:
        """To what had been said when the checkpoint of this step was there."""
        if not self._path.exists():
            return
        end = 0
        for line in read_lines(self._path):
            if line.value.get("step", 0) > step or line.value.get("event") in ENDINGS:
                break
            end = line.end
        with written_to(self._path):
            os.truncate(self._path, end)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All that a run has said. Raises CheckpointError for what is no such file."""
    return [line.value for line in read_lines(path)]


def read_lines(path: Path) -> Iterator[Line]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    at = 0
    while (end := data.find(b"\n", at) + 1) > 0:
        try:
            value = json.loads(data[at:end])
        except ValueError:
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("step", 0), int):
            raise CheckpointError(f"{path}: at byte {at} there is no line of metrics; mend it, or train anew")
        yield Line(value, end)
        at = end
