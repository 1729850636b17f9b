"""What a turn looks like in the terminal: the answer on stdout; reasoning, calls and what they gave on stderr, dimmed.

Results are folded to a few lines; `outputs` has all of them, for who asks. Nothing that a model or a tool says is
obeyed by the terminal.
"""

import shutil
import sys

from freehold.cli import terminal
from freehold.cli.footnotes import Footnotes
from freehold.formats.events import (
    ArgumentsDelta,
    CallStart,
    Diagnostic,
    Event,
    MessageDone,
    ReasoningDelta,
    TextDelta,
)
from freehold.log import logger
from freehold.session.generation import Said, SampleDone
from freehold.session.turn import Cited, ToolDone, ToolStart, TurnEvent

_FOLDED_LINES = 8
_INDENT = "  "


class Screen:
    """One conversation's. With `cites`, citations become footnotes."""

    def __init__(self, *, cites: bool = False) -> None:
        self.outputs: list[str] = []  # what calls gave, the last one last
        self._footnotes = Footnotes() if cites else None
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        self._is_aside = False  # on stderr, dimmed, maybe in the middle of a line
        self._is_in_text = False  # on stdout, in the middle of a line
        self._is_between = False  # there, at the end of a message
        self._waits = False  # a line says that a tool is running

    def show(self, event: TurnEvent) -> None:
        """What comes next in a turn."""
        match event:
            case Said(event=said):
                self._say(said)
            case ToolStart():
                self._aside("\n")  # what a function prints stands on lines of its own
                self.wait()
            case ToolDone():
                self._show_result(event)
            case Cited(citations=citations):
                if self._footnotes is not None:
                    self._footnotes.take(citations)
            case SampleDone(end="limit"):
                self.note("the turn ends at its limit of steps")

    def _say(self, event: Event) -> None:
        match event:
            case ReasoningDelta(text=text) | ArgumentsDelta(text=text):
                self._aside(text)
            case CallStart(recipient=recipient):
                self._aside(f"\n{short(recipient)}: " if self._is_aside else f"{short(recipient)}: ")
            case TextDelta(text=text):
                self._write(text if self._footnotes is None else self._footnotes.feed(text))
            case MessageDone():
                self._end_message()
            case Diagnostic(code=code, detail=detail, position=position):
                logger.info("token %d of the reply: %s: %s", position, code, detail)

    def _write(self, text: str) -> None:
        if text:
            self._leave_aside()
            terminal.write(f"\n{text}" if self._is_between else text)
            self._is_in_text, self._is_between = True, False

    def _aside(self, text: str) -> None:
        if self._is_in_text:
            terminal.write("\n")
            self._is_in_text = self._is_between = False
        if not self._is_aside:
            sys.stderr.write(self._dim)
            self._is_aside = True
        terminal.write_aside(text)

    def _leave_aside(self) -> None:
        if self._is_aside:
            terminal.say(self._plain)
            self._is_aside = False

    def _end_message(self) -> None:
        if self._footnotes is not None:
            self._write(self._footnotes.flush())
            if notes := self._footnotes.notes():
                terminal.write("\n\n" + "\n".join(notes))
        self._is_between = self._is_in_text

    # --- calls ------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Say that a tool is running."""
        if sys.stderr.isatty():
            self._aside(_INDENT + "…")
            self._waits = True

    def _end_wait(self) -> None:
        if self._waits:
            sys.stderr.write("\r\x1b[K")
            self._waits = False

    def make_room(self) -> None:
        """For a question, on a line of its own."""
        self._end_wait()
        if self._is_aside:
            sys.stderr.write(self._plain)
            self._is_aside = False

    def _show_result(self, done: ToolDone) -> None:
        self._end_wait()
        self.outputs.append(done.message.text)
        lines = done.message.text.splitlines() or ["(nothing)"]
        width = max(shutil.get_terminal_size().columns - len(_INDENT) - 1, 20)
        shown = [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines[:_FOLDED_LINES]]
        if len(lines) > _FOLDED_LINES:
            shown.append(f"… {len(lines) - _FOLDED_LINES} more lines; /output shows them")
        self._aside("".join(f"{_INDENT}{line}\n" for line in shown))

    def note(self, text: str) -> None:
        """A line of our own, which may hold what others said only if that is harmless."""
        self._end_wait()
        self._leave_aside()
        terminal.say(text)

    def close(self, *, finished: bool) -> None:
        """The turn is over, or was stopped."""
        self._end_wait()
        if self._footnotes is not None:
            self._write(self._footnotes.flush())
            self._footnotes.notes()
        self._leave_aside()
        self._is_in_text = self._is_between = False
        if finished:
            terminal.write("\n")
        else:
            terminal.say()


def short(recipient: str) -> str:
    """A tool's name as people know it."""
    return recipient.removeprefix("functions.")
