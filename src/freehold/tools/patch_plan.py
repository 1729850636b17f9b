"""What a patch makes of some files: their new bytes, or the hunk that does not fit. It reads, and never writes.

Where a hunk belongs is found as the published implementations find it: the first place, below the hunk before it and
below its headings, where its lines are the file's; failing that, where they are but for spaces at their ends; but for
all spaces around them; but for typographic punctuation. What stays of a file stays byte for byte: its own context lines
(not the patch's), its line ends, its byte order mark, a last line without an end. Inserted lines take the file's line
end, and where the file is indented otherwise than the patch believes, the file's indentation.

A patch is carried out section by section on what the ones before it left; `plan` returns the sum, one change a path.
Used by `patch_files` and `apply_patch`; any `read` will do.
"""

import codecs
import difflib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from freehold.tools.patch_format import AddFile, DeleteFile, Hunk, Patch, PatchError, PatchLine, UpdateFile

Read = Callable[[str], bytes | None]
"""The bytes of the file at a path, None where there is nothing. Raises PatchError for what is no file to patch."""

_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("‘’‚‛", "'"),
        **dict.fromkeys("“”„‟", '"'),
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    }
)
_LAST_CHARACTER = sys.maxunicode
_SHOWN_LINES = 30
_COMPARED = 200_000  # lines against lines, in search of what comes nearest to a hunk that was not found


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A path before and after, None for no file. `moved_from` is where a file was that is now here."""

    path: str
    before: bytes | None
    after: bytes | None
    moved_from: str | None = None

    @property
    def verb(self) -> str:
        """ "A", "M" or "D"; "R" for a file that was moved."""
        if self.moved_from is not None:
            return "R"
        return "A" if self.before is None else "D" if self.after is None else "M"


@dataclass(slots=True)
class _Files:
    """Files as the sections so far leave them."""

    read: Read
    before: dict[str, bytes | None] = field(default_factory=dict)
    now: dict[str, bytes | None] = field(default_factory=dict)
    moved_from: dict[str, str] = field(default_factory=dict)

    def get(self, path: str) -> bytes | None:
        if path not in self.now:
            self.before[path] = self.now[path] = self.read(path)
        return self.now[path]

    def put(self, path: str, data: bytes | None) -> None:
        self.now[path] = data
        if data is None:
            self.moved_from.pop(path, None)

    def changes(self) -> tuple[Change, ...]:
        return tuple(
            Change(
                path=path,
                before=self.before[path],
                after=after,
                moved_from=self.moved_from.get(path) if self.before[path] is None else None,
            )
            for path, after in self.now.items()
            if after != self.before[path]
        )


def plan(patch: Patch, read: Read) -> tuple[Change, ...]:
    """What the patch would change: one Change for each path that ends otherwise than it began.

    Raises PatchError, and whatever `read` raises.
    """
    files = _Files(read)
    for section in patch.sections:
        path = section.path
        here = files.get(path)
        match section:
            case AddFile(lines=lines):
                if here is not None:
                    raise PatchError(f"{path} exists already; change it with '*** Update File: {path}'. {_UNCHANGED}")
                files.put(path, _encoded(path, "".join(f"{line}\n" for line in lines)))
            case DeleteFile():
                if here is None:
                    raise PatchError(f"{path} cannot be deleted: there is no such file. {_UNCHANGED}")
                files.put(path, None)
            case UpdateFile(hunks=hunks, move_to=move_to):
                if here is None:
                    raise PatchError(f"{path} cannot be updated: there is no such file. {_UNCHANGED}")
                after = _updated(path, here, hunks) if hunks else here
                if move_to is None or move_to == path:
                    files.put(path, after)
                    continue
                if files.get(move_to) is not None:
                    raise PatchError(f"{path} cannot be moved: {move_to} exists already. {_UNCHANGED}")
                origin = files.moved_from.get(path, path)
                files.put(path, None)
                files.put(move_to, after)
                files.moved_from[move_to] = origin
    return files.changes()


_UNCHANGED = "Nothing was changed."


# --- one file -----------------------------------------------------------------------------------------------


def _updated(path: str, data: bytes, hunks: Sequence[Hunk]) -> bytes:
    text = _decoded(path, data)
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix(mark)
    bodies, ends = _split(text)
    usual = Counter(ends[:-1] or ends).most_common(1)[0][0] if ends else "\n"
    end = usual or "\n"
    finder = _Finder(path, bodies, len(hunks))
    pieces: list[tuple[str, str]] = []
    done = 0
    for number, hunk in enumerate(hunks, 1):
        start = finder.find(hunk, number)
        pieces += zip(bodies[done:start], ends[done:start], strict=True)
        done = start + finder.matched
        pieces += _replaced(hunk, bodies[start:done], ends[start:done], end)
    pieces += zip(bodies[done:], ends[done:], strict=True)
    ends_open = bool(ends) and not ends[-1]
    written = [(body, own or end) for body, own in pieces[:-1]]
    written += [(body, "" if ends_open else own or end) for body, own in pieces[-1:]]
    return _encoded(path, mark + "".join(body + own for body, own in written))


def _split(text: str) -> tuple[list[str], list[str]]:
    """Lines, and what each ends with: LF, CR LF, or nothing at the end of the file."""
    lines = text.split("\n")
    last = lines.pop()
    bodies = [line.removesuffix("\r") for line in lines]
    ends = ["\r\n" if line.endswith("\r") else "\n" for line in lines]
    return (bodies, ends) if not last else ([*bodies, last], [*ends, ""])


def _replaced(hunk: Hunk, bodies: list[str], ends: list[str], end: str) -> list[tuple[str, str]]:
    """The lines of a place that a hunk matched, as it leaves them."""
    result: list[tuple[str, str]] = []
    index = 0
    indent = _indentation(hunk.lines, bodies)
    for mark, text in hunk.lines:
        if mark == "+":
            result.append((indent(text), end))
        elif index < len(bodies):  # a last empty line may have been left out of what was looked for
            if mark == " ":
                result.append((bodies[index], ends[index]))
            index += 1
    return result


def _indentation(lines: Sequence[PatchLine], bodies: Sequence[str]) -> Callable[[str], str]:
    """How inserted lines are indented: as written, unless the file has one other indentation throughout."""
    old = [line.text for line in lines if line.mark != "+"]
    pairs = [(_margin(text), _margin(body)) for text, body in zip(old, bodies, strict=False) if text.strip()]
    shifted = [(theirs, ours) for theirs, ours in pairs if theirs != ours]
    if not shifted:
        return lambda text: text
    theirs, ours = min(shifted, key=lambda pair: len(pair[0]))
    if any(not a.startswith(theirs) or b != ours + a[len(theirs) :] for a, b in pairs):
        return lambda text: text
    return lambda text: ours + text[len(theirs) :] if text.strip() and text.startswith(theirs) else text


def _margin(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


# --- finding ------------------------------------------------------------------------------------------------


def _exact(text: str) -> str:
    return text


def _normalised(text: str) -> str:
    return text.translate(_PUNCTUATION).strip()


_LENIENCES: tuple[Callable[[str], str], ...] = (_exact, str.rstrip, str.strip, _normalised)


class _Form:
    """The lines of a file in one leniency, a character for each, so that Python's search of text, which repetitions do
    not slow down, is the search for lines. Where lines are more than characters, some share the last one."""

    def __init__(self, lines: Sequence[str], lenience: Callable[[str], str]) -> None:
        self._lines = [lenience(line) for line in lines]
        self._lenience = lenience
        numbers: dict[str, int] = {}
        for line in self._lines:
            numbers.setdefault(line, len(numbers))
        self._characters = {line: chr(min(number, _LAST_CHARACTER)) for line, number in numbers.items()}
        self._text = "".join([self._characters[line] for line in self._lines])

    def search(self, wanted: Sequence[str], begin: int, end: int | None) -> int | None:
        """The first place from `begin`, and before `end`."""
        lines = [self._lenience(text) for text in wanted]
        if not all(line in self._characters for line in lines):
            return None
        looked_for = "".join([self._characters[line] for line in lines])
        until = len(self._text) if end is None else end + len(lines) - 1
        at = self._text.find(looked_for, begin, until)
        while at >= 0 and chr(_LAST_CHARACTER) in looked_for and self._lines[at : at + len(lines)] != lines:
            at = self._text.find(looked_for, at + 1, until)
        return at if at >= 0 else None


class _Finder:
    """Where the hunks of one file belong, asked in their order. `matched` is how many lines the last one found."""

    matched: int

    def __init__(self, path: str, lines: Sequence[str], num_hunks: int) -> None:
        self._path = path
        self._lines = list(lines)
        self._forms: list[_Form | None] = [None for _ in _LENIENCES]
        self._num_hunks = num_hunks
        self._from = 0
        self.matched = 0

    def find(self, hunk: Hunk, number: int) -> int:
        """The line that it begins with, counted from 0. Raises PatchError."""
        begin, heading = self._from, None
        for text in hunk.headings:
            found = self._search([text], begin)
            if found is None and self._search([text], 0, begin) is None:
                raise self._not_found(hunk, number, begin, [text], "the heading after '@@'")
            if found is not None:
                begin, heading = found + 1, found
        old = list(hunk.old)
        if not old:
            start: int | None = len(self._lines) if heading is None or hunk.at_end else begin
        else:
            start = self._find_old(old, begin, heading, at_end=hunk.at_end)
            while start is None and len(old) > 1 and not old[-1]:  # many write an empty line where a file ends
                old.pop()
                start = self._find_old(old, begin, heading, at_end=hunk.at_end)
        if start is None:
            raise self._not_found(hunk, number, begin, list(hunk.old), "its lines")
        self.matched = len(old)
        self._from = start + len(old)
        return start

    def _find_old(self, old: Sequence[str], begin: int, heading: int | None, *, at_end: bool) -> int | None:
        if at_end and (at := self._search(old, max(begin, len(self._lines) - len(old)))) is not None:
            return at
        if (at := self._search(old, begin)) is not None:
            return at
        # A heading that is also the first line.
        return self._search(old, heading, heading + 1) if heading is not None else None

    def _search(self, wanted: Sequence[str], begin: int, end: int | None = None) -> int | None:
        """The first place from `begin`, and before `end`, in the strictest way in which there is one."""
        for level, lenience in enumerate(_LENIENCES):
            form = self._forms[level]
            if form is None:
                form = self._forms[level] = _Form(self._lines, lenience)
            if (at := form.search(wanted, begin, end)) is not None:
                return at
        return None

    def _not_found(self, hunk: Hunk, number: int, begin: int, wanted: Sequence[str], what: str) -> PatchError:
        name = f"{self._path}: hunk {number} of {self._num_hunks}"
        shown = [f"@@ {heading}" for heading in hunk.headings] + ["".join(line) for line in hunk.lines]
        message = [f"{name} does not fit: {what} cannot be found below line {begin}. {_UNCHANGED}", "The hunk:"]
        message += _some(shown)
        if self._search(wanted, 0) is not None:
            message.append("They are further up: hunks follow the order of the file, and do not overlap.")
        if (near := self._nearest(wanted)) is not None:
            same = sum(_normalised(a) == _normalised(b) for a, b in zip(self._lines[near:], wanted, strict=False))
            message.append(f"The nearest in the file, where {same} of {len(wanted)} lines agree:")
            message += _some(
                [
                    f"{'=' if _normalised(line) == _normalised(text) else '!'} {near + offset + 1}: {line}"
                    for offset, (line, text) in enumerate(zip(self._lines[near:], wanted, strict=False))
                ]
            )
        elif not self._lines:
            message.append("The file is empty.")
        message.append("Write context and removed lines as they are in the file.")
        return PatchError("\n".join(message))

    def _nearest(self, wanted: Sequence[str]) -> int | None:
        """The place with the most lines in common; else that of the line most like the first one with text."""
        looked_for = [_normalised(text) for text in wanted[:_SHOWN_LINES]]
        lines = [_normalised(line) for line in self._lines[: _COMPARED // len(looked_for)]]
        places: dict[str, list[int]] = {}
        for offset, text in enumerate(looked_for):
            if text:
                places.setdefault(text, []).append(offset)
        votes = Counter(
            index - offset for index, line in enumerate(lines) for offset in places.get(line, ()) if index >= offset
        )
        if votes:
            return min(votes, key=lambda start: (-votes[start], start))
        telling = next((text for text in looked_for if text), "")
        alike = difflib.get_close_matches(telling, list(dict.fromkeys(lines[:2000])), n=1, cutoff=0.5)
        return max(0, lines.index(alike[0]) - looked_for.index(telling)) if telling and alike else None


def _some(lines: Sequence[str]) -> list[str]:
    """As many lines as one can read, each as much of it."""
    shown = [f"  {line[:200]}" for line in lines[:_SHOWN_LINES]]
    return shown if len(lines) <= _SHOWN_LINES else [*shown, f"  … and {len(lines) - _SHOWN_LINES} more"]


# --- bytes and text -----------------------------------------------------------------------------------------


def _decoded(path: str, data: bytes) -> str:
    for mark, name in ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if data.startswith(mark):
            raise PatchError(f"{path} is {name} text; only UTF-8 can be patched. {_UNCHANGED}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PatchError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} in line {line}, at offset {error.start}; only text in "
            f"UTF-8 can be patched. {_UNCHANGED}"
        ) from None


def _encoded(path: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PatchError(f"{path}: {text[error.start]!a} is half a character. {_UNCHANGED}") from None


# --- showing ------------------------------------------------------------------------------------------------


def unified_diff(changes: Sequence[Change]) -> str:
    """As `git diff` would show them. What is not text is only named."""
    moved = {change.moved_from for change in changes}
    return "".join(_diff(change, changes) for change in changes if change.after is not None or change.path not in moved)


def _diff(change: Change, changes: Sequence[Change]) -> str:
    before, old_path = change.before, change.path
    if change.moved_from is not None:
        old_path = change.moved_from
        before = next((other.before for other in changes if other.path == old_path), before)
    old, new = f"a/{old_path}", f"b/{change.path}"
    head = f"diff --git {old} {new}\n"
    if change.moved_from is not None:
        head += f"rename from {old_path}\nrename to {change.path}\n"
    elif before is None:
        head, old = head + "new file\n", "/dev/null"
    elif change.after is None:
        head, new = head + "deleted file\n", "/dev/null"
    try:
        was, now = (_diff_lines((data or b"").decode("utf-8")) for data in (before, change.after))
    except UnicodeDecodeError:
        return f"{head}Binary files {old} and {new} differ\n"
    lines = difflib.unified_diff(was, now, fromfile=old, tofile=new, lineterm="")
    return head + "".join(f"{line}\n" for line in lines)


def _diff_lines(text: str) -> list[str]:
    """Lines that tell CR LF from LF, and an end from none."""
    lines = text.split("\n")
    last = lines.pop()
    return lines if not last else [*lines, f"{last}\n\\ No newline at end of file"]
