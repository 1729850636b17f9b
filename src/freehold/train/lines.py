"""A training file, line by line: each a JSON object, or a piece of plain text, or a reason why it is neither.

Memory holds one line at a time, and a reason is told instead of raised: who reads on can tell all of them. JSON is
taken as its standard has it; what Python's reader would let pass (NaN, a key given twice, a lone surrogate) is refused,
because training would not be on what the file says. Called by `data.py`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from freehold.errors import UsageError

MOST_BYTES = 64 << 20
"""Of a line of JSON."""
_PIECE = 1 << 18  # characters of plain text that are tokenised together, or a few more

_UTF_8, _UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class Line(NamedTuple):
    """Line `number`, from 1 on, of a file, up to byte `end`: what it says, and None where a `problem` is told instead.
    A piece of plain text `goes_on` where another piece follows."""

    path: Path
    number: int
    end: int
    value: dict[str, Any] | None
    problem: str = ""
    goes_on: bool = False


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a .jsonl file that are not blank, or the text of a .txt as objects `{"text": ...}`.

    Raises UsageError for a file that cannot be read at all, or has another ending.
    """
    ending = path.suffix.lower()
    if ending not in (".jsonl", ".txt"):
        raise UsageError(f"{path}: training data are .jsonl or .txt files; convert it, or give it that ending")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is no file but a pipe or a device, and is read more than once; save it to a file")
        with path.open("rb") as file:
            if (begin := file.read(3))[:2] in _UTF_16:
                raise UsageError(f"{path} is UTF-16 text; save it as UTF-8")
            file.seek(len(_UTF_8) if begin == _UTF_8 else 0)
            yield from _json_lines(path, file) if ending == ".jsonl" else _texts(path, file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Line]:
    number = 0
    while data := file.readline(MOST_BYTES + 1):
        number += 1
        if len(data) > MOST_BYTES:
            while data and not data.endswith(b"\n"):
                data = file.readline(MOST_BYTES)
            yield Line(path, number, file.tell(), None, f"is longer than {MOST_BYTES >> 20} MiB; split it")
            continue
        if not data.strip():
            continue
        try:
            yield Line(path, number, file.tell(), _object(data))
        except UsageError as error:
            yield Line(path, number, file.tell(), None, str(error))


def _texts(path: Path, file: BinaryIO) -> Iterator[Line]:
    """A book in pieces. They end in a single line end after which a letter or digit comes: byte-level vocabularies
    split text there, so that the pieces have the tokens of the whole. Where none comes, any line's end has to do."""
    pieces: list[str] = []
    size = first = number = 0
    while data := file.readline():
        number += 1
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            yield Line(path, number, file.tell(), None, _no_utf_8(error))
            continue
        if size >= _PIECE and (size >= 8 * _PIECE or (text[0].isalnum() and not pieces[-1][-2:-1].isspace())):
            yield Line(path, first, file.tell(), {"text": "".join(pieces)}, goes_on=True)
            pieces, size = [], 0
        if not pieces:
            first = number
        pieces.append(text)
        size += len(text)
    if size or os.fstat(file.fileno()).st_size == 0:
        yield Line(path, first or 1, file.tell(), {"text": "".join(pieces)})


# --- JSON ---------------------------------------------------------------------------------------------------


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise UsageError(_no_utf_8(error)) from None
    except json.JSONDecodeError as error:
        raise UsageError(f"is no JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except RecursionError:
        raise UsageError("is nested too deeply; make it flatter") from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError("holds a number of thousands of digits") from None
    if isinstance(value, list):
        raise UsageError("is a list; write each example as an object on a line of its own")
    if not isinstance(value, dict):
        raise UsageError(f'is no object but {json.dumps(value):.40}; an example is {{"messages": [...]}}')
    return value


def _no_utf_8(error: UnicodeDecodeError) -> str:
    return f"is no UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}; save the file as UTF-8"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"key {twice!r:.80} is given twice in one object")
    return value


def _no_number(name: str) -> Any:
    raise UsageError(f"{name} is no JSON; use null or a number")
