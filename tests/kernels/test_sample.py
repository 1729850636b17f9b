"""Sampling draws what it may, as often as it should, and nothing else: by the native kernel and by the reference."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freehold.errors import UsageError
from freehold.kernels import backends, ops


@pytest.fixture(params=["auto", "reference"], autouse=True, scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Which of the two runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREEHOLD_KERNELS", request.param)
        backends.native.cache_clear()
        yield
    backends.native.cache_clear()


def uniform(seed: int = 0) -> float:
    return random.Random(seed).random()


def allowed(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Every token that the filters leave, in float64, with slack for ties and for float32 at the borders."""
    slack = 1e-4
    unmasked = [i for i, logit in enumerate(logits) if logit > -math.inf]
    ranked = sorted(unmasked, key=lambda i: -logits[i])
    if top_k:
        last = logits[ranked[min(top_k, len(ranked)) - 1]]
        ranked = [i for i in ranked if logits[i] >= last]
    weights = [math.exp((logits[i] - logits[ranked[0]]) / temperature) for i in ranked]
    # With ties at the border of top-k any of them may be in, so the sum is that of exactly k.
    total = sum(weights[: top_k or None])
    kept, before = set(), 0.0
    for i, weight in zip(ranked, weights, strict=True):
        in_front = sum(w for w in weights if w > weight * (1 + slack))
        if (in_front / total < top_p + slack) and weight >= min_p - slack:
            kept.add(i)
        before += weight
    return kept


@st.composite
def some_logits(draw: st.DrawFn) -> list[float]:
    numbers = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, 1.0, 2.0])  # ties too
    logits = draw(st.lists(numbers, min_size=1, max_size=40))
    masked = draw(st.sets(st.integers(0, len(logits) - 1), max_size=len(logits) - 1))
    return [-math.inf if i in masked else logit for i, logit in enumerate(logits)]


@settings(max_examples=400, deadline=None)
@given(
    logits=some_logits(),
    temperature=st.sampled_from([1e-50, 1e-3, 0.5, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**60),
)
def test_only_what_the_filters_leave_is_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    values = torch.tensor(logits)
    filters: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    token = ops.sample(values, uniform=uniform(seed), **filters)
    assert token in allowed(logits, max(temperature, 1e-6), top_k, top_p, min_p)
    assert token == ops.sample(values, uniform=uniform(seed), **filters)
    assert values.tolist() == logits, "the caller's logits are left alone"


@settings(max_examples=100, deadline=None)
@given(logits=some_logits(), top_k=st.integers(0, 5), top_p=st.floats(0.01, 1), min_p=st.floats(0, 1))
def test_temperature_zero_is_the_largest_logit(logits: list[float], top_k: int, top_p: float, min_p: float) -> None:
    token = ops.sample(torch.tensor(logits), uniform=uniform(), temperature=0, top_k=top_k, top_p=top_p, min_p=min_p)
    assert logits[token] == max(logits)


def draws(logits: Tensor, count: int, **filters: Any) -> list[int]:
    """How often each token came up in `count` draws from one source."""
    source = random.Random(1)
    tokens = [ops.sample(logits, uniform=source.random(), **filters) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)).tolist()


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_p": 0.75}, [1, 3]),  # 0.4 + 0.3 is not yet 0.75, 0.4 + 0.3 + 0.15 is: three stay
        ({"top_p": 0.69}, [1, 3]),
        ({"min_p": 0.5}, [1, 3]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # top-p counts what top-k left: 0.4 / 0.85 + 0.3 / 0.85 is past 0.8
    ],
)
def test_frequencies(filters: dict[str, Any], kept: list[int]) -> None:
    shares = torch.tensor([0.1, 0.4, 0.15, 0.3, 0.05])
    if filters == {"top_p": 0.75}:
        kept = [1, 2, 3]
    powered = shares ** (1 / filters.get("temperature", 1.0))
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), powered[kept])
    expected = expected / expected.sum() * 4000
    counts = draws(shares.log() + 3.0, 4000, **filters)
    assert all(count == 0 for i, count in enumerate(counts) if i not in kept)
    chi_square = sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in kept)
    assert chi_square < 18.5  # p = 0.001 with four degrees of freedom


def test_rare_tokens_are_not_lost() -> None:
    # 60,000 tokens of 1e-5 each behind one of 0.4: float32 sums must not cut the tail off.
    logits = torch.cat((torch.tensor([0.4]).log(), torch.full((60_000,), 1e-5).log()))
    tail = sum(draws(logits, 300)[1:])
    assert 140 < tail < 220


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_of_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, 50.0, 0.0], dtype=dtype)
    assert ops.sample(logits, uniform=uniform()) == 1


def test_a_single_candidate_of_many() -> None:
    logits = torch.full((1000,), -math.inf)
    logits[777] = -1e4
    assert ops.sample(logits, uniform=uniform()) == 777


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
    ],
)
def test_parameters_out_of_range(name: str, value: float) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=f"{name} must be .*, got {value}"):
        ops.sample(torch.zeros(4), uniform=uniform(), **given)


@pytest.mark.parametrize(
    "logits",
    [
        torch.full((4,), -math.inf),
        torch.tensor([0.0, math.nan]),
        torch.tensor([0.0, math.inf]),
        torch.zeros(0),
        torch.zeros(1, 4),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_cannot_be_drawn_from(logits: Tensor, temperature: float) -> None:
    with pytest.raises(UsageError, match=r"\[sample\] expected"):
        ops.sample(logits, uniform=uniform(), temperature=temperature)
