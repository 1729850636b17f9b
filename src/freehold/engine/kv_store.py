"""The pages themselves, and the batch that a forward pass takes. Knows which tensors, not whose tokens or why."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from freehold.config import ModelConfig
from freehold.engine.pages import Holding, PageCopy
from freehold.engine.scheduler import Work
from freehold.kernels.kv import PAGE, KvType, PagedSequences, kv_bytes_per_token, new_pages, num_pages
from freehold.model.batch import Batch, LayerKv
from freehold.model.lora import LayerAdapters
from freehold.weights.files import TensorToWrite

_MOST_SNAPSHOTS = 64  # whose windows find room beside those of running sequences


class KvStore:
    """Every layer's pages: as many as its group has. Memory is touched when a page is first written."""

    def __init__(self, config: ModelConfig, counts: Sequence[int], *, type: KvType, device: torch.device) -> None:
        windows = group_windows(config)
        self._device = device
        self._group_of_layer = [windows.index(window) for window in config.windows]
        self._layers = [
            new_pages(type, counts[group], config.num_kv_heads, config.head_dim, device)
            for group in self._group_of_layer
        ]
        self._tables: list[Tensor] = []
        self._made_from: list[tuple[Holding, int]] = []  # and at which version

    @property
    def num_bytes(self) -> int:
        """Of all pages."""
        return sum(layer.num_bytes for layer in self._layers)

    def copy(self, copies: Iterable[PageCopy]) -> None:
        """Copy whole pages, in this order."""
        for copy in copies:
            for group, layer in zip(self._group_of_layer, self._layers, strict=True):
                if group == copy.group:
                    for tensor in layer.tensors():
                        tensor[copy.target] = tensor[copy.source]

    def parts(self, holding: Holding) -> list[TensorToWrite]:
        """What a holding's pages contain, by layer, (pages, …): copied one by one when they are asked for."""

        def part(name: str, tensor: Tensor, pages: list[int]) -> TensorToWrite:
            return TensorToWrite(name, tensor.dtype, (len(pages), *tensor.shape[1:]), lambda: iter([tensor[pages]]))

        return [part(*which) for which in self._parts(holding)]

    def write(self, holding: Holding, contents: Iterable[tuple[str, Tensor]]) -> None:
        """Fill a holding's pages with its parts."""
        targets = {name: (tensor, pages) for name, tensor, pages in self._parts(holding)}
        for name, content in contents:
            tensor, pages = targets.pop(name)
            tensor[pages] = content.to(tensor.device)
        assert not targets, f"no contents for {', '.join(targets)}"

    def _parts(self, holding: Holding) -> list[tuple[str, Tensor, list[int]]]:
        parts = []
        for i, (group, layer) in enumerate(zip(self._group_of_layer, self._layers, strict=True)):
            pages = holding.tables[group][holding.firsts[group] :]
            parts += [(f"{i}.{part}", tensor, pages) for part, tensor in enumerate(layer.tensors())]
        return parts

    def batch(self, works: Sequence[Work], adapters: LayerAdapters | None = None) -> Batch:
        """What the forward pass of these tokens, one sequence after the other, runs on."""
        holdings = [work.sequence.holding for work in works if work.sequence.holding is not None]
        assert len(holdings) == len(works)
        made_from = [(holding, holding.version) for holding in holdings]
        if made_from != self._made_from:  # from one decode step to the next, tables rarely change
            self._tables = [self._table(tables) for tables in zip(*(h.tables for h in holdings), strict=True)]
            self._made_from = made_from
        counts = [work.count + len(work.guesses) for work in works]
        lengths = [work.start + count for work, count in zip(works, counts, strict=True)]
        sequences = [PagedSequences(counts, lengths, table_BP) for table_BP in self._tables]
        positions_T = torch.tensor(sequences[0].positions(), device=self._device)
        pairs = zip(self._layers, self._group_of_layer, strict=True)
        return Batch(positions_T, [LayerKv(pages, sequences[group]) for pages, group in pairs], adapters=adapters)

    def forget_tables(self) -> None:
        """Hold on to no sequence's pages."""
        self._tables, self._made_from = [], []

    def _table(self, tables: Sequence[list[int]]) -> Tensor:
        width = max(map(len, tables))
        rows = [table + [0] * (width - len(table)) for table in tables]
        return torch.tensor(rows, dtype=torch.int32, device=self._device)


def group_windows(config: ModelConfig) -> list[int | None]:
    """The windows of the groups, in the order in which layers have them first."""
    return list(dict.fromkeys(config.windows))


def page_counts(config: ModelConfig, *, tokens: int, max_num_seqs: int, chunk: int) -> list[int]:
    """Pages per group for `tokens` of all sequences and cached prefixes together.

    In full layers a sequence leaves up to a page unused. Windowed layers need what is in sight of each running sequence
    and of some cached prefixes, and never more than full layers.
    """
    full = num_pages(tokens) + max_num_seqs
    counts = []
    for window in group_windows(config):
        if window is None:
            counts.append(full)
        else:
            in_sight = num_pages(window) + 1
            running = max_num_seqs * in_sight + num_pages(window - 1 + chunk) + 1
            counts.append(min(full, running + _MOST_SNAPSHOTS * in_sight))
    return counts


def kv_store_bytes(config: ModelConfig, counts: Sequence[int], type: KvType) -> int:
    """What all pages take when every one has been written."""
    per_page = kv_bytes_per_token(type, config.num_kv_heads, config.head_dim) * PAGE
    windows = group_windows(config)
    return per_page * sum(counts[windows.index(window)] for window in config.windows)
