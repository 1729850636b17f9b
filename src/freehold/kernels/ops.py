"""The ops a gpt-oss model is made of. Each checks its arguments, then hands them to the backend for the device.

All the model's arithmetic goes through these, but for residual additions and the embedding look-up. An op's name and
signature are the same in every backend; its meaning is what freehold.kernels.reference says. Shape legend: T tokens,
S keys, D hidden, O output, N query heads, K kv heads, H head dim, E experts, A active experts, F expert width,
V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from freehold.errors import UsageError
from freehold.kernels import backends
from freehold.weights.mxfp4 import Mxfp4Tensor


class Routing(NamedTuple):
    """Which experts each token visits, and how much each counts."""

    weights_TA: Tensor
    experts_TA: Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32, returned in x's type."""
    _check_rank("rms_norm", "x", x_TD, 2)
    _check_shape("rms_norm", "weight", weight_D, (x_TD.shape[1],))
    _check_alike("rms_norm", x_TD, weight_D)
    out: Tensor = backends.for_op("rms_norm", x_TD, weight_D).rms_norm(x_TD, weight_D, eps)
    return out


def linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, shape (T, O)."""
    _check_rank("linear", "x", x_TD, 2)
    _check_rank("linear", "weight", weight_OD, 2)
    _check_shape("linear", "weight", weight_OD, (weight_OD.shape[0], x_TD.shape[1]))
    _check_alike("linear", x_TD, weight_OD)
    if bias_O is not None:
        _check_shape("linear", "bias", bias_O, (weight_OD.shape[0],))
        _check_alike("linear", x_TD, bias_O)
    out: Tensor = backends.for_op("linear", x_TD, weight_OD, bias_O).linear(x_TD, weight_OD, bias_O)
    return out


def rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate the half-split pairs (i, i + H/2) of every head. cos and sin are (T, H/2), float32."""
    _check_rank("rope", "x", x_TNH, 3)
    for name, table in (("cos", cos_TH), ("sin", sin_TH)):
        _check_shape("rope", name, table, (x_TNH.shape[0], x_TNH.shape[2] // 2))
    out: Tensor = backends.for_op("rope", x_TNH).rope(x_TNH, cos_TH, sin_TH)
    return out


def attention(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, sinks_N: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """Causal grouped-query attention of one sequence; returns (T, N, H).

    The keys are consecutive positions and the last T of them belong to the queries, so S >= T. Each head's sink
    logit takes part in its softmax and is then dropped. `window` is the number of keys that a query sees, itself
    counted; None shows it all. Keys in front of the window may be absent.
    """
    _check_rank("attention", "q", q_TNH, 3)
    _check_rank("attention", "k", k_SKH, 3)
    T, N, H = q_TNH.shape
    S, K, _ = k_SKH.shape
    _check_shape("attention", "k", k_SKH, (S, K, H))
    _check_shape("attention", "v", v_SKH, (S, K, H))
    _check_shape("attention", "sinks", sinks_N, (N,))
    _check_alike("attention", q_TNH, k_SKH)
    _check_alike("attention", q_TNH, v_SKH)
    if S < T or N % K:
        raise UsageError(f"[attention] expected S >= T and N a multiple of K, got T {T}, S {S}, N {N}, K {K}")
    if window is not None and window < 1:
        raise UsageError(f"[attention] expected a window of at least 1 key, got {window}")
    module = backends.for_op("attention", q_TNH, k_SKH, v_SKH, sinks_N)
    out: Tensor = module.attention(q_TNH, k_SKH, v_SKH, sinks_N, scale=scale, window=window)
    return out


def route(logits_TE: Tensor, num_active: int) -> Routing:
    """The `num_active` experts with the largest logits, and the softmax over those alone."""
    _check_rank("route", "logits", logits_TE, 2)
    if not 1 <= num_active <= logits_TE.shape[1]:
        raise UsageError(f"[route] expected 1 to {logits_TE.shape[1]} active experts, got {num_active}")
    return Routing(*backends.for_op("route", logits_TE).route(logits_TE, num_active))


def moe(
    x_TD: Tensor,
    routing: Routing,
    gate_up: Mxfp4Tensor | Tensor,
    gate_up_bias: Tensor,
    down: Mxfp4Tensor | Tensor,
    down_bias: Tensor,
    *,
    alpha: float,
    limit: float,
) -> Tensor:
    """Mixture of experts with the clamped SwiGLU gate·sigmoid(alpha·gate)·(up + 1); returns (T, D).

    gate_up is (E, 2F, D) with gate in even and up in odd rows, gate_up_bias (E, 2F), down (E, D, F), down_bias (E, D).
    gate is clamped to at most `limit`, up to ±`limit`.
    """
    _check_rank("moe", "x", x_TD, 2)
    _check_rank("moe", "routing weights", routing.weights_TA, 2)
    _check_rank("moe", "gate_up", gate_up, 3)
    T, D = x_TD.shape
    E, F = gate_up.shape[0], gate_up.shape[1] // 2
    _check_shape("moe", "routing weights", routing.weights_TA, (T, routing.weights_TA.shape[1]))
    _check_shape("moe", "routing experts", routing.experts_TA, tuple(routing.weights_TA.shape))
    _check_shape("moe", "gate_up", gate_up, (E, 2 * F, D))
    _check_shape("moe", "gate_up_bias", gate_up_bias, (E, 2 * F))
    _check_shape("moe", "down", down, (E, D, F))
    _check_shape("moe", "down_bias", down_bias, (E, D))
    for other in (routing.weights_TA, gate_up_bias, down_bias):
        _check_alike("moe", x_TD, other)
    plain = [stack for stack in (gate_up, down) if isinstance(stack, Tensor)]
    module = backends.for_op("moe", x_TD, routing.weights_TA, gate_up_bias, down_bias, *plain)
    out: Tensor = module.moe(x_TD, *routing, gate_up, gate_up_bias, down, down_bias, alpha=alpha, limit=limit)
    return out


def sample(
    logits_V: Tensor,
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Draw one token id. Filters apply in the order temperature, top-k, top-p, min-p, each on what the last left.

    Temperature 0 takes the largest logit; top_k 0 keeps all. A logit of -inf masks its token: it is never drawn.
    Raises UsageError for values out of range, NaN logits, or when every token is masked.
    """
    _check_rank("sample", "logits", logits_V, 1)
    if not len(logits_V):
        raise UsageError("[sample] expected at least one token, got (0,)")
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    largest = float(logits_V.max())
    if not math.isfinite(largest):
        raise UsageError(f"[sample] expected at least one token with a finite logit, the largest is {largest}")
    module = backends.for_op("sample", logits_V)
    token: int = module.sample(logits_V, temperature, top_k, top_p, min_p, generator)
    return token


def check_sampling(*, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise UsageError, naming the value, unless all four are in range."""
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0:
        raise UsageError(f"top_k must be 0 (all tokens) or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not 0 <= min_p <= 1:
        raise UsageError(f"min_p must be between 0 and 1, got {min_p}")


def _check_rank(op: str, name: str, tensor: Tensor | Mxfp4Tensor, rank: int) -> None:
    if len(tensor.shape) != rank:
        raise UsageError(f"[{op}] expected {name} with {rank} dimensions, got {tuple(tensor.shape)}")


def _check_shape(op: str, name: str, tensor: Tensor | Mxfp4Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UsageError(f"[{op}] expected {name} {shape}, got {tuple(tensor.shape)}")


def _check_alike(op: str, a: Tensor, b: Tensor) -> None:
    if a.dtype != b.dtype or a.device != b.device:
        raise UsageError(
            f"[{op}] expected one type and device, got {a.dtype} on {a.device} and {b.dtype} on {b.device}"
        )
