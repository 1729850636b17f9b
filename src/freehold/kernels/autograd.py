"""Gradients through packed weights, which stay as they are: the forward pass runs the kernels that inference runs, the
backward pass multiplies by the packed numbers themselves.

Of a frozen matrix no copy in full precision is made, whichever backend runs; a few rows at a time are widened. Only an
op's inputs are kept for the backward pass: experts compute their hidden values again. Where the native kernels round
activations to int8, the gradient is that of the product without the rounding. Weights get no gradients, and second
derivatives are refused. Called by freehold.kernels.ops alone, which has checked the arguments.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from freehold.kernels import backends, reference
from freehold.weights.packed import PANEL, PackedMatrix


class Experts(NamedTuple):
    """The frozen part of a mixture."""

    gate_up: PackedMatrix
    down: PackedMatrix
    alpha: float
    limit: float


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
) -> Tensor:
    out: Tensor = _Moe.apply(  # type: ignore[no-untyped-call]
        x_TD, weights_TA, gate_up_bias, down_bias, norm_D, residual_TD, experts_TA, experts, eps
    )
    return out


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
        ctx.weight, ctx.eps = weight, eps
        return _linear(x_TD, weight, bias_O, norm_D, eps, residual_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm_D = ctx.saved_tensors
        needs_x, needs_bias, needs_norm, needs_residual, *_ = ctx.needs_input_grad
        of_x = of_norm = None
        if needs_x or needs_norm:
            of_x = _linear_backward(gradient_TO, ctx.weight)
            if norm_D is not None:
                of_x, of_norm = _rms_norm_backward(of_x, x_TD, norm_D, ctx.eps)
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
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weights_TA, gate_up_bias, down_bias, norm_D, experts_TA)
        ctx.experts, ctx.eps = experts, eps
        gate_up, down, alpha, limit = experts
        module = backends.for_op("moe", x_TD)
        if module is not reference:
            out: Tensor = module.moe(
                x_TD, weights_TA, experts_TA, gate_up, gate_up_bias, down, down_bias, norm_D, eps, residual_TD,
                alpha=alpha, limit=limit,
            )  # fmt: skip
            return out
        normed_TD = x_TD if norm_D is None else reference.rms_norm(x_TD, norm_D, eps)
        out = torch.zeros_like(x_TD) if residual_TD is None else residual_TD.clone()
        for expert in torch.unique(experts_TA).tolist():
            token, slot = torch.where(experts_TA == expert)
            hidden = _hidden(normed_TD[token], gate_up[expert], gate_up_bias[expert], alpha, limit).out
            mixed = _linear(hidden, down[expert], down_bias[expert], None, 0.0, None)
            out.index_add_(0, token, mixed * weights_TA[token, slot].unsqueeze(-1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TA, gate_up_bias, down_bias, norm_D, experts_TA = ctx.saved_tensors
        needs_x, _, needs_gate_up_bias, needs_down_bias, needs_norm, needs_residual, *_ = ctx.needs_input_grad
        gate_up, down, alpha, limit = ctx.experts
        normed_TD = x_TD if norm_D is None else reference.rms_norm(x_TD, norm_D, ctx.eps)
        of_normed = torch.zeros_like(x_TD)
        of_weights = torch.zeros_like(weights_TA)
        of_gate_up_bias = torch.zeros_like(gate_up_bias) if needs_gate_up_bias else None
        of_down_bias = torch.zeros_like(down_bias) if needs_down_bias else None
        for expert in torch.unique(experts_TA).tolist():
            token, slot = torch.where(experts_TA == expert)
            weights = weights_TA[token, slot].unsqueeze(-1)
            of_mixed = gradient_TD[token]
            hidden = _hidden(normed_TD[token], gate_up[expert], gate_up_bias[expert], alpha, limit)
            of_hidden = _linear_backward(of_mixed, down[expert])
            # mixed · gradient, without computing mixed: its product with the packed matrix is there already.
            of_weights[token, slot] = (of_hidden * hidden.out).sum(-1) + of_mixed @ down_bias[expert]
            of_gate, of_up = hidden.backward(of_hidden * weights, alpha, limit)
            if needs_x or needs_norm:
                of_normed.index_add_(
                    0, token, _linear_backward(_in_panels(of_gate, of_up), _as_it_lies(gate_up[expert]))
                )
            if of_gate_up_bias is not None:
                of_gate_up_bias[expert] = torch.stack((of_gate.sum(0), of_up.sum(0)), dim=-1).flatten()
            if of_down_bias is not None:
                of_down_bias[expert] = (of_mixed * weights).sum(0)
        of_x, of_norm = of_normed, None
        if norm_D is not None:
            of_x, of_norm = _rms_norm_backward(of_normed, x_TD, norm_D, ctx.eps)
        of_residual = gradient_TD if needs_residual else None
        return of_x, of_weights, of_gate_up_bias, of_down_bias, of_norm, of_residual, None, None, None


class _Hidden(NamedTuple):
    """An expert's hidden values, (T, F) each, and what they were made of."""

    gate: Tensor  # before it is clamped, and so is up
    up: Tensor
    out: Tensor

    def backward(self, of_out: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up. What was clamped gets none; a value at the limit does, as in torch."""
        gate, up = self.gate.clamp(max=limit), self.up.clamp(min=-limit, max=limit)
        sigmoid = torch.sigmoid(alpha * gate)
        of_gate = of_out * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
        of_up = of_out * gate * sigmoid
        return of_gate * (self.gate <= limit), of_up * (self.up.abs() <= limit)


def _hidden(x_TD: Tensor, gate_up: PackedMatrix, bias: Tensor, alpha: float, limit: float) -> _Hidden:
    in_panels = _linear(x_TD, _as_it_lies(gate_up), None, None, 0.0, None)
    pairs = torch.unflatten(in_panels, 1, (-1, 2, PANEL))
    num_units = gate_up.shape[0] // 2
    gate, up = (pairs[:, :, i].flatten(1)[:, :num_units] + bias[i::2] for i in range(2))
    clamped = gate.clamp(max=limit)
    out = clamped * torch.sigmoid(alpha * clamped) * (up.clamp(min=-limit, max=limit) + 1)
    return _Hidden(gate, up, out)


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


def _rms_norm_backward(of_out: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the norm's weight."""
    scale_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    unit_TD = x_TD * scale_T1
    of_unit = of_out * weight_D
    of_x = scale_T1 * (of_unit - unit_TD * (of_unit * unit_TD).mean(-1, keepdim=True))
    return of_x, (of_out * unit_TD).sum(0)
