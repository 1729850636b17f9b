"""The patch format that gpt-oss and its cousins were trained to write: its grammar, and its parser.

    *** Begin Patch
    *** Add File: hello.txt
    +Hello
    *** Update File: src/app.py
    *** Move to: src/main.py
    @@ def greet():
    -    print("Hi")
    +    print("Hello")
    *** Delete File: old.txt
    *** End Patch

`LARK` is for a model that is held to it; `parse` takes all of that, and what models write without being held: a heredoc
or a fence around the patch, blank lines between sections, spaces around markers, CR LF, empty lines for empty context,
the line numbers of unified diffs after `@@`, a patch as the one string of a JSON object. It refuses everything else
(PatchError, with the line). It knows nothing of files: whether a patch fits is `patch_plan`'s affair.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from freehold.tools.base import ToolError

LARK = r"""start: "*** Begin Patch\n" section+ "*** End Patch" "\n"?
section: add | delete | update
add: "*** Add File: " PATH "\n" ("+" TEXT "\n")+
delete: "*** Delete File: " PATH "\n"
update: "*** Update File: " PATH "\n" (move hunk* | hunk+)
move: "*** Move to: " PATH "\n"
hunk: ("@@\n" | ("@@ " TEXT "\n")+) (/[ +\-]/ TEXT "\n")+ "*** End of File\n"?
PATH: /[^\s\x00-\x1f\x7f\/\\~]([^\x00-\x1f\x7f\\]*[^\s\x00-\x1f\x7f\/\\])?/
TEXT: /[^\x00\r\n]*/
"""

_BEGIN, _END, _END_OF_FILE = "*** Begin Patch", "*** End Patch", "*** End of File"
_ADD, _DELETE, _UPDATE, _MOVE = "*** Add File:", "*** Delete File:", "*** Update File:", "*** Move to:"
_LINE_NUMBERS = re.compile(r"-\d+(?:,\d+)? \+\d+(?:,\d+)? @@ ?(.*)", re.DOTALL)
_HEREDOC = re.compile(r"(?:(?:apply_patch|applypatch) +)?<<-? ?(['\"]?)(\w+)\1")
_FENCE = re.compile(r"```[\w-]*")
_MAX_CHARACTERS = 4_000_000


class PatchError(ToolError):
    """A patch that cannot be used; nothing was changed. The message shows the place."""


class PatchLine(NamedTuple):
    """A line of a hunk: `mark` is " ", "-" or "+"."""

    mark: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hunk:
    """Lines that follow each other, to be found below all of the `headings`, each below the one before it.

    `at_end` says that the file ends with them.
    """

    headings: tuple[str, ...]
    lines: tuple[PatchLine, ...]
    at_end: bool = False

    @property
    def old(self) -> tuple[str, ...]:
        """The lines as they are to be found."""
        return tuple(line.text for line in self.lines if line.mark != "+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddFile:
    path: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteFile:
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateFile:
    """Without hunks it is only moved."""

    path: str
    move_to: str | None
    hunks: tuple[Hunk, ...]


Section = AddFile | DeleteFile | UpdateFile


@dataclass(frozen=True, slots=True)
class Patch:
    """What is to be done to files, in this order."""

    sections: tuple[Section, ...]


def parse(text: str) -> Patch:
    """Read a patch. Raises PatchError for what is none."""
    if len(text) > _MAX_CHARACTERS:
        raise PatchError(f"the patch has {len(text):,} characters; {_MAX_CHARACTERS:,} are the most. Send it in parts.")
    return _Parser(_unwrapped(text)).patch()


def _unwrapped(text: str) -> list[str]:
    """The lines of the patch without what models put around it."""
    text = text.strip()
    if text.startswith("{"):
        try:
            values = list(json.loads(text, strict=False).values())
        except (ValueError, RecursionError):
            values = []
        if len(values) == 1 and isinstance(values[0], str):
            text = values[0].strip()
    if text.startswith('"""') and text.endswith('"""') and len(text) > 6:
        text = text[3:-3].strip()
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if len(lines) > 2:
        first, last = lines[0].strip(), lines[-1].strip()
        heredoc = _HEREDOC.fullmatch(first)
        if (heredoc and last == heredoc[2]) or (_FENCE.fullmatch(first) and last == "```"):
            lines = lines[1:-1]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


class _Parser:
    """One patch, read from top to bottom."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines
        self._next = 0
        self._blank_until = [len(lines)] * (len(lines) + 1)  # from each line, the next one that is not blank
        for index in range(len(lines) - 1, -1, -1):
            self._blank_until[index] = index if lines[index].strip() else self._blank_until[index + 1]

    def patch(self) -> Patch:
        if not self._lines or self._lines[0].strip() != _BEGIN:
            first = repr(self._lines[0])[:80] if self._lines else "nothing"
            raise PatchError(f"a patch begins with a line '{_BEGIN}'; this one begins with {first}")
        if self._lines[-1].strip() != _END:
            raise PatchError(f"a patch ends with a line '{_END}'; this one ends with {self._lines[-1]!r:.80}")
        self._lines = self._lines[:-1]
        self._next = 1
        sections: list[Section] = []
        while (line := self._peek()) is not None:
            if line.strip():
                sections.append(self._section(line))
            else:
                self._next += 1
        if not sections:
            raise PatchError(f"the patch is empty; between its first and last line belongs '{_UPDATE} PATH' or another")
        return Patch(tuple(sections))

    def _peek(self) -> str | None:
        return self._lines[self._next] if self._next < len(self._lines) else None

    def _section(self, line: str) -> Section:
        if (path := self._take_path(_ADD)) is not None:
            return self._added(path)
        if (path := self._take_path(_DELETE)) is not None:
            return DeleteFile(path=path)
        if (path := self._take_path(_UPDATE)) is not None:
            return self._updated(path)
        raise self._error(
            f"expected '{_ADD} PATH', '{_DELETE} PATH' or '{_UPDATE} PATH', got {line!r:.80}"
            + ("; every line of a new file begins with '+'" if self._follows_added() else "")
        )

    def _follows_added(self) -> bool:
        before = self._lines[self._next - 1]
        return before.startswith("+") or before.strip().startswith(_ADD)

    def _take_path(self, marker: str) -> str | None:
        line = self._peek()
        if line is None or not line.strip().startswith(marker):
            return None
        path = line.strip().removeprefix(marker).strip()
        if not path:
            raise self._error(f"'{marker}' names no file")
        self._next += 1
        return path

    def _added(self, path: str) -> AddFile:
        lines = []
        while (line := self._peek()) is not None and line.startswith("+"):
            lines.append(line[1:])
            self._next += 1
        return AddFile(path=path, lines=tuple(lines))

    def _updated(self, path: str) -> UpdateFile:
        began = self._next
        move_to = self._take_path(_MOVE)
        hunks: list[Hunk] = []
        while (line := self._peek()) is not None and not line.startswith("*"):
            if not line.strip() and self._ends_section():
                break
            hunks.append(self._hunk(is_first=not hunks))
        if not hunks and move_to is None:
            self._next = min(began, len(self._lines) - 1)
            raise self._error(f"'{_UPDATE} {path}' has neither hunks nor '{_MOVE}'")
        return UpdateFile(path=path, move_to=move_to, hunks=tuple(hunks))

    def _ends_section(self) -> bool:
        """Whether nothing but blank lines is left before the next section."""
        index = self._blank_until[self._next]
        return index >= len(self._lines) or self._lines[index].lstrip().startswith("*** ")

    def _hunk(self, *, is_first: bool) -> Hunk:
        headings = self._headings()
        if headings is None and not is_first:
            raise self._error(f"a hunk begins with '@@', got {self._peek()!r:.80}")
        lines: list[PatchLine] = []
        num_used = 0  # without empty lines at its end, which separate and stand for nothing
        while (line := self._peek()) is not None and (not line or line[0] in " -+"):
            lines.append(PatchLine(line[0], line[1:]) if line else PatchLine(" ", ""))
            num_used = len(lines) if line else num_used
            self._next += 1
        at_end = line is not None and line.strip() == _END_OF_FILE
        if at_end:
            self._next += 1
        if not lines:
            raise self._error(
                f"the lines of a hunk begin with ' ', '-' or '+', got {line!r:.80}" if line else "a hunk has no lines"
            )
        if line is not None and not at_end and not line.startswith(("*", "@@")) and line.strip():
            raise self._error(f"the lines of a hunk begin with ' ', '-' or '+', got {line!r:.80}")
        return Hunk(headings=tuple(headings or ()), lines=tuple(lines[: num_used or 1]), at_end=at_end)

    def _headings(self) -> list[str] | None:
        """What stands after each `@@` in a row; None where there is none."""
        headings: list[str] = []
        began = self._next
        while (line := self._peek()) is not None and line.startswith("@@"):
            heading = line[2:].removeprefix(" ")
            if numbered := _LINE_NUMBERS.fullmatch(heading):
                heading = numbered[1]
            if heading.strip():
                headings.append(heading)
            self._next += 1
        return headings if self._next > began else None

    def _error(self, problem: str) -> PatchError:
        return PatchError(f"line {self._next + 1} of the patch: {problem}. Nothing was changed.")
