"""One sequence's keys and values in pages that lie in no order, for tests of the ops."""

from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.kernels.kv import KvPages, KvType, PagedSequences, new_pages, num_pages
from tests.checkpoints import CPU


@dataclass(slots=True)
class Store:
    pages: KvPages
    table_BP: Tensor

    def last(self, count: int, length: int) -> PagedSequences:
        """The last `count` of `length` positions."""
        return PagedSequences([count], [length], self.table_BP)

    def rows(self) -> list[Tensor]:
        """Keys, values, and in q8 the scales of both, in order of positions: (K, positions, ·)."""
        keys, values = self.pages.by_position()
        kept = (keys.numbers.flatten(3), values.numbers.flatten(3), keys.scales, values.scales)
        names = self.table_BP[0].long()
        return [tensor[names].transpose(0, 1).flatten(1, 2) for tensor in kept if tensor is not None]


def store(type: KvType, num_heads: int, positions: int, head_dim: int) -> Store:
    """Room for so many positions, NaN where the type has one."""
    count = num_pages(positions) + 1
    pages = new_pages(type, count, num_heads, head_dim, CPU)
    for tensor in pages.tensors():
        tensor.fill_(torch.nan if tensor.dtype.is_floating_point else 99)
    names = torch.randperm(count, generator=torch.Generator().manual_seed(positions))[: count - 1]
    return Store(pages, names.to(torch.int32).unsqueeze(0))
