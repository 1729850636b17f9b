"""What adapters add inside a mixture of experts: the product of one expert's two small factors, and its gradient.

The arithmetic is spelled out, not left to torch's autograd, because the mixture computes its experts again in the
backward pass (autograd.py), which calls this; nobody else should. Factors have a type of their own, often a wider one
than the activations; a product is computed in theirs and returned in the activations'. Shape legend: S rows of one
expert, I input, O output, R rank, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lora(NamedTuple):
    """Two small factors by which every expert's product with its matrix gains scaling · (x · Aᵀ) · Bᵀ."""

    a: Tensor  # (E, R, I)
    b: Tensor  # (E, O, R)
    scaling: float


class ExpertLora(NamedTuple):
    """What one adapter adds inside a mixture, None where it leaves a matrix alone.

    It concerns the tokens that are True in `tokens_T`, all where that is None. `dropout` is the share of inputs that
    the factors do not see, for training alone. `folded`: the matrices have it in already, so that nothing is added;
    only the factors' gradients are asked for, as if it were.
    """

    gate_up: Lora | None
    down: Lora | None
    tokens_T: Tensor | None = None
    dropout: float = 0.0
    folded: bool = False


class Gradients(NamedTuple):
    """Of one expert's input and factors."""

    of_x: Tensor
    of_a: Tensor
    of_b: Tensor


def added(x_SI: Tensor, lora: Lora, expert: int, kept: Tensor | None) -> Tensor:
    """(S, O). `kept` are the factors by which dropout multiplies the input."""
    return ((_seen(x_SI, lora, kept) @ lora.a[expert].T) @ lora.b[expert].T * lora.scaling).to(x_SI.dtype)


def input_gradient(of_out_SO: Tensor, lora: Lora, expert: int, kept: Tensor | None) -> Tensor:
    """Of `added`, for its input alone."""
    of_x = (of_out_SO.to(lora.a.dtype) @ lora.b[expert]) @ lora.a[expert] * lora.scaling
    return (of_x if kept is None else of_x * kept).to(of_out_SO.dtype)


def gradients(of_out_SO: Tensor, x_SI: Tensor, lora: Lora, expert: int, kept: Tensor | None) -> Gradients:
    """Of `added`, for all that it is made of."""
    a_RI, b_OR = lora.a[expert], lora.b[expert]
    seen, of_out = _seen(x_SI, lora, kept), of_out_SO.to(lora.a.dtype) * lora.scaling
    of_middle = of_out @ b_OR
    of_x = of_middle @ a_RI
    return Gradients(
        (of_x if kept is None else of_x * kept).to(x_SI.dtype), of_middle.T @ seen, of_out.T @ (seen @ a_RI.T)
    )


def dropout_factors(x_SI: Tensor, share: float, seed: int) -> Tensor | None:
    """The same for the same seed, so that a backward pass sees what the forward pass saw. None for no dropout."""
    if not share:
        return None
    generator = torch.Generator(x_SI.device).manual_seed(seed)
    kept = torch.rand(x_SI.shape, generator=generator, device=x_SI.device) >= share
    return kept / (1 - share)


def _seen(x_SI: Tensor, lora: Lora, kept: Tensor | None) -> Tensor:
    x = x_SI.to(lora.a.dtype)
    return x if kept is None else x * kept
