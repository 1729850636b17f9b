"""Filters for system calls: small programs in classic BPF that the kernel runs before each call.

`program` joins pieces into a filter, made of the functions here. A piece looks at the number of the call, which is
loaded, and either decides or falls through to the next; jumps count instructions to skip. Numbers are a machine's own:
whoever writes a filter names them for both. It installs nothing: airgap does so for its own process, and bubblewrap for
the sandbox of the python tool.
"""

import platform
import struct
import sys
from typing import NamedTuple

ALLOW = 0x7FFF0000
X32 = 0x40000000  # set in the numbers of the x32 system calls, which share x86_64's architecture

_LOAD, _JUMP, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _JUMP_IF_ANY, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data; both machines are little-endian


class Architectures(NamedTuple):
    """A machine's own, and that of the 32-bit calls it takes as well."""

    native: int
    old: int
    x32: bool


_ARCHITECTURES = {
    "x86_64": Architectures(0xC000003E, 0x40000003, True),
    "aarch64": Architectures(0xC00000B7, 0x40000028, False),
}


def architectures() -> Architectures | None:
    """This machine's, or None where no filter can be made."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None
    return _ARCHITECTURES.get(platform.machine())


def program(of: Architectures, native: bytes, old: bytes, *, error: int) -> bytes:
    """The filter: pieces for the calls of the two architectures, which are allowed what no piece decides; the calls of
    any other architecture, x32's among them, fail with `error`."""
    x32 = at_least(X32, error) if of.x32 else b""
    native = _step(_LOAD, _NUMBER_AT) + x32 + native + _step(_RETURN, ALLOW)
    old = _step(_LOAD, _NUMBER_AT) + old + _step(_RETURN, ALLOW)
    return (
        _step(_LOAD, _ARCHITECTURE_AT)
        + _when_equal(of.native, native)
        + _when_equal(of.old, old)
        + _step(_RETURN, _failing(error))
    )


def refuse(error: int, *numbers: int) -> bytes:
    """These calls fail with `error`."""
    return b"".join(_when_equal(number, _step(_RETURN, _failing(error))) for number in numbers)


def at_least(number: int, error: int) -> bytes:
    """Calls of this number and above fail with `error`."""
    return _step(_JUMP_IF_AT_LEAST, number, 0, 1) + _step(_RETURN, _failing(error))


def only(error: int, number: int, argument: int, *values: int) -> bytes:
    """The call is allowed where the low half of its argument (the first is 0) is one of `values`, else it fails."""
    allowed = b"".join(_when_equal(value, _step(_RETURN, ALLOW)) for value in values)
    return _when_equal(number, _argument(argument) + allowed + _step(_RETURN, _failing(error)))


def none_of(error: int, number: int, argument: int, *values: int | range) -> bytes:
    """The call fails where the low half of its argument is one of `values`, or lies in one, else it is allowed."""
    failing = _step(_RETURN, _failing(error))
    refused = b"".join(
        _step(_JUMP_IF_AT_LEAST, value.start, 0, 2) + _step(_JUMP_IF_AT_LEAST, value.stop, 1, 0) + failing
        if isinstance(value, range)
        else _when_equal(value, failing)
        for value in values
    )
    return _when_equal(number, _argument(argument) + refused + _step(_RETURN, ALLOW))


def without_bits(error: int, number: int, argument: int, bits: int) -> bytes:
    """The call fails where its argument has any of these of its low 32 bits set, else it is allowed."""
    refused = _step(_JUMP_IF_ANY, bits, 0, 1) + _step(_RETURN, _failing(error))
    return _when_equal(number, _argument(argument) + refused + _step(_RETURN, ALLOW))


def _when_equal(value: int, piece: bytes) -> bytes:
    """The piece, skipped where what is loaded is something else. It has to decide: it may load something itself."""
    size = len(piece) // 8
    if size < 256:
        return _step(_JUMP_IF_EQUAL, value, 0, size) + piece
    return _step(_JUMP_IF_EQUAL, value, 1, 0) + _step(_JUMP, size) + piece  # conditional jumps are short


def _argument(index: int) -> bytes:
    return _step(_LOAD, _ARGUMENTS_AT + 8 * index)


def _failing(error: int) -> int:
    return 0x00050000 | error


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
