"""A document as the model sees it: lines of at most 80 columns, numbered from 0, part of them at a time.

The display is the one that gpt-oss was trained on: `[cursor] title (address)`, `**viewing lines [a - b] of c**`, an
empty line, then `L0: `, `L1: URL: …` and the text. A page knows which lines of the source each of its lines stands
for, which is what citations are resolved with. Knows nothing of sources, and does not wait for anything.
"""

import textwrap
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple
from urllib.parse import quote

from freehold.tools.base import ToolError
from freehold.tools.browser.content import Content, Hit, Links, link_spans, one_line, plain

WIDTH = 80
_MAX_MATCHES = 50
_LINES_OF_MATCH = 4
_LONG = 4000
_MAX_QUERY = 200

CutTokens = Callable[[str, int], str]
"""The beginning of a text that is so many tokens long, or all of it."""


class Target(NamedTuple):
    """Where a link leads; `line` is the line of the text to show there, or the line of the page if `is_display`."""

    url: str
    line: int | None = None
    is_display: bool = False


class Passage(NamedTuple):
    """Lines of a source, counted from 1."""

    url: str
    title: str
    first_line: int
    last_line: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Lines of a page from `start` on, up to the next part, that come from one document; no url: from none."""

    start: int
    url: str
    title: str
    page_lines: tuple[int, ...] = ()


class Page:
    """One document, list of results, or list of matches."""

    __slots__ = (
        "_goes_on",
        "_numbers",
        "_parts",
        "_text_start",
        "is_dropped",
        "is_matches",
        "lines",
        "shown",
        "targets",
        "title",
        "url",
    )

    def __init__(self, *, url: str, shown: str, title: str, targets: Sequence[Target], is_matches: bool) -> None:
        """Use `of_content`, `of_hits` or `find`."""
        self.url, self.shown, self.title = url, shown, title
        self.targets = targets
        self.is_matches, self.is_dropped = is_matches, False
        self.lines: list[str] = []
        self._numbers = array("I")  # of the source's lines, from 1; 0 where a line comes from none
        self._goes_on = bytearray()  # whether a line is the rest of the one before it
        self._parts: list[_Part] = []
        self._text_start = 0

    @classmethod
    def of_content(cls, content: Content) -> "Page":
        targets = [Target(url) for url in content.links]
        page = cls(url=content.url, shown=content.shown, title=content.title, targets=targets, is_matches=False)
        page._part("", "")
        page._add("", 0)
        page._add(f"URL: {content.shown}", 0)
        page._text_start = len(page.lines)
        page._part(content.url, content.title, content.page_lines)
        for number, line in enumerate(content.text.split("\n"), 1):
            page._add(line, number)
        return page

    @classmethod
    def of_hits(cls, query: str, hits: Sequence[Hit]) -> "Page":
        links = Links()
        page = cls(url="", shown="", title=one_line(query, _MAX_QUERY), targets=(), is_matches=False)
        page._part("", "")
        for line in ("", "URL: ", "# Search Results", ""):
            page._add(line, 0)
        targets: dict[int, Target] = {}
        for hit in hits:
            mark = links.mark(hit.url, hit.title, hit.place)
            targets[len(links.targets) - 1] = Target(hit.url, hit.line)
            page._part(hit.url, hit.title)
            page._add(f"  * {mark} {one_line(hit.summary, 1000)}".rstrip(), (hit.line or 0) + 1)
        if not hits:
            page._add("Nothing was found. Try other words, or fewer of them.", 0)
        page.targets = [targets[number] for number in range(len(targets))]
        return page

    def _part(self, url: str, title: str, page_lines: tuple[int, ...] = ()) -> None:
        self._parts.append(_Part(len(self.lines), url, title, page_lines))

    def _add(self, line: str, number: int) -> None:
        pieces = [line] if len(line) <= WIDTH and "\t" not in line else _wrapped(line)
        self.lines.extend(pieces)
        self._numbers.extend([number] * len(pieces))
        self._goes_on.extend([0] + [1] * (len(pieces) - 1))

    @property
    def size(self) -> int:
        """Characters, about."""
        return sum(map(len, self.lines)) + 64 * len(self.lines)

    def drop(self) -> None:
        """Forget the text. What citations need stays."""
        self.lines, self.targets, self.is_dropped = [], (), True

    def line_of(self, target: Target) -> int:
        """The line to begin with, so that what the target is about stands a little below the top."""
        if target.line is None:
            return 0
        line = target.line
        if not target.is_display:
            line = self._text_start + bisect_right(self._numbers[self._text_start :], line)
        line = min(line, len(self.lines) - 1)
        return line - 4 if line > 4 else line

    def show(self, cursor: int, *, loc: int, num_lines: int, view_tokens: int, max_tokens: int, cut: CutTokens) -> str:
        """The display from line `loc` on: `num_lines` lines, up to `max_tokens`, or what fits into `view_tokens`.

        The last line is whole, and one line is always shown. Raises ToolError where there is no line `loc`.
        """
        last = len(self.lines) - 1
        if loc > last:
            raise ToolError(f"Invalid location parameter: `{loc}`. Cannot exceed page maximum of {last}.")
        tokens = view_tokens if num_lines <= 0 else max_tokens
        end = len(self.lines) if num_lines <= 0 else min(loc + num_lines, len(self.lines))
        numbered, size = [], 0
        for index in range(loc, end):
            numbered.append(f"L{index}: {self.lines[index]}")
            size += len(numbered[-1]) + 1
            if size > 128 * tokens:  # no token is longer
                break
        body = "\n".join(numbered)
        if len(body) > tokens:  # none is shorter than a character
            numbered = numbered[: cut(body, tokens).count("\n") + 1]
            body = "\n".join(numbered)
        address = f" ({self.shown})" if self.shown else ""
        viewing = f"viewing lines [{loc} - {loc + len(numbered) - 1}] of {last}"
        return f"[{cursor}] {self.title}{address}\n**{viewing}**\n\n{body}"

    def find(self, pattern: str) -> "Page":
        """The places that have `pattern`, whatever its case; across the ends of wrapped lines too."""
        pattern = plain(pattern)
        label = one_line(pattern, _MAX_QUERY)
        found = Page(
            url=f"{self.url}/find?pattern={quote(label)}",
            shown=f"{self.shown}/find?pattern={label}",
            title=f"Find results for text: `{label}` in `{self.title}`",
            targets=(),
            is_matches=True,
        )
        matches = self._matches(pattern)
        for number, line in enumerate(matches):
            if number:
                found._part("", "")
                found._add("", 0)
            part = self._part_at(line)
            found._parts.append(_Part(len(found.lines), part.url, part.title, part.page_lines))
            found._add(f"# 【{number}†match at L{line}】", self._numbers[line])
            for shown in range(line, min(line + _LINES_OF_MATCH, len(self.lines))):
                found.lines.append(_words(self.lines[shown]))
                found._numbers.append(self._numbers[shown])
                found._goes_on.append(0)
        if not matches:
            found._part("", "")
            found._add(f"No `find` results for pattern: `{label}`", 0)
        found.targets = [Target(self.url, line, True) for line in matches]
        return found

    def _matches(self, pattern: str) -> list[int]:
        wanted, after, index = pattern.lower(), 0, 0
        matches: list[int] = []
        while index < len(self.lines) and len(matches) < _MAX_MATCHES:
            end = index + 1
            while end < len(self.lines) and self._goes_on[end]:
                end += 1
            pieces = self.lines[index:end]
            for line in _lines_with(wanted, pieces):
                if index + line >= after and len(matches) < _MAX_MATCHES:
                    matches.append(index + line)
                    after = index + line + _LINES_OF_MATCH
            index = end
        return matches

    def passage(self, first: int, last: int) -> Passage | None:
        """What lines `first` to `last` of this page stand for; None if for nothing, or there are no such lines."""
        last = min(last, len(self._numbers) - 1)
        while first <= last and not self._numbers[first]:
            first += 1
        if first > last:
            return None
        index = self._part_index(first)
        part = self._parts[index]
        if not part.url:
            return None
        numbers: set[int] = set()
        for number, each in enumerate(self._parts[index:], index):
            if each.start > last:
                break
            end = self._parts[number + 1].start if number + 1 < len(self._parts) else last + 1
            if each.url == part.url:
                numbers.update(self._numbers[max(each.start, first) : min(end, last + 1)])
        numbers.discard(0)
        url = part.url
        if part.page_lines:
            url += f"#page={max(1, bisect_right(part.page_lines, self._numbers[first] - 1))}"
        return Passage(url, part.title, min(numbers), max(numbers))

    def _part_at(self, line: int) -> _Part:
        return self._parts[self._part_index(line)]

    def _part_index(self, line: int) -> int:
        return bisect_right(self._parts, line, key=lambda part: part.start) - 1


def _wrapped(line: str) -> list[str]:
    pieces: list[str] = []
    while line:
        end = len(line)
        if end > _LONG:  # textwrap's time grows with the square of a word's length
            end = line.rfind(" ", 0, _LONG) + 1 or _LONG
        pieces += textwrap.wrap(line[:end], WIDTH, replace_whitespace=False, drop_whitespace=False)
        line = line[end:] if end < len(line) else ""
    return pieces or [""]


def _words(line: str) -> str:
    """A line of a list of matches: links as their words, and what is left of links that end on another line."""
    spans = link_spans(line)
    for start, begin, end, stop in reversed(spans):
        line = line[:start] + line[begin:end] + line[stop:]
    head, closing, tail = line.partition("】")
    if closing and "【" not in head:
        line = head.partition("†")[0] + tail
    head, opening, tail = line.rpartition("【")
    if opening:
        parts = tail.split("†")
        line = head + (parts[1] if len(parts) > 1 else "")
    return line


def _lines_with(wanted: str, pieces: Sequence[str]) -> Sequence[int]:
    """Which pieces of one wrapped line have the beginning of a match, in the text that a reader sees."""
    whole = "".join(pieces)
    visible: list[str] = []  # stretches of what is seen
    origins: list[int] = []  # where they begin in `whole`
    position = 0
    for start, begin, end, stop in link_spans(whole):
        visible += [whole[position:start], whole[begin:end]]
        origins += [position, begin]
        position = stop
    visible.append(whole[position:])
    origins.append(position)
    # Lowering the case may change lengths (İ): then positions are guessed, a few characters off at most.
    text = "".join(visible).lower()
    if not wanted or wanted not in text:
        return []
    starts = [0, *accumulate(map(len, visible))]
    ends = [*accumulate(map(len, pieces))]
    found: list[int] = []
    at = text.find(wanted)
    while at >= 0:
        part = min(bisect_right(starts, at), len(origins)) - 1
        origin = origins[part] + at - starts[part]
        line = min(bisect_right(ends, origin), len(pieces) - 1)
        if not found or found[-1] != line:
            found.append(line)
        at = text.find(wanted, at + len(wanted))
    return found
