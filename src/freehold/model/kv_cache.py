"""Keys and values of one sequence. Full layers keep every position; windowed layers keep only what is in sight."""

from typing import NamedTuple

import torch
from torch import Tensor

from freehold.config import ModelConfig

_STEP = 1024  # positions; a buffer grows by so much, so that it never holds much more than it needs


class KVCache:
    """Holds the positions 0 … length − 1 of one sequence. The forward pass writes it; nobody shares it."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_kv_heads, config.head_dim)
        self.length = 0
        self.layers: list[FullLayer | WindowedLayer] = [
            FullLayer(shape, config.max_context, dtype, device)
            if window is None
            else WindowedLayer(shape, window, dtype, device)
            for window in config.windows
        ]

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


class KeysValues(NamedTuple):
    """(S, K, H) each: consecutive positions, the newest last."""

    keys: Tensor
    values: Tensor


class FullLayer:
    """Keeps every position in a buffer that grows as it fills, up to the model's context."""

    def __init__(self, shape: tuple[int, int], max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._max_length = max_length
        self._length = 0
        self.keys = torch.empty((min(_STEP, max_length), *shape), dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    def append(self, k_TKH: Tensor, v_TKH: Tensor) -> KeysValues:
        """Write T new positions; returns views of all positions."""
        start, stop = self._length, self._length + len(k_TKH)
        if stop > len(self.keys):
            capacity = max(min(stop + _STEP, self._max_length), stop)
            self.keys, self.values = self._grown(self.keys, capacity), self._grown(self.values, capacity)
        self.keys[start:stop] = k_TKH
        self.values[start:stop] = v_TKH
        self._length = stop
        return KeysValues(self.keys[:stop], self.values[:stop])

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = old.new_empty((capacity, *old.shape[1:]))
        new[: self._length] = old[: self._length]
        return new


class WindowedLayer:
    """Keeps the window − 1 positions that the next query can see besides itself."""

    def __init__(self, shape: tuple[int, int], window: int, dtype: torch.dtype, device: torch.device) -> None:
        self._keep = window - 1
        self.keys = torch.empty((0, *shape), dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    def append(self, k_TKH: Tensor, v_TKH: Tensor) -> KeysValues:
        """Returns what was kept followed by the T new positions; keeps the last of them."""
        seen = KeysValues(torch.cat((self.keys, k_TKH)), torch.cat((self.values, v_TKH)))
        first = max(0, len(seen.keys) - self._keep)
        # Cloned: a view would keep a long prefill's whole concatenation alive.
        self.keys, self.values = seen.keys[first:].clone(), seen.values[first:].clone()
        return seen
