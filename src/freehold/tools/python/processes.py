"""The processes of one sandbox, seen from outside: how many, how much memory, stopped and continued.

They are the descendants of the sandbox's first process, whatever they call themselves: who loses a parent in there is
given to the first process. Nothing here believes what they say; all of it is read from /proc.
"""

import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_STOPPED = (b"T", b"t", b"Z", b"X")
_TELLING = (b"State:", b"voluntary_ctxt_switches:", b"nonvoluntary_ctxt_switches:")


class Usage(NamedTuple):
    """What processes take."""

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
                yield from map(int, (task / "children").read_bytes().split())


def usage(first: int, *, device: int, enough_bytes: int) -> Usage:
    """What the processes below `first` take together.

    Memory is what they have touched and cannot be dropped, their page tables, and for each socket what its buffer may
    hold. A page that several share counts for each of them, until that comes to more than `enough_bytes`: then it is
    counted again, exactly.
    """
    pids = descendants(first)
    deleted: dict[int, int] = {}
    sockets: set[int] = set()
    for pid in pids:
        for status in _open_files(pid):
            if stat.S_ISSOCK(status.st_mode):
                sockets.add(status.st_ino)
            elif status.st_nlink == 0 and status.st_dev == device:
                deleted[status.st_ino] = status.st_blocks * 512
    kernel_bytes = len(sockets) * _socket_bytes() + sum(_kilobytes(pid, "status", b"VmPTE:") for pid in pids)
    memory_bytes = kernel_bytes + sum(_kilobytes(pid, "status", b"RssAnon:", b"RssShmem:") for pid in pids)
    if memory_bytes > enough_bytes:
        memory_bytes = kernel_bytes
        memory_bytes += sum(_kilobytes(pid, "smaps_rollup", b"Pss_Anon:", b"Pss_Shmem:") for pid in pids)
    return Usage(memory_bytes, sum(deleted.values()))


def _kilobytes(pid: int, file: str, *fields: bytes) -> int:
    try:
        lines = (_PROC / str(pid) / file).read_bytes().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(fields))


def _open_files(pid: int) -> Iterator[os.stat_result]:
    with suppress(OSError):
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with suppress(OSError):
                yield entry.stat()


@cache
def _socket_bytes() -> int:
    """What may wait in a Unix socket to be read, which the sandbox cannot change."""
    try:
        return int((_PROC / "sys/net/core/wmem_default").read_bytes())
    except OSError:
        return 212_992


def stop(first: int, *, seconds: float = 1.0) -> bool:
    """Stop all that is below `first`; whether that was possible.

    That all were seen stopped is not enough: they could wake each other in turn, and each be seen asleep. When two
    looks find the same threads, all stopped, and none of them was switched to in between, there was a moment at which
    nothing ran; from then on nothing does.
    """
    deadline = time.monotonic() + seconds
    before: dict[tuple[int, int], tuple[bytes, ...]] = {}
    while True:
        now = _threads(first)
        running = {pid for (pid, _), (state, *_) in now.items() if state not in _STOPPED}
        if not running and now == before:
            return True
        if time.monotonic() > deadline:
            return False
        if running:
            _signal(list(running), signal.SIGSTOP)
            time.sleep(0.0005)  # it takes effect when they are next scheduled
        before = now


def go_on(first: int) -> None:
    """Let them run again."""
    _signal(descendants(first), signal.SIGCONT)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _threads(first: int) -> dict[tuple[int, int], tuple[bytes, ...]]:
    """The threads below `first`, by process and thread: state, and how often each gave up a processor or lost it."""
    found = {}
    for pid in descendants(first):
        with suppress(OSError):
            for thread in (_PROC / str(pid) / "task").iterdir():
                with suppress(OSError):
                    # As bytes: a process calls itself what it likes.
                    lines = (thread / "status").read_bytes().splitlines()
                    found[pid, int(thread.name)] = tuple(line.split()[1] for line in lines if line.startswith(_TELLING))
    return found
