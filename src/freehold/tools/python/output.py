"""What a call said, put together for the model: text in order, the value, the error, the names of its pictures.

Everything comes from code that may be hostile, and is taken for no more than text. Terminal sequences go, other control
characters are shown and not obeyed, what is too long loses its middle. A picture is one only if its bytes say so.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # titles, links, the clipboard
    r"|\x1b[PX^_][^\x1b\n]*(?:\x1b\\)?"  # strings for devices
    r"|[\x1b\x9b]\[?[0-?]*[ -/]*[@-~]?"  # colours, cursor, everything else
)
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PICTURES = {
    "image/png": (".png", b"\x89PNG\r\n\x1a\n"),
    "image/jpeg": (".jpg", b"\xff\xd8\xff"),
}
_MAX_PICTURE_CHARS = 6 << 20
_MAX_TRACEBACK_LINES = 40
_MAX_TRACEBACK_CHARS = 20_000


def plain(text: str) -> str:
    """Text that a terminal, a log and a tokenizer can be given: printable characters, tabs and newlines."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    if "\r" in text:  # a progress bar: the line's last state counts
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return _HARMFUL.sub(lambda match: ascii(match[0])[1:-1], text)


class Transcript:
    """Collects one call's output. Keeps `max_chars` characters: the first three quarters, and the end."""

    def __init__(self, *, max_chars: int, max_pictures: int) -> None:
        self._max_chars = max_chars
        self._max_pictures = max_pictures
        self._head: list[str] = []
        self._head_left = max_chars * 3 // 4
        self._tail = ""
        self._tail_chars = max_chars - self._head_left
        self._lost_chars = 0
        self._last_kind = ""
        self.pictures: list[tuple[str, bytes]] = []  # file suffix, contents

    def take(self, kind: str, content: Mapping[str, Any]) -> None:
        """One message of the kernel."""
        match kind:
            case "stream":
                self._say("stream", content.get("text"))
            case "error":
                self._say("error", _traceback(content))
            case "execute_result" | "display_data":
                data = content.get("data")
                if isinstance(data, dict) and not self._picture(data):
                    self._say(kind, data.get("text/plain"))

    def oversized(self, size: int) -> None:
        """A message that was not read."""
        self._say("note", f"[{size:,} bytes of output in one piece were left out]")

    def _say(self, kind: str, text: object) -> None:
        if not isinstance(text, str) or not text:
            return
        if self._last_kind and not (kind == self._last_kind == "stream") and not self._ends_line():
            text = "\n" + text
        self._last_kind = kind
        self.add(text)

    def _ends_line(self) -> bool:
        said = self._tail or (self._head[-1] if self._head else "\n")
        return said.endswith("\n")

    def add(self, text: str) -> None:
        """More text; too much of it loses its middle."""
        head, rest = text[: self._head_left], text[self._head_left :]
        if head:
            self._head.append(head)
            self._head_left -= len(head)
        if rest:
            tail = self._tail + rest[-self._tail_chars :] if self._tail_chars else ""
            self._lost_chars += len(self._tail) + len(rest) - min(len(self._tail) + len(rest), self._tail_chars)
            self._tail = tail[-self._tail_chars :] if self._tail_chars else ""

    def _picture(self, data: Mapping[str, Any]) -> bool:
        for media_type, (suffix, magic) in _PICTURES.items():
            encoded = data.get(media_type)
            if isinstance(encoded, str) and len(encoded) <= _MAX_PICTURE_CHARS:
                try:
                    picture = base64.b64decode(encoded)
                except (binascii.Error, ValueError):
                    continue
                if picture.startswith(magic) and len(self.pictures) < self._max_pictures:
                    self.pictures.append((suffix, picture))
                    return True
        return False

    def text(self) -> str:
        """All of it."""
        text = "".join(self._head)
        if self._lost_chars:
            text += f"\n[… {self._lost_chars:,} characters left out …]\n"
        return plain(text + self._tail)


def _traceback(content: Mapping[str, Any]) -> str:
    lines = content.get("traceback")
    if not isinstance(lines, list) or not lines:
        return f"{content.get('ename')}: {content.get('evalue')}"
    text = "\n".join(line for line in lines if isinstance(line, str))
    if len(text) > _MAX_TRACEBACK_CHARS:
        text = text[: _MAX_TRACEBACK_CHARS // 2] + "\n[…]\n" + text[-_MAX_TRACEBACK_CHARS // 2 :]
    lines = [line for line in plain(text).split("\n") if line.strip()]
    if len(lines) > _MAX_TRACEBACK_LINES:
        cut = len(lines) - _MAX_TRACEBACK_LINES
        lines = [*lines[:10], f"  [… {cut} lines left out …]", *lines[10 - _MAX_TRACEBACK_LINES :]]
    return "\n".join(lines)
