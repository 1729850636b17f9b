"""Scheduler, pages and prefix cache together, under random arrivals, aborts, branches and evictions.

Instead of keys and values, pages hold what was written there: the tokens up to that position, and the adapter that
they were computed with. So it can be checked at every step that each query would see its own past, all of it in sight,
and nothing else, whatever was shared, copied, dropped, cached or computed again on the way.
"""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from freehold.engine.lookup import Lookup
from freehold.engine.pace import MOST_GUESSED, Pace
from freehold.engine.pages import HOLE, PageCopy, Pages
from freehold.engine.prefix import PrefixCache
from freehold.engine.request import Request
from freehold.engine.scheduler import Plan, Scheduler, Work
from freehold.engine.sequence import Sequence, new_sequences

PAGE = 4
CHUNK = 7
CONTEXT = 40


def least_pages(window: int | None) -> int:
    """That one sequence holds at the same time: a window and a chunk, each beginning in the middle of a page."""
    everything = math.ceil(CONTEXT / PAGE)
    return everything if window is None else min(everything, math.ceil((window - 1 + CHUNK) / PAGE) + 1)


class Memory:
    """What the pages hold: for each row the adapter and the tokens that lead up to it."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._rows: list[dict[tuple[int, int], tuple[str | None, tuple[int, ...]]]] = [{} for _ in pages.groups]

    def copy(self, copy: PageCopy) -> None:
        rows = self._rows[copy.group]
        for row in range(PAGE):
            rows.pop((copy.target, row), None)
            if (copy.source, row) in rows:
                rows[copy.target, row] = rows[copy.source, row]

    def run(self, work: Work) -> None:
        """Write the work's positions, then see what its queries see."""
        holding, tokens = work.sequence.holding, [*work.sequence.tokens[: work.start], *work.tokens]
        assert holding is not None
        adapter, stop = work.sequence.request.adapter, len(tokens)
        for rows, table in zip(self._rows, holding.tables, strict=True):
            for position in range(work.start, stop):
                rows[table[position // PAGE], position % PAGE] = adapter, tuple(tokens[: position + 1])
        for group, rows, table in zip(self._pages.groups, self._rows, holding.tables, strict=True):
            for query in range(work.start, stop):
                first = 0 if group.window is None else max(0, query - group.window + 1)
                for position in range(first, query + 1):
                    assert table[position // PAGE] != HOLE
                    written = rows[table[position // PAGE], position % PAGE]
                    assert written == (adapter, tuple(tokens[: position + 1]))


class GuessingPace(Pace):
    def worth_guessing(self, num_decoding: int, rate: float) -> int:
        return 3


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        windows=st.sampled_from([(None,), (3, None), (None, 9), (1, None), (PAGE, None), (6,)]),
        spare=st.integers(0, 30),
        slots=st.integers(1, 4),
        stretch=st.sampled_from([1.0, 2.0, 100.0]),
    )
    def start(self, windows: tuple[int | None, ...], spare: int, slots: int, stretch: float) -> None:
        self.pages = Pages(windows, [least_pages(window) + spare for window in windows], PAGE)
        self.prefixes = PrefixCache(self.pages)
        self.pace = GuessingPace(stretch, CHUNK)
        self.scheduler = Scheduler(self.pages, self.prefixes, self.pace, max_num_seqs=slots)
        self.slots = slots
        self.memory = Memory(self.pages)
        self.live: list[Sequence] = []
        self.count = 0
        self.texts: list[list[int]] = [[]]

    @rule(
        data=st.data(),
        fresh=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        max_tokens=st.integers(1, 8),
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
        cache=st.booleans(),
        guessing=st.booleans(),
        adapter=st.sampled_from([None, None, "a", "b"]),
    )
    def arrive(
        self,
        data: Any,
        fresh: list[int],
        max_tokens: int,
        n: int,
        priority: int,
        cache: bool,
        guessing: bool,
        adapter: str | None,
    ) -> None:
        """A new prompt, or one that goes on from somewhere in an earlier text."""
        text = data.draw(st.sampled_from(self.texts))
        kept = text[: data.draw(st.integers(0, len(text)))]
        prompt = (kept + fresh)[: CONTEXT - max_tokens]
        boundaries = data.draw(st.lists(st.integers(1, len(prompt)), max_size=3))
        request = Request(
            prompt=prompt,
            max_tokens=max_tokens,
            n=n,
            priority=priority,
            cache=cache,
            boundaries=boundaries,
            adapter=adapter,
        )
        samples = new_sequences(request, self.count, 0.0, adapter or "")
        for sample in samples:
            sample.lookup = Lookup() if guessing else None
        self.count += 1
        self.live += samples
        self.scheduler.add(samples[0])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def step(self, data: Any) -> None:
        plan = self.scheduler.schedule()
        assert plan.works, "somebody can always go on"
        self.check(plan)
        for copy in plan.copies:
            self.memory.copy(copy)
        for work in plan.works:
            self.memory.run(work)
        for work in plan.works:
            draws, sequence, right = work.draws, work.sequence, 0
            for guess in [*work.guesses, None] if draws else []:
                token = data.draw(st.integers(0, 2) if guess is None else st.sampled_from([guess, guess, 2]))
                sequence.append(token)
                if token != guess or sequence.finish is not None:
                    break
                right += 1
            self.scheduler.commit(work, right_guesses=right)
            if draws:
                for sibling in sequence.siblings:
                    self.scheduler.add(sibling)
                sequence.siblings = []
                if sequence.finish is not None:
                    self.texts.append(list(sequence.tokens))
                    self.scheduler.finish(sequence)
                    self.live.remove(sequence)
        self.pace.observe(plan.num_decoding, plan.num_prefill, data.draw(st.floats(0.001, 1.0)))

    def check(self, plan: Plan) -> None:
        sequences = [work.sequence for work in plan.works]
        assert len({id(sequence) for sequence in sequences}) == len(sequences) <= self.slots
        assert sum(work.count for work in plan.works) - plan.num_decoding <= CHUNK
        assert sum(len(work.guesses) for work in plan.works) <= MOST_GUESSED
        assert all(work.draws and work.sequence.lookup for work in plan.works if work.guesses)
        assert all(work.start == work.sequence.computed and work.count >= 1 for work in plan.works)
        assert all(work.start + work.count <= len(work.sequence.tokens) for work in plan.works)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        leader = data.draw(st.sampled_from([sequence for sequence in self.live if not self.held_back(sequence)]))
        for sequence in [leader, *leader.siblings]:
            self.scheduler.remove(sequence)
            self.live.remove(sequence)

    @precondition(lambda self: self.live and self.scheduler.running)
    @rule(data=st.data())
    def interrupt(self, data: Any) -> None:
        """A step is planned and does not come to pass."""
        plan = self.scheduler.schedule()
        for work in plan.works:
            self.scheduler.preempt(work.sequence)

    @rule()
    def evict(self) -> None:
        self.prefixes.evict()

    def held_back(self, sequence: Sequence) -> bool:
        return any(sequence in other.siblings for other in self.live)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pages"):
            return
        self.pages.check([*self.scheduler.holdings(), *(prefix.snapshot for prefix in self.prefixes)])
        queued = Counter(id(sequence) for sequence in (*self.scheduler.running, *self.scheduler.waiting))
        assert set(queued.values()) <= {1}
        assert set(queued) == {id(sequence) for sequence in self.live if not self.held_back(sequence)}
        assert [s.order for s in self.scheduler.running] == sorted(s.order for s in self.scheduler.running)
        assert [s.order for s in self.scheduler.waiting] == sorted(s.order for s in self.scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "pages"):
            return
        for sequence in self.live:
            if not self.held_back(sequence):
                self.scheduler.remove(sequence)
        self.prefixes.clear()
        assert all(group.pool.num_free == group.pool.count for group in self.pages.groups)


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestScheduler = SchedulerMachine.TestCase


# --- by hand ----------------------------------------------------------------------------------------------------


class Bench:
    """A scheduler whose steps are run at once, every sequence drawing token 1."""

    def __init__(self, *, count: int = 100, slots: int = 8, chunk: int = 64, window: int | None = None) -> None:
        windows = [None] if window is None else [window, None]
        self.pages = Pages(windows, [count] * len(windows), PAGE)
        self.prefixes = PrefixCache(self.pages)
        self.scheduler = Scheduler(self.pages, self.prefixes, Pace(1e9, chunk), max_num_seqs=slots)
        self.count = 0

    def add(self, prompt: list[int], max_tokens: int = 4, **more: Any) -> Sequence:
        (sequence,) = new_sequences(Request(prompt=prompt, max_tokens=max_tokens, **more), self.count, now=0.0)
        self.count += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[int, int, int]]:
        """Who ran: number, start and count."""
        plan = self.scheduler.schedule()
        ran = [(work.sequence.request_id, work.start, work.count) for work in plan.works]
        for work in plan.works:
            draws = work.draws
            self.scheduler.commit(work)
            if draws:
                work.sequence.append(1)
                if work.sequence.finish:
                    self.scheduler.finish(work.sequence)
        return ran

    def finish(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.step()


def test_a_long_prompt_is_read_in_chunks_beside_those_who_write() -> None:
    bench = Bench(chunk=10)
    bench.add([5] * 3, max_tokens=20)
    assert bench.step() == [(0, 0, 3)]
    bench.add([6] * 25, max_tokens=3)
    assert bench.step() == [(0, 3, 1), (1, 0, 10)]
    assert bench.step() == [(0, 4, 1), (1, 10, 10)]
    assert bench.step() == [(0, 5, 1), (1, 20, 5)]
    assert bench.step() == [(0, 6, 1), (1, 25, 1)]


def test_priority_then_arrival_and_nobody_overtakes() -> None:
    bench = Bench(slots=1)
    for i, priority in enumerate([1, 0, 1, -3]):
        bench.add([i + 5], max_tokens=1, priority=priority)
    assert [bench.step()[0][0] for _ in range(4)] == [3, 1, 0, 2]


def test_pages_that_run_out_push_the_last_one_out_and_nothing_is_lost() -> None:
    bench = Bench(count=4)  # 16 positions
    first, second = bench.add([5] * 6, max_tokens=9), bench.add([6] * 5, max_tokens=9)
    bench.finish()
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert first.tokens == [5] * 6 + [1] * 9
    assert second.tokens == [6] * 5 + [1] * 9


def test_who_waits_for_pages_is_not_overtaken_by_smaller_ones() -> None:
    bench = Bench(count=4)
    bench.add([5] * 9, max_tokens=3)
    bench.add([6] * 9, max_tokens=1)
    bench.add([7], max_tokens=1)
    assert [ran[0] for ran in bench.step()] == [0]
    bench.finish()
    assert bench.scheduler.running == []


@pytest.mark.parametrize("window", [None, 6])
def test_a_next_turn_computes_only_what_is_new(window: int | None) -> None:
    bench = Bench(window=window)
    turn = bench.add(list(range(20)), max_tokens=5)
    bench.finish()
    answer = turn.tokens[20:]
    bench.add(list(range(20)) + answer + [30, 31, 32], max_tokens=1)
    assert bench.step() == [(1, 24, 4)]  # the answer's last token was never read


@pytest.mark.parametrize("window", [None, 6])
def test_a_branch_goes_on_from_the_boundary_before_it(window: int | None) -> None:
    bench = Bench(window=window)
    bench.add(list(range(30)), max_tokens=2, boundaries=[9, 18])
    bench.finish()
    bench.add([*range(25), 99, 98], max_tokens=1, boundaries=[18])
    assert bench.step() == [(1, 18, 9)]
    bench.add([*range(12), 99], max_tokens=1)
    assert bench.step() == [(2, 9, 4)]


def test_the_same_prompt_again_computes_one_token() -> None:
    bench = Bench()
    for i in range(2):
        bench.add(list(range(20)), max_tokens=1)
        assert bench.step() == [(i, 19 * i, 20 - 19 * i)]


def test_salts_and_uncached_requests_share_nothing() -> None:
    bench = Bench()
    for more in ({"cache_salt": "a"}, {"cache_salt": "b"}, {"cache": False}, {}):
        bench.add(list(range(20)), max_tokens=1, **more)
        assert bench.step()[0][1:] == (0, 20)
    bench.add(list(range(20)), max_tokens=1, cache_salt="b")
    assert bench.step()[0][1:] == (19, 1)


def test_the_least_recently_used_prefix_goes_first() -> None:
    bench = Bench(count=12)  # 48 positions
    for start in (0, 100):
        bench.add(list(range(start, start + 15)), max_tokens=1)
        bench.finish()
    bench.add(list(range(15)), max_tokens=1)  # used again
    bench.finish()
    bench.add(list(range(200, 230)), max_tokens=1)  # wants more pages than are free
    bench.finish()
    bench.add(list(range(15)), max_tokens=1)
    assert bench.step()[0][1:] == (14, 1)
    bench.add(list(range(100, 115)), max_tokens=1)
    assert bench.step()[0][1:] == (0, 15)


def test_pace_keeps_to_the_stretch() -> None:
    pace = Pace(2.0, 512)
    assert pace.budget(0) == 512
    assert 0 < pace.budget(3) < 512  # a first guess
    for _ in range(50):
        pace.observe(3, 0, 0.010)
        count = pace.budget(3)
        pace.observe(3, count, 0.010 + count * 0.001)
    assert 0.010 + pace.budget(3) * 0.001 <= 0.020
    assert pace.budget(3) >= 7
    assert Pace(1.0, 512).budget(1) >= 1  # prompts must get in some day


def test_pace_tells_what_a_prompt_costs_from_what_its_tokens_cost() -> None:
    pace = Pace(2.0, 512)
    pace.observe(1, 0, 0.020)
    for depth in range(200):  # the further a long prompt has come in, the more there is to read for any token of it
        count = pace.budget(1)
        pace.observe(1, count, 0.020 + depth * 5e-5 + count * 0.001)
    assert pace.budget(1) == pytest.approx(6, abs=1)
    for _ in range(50):  # and the next one is short
        count = pace.budget(1)
        pace.observe(1, count, 0.020 + count * 0.001)
    assert pace.budget(1) == pytest.approx(15, abs=1)


def test_pace_lets_a_prompt_in_every_other_step_where_any_of_its_tokens_takes_too_long() -> None:
    pace = Pace(2.0, 512)
    pace.observe(1, 0, 0.010)
    seconds, counts = [], []
    for _ in range(200):
        counts.append(pace.budget(1))
        seconds.append(0.010 + (0.012 + counts[-1] * 0.001 if counts[-1] else 0.0))
        pace.observe(1, counts[-1], seconds[-1])
    assert 0.015 < sum(seconds[-20:]) / 20 < 0.020
    assert counts[-2:] in ([0, 3], [3, 0])
    assert Pace(1.0, 512).budget(1) >= 1  # prompts must get in some day


def test_pace_learns_under_steady_load_too() -> None:
    pace = Pace(2.0, 512)
    pace.observe(0, 512, 0.512)
    for streams in (3, 3, 4, 5, 3, 4):
        count = pace.budget(streams)
        pace.observe(streams, count, 0.010 * streams + count * 0.001)
    assert pace.budget(3) == pytest.approx(24, abs=2)
    assert pace.budget(5) == pytest.approx(40, abs=3)


def test_where_more_wait_than_write_they_get_more_of_the_time() -> None:
    pace = Pace(2.0, 512)
    pace.observe(2, 0, 0.010)
    pace.observe(2, 10, 0.020)
    one, as_many, three_times, very_many = (pace.budget(2, waiting) for waiting in (1, 2, 6, 200))
    assert 6 <= one == as_many <= 8
    assert 21 <= three_times <= 24
    assert 58 <= very_many <= 64
