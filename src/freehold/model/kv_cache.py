"""Keys and values of one sequence. Full layers keep every position; windowed layers keep what is in sight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from freehold.config import ModelConfig
from freehold.kernels import ops
from freehold.kernels.kv import ALIGNMENT, KvType, kv_bytes_per_token, new_buffer
from freehold.kernels.ops import Rotation

_STEP = 1024  # positions: the least that a buffer starts with or grows by


class KVCache:
    """Holds the positions 0 … length − 1 of one sequence. The forward pass writes it; nobody shares it."""

    def __init__(
        self, config: ModelConfig, *, type: KvType, device: torch.device, max_length: int | None = None
    ) -> None:
        """`max_length` is how many positions will come at most, if that is less than the model's context."""
        self.length = 0
        self.layers = [
            LayerCache(
                type,
                config.num_kv_heads,
                config.head_dim,
                window=window,
                max_length=max_length or config.max_context,
                device=device,
            )
            for window in config.windows
        ]

    @property
    def num_bytes(self) -> int:
        return sum(layer.buffer.num_bytes for layer in self.layers)


class LayerCache:
    """One layer's buffer, and which positions its rows hold: `first` … `first + length − 1`.

    Buffers grow as they fill. A windowed layer's drops what is out of sight when it is full; the first position it
    holds stays a multiple of ALIGNMENT.
    """

    def __init__(
        self,
        type: KvType,
        num_heads: int,
        head_dim: int,
        *,
        window: int | None,
        max_length: int,
        device: torch.device,
    ) -> None:
        self.window = window
        self.first = 0
        self.length = 0
        self._max_length = max_length
        self.buffer = new_buffer(type, num_heads, min(_STEP, max_length), head_dim, device)

    def append(self, k_TKH: Tensor, v_TKH: Tensor, rotation: Rotation | None = None) -> None:
        """Write the next T positions, the keys rotated."""
        count = len(k_TKH)
        if self.length + count > self.buffer.capacity:
            self._make_room(count)
        ops.kv_write(self.buffer, k_TKH, v_TKH, self.length, rotation=rotation)
        self.length += count

    def _make_room(self, count: int) -> None:
        dropped = 0
        if self.window is not None:
            dropped = max(0, self.length - self.window + 1) // ALIGNMENT * ALIGNMENT
        kept = self.length - dropped
        capacity = self.buffer.capacity
        if kept + count > capacity:
            room = min(capacity + max(capacity // 2, _STEP), self._max_length)
            if self.window is not None:
                room = min(room, self.window + ALIGNMENT + count)  # more is never kept
            capacity = max(kept + count, room)
        old = self.buffer
        heads, _, head_dim = old.keys.shape
        self.buffer = new_buffer(old.type, heads, capacity, head_dim, old.keys.device)
        for source, target in zip(old.tensors(), self.buffer.tensors(), strict=True):
            target[:, :kept] = source[:, dropped : self.length]
        self.first += dropped
        self.length = kept


def kv_cache_bytes(config: ModelConfig, *, type: KvType, context: int, chunk: int) -> int:
    """What the cache of one sequence of `context` tokens takes at most, fed in chunks of so many tokens."""
    per_token = kv_bytes_per_token(type, config.num_kv_heads, config.head_dim)
    return per_token * sum(_rows_needed(config.windows, context, chunk))


def _rows_needed(windows: Sequence[int | None], context: int, chunk: int) -> list[int]:
    return [context if w is None else min(context, max(_STEP, w + ALIGNMENT + chunk)) for w in windows]
