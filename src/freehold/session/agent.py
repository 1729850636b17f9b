"""A turn with tools for who has no event loop: `Model.chat` with functions of the caller's.

The loop is session.turn's, on an event loop of its own that lives for one answer; the engine runs on the thread that
waits for it. Called from within a running event loop, as in a notebook, the answer is made on another thread.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from freehold.engine.loop import LocalEngine
from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.engine.request import Request, Step
from freehold.errors import UsageError
from freehold.session.generation import Ask, SampleDone
from freehold.session.served import Served
from freehold.session.toolbox import Toolbox
from freehold.session.turn import TurnLimits, prepare
from freehold.tools.base import FunctionTools, Tool
from freehold.tools.functions import FunctionToolset


def answer(served: Served, ask: Ask, tools: Sequence[Any], limits: TurnLimits | None = None) -> SampleDone:
    """What becomes of a turn that may use these tools: functions, and tools as they are. Raises as turn.prepare does,
    and RequestError where the model fails."""
    for tool in tools:
        if not (_is_function(tool) or hasattr(tool, "namespace") or isinstance(tool, FunctionTools)):
            raise UsageError(
                f"a tool is a function, a tool of freehold.tools or a dict as in OpenAI's API, got {tool!r:.80}"
            )
    functions = [tool for tool in tools if _is_function(tool)]
    whole: list[Tool | FunctionTools] = [tool for tool in tools if not _is_function(tool)]
    if functions:
        whole.append(FunctionToolset(functions))
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_answer(served, ask, whole, limits))
    return _on_another_thread(_answer(served, ask, whole, limits))


def _on_another_thread(turn: Coroutine[Any, Any, SampleDone]) -> SampleDone:
    """An interrupt of this thread ends it there."""
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def run() -> SampleDone:
        task = asyncio.current_task()
        assert task is not None
        begun.set_result((asyncio.get_running_loop(), task))
        return await turn

    with ThreadPoolExecutor(1, thread_name_prefix="freehold-turn") as elsewhere:
        done = elsewhere.submit(asyncio.run, run())
        try:
            return done.result()
        except BaseException:
            if not done.done():
                loop, task = begun.result()
                with suppress(RuntimeError):  # it has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
            raise


def _is_function(tool: Any) -> bool:
    return isinstance(tool, Callable) and not hasattr(tool, "open")  # type: ignore[arg-type]


async def _answer(
    served: Served, ask: Ask, tools: Sequence[Tool | FunctionTools], limits: TurnLimits | None
) -> SampleDone:
    toolbox = await Toolbox.open(tools)
    try:
        turn = await prepare(served, ask, toolbox, limits=limits)
        async for batch in turn.events(served.runner):
            for event in batch:
                if isinstance(event, SampleDone):
                    return event
    finally:
        await toolbox.aclose()
    raise AssertionError("a turn ends with its sample")


class LocalRunner:
    """A local engine as served.AsyncRunner. While it computes, nothing else on the event loop runs."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.metrics = EngineMetrics(engine.stats)

    def submit(self, request: Request) -> "_Steps":
        return _Steps(self._engine.stream(request))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def drain(self, timeout: float | None = None) -> None:
        """Nothing runs while nobody waits for it."""


class _Steps:
    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps

    def __aiter__(self) -> "_Steps":
        return self

    async def __anext__(self) -> Step:
        await asyncio.sleep(0)  # others have their turn
        step = next(self._steps, None)
        if step is None:
            raise StopAsyncIteration
        return step

    async def aclose(self) -> None:
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()
