"""An adapter that learns, whatever it learns from: its factors, its files, and what rows say under it.

Objectives over an adapter (sft.py, dpo.py) say what the loss is; the rest they have from here.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from freehold.config import ModelConfig
from freehold.errors import CheckpointError, UsageError
from freehold.model.lora import KINDS, Adapter, AdapterSpec, Target, new_adapter
from freehold.model.peft_files import read_peft, write_peft_files
from freehold.model.transformer import Transformer
from freehold.train.forward import Taught, taught
from freehold.train.objective import RowLoss
from freehold.train.options import LoraOptions
from freehold.train.packing import PackedRow
from freehold.train.qat import FoldedModel
from freehold.weights.layouts import WeightTable


class AdapterTuning:
    """The part of an objective (objective.py) that every way to train an adapter shares. `adapter` is one of
    `starting_adapter`, `base_model` the name that PEFT may look for. For QAT, `table` are the checkpoint's own
    tensors."""

    def __init__(
        self,
        transformer: Transformer,
        adapter: Adapter,
        options: LoraOptions,
        *,
        checkpointing: bool = False,
        base_model: str | None = None,
        table: WeightTable | None = None,
    ) -> None:
        self._transformer = transformer
        self.adapter = adapter
        self._options = options
        self._checkpointing = checkpointing
        self._base_model = base_model
        self._parameters = adapter.parameters
        self._folded: FoldedModel | None = None
        if options.qat:
            assert table is not None
            self._folded = FoldedModel(transformer, table, adapter)

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self._parameters

    def save(self, folder: Path) -> None:
        write_peft_files(folder, self.adapter, base_model=self._base_model, dropout=self._options.dropout)

    def restore(self, folder: Path) -> None:
        kept = read_peft(folder, self.adapter.config)
        if kept.spec != self.adapter.spec or kept.dithered != self.adapter.dithered:
            raise CheckpointError(f"{folder} holds an adapter of other targets or ranks than this run's; remove it")
        with torch.no_grad():
            for name, factors in self.adapter.factors.items():
                for parameter, factor in zip(factors, kept.factors[name], strict=True):
                    parameter.copy_(factor)

    @property
    def save_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._parameters)

    def _taught(self, row: PackedRow, *, training: bool) -> Taught:
        """Under the adapter, as it is to be in training or in use."""
        return taught(
            self._transformer if self._folded is None else self._folded.transformer(),
            row,
            adapter=self.adapter,
            folded=self._folded is not None,
            dropout=self._options.dropout if training else 0.0,
            checkpointing=self._checkpointing and training,
            balance=training and self._options.balance > 0,
        )

    def _loss(self, total: Tensor, balance: Tensor, *, num_targets: int, training: bool) -> RowLoss:
        """With the balance term, where it is asked for."""
        if not training or not self._options.balance:
            return RowLoss(total)
        return RowLoss(total, balance * self._options.balance, {"balance": float(balance.detach()) * num_targets})


def adapter_spec(config: ModelConfig, options: LoraOptions) -> AdapterSpec:
    """For a model of these sizes. Raises UsageError for a kind of target that there is not."""
    for target in options.targets:
        if target.kind not in KINDS:
            raise UsageError(f"--target {target.kind!r}: there are {', '.join(KINDS)}")
    kinds = {target.kind: Target(rank=target.rank, alpha=target.alpha) for target in options.targets}
    return AdapterSpec.of_kinds(config, kinds, rslora=options.rslora)


def starting_adapter(
    config: ModelConfig,
    options: LoraOptions,
    *,
    seed: int,
    begins_with: Adapter | None = None,
    device: torch.device | None = None,
    harmony: bool | None = None,
) -> Adapter:
    """To learn with these options: what it `begins_with`, which is the caller's no longer, or one that changes nothing
    yet. `harmony` as in model.lora.Adapter; None leaves that as it was."""
    if begins_with is None:
        spec = adapter_spec(config, options)
        return new_adapter(config, spec, seed=seed, device=device, dithered=options.qat, harmony=harmony)
    harmony = begins_with.harmony if harmony is None else harmony
    adapter = replace(begins_with.to(device=device), dithered=options.qat, harmony=harmony)
    for parameter in adapter.parameters:
        parameter.requires_grad_()
    return adapter
