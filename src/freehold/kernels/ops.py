"""The ops a gpt-oss model is made of. Each checks its arguments, then hands them to the backend for the device.

All the model's arithmetic goes through these, but for the embedding look-up. An op's name and signature are the same in
every backend; its meaning is what freehold.kernels.reference says. Weights are plain tensors, MXFP4 as published, or
packed for the CPU kernels. Where two ops always follow each other one of them takes the other along: `linear` and `moe`
can normalise their input and add a residual, `kv_write` and `attention` can rotate keys and queries.

Shape legend: T tokens, S keys, D hidden, O output, N query heads, K kv heads, H head dim, E experts, A active experts,
F expert width, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from freehold.errors import UsageError
from freehold.kernels import autograd, backends, checks, reference
from freehold.kernels.kv import PAGE, KvPages, KvType, PagedSequences
from freehold.kernels.lora import ExpertLora
from freehold.kernels.packed_lora import LoraParts, PackedLoras
from freehold.sampling import check_filters
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import PackedMatrix

Weight = Tensor | Mxfp4Tensor | PackedMatrix


class Norm(NamedTuple):
    """The rms_norm that an op applies to its input first."""

    weight_D: Tensor
    eps: float


class Rotation(NamedTuple):
    """cos and sin of each token's position, (T, H/2) float32, by which an op turns heads as `rope` does."""

    cos_TH: Tensor
    sin_TH: Tensor


class Routing(NamedTuple):
    """Which experts each token visits, and how much each counts."""

    weights_TA: Tensor
    experts_TA: Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32, returned in x's type."""
    checks.rank("rms_norm", "x", x_TD, 2)
    checks.shape("rms_norm", "weight", weight_D, (x_TD.shape[1],))
    checks.alike("rms_norm", x_TD, weight_D)
    if backends.needs_gradient(x_TD, weight_D):
        return autograd.rms_norm(x_TD, weight_D, eps)
    out: Tensor = backends.for_op("rms_norm", x_TD).rms_norm(x_TD, weight_D, eps)
    return out


def linear(
    x_TD: Tensor,
    weight_OD: Tensor | PackedMatrix,
    bias_O: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """norm(x) · weightᵀ + bias + residual, shape (T, O)."""
    checks.rank("linear", "x", x_TD, 2)
    checks.rank("linear", "weight", weight_OD, 2)
    (T, D), num_rows = x_TD.shape, weight_OD.shape[0]
    checks.shape("linear", "weight", weight_OD, (num_rows, D))
    _check_weight("linear", x_TD, weight_OD)
    if bias_O is not None:
        checks.shape("linear", "bias", bias_O, (num_rows,))
        checks.alike("linear", x_TD, bias_O)
    if norm is not None:
        checks.shape("linear", "norm", norm.weight_D, (D,))
        checks.alike("linear", x_TD, norm.weight_D)
    if residual_TO is not None:
        checks.shape("linear", "residual", residual_TO, (T, num_rows))
        checks.alike("linear", x_TD, residual_TO)
    norm_D, eps = (None, 0.0) if norm is None else norm
    if isinstance(weight_OD, PackedMatrix) and backends.needs_gradient(x_TD, bias_O, norm_D, residual_TO):
        return autograd.linear(x_TD, weight_OD, bias_O, norm_D, eps, residual_TO)
    plain = weight_OD if isinstance(weight_OD, Tensor) else None
    module = backends.for_op("linear", x_TD, plain, bias_O, norm_D, residual_TO, packed=plain is None)
    out: Tensor = module.linear(x_TD, weight_OD, bias_O, norm_D, eps, residual_TO)
    return out


def add_lora(out_TO: Tensor, x_TD: Tensor, parts: LoraParts, *, norm: Norm | None = None) -> Tensor:
    """`out_TO`, which it changes: a linear layer's result, with what adapters add to it for this x."""
    checks.rank("add_lora", "x", x_TD, 2)
    checks.rank("add_lora", "out", out_TO, 2)
    (T, D), num_rows = x_TD.shape, out_TO.shape[1]
    checks.shape("add_lora", "out", out_TO, (T, num_rows))
    checks.shape("add_lora", "rows", parts.rows_T, (T,))
    checks.alike("add_lora", x_TD, out_TO)
    if x_TD.dtype != torch.float32 or x_TD.device.type != "cpu":
        raise UsageError(
            f"[add_lora] expected float32 on the CPU for packed factors, got {x_TD.dtype} on {x_TD.device}"
        )
    if not out_TO.is_contiguous() or backends.needs_gradient(x_TD, out_TO):
        raise UsageError("[add_lora] expected a contiguous result to add to, which no gradient passes")
    for lora, column in zip(parts.loras, parts.columns, strict=True):
        checks.shape("add_lora", "A", lora.a, (lora.a.shape[0], D))
        room = num_rows - column
        if lora.b.shape[0] > room or lora.b.paired:
            raise UsageError(f"[add_lora] expected B of up to {room} rows, unpaired, got {tuple(lora.b.shape)}")
    if norm is not None:
        checks.shape("add_lora", "norm", norm.weight_D, (D,))
        checks.alike("add_lora", x_TD, norm.weight_D)
    norm_D, eps = (None, 0.0) if norm is None else norm
    backends.for_op("add_lora", x_TD, norm_D).add_lora(out_TO, x_TD, parts, norm_D, eps)
    return out_TO


def rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate the half-split pairs (i, i + H/2) of every head. cos and sin are (T, H/2), float32."""
    checks.rank("rope", "x", x_TNH, 3)
    _check_rotation("rope", x_TNH, Rotation(cos_TH, sin_TH))
    if backends.needs_gradient(x_TNH):
        return autograd.rope(x_TNH, cos_TH, sin_TH)
    out: Tensor = backends.for_op("rope", x_TNH).rope(x_TNH, cos_TH, sin_TH)
    return out


def kv_write(
    kv: KvPages, sequences: PagedSequences, k_TKH: Tensor, v_TKH: Tensor, *, rotation: Rotation | None = None
) -> None:
    """Put every token's key and value where its position belongs, in the pages' type; keys are rotated first.

    Raises IndexError where a page does not exist.
    """
    checks.rank("kv_write", "k", k_TKH, 3)
    T, K, H = k_TKH.shape
    checks.shape("kv_write", "v", v_TKH, (T, K, H))
    checks.shape("kv_write", "pages", kv.values, (len(kv), K, PAGE, H))
    checks.alike("kv_write", k_TKH, v_TKH)
    _check_count("kv_write", k_TKH, sequences)
    if rotation is not None:
        _check_rotation("kv_write", k_TKH, rotation)
    turn = rotation or _NO_ROTATION
    backends.for_op("kv_write", k_TKH, v_TKH, kv.keys, kv.values).kv_write(kv, sequences, k_TKH, v_TKH, *turn)


def attention(
    q_TNH: Tensor,
    kv: KvPages,
    sequences: PagedSequences,
    sinks_N: Tensor,
    *,
    scale: float,
    window: int | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Causal grouped-query attention of each sequence over its own pages; queries are rotated first; returns (T, N, H).

    The tokens' own keys are written already. Each head's sink logit takes part in its softmax and is then dropped.
    `window` is the number of keys that a query sees, itself counted; None shows it all. A token's result depends on its
    sequence alone. Raises IndexError where a page that is in sight does not exist.
    """
    checks.rank("attention", "q", q_TNH, 3)
    _, N, H = q_TNH.shape
    K = kv.values.shape[1]
    checks.shape("attention", "pages", kv.values, (len(kv), K, PAGE, H))
    checks.shape("attention", "sinks", sinks_N, (N,))
    checks.alike("attention", q_TNH, sinks_N)
    _check_count("attention", q_TNH, sequences)
    _check_heads("attention", N, K, window)
    if rotation is not None:
        _check_rotation("attention", q_TNH, rotation)
    turn = rotation or _NO_ROTATION
    module = backends.for_op("attention", q_TNH, sinks_N, kv.keys, kv.values)
    out: Tensor = module.attention(q_TNH, kv, sequences, sinks_N, *turn, scale=scale, window=window)
    return out


def self_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    counts: Sequence[int],
    sinks_N: Tensor,
    *,
    scale: float,
    window: int | None = None,
    rotation: Rotation | None = None,
    kv_type: KvType = "f32",
) -> Tensor:
    """`attention` without a cache, for training: sequences of `counts` tokens, one after the other, each over itself.

    Keys are rotated as queries are, and with the values rounded as pages of `kv_type` would: native kernels give
    what `kv_write` and `attention` give, to the last bit. Gradients reach queries, keys, values and sinks, straight
    through that rounding; what is kept for them grows with T, not with its square.
    """
    checks.rank("self_attention", "q", q_TNH, 3)
    T, N, H = q_TNH.shape
    checks.rank("self_attention", "k", k_TKH, 3)
    K = k_TKH.shape[1]
    checks.shape("self_attention", "k", k_TKH, (T, K, H))
    checks.shape("self_attention", "v", v_TKH, (T, K, H))
    checks.shape("self_attention", "sinks", sinks_N, (N,))
    for other in (k_TKH, v_TKH, sinks_N):
        checks.alike("self_attention", q_TNH, other)
    if sum(counts) != T or any(count < 0 for count in counts):
        raise UsageError(f"[self_attention] expected counts that sum up to {T} tokens, got {list(counts)}")
    _check_heads("self_attention", N, K, window)
    if rotation is not None:
        _check_rotation("self_attention", q_TNH, rotation)
        q_TNH, k_TKH = (rope(x, *rotation) for x in (q_TNH, k_TKH))
    return autograd.self_attention(q_TNH, k_TKH, v_TKH, counts, sinks_N, scale, window, kv_type)


_NO_ROTATION = (None, None)


def route(logits_TE: Tensor, num_active: int) -> Routing:
    """The `num_active` experts with the largest logits, and the softmax over those alone."""
    checks.rank("route", "logits", logits_TE, 2)
    if not 1 <= num_active <= logits_TE.shape[1]:
        raise UsageError(f"[route] expected 1 to {logits_TE.shape[1]} active experts, got {num_active}")
    if backends.needs_gradient(logits_TE):
        return Routing(*autograd.route(logits_TE, num_active))
    return Routing(*backends.for_op("route", logits_TE).route(logits_TE, num_active))


def moe(
    x_TD: Tensor,
    routing: Routing,
    gate_up: Weight,
    gate_up_bias: Tensor,
    down: Weight,
    down_bias: Tensor,
    *,
    alpha: float,
    limit: float,
    norm: Norm | None = None,
    residual_TD: Tensor | None = None,
    loras: Sequence[ExpertLora] | PackedLoras = (),
) -> Tensor:
    """Mixture of experts of norm(x), plus residual: clamped SwiGLU, gate·sigmoid(alpha·gate)·(up + 1); returns (T, D).

    gate_up is (E, 2F, D) with gate in even and up in odd rows, gate_up_bias (E, 2F), down (E, D, F), down_bias (E, D).
    gate is clamped to at most `limit`, up to ±`limit`. A packed gate_up must have been packed as paired.
    `loras` are what adapters add, each for its tokens; rows of B of gate_up are interleaved as the matrix's. Packed
    ones are for packed weights, and have no gradient.
    """
    checks.rank("moe", "x", x_TD, 2)
    checks.rank("moe", "routing weights", routing.weights_TA, 2)
    checks.rank("moe", "gate_up", gate_up, 3)
    T, D = x_TD.shape
    E, F = gate_up.shape[0], gate_up.shape[1] // 2
    checks.shape("moe", "routing weights", routing.weights_TA, (T, routing.weights_TA.shape[1]))
    checks.shape("moe", "routing experts", routing.experts_TA, tuple(routing.weights_TA.shape))
    if routing.experts_TA.dtype != torch.int64:
        raise UsageError(f"[moe] expected routing experts in int64, got {routing.experts_TA.dtype}")
    checks.shape("moe", "gate_up", gate_up, (E, 2 * F, D))
    checks.shape("moe", "gate_up_bias", gate_up_bias, (E, 2 * F))
    checks.shape("moe", "down", down, (E, D, F))
    checks.shape("moe", "down_bias", down_bias, (E, D))
    for other in (routing.weights_TA, gate_up_bias, down_bias):
        checks.alike("moe", x_TD, other)
    for stack in (gate_up, down):
        _check_weight("moe", x_TD, stack)
    if isinstance(gate_up, PackedMatrix) != isinstance(down, PackedMatrix):
        raise UsageError("[moe] expected both matrices packed, or neither")
    if isinstance(gate_up, PackedMatrix) and not gate_up.paired:
        raise UsageError("[moe] expected a packed gate_up with paired rows")
    if norm is not None:
        checks.shape("moe", "norm", norm.weight_D, (D,))
        checks.alike("moe", x_TD, norm.weight_D)
    if residual_TD is not None:
        checks.shape("moe", "residual", residual_TD, (T, D))
        checks.alike("moe", x_TD, residual_TD)
    norm_D, eps = (None, 0.0) if norm is None else norm
    if isinstance(loras, PackedLoras):
        _check_packed_loras(T, D, E, F, loras)
        if not isinstance(gate_up, PackedMatrix) or not isinstance(down, PackedMatrix):
            raise UsageError("[moe] expected packed weights for packed adapters")
        if backends.needs_gradient(x_TD, routing.weights_TA, gate_up_bias, down_bias, norm_D, residual_TD):
            raise UsageError("[moe] expected adapters that are not packed where a gradient is wanted")
        module = backends.for_op("moe", x_TD)
        if module is not reference:
            fast: Tensor = module.moe(
                x_TD, *routing, gate_up, gate_up_bias, down, down_bias, norm_D, eps, residual_TD, alpha=alpha,
                limit=limit, loras=loras,
            )  # fmt: skip
            return fast
        loras = reference.unpacked_loras(loras)
    _check_loras(T, D, E, F, loras)
    others = [weight for weight in (gate_up, down) if isinstance(weight, Tensor)]
    factors = [
        factor for lora in loras for pair in (lora.gate_up, lora.down) if pair is not None for factor in pair[:2]
    ]
    around = (routing.weights_TA, gate_up_bias, down_bias, norm_D, residual_TD, *factors)
    if (loras or backends.needs_gradient(x_TD, *around)) and not backends.needs_gradient(*others):
        experts = autograd.Experts(gate_up, down, alpha, limit)
        return autograd.moe(x_TD, *routing, experts, gate_up_bias, down_bias, norm_D, eps, residual_TD, loras)
    packed = isinstance(gate_up, PackedMatrix)
    module = backends.for_op("moe", x_TD, *around, *others, packed=packed)
    out: Tensor = module.moe(
        x_TD, *routing, gate_up, gate_up_bias, down, down_bias, norm_D, eps, residual_TD, alpha=alpha, limit=limit
    )
    return out


def sample(
    logits_V: Tensor,
    *,
    uniform: float,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Draw one token id. Filters apply in the order temperature, top-k, top-p, min-p, each on what the last left.

    `uniform`, in [0, 1), is the draw: the token is taken at which the cumulated probability, in order of ids, passes
    it. Temperature 0 takes the largest logit; top_k 0 keeps all. A logit of -inf masks its token: it is never drawn.
    Raises UsageError for values out of range, NaN logits, or when every token is masked.
    """
    checks.rank("sample", "logits", logits_V, 1)
    if not len(logits_V):
        raise UsageError("[sample] expected at least one token, got (0,)")
    check_filters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if not 0 <= uniform < 1:
        raise UsageError(f"[sample] expected uniform in [0, 1), got {uniform}")
    module = backends.for_op("sample", logits_V)
    largest = module.largest(logits_V)
    if not math.isfinite(largest):
        raise UsageError(f"[sample] expected at least one token with a finite logit, the largest is {largest}")
    token: int = module.sample(logits_V, temperature, top_k, top_p, min_p, uniform)
    return token


def _check_heads(op: str, N: int, K: int, window: int | None) -> None:
    if N % K:
        raise UsageError(f"[{op}] expected N a multiple of K, got N {N}, K {K}")
    if window is not None and window < 1:
        raise UsageError(f"[{op}] expected a window of at least 1 key, got {window}")


def _check_count(op: str, x: Tensor, sequences: PagedSequences) -> None:
    if len(x) != sequences.num_tokens:
        raise UsageError(f"[{op}] expected {sequences.num_tokens} tokens, as the sequences have, got {len(x)}")


def _check_loras(T: int, D: int, E: int, F: int, loras: Sequence[ExpertLora]) -> None:
    for lora in loras:
        for name, pair, (outputs, inputs) in (("gate_up", lora.gate_up, (2 * F, D)), ("down", lora.down, (D, F))):
            if pair is not None:
                checks.rank("moe", f"A of {name}", pair.a, 3)
                R = pair.a.shape[1]
                checks.shape("moe", f"A of {name}", pair.a, (E, R, inputs))
                checks.shape("moe", f"B of {name}", pair.b, (E, outputs, R))
        if lora.tokens_T is not None:
            checks.shape("moe", "a LoRA's tokens", lora.tokens_T, (T,))


def _check_packed_loras(T: int, D: int, E: int, F: int, loras: PackedLoras) -> None:
    checks.shape("moe", "rows", loras.rows_T, (T,))
    if loras.rows_T.dtype != torch.int64:
        raise UsageError(f"[moe] expected the adapters' rows in int64, got {loras.rows_T.dtype}")
    for lora in loras.loras:
        for name, pair, (outputs, inputs) in (("gate_up", lora.gate_up, (2 * F, D)), ("down", lora.down, (D, F))):
            if pair is not None:
                R = pair.a.shape[-2]
                checks.shape("moe", f"A of {name}", pair.a, (E, R, inputs))
                checks.shape("moe", f"B of {name}", pair.b, (E, outputs, R))
                if pair.b.paired != (name == "gate_up"):
                    raise UsageError("[moe] expected B of gate_up with paired rows, and no other")


def _check_rotation(op: str, x_TNH: Tensor, rotation: Rotation) -> None:
    T, _, H = x_TNH.shape
    if H % 2:
        raise UsageError(f"[{op}] expected heads of an even size, got {H}")
    for name, table in (("cos", rotation.cos_TH), ("sin", rotation.sin_TH)):
        checks.shape(op, name, table, (T, H // 2))
        if table.dtype != torch.float32:
            raise UsageError(f"[{op}] expected {name} in float32, got {table.dtype}")


def _check_weight(op: str, x: Tensor, weight: Weight) -> None:
    """Plain weights are of x's type, packed ones want it in float32."""
    if isinstance(weight, PackedMatrix):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise UsageError(f"[{op}] expected float32 on the CPU for packed weights, got {x.dtype} on {x.device}")
    elif isinstance(weight, Tensor) and op == "linear":
        checks.alike(op, x, weight)
