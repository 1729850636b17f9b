"""What backward passes multiply by: packed weights, in float32 or in bfloat16, adapters' factors, and the norm in front
of a product.

In float32 a gradient is multiplied by the packed numbers themselves. In bfloat16, which processors that have
instructions for it multiply ten times as fast, one matrix at a time, or a part of a large one, is widened into memory
that is used again for the next; sums are in float32 all the same. Called by the autograd functions of this package.
"""

import torch
from torch import Tensor

from freehold.kernels import backends, checks, reference
from freehold.weights.packed import PANEL, PackedMatrix

_NUMBERS_AT_ONCE = 1 << 24  # of a matrix that are widened at a time: 32 MiB


class Scratch:
    """Memory for one widened matrix after the other."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def widened(self, weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
        """(rows, C), rows in the order in which they lie, padding and all. Good until the next call."""
        rows, C = len(weight.data) * PANEL, weight.shape[1]
        if self._numbers.dtype != dtype or self._numbers.numel() < rows * C:
            self._numbers = torch.empty(rows * C, dtype=dtype)
        out_CR = self._numbers[: rows * C].view(C, rows)
        backends.built().widen(weight, out_CR)
        return out_CR.T


def linear_backward(gradient_TO: Tensor, weight: PackedMatrix, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """gradient · weight, (T, D) float32; rows of a paired weight in the order in which they lie, without padding."""
    module = backends.for_op("linear_backward", gradient_TO.float())
    if dtype == torch.float32 or module is reference:
        out: Tensor = module.linear_backward(gradient_TO.float(), weight)
        return out
    gradient_TO = gradient_TO.to(dtype)
    panels_at_once = max(1, _NUMBERS_AT_ONCE // (PANEL * max(1, weight.shape[1])))
    total = gradient_TO.new_zeros((len(gradient_TO), weight.shape[1]), dtype=torch.float32)
    for panel in range(0, len(weight.data), panels_at_once):
        part = weight.panels(panel, panels_at_once)
        first = panel * PANEL
        total += gradient_TO[:, first : first + part.shape[0]] @ scratch.widened(part, dtype)[: part.shape[0]]
    return total


def add_product(to_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """to += left · right: the products with adapters' factors, of which M, K or N is a rank. Torch would compute those
    with one thread (backends.one_torch_thread); the native kernels have more. `to` is contiguous, and all are of one
    type."""
    checks.rank("add_product", "left", left_MK, 2)
    checks.rank("add_product", "right", right_KN, 2)
    (M, K), N = left_MK.shape, right_KN.shape[1]
    checks.shape("add_product", "right", right_KN, (K, N))
    checks.shape("add_product", "to", to_MN, (M, N))
    checks.alike("add_product", to_MN, left_MK)
    checks.alike("add_product", to_MN, right_KN)
    checks.contiguous("add_product", "to", to_MN)
    backends.for_op("add_product", to_MN, left_MK, right_KN).add_product(to_MN, left_MK, right_KN)


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    out_MN = left_MK.new_zeros((left_MK.shape[0], right_KN.shape[1]))
    add_product(out_MN, left_MK, right_KN)
    return out_MN


def rms_norm_backward(
    of_out_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, *, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the norm's weight."""
    module = backends.for_op("rms_norm_backward", x_TD, of_out_TD, weight_D)
    of_x: Tensor = module.rms_norm_backward(of_out_TD, x_TD, weight_D, eps)
    if not needs_weight:
        return of_x, None
    scale_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    return of_x, (of_out_TD * x_TD * scale_T1).sum(0)
