"""`multipart/form-data` as it comes: `feed(bytes)` gives what is complete, and nothing is held but a header, or a few
bytes that may begin the next boundary.

Read strictly, because what two readers could take for two things is a way in: the body begins with its boundary, lines
end in CR LF, every part is `form-data` with one name. Refused: files within files, transfer encodings, more headers or
parts than a form has. Knows neither what a form means nor where a file goes. Called by the endpoints that take uploads.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from freehold.errors import UsageError

_MOST_HEADER_BYTES = 8 << 10
_MOST_PARTS = 16
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_TYPE = re.compile(
    rb'multipart/form-data\s*;\s*boundary=(?:"(?P<quoted>[^"\r\n]{1,70})"|(?P<plain>[^\s;",]{1,70}))\s*', re.IGNORECASE
)
_DISPOSITION = re.compile(r'form-data\s*((?:;\s*[a-z]+\*?=(?:"(?:[^"\\\r\n]|\\.)*"|[^\s;"]+)\s*)*)', re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([a-z]+\*?)=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s;"]+))', re.IGNORECASE)
_ESCAPES = {"%22": '"', "%0D": "\r", "%0A": "\n"}
"""What HTML's forms, and httpx, write in names for what cannot stand there."""


class Part(NamedTuple):
    """A part begins. `filename` is None for a plain field."""

    name: str
    filename: str | None


class Data(NamedTuple):
    """Some more of the part that began last."""

    data: bytes


def boundary_of(content_type: bytes) -> bytes | None:
    """What separates the parts, or None where this is no type of a form that could be read."""
    found = _TYPE.fullmatch(content_type)
    if found is None:
        return None
    boundary = found["quoted"] or found["plain"]
    return boundary if _BOUNDARY.fullmatch(boundary.decode("latin-1")) else None


class FormReader:
    """Raises UsageError, in words that quote nothing of the body, for what is no form."""

    def __init__(self, boundary: bytes) -> None:
        self._separator = b"\r\n--" + boundary
        self._held = bytearray(b"\r\n")  # as if a line had ended: the first boundary is like all others
        self._state = "preamble"
        self._num_parts = 0

    def feed(self, data: bytes) -> Iterator[Part | Data]:
        """What these bytes bring, to be read to its end before the next ones are fed."""
        self._held += data
        while (more := self._step()) is not None:
            if more:
                yield more

    def flush(self) -> None:
        """The body has ended."""
        if self._state != "end":
            raise UsageError("the form is not complete: its last boundary is missing")

    def _step(self) -> Part | Data | tuple[()] | None:
        """One thing more; () where there is nothing to tell of it, None where more bytes are needed."""
        match self._state:
            case "preamble":
                if len(self._held) < len(self._separator):
                    return None
                if not self._held.startswith(self._separator):
                    raise UsageError("the form does not begin with its boundary")
                return self._go_on("after boundary", len(self._separator))
            case "after boundary":
                if len(self._held) < 2:
                    return None
                if self._held.startswith(b"--"):
                    return self._go_on("end", 2)
                if not self._held.startswith(b"\r\n"):
                    raise UsageError("a boundary of the form does not stand on a line of its own")
                return self._go_on("headers", 2)
            case "headers":
                return self._headers()
            case "data":
                return self._data()
        if bytes(self._held) not in (b"", b"\r", b"\r\n"):
            raise UsageError("there is something after the end of the form")
        return None

    def _go_on(self, state: str, num_bytes: int) -> tuple[()]:
        self._state = state
        del self._held[:num_bytes]
        return ()

    def _headers(self) -> Part | None:
        end = self._held.find(b"\r\n\r\n")
        if end > _MOST_HEADER_BYTES or (end < 0 and len(self._held) > _MOST_HEADER_BYTES):
            raise UsageError(f"the headers of a part have more than {_MOST_HEADER_BYTES} bytes")
        if end < 0:
            return None
        self._num_parts += 1
        if self._num_parts > _MOST_PARTS:
            raise UsageError(f"the form has more than {_MOST_PARTS} parts")
        part = _part(bytes(self._held[:end]))
        self._go_on("data", end + 4)
        return part

    def _data(self) -> Data | tuple[()] | None:
        end = self._held.find(self._separator)
        if end == 0:
            return self._go_on("after boundary", len(self._separator))
        if end < 0:
            end = len(self._held) - len(self._separator) + 1  # the rest may be where a boundary begins
        if end <= 0:
            return None
        data = Data(bytes(self._held[:end]))
        del self._held[:end]
        return data


def _part(headers: bytes) -> Part:
    found: Part | None = None
    for line in headers.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon or line[:1] in b" \t":
            raise UsageError("a header of a part is none")
        match name.strip().lower():
            case b"content-disposition":
                if found is not None:
                    raise UsageError("a part of the form has two names")
                found = _named(value.strip())
            case b"content-type":
                if value.strip().lower().startswith(b"multipart/"):
                    raise UsageError("a part of the form is a form itself; send each file as a part of its own")
            case b"content-transfer-encoding":
                if value.strip().lower() not in (b"binary", b"8bit", b"7bit"):
                    raise UsageError("a part of the form is encoded; send its bytes as they are")
    if found is None:
        raise UsageError("a part of the form has no Content-Disposition")
    return found


def _named(value: bytes) -> Part:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError("the name of a part is not UTF-8") from None
    found = _DISPOSITION.fullmatch(text)
    parameters: dict[str, str] = {}
    for name, quoted, plain in _PARAMETER.findall(found[1]) if found else ():
        if name.lower() in parameters:
            raise UsageError("the Content-Disposition of a part says something twice")
        parameters[name.lower()] = _unescaped(quoted) if quoted else plain
    if "name" not in parameters:
        raise UsageError("a part of the form has no name")
    if "filename*" in parameters:
        raise UsageError("'filename*' is no part of forms; send the name as 'filename', in UTF-8")
    return Part(parameters["name"], parameters.get("filename"))


def _unescaped(text: str) -> str:
    text = re.sub(r"\\([\"\\])", r"\1", text)
    return re.sub("%22|%0D|%0A", lambda found: _ESCAPES[found[0].upper()], text, flags=re.IGNORECASE)
