"""How much a session of the python tool may take."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from freehold.errors import UsageError

_VALUE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?(|KiB|MiB|GiB)")
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Raises UsageError for a value that no sandbox can keep to.

    seconds: of a call, from when the kernel is up; all processors at once, so processor time is a multiple of it.
    memory_bytes: of each process (an allocation beyond fails) and of all together (the kernel is ended), without what
        lies in /tmp and /dev/shm, which is `scratch_bytes` each, a file taking 4 KiB at least.
    processes: and threads, all together. More than half as many processes must not be left behind by a call.
    disk_bytes, files: in /mnt/data; also the size of any one file.
    output_chars: of a result. More loses its middle.
    output_bytes: that a call may say before it is interrupted.
    """

    seconds: float = 120.0
    memory_bytes: int = 2 << 30
    scratch_bytes: int = 256 << 20
    processes: int = 128
    disk_bytes: int = 1 << 30
    files: int = 10_000
    output_chars: int = 20_000
    output_bytes: int = 32 << 20
    pictures: int = 16
    start_seconds: float = 30.0

    def __post_init__(self) -> None:
        least = {"memory_bytes": 128 << 20, "scratch_bytes": 1 << 20, "processes": 16, "output_chars": 100}
        for field in fields(Limits):
            value, lowest = getattr(self, field.name), least.get(field.name, 0)
            if not lowest <= value < 2**62 or value == 0:
                raise UsageError(
                    f"the python tool's {field.name} cannot be {value}: give "
                    + (f"{lowest} or more" if lowest else "a number above 0")
                )


def read_limits(texts: Sequence[str]) -> dict[str, float | int]:
    """Limits by name, from texts such as `seconds=300` and `memory_bytes=4GiB`. Raises UsageError."""
    kinds = {field.name: field.type for field in fields(Limits)}
    given: dict[str, float | int] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise UsageError(f"the python tool has no limit {name!r:.40}; it has {', '.join(kinds)}")
        number = _VALUE.fullmatch(value)
        if number is None:
            raise UsageError(f"{text!r:.80}: give a number, for bytes also with KiB, MiB or GiB behind it")
        amount_given = float(number[1]) * _UNITS[number[2]]
        given[name] = amount_given if kinds[name] is float else int(amount_given)
    return given


def amount(size: int) -> str:
    """Bytes for people."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}".replace(".0 ", " ")
    return f"{size} bytes"
