"""What a forward pass runs on besides the tokens: their positions, where each layer finds the keys and values that they
attend to, and which adapters they are computed with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from freehold.kernels import ops
from freehold.kernels.kv import KvPages, KvType, PagedSequences
from freehold.kernels.ops import Rotation, Routing
from freehold.model.lora import LayerAdapters


class Heads(Protocol):
    """How one layer's new queries, keys and values become what each head has found, (T, N, H)."""

    def attend(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_N: Tensor,
        *,
        scale: float,
        window: int | None,
        rotation: Rotation,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerKv:
    """One layer's pages, and which of them belong to the batch's sequences. New keys and values are kept there."""

    pages: KvPages
    sequences: PagedSequences

    def attend(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_N: Tensor,
        *,
        scale: float,
        window: int | None,
        rotation: Rotation,
    ) -> Tensor:
        ops.kv_write(self.pages, self.sequences, k_TKH, v_TKH, rotation=rotation)
        return ops.attention(q_TNH, self.pages, self.sequences, sinks_N, scale=scale, window=window, rotation=rotation)


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """Whole sequences of so many tokens, one after the other, each over itself, with keys and values rounded as a cache
    of this type would. Nothing is kept; gradients pass."""

    counts: Sequence[int]
    kv_type: KvType

    def attend(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_N: Tensor,
        *,
        scale: float,
        window: int | None,
        rotation: Rotation,
    ) -> Tensor:
        return ops.self_attention(
            q_TNH,
            k_TKH,
            v_TKH,
            self.counts,
            sinks_N,
            scale=scale,
            window=window,
            rotation=rotation,
            kv_type=self.kv_type,
        )


Watch = Callable[[int, Tensor, Routing], None]
"""Told each layer's number, its router's logits (T, E), and where it sends the tokens."""


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of one or more sequences, one after the other. All layers agree on whose tokens they are."""

    positions_T: Tensor
    layers: Sequence[Heads]
    adapters: LayerAdapters | None = None
    watch: Watch | None = None

    @classmethod
    def whole(
        cls,
        counts: Sequence[int],
        *,
        num_layers: int,
        device: torch.device,
        kv_type: KvType = "f32",
        adapters: LayerAdapters | None = None,
    ) -> "Batch":
        """Whole sequences of so many tokens, without a cache: for training."""
        positions = [position for count in counts for position in range(count)]
        return cls(torch.tensor(positions, device=device), [OwnTokens(counts, kv_type)] * num_layers, adapters)
