"""Cached prefixes on disk, so that a long system prompt outlives the process.

One safetensors file for each: the pages of every layer as they lie in memory, named by the digest of the tokens they
were computed from, and at its end a digest of everything before. Files of another model, number format or processor lie
in another folder and are never looked at. What is damaged is removed, and what cannot be written is left out: both cost
time and nothing else. Reading and writing hold one tensor at a time. The least recently used files go when there are
more than `max_bytes` of them. They hold what users wrote, in numbers from which it could be recovered: folder and files
are for their owner alone.
"""

import bisect
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from freehold.disk import new_file
from freehold.engine.prefix import PrefixDigest
from freehold.errors import CheckpointError, DiskError
from freehold.log import warn_once
from freehold.weights.files import TensorSpec, TensorToWrite, header_bytes, read_header, write_data

_VERSION = "3"  # of what lies in the files: whoever changes that, or the pages' layout, counts it up
_NAME = re.compile(r"(\d+)-([0-9a-f]{32})\.safetensors")
_DIGEST_BYTES = 16
_CHUNK_BYTES = 1 << 20


class PrefixFiles:
    """The prefixes of one model in one number format; `identity` tells it from every other.

    Raises DiskError where the folder cannot be made or read.
    """

    def __init__(self, folder: Path, identity: str, *, max_bytes: int = 8 << 30) -> None:
        name = hashlib.sha256(f"{_VERSION}\0{identity}".encode()).hexdigest()[:16]
        self.folder = folder.absolute() / name
        self._max_bytes = max_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        except OSError as error:
            raise DiskError(f"{self.folder} cannot be used for cached prefixes: {error.strerror}") from None
        self._lengths = {bytes.fromhex(match[2]): int(match[1]) for match in found if match}

    def __contains__(self, key: bytes) -> bool:
        return key in self._lengths

    def find(self, tokens: Sequence[int], most: int, salt: str, *, least: int) -> bytes | None:
        """The key of the longest prefix of these tokens, of `least` to `most` of them."""
        digest, best = PrefixDigest(salt), None
        lengths = sorted(set(self._lengths.values()))
        for length in lengths[bisect.bisect_left(lengths, least) : bisect.bisect_right(lengths, most)]:
            key = digest.of(tokens, length)
            if self._lengths.get(key) == length:
                best = key
        return best

    def length(self, key: bytes) -> int:
        """Of a prefix that is there, in tokens."""
        return self._lengths[key]

    def read(self, key: bytes, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Tensor]] | None:
        """Its tensors by name, one after the other, if they are these; None, and the file is gone, where they are not
        what was written."""
        path = self._path(key, self._lengths[key])
        try:
            if path.is_symlink() or not path.is_file():
                raise ValueError("it is no file of ours")
            infos = read_header(path)
            expected = {spec.name: (spec.dtype, spec.shape) for spec in _with_digest(specs)}
            if {name: (info.dtype, info.shape) for name, info in infos.items()} != expected:
                raise ValueError("it holds other tensors than this model's")
            _check_digest(path)
            os.utime(path)
        except (OSError, ValueError, CheckpointError) as error:
            warn_once(f"{path} is left out, and its prefix computed again: {error}")
            self.remove(key)
            return None
        return _tensors(path, specs)

    def write(self, key: bytes, length: int, tensors: Sequence[TensorToWrite]) -> None:
        """Keep a prefix; where that fails the log says why, and nothing is left behind."""
        path = self._path(key, length)
        header = header_bytes(_with_digest(tensors), {})
        needed_bytes = len(header) + sum(tensor.num_bytes for tensor in tensors) + _DIGEST_BYTES
        try:
            with contextlib.suppress(OSError):  # in case somebody has removed it; what is wrong, new_file will say
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with new_file(path, needed_bytes=needed_bytes) as file:
                os.fchmod(file.fileno(), 0o600)
                hashed = _Hashed(file)
                hashed.write(memoryview(header))
                for _ in write_data(hashed, tensors):
                    pass
                file.write(hashed.digest())
        except DiskError as error:
            warn_once(f"a prefix is not kept on disk: {error}")
            return
        self._lengths[key] = length
        self._make_room()

    def remove(self, key: bytes) -> None:
        with contextlib.suppress(OSError):
            self._path(key, self._lengths[key]).unlink()
        del self._lengths[key]

    def _path(self, key: bytes, length: int) -> Path:
        return self.folder / f"{length}-{key.hex()}.safetensors"

    def _make_room(self) -> None:
        """Other processes may write and remove here too."""
        files = []
        for key, length in self._lengths.items():
            with contextlib.suppress(OSError):
                status = self._path(key, length).stat()
                files.append((status.st_mtime_ns, key, status.st_size))
        total = sum(size for _, _, size in files)
        for _, key, size in sorted(files):
            if total <= self._max_bytes:
                return
            self.remove(key)
            total -= size


class _Hashed:
    """A file that remembers the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.blake2b(digest_size=_DIGEST_BYTES)

    def write(self, data: memoryview, /) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        return self._hash.digest()


def _with_digest(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return [*specs, TensorSpec("digest", torch.uint8, (_DIGEST_BYTES,))]


def _check_digest(path: Path) -> None:
    """Raise ValueError unless the file's end is the digest of the rest."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    left = path.stat().st_size - _DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0:
            piece = file.read(min(left, _CHUNK_BYTES))
            if not piece:
                break
            digest.update(piece)
            left -= len(piece)
        if left or file.read() != digest.digest():
            raise ValueError("its digest is wrong")


def _tensors(path: Path, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for spec in specs:
            data = bytearray(file.read(spec.num_bytes))
            yield spec.name, torch.frombuffer(data, dtype=spec.dtype).view(spec.shape)
