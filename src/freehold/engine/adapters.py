"""The adapters that an engine can compute with, by name, and which of them each token of a step wants.

Requests name their adapter, and prefixes are told apart by its digest: keys and values computed with one are wrong for
every other. Adapters may be added while the engine runs, from any thread; none is ever taken away, since a request that
waits may name it. Knows factors and names, not where they were read.
"""

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from freehold.engine.request import check_adapter
from freehold.engine.scheduler import Work
from freehold.errors import UsageError
from freehold.model.lora import Adapter, LayerAdapters, TokenAdapters
from freehold.model.packed_lora import PackedAdapter, PackedTokenAdapters, pack_adapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Known(NamedTuple):
    adapter: Adapter | PackedAdapter
    digest: str
    harmony: bool | None


class Adapters:
    """Names in the order in which they came. They are `packed` for a model whose weights are."""

    def __init__(self, *, packed: bool) -> None:
        self._packed = packed
        self._known: dict[str, _Known] = {}  # never changed, only replaced: whoever reads it needs no lock
        self._adding = threading.Lock()
        self._made_from: list[tuple[str | None, int]] = []
        self._made: LayerAdapters | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def check_name(self, name: str) -> None:
        """Raise UsageError where no adapter can be added by this name."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"an adapter cannot be called {name!r:.80}; use up to 64 letters, digits, dots, dashes and underscores"
            )
        if name in self._known:
            raise UsageError(f"there is an adapter {name!r} already; give this one another name")

    def add(self, name: str, adapter: Adapter) -> None:
        """Raises UsageError as `check_name` does."""
        known = _Known(pack_adapter(adapter) if self._packed else adapter, _digest(adapter), adapter.harmony)
        with self._adding:
            self.check_name(name)
            self._known = {**self._known, name: known}

    def digest(self, name: str | None) -> str:
        """Of everything that an adapter computes with; empty for the model as it is."""
        return "" if name is None else self._known[name].digest

    def harmony(self, name: str | None) -> bool | None:
        """Whether an adapter learnt from chats in Harmony; None where nothing says, and for the model as it is."""
        return None if name is None or name not in self._known else self._known[name].harmony

    def of_step(self, works: Sequence[Work], device: torch.device) -> LayerAdapters | None:
        """What the forward pass of a step asks."""
        wanted = [(work.sequence.request.adapter, work.count + len(work.guesses)) for work in works]
        if wanted != self._made_from:  # from one decode step to the next they are rarely others
            self._made, self._made_from = self.of_tokens(wanted, device), wanted
        return self._made

    def of_tokens(self, wanted: Sequence[tuple[str | None, int]], device: torch.device) -> LayerAdapters | None:
        """What a forward pass asks whose tokens, so many in a row, are computed with these; None where nobody has one.

        Raises UsageError for a name that is not there.
        """
        used = list(dict.fromkeys(name for name, _ in wanted if name is not None))
        for name in used:
            check_adapter(name, self)
        if not used:
            return None
        rows: dict[str | None, int] = {None: -1} | {name: row for row, name in enumerate(used)}
        rows_T = torch.tensor([rows[name] for name, count in wanted for _ in range(count)], device=device)
        adapters = [self._known[name].adapter for name in used]
        if self._packed:
            return PackedTokenAdapters([adapter for adapter in adapters if isinstance(adapter, PackedAdapter)], rows_T)
        return TokenAdapters([adapter for adapter in adapters if isinstance(adapter, Adapter)], rows_T)


def _digest(adapter: Adapter) -> str:
    """Equal for adapters that compute the same, whatever their files are called."""
    digest = hashlib.blake2b(digest_size=16)
    for name, factors in adapter.factors.items():
        digest.update(f"{name} {adapter.spec.scaling(name)!r}".encode())
        for factor in factors:
            digest.update(f" {factor.dtype} {tuple(factor.shape)} ".encode())
            digest.update(_bytes(factor))
    return digest.hexdigest()


def _bytes(factor: Tensor) -> bytes:
    flat = factor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
