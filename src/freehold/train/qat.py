"""Quantisation-aware LoRA: every row is computed with the weights that `freehold merge` will write.

The adapter is folded into the weights as merge folds it (hub/merged.py): experts to MXFP4 by `mxfp4.pack_dithered`,
attention and router to the checkpoint's type, all laid out for the kernels that serve. The forward pass is the engine's
own. Gradients go straight through the rounding (https://arxiv.org/abs/1308.3432): to the inputs through the rounded
weights, to the factors as if their product were added. Nothing is clamped: what a block's scale cannot hold gets a
coarser scale. So the adapter and the model it was trained on determine the merged checkpoint.

Weights are folded anew when factors have changed, once a step: only those of experts that have learnt something. They
take the memory of those of the model that are adapted, once more. Called by adapting.py.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from freehold.hub.merged import MergedSource
from freehold.kernels.ops import Weight
from freehold.model.lora import EXPERT_KINDS, Adapter
from freehold.model.transformer import Experts, Layer, Linear, Transformer
from freehold.weights import packed
from freehold.weights.layouts import WeightTable
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import PackedMatrix


class FoldedModel:
    """A model with an adapter in its weights. `table` are the checkpoint's own tensors (Checkpoint.table)."""

    def __init__(self, base: Transformer, table: WeightTable, adapter: Adapter) -> None:
        assert adapter.dithered
        self._source = MergedSource(table, adapter, origin="training")
        self._factors = adapter.parameters
        self._targets = set(adapter.factors)
        self._versions: list[int] = []
        self._folded: set[tuple[str, int]] = set()
        self._refreshes: list[Callable[[], None]] = []
        self._transformer = copy.copy(base)
        self._transformer.layers = [self._layer(f"layers.{i}", layer) for i, layer in enumerate(base.layers)]

    def transformer(self) -> Transformer:
        """With the factors that there are now. What was handed out before changes along."""
        # Counted by torch at every change in place: an optimizer's, or of who restores a checkpoint.
        versions = [factor._version for factor in self._factors]
        if versions != self._versions:
            with torch.no_grad():
                for refresh in self._refreshes:
                    refresh()
            self._versions = versions
        return self._transformer

    def _layer(self, name: str, layer: Layer) -> Layer:
        attention, experts = layer.attention, layer.experts
        return Layer(
            replace(
                attention,
                qkv=self._linear([f"{name}.{kind}" for kind in "qkv"], attention.qkv),
                o=self._linear([f"{name}.o"], attention.o),
            ),
            self._experts(name, replace(experts, router=self._linear([f"{name}.router"], experts.router))),
        )

    def _linear(self, names: list[str], base: Linear) -> Linear:
        """Of targets whose rows lie one after the other."""
        if not self._targets.intersection(names):
            return base
        weight = _own(base.weight_OD)

        def refresh() -> None:
            _put(weight, torch.cat([self._source.dense(f"{name}.weight") for name in names]))

        self._refreshes.append(refresh)
        assert not isinstance(weight, Mxfp4Tensor)
        return replace(base, weight_OD=weight)

    def _experts(self, layer: str, base: Experts) -> Experts:
        stacks = {kind: self._stack(f"{layer}.{kind}", getattr(base, kind)) for kind in EXPERT_KINDS}
        return replace(base, gate_up=stacks["gate_up"], down=stacks["down"])

    def _stack(self, name: str, base: Weight) -> Weight:
        if name not in self._targets:
            return base
        stack = _own(base)

        def refresh() -> None:
            for expert in range(base.shape[0]):
                # What was never touched is the base's own; what once was may have to become that again.
                if self._source.touches(name, expert) or (name, expert) in self._folded:
                    self._folded.add((name, expert))
                    values = self._source.expert(name, expert)
                    # Plain experts are stored in bfloat16.
                    _put(stack[expert], values if isinstance(values, Mxfp4Tensor) else values.to(torch.bfloat16))

        self._refreshes.append(refresh)
        return stack


def _own(weight: Weight) -> Weight:
    """A copy that may be written to."""
    if isinstance(weight, PackedMatrix):
        scales = None if weight.scales is None else weight.scales.clone()
        return PackedMatrix(weight.form, weight.shape, weight.data.clone(), scales, weight.paired)
    if isinstance(weight, Mxfp4Tensor):
        return Mxfp4Tensor(weight.blocks.clone(), weight.scales.clone())
    return weight.clone()


def _put(weight: Weight, values: Tensor | Mxfp4Tensor) -> None:
    """One matrix, as a checkpoint has it, in place of what is there."""
    if isinstance(weight, PackedMatrix):
        # As it would be stored and then loaded: plain values are in the checkpoint's type.
        packed.pack_into(weight.data, weight.scales, values, weight.form, paired=weight.paired)
    elif isinstance(weight, Mxfp4Tensor):
        assert isinstance(values, Mxfp4Tensor)
        weight.blocks.copy_(values.blocks)
        weight.scales.copy_(values.scales)
    else:
        assert isinstance(values, Tensor)
        weight.copy_(values)
