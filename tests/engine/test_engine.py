"""The engine against the simple loop: whatever is shared, cached, pushed out or interrupted, tokens stay the same."""

import contextlib
import math
import random
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from freehold.engine.core import Engine
from freehold.engine.pace import MOST_GUESSED
from freehold.engine.request import Completion, Request
from freehold.engine.runner import Result, Runner
from freehold.engine.scheduler import Plan
from freehold.errors import FreeholdError, OutOfMemoryError, RequestError, UsageError
from freehold.kernels import backends
from freehold.model import simple
from freehold.model.transformer import Transformer
from freehold.sampling import Sampling
from tests.engine.conftest import CONTEXT, VOCABULARY, MakeEngine

# The reference ops' sums depend on what else is in a batch; the native kernels' do not, to the last bit.
needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")

GREEDY = Sampling(temperature=0.0)


def prompts(count: int, longest: int = 200, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCABULARY) for _ in range(source.randint(1, longest))] for _ in range(count)]


def run(engine: Engine, *requests: Request) -> list[list[Completion]]:
    """All of them together, to their ends."""
    ids = [engine.submit(request) for request in requests]
    completions = {i: [Completion() for _ in range(r.n)] for i, r in zip(ids, requests, strict=True)}
    while engine.has_work:
        for request_id, step in engine.step():
            completions[request_id][step.index].add(step)
        engine.check_integrity()
    return [completions[i] for i in ids]


def tokens_of(engine: Engine, request: Request) -> list[int]:
    return run(engine, request)[0][0].tokens


def expected(
    transformer: Transformer, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY
) -> list[int]:
    return list(simple.generate(transformer, prompt, max_tokens=max_tokens, sampling=sampling))


# --- the same tokens ----------------------------------------------------------------------------------------------


@needs_native
def test_alone_and_among_31_others_the_tokens_are_those_of_the_simple_loop(
    transformer: Transformer, make_engine: MakeEngine
) -> None:
    given = prompts(32)
    want = [expected(transformer, prompt, 24) for prompt in given]
    requests = [Request(prompt=prompt, max_tokens=24, sampling=GREEDY) for prompt in given]
    together = run(make_engine(), *requests)
    assert [samples[0].tokens for samples in together] == want
    alone = make_engine()
    assert [tokens_of(alone, request) for request in requests[:6]] == want[:6]


@needs_native
def test_those_who_come_and_go_do_not_matter(transformer: Transformer, engine: Engine) -> None:
    given = prompts(12, seed=1)
    want = [expected(transformer, prompt, 15) for prompt in given]
    ids: dict[int, int] = {}
    got: dict[int, list[int]] = {}
    source = random.Random(2)
    waiting = list(range(12))
    while waiting or engine.has_work:
        if waiting and source.random() < 0.4:
            i = waiting.pop()
            ids[engine.submit(Request(prompt=given[i], max_tokens=15, sampling=GREEDY))] = i
            other = engine.submit(Request(prompt=given[i][::-1], max_tokens=15))
            if source.random() < 0.7:
                for _ in range(source.randrange(4)):
                    collect(engine, ids, got)
                engine.abort(other)
        collect(engine, ids, got)
    assert [got[i] for i in range(12)] == want


def collect(engine: Engine, ids: dict[int, int], got: dict[int, list[int]]) -> None:
    for request_id, step in engine.step():
        if request_id in ids:
            got.setdefault(ids[request_id], []).extend(step.tokens)
    engine.check_integrity()


@needs_native
@pytest.mark.parametrize(
    "sampling",
    [Sampling(seed=7), Sampling(temperature=0.7, top_p=0.8, top_k=30, min_p=0.02, seed=3), Sampling(top_k=2, seed=-1)],
)
def test_seeds(transformer: Transformer, engine: Engine, sampling: Sampling) -> None:
    prompt = prompts(1)[0]
    request = Request(prompt=prompt, max_tokens=20, sampling=sampling)
    want = expected(transformer, prompt, 20, sampling)
    others = [Request(prompt=other, max_tokens=9) for other in prompts(4, seed=5)]
    assert [samples[0].tokens for samples in run(engine, request, *others, request)][:: len(others) + 1] == [want] * 2
    unseeded = Request(prompt=prompt, max_tokens=20)
    assert tokens_of(engine, unseeded) != tokens_of(engine, unseeded)


@needs_native
def test_cached_and_uncached_runs_give_the_same_tokens(transformer: Transformer, engine: Engine) -> None:
    first = prompts(1, 180)[0]
    answer = tokens_of(engine, Request(prompt=first, max_tokens=40, sampling=GREEDY, boundaries=[len(first) // 2]))
    second = first + answer + [5, 6, 7]
    branch = first[: len(first) // 2] + [9] * 80
    for prompt, cached in ((second, len(first) + 39), (branch, len(first) // 2), (second, len(second) - 1)):
        ((completion,),) = run(engine, Request(prompt=prompt, max_tokens=12, sampling=GREEDY))
        assert completion.stats is not None
        assert completion.stats.num_cached_tokens == cached
        assert completion.tokens == expected(transformer, prompt, 12)


@needs_native
def test_who_is_pushed_out_goes_on_where_it_was(transformer: Transformer, make_engine: MakeEngine) -> None:
    engine = make_engine(kv_tokens=CONTEXT, max_num_seqs=8)
    given = [prompt + [1] * 100 for prompt in prompts(8, 60, seed=3)]
    completions = run(engine, *(Request(prompt=p, max_tokens=90, sampling=Sampling(seed=4)) for p in given))
    assert engine.stats().preemptions > 0
    assert [samples[0].tokens for samples in completions] == [
        expected(transformer, prompt, 90, Sampling(seed=4)) for prompt in given
    ]


@needs_native
def test_samples_of_one_prompt(transformer: Transformer, engine: Engine) -> None:
    prompt = prompts(1)[0]
    sampling = Sampling(seed=11)
    (samples,) = run(engine, Request(prompt=prompt, max_tokens=10, n=5, sampling=sampling, cache=False))
    assert samples[0].tokens == expected(transformer, prompt, 10, sampling)
    assert len({tuple(sample.tokens) for sample in samples}) == 5
    assert [sample.finish for sample in samples] == ["length"] * 5
    # The prompt is computed once.
    assert [s.stats.num_cached_tokens for s in samples if s.stats] == [0] + [len(prompt) - 1] * 4
    (greedy,) = run(engine, Request(prompt=prompt, max_tokens=10, n=3, sampling=GREEDY))
    assert [sample.tokens for sample in greedy] == [expected(transformer, prompt, 10)] * 3
    (more_than_fit,) = run(engine, Request(prompt=prompt, max_tokens=3, n=90, sampling=sampling))
    assert all(len(sample.tokens) == 3 for sample in more_than_fit)


# --- sampling -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits_after(transformer: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    return transformer.unembed(transformer.run(torch.tensor(tokens), transformer.new_cache())[-1:])[0]


def test_logprobs_are_the_model_s_own(transformer: Transformer, engine: Engine) -> None:
    prompt = prompts(1)[0]
    bias = {3: 5.0, 4: -5.0}
    sampling = Sampling(temperature=2.0, top_k=50, logit_bias=bias, presence_penalty=1.0, seed=1, logprobs=20)
    ((completion,),) = run(engine, Request(prompt=prompt, max_tokens=6, sampling=sampling))
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 6
    for i, (token, given) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        want = torch.log_softmax(logits_after(transformer, prompt + completion.tokens[:i]), -1)
        assert given.logprob == pytest.approx(float(want[token]), abs=1e-4)
        assert len(given.top) == 20
        assert [value for _, value in given.top] == pytest.approx(want.topk(20).values.tolist(), abs=1e-4)
    ((none,),) = run(engine, Request(prompt=prompt, max_tokens=2))
    assert none.logprobs is None
    ((bare,),) = run(engine, Request(prompt=prompt, max_tokens=2, sampling=Sampling(logprobs=0)))
    assert [one.top for one in bare.logprobs or []] == [(), ()]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, repetition_penalty=1.5),
        Sampling(temperature=0, repetition_penalty=0.7),
        Sampling(temperature=0, presence_penalty=0.8),
        Sampling(temperature=0, frequency_penalty=0.5),
        Sampling(temperature=0, frequency_penalty=-0.5, presence_penalty=-1.0),
        Sampling(temperature=0, repetition_penalty=1.2, presence_penalty=0.3, logit_bias={7: 0.5, 8: -2.0}),
    ],
)
def test_penalties_and_bias(transformer: Transformer, engine: Engine, sampling: Sampling) -> None:
    prompt = prompts(1, 40, seed=8)[0]
    tokens = tokens_of(engine, Request(prompt=prompt, max_tokens=15, sampling=sampling))
    for i, token in enumerate(tokens):
        logits = logits_after(transformer, prompt + tokens[:i]).tolist()
        counts = Counter(tokens[:i])
        for seen in {*prompt, *counts}:
            penalty = sampling.repetition_penalty
            logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
        for seen, count in counts.items():
            logits[seen] -= sampling.presence_penalty + sampling.frequency_penalty * count
        for biased, bias in sampling.logit_bias.items():
            logits[biased] += bias
        assert logits[token] == pytest.approx(max(logits), abs=1e-4)


def test_bias_can_force_and_forbid(engine: Engine) -> None:
    prompt = prompts(1)[0]
    forced = Sampling(temperature=1.0, logit_bias={42: 1000.0})
    assert tokens_of(engine, Request(prompt=prompt, max_tokens=5, sampling=forced)) == [42] * 5
    free = tokens_of(engine, Request(prompt=prompt, max_tokens=5, sampling=GREEDY))
    without = Sampling(temperature=0, logit_bias={free[0]: -1000.0})
    assert tokens_of(engine, Request(prompt=prompt, max_tokens=5, sampling=without))[0] != free[0]


def test_how_a_sample_ends(engine: Engine) -> None:
    prompt = prompts(1)[0]
    ((free,),) = run(engine, Request(prompt=prompt, max_tokens=8, sampling=GREEDY))
    assert free.finish == "length"
    stop = free.tokens[3]
    first = free.tokens.index(stop)
    ((stopped,),) = run(engine, Request(prompt=prompt, max_tokens=8, sampling=GREEDY, stop_ids=frozenset({stop})))
    assert (stopped.tokens, stopped.finish) == (free.tokens[: first + 1], "stop")
    ((kept_on,),) = run(
        engine, Request(prompt=prompt, max_tokens=8, min_tokens=6, sampling=GREEDY, stop_ids=frozenset({stop}))
    )
    assert stop not in kept_on.tokens[:6]
    assert len(kept_on.tokens) >= 6
    stats = stopped.stats
    assert stats is not None
    assert (stats.num_prompt_tokens, stats.num_tokens) == (len(prompt), first + 1)
    assert stats.queue_seconds is not None
    assert stats.first_token_seconds is not None
    assert 0 <= stats.queue_seconds <= stats.first_token_seconds <= stats.total_seconds


def test_rows_with_nothing_to_draw_fail_alone(transformer: Transformer, engine: Engine) -> None:
    good = Request(prompt=[1, 2, 3], max_tokens=4, sampling=GREEDY)
    bad = Request(prompt=[1, 2], max_tokens=4, min_tokens=2, stop_ids=frozenset(range(VOCABULARY)))
    (failed,), (fine,) = run(engine, bad, good)
    assert failed.finish == "error"
    assert isinstance(failed.error, RequestError)
    assert "min_tokens" in str(failed.error)
    assert fine.tokens == expected(transformer, [1, 2, 3], 4)


# --- constraints ----------------------------------------------------------------------------------------------------


class Spell:
    """Allows certain tokens at each place; a place with one choice is forced, unless `lazy`."""

    def __init__(self, *choices: set[int], lazy: bool = False, fails: str = "") -> None:
        self.choices = choices
        self.lazy = lazy
        self.fails = fails
        self.taken: list[int] = []

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        self.fail("fill_mask")
        row[:] = 0
        for token in self.choices[len(self.taken)]:
            row[token // 32] |= np.int32(np.uint32(1 << token % 32).astype(np.int32))

    def accept(self, token: int) -> None:
        self.fail("accept")
        assert token in self.choices[len(self.taken)]
        self.taken.append(token)

    def forced(self) -> list[int]:
        self.fail("forced")
        run: list[int] = []
        for choice in self.choices[len(self.taken) :]:
            if len(choice) != 1 or self.lazy:
                break
            run += choice
        return run

    def is_finished(self) -> bool:
        self.fail("is_finished")
        return len(self.taken) == len(self.choices)

    def fail(self, where: str) -> None:
        if self.fails == where:
            raise LookupError("the grammar is broken")


@pytest.mark.parametrize("lazy", [False, True])
def test_constraints_hold(engine: Engine, lazy: bool) -> None:
    choices: tuple[set[int], ...] = ({5, 6}, {31}, {32}, {63, 64, 199}, {7})
    for seed in range(5):
        request = Request(
            prompt=[1, 2, 3],
            max_tokens=30,
            sampling=Sampling(temperature=5.0, seed=seed),
            constraint=lambda: Spell(*choices, lazy=lazy),
        )
        ((completion,),) = run(engine, request)
        assert completion.finish == "stop"
        assert len(completion.tokens) == len(choices)
        assert all(token in choice for token, choice in zip(completion.tokens, choices, strict=True))


@needs_native
def test_forced_runs_are_read_in_one_step(transformer: Transformer, make_engine: MakeEngine) -> None:
    forced = [{token} for token in range(100, 150)]
    anything = set(range(VOCABULARY))
    steps = []
    for lazy in (False, True):
        engine = make_engine()
        choices = (*forced[:10], anything, *forced[10:], anything)
        ((completion,),) = run(
            engine,
            Request(prompt=[1, 2], max_tokens=80, sampling=GREEDY, constraint=partial(Spell, *choices, lazy=lazy)),
        )
        text = [1, 2, *completion.tokens]
        assert completion.tokens[:10] == list(range(100, 110))
        assert completion.tokens[10] == int(logits_after(transformer, text[:12]).argmax())
        assert completion.tokens[-1] == int(logits_after(transformer, text[:-1]).argmax())
        steps.append(engine.stats().steps)
    assert steps == [2, 52]


def test_masks_are_filled_while_the_model_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model_runs, mask_is_filled = threading.Event(), threading.Event()
    forward = Transformer.forward

    class Overlapping(Spell):
        def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
            assert model_runs.wait(4)
            super().fill_mask(row)
            mask_is_filled.set()

    def watched(self: Transformer, *arguments: Any) -> torch.Tensor:
        model_runs.set()
        assert mask_is_filled.wait(4)
        return forward(self, *arguments)

    monkeypatch.setattr(Transformer, "forward", watched)
    request = Request(prompt=[1, 2], max_tokens=3, constraint=lambda: Overlapping({3, 4}, {5, 6}))
    ((completion,),) = run(engine, request)
    assert completion.finish == "stop"


def test_forced_to_the_very_end(engine: Engine) -> None:
    for choices, max_tokens, finish in (([{3}, {4}], 9, "stop"), ([{3}, {4}, {5}], 2, "length")):
        ((completion,),) = run(engine, Request(prompt=[1], max_tokens=max_tokens, constraint=partial(Spell, *choices)))
        assert (completion.tokens, completion.finish) == ([3, 4], finish)
    (samples,) = run(engine, Request(prompt=[1], max_tokens=9, n=3, constraint=lambda: Spell({3}, {4, 5})))
    assert [(sample.tokens[0], len(sample.tokens)) for sample in samples] == [(3, 2)] * 3


def test_logprobs_under_a_constraint(engine: Engine) -> None:
    request = Request(
        prompt=[1], max_tokens=9, sampling=Sampling(logprobs=2), constraint=lambda: Spell({3}, {4, 5}, {6})
    )
    ((completion,),) = run(engine, request)
    assert len(completion.logprobs or []) == len(completion.tokens) == 3


@pytest.mark.parametrize("where", ["fill_mask", "accept", "is_finished"])
def test_a_constraint_that_raises_ends_its_own_request(transformer: Transformer, engine: Engine, where: str) -> None:
    def broken() -> Spell:
        return Spell({1, 2}, {3, 4}, fails=where)

    good = Request(prompt=[1, 2, 3], max_tokens=6, sampling=GREEDY)
    (fine,), samples = run(engine, good, Request(prompt=[1, 2, 3, 4], max_tokens=6, n=2, constraint=broken))
    assert fine.tokens == expected(transformer, [1, 2, 3], 6)
    for sample in samples:
        assert sample.finish == "error"
        assert isinstance(sample.error, RequestError)
        assert "LookupError: the grammar is broken" in str(sample.error)


def test_a_constraint_that_cannot_begin_is_refused(engine: Engine) -> None:
    def raising() -> Spell:
        raise ValueError("no such grammar")

    for constraint in (raising, lambda: Spell({1}, fails="forced"), lambda: Spell({1}, {2}, fails="accept")):
        with pytest.raises(RequestError, match=r"the constraint .*: (ValueError: no such|LookupError: the) grammar"):
            engine.submit(Request(prompt=[1], max_tokens=3, constraint=constraint))
    assert not engine.has_work


class Panic(BaseException):
    """As grammar libraries written in Rust raise."""


class Odd(Spell):
    """A constraint that does what none should."""

    def __init__(self, what: Any) -> None:
        super().__init__({1, 2}, {1, 2}, {1, 2})
        self.what = what

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        if self.what == "resize":
            row.resize(1, refcheck=False)
        elif self.what == "panic":
            raise Panic("a bug in Rust")
        else:
            super().fill_mask(row)

    def forced(self) -> list[int]:
        return [self.what] if self.taken and not isinstance(self.what, str) else []


@pytest.mark.parametrize("what", [99999, -5, 1.5, None, "resize", "panic"])
def test_odd_constraints_fail_alone(transformer: Transformer, engine: Engine, what: Any) -> None:
    good, bad = Request(prompt=[1, 2, 3], max_tokens=6, sampling=GREEDY), partial(Odd, what)
    (fine,), (odd,) = run(engine, good, Request(prompt=[4], max_tokens=6, constraint=bad))
    assert fine.tokens == expected(transformer, [1, 2, 3], 6)
    assert odd.finish == "error"
    assert isinstance(odd.error, RequestError)


def test_a_constraint_that_takes_for_ever(
    transformer: Transformer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freehold.engine.sampler._MASK_SECONDS", 0.1)
    released = threading.Event()

    class Stuck(Spell):
        def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
            released.wait(20)

    def fine(priority: int = 0) -> Request:
        return Request(prompt=[5], max_tokens=6, priority=priority, constraint=lambda: Spell({1, 2}, {3, 4}))

    stuck = Request(prompt=[4], max_tokens=6, constraint=lambda: Stuck({1, 2}, {3, 4}))
    unconstrained = Request(prompt=[1, 2, 3], max_tokens=6, sampling=GREEDY)
    (first,), (late,), (other,), (behind,), (too,) = run(engine, fine(-1), stuck, unconstrained, fine(), stuck)
    ((later,),) = run(engine, fine())
    released.set()
    for failed in (late, too):
        assert "more than 0.1 s" in str(failed.error)
    assert other.tokens == expected(transformer, [1, 2, 3], 6)
    assert [first.finish, behind.finish, later.finish] == ["stop"] * 3


def test_min_tokens_yield_to_a_constraint_that_is_at_its_end(engine: Engine) -> None:
    for logprobs in (None, 0):
        sampling = Sampling(temperature=0, logprobs=logprobs)
        request = Request(
            prompt=[4], max_tokens=9, min_tokens=5, stop_ids=frozenset({3, 4}), sampling=sampling,
            constraint=lambda: Spell({1, 2}, {3, 4}),
        )  # fmt: skip
        ((completion,),) = run(engine, request)
        assert completion.error is None
        assert (completion.finish, len(completion.tokens)) == ("stop", 2)


def test_the_caller_s_list_is_the_caller_s(transformer: Transformer, engine: Engine) -> None:
    prompt = [3, 1, 4]
    engine.submit(Request(prompt=prompt, max_tokens=10, sampling=GREEDY))
    want = expected(transformer, prompt, 10)
    got: list[int] = []
    while engine.has_work:
        for _, step in engine.step():
            got += step.tokens
            prompt += step.tokens
    assert got == want


def test_waiting_in_vain_costs_no_prefix(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_tokens=CONTEXT, max_num_seqs=4)
    run(engine, Request(prompt=[1] * 70, max_tokens=1))
    engine.submit(Request(prompt=[2] * 300, max_tokens=300))
    engine.step()
    before = engine.stats().cached_prefixes
    large = engine.submit(Request(prompt=[3] * 600, max_tokens=1))
    for _ in range(3):
        engine.step()
    assert engine.stats().waiting == 1
    assert engine.stats().cached_prefixes >= before > 0
    engine.abort(large)


def test_a_constraint_that_leaves_nothing(engine: Engine) -> None:
    ((completion,),) = run(engine, Request(prompt=[1], max_tokens=3, constraint=lambda: Spell(set(), {1})))
    assert completion.finish == "error"
    assert "no token may come next" in str(completion.error)


# --- the prompt's own logprobs ----------------------------------------------------------------------------------------


def scores(transformer: Transformer, prompt: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (T, V) of each next token, the whole prompt at once."""
    return torch.log_softmax(transformer.unembed(transformer.run(torch.tensor(prompt), transformer.new_cache())), -1)


def check_scored(transformer: Transformer, request: Request, completion: Completion) -> None:
    given, want, count = completion.prompt_logprobs, scores(transformer, request.prompt), request.prompt_logprobs
    assert given is not None
    assert count is not None
    assert (len(given), given[0]) == (len(request.prompt), None)
    for i, one in enumerate(given[1:]):
        assert one is not None
        assert one.logprob == pytest.approx(float(want[i, request.prompt[i + 1]]), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(want[i].topk(count).values.tolist(), abs=1e-4)
        assert [float(want[i, token]) for token, _ in one.top] == pytest.approx([v for _, v in one.top], abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prompt_logprobs_are_the_model_s_own(transformer: Transformer, make_engine: MakeEngine, chunk: int) -> None:
    """Beside others, of prompts that are cached or not, of one sample or more, with tokens to follow or none."""
    engine = make_engine(chunk=chunk)
    source = random.Random(chunk)
    given = [*prompts(6, seed=chunk), [3], [4, 5]]
    others = [Request(prompt=prompt, max_tokens=9, sampling=GREEDY, boundaries=[len(prompt)]) for prompt in given]
    run(engine, *others)
    scored = [
        Request(
            prompt=prompt,
            max_tokens=source.choice([0, 0, 1, 6]),
            sampling=GREEDY,
            prompt_logprobs=source.choice([0, 1, 5, 20]),
            n=source.choice([1, 1, 3]),
            cache=source.random() < 0.6,
        )
        for prompt in given
    ]
    completions = run(engine, *(request for pair in zip(scored, others, strict=True) for request in pair))
    for request, samples, (other,) in zip(scored, completions[::2], completions[1::2], strict=True):
        check_scored(transformer, request, samples[0])
        assert other.prompt_logprobs is None
        assert samples[0].stats is not None
        assert samples[0].stats.num_cached_tokens == 0
        for sample in samples:
            assert (sample.finish, len(sample.tokens)) == ("length", request.max_tokens)
            assert sample.prompt_logprobs is None or sample is samples[0]
            if backends.native() is not None:
                assert sample.tokens == expected(transformer, request.prompt, request.max_tokens)


@needs_native
@pytest.mark.parametrize("seed", range(4))
def test_prompt_logprobs_do_not_depend_on_who_else_runs(
    transformer: Transformer, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Nor on being pushed out on the way and finding beginnings of the prompt cached: to the last bit, each once."""
    source = random.Random(seed)
    prompt = prompts(1, 200, seed=8)[0] + [1] * 200
    request = Request(prompt=prompt, max_tokens=30, sampling=GREEDY, prompt_logprobs=3, boundaries=[90, 150, 250])
    ((alone,),) = run(make_engine(), request)
    really_run, times = Runner.run, 0

    def interrupted(self: Runner, plan: Plan) -> Result:
        nonlocal times
        times += any(work.sequence.request is request for work in plan.works)
        if times in (3, 7, 10):
            times += 1
            raise KeyboardInterrupt
        return really_run(self, plan)

    engine = make_engine(kv_tokens=2 * CONTEXT, max_num_seqs=8, chunk=24)
    monkeypatch.setattr(Runner, "run", interrupted)
    first = engine.submit(request)
    steps = []
    while engine.is_live(first):
        if source.random() < 0.3:
            beginning = prompt[: source.randint(1, len(prompt))]
            engine.submit(Request(prompt=beginning, max_tokens=9, boundaries=[len(beginning)], priority=-1))
        with contextlib.suppress(KeyboardInterrupt):
            steps += [output.step for output in engine.step() if output.request_id == first]
        engine.check_integrity()
    monkeypatch.undo()
    while engine.has_work:
        engine.step()
    assert steps[-1].stats is not None
    assert steps[-1].stats.num_preemptions == 3
    assert [step.prompt_logprobs for step in steps] == [alone.prompt_logprobs] + [None] * (len(steps) - 1)
    assert [token for step in steps for token in step.tokens] == alone.tokens


def test_a_scored_prompt_may_fill_the_context_and_serves_later_ones(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_tokens=2 * CONTEXT)
    prompt = [5, 6] * (CONTEXT // 2)
    ((scored,),) = run(engine, Request(prompt=prompt, max_tokens=0, prompt_logprobs=0))
    assert (scored.tokens, scored.finish, len(scored.prompt_logprobs or ())) == ([], "length", CONTEXT)
    ((next,),) = run(engine, Request(prompt=prompt[:-1], max_tokens=1))
    assert next.stats is not None
    assert next.stats.num_cached_tokens == 0  # nothing was left there
    ((again,),) = run(engine, Request(prompt=prompt, max_tokens=0, prompt_logprobs=0, boundaries=[100]))
    ((next,),) = run(engine, Request(prompt=prompt[:150], max_tokens=1))
    assert again.prompt_logprobs == scored.prompt_logprobs
    assert next.stats is not None
    assert next.stats.num_cached_tokens == 100


def test_a_prompt_is_scored_before_what_a_constraint_forces(transformer: Transformer, engine: Engine) -> None:
    for max_tokens in (0, 1, 9):
        request = Request(
            prompt=[1, 2, 3], max_tokens=max_tokens, prompt_logprobs=1, n=2, constraint=lambda: Spell({3}, {4})
        )
        (samples,) = run(engine, request)
        check_scored(transformer, request, samples[0])
        assert [sample.tokens for sample in samples] == [[3, 4][:max_tokens]] * 2


def test_scoring_takes_a_few_rows_of_logits_at_a_time(
    transformer: Transformer, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than the memory plan has for drawing, however few sequences it is made for."""
    engine = make_engine(max_num_seqs=1, chunk=512)
    unembed, most = Transformer.unembed, 0

    def counting(self: Transformer, hidden_TD: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(hidden_TD))
        return unembed(self, hidden_TD)

    monkeypatch.setattr(Transformer, "unembed", counting)
    run(engine, Request(prompt=[7] * 500, max_tokens=1, prompt_logprobs=20))
    assert 1 < most <= 1 + MOST_GUESSED


# --- samples of one request are one answer ----------------------------------------------------------------------------


class Brittle(Spell):
    """Breaks on a token."""

    def accept(self, token: int) -> None:
        super().accept(token)
        if token == 7:
            raise LookupError("no sevens")


@needs_native
def test_where_one_sample_fails_the_others_end_in_the_same_step(transformer: Transformer, engine: Engine) -> None:
    """With what they have, and nobody else does; one that had ended before stays as it was."""
    lengths = iter([30, 2, 30, 30])
    choices = iter([{5, 6}, {5, 6}, {7, 8}, {5, 6}])

    def constraint() -> Spell:
        early = [{5, 6}] * 4
        return Brittle(*[*early, next(choices), *[{5, 6}] * 30][: next(lengths)])

    request = Request(prompt=[1, 2], max_tokens=40, n=4, constraint=constraint, sampling=Sampling(logit_bias={7: 100}))
    good = engine.submit(Request(prompt=[1, 2, 3], max_tokens=20, sampling=GREEDY))
    bad = engine.submit(request)
    samples, fine, ends = [Completion() for _ in range(4)], Completion(), set()
    while engine.has_work:
        for request_id, step in engine.step():
            (samples[step.index] if request_id == bad else fine).add(step)
            if request_id == bad and step.error is not None:
                ends.add(engine.stats().steps)
                assert step.tokens == ()
        engine.check_integrity()
    assert len(ends) == 1
    assert [sample.finish for sample in samples] == ["error", "stop", "error", "error"]
    assert {str(samples[i].error) for i in (0, 2, 3)} == {"the constraint failed on token 7: LookupError: no sevens"}
    assert [len(sample.tokens) for sample in samples][1:3] == [2, 4]
    assert not engine.is_live(good)
    assert fine.tokens == expected(transformer, [1, 2, 3], 20)


# --- ends before the end ----------------------------------------------------------------------------------------------


def test_abort_frees_everything_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    ids = [engine.submit(Request(prompt=p, max_tokens=50, n=2, cache=False)) for p in ([1] * 300, [2] * 9, [3] * 4)]
    for _ in range(3):
        engine.step()
    for i, request_id in enumerate(ids):
        outputs = engine.abort(request_id)
        assert {(output.request_id, output.step.finish) for output in outputs} == {(request_id, "abort")}
        assert len(outputs) == 2
        assert engine.abort(request_id) == []
        engine.check_integrity()
        assert engine.is_live(ids[-1]) == (i < 2)
    engine.clear_prefixes()
    assert not any(engine.stats().pages_in_use)


def test_deadlines(make_engine: MakeEngine) -> None:
    now = 0.0
    engine = make_engine(clock=lambda: now, max_num_seqs=1)
    running = engine.submit(Request(prompt=[1], max_tokens=500, deadline=10.0))
    waiting = engine.submit(Request(prompt=[1], max_tokens=500, deadline=5.0))
    patient = engine.submit(Request(prompt=[1], max_tokens=3))
    assert [output.request_id for output in engine.step()] == [running]
    now = 5.0
    ended = [output for output in engine.step() if output.step.finish]
    assert [(output.request_id, output.step.finish) for output in ended] == [(waiting, "deadline")]
    assert ended[0].step.stats is not None
    assert ended[0].step.stats.first_token_seconds is None
    now = 10.0
    outputs = engine.step()
    assert (outputs[0].request_id, outputs[0].step.finish) == (running, "deadline")
    assert outputs[1].request_id == patient
    while engine.has_work:
        engine.step()


def test_a_failing_model_fails_those_it_was_run_for(
    transformer: Transformer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(Transformer, "forward", broken)

    for error, type, message in (
        (RuntimeError("a bug"), RequestError, "RuntimeError: a bug"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemoryError, "freehold inspect"),
        (MemoryError(), OutOfMemoryError, "freehold inspect"),
    ):
        fail(error)
        (samples,) = run(engine, Request(prompt=[1, 2], max_tokens=3, n=2))
        assert [sample.finish for sample in samples] == ["error", "error"]
        for sample in samples:
            assert isinstance(sample.error, type)
            assert message in str(sample.error)
        monkeypatch.undo()
    assert tokens_of(engine, Request(prompt=[1, 2, 3], max_tokens=3, sampling=GREEDY)) == expected(
        transformer, [1, 2, 3], 3
    )


@needs_native
def test_ctrl_c_in_the_middle_of_the_model_loses_nothing(
    transformer: Transformer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(1, 150)[0]
    request_id = engine.submit(Request(prompt=prompt, max_tokens=12, sampling=GREEDY))
    forward, calls = Transformer.forward, 0

    def interrupted(self: Transformer, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(Transformer, "forward", interrupted)
    tokens: list[int] = []
    while engine.is_live(request_id):
        try:
            tokens += [token for output in engine.step() for token in output.step.tokens]
        except KeyboardInterrupt:
            engine.check_integrity()
    monkeypatch.undo()
    assert tokens == expected(transformer, prompt, 12)


def test_ctrl_c_between_the_lines_starts_anew(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    request_id = engine.submit(Request(prompt=[1, 2], max_tokens=12))
    monkeypatch.setattr(Engine, "_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    assert not engine.is_live(request_id)
    assert not any(engine.stats().pages_in_use)
    assert len(tokens_of(engine, Request(prompt=[1, 2], max_tokens=12))) == 12


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [VOCABULARY]}, "token id 200 is outside this model's vocabulary of 200"),
        ({"prompt": [-1]}, "token id -1 is outside"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": 2.0}, "got 2.0"),
        ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens must be an integer of at least 0, got -1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be between 0 and 20, got 21"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be between 0 and 20, got True"),
        ({"min_tokens": 11}, "min_tokens 11 is more than max_tokens 10"),
        ({"n": 0}, "n must be an integer of at least 1"),
        ({"priority": 1.5}, "priority must be an integer, got 1.5"),
        ({"boundaries": [0]}, r"boundaries must be between 1 and the prompt's 3 tokens, got \[0\]"),
        ({"boundaries": [4]}, "boundaries"),
        ({"boundaries": [1.5]}, "boundaries must be whole numbers"),
        ({"prompt": [1.5, 2]}, "prompt must be whole numbers"),
        ({"prompt": None}, "prompt must be whole numbers"),
        ({"deadline": 0}, "the deadline must be more than 0 seconds away, got 0"),
        ({"deadline": math.nan}, "got nan"),
        ({"stop_ids": frozenset({VOCABULARY})}, "stop_ids has 200"),
        ({"max_tokens": CONTEXT}, "3 tokens of prompt and 640 new ones are more than the context of 640"),
    ],
)
def test_requests_that_cannot_run(engine: Engine, given: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 10} | given
    with pytest.raises(UsageError, match=message):
        engine.submit(Request(**asked))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"presence_penalty": math.inf}, "presence_penalty must be a finite number, got inf"),
        ({"frequency_penalty": "2"}, "frequency_penalty must be a finite number, got '2'"),
        ({"logit_bias": {1: math.nan}}, "logit_bias maps token ids to finite numbers, got 1: nan"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, got 21"),
        ({"logprobs": True}, "logprobs"),
        ({"seed": 1.0}, "seed must be an integer of 64 bits, got 1.0"),
        ({"top_k": True}, "top_k"),
        ({"temperature": 10**400}, "temperature"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
        ({"logit_bias": {3: 10**400}}, "logit_bias"),
    ],
)
def test_sampling_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**given)


def test_biased_tokens_exist(engine: Engine) -> None:
    with pytest.raises(FreeholdError, match="logit_bias has 200, which is outside"):
        engine.submit(Request(prompt=[1], max_tokens=1, sampling=Sampling(logit_bias={VOCABULARY: 1.0})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_tokens": CONTEXT - 1}, "kv_tokens must be at least the context of 640"),
        ({"max_num_seqs": 0}, "max_num_seqs must be 1 or more, got 0"),
        ({"chunk": 0}, "chunk must be 1 or more"),
        ({"stretch": 0.5}, "stretch must be 1 or more"),
    ],
)
def test_engines_that_cannot_be(make_engine: MakeEngine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_engine(**options)
