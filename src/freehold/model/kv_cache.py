"""Keys and values of one sequence, in pages of its own.

Full layers keep every position, windowed ones what is in sight.

The plain cache: for one conversation, and what the engine's shared pages are tested against.
"""

import torch

from freehold.config import ModelConfig
from freehold.kernels.kv import PAGE, KvPages, KvType, PagedSequences, new_pages, num_pages
from freehold.model.batch import Batch, LayerKv

_LEAST_PAGES = 16  # that a growing cache adds at once


class KVCache:
    """Holds the positions 0 … length − 1 of one sequence. `extend` makes room, the forward pass fills it."""

    def __init__(
        self, config: ModelConfig, *, type: KvType, device: torch.device, max_length: int | None = None
    ) -> None:
        """`max_length` is how many positions will come at most, if that is less than the model's context."""
        self.length = 0
        self._device = device
        self._most_pages = num_pages(max_length or config.max_context)
        self._tables = {window: _Table(window, device) for window in config.windows}
        self._windows = config.windows
        self._pages = [new_pages(type, 0, config.num_kv_heads, config.head_dim, device) for _ in config.windows]

    @property
    def num_bytes(self) -> int:
        return sum(pages.num_bytes for pages in self._pages)

    def extend(self, count: int) -> Batch:
        """The batch that a forward pass of the next `count` tokens takes. It counts them as there."""
        start = self.length
        self.length += count
        for table in self._tables.values():
            table.move_to(start, self.length)
        for i, window in enumerate(self._windows):
            self._pages[i] = self._grown(self._pages[i], window)
        sequences = {
            window: PagedSequences([count], [self.length], table.names_BP) for window, table in self._tables.items()
        }
        positions_T = torch.arange(start, self.length, device=self._device)
        pairs = zip(self._pages, self._windows, strict=True)
        return Batch(positions_T, [LayerKv(pages, sequences[window]) for pages, window in pairs])

    def _grown(self, old: KvPages, window: int | None) -> KvPages:
        needed = self._tables[window].num_pages
        if needed <= len(old):
            return old
        if window is None:
            needed = max(needed, min(len(old) + max(len(old) // 2, _LEAST_PAGES), self._most_pages))
        _, heads, _, head_dim = old.values.shape
        new = new_pages(old.type, needed, heads, head_dim, old.values.device)
        for source, target in zip(old.tensors(), new.tensors(), strict=True):
            target[: len(old)] = source
        return new


class _Table:
    """Which page holds which positions of a sequence, the same in all layers of one window."""

    def __init__(self, window: int | None, device: torch.device) -> None:
        self._window = window
        self._device = device
        self._names: list[int] = []  # of the pages of positions 0 … 63, 64 … 127, …; those out of sight are passed on
        self._first = 0  # the first one in sight
        self._free: list[int] = []
        self.num_pages = 0  # with names below this
        self.names_BP = self._as_tensor()  # made anew when a page comes, not for every token

    def move_to(self, start: int, length: int) -> None:
        """Name pages for positions up to `length`; queries at `start` and later will look."""
        if self._window is not None:
            first = max(0, start - self._window + 1) // PAGE
            self._free += self._names[self._first : first]
            self._first = max(self._first, first)
        if len(self._names) == num_pages(length):
            return
        while len(self._names) < num_pages(length):
            if not self._free:
                self._free.append(self.num_pages)
                self.num_pages += 1
            self._names.append(self._free.pop())
        self.names_BP = self._as_tensor()

    def _as_tensor(self) -> torch.Tensor:
        return torch.tensor([self._names], dtype=torch.int32, device=self._device)
