"""The adapters that an engine can compute with, by name, and which of them each token of a step wants.

Requests name their adapter, and prefixes are told apart by its digest: keys and values computed with one are wrong for
every other. Adapters may be added and removed while the engine runs, from any thread: a request has its own from when
it is submitted until it ends, whatever becomes of the name. Knows factors and names, not where they were read.
"""

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.engine.request import check_adapter
from freehold.engine.scheduler import Work
from freehold.errors import UsageError
from freehold.model.lora import Adapter, LayerAdapters, TokenAdapters
from freehold.model.packed_lora import PackedAdapter, PackedTokenAdapters, pack_adapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, eq=False)
class KnownAdapter:
    """Two of them are the same only if they are one: of one name there may be another one later."""

    adapter: Adapter | PackedAdapter
    digest: str
    """Of everything that it computes with."""
    harmony: bool | None
    """Whether it learnt from chats in Harmony; None where nothing says."""


@dataclass(frozen=True, slots=True)
class _Made:
    wanted: list[tuple[KnownAdapter | None, int]]
    adapters: LayerAdapters | None


class Adapters:
    """Names in the order in which they came. They are `packed` for a model whose weights are."""

    def __init__(self, *, packed: bool) -> None:
        self._packed = packed
        self._known: dict[str, KnownAdapter] = {}  # never changed, only replaced: whoever reads it needs no lock
        self._changing = threading.Lock()
        self._made: _Made | None = None

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
        known = KnownAdapter(pack_adapter(adapter) if self._packed else adapter, _digest(adapter), adapter.harmony)
        with self._changing:
            self.check_name(name)
            self._known = {**self._known, name: known}

    def remove(self, name: str) -> None:
        """Nobody can ask for it from now on. It leaves memory with the last request that has it. Raises UsageError."""
        with self._changing:
            check_adapter(name, self)
            self._known = {other: known for other, known in self._known.items() if other != name}

    def get(self, name: str | None) -> KnownAdapter | None:
        """What goes by this name now; None for the model as it is. Raises UsageError for a name that is not there."""
        known = self._known
        check_adapter(name, known)
        return None if name is None else known[name]

    def rest(self) -> None:
        """Nothing runs: let go of what the last step was computed with. On the engine's thread, as `of_step`."""
        self._made = None

    def harmony(self, name: str | None) -> bool | None:
        """Whether an adapter learnt from chats in Harmony; None where nothing says, and for the model as it is."""
        return None if name is None or name not in self._known else self._known[name].harmony

    def of_step(self, works: Sequence[Work], device: torch.device) -> LayerAdapters | None:
        """What the forward pass of a step asks."""
        wanted = [(_known(work), work.count + len(work.guesses)) for work in works]
        if self._made is None or wanted != self._made.wanted:  # from one decode step to the next they are rarely others
            self._made = _Made(wanted, self._of_tokens(wanted, device))
        return self._made.adapters

    def of_tokens(self, wanted: Sequence[tuple[str | None, int]], device: torch.device) -> LayerAdapters | None:
        """What a forward pass asks whose tokens, so many in a row, are computed with these; None where nobody has one.

        Raises UsageError for a name that is not there.
        """
        return self._of_tokens([(self.get(name), count) for name, count in wanted], device)

    def _of_tokens(
        self, wanted: Sequence[tuple[KnownAdapter | None, int]], device: torch.device
    ) -> LayerAdapters | None:
        used = list(dict.fromkeys(known for known, _ in wanted if known is not None))
        if not used:
            return None
        rows: dict[KnownAdapter | None, int] = {None: -1} | {known: row for row, known in enumerate(used)}
        rows_T = torch.tensor([rows[known] for known, count in wanted for _ in range(count)], device=device)
        adapters = [known.adapter for known in used]
        if self._packed:
            return PackedTokenAdapters([adapter for adapter in adapters if isinstance(adapter, PackedAdapter)], rows_T)
        return TokenAdapters([adapter for adapter in adapters if isinstance(adapter, Adapter)], rows_T)


def _known(work: Work) -> KnownAdapter | None:
    adapter = work.sequence.adapter
    assert adapter is None or isinstance(adapter, KnownAdapter)
    return adapter


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
