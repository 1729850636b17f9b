"""A model that answers many at once: what a server and the agent loop need to know of one.

`Served` joins how a model is asked (prompting) with who runs its requests: the engine on its own thread, or a script
(freehold.session.scripted).
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.engine.request import Request, Step, check_adapter
from freehold.errors import CheckpointError
from freehold.formats.chat import HarmonyFormat
from freehold.formats.guidance import prepare
from freehold.log import NOTICE, logger
from freehold.session.prompting import Prompting

if TYPE_CHECKING:
    from freehold.session.model import Model


class Steps(Protocol):
    """One request's steps, to be read with `async for`. `aclose` ends it, wherever it is."""

    def __aiter__(self) -> AsyncIterator[Step]: ...

    async def __anext__(self) -> Step: ...

    async def aclose(self) -> None: ...


class AsyncRunner(Protocol):
    """Who runs requests; engine.loop.AsyncEngine is one."""

    metrics: EngineMetrics

    def submit(self, request: Request) -> Steps:
        """Begin. Raises UsageError for a request that cannot run, ClosedError while or after draining."""

    def stats(self) -> EngineStats: ...

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, let those that run come to their end, or end them after `timeout` seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """`name` is the model's own. `harmony` decides for or against Harmony where that is not left to the model's
    template; with `grammar`, replies are always well-formed. `adapter` is the one that it answers with, and `hold` what
    keeps it there: who asks has it until the answer is complete. `add_adapter` gives the running model one more, by a
    name and from a folder, `remove_adapter` takes one away; None for what can have none. `harmony_of` is what an
    adapter was trained to speak, where something says so."""

    name: str
    prompting: Prompting
    runner: AsyncRunner
    harmony: bool | None = None
    grammar: bool = True
    adapter: str | None = None
    hold: object | None = None
    add_adapter: Callable[[str, Path], None] | None = None
    remove_adapter: Callable[[str], None] | None = None
    harmony_of: Callable[[str], bool | None] = lambda name: None

    def with_adapter(self, name: str, hold: object | None = None) -> "Served":
        """The same model with one of its adapters, which speaks as it was trained to where nobody has decided. Raises
        UsageError for one that it does not have."""
        check_adapter(name, self.prompting.adapters)
        harmony = self.harmony_of(name) if self.harmony is None else self.harmony
        return replace(self, adapter=name, hold=hold, harmony=harmony)

    @property
    def speaks_harmony(self) -> bool:
        """Whether its turns have Harmony's structure: reasoning, calls, an answer. Raises CheckpointError where nothing
        says how it chats."""
        return isinstance(self.prompting.chat_format(harmony=self.harmony), HarmonyFormat)

    def warm_up(self) -> None:
        """Do now what the first request would wait for: reading a large vocabulary takes more than a second."""
        prepare(self.prompting.the_tokenizer())


def serve_model(model: "Model", *, name: str, harmony: bool | None = None, grammar: bool = True) -> Served:
    """A loaded model with an engine on a thread of its own, which runs until it is drained."""
    from freehold.engine.loop import AsyncEngine

    tuned_for_it = any(model.adapter_set.harmony(each) for each in model.adapters)
    if harmony and not tuned_for_it and not _was_made_for_harmony(model.prompting):
        logger.log(NOTICE, "%s was not made for Harmony: do not expect it to use tools well, or to reason", name)
    runner = AsyncEngine(model.new_engine())
    return Served(
        name=name,
        prompting=model.prompting,
        runner=runner,
        harmony=harmony,
        grammar=grammar,
        add_adapter=model.add_adapter,
        harmony_of=model.adapter_set.harmony,
        remove_adapter=model.remove_adapter,
    )


def _was_made_for_harmony(prompting: Prompting) -> bool:
    try:
        return isinstance(prompting.chat_format(), HarmonyFormat)
    except CheckpointError:  # nothing says how else it would chat
        return True
