"""What the commands have in common at the terminal: the answer goes to stdout, everything else to stderr."""

import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from freehold.errors import UsageError
from freehold.log import Progress

_TURNS_TEXT = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # what a line says can be shown in another order
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160), *_TURNS_TEXT) if chr(code) not in "\n\t"}

_answers: TextIO | None = None
"""Where `write` writes while stdout is kept for it alone."""


def say(text: str = "") -> None:
    """A line for the person, on stderr."""
    sys.stderr.write(f"{text}\n")


def write(text: str) -> None:
    """A piece of the answer, on stdout, at once. A terminal is spared control sequences that a model makes up."""
    answers = _answers or sys.stdout
    answers.write(harmless(text))
    answers.flush()


@contextmanager
def only_answers_on_stdout() -> Iterator[None]:
    """Until the end of the block only `write` reaches stdout. What others print, such as functions of the user's and
    the programs that they run, goes to stderr."""
    global _answers
    before, stdout = _answers, sys.stdout
    stdout.flush()
    try:
        number, aside = stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError):  # not files: what stands in for them in this process alone
        _answers = stdout
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _answers = before
        return
    kept = os.dup(number)
    try:
        with open(kept, "w", encoding=stdout.encoding, errors=stdout.errors, closefd=False) as _answers:
            os.dup2(aside, number)
            try:
                yield
            finally:
                stdout.flush()
                os.dup2(kept, number)
    finally:
        _answers = before
        os.close(kept)


def write_aside(text: str) -> None:
    """A piece of what is not the answer, on stderr, at once; a terminal is spared as by `write`."""
    sys.stderr.write(harmless_aside(text))
    sys.stderr.flush()


def harmless(text: str, *, for_terminal: bool | None = None) -> str:
    """Without control sequences, for a terminal; as which stdout counts where it is one."""
    for_terminal = (_answers or sys.stdout).isatty() if for_terminal is None else for_terminal
    return text.translate(_HARMLESS) if for_terminal else text


def harmless_aside(text: str) -> str:
    """The same for stderr."""
    return text.translate(_HARMLESS) if sys.stderr.isatty() else text


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


def read_stdin() -> str:
    """All of a pipe, as text. Raises UsageError for what is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the text from the pipe is not UTF-8 ({error.reason} at byte {error.start})") from None


def has_pipe() -> bool:
    """Whether stdin is a pipe or a file, as opposed to a terminal, a closed or an empty device."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
