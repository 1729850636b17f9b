"""What all endpoints have in common: the model, the store, who is asking, and the way into the engine."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request

from freehold.errors import FreeholdError, UsageError
from freehold.log import logger
from freehold.serve.caller import Caller
from freehold.serve.errors import ApiError
from freehold.serve.gate import Gate
from freehold.serve.hosted import HostedTools
from freehold.serve.responses.background import Background
from freehold.serve.responses.seal import Sealer
from freehold.serve.settings import ServeSettings
from freehold.serve.threads import Threads
from freehold.serve.tuning.tuning import Tuning
from freehold.session.completion import TextAsk, prepare_text
from freehold.session.generation import Ask, Generation, SampleDone, prepare_generation
from freehold.session.served import AsyncRunner, Served
from freehold.session.store.records import ModelRecord
from freehold.session.store.store import Store
from freehold.session.toolbox import Toolbox
from freehold.session.turn import Turn, TurnLimits, prepare

_T = TypeVar("_T")
_Asked = TypeVar("_Asked", Ask, TextAsk)
_Event = TypeVar("_Event", covariant=True)
DEFAULT_NAME = "default"


class Events(Protocol[_Event]):
    """What a turn says, batch by batch. `aclose` ends it, wherever it is."""

    def __aiter__(self) -> AsyncIterator[Sequence[_Event]]: ...

    async def __anext__(self) -> Sequence[_Event]: ...

    async def aclose(self) -> None: ...


class Runnable(Protocol[_Event]):
    """What `Server.read` can read: a Generation, or a Turn with tools. The numbers are of what was done so far."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def events(self, runner: AsyncRunner) -> Events[_Event]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server's parts. Without a `store` nothing is kept. `sealer` seals what clients keep for it; `created` is when
    it began, in seconds since 1970; `tools` are those that it runs for its clients; `tuning` is how they have models
    fine-tuned, where that is switched on."""

    served: Served
    settings: ServeSettings
    gate: Gate
    store: Store | None = None
    sealer: Sealer = field(default_factory=Sealer)
    store_threads: Threads = field(default_factory=lambda: Threads("freehold-store", 4))
    background: Background = field(default_factory=Background)
    tools: HostedTools | None = None
    tuning: Tuning | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        taken = [name for name in self._base_names if self._adapter_of(name)]
        if taken:
            raise UsageError(
                f"{taken[0]!r} is what the adapter {self._adapter_of(taken[0])!r} goes by; rename one of them"
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """All that the model answers to, the name that it is listed under first; `name:adapter` of each adapter too.
        What clients have had fine-tuned is theirs, and not among them."""
        bases = self._base_names
        adapters = [name for name in self.served.prompting.adapters if not self._is_tuned(name)]
        return (*bases, *(f"{base}:{adapter}" for adapter in adapters for base in bases))

    @property
    def _base_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.settings.model_names, self.served.name, DEFAULT_NAME)))

    def _is_tuned(self, adapter: str) -> bool:
        return self.tuning is not None and self.tuning.models.is_tuned(adapter)

    def _adapter_of(self, name: str) -> str | None:
        """The operator's adapter that is meant."""
        base, _, adapter = name.rpartition(":")
        known = base in self._base_names and adapter in self.served.prompting.adapters
        return adapter if known and not self._is_tuned(adapter) else None

    def tuned_model(self, caller: Caller, name: str) -> ModelRecord | None:
        """What this caller had fine-tuned under this name, or one of its checkpoints."""
        base, _, tuned = name.rpartition(":")
        record = None if self.tuning is None else self.tuning.models.find(tuned, caller.owner)
        return record if record is not None and base in (*self._base_names, record.model["base"]) else None

    def check_model(self, name: str, caller: Caller) -> None:
        """Raise a 404 for a model that is not here, or is another caller's."""
        if name in self._base_names or self._adapter_of(name) is not None or self.tuned_model(caller, name) is not None:
            return
        known = ", ".join(self.model_names)
        message = f"The model '{name:.200}' does not exist here; this server has {known}."
        raise ApiError(404, message, param="model", code="model_not_found")

    def trained_from(self, name: str, caller: Caller) -> ModelRecord | None:
        """What training goes on from where it is asked to train this model: None is the model itself. Raises what
        `check_model` does, and a 400 for an adapter of the operator's."""
        self.check_model(name, caller)
        record = self.tuned_model(caller, name)
        if record is None and name not in self._base_names:
            base = self._base_names[0]
            message = f"'{name:.200}' was not fine-tuned here; name the model itself, {base!r}, or one that was."
            raise ApiError(400, message, param="model")
        return record

    async def named(self, name: str, caller: Caller) -> Served:
        """What answers to this name for this caller: the model, or the model with one of its adapters, which is read
        now where nobody has asked for it yet. Adapters speak as they were trained to: what a request means is asked of
        this, not of the model. Raises what `check_model` does, and a 503 where it cannot be read."""
        self.check_model(name, caller)
        tuned = self.tuned_model(caller, name)
        if tuned is None or self.tuning is None:
            adapter = self._adapter_of(name)
            return self.served if adapter is None else self.served.with_adapter(adapter)
        try:
            hold = await self.tuning.models.load(tuned.name)
            return self.served.with_adapter(tuned.name, hold)
        except FreeholdError as error:
            logger.warning("the fine-tuned model %s cannot be loaded: %s", tuned.name, error)
            message = f"The model '{name:.200}' cannot be loaded at the moment; the server's log says why."
            raise ApiError(503, message, param="model") from None

    def the_tuning(self) -> Tuning:
        """Raises a 404 where it is not switched on."""
        if self.tuning is None:
            message = "Fine-tuning is not switched on here: the server is started without --tuning."
            raise ApiError(404, message, code="tuning_is_off")
        return self.tuning

    async def turn(self, caller: Caller, served: Served, ask: Ask) -> Generation:
        """Ready to run, with the caller's own share of the prefix cache and the server's time limit. `served` is what
        `named` gave for this caller."""
        return await prepare_generation(served, self._of(caller, ask))

    def hosted(self, served: Served) -> HostedTools | None:
        """The tools that this model can use: none where it does not speak Harmony."""
        return self.tools if self.tools is not None and served.speaks_harmony else None

    async def turn_with_tools(
        self, caller: Caller, served: Served, ask: Ask, toolbox: Toolbox, limits: TurnLimits
    ) -> Turn:
        """The same with tools that the server runs."""
        return await prepare(served, self._of(caller, ask), toolbox, limits=limits)

    def recall(self, caller: Caller, name: str) -> Mapping[str, Any] | None:
        """What a hosted tool's call with this item's id said to this caller, where that is still known."""
        return None if self.tools is None else self.tools.containers.recall(caller.owner, name)

    async def stop(self) -> None:
        """End all that runs; what is asked next is refused."""
        await self.served.runner.drain(0)
        if self.tools is not None:
            await self.tools.stop()

    async def text(self, caller: Caller, served: Served, ask: TextAsk) -> Generation:
        """The same for a text without a conversation around it."""
        return await prepare_text(served, self._of(caller, ask))

    def _of(self, caller: Caller, ask: _Asked) -> _Asked:
        return replace(ask, cache_salt=caller.salt, deadline=self.settings.request_timeout)

    def check_room(self, samples: int, *, param: str) -> None:
        """Raise a 400 for more samples than could ever be let in together."""
        room = self.settings.max_running + self.settings.max_queue
        if samples > room:
            raise ApiError(
                400, f"{samples} answers at once are more than this server's {room}; ask for fewer", param=param
            )

    def read(
        self, caller: Caller, turn: Runnable[_Event], *, left: Callable[[], None] = lambda: None
    ) -> "Reading[_Event]":
        """Run a turn and read it; close or forget what this returns to end it. `left` is called when it is over, also
        where it does not begin.

        Raises, at once, a 429 where the queue is full and a 503 where the server is closing. What goes wrong later
        comes while it is read: a turn that ends for want of time, or because the server stops, is an error too.
        """
        try:
            self.gate.enter(turn.num_samples)
        except BaseException:
            left()
            raise
        return Reading(self, caller, turn, left)


class Reading(Generic[_Event]):
    """The events of a turn on their way to one caller, who is charged for the tokens; see `Server.read`."""

    def __init__(self, server: Server, caller: Caller, turn: Runnable[_Event], left: Callable[[], None]) -> None:
        self._server = server
        self._caller = caller
        self._left = left
        self._places = turn.num_samples  # from now on, whatever happens
        self._turn = turn
        self._num_charged = 0
        self._events = turn.events(server.served.runner)
        self._charge()

    def __aiter__(self) -> "Reading[_Event]":
        return self

    async def __anext__(self) -> Sequence[_Event]:
        try:
            batch = await anext(self._events)
        except BaseException:
            self._leave()
            raise
        self._charge()
        for event in batch:
            if isinstance(event, SampleDone):
                self._check_end(event)
        return batch

    async def aclose(self) -> None:
        """End it, wherever it is."""
        try:
            await self._events.aclose()
        finally:
            self._leave()

    def __del__(self) -> None:
        self._leave()

    def _charge(self) -> None:
        """For what was read and written since; also who leaves before the end has had it made."""
        so_far = self._turn.num_prompt_tokens + self._turn.num_tokens
        self._caller.charge(so_far - self._num_charged)
        self._num_charged = so_far

    def _leave(self) -> None:
        if self._places:
            self._charge()
            self._left()
        self._server.gate.leave(self._places)
        self._places = 0

    def _check_end(self, done: SampleDone) -> None:
        match done.end:
            case "deadline":
                seconds = self._server.settings.request_timeout
                message = f"the answer was not complete after {seconds:g} seconds; ask for less, or raise the limit"
                raise ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})
            case "abort":
                raise ApiError(503, "the server is shutting down; send the request again later")


async def whole(request: Request, work: Awaitable[_T]) -> _T:
    """The result of some work, which ends when the client goes away."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ApiError(499, "the client has gone away")
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
