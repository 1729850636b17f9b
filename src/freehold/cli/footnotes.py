"""Citations as footnotes: `【0†L8-L10】` in an answer becomes `[1]`, and what it leads to stands below.

Streaming: `feed` holds back what may become a citation until it is one, or is not. What a citation leads to is known
only when the answer is whole; one that leads to nothing says so.
"""

import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from freehold.tools.base import Citation

_OPEN, _CLOSE = "【", "】"
_CITES = re.compile(r"【\d{1,6}†[^【】]{0,240}】")
_LONGEST = 256


class Footnotes:
    """Of one conversation: the same citation has the same number in one answer."""

    def __init__(self) -> None:
        self._held = ""
        self._text = ""  # of this message, as the model wrote it
        self._numbers: dict[str, int] = {}
        self._found: dict[int, Citation] = {}

    def feed(self, text: str) -> str:
        """What can be shown now."""
        self._text += text
        self._held += text
        shown, self._held = self._split(self._held)
        return _CITES.sub(self._numbered, shown)

    def flush(self) -> str:
        """The rest of the message."""
        rest, self._held = self._held, ""
        return _CITES.sub(self._numbered, rest)

    def take(self, citations: Sequence[Citation]) -> None:
        """What the message's citations lead to; after all of its text was fed."""
        for citation in citations:
            number = self._numbers.get(self._text[citation.start : citation.end])
            if number is not None:
                self._found[number] = citation

    def notes(self) -> list[str]:
        """A line for each footnote of the message, which is over with this."""
        lines = [f"[{number}] {self._place(number)}" for number in self._numbers.values()]
        self._text = self._held = ""
        self._numbers.clear()
        self._found.clear()
        return lines

    @staticmethod
    def _split(text: str) -> tuple[str, str]:
        """What is surely text, and the rest, which may become a citation."""
        start = text.rfind(_OPEN)
        if start < 0 or _CLOSE in text[start:] or len(text) - start > _LONGEST:
            return text, ""
        return text[:start], text[start:]

    def _numbered(self, match: re.Match[str]) -> str:
        return f"[{self._numbers.setdefault(match[0], len(self._numbers) + 1)}]"

    def _place(self, number: int) -> str:
        citation = self._found.get(number)
        if citation is None:
            return "leads to nothing that was shown"
        first, last = citation.first_line, citation.last_line
        lines = f"{first}-{last}" if last > first else f"{first}"
        parts = urlsplit(citation.url)
        if parts.scheme == "file":
            return f"{unquote(parts.path)}:{lines}"
        return f"{citation.url} (lines {lines})" + (f": {citation.title}" if citation.title else "")
