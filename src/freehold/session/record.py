"""Turns on disk, event by event, so that they can be shown again and gone on from.

A recording is a JSONL file. Its first line says so, and in which version; then comes, for each turn, a line with what
the user said and one for each event, written as it happens. A process that is killed loses the line that it was writing
and no other. What is read back equals what was written, to the last field; reading makes values of the types named here
and of nothing else, and whatever does not fit them exactly is refused.

Recordings hold all that was said and all that tools gave: a new one is for its user's eyes only.
"""

import fcntl
import json
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from freehold.errors import DiskError, UsageError
from freehold.formats import conversation, events, forms
from freehold.formats.conversation import Message
from freehold.session.generation import Said, SampleDone
from freehold.session.history import Cited, ToolDone, ToolStart, TurnEvent, TurnHistory

_VERSION = 1
_HEAD = {"freehold": "recording", "version": _VERSION}
_MOST_HEAD = 4096  # bytes
_SURROGATE = re.compile("[\ud800-\udfff]")

_KINDS: Mapping[str, type] = {
    "said": Said,
    "sample done": SampleDone,
    "tool start": ToolStart,
    "tool done": ToolDone,
    "cited": Cited,
    "message start": events.MessageStart,
    "reasoning": events.ReasoningDelta,
    "text": events.TextDelta,
    "other": events.OtherDelta,
    "call start": events.CallStart,
    "arguments": events.ArgumentsDelta,
    "call done": events.CallDone,
    "message done": events.MessageDone,
    "turn done": events.TurnDone,
    "diagnostic": events.Diagnostic,
    "text part": conversation.Text,
    "system part": conversation.SystemContent,
    "developer part": conversation.DeveloperContent,
    "free text": forms.FreeText,
    "regex": forms.Regex,
    "lark": forms.Lark,
}
"""What each type is called where one of several can stand; a name is never used again for another type."""
_NAMES = {type_: name for name, type_ in _KINDS.items()}


# --- writing ------------------------------------------------------------------------------------------------


class Recorder:
    """Appends turns to a recording, or to a new one. One at a time holds a file."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError for a file that is no recording, or that somebody else is writing; DiskError for one that
        cannot be opened."""
        self._path = path
        self._began = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failed(error) from None
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self._path} is being recorded to already; give another name") from None
        except OSError as error:
            raise self._failed(error) from None
        try:
            head = os.pread(self._file, _MOST_HEAD, 0)
            if b"\n" in head or len(head) == _MOST_HEAD:
                _check_head(self._path, head.partition(b"\n")[0])
                os.ftruncate(self._file, self._whole())
                return
        except OSError as error:
            raise self._failed(error) from None
        if not _line(_HEAD).startswith(head):
            raise UsageError(f"{self._path} is no recording; give a new name")
        self._truncate(0)
        self._write(_HEAD)

    def _whole(self) -> int:
        """How long the file is without a line that was not finished."""
        end = os.fstat(self._file).st_size
        while end:
            start = max(0, end - (1 << 16))
            if (last := os.pread(self._file, end - start, start).rfind(b"\n")) >= 0:
                return start + last + 1
            end = start
        return 0

    def begin(self, messages: Sequence[Message]) -> None:
        """A turn begins: what the user says in it, with what stands before that in a conversation's first turn."""
        self._write({"asked": [_encode(message, Message) for message in messages]})
        self._began = True

    def take(self, event: TurnEvent) -> None:
        """The turn's next event. It is in the file when this returns. Raises DiskError where it cannot be."""
        assert self._began, "events belong to a turn: begin one"
        self._write({"event": _encode(event, TurnEvent)})

    def _write(self, value: Any) -> None:
        data = memoryview(_line(value))
        before = None
        try:
            before = os.fstat(self._file).st_size
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            if before is not None:
                self._truncate(before)  # no half a line in the middle
            raise self._failed(error) from None

    def _truncate(self, length: int) -> None:
        try:
            os.ftruncate(self._file, length)
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> DiskError:
        return DiskError(f"{self._path} cannot be written: {error.strerror or error}")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:  # only a tool's schema can be anything
        raise UsageError(f"this cannot be recorded: {error}") from None
    # Names of files may have halves of characters, which are no UTF-8.
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode() + b"\n"


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTurn:
    """`asked` is what the user said; `events` is what came of it, up to where the recording ends."""

    asked: tuple[Message, ...]
    events: tuple[TurnEvent, ...]

    @property
    def is_complete(self) -> bool:
        """Whether it came to its end, rather than being broken off."""
        return any(isinstance(event, SampleDone) for event in self.events)

    def history(self) -> tuple[Message, ...]:
        """What the user said, and what a conversation keeps of the turn: with an answer for each call, but for those of
        the caller's own functions that a complete turn ended in."""
        kept = TurnHistory()
        for event in self.events:
            kept.take(event)
        return (*self.asked, *kept.cut())


def read_recording(path: Path) -> list[RecordedTurn]:
    """All turns, in order. A last line that was not finished is left out. Raises UsageError, naming file and line, for
    anything else that no `Recorder` writes."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # what comes after the last end of a line is none
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    if not lines:
        raise UsageError(f"{path} is no recording: its first line does not say so")
    _check_head(path, lines[0])
    turns: list[tuple[tuple[Message, ...], list[TurnEvent]]] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            key, value = _entry(line)
            if key == "asked":
                turns.append((_decode(value, tuple[Message, ...]), []))
            elif not turns:
                raise UsageError("an event comes before any turn")
            else:
                turns[-1][1].append(_decode(value, TurnEvent))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
    return [RecordedTurn(asked=asked, events=tuple(came)) for asked, came in turns]


def _check_head(path: Path, line: bytes) -> None:
    try:
        head = json.loads(line.decode())
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict) or head.get("freehold") != "recording":
        raise UsageError(f"{path} is no recording: its first line does not say so")
    if head != _HEAD:
        raise UsageError(
            f"{path}, line 1: version {head.get('version')!r:.40} of recordings is not known; {_VERSION} is"
        )


def _entry(line: bytes) -> tuple[str, Any]:
    value = json.loads(line.decode(), parse_constant=_refuse)
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"asked", "event"}:
        raise UsageError("a line has either what was asked or an event")
    ((key, inner),) = value.items()
    return key, inner


def _refuse(name: str) -> Any:
    raise UsageError(f"{name} is no JSON")


# --- values, by their types -----------------------------------------------------------------------------------


def _encode(value: Any, type_: Any) -> Any:
    """`value`, which is of this type, in JSON. Fields that have their default are left out."""
    if _is_union(type_):
        if value is None:
            return None
        members = [member for member in get_args(type_) if member is not types.NoneType]
        named = [member for member in members if member in _NAMES]
        if named:
            return {"kind": _NAMES[type(value)], **_encode(value, type(value))}
        return _encode(value, members[0])
    if is_dataclass(type_):
        kind: Any = type(value)
        hints = _hints(kind)
        return {
            field.name: _encode(part, hints[field.name])
            for field in fields(type_)
            if not _is_default(field, part := getattr(value, field.name))
        }
    if _is_named_tuple(type_):
        return [_encode(part, hint) for part, hint in zip(value, _hints(type_).values(), strict=True)]
    if get_origin(type_) is tuple:
        return [_encode(part, hint) for part, hint in zip(value, _hints_of_tuple(type_, len(value)), strict=True)]
    if type_ is float:
        return value if math.isfinite(value) else str(float(value))
    if get_origin(type_) is Mapping:
        return dict(value)
    return str(value) if type_ is Path else value


def _decode(raw: Any, type_: Any) -> Any:
    """The other way round. Raises UsageError for what `_encode` does not make of a value of this type."""
    if _is_union(type_):
        return _decode_union(raw, type_)
    if is_dataclass(type_):
        return _decode_fields(_checked(raw, dict, type_), type_)
    if _is_named_tuple(type_) or get_origin(type_) is tuple:
        raws = _checked(raw, list, type_)
        parts = _hints(type_).values() if _is_named_tuple(type_) else _hints_of_tuple(type_, len(raws))
        if len(parts) != len(raws):
            raise UsageError(f"{len(parts)} values belong here, got {raw!r:.80}")
        values = [_decode(part, hint) for part, hint in zip(raws, parts, strict=True)]
        return type_(*values) if _is_named_tuple(type_) else tuple(values)
    if get_origin(type_) is Literal:
        if not isinstance(raw, str) or raw not in get_args(type_):
            raise UsageError(f"{raw!r:.80} is none of {', '.join(map(str, get_args(type_)))}")
        return raw
    if type_ is float:
        if raw in ("inf", "-inf", "nan"):
            return float(raw)
        return raw if type(raw) is int else _checked(raw, float, type_)
    if type_ is Path:
        return Path(_checked(raw, str, type_))
    return _checked(raw, dict if get_origin(type_) is Mapping else type_, type_)


def _decode_union(raw: Any, type_: Any) -> Any:
    members = get_args(type_)
    if raw is None and types.NoneType in members:
        return None
    members = tuple(member for member in members if member is not types.NoneType)
    if not any(member in _NAMES for member in members):
        return _decode(raw, members[0])
    inner = dict(_checked(raw, dict, type_))
    name = inner.pop("kind", None)
    found = _KINDS.get(name) if isinstance(name, str) else None
    if found is None or found not in members:
        raise UsageError(f"{name!r:.80} is none of {', '.join(_NAMES[member] for member in members)}")
    return _decode(inner, found)


def _decode_fields(raw: dict[str, Any], type_: Any) -> Any:
    hints = _hints(type_)
    if unknown := [key for key in raw if key not in hints]:
        raise UsageError(f"{type_.__name__} has no field {unknown[0]!r:.80}")
    missing = [field.name for field in fields(type_) if field.default is MISSING and field.name not in raw]
    if missing:
        raise UsageError(f"{type_.__name__} lacks {missing[0]}")
    return type_(**{key: _decode(value, hints[key]) for key, value in raw.items()})


def _checked(raw: Any, kind: type, meant: Any) -> Any:
    if type(raw) is not kind:
        raise UsageError(f"{raw!r:.80} is no {getattr(meant, '__name__', meant)}")
    return raw


def _is_union(type_: Any) -> bool:
    return get_origin(type_) in (Union, types.UnionType)


def _is_named_tuple(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, tuple) and hasattr(type_, "_fields")


def _is_default(field: "Field[Any]", value: Any) -> bool:
    return type(value) is type(field.default) and bool(value == field.default)


@cache
def _hints(type_: Any) -> dict[str, Any]:
    return get_type_hints(type_)


def _hints_of_tuple(type_: Any, length: int) -> list[Any]:
    hints = get_args(type_)
    return [hints[0]] * length if hints[1:] == (Ellipsis,) else list(hints)
