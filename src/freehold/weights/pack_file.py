"""The packed cache: a model's weights in the layout of the CPU kernels, written once and mapped ever after.

The first `load_packed` of a checkpoint writes one safetensors file under the cache directory, a few megabytes at a
time; later ones map it, which takes no longer for a large model than for a small one, and processes share its pages.
Where the file cannot be written the weights are packed in memory, with one warning. Nothing here is precious: any file
can be removed at any time, as `clear_packed` does, and is made again when it is needed.

A file is used if its header is, byte for byte, the one that would be written now. The header says everything: version
of the format, folder and fingerprint of the source, form, names, shapes. So a file that is damaged, foreign, of another
version, or of a model that has changed since, is not the expected one and is replaced. The data are not looked at when
they are mapped; their checksum is in the header too, where it is filled in last, and `ensure_packed` compares it if
asked to.

Tensors lie at multiples of 64 bytes: one whose size is none is stored flat, with zeros after it. An untied embedding is
not repeated here; it stays a view of the checkpoint.
"""

import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import accumulate, chain
from pathlib import Path
from threading import Barrier
from typing import BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from freehold import machine, paths
from freehold.config import ExpertFormat, ModelConfig
from freehold.disk import exclusive, new_file, remove, remove_abandoned, remove_all_abandoned
from freehold.errors import CheckpointError, DiskError, FreeholdError, ModelNotFoundError, UsageError
from freehold.log import Progress, logger, no_progress, warn_once
from freehold.weights.files import (
    TensorSpec,
    TensorToWrite,
    Writable,
    header_bytes,
    map_read_only,
    read_metadata,
    write_data,
)
from freehold.weights.layouts import Checkpoint, WeightTable, canonical_shapes, open_checkpoint
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import (
    DATA_DTYPES,
    FORMS,
    PANEL,
    SCALES_DTYPES,
    Form,
    PackedMatrix,
    pack,
    packed_bytes,
    packed_shapes,
    plain_form,
)

PackedTable = dict[str, Tensor | PackedMatrix]
"""`embedding`, `unembedding` (absent if tied), `final_norm`, and as `layers.N.…`: attn_norm, qkv.weight, qkv.bias,
sinks, o.weight, o.bias, mlp_norm, router.weight, router.bias, gate_up, gate_up.bias, down, down.bias. Rows of `gate_up`
are paired, its bias is in the checkpoint's order."""

DENSE_FORMS: tuple[Form, ...] = tuple(form for form in FORMS if form != "mxfp4")
DEFAULT_DENSE: Form = "q8"

_VERSION = "1"  # of this file and of the layouts in `packed`: whoever changes either counts it up
_ALIGNMENT = 64
_NO_DIGEST = b"0" * 64
_SUFFIX = ".safetensors"


class PackedBytes(NamedTuple):
    """Bytes of a packed model in memory. Of an untied `embedding` only the rows of tokens in use become resident."""

    dense: int
    experts: int
    embedding: int


def load_packed(checkpoint: Checkpoint, dense: Form, *, progress: Progress = no_progress) -> PackedTable:
    """A checkpoint's weights for the CPU kernels: matrices packed, everything else plain float32.

    Attention, and what embedding tied or unembedding is, take the form `dense`; so do experts that are not MXFP4.
    Routers stay bfloat16, or float32 where they are not; an untied embedding (V, D) keeps its type. The tensors are
    mapped from a file: nothing may write to them. Raises CheckpointError where the weights cannot be packed.
    """
    plan = _plan(checkpoint, dense)
    try:
        data = _ensure(plan, verify=False, progress=progress).mapped[len(plan.header) :]
    except DiskError as error:
        warn_once(
            f"packed weights of {checkpoint.folder} are held in memory, and will be packed again next time: {error}"
        )
        data = _pack_in_memory(plan, progress)
    table = _table(plan, data)
    if not checkpoint.config.tied_embeddings:
        table["embedding"] = _plain(checkpoint.table()["embedding"])
    return table


class PackedFile(NamedTuple):
    """A packed file that is good. `is_new` if it was written just now."""

    path: Path
    num_bytes: int
    is_new: bool


def ensure_packed(
    checkpoint: Checkpoint, dense: Form, *, verify: bool = False, progress: Progress = no_progress
) -> PackedFile:
    """Write the packed file unless there is a good one.

    With `verify`, good means that every byte is as it was written: the file is read in full. Raises DiskError where it
    cannot be written, DiskSpaceError where the disk is short.
    """
    plan = _plan(checkpoint, dense)
    found = _ensure(plan, verify=verify, progress=progress)
    return PackedFile(plan.path, plan.num_bytes, found.is_new)


def packed_path(checkpoint: Checkpoint, dense: Form) -> Path:
    """Where the packed file of a folder and form is, or would be. A changed model takes the place of the old one."""
    source = checkpoint.folder.resolve()
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", source.name)[:80].lstrip(".")
    place = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    return paths.packed_dir() / f"{label}-{place}-{dense}{_SUFFIX}"


def dense_form(name: str) -> Form:
    """A form for dense weights by its name. Raises UsageError for any other."""
    for form in DENSE_FORMS:
        if form == name:
            return form
    raise UsageError(f"dense must be one of {', '.join(DENSE_FORMS)}, got {name!r}")


def packed_table_bytes(config: ModelConfig, experts: ExpertFormat, dense: Form) -> PackedBytes:
    """How much memory the packed weights take, from the model's shape alone; routers and embedding as published."""
    parts = _parts(config, experts, dense, lambda name: torch.bfloat16)
    expert_bytes = sum(part.num_bytes for part in parts if part.is_expert_matrix)
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.hidden_size * torch.bfloat16.itemsize
    return PackedBytes(sum(part.num_bytes for part in parts) - expert_bytes, expert_bytes, embedding)


# --- what a packed file holds -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One entry of the table: a matrix, or a stack of them, in a packed form; plain values where that is None."""

    name: str
    made_of: tuple[str, ...]  # canonical tensors, one after the other along dimension 0
    shape: tuple[int, ...]
    form: Form | None
    paired: bool

    @property
    def num_bytes(self) -> int:
        if self.form is None:
            return math.prod(self.shape) * torch.float32.itemsize
        return packed_bytes(self.form, self.shape, paired=self.paired)

    @property
    def is_expert_matrix(self) -> bool:
        return len(self.shape) == 3


def _parts(
    config: ModelConfig, experts: ExpertFormat, dense: Form, stored_dtype: Callable[[str], torch.dtype]
) -> list[_Part]:
    """Every entry of the table but an untied embedding, in file order."""
    dense = dense_form(dense)
    of_experts: Form = "mxfp4" if experts is ExpertFormat.MXFP4 else dense
    shapes = canonical_shapes(config)

    def part(name: str, *made_of: str, form: Form | None = None, paired: bool = False) -> _Part:
        made_of = made_of or (name,)
        shape = (sum(shapes[source][0] for source in made_of), *shapes[made_of[0]][1:])
        return _Part(name=name, made_of=made_of, shape=shape, form=form, paired=paired)

    parts = [part("embedding", form=dense)] if config.tied_embeddings else []
    for layer in range(config.num_layers):
        of = f"layers.{layer}"
        parts += [
            part(f"{of}.attn_norm"),
            part(f"{of}.qkv.weight", *(f"{of}.{name}.weight" for name in "qkv"), form=dense),
            part(f"{of}.qkv.bias", *(f"{of}.{name}.bias" for name in "qkv")),
            part(f"{of}.sinks"),
            part(f"{of}.o.weight", form=dense),
            part(f"{of}.o.bias"),
            part(f"{of}.mlp_norm"),
            part(f"{of}.router.weight", form=plain_form(stored_dtype(f"{of}.router.weight"))),
            part(f"{of}.router.bias"),
            part(f"{of}.gate_up", form=of_experts, paired=True),
            part(f"{of}.gate_up.bias"),
            part(f"{of}.down", form=of_experts),
            part(f"{of}.down.bias"),
        ]
    parts.append(part("final_norm"))
    if not config.tied_embeddings:
        parts.append(part("unembedding", form=dense))
    return parts


def empty_packed_table(config: ModelConfig, experts: ExpertFormat, dense: Form) -> PackedTable:
    """The table of a model of this shape with nothing written into it yet, an untied embedding included."""
    table: PackedTable = {}
    for part in _parts(config, experts, dense, lambda name: torch.bfloat16):
        table[part.name] = _entry(part, *(torch.empty(spec.shape, dtype=spec.dtype) for spec in _stored(part)))
    if not config.tied_embeddings:
        table["embedding"] = torch.empty((config.vocab_size, config.hidden_size), dtype=torch.bfloat16)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A packed file as it has to be. `header` has zeros where the digest goes."""

    checkpoint: Checkpoint
    path: Path
    fingerprint: str
    parts: list[_Part]
    tensors: list[TensorSpec]  # as they are stored
    header: bytes

    @property
    def data_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        return len(self.header) + self.data_bytes

    @property
    def digest_span(self) -> slice:
        start = self.header.index(_NO_DIGEST)  # it comes first: before the folder's name, which may be anything
        return slice(start, start + len(_NO_DIGEST))

    def expects(self, header: bytes) -> bool:
        """Whether a file that begins so is one that this plan would write, whatever its digest."""
        span = self.digest_span
        return header[: span.start] + _NO_DIGEST + header[span.stop :] == self.header


def _plan(checkpoint: Checkpoint, dense: Form) -> _Plan:
    table = checkpoint.table()
    parts = _parts(checkpoint.config, checkpoint.experts, dense, lambda name: _plain(table[name]).dtype)
    tensors = [_aligned(spec) for part in parts for spec in _stored(part)]
    fingerprint = source_fingerprint(checkpoint)
    matrices = {
        part.name: {"form": part.form, "shape": part.shape, "paired": part.paired} for part in parts if part.form
    }
    metadata = {
        "sha256": _NO_DIGEST.decode(),
        "freehold_packed": _VERSION,
        "source": str(checkpoint.folder.resolve()),
        "fingerprint": fingerprint,
        "dense": dense,
        "matrices": json.dumps(matrices, separators=(",", ":")),
    }
    return _Plan(
        checkpoint=checkpoint,
        path=packed_path(checkpoint, dense),
        fingerprint=fingerprint,
        parts=parts,
        tensors=tensors,
        header=header_bytes(tensors, metadata, alignment=_ALIGNMENT),
    )


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """Changes when the checkpoint's files or its config do; no tensor data is read."""
    path = checkpoint.folder / "config.json"
    try:
        config = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return hashlib.sha256(config + checkpoint.files.fingerprint().encode()).hexdigest()


def _plain(tensor: Tensor | Mxfp4Tensor) -> Tensor:
    assert isinstance(tensor, Tensor), "only experts are MXFP4"
    return tensor


def _stored(part: _Part) -> list[TensorSpec]:
    """The tensors that hold a part, in the shapes that are wanted of them."""
    if part.form is None:
        return [TensorSpec(part.name, torch.float32, part.shape)]
    data_shape, scales_shape = packed_shapes(part.form, part.shape, paired=part.paired)
    stored = [TensorSpec(f"{part.name}.data", DATA_DTYPES[part.form], data_shape)]
    if scales_shape is not None:
        stored.append(TensorSpec(f"{part.name}.scales", SCALES_DTYPES[part.form], scales_shape))
    return stored


def _table(plan: _Plan, data: Tensor) -> PackedTable:
    """The table as views of the bytes of a packed file, without its header."""
    ends = accumulate(tensor.num_bytes for tensor in plan.tensors)
    starts = {tensor.name: end - tensor.num_bytes for tensor, end in zip(plan.tensors, ends, strict=True)}
    table: PackedTable = {}
    for part in plan.parts:
        views = (
            data[starts[spec.name] :][: spec.num_bytes].view(spec.dtype).view(spec.shape) for spec in _stored(part)
        )
        table[part.name] = _entry(part, *views)
    return table


def _entry(part: _Part, data: Tensor, scales: Tensor | None = None) -> Tensor | PackedMatrix:
    if part.form is None:
        return data
    return PackedMatrix(part.form, torch.Size(part.shape), data, scales, part.paired)


# --- packing ----------------------------------------------------------------------------------------------------

_RESIDENT_BYTES = 1 << 26  # of the checkpoint, before its files are let go of
_VALUES_READ_AT_ONCE = 1 << 23
_VALUES_PACKED_AT_ONCE = 1 << 19  # the working copies of a piece stay in the processor's cache
_MOST_THREADS = 4  # more would wait for the hash and the disk, and hold more memory


class _Packer:
    """Reads a checkpoint from beginning to end and packs it, on threads that live as long as the `with` block.

    Each thread runs torch's ops by itself. torch would share out every op among helpers that wait for each other in
    busy loops, and on a machine that has something else to do besides that takes ten times as long.

    What has been read stays in this process's memory for as long as its file is mapped: so the files are let go of and
    mapped again on the way.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._table: WeightTable = {}
        self._bytes_read = 0
        self._num_threads = min(machine.usable_cores(), _MOST_THREADS)
        self._threads = ThreadPoolExecutor(self._num_threads)

    def __enter__(self) -> Self:
        everywhere, started = torch.get_num_threads(), Barrier(self._num_threads + 1)

        def start() -> None:
            torch.set_num_threads(1)  # of this thread, and of those that are started later
            started.wait()

        for _ in range(self._num_threads):
            self._threads.submit(start)
        started.wait()
        torch.set_num_threads(everywhere)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._release()

    def tensors(self, part: _Part) -> Iterator[TensorToWrite]:
        """What is written for a part. Packing makes data and scales together: the scales wait for their turn."""
        waiting_scales: list[Tensor] = []

        def values() -> Iterator[Tensor]:
            yield torch.cat([_plain(self._tensor(name)).float() for name in part.made_of])

        def data() -> Iterator[Tensor]:
            for packed in self._packed(part):
                if packed.scales is not None:
                    waiting_scales.append(packed.scales)
                yield packed.data

        def scales() -> Iterator[Tensor]:
            yield from waiting_scales
            waiting_scales.clear()

        producers = (values,) if part.form is None else (data, scales)
        for spec, produce in zip(_stored(part), producers, strict=False):
            yield _padded(spec, produce)

    def _packed(self, part: _Part) -> Iterator[PackedMatrix]:
        """The packed part in pieces, in order; the threads are a few of them ahead."""
        running: deque[Future[list[PackedMatrix]]] = deque()
        for matrix in self._matrices(part):
            running.append(self._threads.submit(_packed_pieces, matrix, part, self._checkpoint.folder))
            if len(running) > self._num_threads:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()

    def _matrices(self, part: _Part) -> Iterator[Tensor | Mxfp4Tensor]:
        """A matrix, or each of a stack. A large one comes in pieces of whole panels."""
        name, *more = part.made_of
        if more:  # queries, keys and values: of any number of rows, and small
            yield torch.cat([_plain(self._tensor(name)) for name in part.made_of])
        elif part.is_expert_matrix:
            for number in range(part.shape[0]):
                matrix = self._tensor(name)[number]
                self._bytes_read += matrix.num_bytes if isinstance(matrix, Mxfp4Tensor) else matrix.nbytes
                yield matrix
        else:
            num_rows, num_columns = part.shape
            step = _whole_panels(_VALUES_READ_AT_ONCE // num_columns)
            for start in range(0, num_rows, step):
                rows = _plain(self._tensor(name))[start : start + step]
                self._bytes_read += rows.nbytes
                yield rows

    def _tensor(self, name: str) -> Tensor | Mxfp4Tensor:
        if not self._table or self._bytes_read > _RESIDENT_BYTES:
            self._release()
            self._table = self._checkpoint.table()
        return self._table[name]

    def _release(self) -> None:
        self._table = {}
        self._bytes_read = 0
        self._checkpoint.files.release()


def _packed_pieces(matrix: Tensor | Mxfp4Tensor, part: _Part, origin: Path) -> list[PackedMatrix]:
    """A matrix in pieces that lie one after the other when packed; all but its end must be whole panels."""
    assert part.form is not None
    num_rows, num_columns = matrix.shape
    step = _whole_panels(_VALUES_PACKED_AT_ONCE // num_columns)
    if isinstance(matrix, Tensor):
        matrix = matrix.contiguous()  # bfloat16 experts may lie transposed, and torch is quick to turn them as a whole
    try:
        return [
            pack(_rows(matrix, slice(start, start + step)), part.form, paired=part.paired)
            for start in range(0, num_rows, step)
        ]
    except UsageError as error:
        raise CheckpointError(f"{origin}: {part.name}: {error}") from None


def _rows(matrix: Tensor | Mxfp4Tensor, rows: slice) -> Tensor | Mxfp4Tensor:
    if isinstance(matrix, Mxfp4Tensor):
        return Mxfp4Tensor(matrix.blocks[rows], matrix.scales[rows])
    return matrix[rows]


def _whole_panels(num_rows: int) -> int:
    """A number of rows at which a matrix can be cut: pairs of panels of gates and of ups stay together."""
    return max(num_rows // (4 * PANEL), 1) * 4 * PANEL


def _aligned(spec: TensorSpec) -> TensorSpec:
    """The tensor as it is stored: whole multiples of 64 bytes."""
    missing = -spec.num_bytes % _ALIGNMENT
    if not missing:
        return spec
    return TensorSpec(spec.name, spec.dtype, ((spec.num_bytes + missing) // spec.dtype.itemsize,))


def _padded(spec: TensorSpec, produce: Callable[[], Iterator[Tensor]]) -> TensorToWrite:
    stored = _aligned(spec)
    missing = (stored.num_bytes - spec.num_bytes) // spec.dtype.itemsize
    zeros = [torch.zeros(missing, dtype=spec.dtype)] if missing else []
    return TensorToWrite(stored.name, stored.dtype, stored.shape, lambda: chain(produce(), zeros))


class _Found(NamedTuple):
    mapped: Tensor
    is_new: bool


def _ensure(plan: _Plan, *, verify: bool, progress: Progress) -> _Found:
    """The packed file, mapped; written first if need be. Raises DiskError where it cannot be."""
    if (mapped := _open(plan, verify, progress)) is not None:
        return _Found(mapped, is_new=False)
    with exclusive(plan.path, progress=progress):
        if (mapped := _open(plan, verify, progress)) is not None:  # another process was faster
            return _Found(mapped, is_new=False)
        _discard(plan)
        _write(plan, progress)
        machine.return_freed_memory()
        mapped = _open(plan, verify, progress)
    if mapped is None:
        raise DiskError(f"{plan.path} does not read back as it was written; check the disk")
    return _Found(mapped, is_new=True)


def _open(plan: _Plan, verify: bool, progress: Progress) -> Tensor | None:
    """The file, mapped, if it is there and the one that this plan would write. Raises DiskError if it cannot be read:
    that may pass, and is no reason to replace it."""
    try:
        with plan.path.open("rb") as file:
            if not _fits(plan, file) or (verify and not _is_intact(plan, file, progress)):
                return None
            return map_read_only(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise DiskError(
            f"{plan.path} cannot be read ({error.strerror or error}); `freehold cache clear` removes it"
        ) from None


def _fits(plan: _Plan, file: BinaryIO) -> bool:
    return plan.expects(file.read(len(plan.header))) and os.fstat(file.fileno()).st_size == plan.num_bytes


def _is_intact(plan: _Plan, file: BinaryIO, progress: Progress) -> bool:
    """Whether a file that fits has the data that its digest says."""
    file.seek(plan.digest_span.start)
    expected = file.read(len(_NO_DIGEST))
    digest = hashlib.sha256(plan.header)
    file.seek(len(plan.header))
    while chunk := file.read(1 << 22):
        digest.update(chunk)
        progress("checking packed weights", file.tell(), plan.num_bytes)
    return digest.hexdigest().encode() == expected


def _discard(plan: _Plan) -> None:
    """Clear the place: of a file that does not fit, and of what killed processes left. The plan's lock is held."""
    remove_abandoned(plan.path, settled=0)
    if not plan.path.is_symlink() and not plan.path.exists():
        return
    match _state(plan.path, plan):
        case PackedState.CHANGED:
            logger.info("%s has changed since it was packed; packing it again", plan.checkpoint.folder)
        case PackedState.OTHER_VERSION:
            logger.info("%s is of another version of Freehold; packing it again", plan.path)
        case _:
            logger.warning("%s is damaged; packing it again", plan.path)
    remove(plan.path)


def _write(plan: _Plan, progress: Progress) -> None:
    # A cache should not be what fills a disk up: some room has to stay free.
    needed_bytes = plan.num_bytes + plan.num_bytes // 16
    with new_file(plan.path, needed_bytes=needed_bytes) as file, _Hashed(file) as hashed:
        hashed.write(memoryview(plan.header))
        _pack(plan, hashed, progress)
        if source_fingerprint(plan.checkpoint) != plan.fingerprint:
            raise CheckpointError(f"{plan.checkpoint.folder} was changed while it was read; load it again")
        file.seek(plan.digest_span.start)
        file.write(hashed.digest())


def _pack_in_memory(plan: _Plan, progress: Progress) -> Tensor:
    """The data of a packed file that could not be written."""
    data = torch.empty(plan.data_bytes, dtype=torch.uint8)
    _pack(plan, _Memory(data), progress)
    return data


def _pack(plan: _Plan, file: Writable, progress: Progress) -> None:
    done = 0
    with _Packer(plan.checkpoint) as packer:
        for written in write_data(file, (tensor for part in plan.parts for tensor in packer.tensors(part))):
            done += written
            progress("packing weights", done, plan.data_bytes)


class _Memory:
    """Memory that is written like a file."""

    def __init__(self, data: Tensor) -> None:
        self._data = data.numpy().data
        self._at = 0

    def write(self, data: memoryview) -> int:
        self._data[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)


class _Hashed:
    """A file whose bytes are hashed as they are written, beside the packing: both take about as long."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def write(self, data: memoryview) -> int:
        self._wait()  # for the piece before, so that no more than two are held
        self._hashing = self._thread.submit(self._digest.update, data)
        return self._file.write(data)

    def digest(self) -> bytes:
        """In hexadecimal, of all that was written."""
        self._wait()
        return self._digest.hexdigest().encode()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()


# --- what is in the cache ---------------------------------------------------------------------------------------


class PackedState(Enum):
    """What a packed file is good for."""

    CURRENT = "current"  # the next load maps it
    CHANGED = "model changed"
    GONE = "model gone"
    OTHER_VERSION = "other version"
    DAMAGED = "damaged"  # or foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEntry:
    """One file of the packed cache. `source` and `dense` are None where the file does not say."""

    path: Path
    num_bytes: int
    written_at: datetime
    source: Path | None
    dense: str | None
    state: PackedState


def list_packed() -> list[PackedEntry]:
    """Every finished file of the packed cache, by name."""
    entries = []
    for path in sorted(paths.packed_dir().glob(f"*{_SUFFIX}")):
        try:
            status = path.stat()
        except OSError:  # removed a moment ago
            continue
        metadata = _metadata(path)
        source = metadata.get("source")
        entries.append(
            PackedEntry(
                path=path,
                num_bytes=status.st_size,
                written_at=datetime.fromtimestamp(status.st_mtime).astimezone(),
                source=None if source is None else Path(source),
                dense=metadata.get("dense"),
                state=_state_by_metadata(path, metadata),
            )
        )
    return entries


def clear_packed(*, keep_current: bool = False) -> int:
    """Remove packed files, all or those that no load would use any more; returns the bytes that this frees.

    A file in use can be removed: see `disk.remove`. What a process is writing at this moment stays. Raises DiskError
    where a file cannot be removed.
    """
    freed = remove_all_abandoned(paths.packed_dir())
    for entry in list_packed():
        if not keep_current or entry.state is not PackedState.CURRENT:
            freed += remove(entry.path)
    return freed


def _metadata(path: Path) -> dict[str, str]:
    try:
        return read_metadata(path)
    except CheckpointError:
        return {}


def _state_by_metadata(path: Path, metadata: Mapping[str, str]) -> PackedState:
    """The state of a file, found by going to the model that it names."""
    source, dense = metadata.get("source"), metadata.get("dense")
    if source is None or dense not in DENSE_FORMS:
        return PackedState.DAMAGED
    try:
        plan = _plan(open_checkpoint(Path(source)), dense_form(dense))
    except ModelNotFoundError:
        return PackedState.GONE
    except FreeholdError:  # the folder is there, and holds something else or nothing whole
        return PackedState.CHANGED
    return _state(path, plan) if path == plan.path else PackedState.DAMAGED


def _state(path: Path, plan: _Plan) -> PackedState:
    """The state of a file in the plan's place, judged by all but its data."""
    try:
        with path.open("rb") as file:
            if _fits(plan, file):
                return PackedState.CURRENT
    except OSError:
        return PackedState.DAMAGED
    metadata = _metadata(path)
    if metadata.get("freehold_packed", _VERSION) != _VERSION:
        return PackedState.OTHER_VERSION
    if metadata.get("fingerprint", plan.fingerprint) != plan.fingerprint:
        return PackedState.CHANGED
    return PackedState.DAMAGED
