"""What sources give: documents as plain text with numbered links, and hits of a search.

Text of a document is text and nothing else. `plain` takes from it what could be read as the browser's own marks: the
brackets 【】 of links and citations become 〖〗, and whatever breaks lines, hides or turns text around goes, so that a
line that begins with `L3:` or `[5]` still has its own number in front of it. `Links` writes the only real brackets.
Nobody may make a `Content` whose text has not been through here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

OPENING, CLOSING, DAGGER = "【", "】", "†"

_MAX_TITLE = 200
_MAX_ADDRESS = 1024  # characters, as in the interface that the model was trained on
_MAX_LINK_TEXT = 300
_MAX_NAME = 80
_ODD = re.compile(r"[^\w.-]+")
_BREAKS = re.compile("\r\n?")
_MARKS = {OPENING: "〖", CLOSING: "〗"}
_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029"  # what else str.splitlines or a terminal takes for a new line
_GONE = (
    *(*range(0x09), *range(0x0E, 0x1C), 0x7F, *range(0x80, 0x85), *range(0x86, 0xA0)),  # control characters
    *(0xAD, 0x200B, 0x2060, 0xFEFF),  # without width
    *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # of writing direction
    *range(0xE0000, 0xE0080),  # tags: invisible letters
)
_CHANGED = {
    **{ord(mark): other for mark, other in _MARKS.items()},
    **{ord(space): " " for space in _SPACES},
    **dict.fromkeys(_GONE, ""),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # half characters, which cannot be encoded
}
# Three, because `re` is ten times slower on one set that reaches beyond 16 bits.
_UNWANTED_ASCII = re.compile("[" + "".join(re.escape(chr(c)) for c in sorted(_CHANGED) if c < 0x80) + "]")
_UNWANTED = re.compile("[" + "".join(re.escape(chr(c)) for c in sorted(_CHANGED) if c < 0x10000) + "]")
_UNWANTED_FAR = re.compile("[\U000e0000-\U000e007f]")
_WHITE = re.compile(r"\s+")
_LINK = re.compile(rf"{OPENING}\d+{DAGGER}([^{OPENING}{CLOSING}{DAGGER}]*)(?:{DAGGER}[^{OPENING}{CLOSING}]*)?{CLOSING}")


def plain(text: str) -> str:
    """Foreign text, without what could be taken for a mark of the browser or end a line unseen."""
    if "\r" in text:
        text = _BREAKS.sub("\n", text)
    if text.isascii():
        is_clean = _UNWANTED_ASCII.search(text) is None
    else:
        is_clean = _UNWANTED.search(text) is None and _UNWANTED_FAR.search(text) is None
    return text if is_clean else text.translate(_CHANGED)


def one_line(text: str, limit: int = _MAX_TITLE) -> str:
    """Foreign text as one short line."""
    line = _WHITE.sub(" ", plain(text[: 4 * limit])).strip()
    return line if len(line) <= limit else line[: limit - 3] + "..."


def shown_address(url: str) -> str:
    """An address as it is shown: readable, on one line, not too long."""
    return one_line(unquote(url, errors="replace"), _MAX_ADDRESS).replace(" ", "%20")


def shown_name(name: str) -> str:
    """A file's name as it is shown; as long as nothing in it is odd, it can be opened by that."""
    return one_line(name, _MAX_ADDRESS)


def source_name(text: str) -> str:
    """What the model may call a source, made of the name of a file or folder."""
    return _ODD.sub("-", text).strip("-.")[:_MAX_NAME] or "files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A document. `url` opens it again and is what a citation names; `shown` is what the model sees of it.

    `text` is plain, with links as `【id†text】`; link `id` leads to `links[id]`. With `own_lines` the lines of `text`
    are those of the file. `page_lines` are where a PDF's pages begin, as line indices.
    """

    url: str
    shown: str
    title: str
    text: str
    links: tuple[str, ...] = ()
    own_lines: bool = False
    page_lines: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A result of a search. `line` is where its text has what was looked for, as a line index; None where unknown."""

    url: str
    title: str
    place: str
    summary: str
    line: int | None = None


class Source(Protocol):
    """Something that can be searched and read. `local` ones send nothing anywhere."""

    @property
    def name(self) -> str: ...

    @property
    def local(self) -> bool: ...

    def has(self, address: str) -> bool:
        """Whether an address, as a link has it or the model writes it, is one of this source."""

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        """The best first. Raises ToolError."""

    async def fetch(self, address: str, *, as_source: bool = False) -> Content:
        """A document; `as_source` before any conversion. Raises ToolError."""

    def close(self) -> None:
        """Give back files and threads."""


class Links:
    """The links of one document, numbered in the order in which they are met; the same target has one number."""

    __slots__ = ("_base", "_domain", "_ids")

    def __init__(self, base_url: str = "") -> None:
        self._base = base_url
        self._domain = _domain(base_url)
        self._ids: dict[str, int] = {}

    def mark(self, target: str, text: str, place: str | None = None) -> str:
        """A link as it stands in the text; `place` is shown with it, by default the domain where it is another one."""
        text = one_line(text, _MAX_LINK_TEXT).replace(DAGGER, "‡")
        if not text:
            text = one_line(PurePosixPath(unquote(urlsplit(target).path)).name or target).replace(DAGGER, "‡") or "link"
        number = self._ids.setdefault(target, len(self._ids))
        if place is None:
            place = _domain(target)
            place = "" if place == self._domain else place
        place = one_line(place, _MAX_LINK_TEXT).replace(DAGGER, "‡")
        return f"{OPENING}{number}{DAGGER}{text}{DAGGER if place else ''}{place}{CLOSING}"

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self._ids)


def without_links(text: str) -> str:
    """The text that a reader sees: each link as its words."""
    return _LINK.sub(r"\1", text) if OPENING in text else text


def link_spans(line: str) -> Sequence[tuple[int, int, int, int]]:
    """Of each link in a line: where it begins, its words begin, its words end, it ends."""
    return [(found.start(), found.start(1), found.end(1), found.end()) for found in _LINK.finditer(line)]


def _domain(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return ""
