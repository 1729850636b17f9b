"""Who is asked before a tool runs: nobody, the user before whatever can touch more than a sandbox, or always.

    never    calls are carried out at once
    tools    the user is asked before functions, MCP tools and patches; not before python, which runs in a sandbox,
             nor before browser, which reads what it was given
    always   the user is asked before every call

A patch is shown as a diff when it is asked about. Questions go to the terminal even where stdin is a pipe, and what
they are about too where stderr is none. What was typed before a question does not answer it. Where there is no
terminal, tools that would need an answer are refused beforehand.
"""

import signal
import sys
import termios
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from freehold.cli import terminal
from freehold.cli.screen import Screen, short
from freehold.errors import UsageError
from freehold.session.turn import ToolStart
from freehold.tools import apply_patch
from freehold.tools.apply_patch import ApplyPatchTool, ProposedPatch
from freehold.tools.base import FunctionTools, Tool

Mode = Literal["never", "tools", "always"]
_MODES: tuple[Mode, ...] = get_args(Mode)
_TERMINAL = Path("/dev/tty")
_CONTAINED = ("python", "browser")
_PATCH = f"functions.{apply_patch.NAME}"
_COLOURS = {"+": "\x1b[32m", "-": "\x1b[31m", "@": "\x1b[36m"}


class Approval:
    """Asks, and remembers the tools that need no asking any more."""

    def __init__(self, mode: str, screen: Screen) -> None:
        """Raises UsageError for a mode that is none."""
        if mode not in _MODES:
            raise UsageError(f"--approve is {', '.join(_MODES)}, got {mode!r}")
        self._mode = mode
        self._screen = screen
        self._allowed: set[str] = set()
        self._asks_itself = False  # the tool that patches, with its diff; a function of the user's may have its name

    def check(self, tools: Sequence[Tool | FunctionTools]) -> None:
        """What there is to ask about. Raises UsageError where somebody would have to be asked and nobody can be."""
        self._asks_itself = any(isinstance(tool, ApplyPatchTool) for tool in tools)
        if self._mode == "never" or _has_terminal():
            return
        for tool in tools:
            names = [function.name for function in tool.functions] if isinstance(tool, FunctionTools) else []
            if self._mode == "always" and not isinstance(tool, FunctionTools):
                names = [tool.namespace.name]
            if names:
                raise UsageError(
                    f"there is no terminal to ask in before calls of {names[0]}; give --approve never to have them "
                    "carried out unasked"
                )

    async def call(self, start: ToolStart) -> bool:
        """Whether a call may be carried out; see turn.Approve."""
        name = start.recipient
        if self._mode == "never" or name in self._allowed or (name == _PATCH and self._asks_itself):
            return True
        if self._mode == "tools" and name.partition(".")[0] in _CONTAINED:
            return True
        return self._ask(name, f"{short(name)}: {start.arguments}", f"Run {short(name)}?")

    async def patch(self, proposed: ProposedPatch) -> bool:
        """Whether files may be changed; see apply_patch.Approve."""
        if self._mode == "never" or _PATCH in self._allowed:
            return True
        self._screen.note(_coloured(terminal.harmless_aside(proposed.diff)))
        return self._ask(_PATCH, proposed.diff, f"Change these files in {proposed.directory}?")

    def _ask(self, name: str, about: str, question: str) -> bool:
        """`about` was shown on stderr already."""
        self._screen.make_room()
        text = terminal.harmless(f"{question} [y]es, [n]o, [a]lways: ", for_terminal=True)
        if not sys.stderr.isatty():
            text = f"{terminal.harmless(about, for_terminal=True)}\n{text}"
        while True:
            match _answer(text).strip().lower():
                case "n" | "no" | "":
                    return False
                case "y" | "yes":
                    break
                case "a" | "always":
                    self._allowed.add(name)
                    break
        self._screen.wait()
        return True


def _has_terminal() -> bool:
    with suppress(OSError), _TERMINAL.open("rb+", buffering=0):
        return True
    return False


def _answer(question: str) -> str:
    """A line from the terminal; "" at its end. Ctrl-C stops the turn, as elsewhere."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a task that is cancelled would go on waiting
    try:
        with _TERMINAL.open("rb", buffering=0) as source, _TERMINAL.open("w", errors="replace") as person:
            with suppress(termios.error):  # no terminal any more
                termios.tcflush(source, termios.TCIFLUSH)
            person.write(question)
            person.flush()
            return source.readline().decode(errors="replace")
    finally:
        signal.signal(signal.SIGINT, before)


def _coloured(diff: str) -> str:
    if not sys.stderr.isatty():
        return diff
    lines = []
    for line in diff.splitlines():
        colour = _COLOURS.get(line[:1], "")
        lines.append(f"{colour}{line}\x1b[0m" if colour else line)
    return "\n".join(lines)
