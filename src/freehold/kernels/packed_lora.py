"""Adapters' factors as the CPU kernels read them, and which token has which: for inference, without gradients.

A pair of factors adds scaling · (x · Aᵀ) · Bᵀ to the product of x and a matrix. Both are packed in float32: A is
(R, I), B has the rows of the matrix, paired where that is; of experts there are E of each. freehold.kernels.ops takes
these, freehold.model.packed_lora makes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from freehold.errors import UsageError
from freehold.weights.packed import PackedMatrix


@dataclass(slots=True, eq=False)
class PackedLora:
    """The factors for one matrix, or for a stack of them. Not to be changed once made."""

    a: PackedMatrix
    b: PackedMatrix
    scaling: float
    native_handle: object | None = field(default=None, init=False, repr=False)  # made by the kernels on first use

    def __post_init__(self) -> None:
        *stack, rank, _ = self.a.shape
        if self.a.form != "f32" or self.b.form != "f32" or self.a.paired:
            raise UsageError(f"factors are packed in f32, and A unpaired; got A in {self.a.form}, B in {self.b.form}")
        if [*self.b.shape[:-2], self.b.shape[-1]] != [*stack, rank]:
            raise UsageError(f"A {tuple(self.a.shape)} and B {tuple(self.b.shape)} are not of one rank")


@dataclass(slots=True, eq=False)
class PackedExpertLora:
    """What one adapter adds inside a mixture; None where it leaves a matrix alone."""

    gate_up: PackedLora | None
    down: PackedLora | None
    native_handle: object | None = field(default=None, init=False, repr=False)


class LoraParts(NamedTuple):
    """What adapters add to a linear layer. Part i is for the tokens whose number in `rows_T` (int64) is `rows[i]`, and
    for the columns of the result from `columns[i]` on; different parts never meet in one number."""

    loras: Sequence[PackedLora]
    rows: Sequence[int]
    columns: Sequence[int]
    rows_T: Tensor


class PackedLoras(NamedTuple):
    """What adapters add inside a mixture: token t's is number `rows_T[t]` (int64), none where that is -1."""

    loras: Sequence[PackedExpertLora]
    rows_T: Tensor
