"""A mixture of packed experts by the native kernels, with what one adapter adds to all tokens, and its gradient.

Forward is the op that runs inference, to the last bit. What the activation was made from is kept for the backward pass,
in the type in which gradients are multiplied (backends.gradient_type). Backward goes expert by expert. *Visits* are
pairs of a token and an expert that it visits, sorted by expert and then by token. Called by freehold.kernels.autograd
alone, which computes with several adapters, or with some tokens' alone, itself.

Shape legend: V visits, S those of one expert, P panels of 16 rows, R rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from freehold.kernels import backends, lora, products
from freehold.kernels.lora import ExpertLora, Lora
from freehold.kernels.packed_lora import PackedExpertLora, PackedLora, PackedLoras
from freehold.weights.packed import PANEL, PackedMatrix, pack


class PackedExperts(NamedTuple):
    gate_up: PackedMatrix
    down: PackedMatrix
    alpha: float
    limit: float


class NativeMoe(torch.autograd.Function):
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
        experts: PackedExperts,
        eps: float,
        loras: Sequence[ExpertLora],
        seed: int,
        *factors: Tensor | None,
    ) -> Tensor:
        """`loras` are one for all tokens, or none."""
        native, adapter = backends.built(), loras[0] if loras else _NO_LORA
        packed = _packed(adapter) if loras and not adapter.folded else None
        out: Tensor
        if not any(ctx.needs_input_grad) and not adapter.dropout:
            of_all = None if packed is None else PackedLoras([packed], torch.zeros(len(x_TD), dtype=torch.int64))
            out = native.moe(
                x_TD, weights_TA, experts_TA, experts.gate_up, gate_up_bias, experts.down, down_bias, norm_D, eps,
                residual_TD, alpha=experts.alpha, limit=experts.limit, loras=of_all,
            )  # fmt: skip
            return out
        dtype, visits, seen = backends.gradient_type(), _Visits(experts_TA, gate_up_bias.shape[0]), None
        if adapter.dropout and packed is not None:
            widths = (x_TD.shape[1], experts.down.shape[2])
            seen = native.MoeSeen(*(_seen_shares(visits, width, adapter, seed + i) for i, width in enumerate(widths)))
        out, kept = native.moe_kept(
            x_TD, weights_TA, experts_TA, experts.gate_up, gate_up_bias, experts.down, down_bias, norm_D, eps,
            residual_TD, alpha=experts.alpha, limit=experts.limit, lora=packed, seen=seen, dtype=dtype,
        )  # fmt: skip
        ctx.save_for_backward(x_TD, weights_TA, gate_up_bias, down_bias, norm_D, *kept, visits.order)
        ctx.experts, ctx.eps, ctx.visits, ctx.adapter, ctx.seed = experts, eps, visits, adapter, seed
        ctx.any_lora = bool(loras)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TA, gate_up_bias, down_bias, norm_D, sums, first_rows, second_rows, _ = ctx.saved_tensors
        needs_x, needs_weights, needs_gate_up_bias, needs_down_bias, needs_norm, needs_residual, *_ = (
            ctx.needs_input_grad
        )
        experts, visits, adapter, dtype = ctx.experts, ctx.visits, ctx.adapter, sums.dtype
        first, second = (_Half(adapter, which, ctx.seed + which, dtype) for which in range(2))
        needs_inner = needs_x or needs_norm
        weights_V = weights_TA.flatten()[visits.order]
        normed_TD = x_TD if norm_D is None else backends.built().rms_norm(x_TD, norm_D, ctx.eps)
        x, gradient = normed_TD.to(dtype), gradient_TD.to(dtype)
        of_normed = torch.zeros_like(x_TD) if needs_inner else None
        of_weights_V = torch.empty_like(weights_V)
        of_gate_up_bias = torch.zeros(len(gate_up_bias), sums.shape[1]) if needs_gate_up_bias else None
        of_down_bias = torch.zeros_like(down_bias) if needs_down_bias else None
        scratch = products.Scratch()
        for expert, rows in visits.by_expert():
            tokens = visits.tokens(rows)
            weights, of_mixed = weights_V[rows], visits.take(gradient, tokens)
            middle = second.middle(of_mixed, expert)
            of_hidden = _times(of_mixed, experts.down[expert], dtype, scratch)
            second.add_input_gradient(of_hidden, middle, expert)
            of_sums, hidden, of_weights_V[rows] = backends.built().swiglu_backward(
                of_hidden, sums[rows], weights, experts.alpha, experts.limit
            )
            if middle is not None:
                second.keep_gradients(of_mixed, middle, hidden, _some(second_rows, rows), expert, weights)
            middle = first.middle(of_sums, expert)
            if middle is not None:
                first.keep_gradients(of_sums, middle, visits.take(x, tokens), _some(first_rows, rows), expert, None)
            if of_normed is not None:
                of_x = _times(of_sums, experts.gate_up[expert], dtype, scratch)
                first.add_input_gradient(of_x, middle, expert)
                visits.add(of_normed, tokens, of_x)
            if of_gate_up_bias is not None:
                of_gate_up_bias[expert] = of_sums.sum(0, dtype=torch.float32)
            if of_down_bias is not None:
                of_down_bias[expert] = weights @ visits.take(gradient_TD, tokens)
        of_weights = None
        if needs_weights:
            # mixed · gradient, without computing mixed: its product with the matrix is there already.
            of_weights = torch.empty_like(weights_TA)
            of_weights.view(-1)[visits.order] = of_weights_V
            of_weights += (gradient_TD @ down_bias.T).gather(1, visits.experts_TA)
        of_input, of_norm = of_normed, None
        if norm_D is not None and of_normed is not None:
            of_input, of_norm = products.rms_norm_backward(of_normed, x_TD, norm_D, ctx.eps, needs_weight=needs_norm)
        if of_gate_up_bias is not None:
            of_gate_up_bias = _unpaired(of_gate_up_bias.unsqueeze(-1), gate_up_bias.shape[1]).squeeze(-1)
        of_residual = gradient_TD if needs_residual else None
        of_factors = (*first.gradients(), *second.gradients()) if ctx.any_lora else ()
        return of_input, of_weights, of_gate_up_bias, of_down_bias, of_norm, of_residual, *(None,) * 5, *of_factors


class _Visits:
    """Who visits whom. Where every token visits every expert, nothing has to be looked up."""

    def __init__(self, experts_TA: Tensor, num_experts: int) -> None:
        self.experts_TA = experts_TA
        T, A = experts_TA.shape
        self.order = torch.argsort(experts_TA.flatten(), stable=True)
        self._tokens_V = self.order // max(A, 1)
        self.counts: list[int] = torch.bincount(experts_TA.flatten(), minlength=num_experts).tolist()
        everyone = self.counts == [T] * num_experts
        self.dense = everyone and torch.equal(self._tokens_V.view(-1, T), torch.arange(T).expand(num_experts, T))

    def by_expert(self) -> list[tuple[int, slice]]:
        """Each expert that is visited, with its visits."""
        found, start = [], 0
        for expert, count in enumerate(self.counts):
            if count:
                found.append((expert, slice(start, start + count)))
            start += count
        return found

    def tokens(self, rows: slice) -> Tensor | None:
        """Of some visits; None for all, in order."""
        return None if self.dense else self._tokens_V[rows]

    @staticmethod
    def take(x_TD: Tensor, tokens: Tensor | None) -> Tensor:
        return x_TD if tokens is None else x_TD[tokens]

    @staticmethod
    def add(to_TD: Tensor, tokens: Tensor | None, what_SD: Tensor) -> None:
        if tokens is None:
            to_TD += what_SD
        else:
            to_TD.index_add_(0, tokens, what_SD.to(to_TD.dtype))


def _some(rows_VR: Tensor | None, rows: slice) -> Tensor | None:
    return None if rows_VR is None else rows_VR[rows]


_NO_LORA = ExpertLora(None, None)


def _packed(adapter: ExpertLora) -> PackedExpertLora:
    """As the kernels read it. Made anew for every pass: factors change from step to step, and it takes no time beside
    the products with them."""

    def pair(factors: Lora | None, *, paired: bool) -> PackedLora | None:
        if factors is None:
            return None
        a, b = (factor.detach().float() for factor in (factors.a, factors.b))
        return PackedLora(pack(a, "f32"), pack(b, "f32", paired=paired), factors.scaling)

    return PackedExpertLora(pair(adapter.gate_up, paired=True), pair(adapter.down, paired=False))


def _seen_shares(visits: _Visits, width: int, adapter: ExpertLora, seed: int) -> Tensor:
    """What dropout multiplies each visit's input by."""
    shares_VI = torch.empty((len(visits.order), width))
    for expert, rows in visits.by_expert():
        shares = lora.dropout_factors(shares_VI[rows], adapter.dropout, seed + 2 * expert)
        assert shares is not None
        shares_VI[rows] = shares
    return shares_VI


class _Half:
    """What an adapter adds to one of the two matrices, backward: nothing where it leaves that alone. Where the matrix
    has it in already, there are gradients of the factors alone."""

    def __init__(self, adapter: ExpertLora, which: int, seed: int, dtype: torch.dtype) -> None:
        """`which` is 0 for gate_up, 1 for down."""
        factors = (adapter.gate_up, adapter.down)[which]
        self._factors, self._dropout, self._folded = factors, adapter.dropout, adapter.folded
        self._seed, self._paired = seed, which == 0
        if factors is not None:
            self._a = factors.a.to(dtype)
            self._b = _paired(factors.b).to(dtype) if self._paired else factors.b.to(dtype)
            self._of_a = torch.zeros_like(factors.a)
            self._of_b = torch.zeros(self._b.shape, dtype=factors.b.dtype)

    def middle(self, of_out: Tensor, expert: int) -> Tensor | None:
        """The gradient of an expert's rows before scaling."""
        return None if self._factors is None else products.product(of_out, self._b[expert]).mul_(self._factors.scaling)

    def add_input_gradient(self, of_x: Tensor, middle: Tensor | None, expert: int) -> None:
        """To that of the frozen product."""
        if middle is None or self._folded:
            return
        kept = self._kept(of_x, expert)
        if kept is None:
            products.add_product(of_x, middle, self._a[expert])
        else:
            of_x += products.product(middle, self._a[expert]) * kept

    def keep_gradients(
        self,
        of_out: Tensor,
        middle: Tensor,
        x: Tensor,
        rows_SR: Tensor | None,
        expert: int,
        weights_S: Tensor | None,
    ) -> None:
        """Of an expert's factors. `of_out` is before the routing weights where those are given; rows that the forward
        pass did not need are computed here."""
        assert self._factors is not None
        kept = self._kept(x, expert)
        seen = (x if kept is None else x * kept).to(middle.dtype)
        if rows_SR is None:
            through = products.product(seen, self._a[expert].T).mul_(self._factors.scaling)
        else:
            through = rows_SR[:, : middle.shape[1]]
        if weights_S is not None:
            weights = weights_S.unsqueeze(-1)
            middle, through = middle * weights.to(middle.dtype), through * weights
        self._of_a[expert] = products.product(middle.T, seen)
        self._of_b[expert] = products.product(of_out.T, through.to(of_out.dtype))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the two factors."""
        if self._factors is None:
            return None, None
        return self._of_a, _unpaired(self._of_b, self._factors.b.shape[1]) if self._paired else self._of_b

    def _kept(self, x: Tensor, expert: int) -> Tensor | None:
        return lora.dropout_factors(x, self._dropout, self._seed + 2 * expert)


def _times(gradient_SO: Tensor, weight: PackedMatrix, dtype: torch.dtype, scratch: products.Scratch) -> Tensor:
    """gradient · weight in their type; a paired weight's rows in the order in which they lie."""
    if weight.paired:
        weight = weight.panels(0, len(weight.data))
    if dtype == torch.float32:
        out: Tensor = backends.built().linear_backward(gradient_SO, weight)
        return out
    return gradient_SO @ scratch.widened(weight, dtype)[: weight.shape[0]]


def _paired(b_EOR: Tensor) -> Tensor:
    """Interleaved gate and up rows in the order in which a paired matrix has them, padded as it is."""
    padded = F.pad(b_EOR, (0, 0, 0, -b_EOR.shape[1] % (4 * PANEL)))
    return torch.unflatten(padded, 1, (-1, PANEL, 2)).transpose(2, 3).flatten(1, 3)


def _unpaired(lies_EOR: Tensor, num_rows: int) -> Tensor:
    """And back."""
    return torch.unflatten(lies_EOR, 1, (-1, 2, PANEL)).transpose(2, 3).flatten(1, 3)[:, :num_rows]
