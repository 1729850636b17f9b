"""A checkpoint's weights with an adapter's share added to each, as a source for whoever writes checkpoints.

Whatever the adapter leaves alone is handed on as it is stored, to the bit: tensors that it does not target, and of the
experts' stacks every expert of which a factor is zero, as those of experts that no training token was sent to. The rest
is computed in float32, one expert or one dense tensor at a time. Knows no files. Called by merge.py and fitted.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.model.lora import EXPERT_KINDS, Adapter, weight_name
from freehold.weights import mxfp4
from freehold.weights.layouts import WeightTable, is_expert_matrix
from freehold.weights.mxfp4 import Mxfp4Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """How much of a model an adapter changes: of dense tensors, and of experts' matrices, each expert's by itself."""

    dense: int
    matrices: int
    of_matrices: int


class MergedSource:
    """See weights.layouts.WeightSource. Changed experts are float32; changed dense tensors keep their type."""

    def __init__(self, table: WeightTable, adapter: Adapter, *, origin: str) -> None:
        self.origin = origin
        self.adapter = adapter
        self._table = table
        self._targets = {weight_name(target): target for target in adapter.factors}

    def dtype(self, name: str) -> torch.dtype:
        return self._dense(name).dtype

    def rows(self, name: str) -> Iterator[Tensor]:
        yield self.dense(name)

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        return (self.expert(name, expert) for expert in range(self._table[name].shape[0]))

    def dense(self, name: str) -> Tensor:
        """As it is to be stored."""
        base = self._dense(name)
        if not self.touches(name):
            return base
        return (base.float() + self.adapter.weight_delta(self._targets[name])).to(base.dtype)

    def expert(self, name: str, expert: int) -> Mxfp4Tensor | Tensor:
        """The stored matrix where the adapter leaves it alone, otherwise the sum: in float32, or where the adapter was
        trained on rounded weights, rounded in the very same way."""
        base = self._table[name][expert]
        if not self.touches(name, expert):
            return base
        gained = self.adapter.weight_delta(self._targets[name], expert)
        if not isinstance(base, Mxfp4Tensor):
            return base.float() + gained
        values = mxfp4.unpack(base) + gained
        return mxfp4.pack_dithered(values, base, seed=_seed(name, expert)) if self.adapter.dithered else values

    def layer(self, number: int) -> WeightTable:
        """One layer's tensors: dense ones as they are to be stored, experts as they were."""
        names = [name for name in self._table if name.startswith(f"layers.{number}.")]
        return {name: self._table[name] if is_expert_matrix(name) else self.dense(name) for name in names}

    def touches(self, name: str, expert: int | None = None) -> bool:
        """Whether the adapter changes a tensor, or one expert's matrix."""
        factors = self.adapter.factors.get(self._targets.get(name, ""))
        if factors is None:
            return False
        a, b = factors if expert is None else (factors.a[expert], factors.b[expert])
        return bool(a.any()) and bool(b.any())

    def touched(self) -> Touched:
        dense = [name for name, target in self._targets.items() if not target.endswith(EXPERT_KINDS)]
        stacks = [name for name, target in self._targets.items() if target.endswith(EXPERT_KINDS)]
        return Touched(
            dense=sum(self.touches(name) for name in dense),
            matrices=sum(self.touches(name, e) for name in stacks for e in range(self._table[name].shape[0])),
            of_matrices=sum(self._table[name].shape[0] for name in self._table if is_expert_matrix(name)),
        )

    def _dense(self, name: str) -> Tensor:
        tensor = self._table[name]
        assert isinstance(tensor, Tensor), f"{name} is packed"
        return tensor


def _seed(name: str, expert: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name} {expert}".encode(), digest_size=4).digest())
