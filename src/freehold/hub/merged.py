"""A checkpoint's weights with an adapter's share added to each, as a source for whoever writes checkpoints.

Whatever the adapter leaves alone is handed on as it is stored, to the bit: tensors that it does not target, and of the
experts' stacks every expert of which a factor is zero, as those of experts that no training token was sent to. The rest
is computed in float32, one expert or one dense tensor at a time. Knows no files. Called by merge.py, by
session/merge_receipt.py, and by train/qat.py and train/full.py, which train on what would be written.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.errors import CheckpointError, UsageError
from freehold.model.lora import EXPERT_KINDS, Adapter, weight_name
from freehold.weights import mxfp4
from freehold.weights.layouts import WeightTable, is_expert_matrix
from freehold.weights.mxfp4 import Mxfp4Tensor

_KEPT_BY_NEAREST = 0.95  # of a change: with that much, chance would add more noise than it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """How much of a model an adapter changes: of dense tensors, and of experts' matrices, each expert's by itself."""

    dense: int
    matrices: int
    of_matrices: int

    def describe(self) -> str:
        return (
            f"the adapter changes {self.dense} dense tensors and {self.matrices} of {self.of_matrices} matrices of "
            "experts; all else keeps its bytes"
        )


class MergedSource:
    """See weights.layouts.WeightSource. Changed dense tensors keep their type; changed experts are float32, for the
    writer to round to the nearest numbers of its format. All that is asked for by name is on the adapter's device."""

    def __init__(self, table: WeightTable, adapter: Adapter, *, origin: str) -> None:
        self.origin = origin
        self.adapter = adapter
        self._table = table
        self._device = adapter.parameters[0].device
        self._targets = {weight_name(target): target for target in adapter.factors}

    def dtype(self, name: str) -> torch.dtype:
        return self._dense(name).dtype

    def rows(self, name: str) -> Iterator[Tensor]:
        yield self.dense(name)

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        return (self.expert(name, expert) for expert in range(self._table[name].shape[0]))

    def dense(self, name: str) -> Tensor:
        """As it is to be stored."""
        base = self._dense(name).to(self._device)
        if not self.touches(name):
            return base
        merged = (base.float() + self.adapter.weight_delta(self._targets[name])).to(base.dtype)
        return self._checked(merged, name)

    def expert(self, name: str, expert: int) -> Mxfp4Tensor | Tensor:
        """The stored matrix where the adapter leaves it alone, otherwise the sum: in float32, or where the adapter was
        trained on rounded weights, rounded in the very same way."""
        base = self._table[name][expert].to(self._device)
        if not self.touches(name, expert):
            return base
        gained = self.adapter.weight_delta(self._targets[name], expert)
        if not isinstance(base, Mxfp4Tensor):
            return self._checked(base.float() + gained, name)
        values = mxfp4.unpack(base) + gained
        return mxfp4.pack_dithered(values, base, seed=dither_seed(name, expert)) if self.adapter.dithered else values

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

    def _checked(self, values: Tensor, name: str) -> Tensor:
        """MXFP4 can hold no other numbers, and says so itself."""
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{self.origin}: {name} is beyond all numbers with the adapter in it; train it again")
        return values

    def _dense(self, name: str) -> Tensor:
        tensor = self._table[name]
        assert isinstance(tensor, Tensor), f"{name} is packed"
        return tensor


class RandomlyRounded(MergedSource):
    """The same with changed experts in MXFP4. Where the nearest numbers would lose the change, each number is rounded
    up or down by chance, so that its mean is the sum: errors by chance cancel in sums of thousands, a loss does not.

    The same sums give the same numbers: chance is drawn from an expert's name. Experts that were not MXFP4 before are
    left to the writer: their numbers lie anywhere between two of the format, and the nearest is as often up as down.
    """

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        for expert in range(self._table[name].shape[0]):
            base, matrix = self._table[name][expert], self.expert(name, expert)
            if isinstance(base, Mxfp4Tensor) and isinstance(matrix, Tensor):
                matrix = self._rounded(base, matrix, name, expert)
            yield matrix

    def _rounded(self, base: Mxfp4Tensor, matrix: Tensor, name: str, expert: int) -> Mxfp4Tensor:
        try:
            nearest = mxfp4.pack(matrix)
        except UsageError as error:
            raise CheckpointError(
                f"{self.origin}: {name} of expert {expert}: {error}; train the adapter again"
            ) from None
        before = mxfp4.unpack(base)
        wanted, made = (matrix - before).flatten().double(), (mxfp4.unpack(nearest) - before).flatten().double()
        if wanted @ made >= _KEPT_BY_NEAREST * (wanted @ wanted):
            return nearest
        return mxfp4.pack_dithered(matrix, base, seed=dither_seed(name, expert))


def dither_seed(name: str, expert: int) -> int:
    """Of the thresholds for one expert's matrix, by its canonical name: for mxfp4.pack_dithered."""
    return zlib.crc32(f"{name}.{expert}".encode())
