"""Guesses from the text so far: what is guessed, when it is worth it, and that no token is another for it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freehold.engine.lookup import Lookup
from freehold.engine.pace import Pace
from freehold.engine.request import Request
from freehold.kernels import backends
from freehold.model.transformer import Transformer
from freehold.sampling import Sampling
from tests.engine.conftest import MakeEngine
from tests.engine.test_engine import expected, run

needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 40), st.integers(0, 6))
def test_guesses_are_what_followed_the_last_time(tokens: list[int], first: int, most: int) -> None:
    lookup = Lookup()
    for length in range(min(first, len(tokens)), len(tokens) + 1):
        text = tokens[:length]
        ends = [end for end in range(3, length) if text[end - 3 : end] == text[-3:]]
        assert lookup.guess(text, most) == (text[ends[-1] : ends[-1] + most] if ends else [])


def test_the_rate_is_what_came_true() -> None:
    lookup = Lookup()
    for _ in range(100):
        lookup.judge(4, 4)
    assert lookup.rate > 0.99
    for _ in range(30):
        lookup.judge(4, 0)
    assert lookup.rate < 0.05
    for _ in range(200):
        lookup.guess([1], 0)
    assert lookup.rate > 0.4  # another chance


def test_guessing_is_off_where_it_does_not_pay() -> None:
    pace = Pace(2.0, 512)
    assert pace.worth_guessing(1, 1.0) == 0  # nothing is known yet
    pace.observe(1, 0, 0.010)
    pace.observe(1, 10, 0.020)  # a token more costs a tenth of a step
    assert pace.worth_guessing(1, 0.95) > pace.worth_guessing(1, 0.6) > 0
    assert pace.worth_guessing(1, 0.05) == 0
    pace.observe(16, 0, 0.012)
    assert pace.worth_guessing(16, 0.7) == 0  # among so many, a step's time goes by its tokens


@needs_native
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0.05, seed=5),
        Sampling(temperature=0, repetition_penalty=1.01, presence_penalty=0.01),
    ],
)
def test_the_text_is_the_same_with_fewer_steps(
    transformer: Transformer, make_engine: MakeEngine, sampling: Sampling
) -> None:
    prompt = [5, 6, 7, 8, 9] * 12
    steps = []
    for lookup in (True, False):
        ticks = itertools.count()  # every step takes the same time, so that guessing pays whatever this machine does
        engine = make_engine(lookup=lookup, clock=lambda ticks=ticks: next(ticks) * 1e-3)
        pages = engine.stats().pages
        request = Request(prompt=prompt, max_tokens=200, sampling=sampling)
        ((completion,), (logged,)) = run(
            engine, request, Request(prompt=prompt, max_tokens=60, sampling=Sampling(temperature=0, logprobs=1))
        )
        steps.append((engine.stats().steps, completion.tokens, logged.tokens))
        assert len(logged.logprobs or []) == 60
        assert engine.stats().pages == pages
        assert (engine.stats().guessed_tokens > 0) == lookup
    assert steps[0][1:] == steps[1][1:]
    if sampling.temperature == 0 and not sampling.changes_logits:
        assert steps[0][1] == expected(transformer, prompt, 200)
        assert steps[0][0] < steps[1][0]
