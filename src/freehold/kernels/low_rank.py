"""What an adapter adds to a linear layer, with its gradient spelled out: parts of one input share a product.

Forward by the op that serves (ops.add_lora), so that what is trained is what will be served, to the last bit; backward
in the type in which gradients are multiplied (backends.gradient_type). For float32 activations on the CPU, without
dropout; model/lora.py, which calls this, computes the rest in plain torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from freehold.kernels import backends, checks, products
from freehold.kernels.packed_lora import LoraParts, PackedLora
from freehold.weights.packed import pack


class Part(NamedTuple):
    """Adds scaling · (x · Aᵀ) · Bᵀ to a layer's columns from `column` on."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    column: int


def suits(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32


def add(out_TO: Tensor, x_TI: Tensor, parts: Sequence[Part], *, folded: bool = False) -> Tensor:
    """`out_TO` itself, contiguous and nobody else's, with that added. `folded`: it has it in already, and only the
    factors' gradients are asked for."""
    checks.contiguous("low_rank", "out", out_TO)
    factors = [factor for part in parts for factor in (part.a_RI, part.b_OR)]
    places = [(part.scaling, slice(part.column, part.column + len(part.b_OR))) for part in parts]
    added_TO: Tensor = _Add.apply(out_TO, x_TI, places, folded, *factors)  # type: ignore[no-untyped-call]
    return added_TO


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_TO: Tensor, x_TI: Tensor, places: list[tuple[float, slice]], folded: bool, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TI.to(backends.gradient_type()), *factors)
        ctx.places, ctx.folded = places, folded
        ctx.mark_dirty(out_TO)
        if folded:
            return out_TO
        loras = [
            PackedLora(pack(a_RI.float(), "f32"), pack(b_OR.float(), "f32"), scaling)
            for (scaling, _), a_RI, b_OR in zip(places, factors[0::2], factors[1::2], strict=True)
        ]
        columns = [place.start for _, place in places]
        parts = LoraParts(loras, [0] * len(loras), columns, torch.zeros(len(x_TI), dtype=torch.int64))
        backends.for_op("add_lora", x_TI).add_lora(out_TO, x_TI, parts, None, 0.0)
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *factors = ctx.saved_tensors
        dtype, of_factors, middles, start = x_TI.dtype, [], [], 0
        joined_RI = torch.cat(factors[0::2]).to(dtype)
        rows_TR = products.product(x_TI, joined_RI.T)
        gradient = gradient_TO.to(dtype)
        for (scaling, columns), a_RI, b_OR in zip(ctx.places, factors[0::2], factors[1::2], strict=True):
            rank, mine = len(a_RI), gradient[:, columns]
            middle = products.product(mine, b_OR.to(dtype)).mul_(scaling)
            of_b = products.product(mine.T, rows_TR[:, start : start + rank]).to(b_OR.dtype).mul_(scaling)
            of_factors += [products.product(middle.T, x_TI).to(a_RI.dtype), of_b]
            middles.append(middle)
            start += rank
        of_x = None if ctx.folded else products.product(torch.cat(middles, dim=1), joined_RI).float()
        return gradient_TO, of_x, None, None, *of_factors
