"""Every op in plain torch: the specification, the oracle for the fast kernels, and what runs where none exists.

Works on any device, in float32 and bfloat16, and is differentiable. Arguments are taken as valid, since
freehold.kernels.ops has checked them. Shape legend: T tokens, S keys, D hidden, O output, N query heads, K kv heads,
H head dim, E experts, A active experts, F expert width, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.kernels.kv import KV_BLOCK, PAGE, KvPages, PagedSequences, Rows, num_pages
from freehold.kernels.lora import ExpertLora, Lora
from freehold.kernels.packed_lora import LoraParts, PackedLora, PackedLoras
from freehold.weights import mxfp4, packed
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.packed import PANEL, PackedMatrix

_QUERIES_AT_ONCE = 256  # bounds the score matrix of a long prefill
_PANELS_AT_ONCE = 8  # bounds the rows of packed weights that exist in float32


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * weight_D).to(x_TD.dtype)


def rms_norm_backward(of_out_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The gradient of x, of x's type."""
    x, of_unit = x_TD.float(), of_out_TD.float() * weight_D
    scale_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit_TD = x * scale_T1
    of_x = scale_T1 * (of_unit - unit_TD * (of_unit * unit_TD).mean(-1, keepdim=True))
    return of_x.to(x_TD.dtype)


def linear(
    x_TD: Tensor,
    weight_OD: Tensor | PackedMatrix,
    bias_O: Tensor | None,
    norm_D: Tensor | None,
    eps: float,
    residual_TO: Tensor | None,
) -> Tensor:
    if norm_D is not None:
        x_TD = rms_norm(x_TD, norm_D, eps)
    out_TO: Tensor = F.linear(x_TD, _plain(weight_OD), bias_O)
    return out_TO if residual_TO is None else residual_TO + out_TO


def linear_backward(gradient_TO: Tensor, weight: PackedMatrix) -> Tensor:
    out_TD = gradient_TO.new_zeros((gradient_TO.shape[0], weight.shape[1]))
    for columns, rows in row_blocks(weight):
        out_TD += gradient_TO[:, columns] @ rows
    return out_TD


def row_blocks(weight: PackedMatrix) -> Iterator[tuple[slice, Tensor]]:
    """A matrix in float32, a few rows at a time, each with its place: paired rows in the order in which they lie."""
    for panel in range(0, len(weight.data), _PANELS_AT_ONCE):
        rows = _plain(weight.panels(panel, _PANELS_AT_ONCE))
        yield slice(panel * PANEL, panel * PANEL + len(rows)), rows


def add_product(to_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    to_MN.addmm_(left_MK, right_KN)


def add_lora(out_TO: Tensor, x_TD: Tensor, parts: LoraParts, norm_D: Tensor | None, eps: float) -> None:
    if norm_D is not None:
        x_TD = rms_norm(x_TD, norm_D, eps)
    for lora, row, column in zip(parts.loras, parts.rows, parts.columns, strict=True):
        token = torch.where(parts.rows_T == row)[0]
        added = F.linear(F.linear(x_TD[token], _plain(lora.a)), _plain(lora.b)) * lora.scaling
        out_TO[token, column : column + added.shape[1]] += added


def unpacked_loras(loras: PackedLoras) -> list[ExpertLora]:
    """The same adapters with plain factors."""
    return [
        ExpertLora(_unpacked(lora.gate_up), _unpacked(lora.down), loras.rows_T == row)
        for row, lora in enumerate(loras.loras)
        if lora.gate_up is not None or lora.down is not None
    ]


def _unpacked(lora: PackedLora | None) -> Lora | None:
    return None if lora is None else Lora(_plain(lora.a), _plain(lora.b), lora.scaling)


def rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    first, second = x_TNH.chunk(2, dim=-1)
    cos, sin = cos_TH.unsqueeze(1).to(x_TNH.dtype), sin_TH.unsqueeze(1).to(x_TNH.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def kv_write(
    kv: KvPages,
    sequences: PagedSequences,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_TH: Tensor | None,
    sin_TH: Tensor | None,
) -> None:
    k_TKH = _rotated(k_TKH, cos_TH, sin_TH)
    page, row = sequences.places(kv.values.device)
    _check_pages("kv_write", kv, page)
    for (target, scales), source_TKH in zip(kv.by_position(), (k_TKH, v_TKH), strict=True):
        if scales is None:
            target[page, :, row] = source_TKH.to(target.dtype).unflatten(-1, target.shape[3:])
            continue
        blocks = source_TKH.float().unflatten(-1, (-1, KV_BLOCK))
        steps = (blocks.abs().amax(dim=-1) / 127).half()
        divisors = steps.float().masked_fill(steps == 0, torch.inf).unsqueeze(-1)
        numbers = (blocks / divisors).round().clamp(-127, 127).to(torch.int8)
        target[page, :, row] = numbers.flatten(-2).unflatten(-1, target.shape[3:])
        scales[page, :, row] = steps


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
) -> Tensor:
    q_TNH = _rotated(q_TNH, cos_TH, sin_TH)
    N, K = q_TNH.shape[1], kv.values.shape[1]
    all_keys, all_values = kv.by_position()
    out = []
    for b, length in enumerate(sequences.lengths):
        first_token, stop_token = sequences.starts[b : b + 2]
        for start in range(first_token, stop_token, _QUERIES_AT_ONCE):
            stop = min(start + _QUERIES_AT_ONCE, stop_token)
            first_row, last_key = length - stop_token + start, length - stop_token + stop
            first_key = 0 if window is None else max(0, first_row - window + 1)
            pages = sequences.table_BP[b, first_key // PAGE : num_pages(last_key)].to(kv.values.device).long()
            _check_pages("attention", kv, pages)
            visible = slice(first_key % PAGE, first_key % PAGE + last_key - first_key)
            keys = _kept(all_keys, pages, q_TNH.dtype)[:, visible]  # (K, S', H)
            values = _kept(all_values, pages, q_TNH.dtype)[:, visible]
            queries = q_TNH[start:stop].unflatten(1, (K, N // K)).permute(1, 2, 0, 3)  # (K, N/K, T', H)
            scores = torch.matmul(queries, keys.unsqueeze(1).transpose(-1, -2)).float() * scale
            key_at = torch.arange(first_key, last_key, device=q_TNH.device)
            query_at = torch.arange(first_row, last_key, device=q_TNH.device).unsqueeze(-1)
            hidden = key_at > query_at
            if window is not None:
                hidden |= key_at <= query_at - window
            scores = scores.masked_fill(hidden, -torch.inf)
            sinks = sinks_N.float().view(K, N // K, 1, 1).expand(-1, -1, stop - start, 1)
            weights = torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]
            mixed = torch.matmul(weights.to(values.dtype), values.unsqueeze(1))
            out.append(mixed.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(out) if out else torch.empty_like(q_TNH)


def route(logits_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    top, experts_TA = torch.topk(logits_TE, num_active, dim=-1)
    return torch.softmax(top, dim=-1), experts_TA


def moe(
    x_TD: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    gate_up: Tensor | Mxfp4Tensor | PackedMatrix,
    gate_up_bias: Tensor,
    down: Tensor | Mxfp4Tensor | PackedMatrix,
    down_bias: Tensor,
    norm_D: Tensor | None,
    eps: float,
    residual_TD: Tensor | None,
    *,
    alpha: float,
    limit: float,
) -> Tensor:
    if isinstance(gate_up, PackedMatrix) and isinstance(down, PackedMatrix):
        gate_up, down = packed.unpack(gate_up), packed.unpack(down)
    if norm_D is not None:
        x_TD = rms_norm(x_TD, norm_D, eps)
    out = torch.zeros_like(x_TD) if residual_TD is None else residual_TD.clone()
    for expert in torch.unique(experts_TA).tolist():
        token, slot = torch.where(experts_TA == expert)
        hidden = F.linear(x_TD[token], _matrix(gate_up, expert, x_TD.dtype), gate_up_bias[expert])
        gate = hidden[:, 0::2].clamp(max=limit)
        up = hidden[:, 1::2].clamp(min=-limit, max=limit)
        hidden = gate * torch.sigmoid(alpha * gate) * (up + 1)
        mixed = F.linear(hidden, _matrix(down, expert, x_TD.dtype), down_bias[expert])
        out.index_add_(0, token, mixed * weights_TA[token, slot].unsqueeze(-1))
    return out


def largest(logits_V: Tensor) -> float:
    return float(logits_V.max())


def sample(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    scores, order = torch.sort(logits_V.float(), descending=True, stable=True)
    # Relative to the largest, and never divided by a float32 zero: no temperature above 0 is too small.
    scores = (scores - scores[0]) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k:
        scores[top_k:] = -torch.inf
    probabilities = torch.softmax(scores, dim=-1)
    # A token stays if those in front of it have not reached top_p yet: the first always does.
    hidden = torch.zeros_like(order, dtype=torch.bool)
    if top_p < 1:  # at 1, rounding in the sum could still hide a tail
        hidden |= probabilities.cumsum(-1) - probabilities >= top_p
    hidden |= probabilities < min_p * probabilities[0]
    hidden[0] = False
    # Drawn in order of ids, which asks no faster kernel to sort.
    kept_V = torch.zeros_like(logits_V, dtype=torch.float64)
    kept_V[order] = probabilities.masked_fill(hidden, 0.0).double()
    passed_V = kept_V.cumsum(-1)
    token = int(torch.searchsorted(passed_V, uniform * passed_V[-1], right=True))
    return min(token, int(kept_V.nonzero()[-1]))


def _matrix(stack: Tensor | Mxfp4Tensor | PackedMatrix, expert: int, dtype: torch.dtype) -> Tensor:
    assert not isinstance(stack, PackedMatrix)
    matrix = stack[expert]
    return mxfp4.unpack(matrix, dtype) if isinstance(matrix, Mxfp4Tensor) else matrix.to(dtype)


def _plain(weight: Tensor | PackedMatrix) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    matrix = packed.unpack(weight)
    return mxfp4.unpack(matrix) if isinstance(matrix, Mxfp4Tensor) else matrix.float()


def _rotated(x_TNH: Tensor, cos_TH: Tensor | None, sin_TH: Tensor | None) -> Tensor:
    return x_TNH if cos_TH is None or sin_TH is None else rope(x_TNH, cos_TH, sin_TH)


def _kept(stored: Rows, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole pages in a row, (K, positions, H)."""
    rows = stored.numbers[pages].transpose(0, 1).flatten(1, 2).flatten(2)
    if stored.scales is None:
        return rows.to(dtype)
    steps = stored.scales[pages].transpose(0, 1).flatten(1, 2)
    blocks = torch.unflatten(rows.float(), -1, (-1, KV_BLOCK)) * steps.float().unsqueeze(-1)
    return blocks.flatten(-2).to(dtype)


def _check_pages(op: str, kv: KvPages, pages: Tensor) -> None:
    if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < len(kv):
        raise IndexError(f"[{op}] a page's number is not below the number of pages")
