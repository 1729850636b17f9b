"""What adapters add, against their deltas folded into the weights; batches of several adapters; gradients; refusals."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.errors import UsageError
from freehold.kernels import ops
from freehold.kernels.ops import Routing
from freehold.model.lora import (
    KINDS,
    Adapter,
    AdapterSpec,
    Factors,
    Target,
    TokenAdapters,
    delta,
    factor_shapes,
    new_adapter,
    weight_name,
)
from freehold.weights.layouts import canonical_shapes
from tests.checkpoints import random_table, small_config

CONFIG = small_config(num_layers=1, expert_width=48)
SPEC = AdapterSpec.of_kinds(CONFIG, {kind: Target(rank=2 + i, alpha=6) for i, kind in enumerate(KINDS)})
TARGET = Target(rank=1, alpha=1)
NONE, FIRST, SECOND = -1, 0, 1


def random_adapter(seed: int, spec: AdapterSpec = SPEC, dtype: torch.dtype = torch.float64) -> Adapter:
    adapter = new_adapter(CONFIG, spec, seed=seed, dtype=dtype)
    with torch.no_grad():
        for _, b in adapter.factors.values():
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return adapter


def table() -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in random_table(CONFIG, dtype=torch.float64).items() if isinstance(tensor, Tensor)
    }


def folded(adapter: Adapter | None) -> dict[str, Tensor]:
    weights = table()
    for name in adapter.factors if adapter else ():
        assert adapter
        weights[weight_name(name)] = weights[weight_name(name)] + adapter.weight_delta(name).detach()
    return weights


def inputs(width: int, count: int = 6) -> Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def qkv_of(weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    weight, bias = (torch.cat([weights[f"layers.0.{name}.{part}"] for name in "qkv"]) for part in ("weight", "bias"))
    return F.linear(x_TD, weight, bias)


def moe_of(weights: dict[str, Tensor], x_TD: Tensor, routing: Routing, adapters: TokenAdapters | None = None) -> Tensor:
    gate_up, down = (weights[f"layers.0.{name}"] for name in ("gate_up", "down"))
    biases = [weights[f"layers.0.{name}.bias"] for name in ("gate_up", "down")]
    loras = () if adapters is None else adapters.experts("layers.0")
    return ops.moe(
        x_TD, routing, gate_up, biases[0], down, biases[1], alpha=1.702, limit=CONFIG.swiglu_limit, loras=loras
    )


ADAPTERS = [random_adapter(1), random_adapter(2, AdapterSpec(targets=dict(list(SPEC.targets.items())[1:])))]


@pytest.mark.parametrize(
    "rows",
    [[FIRST] * 6, [SECOND] * 6, [NONE] * 6, [NONE, SECOND, FIRST, FIRST, NONE, SECOND], [NONE, NONE, FIRST] * 2],
    ids=str,
)
def test_each_token_gets_what_its_own_adapter_folded_into_the_weights_gives(rows: list[int]) -> None:
    adapters = TokenAdapters(ADAPTERS, torch.tensor(rows))
    x_TD, x_TO = inputs(CONFIG.hidden_size), inputs(CONFIG.num_heads * CONFIG.head_dim)
    weights = table()
    routing = ops.route(F.linear(x_TD, weights["layers.0.router.weight"]), CONFIG.num_active_experts)
    qkv = adapters.qkv("layers.0", x_TD, qkv_of(weights, x_TD))
    attention = adapters.linear("layers.0.o", x_TO, F.linear(x_TO, weights["layers.0.o.weight"]))
    router = adapters.linear("layers.0.router", x_TD, F.linear(x_TD, weights["layers.0.router.weight"]))
    experts = moe_of(weights, x_TD, routing, adapters)
    for token, row in enumerate(rows):
        own, one = folded(None if row == NONE else ADAPTERS[row]), slice(token, token + 1)
        torch.testing.assert_close(qkv[one], qkv_of(own, x_TD[one]))
        torch.testing.assert_close(attention[one], F.linear(x_TO[one], own["layers.0.o.weight"]))
        torch.testing.assert_close(router[one], F.linear(x_TD[one], own["layers.0.router.weight"]))
        torch.testing.assert_close(experts[one], moe_of(own, x_TD[one], Routing(routing[0][one], routing[1][one])))


def test_a_new_adapter_changes_nothing_and_is_drawn_as_pefts_are() -> None:
    adapter = new_adapter(CONFIG, SPEC, seed=5)
    x_TD = inputs(CONFIG.hidden_size).float()
    out = torch.randn(6, 4)
    all_first = TokenAdapters([adapter], torch.zeros(6, dtype=torch.int64))
    assert torch.equal(all_first.linear("layers.0.router", x_TD, out), out)
    for name, (a, b) in adapter.factors.items():
        assert a.is_leaf and b.is_leaf and a.requires_grad and b.requires_grad and not b.any(), name
        assert 0.9 / math.sqrt(a.shape[-1]) < a.abs().max() <= 1 / math.sqrt(a.shape[-1])
    again, other = new_adapter(CONFIG, SPEC, seed=5), new_adapter(CONFIG, SPEC, seed=6)
    assert all(torch.equal(x, y) for x, y in zip(adapter.parameters, again.parameters, strict=True))
    assert not torch.equal(adapter.parameters[0], other.parameters[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(dropout: float) -> None:
    spec = AdapterSpec.of_kinds(CONFIG, {"gate_up": Target(rank=1, alpha=2), "down": Target(rank=2, alpha=2)})
    start = random_adapter(3, spec)
    x_TD, rows_T = inputs(CONFIG.hidden_size, 3).requires_grad_(), torch.tensor([0, -1, 0])
    routing = Routing(torch.full((3, 1), 0.7, dtype=torch.float64), torch.tensor([[0], [1], [1]]))

    def loss(x_TD: Tensor, *parameters: Tensor) -> Tensor:
        pairs = [Factors(a, b) for a, b in zip(parameters[0::2], parameters[1::2], strict=True)]
        factors = dict(zip(start.factors, pairs, strict=True))
        adapter = Adapter(config=CONFIG, spec=spec, factors=factors)
        adapters = TokenAdapters([adapter], rows_T, dropout=dropout)
        torch.manual_seed(1)
        return moe_of(table(), x_TD, routing, adapters).square().sum()

    torch.autograd.gradcheck(loss, (x_TD, *start.parameters), fast_mode=True)


def test_dropout_keeps_the_mean_and_comes_from_torchs_own_generator() -> None:
    adapter, x_SI = ADAPTERS[0], inputs(CONFIG.hidden_size, 1)
    a, b = adapter.factors["layers.0.q"]
    plain = delta(x_SI, a, b, scaling=2.0)
    torch.manual_seed(0)
    dropped = delta(x_SI.expand(20_000, -1), a, b, scaling=2.0, dropout=0.25)
    assert (dropped.std(0) > 0).all()
    assert ((dropped.mean(0) - plain[0]).abs() < 5 * dropped.std(0) / math.sqrt(len(dropped))).all()
    torch.manual_seed(0)
    assert torch.equal(delta(x_SI.expand(20_000, -1), a, b, scaling=2.0, dropout=0.25), dropped)


def test_rank_stabilised_scaling_divides_by_the_root() -> None:
    targets = {"layers.0.q": Target(rank=16, alpha=8)}
    assert AdapterSpec(targets=targets).scaling("layers.0.q") == 0.5
    assert AdapterSpec(targets=targets, rslora=True).scaling("layers.0.q") == 2


def test_factors_fit_the_canonical_weights_they_adapt() -> None:
    canonical = canonical_shapes(CONFIG)
    for name, (a, b) in factor_shapes(CONFIG, SPEC).items():
        assert (*b[:-1], a[-1]) == canonical[weight_name(name)] and a[-2] == b[-1] == SPEC.targets[name].rank


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target(rank=0, alpha=1), "rank of at least 1"),
        (lambda: Target(rank=1, alpha=math.nan), "positive alpha"),
        (lambda: AdapterSpec(targets={}), "needs a target"),
        (lambda: factor_shapes(CONFIG, AdapterSpec.of_kinds(CONFIG, {"sinks": TARGET})), "sinks"),
        (lambda: factor_shapes(CONFIG, AdapterSpec.of_kinds(CONFIG, {"q": TARGET}, layers=[1])), "N below 1"),
        (lambda: Adapter(config=CONFIG, spec=SPEC, factors={}), "is missing from"),
        (lambda: Adapter(config=small_config(), spec=SPEC, factors=ADAPTERS[0].factors), r"has shape .* needs"),
        (lambda: TokenAdapters(ADAPTERS, torch.tensor([0, 2])), "beyond the 2 adapters"),
        (lambda: TokenAdapters(ADAPTERS, torch.tensor([-2, 0])), "beyond the 2 adapters"),
        (lambda: TokenAdapters(ADAPTERS, torch.tensor([0.0])), "one integer per token"),
        (lambda: TokenAdapters(ADAPTERS, torch.tensor([0]), dropout=1.0), "dropout 1.0"),
    ],
)
def test_what_makes_no_adapter_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
