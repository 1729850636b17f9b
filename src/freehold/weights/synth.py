"""Random checkpoints of any gpt-oss shape: for tests, for speed on full-size weights, for trying things out.

Weights are drawn so that activations stay finite through all layers. Tensors are made while they are written, so a
13 GB checkpoint needs a few hundred MB of memory. The same seed gives the same bytes.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from freehold.config import ExpertFormat, Layout, ModelConfig
from freehold.disk import new_folder
from freehold.log import Progress, no_progress
from freehold.weights import mxfp4
from freehold.weights.layouts import (
    SHARD_BYTES,
    canonical_shapes,
    tensors_to_write,
    write_checkpoint,
)
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.pack_file import PackedTable, empty_packed_table
from freehold.weights.packed import Form, PackedMatrix

_STD = 0.02
_PIECE_ELEMENTS = 1 << 22  # 16 MiB of float32, and as much again while it is scaled and rounded
# E2M1 codes drawn evenly have a deviation of 3.1; times 2^-8 … 2^-6 that is around 0.02.
_SCALE_BYTES = (119, 122)


class RandomSource:
    """Draws each canonical tensor from a generator seeded by (seed, name): order of reading does not matter."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.origin = f"random weights from seed {seed}"
        self._shapes = canonical_shapes(config)
        self._seed = seed

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def rows(self, name: str) -> Iterator[Tensor]:
        generator = self._generator(name)
        shape = self._shapes[name]
        is_norm = name.endswith("norm")
        row_elements = 1
        for size in shape[1:]:
            row_elements *= size
        step = max(1, _PIECE_ELEMENTS // row_elements)
        for start in range(0, shape[0], step):
            piece_shape = (min(step, shape[0] - start), *shape[1:])
            piece = torch.randn(piece_shape, generator=generator) * (0.1 if is_norm else _STD)
            yield (piece + 1 if is_norm else piece).to(torch.bfloat16)

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        generator = self._generator(name)
        num_experts, R, C = self._shapes[name]
        for _ in range(num_experts):
            if C % mxfp4.BLOCK:  # cannot be packed, so it is going to be written as bfloat16
                yield torch.randn((R, C), generator=generator) * _STD
                continue
            blocks = torch.empty((R, C // 32, 16), dtype=torch.uint8)
            # 64 random bits at a time: eight times faster than drawing bytes.
            blocks.view(torch.int64).random_(-(2**63), None, generator=generator)
            low, high = _SCALE_BYTES
            scales = torch.randint(low, high, (R, C // 32), dtype=torch.uint8, generator=generator)
            yield Mxfp4Tensor(blocks, scales)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))


def random_packed_table(
    config: ModelConfig, dense: Form, *, seed: int = 0, progress: Progress = no_progress
) -> PackedTable:
    """Random weights in the CPU kernels' layout, made in memory, for measuring speed: MXFP4 experts, dense ones in
    `dense`. One stretch of random numbers is repeated, so that 11 GiB are there in seconds."""
    table = empty_packed_table(config, ExpertFormat.MXFP4, dense)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.empty(_POOL_BYTES // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    small = torch.randn(_POOL_BYTES // 4, generator=generator) * _STD
    pools = {
        torch.uint8: bits.view(torch.uint8),
        torch.int8: bits.view(torch.int8).clamp(min=-127),
        torch.bfloat16: small.bfloat16(),
        torch.float32: small,
    }
    for number, (name, entry) in enumerate(table.items()):
        progress("making random weights", number, len(table))
        if isinstance(entry, PackedMatrix):
            _repeat(pools[entry.data.dtype], entry.data)
            if entry.scales is not None:
                entry.scales.fill_(_SCALE_BYTES[0] + 1 if entry.form == "mxfp4" else _STD / 74)
        elif name.endswith("norm"):
            entry.fill_(1.0)
        elif name == "embedding":
            _repeat(pools[entry.dtype], entry[:RANDOM_EMBEDDINGS])
        else:
            _repeat(pools[entry.dtype], entry)
    progress("making random weights", len(table), len(table))
    return table


RANDOM_EMBEDDINGS = 4096
"""Of an untied embedding so many rows are written; the rest of its gigabyte never comes into memory."""

_POOL_BYTES = 1 << 24


def _repeat(pool: Tensor, target: Tensor) -> None:
    flat = target.view(-1)
    for start in range(0, len(flat), len(pool)):
        piece = flat[start : start + len(pool)]
        piece.copy_(pool[: len(piece)])


def write_random_checkpoint(
    destination: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    layout: Layout = Layout.HF,
    experts: ExpertFormat = ExpertFormat.MXFP4,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = no_progress,
) -> None:
    """Write a random checkpoint to a new folder: complete, or not at all.

    Raises UsageError if the folder exists, DiskSpaceError if it does not fit, UnsupportedError if the layout or
    format cannot hold the config.
    """
    source = RandomSource(config, seed)
    needed = sum(tensor.num_bytes for tensor in tensors_to_write(config, source, layout, experts))
    with new_folder(destination, needed_bytes=needed) as folder:
        write_checkpoint(
            folder,
            config,
            source,
            layout=layout,
            experts=experts,
            shard_bytes=shard_bytes,
            progress=progress,
        )
