"""Merged weights whose experts are rounded to MXFP4 by what they do to real tokens (weights.fitting).

Calibration tokens go through the model layer by layer while it is written, through the weights as they are written: an
expert is fitted to the inputs that it will meet. In memory are the tokens' hidden states, what the experts of one layer
make of them, that layer's attention, and one expert. Called by merge.py, which has the tokens from its caller.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.config import SWIGLU_ALPHA, ModelConfig
from freehold.hub.merged import MergedSource
from freehold.kernels import backends, ops
from freehold.model.batch import Batch
from freehold.model.layerwise import one_layer
from freehold.model.lora import Adapter
from freehold.model.transformer import Experts
from freehold.weights import mxfp4
from freehold.weights.fitting import pack_fitted
from freehold.weights.layouts import WeightTable
from freehold.weights.mxfp4 import Mxfp4Tensor

_LEAST_INPUTS = 256  # an expert that fewer tokens were sent to is fitted also to those that came nearest to it


class FittedSource(MergedSource):
    """See MergedSource. Experts must be asked for as the model has them: a layer's gate_up, then its down, each once.

    `sequences` are the token ids of texts like those that the model will see.
    """

    def __init__(
        self,
        config: ModelConfig,
        table: WeightTable,
        adapter: Adapter,
        sequences: Sequence[Sequence[int]],
        *,
        origin: str,
    ) -> None:
        super().__init__(table, adapter, origin=origin)
        self._config = config
        self._batch = Batch.whole([len(sequence) for sequence in sequences], num_layers=1, device=torch.device("cpu"))
        tokens_T = torch.tensor([token for sequence in sequences for token in sequence])
        self._x_TD = F.embedding(tokens_T, self.dense("embedding")).float()
        self._layer: _Layer | None = None

    def experts(self, name: str) -> Iterator[Mxfp4Tensor | Tensor]:
        _, number, kind = name.split(".")
        if kind == "gate_up":
            assert int(number) == (0 if self._layer is None else self._layer.number + 1), f"{name} comes out of order"
            self._layer = self._attended(int(number))
        layer = self._layer
        assert layer is not None and layer.number == int(number), f"{name} comes out of order"
        for expert in range(self._config.num_experts):
            yield self._gate_up(layer, expert) if kind == "gate_up" else self._down(layer, expert)
        if kind == "down":
            self._x_TD = layer.out_TD

    @torch.inference_mode()
    @backends.reference_only()
    def _attended(self, number: int) -> "_Layer":
        """The hidden states go through a layer's attention, and are sent to its experts."""
        transformer = one_layer(self._config, self.layer(number), number)
        x_TD = transformer.attention(self._x_TD, 0, self._batch, transformer.rotation(self._batch))
        weights = transformer.layers[0].experts
        logits_TE = weights.router(x_TD, norm=weights.norm)
        num_active = self._config.num_active_experts
        chosen_TA = ops.route(logits_TE, num_active).experts_TA
        return _Layer(
            number=number,
            weights=weights,
            normed_TD=ops.rms_norm(x_TD, weights.norm.weight_D, eps=weights.norm.eps),
            sent_TE=torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, chosen_TA, True),
            # Where an expert is chosen this is its weight; elsewhere it says how near it was.
            share_TE=torch.exp(logits_TE - torch.topk(logits_TE, num_active).values.logsumexp(-1, keepdim=True)),
            out_TD=x_TD,
        )

    @torch.inference_mode()
    @backends.reference_only()
    def _gate_up(self, layer: "_Layer", expert: int) -> Mxfp4Tensor:
        tokens = layer.tokens(expert)
        normed = layer.normed_TD[tokens]
        packed = self._fitted(f"layers.{layer.number}.gate_up", expert, normed * layer.share_TE[tokens, expert, None])
        both = F.linear(normed, mxfp4.unpack(packed), layer.weights.gate_up_bias[expert])
        limit = self._config.swiglu_limit
        gate, up = both[:, 0::2].clamp(max=limit), both[:, 1::2].clamp(min=-limit, max=limit)
        layer.hidden.append(gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1))
        return packed

    @torch.inference_mode()
    @backends.reference_only()
    def _down(self, layer: "_Layer", expert: int) -> Mxfp4Tensor:
        tokens, hidden = layer.tokens(expert), layer.hidden[expert]
        share = layer.share_TE[tokens, expert, None]
        packed = self._fitted(f"layers.{layer.number}.down", expert, hidden * share)
        mixed = F.linear(hidden, mxfp4.unpack(packed), layer.weights.down_bias[expert])
        layer.out_TD.index_add_(0, tokens, mixed * share * layer.sent_TE[tokens, expert, None])
        return packed

    def _fitted(self, name: str, expert: int, inputs_SC: Tensor) -> Mxfp4Tensor:
        matrix = self.expert(name, expert)
        if isinstance(matrix, Mxfp4Tensor):
            return matrix
        return pack_fitted(matrix, inputs_SC) if self.touches(name, expert) else mxfp4.pack(matrix)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """Calibration tokens at the experts of one layer. `hidden` are what each has made of its tokens so far."""

    number: int
    weights: Experts
    normed_TD: Tensor
    sent_TE: Tensor
    share_TE: Tensor
    out_TD: Tensor
    hidden: list[Tensor] = field(default_factory=list)

    def tokens(self, expert: int) -> Tensor:
        """Those that are sent to an expert, and if they are few, those that came nearest to it."""
        count = max(int(self.sent_TE[:, expert].sum()), min(_LEAST_INPUTS, len(self.sent_TE)))
        return torch.topk(self.share_TE[:, expert] + 2 * self.sent_TE[:, expert], count).indices
