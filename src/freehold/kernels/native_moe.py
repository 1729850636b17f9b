"""A mixture of packed experts by the native kernels, with what adapters add, and its gradient.

Forward, all experts' first products run at once, then all second ones: int8 activations as in inference, adapters'
small products in float32. What the activation was made from is kept for the backward pass, in the type in which
gradients are multiplied (backends.gradient_type). Backward goes expert by expert. *Visits* are pairs of a token and an
expert that it visits, sorted by expert and then by token. Called by freehold.kernels.autograd alone.

Shape legend: V visits, S those of one expert, P panels of 16 rows, R all adapters' ranks together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from freehold.kernels import backends, lora, products
from freehold.kernels.lora import ExpertLora, Lora
from freehold.weights.packed import PANEL, PackedMatrix


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
        kept = backends.gradient_type() if any(ctx.needs_input_grad) else None
        visits = _Visits(experts_TA, gate_up_bias.shape[0])
        normed_TD = x_TD if norm_D is None else backends.built().rms_norm(x_TD, norm_D, eps)
        first, second = (_Adapters.of(loras, which, seed) for which in range(2))
        first_rows = first.rows(normed_TD, visits)
        hidden_VF, sums = backends.built().moe_hidden(
            normed_TD, experts_TA, experts.gate_up, gate_up_bias, *first.added(first_rows, paired=True), experts.alpha,
            experts.limit, kept,
        )  # fmt: skip
        second_rows = second.rows(hidden_VF, visits)
        out: Tensor = backends.built().moe_mix(
            hidden_VF, weights_TA, experts_TA, experts.down, down_bias, *second.added(second_rows, paired=False),
            residual_TD,
        )  # fmt: skip
        if kept is not None:
            ctx.save_for_backward(
                x_TD, weights_TA, gate_up_bias, down_bias, norm_D, sums, first_rows, second_rows, visits.order
            )
            ctx.experts, ctx.eps, ctx.visits, ctx.adapters, ctx.kept = experts, eps, visits, (first, second), kept
            ctx.num_loras = len(loras)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TA, gate_up_bias, down_bias, norm_D, sums, first_rows, second_rows, _ = ctx.saved_tensors
        needs_x, needs_weights, needs_gate_up_bias, needs_down_bias, needs_norm, needs_residual, *_ = (
            ctx.needs_input_grad
        )
        experts, visits, dtype = ctx.experts, ctx.visits, ctx.kept
        first, second = ctx.adapters
        needs_inner = needs_x or needs_norm
        weights_V = weights_TA.flatten()[visits.order]
        normed_TD = x_TD if norm_D is None else backends.built().rms_norm(x_TD, norm_D, ctx.eps)
        x, gradient = normed_TD.to(dtype), gradient_TD.to(dtype)
        of_normed = torch.zeros_like(x_TD) if needs_inner else None
        of_weights_V = torch.empty_like(weights_V)
        of_gate_up_bias = torch.zeros(len(gate_up_bias), sums.shape[1]) if needs_gate_up_bias else None
        of_down_bias = torch.zeros_like(down_bias) if needs_down_bias else None
        first.begin_gradients(dtype), second.begin_gradients(dtype)
        scratch = products.Scratch()
        for expert, rows in visits.by_expert():
            tokens = visits.tokens(rows)
            weights, of_mixed = weights_V[rows], visits.take(gradient, tokens)
            middles = second.middles(of_mixed, expert, tokens)
            of_hidden = _times(of_mixed, experts.down[expert], dtype, scratch)
            second.add_input_gradient(of_hidden, middles, expert)
            of_sums, hidden, of_weights_V[rows] = backends.built().swiglu_backward(
                of_hidden, sums[rows], weights, experts.alpha, experts.limit
            )
            if second_rows is not None:
                second.keep_gradients(of_mixed, middles, hidden, second_rows[rows], expert, weights)
            middles = first.middles(of_sums, expert, tokens)
            if first_rows is not None:
                first.keep_gradients(of_sums, middles, visits.take(x, tokens), first_rows[rows], expert, None)
            if of_normed is not None:
                of_x = _times(of_sums, experts.gate_up[expert], dtype, scratch)
                first.add_input_gradient(of_x, middles, expert)
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
        of_factors = [
            factor
            for of_first, of_second in zip(first.gradients(), second.gradients(), strict=True)
            for pair in (of_first, of_second)
            for factor in pair
        ]
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


class _Pair(NamedTuple):
    """One adapter's factors for one of the two matrices, and the columns of the joined rows that are its own."""

    lora: Lora
    columns: slice
    tokens_T: Tensor | None
    dropout: float


class _Adapters:
    """What all adapters add to one of the two matrices, their ranks side by side: rows · b.

    Rows are (V, R) float32, x · Aᵀ of each adapter times its scaling; zero where a token is not its own. `folded`: the
    matrix has it in already; nothing is added, and there are gradients of the factors alone.
    """

    def __init__(self, pairs: list[_Pair | None], which: int, seed: int, *, folded: bool) -> None:
        self._folded = folded
        self._all = pairs
        self.pairs = [pair for pair in pairs if pair is not None]
        self._which, self._seed = which, seed

    @classmethod
    def of(cls, loras: Sequence[ExpertLora], which: int, seed: int) -> "_Adapters":
        """`which` is 0 for gate_up, 1 for down."""
        pairs: list[_Pair | None] = []
        start = 0
        for each in loras:
            factors = (each.gate_up, each.down)[which]
            if factors is None:
                pairs.append(None)
                continue
            rank = factors.a.shape[1]
            pairs.append(_Pair(factors, slice(start, start + rank), each.tokens_T, each.dropout))
            start += rank
        folded = [each.folded for each in loras]
        assert all(folded) or not any(folded)
        return cls(pairs, which, seed, folded=any(folded))

    def added(self, rows_VR: Tensor | None, *, paired: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the kernels add: rows and second factors."""
        return (None, None) if self._folded else (rows_VR, self.packed(paired=paired))

    def rows(self, x: Tensor, visits: _Visits) -> Tensor | None:
        """Of all visits. `x` is by token for gate_up, by visit for down."""
        if not self.pairs:
            return None
        out_VR = torch.empty((len(visits.order), self.pairs[-1].columns.stop))
        for pair in self.pairs:
            a_ERI, dropout = pair.lora.a.float(), pair.dropout
            if visits.dense and not dropout and self._which == 0:
                E, rank, _ = a_ERI.shape
                joined_TER = (x @ a_ERI.flatten(0, 1).T).unflatten(1, (E, rank))
                out_VR.unflatten(0, (E, -1))[:, :, pair.columns] = joined_TER.transpose(0, 1)
                out_VR[:, pair.columns] *= pair.lora.scaling
            else:
                for expert, rows in visits.by_expert():
                    seen = self._seen(x[rows] if self._which else visits.take(x, visits.tokens(rows)), pair, expert)
                    out_VR[rows, pair.columns] = (seen @ a_ERI[expert].T) * pair.lora.scaling
            if pair.tokens_T is not None:
                own_V = pair.tokens_T[visits.order // visits.experts_TA.shape[1]]
                out_VR[:, pair.columns].masked_fill_(~own_V.unsqueeze(-1), 0.0)
        return out_VR

    def packed(self, *, paired: bool) -> Tensor | None:
        """The second factors as the kernels take them, (E, P, R, 16)."""
        if not self.pairs:
            return None
        b_EOR = torch.cat([pair.lora.b.float() for pair in self.pairs], dim=-1)
        lies = _paired(b_EOR) if paired else F.pad(b_EOR, (0, 0, 0, -b_EOR.shape[1] % PANEL))
        return torch.unflatten(lies, 1, (-1, PANEL)).transpose(2, 3).contiguous()

    def begin_gradients(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._a = [pair.lora.a.to(dtype) for pair in self.pairs]
        self._b = [pair.lora.b.to(dtype) if self._which else _paired(pair.lora.b).to(dtype) for pair in self.pairs]
        self._of_a = [torch.zeros_like(pair.lora.a) for pair in self.pairs]
        self._of_b = [
            torch.zeros(b.shape, dtype=pair.lora.b.dtype) for b, pair in zip(self._b, self.pairs, strict=True)
        ]

    def middles(self, of_out: Tensor, expert: int, tokens: Tensor | None) -> list[Tensor]:
        """Gradients of an expert's rows before scaling, one for each adapter."""
        found = []
        for pair, b in zip(self.pairs, self._b, strict=True):
            middle = (of_out @ b[expert]).mul_(pair.lora.scaling)
            if pair.tokens_T is not None:
                own = pair.tokens_T if tokens is None else pair.tokens_T[tokens]
                middle.masked_fill_(~own.unsqueeze(-1), 0.0)
            found.append(middle)
        return found

    def add_input_gradient(self, of_x: Tensor, middles: list[Tensor], expert: int) -> None:
        """To that of the frozen product."""
        if self._folded:
            return
        for pair, a, middle in zip(self.pairs, self._a, middles, strict=True):
            kept = self._kept(of_x, pair, expert)
            if kept is None:
                of_x.addmm_(middle, a[expert])
            else:
                of_x += (middle @ a[expert]) * kept

    def keep_gradients(
        self, of_out: Tensor, middles: list[Tensor], x: Tensor, rows_SR: Tensor, expert: int, weights_S: Tensor | None
    ) -> None:
        """Of an expert's factors. `of_out` is before the routing weights where those are given."""
        for i, (pair, middle) in enumerate(zip(self.pairs, middles, strict=True)):
            through = rows_SR[:, pair.columns]
            if weights_S is not None:
                weights = weights_S.unsqueeze(-1)
                middle, through = middle * weights.to(middle.dtype), through * weights
            self._of_a[i][expert] = middle.T @ self._seen(x, pair, expert).to(middle.dtype)
            self._of_b[i][expert] = of_out.T @ through.to(of_out.dtype)

    def gradients(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Of each adapter's two factors, None where it has none here."""
        found = iter(zip(self.pairs, self._of_a, self._of_b, strict=True))
        out: list[tuple[Tensor | None, Tensor | None]] = []
        for pair in self._all:
            if pair is None:
                out.append((None, None))
                continue
            _, of_a, of_b = next(found)
            out.append((of_a, of_b if self._which else _unpaired(of_b, pair.lora.b.shape[1])))
        return out

    def _kept(self, x: Tensor, pair: _Pair, expert: int) -> Tensor | None:
        return lora.dropout_factors(x, pair.dropout, self._seed + 2 * expert + self._which)

    def _seen(self, x: Tensor, pair: _Pair, expert: int) -> Tensor:
        kept = self._kept(x, pair, expert)
        return x if kept is None else x * kept


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
