"""One layer's keys and values in memory, in the type they are kept in.

The layout is (K, capacity, H), one head after the other, so that attention reads each head as one stretch. In q8 every
32 numbers of a head share a float16 scale. Which positions the rows hold is the owner's business (model.kv_cache).
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from freehold.errors import UsageError

KvType = Literal["f32", "bf16", "q8"]
KV_TYPES: tuple[KvType, ...] = get_args(KvType)
KV_BLOCK = 32
ALIGNMENT = 512
"""Attention sums up runs of so many positions; a buffer starts at a multiple, so that no result depends on where."""

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "q8": torch.int8}


@dataclass(slots=True, eq=False)
class KvBuffer:
    """Keys and values (K, capacity, H), with scales (K, capacity, H / 32) in q8. Ops write it and read it."""

    type: KvType
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    native_view: object | None = field(default=None, repr=False)  # made by the native kernels on first use

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values, self.key_scales, self.value_scales) if t is not None]


def kv_type(name: str, head_dim: int) -> KvType:
    """A type by its name. Raises UsageError for any other, and where it cannot hold heads of this size."""
    if name not in KV_TYPES:
        raise UsageError(f"the KV cache's type must be one of {', '.join(KV_TYPES)}, got {name!r}")
    if name == "q8" and head_dim % KV_BLOCK:
        raise UsageError(
            f"a q8 KV cache needs heads of a multiple of {KV_BLOCK}, this model's have {head_dim}; use bf16"
        )
    return name


def new_buffer(type: KvType, num_heads: int, capacity: int, head_dim: int, device: torch.device) -> KvBuffer:
    """An empty buffer. Raises UsageError where the type cannot hold heads of this size."""
    type = kv_type(type, head_dim)
    shape = (num_heads, capacity, head_dim)
    keys, values = (torch.empty(shape, dtype=_DTYPES[type], device=device) for _ in range(2))
    if type != "q8":
        return KvBuffer(type, keys, values)
    scales = (*shape[:2], head_dim // KV_BLOCK)
    key_scales, value_scales = (torch.empty(scales, dtype=torch.float16, device=device) for _ in range(2))
    return KvBuffer(type, keys, values, key_scales, value_scales)


def kv_bytes_per_token(type: KvType, num_heads: int, head_dim: int) -> int:
    """Of one layer, keys and values together."""
    numbers = 2 * num_heads * head_dim
    return numbers * _DTYPES[type].itemsize + (numbers // KV_BLOCK * 2 if type == "q8" else 0)
