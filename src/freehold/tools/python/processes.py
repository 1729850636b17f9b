"""The processes of one sandbox, seen from outside: how many, how much memory, stopped and continued.

They are the descendants of the sandbox's first process, whatever they call themselves: who loses a parent in there is
given to the first process. Nothing here believes what they say; all of it is read from /proc.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_STOPPED = ("T", "t", "Z", "X")


class Usage(NamedTuple):
    """What processes take."""

    processes: int
    memory_bytes: int
    deleted_bytes: int  # in files that have no name any more, on the asked-for file system


def descendants(first: int) -> list[int]:
    """The processes below `first`, without it."""
    found = list(children(first))
    for pid in found:  # it grows while it is walked
        found.extend(children(pid))
    return found


def children(pid: int) -> Iterator[int]:
    """The processes that it has started, and those that were given to it."""
    with suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            with suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def usage(first: int, *, device: int, enough_bytes: int) -> Usage:
    """What the processes below `first` take together.

    Memory is what they have touched and cannot be dropped. A page that several share counts for each of them, until
    that comes to more than `enough_bytes`: then it is counted again, exactly.
    """
    pids = descendants(first)
    memory_bytes = sum(_resident(pid) for pid in pids)
    if memory_bytes > enough_bytes:
        memory_bytes = sum(_proportional(pid) for pid in pids)
    deleted: dict[int, int] = {}
    for pid in pids:
        deleted.update(_deleted(pid, device))
    return Usage(len(pids), memory_bytes, sum(deleted.values()))


def _resident(pid: int) -> int:
    """Private and shared memory, without files' pages."""
    return _kilobytes(_PROC / str(pid) / "status", "RssAnon:", "RssShmem:")


def _proportional(pid: int) -> int:
    return _kilobytes(_PROC / str(pid) / "smaps_rollup", "Pss_Anon:", "Pss_Shmem:")


def _kilobytes(path: Path, *fields: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(fields))


def _deleted(pid: int, device: int) -> Iterator[tuple[int, int]]:
    with suppress(OSError):
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with suppress(OSError):
                status = entry.stat()
                if status.st_nlink == 0 and status.st_dev == device:
                    yield status.st_ino, status.st_blocks * 512


def stop(first: int, *, seconds: float = 1.0) -> bool:
    """Stop all that is below `first`; whether that was possible. What forks meanwhile is stopped in the next round."""
    deadline = time.monotonic() + seconds
    while running := [pid for pid in descendants(first) if _state(pid) not in _STOPPED]:
        if time.monotonic() > deadline:
            return False
        _signal(running, signal.SIGSTOP)
        time.sleep(0.0005)  # it takes effect when they are next scheduled
    return True


def go_on(first: int) -> None:
    """Let them run again."""
    _signal(descendants(first), signal.SIGCONT)


def kill(pids: list[int]) -> None:
    """End these processes; those that are gone already are as good."""
    _signal(pids, signal.SIGKILL)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _state(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
