"""Supervised LoRA: an adapter learns what examples say, on the model as it is served.

Examples lie side by side in rows of one length, anew for each epoch. The loss is the cross entropy of the targets; the
balance term comes to it where it is asked for. An objective of loop.py.
"""

import hashlib
from collections.abc import Sequence
from typing import overload

from freehold.model.lora import Adapter
from freehold.model.transformer import Transformer
from freehold.train.adapting import AdapterTuning
from freehold.train.data import TrainingData
from freehold.train.examples import Examples
from freehold.train.objective import RowLoss, RowSize
from freehold.train.options import LoraOptions
from freehold.train.packing import PackedRow, pack, packed_row
from freehold.weights.layouts import WeightTable


class PackedRows(Sequence[PackedRow]):
    """Rows of examples, each put together when it is asked for."""

    def __init__(self, examples: Examples, rows: Sequence[Sequence[int]]) -> None:
        self._examples = examples
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...

    @overload
    def __getitem__(self, index: slice) -> "PackedRows": ...

    def __getitem__(self, index: int | slice) -> "PackedRow | PackedRows":
        if isinstance(index, slice):
            return PackedRows(self._examples, self._rows[index])
        return packed_row(self._examples, self._rows[index])


class LoraTuning(AdapterTuning):
    """An adapter and the examples that it learns from."""

    def __init__(
        self,
        transformer: Transformer,
        adapter: Adapter,
        options: LoraOptions,
        data: TrainingData,
        *,
        max_length: int,
        seed: int,
        checkpointing: bool = False,
        base_model: str | None = None,
        table: WeightTable | None = None,
    ) -> None:
        super().__init__(transformer, adapter, options, checkpointing=checkpointing, base_model=base_model, table=table)
        self._data = data
        self._max_length = max_length
        self._seed = seed
        self._rows_per_epoch = len(self.rows(0))

    @property
    def rows_per_epoch(self) -> int:
        return self._rows_per_epoch

    def rows(self, epoch: int) -> PackedRows:
        """First-fit decreasing has as many rows for the same lengths, whatever the seed."""
        return packed_rows(self._data.training, self._max_length, f"{self._seed} {epoch}")

    def validation_rows(self) -> PackedRows:
        return packed_rows(self._data.validation, self._max_length, f"{self._seed} validation")

    def size(self, row: PackedRow) -> RowSize:
        return RowSize(row.num_targets, len(row.tokens))

    def loss(self, row: PackedRow, *, training: bool) -> RowLoss:
        said = self._taught(row, training=training)
        return self._loss(-said.log_probs_S.sum(), said.balance, num_targets=row.num_targets, training=training)


def packed_rows(examples: Examples, max_length: int, seed: str) -> PackedRows:
    """All of them, in an order and in company that are a function of the seed."""
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest())
    return PackedRows(examples, pack(examples.lengths, max_length, seed=number))
