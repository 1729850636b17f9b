"""Cached prefixes on disk, so that a long system prompt outlives the process.

One safetensors file for each: the pages of every layer as they lie in memory, named by the digest of the tokens they
were computed from. Files of another model, number format or processor lie in another folder and are never looked at.
What is damaged is removed, and what cannot be written is left out: both cost time and nothing else. The least recently
used files go when there are more than `max_bytes` of them. They hold what users wrote, in numbers from which it could
be recovered: folder and files are for their owner alone.
"""

import bisect
import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from freehold.disk import new_file
from freehold.engine.prefix import PrefixDigest
from freehold.errors import DiskError
from freehold.log import warn_once

_VERSION = "2"  # of what lies in the files: whoever changes that, or the pages' layout, counts it up
_NAME = re.compile(r"(\d+)-([0-9a-f]{32})\.safetensors")
_DIGEST_BYTES = 16


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

    def read(self, key: bytes) -> dict[str, Tensor] | None:
        """Its pages; None, and the file is gone, where they are not what was written."""
        path = self._path(key, self._lengths[key])
        try:
            data = path.read_bytes()
            body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
            if _digest(body) != digest:
                raise ValueError("its digest is wrong")
            tensors: dict[str, Tensor] = safetensors.torch.load(body)
            os.utime(path)
        except (OSError, ValueError, SafetensorError) as error:
            warn_once(f"{path} is left out, and its prefix computed again: {error}")
            self.remove(key)
            return None
        return tensors

    def write(self, key: bytes, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a prefix; where that fails the log says why, and nothing is left behind."""
        path = self._path(key, length)
        body = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        try:
            with new_file(path, needed_bytes=len(body)) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(body)
                file.write(_digest(body))
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


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
