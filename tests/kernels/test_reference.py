"""The reference ops against independent, slower ways to say the same thing, and their gradients.

Called through `ops`, with the native kernels turned off; tests/kernels/test_native.py compares those with these.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.kernels import backends, ops, reference
from freehold.kernels.kv import KvType, PagedSequences, new_pages
from freehold.kernels.ops import Norm, Rotation, Routing
from freehold.weights.mxfp4 import pack, unpack
from tests.checkpoints import CPU
from tests.paged import Store, store

pytestmark = pytest.mark.usefixtures("reference_ops")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept(k_SKH: Tensor, v_SKH: Tensor, type: KvType = "f32") -> Store:
    """These rows, and more that nobody may look at."""
    S, K, H = k_SKH.shape
    kept = store(type, K, S, H)
    ops.kv_write(kept.pages, kept.last(S, S), k_SKH, v_SKH)
    return kept


def attend(q: Tensor, kept: Store, length: int, sinks: Tensor, **options: Any) -> Tensor:
    return ops.attention(q, kept.pages, kept.last(len(q), length), sinks, **options)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    return attend(q, kept(k, v), len(k), sinks, scale=scale, window=window)


# --- attention --------------------------------------------------------------------------------------------------


def dense_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, window: int | None) -> Tensor:
    """One query, one head, one key at a time, in float64."""
    T, N, H = q.shape
    S, K, _ = k.shape
    out = torch.zeros(T, N, H, dtype=torch.float64)
    for t in range(T):
        position = S - T + t
        visible = [s for s in range(S) if s <= position and (window is None or position - s < window)]
        for n in range(N):
            head = n // (N // K)
            scores = torch.tensor([float(q[t, n].double() @ k[s, head].double()) * scale for s in visible])
            exponentials = scores.double().exp()
            weights = exponentials / (exponentials.sum() + sinks[n].double().exp())
            for weight, s in zip(weights, visible, strict=True):
                out[t, n] += weight * v[s, head].double()
    return out


@pytest.mark.parametrize(
    ("T", "S", "N", "K", "window"),
    [
        (1, 1, 1, 1, None),
        (5, 5, 4, 2, None),
        (3, 9, 6, 2, None),  # T < S: later queries of a longer sequence
        (1, 7, 4, 1, None),
        (7, 7, 2, 2, 1),  # a query sees itself alone
        (7, 7, 4, 2, 3),
        (3, 9, 4, 2, 4),
        (4, 6, 4, 4, 6),  # window edge at the first key
        (4, 6, 4, 4, 100),
        (4, 6, 3, 1, 3),  # keys in front of the window are absent: S = T + window − 1
    ],
)
def test_attention(T: int, S: int, N: int, K: int, window: int | None) -> None:
    q, k, v, sinks = draw(T, N, 8), draw(S, K, 8, seed=1), draw(S, K, 8, seed=2), draw(N, seed=3)
    ours = attention(q, k, v, sinks, scale=0.3, window=window)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), dense_attention(q, k, v, sinks, 0.3, window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 100, 300])
def test_attention_in_blocks_of_queries(window: int | None) -> None:
    # Longer than one block of queries, against one masked softmax over everything.
    T, S, N, K, H = 600, 650, 4, 2, 8
    q, k, v, sinks = draw(T, N, H), draw(S, K, H, seed=1), draw(S, K, H, seed=2), draw(N, seed=3)
    distance = torch.arange(S - T, S).unsqueeze(1) - torch.arange(S)
    visible = (distance >= 0) & (distance < (window or S))
    scores = torch.einsum("tnh,snh->nts", q, k.repeat_interleave(N // K, 1)) * 0.3
    scores = torch.cat((scores.masked_fill(~visible, -torch.inf), sinks.view(N, 1, 1).expand(N, T, 1)), -1)
    expected = torch.einsum("nts,snh->tnh", scores.softmax(-1)[..., :-1], v.repeat_interleave(N // K, 1))
    ours = attention(q, k, v, sinks, scale=0.3, window=window)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_a_large_sink_drains_and_a_small_one_does_nothing() -> None:
    q, k, v = draw(3, 2, 8), draw(3, 2, 8, seed=1), draw(3, 2, 8, seed=2)
    drained = attention(q, k, v, torch.full((2,), 1e4), scale=1.0)
    assert drained.abs().max() == 0
    dry = attention(q, k, v, torch.full((2,), -1e4), scale=1.0)
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=1.0
    )
    torch.testing.assert_close(dry, expected.transpose(0, 1), atol=1e-5, rtol=0)


def test_attention_of_large_scores_does_not_overflow() -> None:
    q, k, v = draw(4, 2, 8) * 100, draw(4, 2, 8, seed=1) * 100, draw(4, 2, 8, seed=2)
    assert attention(q, k, v, torch.zeros(2), scale=1.0).isfinite().all()


def test_heads_turned_along_the_way() -> None:
    q, k, v, sinks = draw(3, 4, 8), draw(9, 2, 8, seed=1), draw(9, 2, 8, seed=2), draw(4, seed=3)
    cos, sin = draw(9, 4, seed=4), draw(9, 4, seed=5)
    expected = attention(ops.rope(q, cos[6:], sin[6:]), ops.rope(k, cos, sin), v, sinks, scale=0.3)
    turned = store("f32", 2, 9, 8)
    ops.kv_write(turned.pages, turned.last(9, 9), k, v, rotation=Rotation(cos, sin))
    ours = attend(q, turned, 9, sinks, scale=0.3, rotation=Rotation(cos[6:], sin[6:]))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("type", ["bf16", "q8"])
def test_attention_over_smaller_types(type: KvType) -> None:
    q, k, v, sinks = draw(3, 4, 32), draw(9, 2, 32, seed=1), draw(9, 2, 32, seed=2), draw(4, seed=3)
    ours = attend(q, kept(k, v, type), 9, sinks, scale=0.3)
    torch.testing.assert_close(ours, attention(q, k, v, sinks, scale=0.3), atol=0.04, rtol=0)


def test_what_pages_hold() -> None:
    k, v = draw(5, 2, 64) * 10, draw(5, 2, 64, seed=1)
    small = store("q8", 2, 70, 64)
    ops.kv_write(small.pages, small.last(5, 67), k, v)  # the first two end a page
    keys, _, key_scales, _ = small.rows()
    for head in range(2):
        for position in range(5):
            for block in range(2):
                step = float(key_scales[head, 62 + position, block])
                numbers = k[position, head, 32 * block : 32 * block + 32]
                assert step == pytest.approx(float(numbers.abs().max()) / 127, rel=2**-11)
                held = keys[head, 62 + position, 32 * block : 32 * block + 32].float() * step
                assert (held - numbers).abs().max() <= 0.57 * step  # the step is rounded as well
    rounded = store("bf16", 2, 70, 64)
    ops.kv_write(rounded.pages, rounded.last(5, 67), k, v)
    assert torch.equal(rounded.rows()[1][:, 62:67], v.bfloat16().transpose(0, 1))


def test_sequences_of_a_batch_know_nothing_of_each_other() -> None:
    counts, lengths, table = (
        (3, 0, 1, 2),
        (70, 5, 1, 130),
        torch.tensor([[4, 0, -1], [6, -1, -1], [1, -1, -1], [5, 2, 3]]),
    )
    pages = new_pages("f32", 7, 2, 8, CPU)
    together = PagedSequences(counts, lengths, table.int())
    k, v = ([draw(n, 2, 8, seed=seed + n) for n in lengths] for seed in (1, 2))
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        before = PagedSequences([length - count], [length - count], table[b : b + 1].int())
        ops.kv_write(pages, before, k[b][: length - count], v[b][: length - count])
    fresh = [torch.cat([x[b][lengths[b] - n :] for b, n in enumerate(counts)]) for x in (k, v)]
    ops.kv_write(pages, together, *fresh)
    q, sinks = draw(6, 4, 8), draw(4, seed=3)
    for window in (None, 1, 66):
        ours = ops.attention(q, pages, together, sinks, scale=0.3, window=window)
        alone = [
            attention(q[at : at + n], k[b], v[b], sinks, scale=0.3, window=window)
            for b, at, n in ((0, 0, 3), (2, 3, 1), (3, 4, 2))
        ]
        torch.testing.assert_close(ours, torch.cat(alone))


@pytest.mark.parametrize("name", [-1, 3])
def test_pages_that_do_not_exist(name: int) -> None:
    pages, table = new_pages("f32", 3, 1, 8, CPU), torch.tensor([[0, name]], dtype=torch.int32)
    ops.kv_write(pages, PagedSequences([64], [64], table), draw(64, 1, 8), draw(64, 1, 8))
    with pytest.raises(IndexError, match="number of pages"):
        ops.kv_write(pages, PagedSequences([1], [65], table), draw(1, 1, 8), draw(1, 1, 8))
    with pytest.raises(IndexError, match="number of pages"):
        ops.attention(draw(1, 1, 8), pages, PagedSequences([1], [65], table), draw(1), scale=1.0)


# --- the small ops ----------------------------------------------------------------------------------------------


def test_rope_rotates_half_split_pairs() -> None:
    x = draw(5, 3, 8)
    angles = draw(5, 4, seed=1)
    ours = ops.rope(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 1, 4), angles.unsqueeze(1))
    torch.testing.assert_close(ours, torch.cat((pairs.real, pairs.imag), -1))


def test_linear() -> None:
    x, weight, bias = draw(3, 4), draw(5, 4, seed=1), draw(5, seed=2)
    expected = torch.einsum("td,od->to", x, weight)
    torch.testing.assert_close(ops.linear(x, weight), expected)
    torch.testing.assert_close(ops.linear(x, weight, bias), expected + bias)
    residual, norm = draw(3, 5, seed=3), Norm(draw(4, seed=4), 1e-5)
    torch.testing.assert_close(ops.linear(x, weight, residual_TO=residual), expected + residual)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight_D
    torch.testing.assert_close(ops.linear(x, weight, bias, norm=norm), torch.einsum("td,od->to", normed, weight) + bias)


def test_route_is_a_softmax_over_the_chosen_alone() -> None:
    logits = draw(6, 9)
    routing = ops.route(logits, 3)
    for row, weights, experts in zip(logits, routing.weights_TA, routing.experts_TA, strict=True):
        assert set(experts.tolist()) == set(row.argsort(descending=True)[:3].tolist())
        chosen = row[experts].exp()
        torch.testing.assert_close(weights, chosen / chosen.sum())


def moe_arguments(dtype: torch.dtype = torch.float32, T: int = 5) -> tuple[Tensor, Routing, list[Tensor]]:
    E, D, F_ = 4, 64, 32
    x = draw(T, D, dtype=dtype)
    routing = ops.route(draw(T, E, seed=1, dtype=dtype), 2)
    gate_up, gate_up_bias = draw(E, 2 * F_, D, seed=2, dtype=dtype) / 2, draw(E, 2 * F_, seed=3, dtype=dtype)
    down, down_bias = draw(E, D, F_, seed=4, dtype=dtype) / 6, draw(E, D, seed=5, dtype=dtype)
    return x, routing, [gate_up, gate_up_bias, down, down_bias]


def slow_moe(x: Tensor, routing: Routing, weights: list[Tensor], alpha: float, limit: float) -> Tensor:
    gate_up, gate_up_bias, down, down_bias = weights
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(routing.weights_TA[t], routing.experts_TA[t], strict=True):
            hidden = gate_up[e] @ x[t] + gate_up_bias[e]
            gate, up = hidden[0::2], hidden[1::2]
            gate, up = torch.minimum(gate, torch.tensor(limit)), torch.clip(up, -limit, limit)
            out[t] += weight * (down[e] @ (gate / (1 + torch.exp(-alpha * gate)) * (up + 1)) + down_bias[e])
    return out


@pytest.mark.parametrize("limit", [1.0, 7.0])  # activations reach ±15 here, so that both clamps bite
def test_moe(limit: float) -> None:
    x, routing, weights = moe_arguments()
    expected = slow_moe(x, routing, weights, 1.702, limit)
    torch.testing.assert_close(ops.moe(x, routing, *weights, alpha=1.702, limit=limit), expected, atol=1e-4, rtol=1e-5)


def test_moe_can_normalise_its_input() -> None:
    x, routing, weights = moe_arguments()
    norm = Norm(1 + draw(64, seed=9) / 10, 1e-5)
    ours = ops.moe(x, routing, *weights, alpha=1.702, limit=7.0, norm=norm)
    normed = ops.rms_norm(x, norm.weight_D, eps=norm.eps)
    torch.testing.assert_close(ours, ops.moe(normed, routing, *weights, alpha=1.702, limit=7.0))


def test_moe_adds_a_residual_and_leaves_it_alone() -> None:
    x, routing, weights = moe_arguments()
    residual = draw(*x.shape, seed=9)
    before = residual.clone()
    ours = ops.moe(x, routing, *weights, alpha=1.702, limit=7.0, residual_TD=residual)
    torch.testing.assert_close(ours, ops.moe(x, routing, *weights, alpha=1.702, limit=7.0) + before)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_with_packed_experts_is_moe_with_their_values(dtype: torch.dtype) -> None:
    x, routing, (gate_up, gate_up_bias, down, down_bias) = moe_arguments()
    x, gate_up_bias, down_bias = x.to(dtype), gate_up_bias.to(dtype), down_bias.to(dtype)
    routing = Routing(routing.weights_TA.to(dtype), routing.experts_TA)
    packed = (pack(gate_up), gate_up_bias, pack(down), down_bias)
    values = (unpack(packed[0], dtype), gate_up_bias, unpack(packed[2], dtype), down_bias)
    ours = ops.moe(x, routing, *packed, alpha=1.702, limit=7.0)
    assert torch.equal(ours, ops.moe(x, routing, *values, alpha=1.702, limit=7.0))


def test_experts_that_nobody_visits_are_not_read() -> None:
    x, _, weights = moe_arguments()
    routing = Routing(torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int64))
    expected = ops.moe(x, routing, *weights, alpha=1.702, limit=7.0)
    for tensor in weights:
        tensor[1:] = torch.nan
    assert torch.equal(ops.moe(x, routing, *weights, alpha=1.702, limit=7.0), expected)


# --- gradients --------------------------------------------------------------------------------------------------


def test_gradients_of_small_ops() -> None:
    x, weight, bias = (draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(ops.linear, (x, weight, bias))
    residual = draw(3, 5, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b, r: ops.linear(x, w, b, residual_TO=r), (x, weight, bias, residual))
    heads = draw(3, 2, 4, dtype=torch.float64).requires_grad_()
    angles = draw(3, 2, seed=1)
    assert torch.autograd.gradcheck(lambda h: ops.rope(h, angles.cos(), angles.sin()), (heads,))
    logits = draw(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.route(t, 2).weights_TA, (logits,))


def numeric_gradient(loss: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> float:
    step = 1e-2
    return float((loss(at + step * direction) - loss(at - step * direction)) / (2 * step))


@pytest.mark.parametrize("which", range(4))
def test_gradients_of_attention(which: int) -> None:
    # It computes its softmax in float32, so the check is a directional derivative with a float32 step.
    arguments = [draw(6, 4, 8), draw(8, 2, 8, seed=1), draw(8, 2, 8, seed=2), draw(4, seed=3)]
    out_weights = draw(6, 4, 8, seed=4)

    def loss(value: Tensor) -> Tensor:
        given = [*arguments[:which], value, *arguments[which + 1 :]]
        return (attention(*given, scale=0.3, window=5) * out_weights).sum()

    value = arguments[which].clone().requires_grad_()
    torch.autograd.backward(loss(value))
    direction = draw(*value.shape, seed=5)
    assert value.grad is not None
    expected = numeric_gradient(loss, arguments[which], direction)
    assert float((value.grad * direction).sum()) == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_gradients_of_rms_norm() -> None:
    x, weight, out_weights = draw(3, 7), 1 + draw(7, seed=1) / 10, draw(3, 7, seed=2)
    asked = x.clone().requires_grad_()
    torch.autograd.backward((ops.rms_norm(asked, weight, eps=1e-5) * out_weights).sum())
    direction = draw(3, 7, seed=3)
    expected = numeric_gradient(lambda v: (ops.rms_norm(v, weight, eps=1e-5) * out_weights).sum(), x, direction)
    assert asked.grad is not None
    assert float((asked.grad * direction).sum()) == pytest.approx(expected, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("op", ["rms_norm", "linear"])
def test_gradients_reach_weights_when_the_input_needs_none(op: str) -> None:
    x = draw(3, 8)
    weight = draw(8) if op == "rms_norm" else draw(4, 8)
    weight.requires_grad_()
    out = ops.rms_norm(x, weight, eps=1e-5) if op == "rms_norm" else ops.linear(x, weight)
    torch.autograd.backward(out.square().sum())
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_gradients_of_moe_equal_those_of_the_slow_one() -> None:
    def fast_moe(x: Tensor, routing: Routing, weights: list[Tensor], alpha: float, limit: float) -> Tensor:
        return ops.moe(x, routing, *weights, alpha=alpha, limit=limit)

    gradients = []
    for moe in (fast_moe, slow_moe):
        x, routing, weights = moe_arguments()
        leaves = [x, routing.weights_TA, *weights]
        for leaf in leaves:
            leaf.requires_grad_()
        torch.autograd.backward(moe(x, routing, weights, 1.702, 7.0).square().sum())
        gradients.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


def test_gradients_through_packed_experts_reach_the_activations() -> None:
    x, routing, (gate_up, gate_up_bias, down, down_bias) = moe_arguments()
    x.requires_grad_()
    out = ops.moe(x, routing, pack(gate_up), gate_up_bias, pack(down), down_bias, alpha=1.702, limit=7.0)
    torch.autograd.backward(out.sum())
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_has_a_reference(op: str) -> None:
    only_autograd_calls_it = op.endswith("_backward") or op == "add_product"
    assert only_autograd_calls_it or callable(getattr(ops, op))
    assert callable(getattr(reference, op))
