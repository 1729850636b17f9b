"""The host's end of a Jupyter kernel: the messages, and the ZeroMQ protocol that carries them, over Unix sockets.

Both are read here, and not by libzmq and jupyter_client, because whoever is at the other end may be hostile: code in
the sandbox holds the kernel's sockets and can say anything on them. So nothing is kept beyond `MAX_BYTES` of a message,
however many parts it has (libzmq gathers them without end), nothing is unpickled, and what is not a message is none.
What is spoken is the NULL mechanism of ZMTP 3.0 (rfc.zeromq.org/spec/23) and version 5.4 of Jupyter's messages, not
signed: a key would be known to the code in the sandbox, and others cannot reach the sockets.
"""

import asyncio
import json
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from freehold.errors import FreeholdError

MAX_BYTES = 8 << 20
_MAX_PARTS = 64
_CHUNK = 1 << 16
_DELIMITER = b"<IDS|MSG>"
_MORE, _LONG, _COMMAND = 1, 2, 4
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


class WireError(FreeholdError):
    """The other end does not speak the protocol, or has gone."""


class Message(NamedTuple):
    """One that was read. `kind` is empty where it was no message, or more than is kept of one."""

    kind: str
    parent: str
    content: Mapping[str, Any]
    size: int


class Wire:
    """One connection to a kernel's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: Path, socket_type: str) -> "Wire":
        """Connect as a DEALER or a SUB, which gets all there is. Raises WireError."""
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError as error:
            raise WireError(f"the kernel's socket does not open ({error.strerror})") from None
        wire = cls(reader, writer)
        try:
            await wire._shake_hands(socket_type)
        except BaseException:
            wire.close()
            raise
        return wire

    async def _shake_hands(self, socket_type: str) -> None:
        name, value = b"Socket-Type", socket_type.encode()
        ready = b"\x05READY" + bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
        self._writer.write(_GREETING + bytes([_COMMAND, len(ready)]) + ready)
        greeting = await self._read(64)
        if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3 or greeting[12:32] != _GREETING[12:32]:
            raise WireError("the kernel does not speak ZMTP 3")
        flags, size = await self._frame_head()
        if not flags & _COMMAND or size > _CHUNK or not (await self._read(size)).startswith(b"\x05READY"):
            raise WireError("the kernel is not ready for ZMTP 3")
        if socket_type == "SUB":
            self._writer.write(b"\x00\x01\x01")  # subscribe to everything

    async def send(self, parts: list[bytes]) -> None:
        """Send a message. Raises WireError."""
        for index, part in enumerate(parts):
            more = _MORE if index + 1 < len(parts) else 0
            head = struct.pack(">BQ", more | _LONG, len(part)) if len(part) > 255 else bytes([more, len(part)])
            self._writer.write(head + part)
        try:
            await self._writer.drain()
        except OSError as error:
            raise WireError(f"the kernel takes no message ({error.strerror})") from None

    async def receive(self) -> Message:
        """The next message. Raises WireError at the end."""
        parts: list[bytes] = []
        size = 0
        while True:
            flags, length = await self._frame_head()
            size += length
            kept = size <= MAX_BYTES and len(parts) < _MAX_PARTS and not flags & _COMMAND
            if kept:
                parts.append(await self._read(length))
            else:
                parts.clear()
                size = max(size, MAX_BYTES + 1)  # nothing more of this message
                await self._skip(length)
            if not flags & _MORE:
                return _read_message(parts, size)

    async def _frame_head(self) -> tuple[int, int]:
        flags = (await self._read(1))[0]
        if flags & ~(_MORE | _LONG | _COMMAND):
            raise WireError("the kernel sent a frame of no known kind")
        if flags & _LONG:
            (length,) = struct.unpack(">Q", await self._read(8))
            return flags, int(length)
        return flags, (await self._read(1))[0]

    async def _skip(self, length: int) -> None:
        while length:
            length -= len(await self._read(min(length, _CHUNK)))

    async def _read(self, length: int) -> bytes:
        try:
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            raise WireError("the kernel has closed its socket") from None

    def close(self) -> None:
        self._writer.transport.abort()


def request(kind: str, content: Mapping[str, Any]) -> tuple[str, list[bytes]]:
    """A message to the kernel, and its id."""
    identity = uuid.uuid4().hex
    header = {
        "msg_id": identity,
        "session": identity,
        "username": "",
        "date": "2026-01-01T00:00:00Z",
        "msg_type": kind,
        "version": "5.4",
    }
    return identity, [_DELIMITER, b"", _packed(header), b"{}", b"{}", _packed(content)]


def _packed(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _read_message(parts: list[bytes], size: int) -> Message:
    try:
        start = parts.index(_DELIMITER)
        header, parent, _, content = (json.loads(part) for part in parts[start + 2 : start + 6])
        kind, parent_id = header["msg_type"], parent.get("msg_id", "")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Message("", "", {}, size)
    if not (isinstance(kind, str) and isinstance(parent_id, str) and isinstance(content, dict)):
        return Message("", "", {}, size)
    return Message(kind, parent_id, content, size)
