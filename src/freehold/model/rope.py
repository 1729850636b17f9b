"""Rotary position tables, stretched by YaRN (https://arxiv.org/abs/2309.00071) where the config says so."""

import math

import torch
from torch import Tensor

from freehold.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(H/2,) radians per position of each rotated pair, float32.

    YaRN keeps the fast pairs, divides the slow ones by `factor`, and blends linearly between the pair that turns
    beta_fast times within the original context and the one that turns beta_slow times.
    """
    half = head_dim // 2
    extrapolated = 1.0 / rope.theta ** (torch.arange(half, dtype=torch.float32) / half)
    if rope.factor == 1:
        return extrapolated

    def pair_that_turns(times: float) -> float:
        return half * math.log(rope.original_context / (times * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high if high != low else high + 0.001
    slowness = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (extrapolated / rope.factor) * slowness + extrapolated * (1 - slowness)


def tables(frequencies: Tensor, concentration: float, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of these positions, each (T, H/2) float32."""
    angles = torch.outer(positions_T.to(torch.float32), frequencies)
    return angles.cos() * concentration, angles.sin() * concentration
