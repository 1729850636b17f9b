"""Safetensors files: a folder of shards read by mmap, and a writer that never holds a whole shard.

Reading hands out tensors that are views of the mapped file: nothing is copied, and pages that are not touched are
not in memory. Every header is checked against its file before the first tensor is given out, so a truncated or
foreign file is one CheckpointError that names the file and the tensor. Writing streams: the header first, then the
bytes of each tensor as they come.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freehold.disk import write_text
from freehold.errors import CheckpointError, ModelNotFoundError
from freehold.log import Progress, no_progress

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_DIMENSIONS = 16  # of a tensor: a product of more, and larger, numbers than any has could take for ever
_REMEDY = "download or copy it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of one tensor. `dtype` is None for types that Freehold has no use for."""

    file: Path
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    num_bytes: int


class TensorFiles:
    """All tensors of a model folder, by name. Opening checks every header; it reads no tensor data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self._opened: dict[Path, Any] = {}
        for path in _shards(folder):
            for name, info in read_header(path).items():
                if name in self.infos:
                    raise CheckpointError(
                        f"{path.name} and {self.infos[name].file.name} in {folder} both hold tensor {name}; "
                        "the folder mixes two models: keep the files of one"
                    )
                self.infos[name] = info
        self._check_index()

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file. The mapping is private: the file is never written to."""
        info = self.infos[name]
        try:
            if info.file not in self._opened:
                self._opened[info.file] = safe_open(info.file, framework="pt")
            tensor: Tensor = self._opened[info.file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read ({error}); {_REMEDY}") from None
        return tensor

    def release(self) -> None:
        """Let go of the mapped files. They leave memory with the last tensor that was taken from them; later calls of
        `tensor` map them again."""
        self._opened.clear()

    def fingerprint(self) -> str:
        """Changes when the files do: a digest of names, sizes, times of change and headers. Reads no tensor data."""
        digest = hashlib.sha256()
        for path in sorted({info.file for info in self.infos.values()}):
            header = _read_raw_header(path)
            name_size_and_time = f"{path.name}\0{header.file_size}\0{header.modified_ns}\0"
            digest.update(os.fsencode(name_size_and_time) + header.text)
        return digest.hexdigest()

    def _check_index(self) -> None:
        path = self.folder / "model.safetensors.index.json"
        if not path.is_file():
            return
        for name, file_name in read_json(path).get("weight_map", {}).items():
            if name not in self.infos:
                raise CheckpointError(
                    f"{self.folder / file_name}: tensor {name} is promised by {path.name} but is not in the file; "
                    f"{_REMEDY}"
                )


def read_json(path: Path, *, most_bytes: int | None = None) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file; of more than `most_bytes` none is built."""
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            raise CheckpointError(f"{path} has more than {most_bytes:,} bytes, and is not what it is called; {_REMEDY}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {_REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 errors alike
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {_REMEDY}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; {_REMEDY}")
    return value


def _shards(folder: Path) -> list[Path]:
    """The files named by the index, or every safetensors file where there is none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names; {_REMEDY}")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        present = {path.name for path in folder.iterdir()}
        for path in paths:
            if path.parent != folder:
                raise CheckpointError(f"{index} points outside its folder, to {path}; the file is not to be trusted")
            if path.name not in present:
                raise CheckpointError(f"{path} is missing, though {index.name} names it; {_REMEDY}")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelNotFoundError(f"{folder} holds no .safetensors file; name a folder with a gpt-oss checkpoint")
    return paths


@dataclass(frozen=True, slots=True)
class _RawHeader:
    """A header before it is parsed, and its file when it was read."""

    text: bytes
    file_size: int
    modified_ns: int


def _read_raw_header(path: Path, most_bytes: int = _MAX_HEADER_BYTES) -> _RawHeader:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= most_bytes:
                raise CheckpointError(
                    f"{path} is not a safetensors file (its header would be {length} bytes); {_REMEDY}"
                )
            if 8 + length > status.st_size:
                raise CheckpointError(
                    f"{path} is truncated: its header needs {length} bytes and the file has {status.st_size} in all; "
                    f"{_REMEDY}"
                )
            return _RawHeader(file.read(length), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is corrupt: its header is not JSON; {_REMEDY}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is corrupt: its header is not a JSON object; {_REMEDY}")
    return header


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that a file's writer put into its header. Nothing else of the header is checked."""
    metadata = _parse_header(path, _read_raw_header(path).text).get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is corrupt: its metadata is not a JSON object; {_REMEDY}")
    return {name: value for name, value in metadata.items() if isinstance(value, str)}


def read_header(path: Path, *, most_bytes: int = _MAX_HEADER_BYTES) -> dict[str, TensorInfo]:
    """Parse and check one file's header: all offsets in order, within the file, and as long as shapes say. One of more
    than `most_bytes` is refused before it is read."""
    raw = _read_raw_header(path, most_bytes)
    size = raw.file_size
    header = _parse_header(path, raw.text)
    header.pop("__metadata__", None)
    data_start = 8 + len(raw.text)
    infos: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        begin, end, info = _parse_entry(path, name, entry)
        if data_start + end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {data_start + end} and the file at {size}; {_REMEDY}"
            )
        spans.append((begin, end, name))
        infos[name] = info
    spans.sort()
    at = 0
    for begin, end, name in spans:
        if begin != at:
            raise CheckpointError(f"{path} is corrupt: tensor {name} starts at byte {begin}, not at {at}; {_REMEDY}")
        at = end
    if data_start + at != size:
        raise CheckpointError(f"{path} is corrupt: {size - data_start - at} bytes follow its last tensor; {_REMEDY}")
    return infos


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        sound = all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers) and len(shape) <= _MOST_DIMENSIONS
        sound = sound and begin <= end and isinstance(dtype_name, str)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} is corrupt: tensor {name} has a malformed header entry; {_REMEDY}")
    dtype = _DTYPES.get(dtype_name)
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{path} is corrupt: tensor {name} of shape {tuple(shape)} in {dtype_name} cannot be {end - begin} bytes; "
            f"{_REMEDY}"
        )
    return begin, end, TensorInfo(path, dtype, dtype_name, tuple(shape), end - begin)


def map_read_only(file: BinaryIO) -> Tensor:
    """All bytes of an open file, mapped and not read. Processes that map the same file share its pages.

    Nothing may be written to the tensor or its views: the system ends the process that does.
    """
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Large pages read a sixth faster: fewer look-ups of addresses. A system may know none for files, and say so.
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():  # torch has no read-only tensors, and says so
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


# --- writing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as it will lie in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorToWrite(TensorSpec):
    """And where its bytes come from: `produce` yields its rows in order, in pieces of any size."""

    produce: Callable[[], Iterator[Tensor]]


def write_shards(
    folder: Path,
    tensors: Sequence[TensorToWrite],
    *,
    shard_bytes: int,
    shard_name: str = "model-{number:05d}-of-{count:05d}.safetensors",
    progress: Progress = no_progress,
) -> None:
    """Write safetensors shards of at most `shard_bytes` (or one tensor) each, and an index if there are several.

    Pieces are written as they are produced, and tensors in the order of `tensors` within each element size: a producer
    may rely on that.
    """
    shards: list[list[TensorToWrite]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    total = sum(tensor.num_bytes for tensor in tensors)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else shard_name.format(number=number, count=len(shards))
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
        with (folder / name).open("wb") as file:
            for written in _write_shard(file, shard):
                done += written
                progress("writing tensors", done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_shard(file: BinaryIO, tensors: Iterable[TensorToWrite]) -> Iterator[int]:
    # Wide types first, as the reference writer does: then every tensor is aligned to its own element size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    file.write(header_bytes(ordered, {"format": "pt"}))
    yield from write_data(file, ordered)


def header_bytes(tensors: Iterable[TensorSpec], metadata: Mapping[str, str], *, alignment: int = 8) -> bytes:
    """What comes before the data of a file that holds these tensors in this order; a multiple of `alignment` long."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text


class Writable(Protocol):
    """What `write_data` needs of a file."""

    def write(self, data: memoryview, /) -> int: ...


def write_data(file: Writable, tensors: Iterable[TensorToWrite]) -> Iterator[int]:
    """Write the tensors' bytes one after the other as they are produced; yields the size of each piece written."""
    for tensor in tensors:
        written = 0
        for piece in tensor.produce():
            assert piece.dtype == tensor.dtype, f"{tensor.name}: piece of {piece.dtype}, header says {tensor.dtype}"
            data = piece.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
            file.write(data.data)
            written += data.nbytes
            yield data.nbytes
        assert written == tensor.num_bytes, f"{tensor.name}: wrote {written} of {tensor.num_bytes} bytes"
