"""What the loop asks of a way of training: what is changed, by which examples, and how far off each is.

The loop knows nothing beyond this: no tokens, no model, no adapter. Supervised LoRA is sft.py; others stand beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

Row = TypeVar("Row")


class RowSize(NamedTuple):
    """`num_targets` is what the row counts for: tokens that are learnt, or pairs. `num_tokens` is what it costs."""

    num_targets: int
    num_tokens: int


class RowLoss(NamedTuple):
    """`total` is the sum over the row's targets, differentiable. A step's loss is the sum of its rows' totals by the
    sum of their targets; to that comes `penalty`, which each row has by its share of the targets, and which no
    reported loss contains. `figures` are further sums over the targets; their means are reported by their names."""

    total: Tensor
    penalty: Tensor | None = None
    figures: Mapping[str, float] = {}


class Objective(Protocol[Row]):
    """`parameters` are leaf tensors that need a gradient, always the same ones in the same order. Rows are read again
    and again: making one must give the same row each time."""

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    @property
    def rows_per_epoch(self) -> int: ...

    def rows(self, epoch: int) -> Sequence[Row]:
        """Those of an epoch, in the order in which they are learnt; a function of the epoch alone."""
        ...

    def validation_rows(self) -> Sequence[Row]: ...

    def size(self, row: Row) -> RowSize: ...

    def loss(self, row: Row, *, training: bool) -> RowLoss:
        """In training with dropout, drawn from torch's own generator, and with whatever saves memory for the backward
        pass; else as the engine would compute it, and without a gradient."""
        ...

    def save(self, folder: Path) -> None:
        """Write what has been learnt into a folder that is there, as others read it, to the last bit."""
        ...

    def restore(self, folder: Path) -> None:
        """Put what `save` wrote into the parameters. Raises CheckpointError for what is damaged."""
        ...

    @property
    def save_bytes(self) -> int:
        """What `save` writes, roughly."""
        ...
