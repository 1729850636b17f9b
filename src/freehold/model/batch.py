"""What a forward pass runs on besides the tokens: their positions, and where each layer keeps keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from freehold.kernels.kv import KvPages, PagedSequences


@dataclass(frozen=True, slots=True)
class LayerKv:
    """One layer's pages, and which of them belong to the batch's sequences."""

    pages: KvPages
    sequences: PagedSequences


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of one or more sequences, one after the other. All layers agree on whose tokens they are."""

    positions_T: Tensor
    layers: Sequence[LayerKv]
