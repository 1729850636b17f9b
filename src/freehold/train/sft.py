"""Supervised LoRA: an adapter learns what examples say, on the model as it is served.

Examples lie side by side in rows of one length, anew for each epoch. The loss is the cross entropy of the targets; the
balance term comes to it where it is asked for. What is kept is the adapter, as PEFT has it. An objective of loop.py.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from freehold.config import ModelConfig
from freehold.errors import CheckpointError, UsageError
from freehold.model.lora import KINDS, AdapterSpec, Target, new_adapter
from freehold.model.peft_files import read_peft, write_peft_files
from freehold.model.transformer import Transformer
from freehold.train.data import TrainingData
from freehold.train.examples import Examples
from freehold.train.forward import taught
from freehold.train.objective import RowLoss, RowSize
from freehold.train.options import LoraOptions
from freehold.train.packing import PackedRow, pack, packed_row


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


class LoraTuning:
    """An adapter and what it learns from. `base_model` is the name that PEFT may look for."""

    def __init__(
        self,
        transformer: Transformer,
        options: LoraOptions,
        data: TrainingData,
        *,
        max_length: int,
        seed: int,
        checkpointing: bool = False,
        base_model: str | None = None,
    ) -> None:
        self._transformer = transformer
        self._options = options
        self._data = data
        self._max_length = max_length
        self._seed = seed
        self._checkpointing = checkpointing
        self._base_model = base_model
        spec = adapter_spec(transformer.config, options)
        self.adapter = new_adapter(transformer.config, spec, seed=seed, device=transformer.device)
        self._parameters = self.adapter.parameters
        self._rows_per_epoch = len(self.rows(0))

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self._parameters

    @property
    def rows_per_epoch(self) -> int:
        return self._rows_per_epoch

    def rows(self, epoch: int) -> PackedRows:
        """First-fit decreasing has as many rows for the same lengths, whatever the seed."""
        return _packed(self._data.training, self._max_length, f"{self._seed} {epoch}")

    def validation_rows(self) -> PackedRows:
        return _packed(self._data.validation, self._max_length, f"{self._seed} validation")

    def size(self, row: PackedRow) -> RowSize:
        return RowSize(row.num_targets, len(row.tokens))

    def loss(self, row: PackedRow, *, training: bool) -> RowLoss:
        balance = self._options.balance if training else 0.0
        learnt = taught(
            self._transformer,
            row,
            adapter=self.adapter,
            dropout=self._options.dropout if training else 0.0,
            checkpointing=self._checkpointing and training,
            balance=bool(balance),
        )
        total = -learnt.log_probs_S.sum()
        if not balance:
            return RowLoss(total)
        return RowLoss(total, learnt.balance * balance, {"balance": float(learnt.balance.detach()) * row.num_targets})

    def save(self, folder: Path) -> None:
        write_peft_files(folder, self.adapter, base_model=self._base_model)

    def restore(self, folder: Path) -> None:
        kept = read_peft(folder, self.adapter.config)
        if kept.spec != self.adapter.spec:
            raise CheckpointError(f"{folder} holds an adapter of other targets or ranks than this run's; remove it")
        with torch.no_grad():
            for name, factors in self.adapter.factors.items():
                for parameter, factor in zip(factors, kept.factors[name], strict=True):
                    parameter.copy_(factor)

    @property
    def save_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._parameters)


def adapter_spec(config: ModelConfig, options: LoraOptions) -> AdapterSpec:
    """For a model of these sizes. Raises UsageError for a kind of target that there is not."""
    for target in options.targets:
        if target.kind not in KINDS:
            raise UsageError(f"--target {target.kind!r}: there are {', '.join(KINDS)}")
    kinds = {target.kind: Target(rank=target.rank, alpha=target.alpha) for target in options.targets}
    return AdapterSpec.of_kinds(config, kinds, rslora=options.rslora)


def _packed(examples: Examples, max_length: int, seed: str) -> PackedRows:
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest())
    return PackedRows(examples, pack(examples.lengths, max_length, seed=number))
