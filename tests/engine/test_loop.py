"""Who drives the engine: threads at a terminal, and an event loop with clients of every kind."""

import asyncio
import contextlib
import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from freehold import machine
from freehold.engine.core import Engine
from freehold.engine.loop import AsyncEngine, LocalEngine
from freehold.engine.request import Request, Step
from freehold.errors import ClosedError, RequestError, UsageError
from freehold.kernels import backends
from freehold.model import simple
from freehold.model.transformer import Transformer
from freehold.sampling import Sampling
from tests.engine.conftest import MakeEngine
from tests.engine.test_engine import Spell, expected, prompts

GREEDY = Sampling(temperature=0.0)
needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")


def greedy(prompt: list[int], max_tokens: int = 12, **more: Any) -> Request:
    return Request(prompt=prompt, max_tokens=max_tokens, sampling=GREEDY, **more)


# --- on the caller's threads --------------------------------------------------------------------------------------


@needs_native
def test_batches(transformer: Transformer, engine: Engine) -> None:
    given = prompts(6)
    bad = Request(prompt=[1], max_tokens=2, constraint=lambda: Spell({1}, {2, 3}, fails="fill_mask"))
    requests = [greedy(prompt) for prompt in given] + [greedy([5, 6], n=2), bad]
    completions = LocalEngine(engine).generate_batch(requests)
    assert [samples[0].tokens for samples in completions[:6]] == [expected(transformer, p, 12) for p in given]
    assert [sample.tokens for sample in completions[6]] == [expected(transformer, [5, 6], 12)] * 2
    assert [sample.finish for sample in completions[7]] == ["error"]


@needs_native
def test_streams_side_by_side(transformer: Transformer, engine: Engine) -> None:
    local = LocalEngine(engine)
    given = prompts(3)
    streams = [local.stream(greedy(prompt)) for prompt in given]
    got: list[list[int]] = [[] for _ in given]
    for _ in range(12):  # the first `next` of each lets all begin
        for i, stream in enumerate(streams):
            step = next(stream, None)
            got[i] += step.tokens if step else ()
    assert got == [expected(transformer, prompt, 12) for prompt in given]
    assert not engine.has_work


def test_a_stream_that_is_dropped_ends_its_request(engine: Engine) -> None:
    local = LocalEngine(engine)
    stream = local.stream(greedy([1, 2, 3], 300))
    next(stream)
    assert engine.has_work
    del stream
    gc.collect()
    assert not engine.has_work
    never_read = local.stream(greedy([1, 2, 3], 300))
    assert not engine.has_work
    del never_read


def test_the_garbage_collector_may_drop_a_stream_at_any_moment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the same thread is in the middle of a step."""
    local = LocalEngine(engine)

    class Reader:
        def __init__(self) -> None:
            self.steps = local.stream(greedy([1, 2, 3], 300))
            self.itself = self  # a cycle, as readers often are

    reader = Reader()
    next(reader.steps)
    del reader
    forward = Transformer.forward

    def collecting(self: Transformer, *arguments: Any) -> Any:
        gc.collect()
        return forward(self, *arguments)

    monkeypatch.setattr(Transformer, "forward", collecting)
    assert sum(len(step.tokens) for step in local.stream(greedy([5], 5))) == 5
    assert not engine.has_work


def test_a_batch_with_a_request_that_cannot_begin(engine: Engine) -> None:
    def broken() -> Spell:
        raise ValueError("no such grammar")

    good, bad = LocalEngine(engine).generate_batch([greedy([1], 5), greedy([2], 5, constraint=broken, n=2)])
    assert len(good[0].tokens) == 5
    assert [sample.finish for sample in bad] == ["error", "error"]
    assert not engine.has_work


def test_tokens_before_an_error_are_read_first(engine: Engine) -> None:
    request = Request(prompt=[1], max_tokens=9, constraint=lambda: Spell({1}, {2}, {3, 4}, {5, 6}, fails="fill_mask"))
    got: list[int] = []
    with pytest.raises(RequestError, match="the grammar is broken"):
        for step in LocalEngine(engine).stream(request):
            got += step.tokens
    assert got == [1, 2]

    async def scenario(running: AsyncEngine) -> None:
        read: list[int] = []
        with pytest.raises(RequestError, match="the grammar is broken"):
            async for step in running.submit(request):
                read += step.tokens
        assert read == [1, 2]

    on_loop(engine, scenario)


def test_a_stream_raises_its_request_s_error(engine: Engine) -> None:
    request = Request(prompt=[1], max_tokens=5, constraint=lambda: Spell({1, 2}, fails="fill_mask"))
    with pytest.raises(RequestError, match="the grammar is broken"):
        list(LocalEngine(engine).stream(request))
    with pytest.raises(UsageError, match="token id 999"):
        LocalEngine(engine).stream(greedy([999]))
    with pytest.raises(UsageError, match="token id 999"):
        LocalEngine(engine).generate_batch([greedy([1]), greedy([999])])
    assert not engine.has_work


@needs_native
def test_several_threads(transformer: Transformer, engine: Engine) -> None:
    local = LocalEngine(engine)
    given = prompts(8)
    got: dict[int, list[int]] = {}

    def read(i: int) -> None:
        got[i] = [token for step in local.stream(greedy(given[i])) for token in step.tokens]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(8)] == [expected(transformer, prompt, 12) for prompt in given]


# --- on an event loop ---------------------------------------------------------------------------------------------


def on_loop(engine: Engine, scenario: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """Run a scenario; afterwards no request, page or thread of it is left."""

    async def main() -> None:
        async with AsyncEngine(engine) as running:
            await scenario(running)

    before = threading.active_count()
    asyncio.run(asyncio.wait_for(main(), 120))
    assert threading.active_count() <= before
    assert not engine.has_work
    engine.check_integrity()


async def tokens_of(steps: AsyncIterator[Step]) -> list[int]:
    return [token async for step in steps for token in step.tokens]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@needs_native
def test_many_clients(transformer: Transformer, engine: Engine) -> None:
    given = prompts(20)

    async def scenario(running: AsyncEngine) -> None:
        got = await asyncio.gather(*(tokens_of(running.submit(greedy(prompt))) for prompt in given))
        assert got == [expected(transformer, prompt, 12) for prompt in given]
        text = generate_latest(running.metrics.registry).decode()
        for line in (
            'freehold_finished_total{reason="length"} 20.0',
            "freehold_requests_total 20.0",
            "freehold_generated_tokens_total 240.0",
            "freehold_running 0.0",
            "freehold_time_to_first_token_seconds_count 20.0",
        ):
            assert line in text

    on_loop(engine, scenario)


@needs_native
def test_clients_that_leave_stall_or_break(transformer: Transformer, engine: Engine) -> None:
    """Nobody else notices, and nothing of them is left."""

    async def scenario(running: AsyncEngine) -> None:
        good = [asyncio.create_task(tokens_of(running.submit(greedy(prompt, 40)))) for prompt in prompts(4)]
        cancelled = asyncio.create_task(tokens_of(running.submit(greedy([1], 600))))
        closed = running.submit(greedy([2], 600))
        forgotten = running.submit(greedy([3], 600))
        stalled = running.submit(greedy([4], 30))
        broken = running.submit(
            Request(prompt=[5], max_tokens=30, constraint=lambda: Spell({1, 2}, {1, 2}, fails="accept"))
        )
        await anext(closed)
        await closed.aclose()
        assert [step async for step in closed] == []
        await anext(forgotten)
        del forgotten
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        with pytest.raises(RequestError, match="the grammar is broken"):
            await tokens_of(broken)
        got = await asyncio.gather(*good)
        assert got == [expected(transformer, prompt, 40) for prompt in prompts(4)]
        await until(lambda: engine.stats().running == 0)
        assert len(await tokens_of(stalled)) == 30  # it waited

    on_loop(engine, scenario)


@needs_native
def test_who_reads_late_reads_few_steps(transformer: Transformer, engine: Engine) -> None:
    """A request is done with its pages whether it is read or not; each token keeps its logprobs."""

    async def scenario(running: AsyncEngine) -> None:
        sampling = Sampling(temperature=0.0, logprobs=1)
        request = Request(prompt=[1, 2, 3], max_tokens=40, n=3, prompt_logprobs=1, sampling=sampling)
        late, alone = running.submit(request), running.submit(greedy([5, 6], 40))
        first = await anext(alone)
        await until(lambda: engine.num_live == 0)
        await running.check_integrity()
        await asyncio.sleep(0)  # the last steps arrive
        (rest,) = [step async for step in alone]
        assert [*first.tokens, *rest.tokens] == expected(transformer, [5, 6], 40)
        steps = [step async for step in late]
        assert [(step.index, step.finish, len(step.tokens)) for step in steps] == [(i, "length", 40) for i in range(3)]
        for step in steps:
            assert step.logprobs is not None
            assert [one.top[0][0] for one in step.logprobs] == list(step.tokens)
            assert (step.prompt_logprobs is not None) == (step.index == 0)

    on_loop(engine, scenario)


def test_an_error_comes_after_all_that_came_before_it(engine: Engine) -> None:
    """For whoever reads late too; it ends all samples, and is counted for each of them."""

    async def scenario(running: AsyncEngine) -> None:
        lengths = iter([9, 6, 9])

        def constraint() -> Spell:
            return Spell(*[{1, 2}] * (next(lengths) - 1), set(), {1})

        stream = running.submit(Request(prompt=[1], max_tokens=30, n=3, constraint=constraint))
        await until(lambda: engine.stats().generated_tokens > 0 and engine.num_live == 0)
        await asyncio.sleep(0)
        tokens = Counter[int]()
        with pytest.raises(RequestError, match="no token may come next"):
            async for step in stream:
                tokens[step.index] += len(step.tokens)
        assert tokens == {0: 7, 1: 5, 2: 6}  # the first is a step ahead: the others waited for its prompt
        assert [step async for step in stream] == []
        await running.check_integrity()
        assert 'freehold_finished_total{reason="error"} 3.0' in generate_latest(running.metrics.registry).decode()

    on_loop(engine, scenario)


def test_two_hundred_readers_of_whom_a_third_leave(make_engine: MakeEngine) -> None:
    """At any moment, by closing, by cancellation or without a word; while they wait in line too."""
    engine = make_engine(max_num_seqs=8, kv_tokens=2 * 640)
    source = random.Random(1)
    finished = 0

    async def client(running: AsyncEngine, i: int) -> None:
        nonlocal finished
        request = Request(prompt=[i] * source.randint(1, 90), max_tokens=12, n=source.choice([1, 1, 1, 3]))
        stream, leaves = running.submit(request), i % 3 == 0
        for _ in range(source.randint(0, 6) if leaves else 100):
            if await anext(stream, None) is None:
                break
        if leaves:
            way = source.randrange(3)
            if way == 0:
                await stream.aclose()
            elif way == 1:
                reading = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)
                reading.cancel()
                await asyncio.wait([reading])
            return
        finished += 1

    async def scenario(running: AsyncEngine) -> None:
        before = asyncio.all_tasks()
        await asyncio.gather(*(client(running, i) for i in range(200)))
        gc.collect()
        await until(lambda: engine.num_live == 0)
        await running.check_integrity()
        assert finished == 133
        assert asyncio.all_tasks() == before
        stats = running.stats()
        assert (stats.running, stats.waiting, max(stats.pages_held)) == (0, 0, 0)
        text = generate_latest(running.metrics.registry).decode()
        assert "freehold_kv_cache_usage_ratio 0.0" in text
        assert 'freehold_finished_total{reason="abort"}' in text
        assert 'freehold_finished_total{reason="error"}' not in text

    on_loop(engine, scenario)


def test_who_leaves_the_line_is_gone_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)

    async def scenario(running: AsyncEngine) -> None:
        first, waiting = running.submit(greedy([1], 600)), running.submit(greedy([2], 600))
        await anext(first)
        await until(lambda: engine.stats().waiting == 1)
        await waiting.aclose()
        await running.check_integrity()  # commands are obeyed in order
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (1, 0)
        assert 0 < max(stats.pages_held) < min(stats.pages)
        await first.aclose()
        await running.check_integrity()
        assert (engine.num_live, max(engine.stats().pages_held)) == (0, 0)

    on_loop(engine, scenario)


def test_one_stream_has_one_reader(engine: Engine) -> None:
    async def scenario(running: AsyncEngine) -> None:
        stream = running.submit(greedy([1], 30))
        both = await asyncio.gather(anext(stream), anext(stream), return_exceptions=True)
        assert [type(one) for one in both] == [Step, RuntimeError]
        assert await tokens_of(stream)  # it can still be read

    on_loop(engine, scenario)


def test_a_reader_whose_loop_is_gone(engine: Engine) -> None:
    running = AsyncEngine(engine)
    kept = []

    async def leave() -> None:
        kept.append(running.submit(greedy([1], 600)))
        await anext(kept[0])

    asyncio.run(leave())
    deadline = time.monotonic() + 60
    while engine.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.has_work
    assert engine.stats().generated_tokens < 300, "it was not read to its end"
    running.close()


def test_refused_before_anything_runs(engine: Engine) -> None:
    async def scenario(running: AsyncEngine) -> None:
        with pytest.raises(UsageError, match="token id 999"):
            running.submit(greedy([999]))
        with pytest.raises(RequestError, match="the constraint failed: LookupError"):
            await tokens_of(running.submit(greedy([1], constraint=lambda: Spell({1}, fails="forced"))))

    on_loop(engine, scenario)


def test_drain_lets_them_finish_and_takes_no_more(engine: Engine) -> None:
    async def scenario(running: AsyncEngine) -> None:
        tasks = [asyncio.create_task(tokens_of(running.submit(greedy([i], 30)))) for i in range(5)]
        await asyncio.sleep(0)
        await running.drain()
        assert [len(await task) for task in tasks] == [30] * 5
        with pytest.raises(ClosedError, match="takes no more requests"):
            running.submit(greedy([1]))

    on_loop(engine, scenario)


def test_what_comes_too_late_is_told_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(running: AsyncEngine) -> None:
        await asyncio.to_thread(running.close)
        monkeypatch.setattr(running, "_closing", False)  # as another thread may have seen it a moment ago
        with pytest.raises(ClosedError):
            await tokens_of(running.submit(greedy([1])))

    on_loop(engine, scenario)


def test_odd_salts(engine: Engine) -> None:
    async def scenario(running: AsyncEngine) -> None:
        assert len(await tokens_of(running.submit(greedy([1], cache_salt="\ud800")))) == 12

    on_loop(engine, scenario)


def test_drain_has_an_end(engine: Engine) -> None:
    async def scenario(running: AsyncEngine) -> None:
        steps = running.submit(greedy([1], 630))
        await anext(steps)
        await running.drain(0.0)
        rest = [step async for step in steps]
        assert rest[-1].finish == "abort"

    on_loop(engine, scenario)


def test_an_engine_that_breaks_tells_everyone_and_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(running: AsyncEngine) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug in the books")

        monkeypatch.setattr("freehold.engine.scheduler.Scheduler.schedule", broken)
        for _ in range(2):
            with pytest.raises(RequestError, match="the engine failed: ZeroDivisionError: a bug in the books"):
                await tokens_of(running.submit(greedy([1], n=2)))
        monkeypatch.undo()
        assert 'freehold_finished_total{reason="error"} 4.0' in generate_latest(running.metrics.registry).decode()
        for where in ("freehold.engine.core.Engine.submit", "freehold.engine.core.Engine.check_integrity"):
            monkeypatch.setattr(where, broken)
            with contextlib.suppress(RequestError):
                await tokens_of(running.submit(greedy([1])))
            monkeypatch.undo()
        assert len(await tokens_of(running.submit(greedy([1])))) == 12

    on_loop(engine, scenario)
    assert "the engine failed and starts anew" in caplog.text


TERMINATED = """
import asyncio, signal, sys
import freehold
from freehold.engine.loop import AsyncEngine
from freehold.engine.request import Request

async def main():
    model = freehold.load(sys.argv[1], device="cpu", dtype="float32")
    running = AsyncEngine(model.new_engine())
    ends = []

    async def client(i):
        async for step in running.submit(Request(prompt=[i + 1] * 20, max_tokens=200)):
            if step.finish:
                ends.append(step.finish)

    clients = [asyncio.create_task(client(i)) for i in range(12)]
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print("ready", flush=True)
    await stopping.wait()
    await running.drain(20)
    await asyncio.gather(*clients)
    running._engine.check_integrity()
    print(len(ends), set(ends), running.stats().running, flush=True)

asyncio.run(main())
"""


def test_sigterm_under_load(model_folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", TERMINATED, str(model_folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    assert (process.returncode, said) == (0, "12 {'length'} 0\n")


# --- in the long run ------------------------------------------------------------------------------------------------


def test_ten_thousand_short_requests_leave_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=32, kv_tokens=1280)
    source = random.Random(0)
    resident: list[int] = []

    async def one(running: AsyncEngine) -> None:
        request = Request(
            prompt=[source.randrange(200) for _ in range(source.randint(1, 12))],
            max_tokens=source.randint(1, 4),
            n=source.choice([1, 1, 1, 2]),
            cache=source.random() < 0.7,
            sampling=Sampling(temperature=source.choice([0.0, 1.0]), logprobs=source.choice([None, None, 2])),
        )
        steps = running.submit(request)
        if source.random() < 0.2:
            for _ in range(source.randint(0, 2)):
                if await anext(steps, None) is None:
                    break
            if source.random() < 0.5:
                await steps.aclose()
            return
        assert await tokens_of(steps)

    async def scenario(running: AsyncEngine) -> None:
        for count in (500, 9500):
            left = count

            async def client() -> None:
                nonlocal left
                while left > 0:
                    left -= 1
                    await one(running)

            await asyncio.gather(*(client() for _ in range(40)))
            gc.collect()
            resident.append(machine.process_status()["VmRSS"])

    on_loop(engine, scenario)
    assert engine.stats().requests > 9000  # the others were closed before the engine came to see them
    assert resident[1] <= resident[0] * 1.02
    engine.clear_prefixes()
    assert not any(engine.stats().pages_in_use)


def test_the_simple_loop_is_simple(transformer: Transformer) -> None:
    """The oracle itself: greedy, and stopping."""
    tokens = list(simple.generate(transformer, [1, 2, 3], max_tokens=9, sampling=GREEDY))
    assert len(tokens) == 9
    stopped = simple.generate(
        transformer, [1, 2, 3], max_tokens=9, sampling=GREEDY, stop_ids=frozenset({tokens[4]}), chunk=2
    )
    assert list(stopped) == tokens[: tokens.index(tokens[4]) + 1]
