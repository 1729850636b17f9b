"""What a tool is: described to the model, opened for a conversation, called with what the model wrote.

A `Tool` is made once, for a server or a terminal. `open` gives a conversation its own `ToolSession`, with whatever
state the tool keeps between calls; sessions know nothing of each other. Who runs calls is session.turn, and it alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from freehold.errors import FreeholdError
from freehold.formats import conversation
from freehold.formats.conversation import ToolNamespace


class ToolError(FreeholdError):
    """A call that failed. The message is for the model, and may have lines: what was wrong, and what to try instead."""

    def __str__(self) -> str:
        # As of every error, control characters are shown and not obeyed; lines and tabs are its layout.
        text = Exception.__str__(self)
        return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFile:
    """A file that a call made or changed, for the user: `path` is where it lies on this machine."""

    name: str
    path: Path
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What a call gave: `text` for the model, never a control token whatever it says; `files` for the user."""

    text: str
    files: tuple[ToolFile, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Citation:
    """Characters `start` to `end` (exclusive) of an answer stand for these lines of a source, counted from 1.

    `url` is a file's or a page's.
    """

    start: int
    end: int
    url: str
    title: str
    first_line: int
    last_line: int


def shortened(text: str, characters: int) -> str:
    """A result of at most so many, and how many more there were."""
    left = len(text) - characters
    return text if left <= 0 else f"{text[:characters]}\n[{left:,} more characters are not shown]"


class ToolSession(Protocol):
    """One conversation's use of a tool. For one event loop; calls come one after another."""

    async def call(self, name: str, arguments: str) -> ToolResult:
        """Carry out a call of `name`, the full recipient such as `browser.open`, with the message's text as it was
        written. Raises ToolError for what the model can do better, whatever it is. Cancelled, it stops what it began,
        and the session can still be used."""

    def citations(self, answer: str) -> Sequence[Citation]:
        """What of an answer refers to something that this session showed."""

    async def aclose(self) -> None:
        """Give back all that it holds: processes, files, connections."""


class KeepsNothing:
    """The rest of a session that shows nothing to cite and holds nothing to give back."""

    def citations(self, answer: str) -> Sequence[Citation]:
        return ()

    async def aclose(self) -> None:
        pass


class Tool(Protocol):
    """Something that the model may be offered."""

    @property
    def namespace(self) -> ToolNamespace:
        """As it is described to the model."""

    async def open(self) -> ToolSession:
        """For a conversation that begins, or goes on."""


@runtime_checkable
class FunctionTools(Protocol):
    """Functions that the model may be offered in the namespace `functions`, among the client's own.

    Calls come as `functions.NAME`, or as NAME alone. The session cites nothing.
    """

    @property
    def functions(self) -> tuple[conversation.Tool, ...]:
        """As they are described to the model, now: a server's may change while it runs, between two turns."""

    async def open(self) -> ToolSession:
        """For a conversation that begins, or goes on."""
