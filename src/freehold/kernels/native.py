"""The C++ kernels, for CPU tensors in float32 and packed weights. They keep no graph: gradients through packed weights
are the business of freehold.kernels.autograd, all others of the reference ops. Arguments have been checked by
freehold.kernels.ops; here they become addresses.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from freehold import _native, machine
from freehold.errors import BackendError
from freehold.kernels.kv import KV_TYPES, KvPages, PagedSequences
from freehold.kernels.packed_lora import LoraParts, PackedExpertLora, PackedLora, PackedLoras
from freehold.weights.packed import PANEL, PackedMatrix

_engine: "_native.Engine | None" = None
_threads: int | None = None  # as set; a forked child keeps it


def instruction_set() -> str:
    """The one in use: the best that this processor has, or FREEHOLD_CPU's."""
    _start()
    name: str = _native.instruction_set()
    return name


def threads() -> int:
    """How many threads the kernels use."""
    count: int = _start().threads
    return count


def set_threads(count: int) -> None:
    """Use so many threads from now on; the default is one for each physical core."""
    global _engine, _threads
    _threads = machine.check_threads(count)
    if _engine is not None and _engine.threads != count:
        _engine = _new_engine(count)


def scratch_bytes() -> int:
    """What the kernels hold for themselves just now."""
    held: int = _start().workspace_bytes
    return held


def read_bandwidth(data: Tensor) -> float:
    """Bytes a second, reading a contiguous tensor once with all threads."""
    rate: float = _start().read_bandwidth(data.data_ptr(), data.nbytes)
    return rate


def dot_rate(rounds: int = 1 << 22) -> float:
    """Int8 multiply-adds a second of all threads on registers alone: what no kernel can exceed."""
    rate: float = _start().dot_rate(rounds)
    return rate


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x_TD, weight_D, (T, D) = x_TD.contiguous(), weight_D.contiguous(), x_TD.shape
    out_TD = torch.empty_like(x_TD)
    _start().rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(), T, D, eps)
    return out_TD


def rms_norm_backward(of_out_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    of_out_TD, x_TD, weight_D, (T, D) = of_out_TD.contiguous(), x_TD.contiguous(), weight_D.contiguous(), x_TD.shape
    of_x = torch.empty_like(x_TD)
    _start().rms_norm_backward(x_TD.data_ptr(), weight_D.data_ptr(), of_out_TD.data_ptr(), of_x.data_ptr(), T, D, eps)
    return of_x


def linear(
    x_TD: Tensor,
    weight: PackedMatrix,
    bias_O: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    x_TD, T = _rows(x_TD), x_TD.shape[0]
    bias_O, norm_D, residual = _contiguous(bias_O), _contiguous(norm_D), _contiguous(residual)
    out_TO = torch.empty((T, weight.shape[0]), dtype=torch.float32)
    _start().linear(
        _matrix(weight),
        x_TD.data_ptr(),
        T,
        x_TD.stride(0),
        _address(norm_D),
        eps,
        _address(bias_O),
        _address(residual),
        out_TO.data_ptr(),
    )
    return out_TO


def linear_backward(gradient_TO: Tensor, weight: PackedMatrix) -> Tensor:
    gradient_TO, T = _rows(gradient_TO), gradient_TO.shape[0]
    out_TD = torch.empty((T, weight.shape[1]), dtype=torch.float32)
    _start().linear_backward(_matrix(weight), gradient_TO.data_ptr(), T, gradient_TO.stride(0), out_TD.data_ptr())
    return out_TD


def add_product(to_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """to += left · right. `to` is contiguous; the others lie as they like."""
    (M, K), N = left_MK.shape, right_KN.shape[1]
    _start().add_product(
        left_MK.data_ptr(), *left_MK.stride(), right_KN.data_ptr(), *right_KN.stride(), to_MN.data_ptr(), M, K, N
    )


def widen(weight: PackedMatrix, out_CR: Tensor) -> None:
    """The values that a matrix stands for, turned round: into (C, 16 · panels), bfloat16 or float32."""
    _start().widen(_matrix(weight), out_CR.dtype == torch.bfloat16, out_CR.data_ptr())


def add_lora(out_TO: Tensor, x_TD: Tensor, parts: LoraParts, norm_D: Tensor | None, eps: float) -> None:
    x_TD, T = _rows(x_TD), x_TD.shape[0]
    norm_D = _contiguous(norm_D)
    _start().add_lora(
        x_TD.data_ptr(),
        T,
        x_TD.stride(0),
        _address(norm_D),
        eps,
        parts.rows_T.data_ptr(),
        [_lora(lora) for lora in parts.loras],
        parts.rows,
        parts.columns,
        out_TO.data_ptr(),
        out_TO.shape[1],
    )


def rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    x_TNH, (T, N, H) = _heads(x_TNH), x_TNH.shape
    out_TNH = torch.empty((T, N, H), dtype=torch.float32)
    cos_TH, sin_TH = cos_TH.contiguous(), sin_TH.contiguous()
    _start().rope(x_TNH.data_ptr(), x_TNH.stride(0), cos_TH.data_ptr(), sin_TH.data_ptr(), out_TNH.data_ptr(), T, N, H)
    return out_TNH


def kv_write(
    kv: KvPages,
    sequences: PagedSequences,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_TH: Tensor | None,
    sin_TH: Tensor | None,
) -> None:
    k_TKH, v_TKH = _heads(k_TKH), _heads(v_TKH)
    cos_TH, sin_TH = _contiguous(cos_TH), _contiguous(sin_TH)
    _start().kv_write(
        _pages(kv),
        _sequences(sequences),
        k_TKH.data_ptr(),
        k_TKH.stride(0),
        v_TKH.data_ptr(),
        v_TKH.stride(0),
        _address(cos_TH),
        _address(sin_TH),
    )


def attention(
    q_TNH: Tensor,
    kv: KvPages,
    sequences: PagedSequences,
    sinks_N: Tensor,
    cos_TH: Tensor | None,
    sin_TH: Tensor | None,
    *,
    scale: float,
    window: int | None,
    logsum_TN: Tensor | None = None,
) -> Tensor:
    """`logsum_TN`, contiguous, is given the logarithm of each softmax's sum."""
    q_TNH, (T, N, H) = _heads(q_TNH), q_TNH.shape
    sinks_N, cos_TH, sin_TH = sinks_N.contiguous(), _contiguous(cos_TH), _contiguous(sin_TH)
    out_TNH = torch.empty((T, N, H), dtype=torch.float32)
    _start().attention(
        _pages(kv),
        _sequences(sequences),
        q_TNH.data_ptr(),
        N,
        q_TNH.stride(0),
        sinks_N.data_ptr(),
        scale,
        window or 0,
        out_TNH.data_ptr(),
        _address(cos_TH),
        _address(sin_TH),
        _address(logsum_TN),
    )
    return out_TNH


def self_attention_backward(
    gradient_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    starts_B1: Tensor,
    scale: float,
    window: int | None,
    out_TNH: Tensor,
    logsum_TN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, and the sums of out · gradient, (T, N)."""
    gradient_TNH, q_TNH, k_TKH, v_TKH = (x.contiguous() for x in (gradient_TNH, q_TNH, k_TKH, v_TKH))
    (_, N, H), K = q_TNH.shape, k_TKH.shape[1]
    of_q, of_k, of_v, common_TN = (torch.empty_like(x) for x in (q_TNH, k_TKH, v_TKH, logsum_TN))
    _start().self_attention_backward(
        q_TNH.data_ptr(),
        k_TKH.data_ptr(),
        v_TKH.data_ptr(),
        N,
        K,
        H,
        len(starts_B1) - 1,
        starts_B1.data_ptr(),
        scale,
        window or 0,
        out_TNH.data_ptr(),
        logsum_TN.data_ptr(),
        gradient_TNH.data_ptr(),
        of_q.data_ptr(),
        of_k.data_ptr(),
        of_v.data_ptr(),
        common_TN.data_ptr(),
    )
    return of_q, of_k, of_v, common_TN


def route(logits_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    logits_TE, (T, E) = logits_TE.contiguous(), logits_TE.shape
    weights_TA = torch.empty((T, num_active), dtype=torch.float32)
    experts_TA = torch.empty((T, num_active), dtype=torch.int64)
    _start().route(logits_TE.data_ptr(), T, E, num_active, weights_TA.data_ptr(), experts_TA.data_ptr())
    return weights_TA, experts_TA


def moe(
    x_TD: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    gate_up: PackedMatrix,
    gate_up_bias: Tensor,
    down: PackedMatrix,
    down_bias: Tensor,
    norm_D: Tensor | None,
    eps: float,
    residual: Tensor | None,
    *,
    alpha: float,
    limit: float,
    loras: PackedLoras | None = None,
) -> Tensor:
    x_TD, weights_TA, experts_TA = x_TD.contiguous(), weights_TA.contiguous(), experts_TA.contiguous()
    gate_up_bias, down_bias = gate_up_bias.contiguous(), down_bias.contiguous()
    norm_D, residual = _contiguous(norm_D), _contiguous(residual)
    out_TD = torch.empty_like(x_TD)
    engine = _start()
    run = engine.moe if loras is None else engine.moe_lora
    of_adapters = () if loras is None else ([_expert_lora(lora) for lora in loras.loras], loras.rows_T.data_ptr())
    run(
        _matrix(gate_up),
        _matrix(down),
        x_TD.data_ptr(),
        x_TD.shape[0],
        weights_TA.shape[1],
        weights_TA.data_ptr(),
        experts_TA.data_ptr(),
        gate_up.shape[0],
        gate_up_bias.data_ptr(),
        down_bias.data_ptr(),
        _address(residual),
        alpha,
        limit,
        out_TD.data_ptr(),
        _address(norm_D),
        eps,
        *of_adapters,
    )
    return out_TD


class MoeKept(NamedTuple):
    """What the gradient of `moe` reads, of visits sorted by expert and then by token: what the activation was made
    from, (V, 16 · panels), panels of gates and ups in turn; and the rows of the adapter's first factors, scaled, (V, R
    and what pads it to whole panels), None where it leaves a matrix alone."""

    sums: Tensor
    gate_up_rows: Tensor | None
    down_rows: Tensor | None


class MoeSeen(NamedTuple):
    """Factors by which dropout multiplies what an adapter sees, (V, D) and (V, F)."""

    x: Tensor
    hidden: Tensor


def moe_kept(
    x_TD: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    gate_up: PackedMatrix,
    gate_up_bias: Tensor,
    down: PackedMatrix,
    down_bias: Tensor,
    norm_D: Tensor | None,
    eps: float,
    residual: Tensor | None,
    *,
    alpha: float,
    limit: float,
    lora: PackedExpertLora | None,
    seen: MoeSeen | None,
    dtype: torch.dtype,
) -> tuple[Tensor, MoeKept]:
    """`moe` with one adapter for all tokens or none, and what its gradient reads, the sums in float32 or bfloat16."""
    x_TD, weights_TA, experts_TA = x_TD.contiguous(), weights_TA.contiguous(), experts_TA.contiguous()
    gate_up_bias, down_bias = gate_up_bias.contiguous(), down_bias.contiguous()
    norm_D, residual = _contiguous(norm_D), _contiguous(residual)
    out_TD, (T, A) = torch.empty_like(x_TD), experts_TA.shape
    rows_T = torch.zeros(T, dtype=torch.int64)
    pairs = (None, None) if lora is None else (lora.gate_up, lora.down)
    gate_up_rows, down_rows = (
        None if pair is None else torch.empty((T * A, pair.a.data.shape[1] * PANEL)) for pair in pairs
    )
    kept = MoeKept(torch.empty((T * A, gate_up.data.shape[1] * PANEL), dtype=dtype), gate_up_rows, down_rows)
    _start().moe_kept(
        _matrix(gate_up),
        _matrix(down),
        x_TD.data_ptr(),
        T,
        A,
        weights_TA.data_ptr(),
        experts_TA.data_ptr(),
        gate_up.shape[0],
        gate_up_bias.data_ptr(),
        down_bias.data_ptr(),
        _address(residual),
        alpha,
        limit,
        out_TD.data_ptr(),
        _address(norm_D),
        eps,
        [] if lora is None else [_expert_lora(lora)],
        rows_T.data_ptr(),
        0 if seen is None else seen.x.data_ptr(),
        0 if seen is None else seen.hidden.data_ptr(),
        kept.sums.data_ptr(),
        dtype == torch.bfloat16,
        _address(gate_up_rows),
        _address(down_rows),
    )
    return out_TD, kept


def swiglu_backward(
    of_hidden_SF: Tensor, sums: Tensor, weights_S: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `sums` as `moe_kept` leaves them, times the routing weights; the hidden values again; and the
    routing weights' own gradient but for the bias. All but the weights are of one type, float32 or bfloat16."""
    of_hidden_SF, sums, weights_S = of_hidden_SF.contiguous(), sums.contiguous(), weights_S.contiguous()
    S, F = of_hidden_SF.shape
    of_sums, hidden_SF, of_weights_S = torch.empty_like(sums), torch.empty_like(of_hidden_SF), torch.empty(S)
    _start().swiglu_backward(
        S,
        F,
        of_hidden_SF.data_ptr(),
        sums.data_ptr(),
        weights_S.data_ptr(),
        alpha,
        limit,
        of_sums.data_ptr(),
        hidden_SF.data_ptr(),
        of_weights_S.data_ptr(),
        sums.dtype == torch.bfloat16,
    )
    return of_sums, hidden_SF, of_weights_S


def largest(logits_V: Tensor) -> float:
    """NaN if there is one. By numpy: torch would wake threads that get in the way of ours, a thousand times as slow."""
    return float(logits_V.numpy().max())


def sample(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    logits_V = logits_V.contiguous()
    address, V = logits_V.data_ptr(), logits_V.shape[0]
    token: int
    if temperature == 0:
        token = _start().argmax(address, V)
    else:
        least = torch.finfo(torch.float32).tiny
        token = _start().sample(address, V, max(temperature, least), min(top_k, V), top_p, min_p, uniform)
    return token


def _start() -> "_native.Engine":
    global _engine
    if _engine is None:
        _choose_instruction_set()
        _engine = _new_engine(_threads or machine.physical_cores())
    return _engine


def _new_engine(threads: int) -> "_native.Engine":
    try:
        return _native.Engine(threads)
    except RuntimeError as error:
        raise BackendError(f"{threads} threads cannot be started: {error}; use fewer (--threads)") from None


def _choose_instruction_set() -> None:
    wanted = os.environ.get("FREEHOLD_CPU")
    if wanted and not _native.use_instruction_set(wanted):
        usable = ", ".join(_native.instruction_sets())
        raise BackendError(f"FREEHOLD_CPU is {wanted!r}, which cannot run on this processor; choose one of {usable}")


def _before_fork() -> None:
    """Threads do not survive a fork, and an engine would wait for its own: parent and child make their own anew."""
    global _engine
    _engine = None


os.register_at_fork(before=_before_fork)


def _matrix(packed: PackedMatrix) -> object:
    if packed.native_handle is None:
        form, data, scales, R, C = packed.address()
        packed.native_handle = _native.Matrix(form, data, scales, R, C, packed.paired)
    return packed.native_handle


def _lora(lora: PackedLora) -> object:
    if lora.native_handle is None:
        lora.native_handle = _native.Lora(_matrix(lora.a), _matrix(lora.b), lora.scaling)
    return lora.native_handle


def _expert_lora(lora: PackedExpertLora) -> object:
    if lora.native_handle is None:
        gate_up, down = (None if pair is None else _lora(pair) for pair in (lora.gate_up, lora.down))
        lora.native_handle = _native.ExpertLora(gate_up, down)
    return lora.native_handle


def _pages(kv: KvPages) -> object:
    if kv.native_handle is None:
        P, K, _, H = kv.values.shape
        key_scales = 0 if kv.key_scales is None else kv.key_scales.data_ptr()
        value_scales = 0 if kv.value_scales is None else kv.value_scales.data_ptr()
        kv.native_handle = _native.KvPages(
            KV_TYPES.index(kv.type), kv.keys.data_ptr(), kv.values.data_ptr(), key_scales, value_scales, P, K, H
        )
    return kv.native_handle


def _sequences(sequences: PagedSequences) -> object:
    if sequences.native_handle is None:
        starts_B1, lengths_B, table_BP = sequences.starts_B1, sequences.lengths_B, sequences.table_BP
        sequences.native_handle = _native.Sequences(
            len(lengths_B), starts_B1.data_ptr(), lengths_B.data_ptr(), table_BP.data_ptr(), table_BP.shape[1]
        )
    return sequences.native_handle


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    """Of a tensor that the caller holds on to: the address does not."""
    return 0 if tensor is None else tensor.data_ptr()


def _rows(x_TD: Tensor) -> Tensor:
    """Rows may lie apart, but each must be in one piece."""
    return x_TD if x_TD.stride(1) == 1 or x_TD.shape[1] == 1 else x_TD.contiguous()


def _heads(x_TNH: Tensor) -> Tensor:
    _, N, H = x_TNH.shape
    strides = x_TNH.stride()
    return x_TNH if strides[2] == 1 and (strides[1] == H or N == 1) else x_TNH.contiguous()
