"""Gradients through packed weights, which stay as they are: the forward pass runs the kernels that inference runs, the
backward pass multiplies by the packed numbers themselves.

Of the frozen weights no copy in full precision is made, whichever backend runs: in float32 the packed numbers are
widened a few rows at a time; where gradients are multiplied in bfloat16, and where the reference multiplies by MXFP4 as
it is published, one expert's matrix at a time, or a part of a large dense one (products.py). Only an op's inputs are
kept for the backward pass, and of packed experts what their activation was made from (native_moe.py); others compute
their hidden values again. Where the native kernels round activations to int8, the gradient is that of the product
without the rounding. Weights get no gradients, and second derivatives are refused. Called by freehold.kernels.ops
alone, which has checked the arguments.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from freehold.kernels import backends, kv, lora, products, reference
from freehold.kernels.kv import KvPages, KvType, PagedSequences
from freehold.kernels.lora import ExpertLora, Gradients
from freehold.kernels.native_moe import NativeMoe
from freehold.weights import mxfp4
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import PANEL, PackedMatrix

_QUERIES_AT_ONCE = 256  # bounds the scores of a long sequence

Matrix = Tensor | Mxfp4Tensor | PackedMatrix


class Experts(NamedTuple):
    """The frozen part of a mixture."""

    gate_up: Matrix
    down: Matrix
    alpha: float
    limit: float


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    with torch.no_grad():
        module = backends.for_op("rms_norm", x_TD)
    out: Tensor = (reference.rms_norm if module is reference else _RmsNorm.apply)(x_TD, weight_D, eps)
    return out


def rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    with torch.no_grad():
        module = backends.for_op("rope", x_TNH)
    out: Tensor = (reference.rope if module is reference else _Rope.apply)(x_TNH, cos_TH, sin_TH)
    return out


def linear(
    x_TD: Tensor,
    weight: PackedMatrix,
    bias_O: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
    residual_TO: Tensor | None,
) -> Tensor:
    out: Tensor = _Linear.apply(x_TD, bias_O, norm_D, residual_TO, weight, eps)  # type: ignore[no-untyped-call]
    return out


def moe(
    x_TD: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    experts: Experts,
    gate_up_bias: Tensor,
    down_bias: Tensor,
    norm_D: Tensor | None,
    eps: float,
    residual_TD: Tensor | None,
    loras: Sequence[ExpertLora],
) -> Tensor:
    """Expert by expert where adapters add to them. Gradients reach the adapters' factors."""
    factors = [factor for lora in loras for pair in (lora.gate_up, lora.down) for factor in (pair or _NO_LORA)[:2]]
    with torch.no_grad():
        packed = isinstance(experts.gate_up, PackedMatrix) and backends.for_op("moe", x_TD) is not reference
    everywhere = all(lora.tokens_T is None for lora in loras)
    # Drawn from torch's own generator, which gradient checkpointing sets back for its second forward pass.
    seed = int(torch.randint(1 << 62, ())) if any(lora.dropout for lora in loras) else 0
    if packed and everywhere and len(loras) <= 1:
        function: Any = NativeMoe
    else:
        function = _Moe
    out: Tensor = function.apply(
        x_TD, weights_TA, gate_up_bias, down_bias, norm_D, residual_TD, experts_TA, experts, eps, loras, seed, *factors
    )
    return out


_NO_LORA = (None, None, 0.0)


def self_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    counts: Sequence[int],
    sinks_N: Tensor,
    scale: float,
    window: int | None,
    kv_type: KvType,
) -> Tensor:
    out: Tensor
    with torch.no_grad():
        native = backends.for_op("attention", q_TNH) is not reference
    if native:
        out = _NativeSelfAttention.apply(q_TNH, k_TKH, v_TKH, sinks_N, counts, scale, window, kv_type)  # type: ignore[no-untyped-call]
        return out
    if kv_type == "q8" or (kv_type == "bf16" and q_TNH.dtype != torch.bfloat16):
        k_TKH, v_TKH = _AsKept.apply(k_TKH, v_TKH, counts, kv_type)  # type: ignore[no-untyped-call]
    out = _SelfAttention.apply(q_TNH, k_TKH, v_TKH, sinks_N, counts, scale, window)  # type: ignore[no-untyped-call]
    return out


def route(logits_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        module = backends.for_op("route", logits_TE)
    weights_TA, experts_TA = (reference.route if module is reference else _Route.apply)(logits_TE, num_active)
    return weights_TA, experts_TA


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        out: Tensor = backends.for_op("rms_norm", x_TD).rms_norm(x_TD, weight_D, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        return *products.rms_norm_backward(gradient_TD, x_TD, weight_D, ctx.eps, needs_weight=needs_weight), None


class _Rope(torch.autograd.Function):
    """The gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TH, sin_TH)
        out: Tensor = backends.for_op("rope", x_TNH).rope(x_TNH, cos_TH, sin_TH)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TNH: Tensor) -> tuple[Tensor | None, ...]:
        cos_TH, sin_TH = ctx.saved_tensors
        of_x: Tensor = backends.for_op("rope", gradient_TNH).rope(gradient_TNH, cos_TH, -sin_TH)
        return of_x, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        bias_O: Tensor | None,
        norm_D: Tensor | None,
        residual_TO: Tensor | None,
        weight: PackedMatrix,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(None if norm_D is None else x_TD, norm_D)
        ctx.weight, ctx.eps, ctx.dtype = weight, eps, backends.gradient_type()
        return _linear(x_TD, weight, bias_O, norm_D, eps, residual_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_D = ctx.saved_tensors
        needs_x, needs_bias, needs_norm, needs_residual, *_ = ctx.needs_input_grad
        of_x = of_norm = None
        if needs_x or needs_norm:
            of_x = products.linear_backward(gradient_TO, ctx.weight, ctx.dtype, products.Scratch())
            if norm_D is not None:
                of_x, of_norm = products.rms_norm_backward(of_x, x_TD, norm_D, ctx.eps, needs_weight=needs_norm)
        of_bias = gradient_TO.sum(0) if needs_bias else None
        return of_x, of_bias, of_norm, gradient_TO if needs_residual else None, None, None


class _Moe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TA: Tensor,
        gate_up_bias: Tensor,
        down_bias: Tensor,
        norm_D: Tensor | None,
        residual_TD: Tensor | None,
        experts_TA: Tensor,
        experts: Experts,
        eps: float,
        loras: Sequence[ExpertLora],
        seed: int,
        *factors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weights_TA, gate_up_bias, down_bias, norm_D, experts_TA)
        ctx.experts, ctx.eps, ctx.loras, ctx.seed = experts, eps, loras, seed
        normed_TD = x_TD if norm_D is None else reference.rms_norm(x_TD, norm_D, eps)
        out = torch.zeros_like(x_TD) if residual_TD is None else residual_TD.clone()
        for expert in torch.unique(experts_TA).tolist():
            token, slot = torch.where(experts_TA == expert)
            weights, pieces = _expert(experts, expert), _pieces(loras, token, expert, seed)
            x_SD = normed_TD[token]
            gate, up = weights.gate_and_up(x_SD, gate_up_bias[expert])
            for piece in pieces:
                piece.add_to_gate_and_up(gate, up, x_SD)
            hidden = _activated(gate, up, experts.alpha, experts.limit)
            mixed = weights.mixed(hidden, down_bias[expert])
            for piece in pieces:
                piece.add_to_mixed(mixed, hidden)
            out.index_add_(0, token, mixed * weights_TA[token, slot].unsqueeze(-1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TA, gate_up_bias, down_bias, norm_D, experts_TA = ctx.saved_tensors
        needs_x, _, needs_gate_up_bias, needs_down_bias, needs_norm, needs_residual, *_ = ctx.needs_input_grad
        experts, loras = ctx.experts, ctx.loras
        normed_TD = x_TD if norm_D is None else reference.rms_norm(x_TD, norm_D, ctx.eps)
        of_normed = torch.zeros_like(x_TD)
        of_weights = torch.zeros_like(weights_TA)
        of_gate_up_bias = torch.zeros_like(gate_up_bias) if needs_gate_up_bias else None
        of_down_bias = torch.zeros_like(down_bias) if needs_down_bias else None
        of_factors = [
            (torch.zeros_like(pair.a), torch.zeros_like(pair.b)) if pair is not None else (None, None)
            for lora in loras
            for pair in (lora.gate_up, lora.down)
        ]
        for expert in torch.unique(experts_TA).tolist():
            token, slot = torch.where(experts_TA == expert)
            frozen, pieces = _expert(experts, expert), _pieces(loras, token, expert, ctx.seed)
            weights = weights_TA[token, slot].unsqueeze(-1)
            of_mixed, x_SD = gradient_TD[token], normed_TD[token]
            gate, up = frozen.gate_and_up(x_SD, gate_up_bias[expert])
            for piece in pieces:
                piece.add_to_gate_and_up(gate, up, x_SD)
            hidden = _activated(gate, up, experts.alpha, experts.limit)
            of_hidden = frozen.mixed_backward(of_mixed)
            for i, piece in enumerate(pieces):
                piece.add_gradients_of_mixed(of_hidden, of_mixed, hidden, weights, of_factors[2 * i + 1])
            # mixed · gradient, without computing mixed: its product with the matrix is there already.
            of_weights[token, slot] = (of_hidden * hidden).sum(-1) + of_mixed @ down_bias[expert]
            of_gate, of_up = _activation_backward(of_hidden * weights, gate, up, experts.alpha, experts.limit)
            if needs_x or needs_norm or loras:
                of_x = frozen.gate_and_up_backward(of_gate, of_up)
                for i, piece in enumerate(pieces):
                    piece.add_gradients_of_gate_and_up(of_x, of_gate, of_up, x_SD, of_factors[2 * i])
                of_normed.index_add_(0, token, of_x)
            if of_gate_up_bias is not None:
                of_gate_up_bias[expert] = torch.stack((of_gate.sum(0), of_up.sum(0)), dim=-1).flatten()
            if of_down_bias is not None:
                of_down_bias[expert] = (of_mixed * weights).sum(0)
        of_x, of_norm = of_normed, None
        if norm_D is not None:
            of_x, of_norm = products.rms_norm_backward(of_normed, x_TD, norm_D, ctx.eps, needs_weight=needs_norm)
        of_residual = gradient_TD if needs_residual else None
        first = (of_x, of_weights, of_gate_up_bias, of_down_bias, of_norm, of_residual)
        return *first, *(None,) * 5, *(factor for pair in of_factors for factor in pair)


class _SelfAttention(torch.autograd.Function):
    """Flash attention's way (https://arxiv.org/abs/2205.14135), in torch: scores are computed again in the backward
    pass, from the logarithm of each softmax's sum."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_N: Tensor,
        counts: Sequence[int],
        scale: float,
        window: int | None,
    ) -> Tensor:
        out_TNH = torch.empty_like(q_TNH)
        logsum_TN = _wide(q_TNH.new_empty(q_TNH.shape[:2]))
        sinks = _by_head(_wide(sinks_N).expand(1, -1).unsqueeze(-1), k_TKH.shape[1])
        for block in _blocks(counts, window):
            q, k, v = block.cut(q_TNH, k_TKH, v_TKH)
            scores = block.scores(q, k, scale)
            logsum = torch.logaddexp(torch.logsumexp(scores, dim=-1, keepdim=True), sinks)
            weights = torch.exp(scores - logsum).to(v.dtype)
            out_TNH[block.queries] = _by_token(weights @ v)
            logsum_TN[block.queries] = _by_token(logsum).squeeze(-1)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, sinks_N, out_TNH, logsum_TN)
        ctx.counts, ctx.scale, ctx.window = counts, scale, window
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, sinks_N, out_TNH, logsum_TN = ctx.saved_tensors
        num_kv_heads = k_TKH.shape[1]
        of_q, of_k, of_v = torch.empty_like(q_TNH), torch.zeros_like(k_TKH), torch.zeros_like(v_TKH)
        # What each query's softmax gives up in all for one of its weights to grow.
        common_TN = (_wide(gradient_TNH) * out_TNH).sum(-1)
        for block in _blocks(ctx.counts, ctx.window):
            q, k, v = block.cut(q_TNH, k_TKH, v_TKH)
            gradient = _by_head(gradient_TNH[block.queries], num_kv_heads)
            logsum, common = (_by_head(x[block.queries].unsqueeze(-1), num_kv_heads) for x in (logsum_TN, common_TN))
            weights = torch.exp(block.scores(q, k, ctx.scale) - logsum)
            of_v[block.keys] += (weights.to(v.dtype).transpose(-1, -2) @ gradient).sum(1).transpose(0, 1)
            of_scores = (weights * (_wide(gradient @ v.transpose(-1, -2)) - common) * ctx.scale).to(q.dtype)
            of_q[block.queries] = _by_token(of_scores @ k)
            of_k[block.keys] += (of_scores.transpose(-1, -2) @ q).sum(1).transpose(0, 1)
        of_sinks = -(torch.exp(_wide(sinks_N) - logsum_TN) * common_TN).sum(0).to(sinks_N.dtype)
        return of_q, of_k, of_v, of_sinks, None, None, None


class _AsKept(torch.autograd.Function):
    """Keys and values as pages of some type give them back. Gradients go straight through."""

    @staticmethod
    def forward(
        ctx: Any, k_TKH: Tensor, v_TKH: Tensor, counts: Sequence[int], kv_type: KvType
    ) -> tuple[Tensor, Tensor]:
        sequences = kv.whole_sequences(counts)
        pages = _pages_for(sequences, kv_type, k_TKH)
        reference.kv_write(pages, sequences, k_TKH, v_TKH, None, None)
        places = sequences.places(k_TKH.device)
        keys, values = (kv.tokens_of(rows, places).to(k_TKH.dtype) for rows in pages.by_position())
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_k: Tensor, of_v: Tensor) -> tuple[Tensor | None, ...]:
        return of_k, of_v, None, None


class _NativeSelfAttention(torch.autograd.Function):
    """By the kernels that run inference, over pages of its own. The gradient is that of attention over keys and values
    as the pages give them back, and goes straight through what they are rounded by."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_N: Tensor,
        counts: Sequence[int],
        scale: float,
        window: int | None,
        kv_type: KvType,
    ) -> Tensor:
        native, sequences = backends.built(), kv.whole_sequences(counts)
        pages = _pages_for(sequences, kv_type, k_TKH)
        native.kv_write(pages, sequences, k_TKH, v_TKH, None, None)
        logsum_TN = q_TNH.new_empty(q_TNH.shape[:2])
        out_TNH: Tensor = native.attention(
            q_TNH, pages, sequences, sinks_N, None, None, scale=scale, window=window, logsum_TN=logsum_TN
        )
        ctx.save_for_backward(q_TNH, sinks_N, out_TNH, logsum_TN, *pages.tensors())
        ctx.sequences, ctx.scale, ctx.window, ctx.kv_type = sequences, scale, window, kv_type
        return out_TNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, sinks_N, out_TNH, logsum_TN, *kept = ctx.saved_tensors
        pages, places = KvPages(ctx.kv_type, *kept), ctx.sequences.places(q_TNH.device)
        k_TKH, v_TKH = (kv.tokens_of(rows, places).float() for rows in pages.by_position())
        of_q, of_k, of_v, common_TN = backends.built().self_attention_backward(
            gradient_TNH, q_TNH, k_TKH, v_TKH, ctx.sequences.starts_B1, ctx.scale, ctx.window, out_TNH, logsum_TN
        )
        of_sinks = -(torch.exp(sinks_N - logsum_TN) * common_TN).sum(0)
        return of_q, of_k, of_v, of_sinks, None, None, None, None


def _pages_for(sequences: PagedSequences, kv_type: KvType, k_TKH: Tensor) -> KvPages:
    count = sum(map(kv.num_pages, sequences.lengths))
    return kv.new_pages(kv_type, count, k_TKH.shape[1], k_TKH.shape[2], k_TKH.device)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
        weights_TA, experts_TA = backends.built().route(logits_TE, num_active)
        ctx.mark_non_differentiable(experts_TA)
        ctx.save_for_backward(weights_TA, experts_TA)
        ctx.num_experts = logits_TE.shape[1]
        return weights_TA, experts_TA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TA: Tensor, _: Tensor) -> tuple[Tensor, None]:
        weights_TA, experts_TA = ctx.saved_tensors
        of_chosen = weights_TA * (gradient_TA - (gradient_TA * weights_TA).sum(-1, keepdim=True))
        of_logits = weights_TA.new_zeros((len(weights_TA), ctx.num_experts))
        return of_logits.scatter_(1, experts_TA, of_chosen), None


class _Block(NamedTuple):
    """Queries of one sequence, and the keys that one or the other of them sees."""

    queries: slice
    keys: slice
    hidden_QS: Tensor

    def cut(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(K, N/K, Q, H), and keys and values (K, 1, S, H)."""
        k, v = (x[self.keys].transpose(0, 1).unsqueeze(1) for x in (k_TKH, v_TKH))
        return _by_head(q_TNH[self.queries], k_TKH.shape[1]), k, v

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        scores = _wide(q @ k.transpose(-1, -2)) * scale
        return scores.masked_fill_(self.hidden_QS.to(q.device), -torch.inf)


def _blocks(counts: Sequence[int], window: int | None) -> Iterator[_Block]:
    start = 0
    for count in counts:
        for first in range(0, count, _QUERIES_AT_ONCE):
            stop = min(first + _QUERIES_AT_ONCE, count)
            first_key = 0 if window is None else max(0, first - window + 1)
            query, key = torch.arange(first, stop).unsqueeze(-1), torch.arange(first_key, stop)
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            yield _Block(slice(start + first, start + stop), slice(start + first_key, start + stop), hidden)
        start += count


def _wide(x: Tensor) -> Tensor:
    """At least float32, in which softmax is computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_head(x_QNH: Tensor, num_kv_heads: int) -> Tensor:
    """(Q, N, H) to (K, N/K, Q, H)."""
    return torch.unflatten(x_QNH, 1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _by_token(x: Tensor) -> Tensor:
    """And back."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


class _PackedExpert(NamedTuple):
    """One expert's products where its matrices are packed, forward and backward."""

    gate_up: PackedMatrix
    down: PackedMatrix

    def gate_and_up(self, x_SD: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        in_panels = _linear(x_SD, _as_it_lies(self.gate_up), None, None, 0.0, None)
        pairs = torch.unflatten(in_panels, 1, (-1, 2, PANEL))
        num_units = self.gate_up.shape[0] // 2
        gate, up = (pairs[:, :, i].flatten(1)[:, :num_units] + bias[i::2] for i in range(2))
        return gate, up

    def mixed(self, hidden_SF: Tensor, bias: Tensor) -> Tensor:
        return _linear(hidden_SF, self.down, bias, None, 0.0, None)

    def mixed_backward(self, of_mixed: Tensor) -> Tensor:
        return _linear_backward(of_mixed, self.down)

    def gate_and_up_backward(self, of_gate: Tensor, of_up: Tensor) -> Tensor:
        return _linear_backward(_in_panels(of_gate, of_up), _as_it_lies(self.gate_up))


class _PlainExpert(NamedTuple):
    """The same for matrices as they are published; one of them is widened for as long as it is multiplied by."""

    gate_up: Tensor | Mxfp4Tensor
    down: Tensor | Mxfp4Tensor

    def gate_and_up(self, x_SD: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        both = F.linear(x_SD, _widened(self.gate_up, x_SD.dtype), bias)
        return both[:, 0::2].contiguous(), both[:, 1::2].contiguous()

    def mixed(self, hidden_SF: Tensor, bias: Tensor) -> Tensor:
        return F.linear(hidden_SF, _widened(self.down, hidden_SF.dtype), bias)

    def mixed_backward(self, of_mixed: Tensor) -> Tensor:
        return of_mixed @ _widened(self.down, of_mixed.dtype)

    def gate_and_up_backward(self, of_gate: Tensor, of_up: Tensor) -> Tensor:
        return torch.stack((of_gate, of_up), dim=-1).flatten(1) @ _widened(self.gate_up, of_gate.dtype)


def _expert(experts: Experts, expert: int) -> _PackedExpert | _PlainExpert:
    gate_up, down = experts.gate_up[expert], experts.down[expert]
    if isinstance(gate_up, PackedMatrix) and isinstance(down, PackedMatrix):
        return _PackedExpert(gate_up, down)
    assert not isinstance(gate_up, PackedMatrix) and not isinstance(down, PackedMatrix)
    return _PlainExpert(gate_up, down)


def _widened(matrix: Tensor | Mxfp4Tensor, dtype: torch.dtype) -> Tensor:
    return mxfp4.unpack(matrix, dtype) if isinstance(matrix, Mxfp4Tensor) else matrix.to(dtype)


class _Piece(NamedTuple):
    """What one adapter adds to one expert: all its rows where `rows` is None."""

    lora: ExpertLora
    expert: int
    rows: Tensor | None
    seed: int

    def add_to_gate_and_up(self, gate: Tensor, up: Tensor, x_SD: Tensor) -> None:
        if self.lora.gate_up is not None and not self.lora.folded:
            x = self._of(x_SD)
            both = lora.added(x, self.lora.gate_up, self.expert, self._kept(x, 0))
            self._add(gate, both[:, 0::2])
            self._add(up, both[:, 1::2])

    def add_to_mixed(self, mixed: Tensor, hidden_SF: Tensor) -> None:
        if self.lora.down is not None and not self.lora.folded:
            hidden = self._of(hidden_SF)
            self._add(mixed, lora.added(hidden, self.lora.down, self.expert, self._kept(hidden, 1)))

    def add_gradients_of_mixed(
        self,
        of_hidden: Tensor,
        of_mixed: Tensor,
        hidden: Tensor,
        weights: Tensor,
        of_factors: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """`of_hidden` is before the routing weights, as `of_mixed` is; the factors' own gradients are after them."""
        if self.lora.down is None:
            return
        hidden, of_mixed = self._of(hidden), self._of(of_mixed)
        kept = self._kept(hidden, 1)
        if not self.lora.folded:
            self._add(of_hidden, lora.input_gradient(of_mixed, self.lora.down, self.expert, kept))
        found = lora.gradients(of_mixed * self._of(weights), hidden, self.lora.down, self.expert, kept)
        self._keep(found, of_factors)

    def add_gradients_of_gate_and_up(
        self,
        of_x: Tensor,
        of_gate: Tensor,
        of_up: Tensor,
        x_SD: Tensor,
        of_factors: tuple[Tensor | None, Tensor | None],
    ) -> None:
        if self.lora.gate_up is None:
            return
        of_both, x = self._of(torch.stack((of_gate, of_up), dim=-1).flatten(1)), self._of(x_SD)
        found = lora.gradients(of_both, x, self.lora.gate_up, self.expert, self._kept(x, 0))
        if not self.lora.folded:
            self._add(of_x, found.of_x)
        self._keep(found, of_factors)

    def _keep(self, found: Gradients, of_factors: tuple[Tensor | None, Tensor | None]) -> None:
        of_a, of_b = of_factors
        assert of_a is not None and of_b is not None
        of_a[self.expert], of_b[self.expert] = found.of_a, found.of_b

    def _of(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def _add(self, to: Tensor, what: Tensor) -> None:
        if self.rows is None:
            to += what
        else:
            to.index_add_(0, self.rows, what)

    def _kept(self, x: Tensor, which: int) -> Tensor | None:
        return lora.dropout_factors(x, self.lora.dropout, self.seed + 2 * self.expert + which)


def _pieces(loras: Sequence[ExpertLora], token_S: Tensor, expert: int, seed: int) -> list[_Piece]:
    return [
        _Piece(each, expert, None if each.tokens_T is None else torch.where(each.tokens_T[token_S])[0], seed)
        for each in loras
    ]


def _activated(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    clamped = gate.clamp(max=limit)
    return clamped * torch.sigmoid(alpha * clamped) * (up.clamp(min=-limit, max=limit) + 1)


def _activation_backward(of_out: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up. What was clamped gets none; a value at the limit does, as in torch."""
    clamped_gate, clamped_up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    sigmoid = torch.sigmoid(alpha * clamped_gate)
    of_gate = of_out * (clamped_up + 1) * sigmoid * (1 + alpha * clamped_gate * (1 - sigmoid))
    of_up = of_out * clamped_gate * sigmoid
    return of_gate * (gate <= limit), of_up * (up.abs() <= limit)


def _as_it_lies(gate_up: PackedMatrix) -> PackedMatrix:
    """A paired matrix as a plain one whose rows are panels of gates and ups in turn, padding and all."""
    return gate_up.panels(0, len(gate_up.data))


def _in_panels(gate: Tensor, up: Tensor) -> Tensor:
    """Columns in the order in which a paired matrix has its rows."""
    missing = -gate.shape[1] % (2 * PANEL)
    sides = [torch.unflatten(F.pad(side, (0, missing)), 1, (-1, PANEL)) for side in (gate, up)]
    return torch.stack(sides, dim=2).flatten(1)


def _linear(
    x_TD: Tensor,
    weight: PackedMatrix,
    bias_O: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
    residual_TO: Tensor | None,
) -> Tensor:
    """The op, a few rows of the weights at a time where it is the reference."""
    module = backends.for_op("linear", x_TD)
    if module is not reference:
        out: Tensor = module.linear(x_TD, weight, bias_O, norm_D, eps, residual_TO)
        return out
    if norm_D is not None:
        x_TD = reference.rms_norm(x_TD, norm_D, eps)
    out = x_TD.new_empty((x_TD.shape[0], weight.shape[0]))
    for columns, rows in reference.row_blocks(weight):
        out[:, columns] = F.linear(x_TD, rows)
    if bias_O is not None:
        out += bias_O
    return out if residual_TO is None else out.add_(residual_TO)


def _linear_backward(gradient_TO: Tensor, weight: PackedMatrix) -> Tensor:
    out: Tensor = backends.for_op("linear_backward", gradient_TO).linear_backward(gradient_TO, weight)
    return out
