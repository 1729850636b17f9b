"""DPO: an adapter learns which of two answers is the better one (https://arxiv.org/abs/2305.18290, equation 7).

The reference is the same model as the run begins with it: without an adapter, or with the one that is to learn on. No
second model is loaded. What the reference says of a pair is computed when the pair first comes up, without a gradient,
and kept: two numbers a pair, so that every later epoch and validation costs what supervised training costs. Both
answers of a pair lie in one row. With label smoothing it is the conservative DPO of https://ericmitchell.ai/cdpo.pdf.
An objective of loop.py, whose targets are pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.model.lora import Adapter, Factors
from freehold.model.transformer import Transformer
from freehold.train.adapting import AdapterTuning
from freehold.train.data import PreferenceData
from freehold.train.examples import Pair, Pairs
from freehold.train.forward import taught
from freehold.train.objective import RowLoss, RowSize
from freehold.train.options import DpoOptions, LoraOptions
from freehold.train.packing import PackedRow
from freehold.weights.layouts import WeightTable


class PairRow(NamedTuple):
    """A pair, the chosen answer first; `name` tells it from all others."""

    name: tuple[str, int]
    row: PackedRow
    num_chosen: int


class PairRows(Sequence[PairRow]):
    """One row for each pair, put together when it is asked for."""

    def __init__(self, kind: str, pairs: Pairs, order: Sequence[int]) -> None:
        self._kind = kind
        self._pairs = pairs
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> PairRow: ...

    @overload
    def __getitem__(self, index: slice) -> "PairRows": ...

    def __getitem__(self, index: int | slice) -> "PairRow | PairRows":
        if isinstance(index, slice):
            return PairRows(self._kind, self._pairs, self._order[index])
        number = self._order[index]
        return _pair_row((self._kind, number), self._pairs[number])


class _Answers(NamedTuple):
    """Log-probabilities of a pair's answers as a whole."""

    chosen: Tensor
    rejected: Tensor


class DpoTuning(AdapterTuning):
    """An adapter and the pairs that it learns from."""

    def __init__(
        self,
        transformer: Transformer,
        adapter: Adapter,
        options: LoraOptions,
        dpo: DpoOptions,
        data: PreferenceData,
        *,
        seed: int,
        checkpointing: bool = False,
        base_model: str | None = None,
        table: WeightTable | None = None,
    ) -> None:
        super().__init__(transformer, adapter, options, checkpointing=checkpointing, base_model=base_model, table=table)
        self._before = _as_it_is(adapter)
        self._dpo = dpo
        self._data = data
        self._seed = seed
        self._of_reference: dict[tuple[str, int], _Answers] = {}

    @property
    def rows_per_epoch(self) -> int:
        return len(self._data.training)

    def rows(self, epoch: int) -> PairRows:
        order = list(range(len(self._data.training)))
        Random(f"{self._seed} {epoch}").shuffle(order)
        return PairRows("training", self._data.training, order)

    def validation_rows(self) -> PairRows:
        return PairRows("validation", self._data.validation, range(len(self._data.validation)))

    def size(self, row: PairRow) -> RowSize:
        return RowSize(1, len(row.row.tokens))

    def loss(self, row: PairRow, *, training: bool) -> RowLoss:
        if row.name not in self._of_reference:
            with torch.no_grad():
                self._of_reference[row.name] = _answers(row, self._said_by_reference(row.row))
        of_reference = self._of_reference[row.name]
        said = self._taught(row.row, training=training)
        of_policy = _answers(row, said.log_probs_S)
        rewards = [self._dpo.beta * (ours - theirs) for ours, theirs in zip(of_policy, of_reference, strict=True)]
        chosen, rejected = rewards
        loss = dpo_loss(chosen - rejected, self._dpo.label_smoothing)
        found = self._loss(loss, said.balance, num_targets=1, training=training)
        figures = {
            "rewards_chosen": float(chosen.detach()),
            "rewards_rejected": float(rejected.detach()),
            "rewards_margin": float((chosen - rejected).detach()),
            "rewards_accuracy": float(chosen.detach() > rejected.detach()),
        }
        return found._replace(figures={**found.figures, **figures})

    def _said_by_reference(self, row: PackedRow) -> Tensor:
        """Computed in the very same way as by the adapter that learns, also where what was there before adds zeros.
        Where activations are rounded, another order of operations is as far off as the rounding is."""
        adapter = self._before if self._folded is None else None
        return taught(self._transformer, row, adapter=adapter).log_probs_S


def dpo_loss(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of the difference of two rewards, each beta times the log-probability that an answer has gained."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _as_it_is(adapter: Adapter) -> Adapter:
    """A copy that does not learn. One that adds nothing has no memory of its own."""

    def copied(pair: Factors) -> Factors:
        a, b = pair.a.detach(), pair.b.detach()
        return Factors(a.clone(), b.clone()) if b.any() else Factors(a, b.new_zeros(()).expand_as(b))

    return replace(adapter, factors={name: copied(pair) for name, pair in adapter.factors.items()})


def _pair_row(name: tuple[str, int], pair: Pair) -> PairRow:
    chosen, rejected = pair
    row = PackedRow(
        [*chosen.tokens, *rejected.tokens],
        [*chosen.targets, *rejected.targets],
        [len(chosen.tokens), len(rejected.tokens)],
    )
    return PairRow(name, row, chosen.num_targets)


def _answers(row: PairRow, log_probs_S: Tensor) -> _Answers:
    return _Answers(log_probs_S[: row.num_chosen].sum(), log_probs_S[row.num_chosen :].sum())
