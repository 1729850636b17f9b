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
