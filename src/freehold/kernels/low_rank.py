"""What an adapter adds to a linear layer, with its gradient spelled out: parts of one input share a product.

Forward in float32; backward in the type in which gradients are multiplied (backends.gradient_type). For float32
activations on the CPU, without dropout; model/lora.py, which calls this, computes the rest in plain torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from freehold.kernels import backends


class Part(NamedTuple):
    """Adds scaling · (x · Aᵀ) · Bᵀ to a layer's columns from `column` on."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    column: int


def suits(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32


def add(out_TO: Tensor, x_TI: Tensor, parts: Sequence[Part], *, folded: bool = False) -> Tensor:
    """A new sum. `folded`: `out_TO` has it in already, and only the factors' gradients are asked for."""
    factors = [factor for part in parts for factor in (part.a_RI, part.b_OR)]
    places = [(part.scaling, slice(part.column, part.column + len(part.b_OR))) for part in parts]
    sum_TO: Tensor = _Add.apply(out_TO, x_TI, places, folded, *factors)  # type: ignore[no-untyped-call]
    return sum_TO


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_TO: Tensor, x_TI: Tensor, places: list[tuple[float, slice]], folded: bool, *factors: Tensor
    ) -> Tensor:
        dtype = backends.gradient_type()
        a_RI = torch.cat(factors[0::2]).float()
        rows_TR = x_TI @ a_RI.T
        sum_TO, start = out_TO.clone(), 0
        for (scaling, columns), b_OR in zip(places, factors[1::2], strict=True):
            rank = b_OR.shape[1]
            if not folded:
                sum_TO[:, columns].addmm_(rows_TR[:, start : start + rank], b_OR.float().T, alpha=scaling)
            start += rank
        ctx.save_for_backward(x_TI.to(dtype), rows_TR.to(dtype), *factors)
        ctx.places, ctx.folded = places, folded
        return sum_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, rows_TR, *factors = ctx.saved_tensors
        dtype, of_factors, middles, start = x_TI.dtype, [], [], 0
        gradient = gradient_TO.to(dtype)
        for (scaling, columns), a_RI, b_OR in zip(ctx.places, factors[0::2], factors[1::2], strict=True):
            rank, mine = len(a_RI), gradient[:, columns]
            middle = (mine @ b_OR.to(dtype)).mul_(scaling)
            of_b = (mine.T @ rows_TR[:, start : start + rank]).to(b_OR.dtype).mul_(scaling)
            of_factors += [(middle.T @ x_TI).to(a_RI.dtype), of_b]
            middles.append(middle)
            start += rank
        of_x = None if ctx.folded else (torch.cat(middles, dim=1) @ torch.cat(factors[0::2]).to(dtype)).float()
        return gradient_TO, of_x, None, None, *of_factors
