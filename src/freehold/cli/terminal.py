"""What the commands have in common at the terminal: the answer goes to stdout, everything else to stderr."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from freehold.log import Progress


def say(text: str = "") -> None:
    """A line for the person, on stderr."""
    sys.stderr.write(f"{text}\n")


def write(text: str) -> None:
    """A piece of the answer, on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def start_logging(level: int) -> None:
    """Log to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("freehold: %(message)s"))
    logger = logging.getLogger("freehold")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)


def gib(num_bytes: float) -> str:
    """Bytes for people: 12.80 GiB, or 145.6 MiB where it is less than one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar per label on stderr, gone when done; silent where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, visible=done < total)

        yield show


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
