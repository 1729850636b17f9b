"""What hosted tools keep for clients between requests: a Python kernel with its files, pages that the browser has open.

A `Container` holds a session of each tool that its conversation has used, each opened by the first call. A turn has a
`Lease` of one: two turns never use a container at once, the second waits with its first call. What nobody has used for
a while is closed, and where there are too many the one that has been idle for longest. A container is its owner's
alone: for everybody else there is none of that name. Nothing here survives the process.
"""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from freehold.errors import FreeholdError, NotFoundError
from freehold.formats.conversation import Tool as Function
from freehold.formats.conversation import ToolNamespace
from freehold.log import logger
from freehold.tools import base
from freehold.tools.base import Citation, FunctionTools, ToolError, ToolResult, ToolSession

_MAX_REMEMBERED = 4 << 20
"""Characters of results that a container holds for clients who keep their items themselves."""


class Calls:
    """All calls of hosted tools that are being carried out, so that a server that stops can end them."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[ToolResult]] = set()
        self._stopped = False

    async def run(self, call: Coroutine[Any, Any, ToolResult]) -> ToolResult:
        """Its result. Raises ToolError where the server stops."""
        if self._stopped:
            call.close()
            raise ToolError("the server is shutting down")
        task = asyncio.ensure_future(call)
        self._running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            waiting = asyncio.current_task()
            if waiting is None or waiting.cancelling():
                raise
            raise ToolError("the server is shutting down") from None
        finally:
            self._running.discard(task)

    async def stop(self) -> None:
        """End those that run, and let none begin."""
        self._stopped = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


class Container:
    """One conversation's sessions. Made by `Containers`."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.id = f"cntr_{secrets.token_hex(24)}"
        self.num_leases = 0
        self.idle_since = 0.0
        self.is_held = False
        self.freed = asyncio.Event()
        self.closing: asyncio.TimerHandle | None = None
        self.sessions: dict[str, ToolSession] = {}
        self._remembered: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self._num_remembered = 0

    async def session(self, key: str, tool: base.Tool) -> ToolSession:
        """Raises ToolError where it cannot be opened."""
        if key not in self.sessions:
            try:
                self.sessions[key] = await tool.open()
            except FreeholdError as error:  # which may name places on this machine
                logger.warning("the tool %s cannot be opened: %s", tool.namespace.name, error)
                raise ToolError("the tool is not to be had now; answer without it") from None
        return self.sessions[key]

    def remember(self, name: str, said: Mapping[str, Any]) -> None:
        """Keep what a call of this item's id said."""
        self._remembered[name] = said
        self._num_remembered += len(str(said))
        while self._num_remembered > _MAX_REMEMBERED:
            self._num_remembered -= len(str(self._remembered.popitem(last=False)[1]))

    def recall(self, name: str) -> Mapping[str, Any] | None:
        return self._remembered.get(name)

    async def aclose(self) -> None:
        sessions = [*self.sessions.values()]
        self.sessions.clear()
        for outcome in await asyncio.gather(*(session.aclose() for session in sessions), return_exceptions=True):
            if isinstance(outcome, BaseException):
                logger.warning("a tool could not be closed: %s", outcome)


class Containers:
    """All that there are. For one event loop. Where there are more than `most`, those that nobody uses go, the one that
    has been idle for longest first."""

    def __init__(
        self, *, idle_seconds: float = 1200.0, most: int = 32, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.calls = Calls()
        self._idle_seconds = idle_seconds
        self._most = most
        self._clock = clock
        self._by_id: dict[str, Container] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def lease(self, owner: str, *, exact: str | None = None, wanted: str | None = None) -> "Lease":
        """A turn's use of a container: of `exact`ly this one, which it may have to wait for; of the one that is
        `wanted`, where it is there and nobody uses it; or else of a new one. Raises NotFoundError for the first."""
        container = self._by_id.get(exact or wanted or "")
        if container is not None and container.owner != owner:
            container = None
        if exact is not None and container is None:
            raise NotFoundError(
                f"there is no container {exact[:64]!r}; it was closed after it had not been used for a while, or was "
                "never here: send {'type': 'auto'} for a new one"
            )
        if container is None or (exact is None and container.num_leases):
            container = Container(owner)
            self._by_id[container.id] = container
        lease = Lease(self, container)
        self._make_room()
        return lease

    def recall(self, owner: str, name: str) -> Mapping[str, Any] | None:
        """What a call with this item's id said, as long as its container is there."""
        there = [*self._by_id.values()]  # at once: this may be another thread
        found = (container.recall(name) for container in there if container.owner == owner)
        return next((said for said in found if said is not None), None)

    def leased(self, container: Container) -> None:
        """For leases: somebody uses it now."""
        container.num_leases += 1
        if container.closing is not None:
            container.closing.cancel()
            container.closing = None

    def left(self, container: Container) -> None:
        """For leases: somebody does not any more."""
        container.num_leases -= 1
        if container.num_leases:
            return
        container.idle_since = self._clock()
        if not container.sessions:
            self._drop(container)  # nothing was called
        else:
            loop = asyncio.get_running_loop()
            container.closing = loop.call_later(self._idle_seconds, self._drop, container)
            self._make_room()

    def _make_room(self) -> None:
        idle = [each for each in [*self._by_id.values()] if not each.num_leases]
        idle.sort(key=lambda each: each.idle_since)
        for container in idle[: max(0, len(self._by_id) - self._most)]:
            self._drop(container)

    def _drop(self, container: Container) -> None:
        self._by_id.pop(container.id, None)
        if container.closing is not None:
            container.closing.cancel()
        if container.sessions:
            task = asyncio.get_running_loop().create_task(container.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """End all calls, and close all that there is."""
        await self.calls.stop()
        for container in [*self._by_id.values()]:
            self._drop(container)
        await asyncio.gather(*self._closing)


class Lease:
    """One turn's use of a container, until it is released or forgotten."""

    def __init__(self, containers: Containers, container: Container) -> None:
        """Made by `Containers.lease`."""
        self.container = container
        self._containers = containers
        self._loop = asyncio.get_running_loop()
        self._holds = False
        self._is_over = False
        containers.leased(container)
        if not container.is_held:
            container.is_held = self._holds = True

    @property
    def id(self) -> str:
        return self.container.id

    def tool(self, key: str, tool: base.Tool) -> base.Tool:
        """The tool with the container's own session of it, known there as `key`, which outlives the turn."""
        return _Kept(self, key, tool)

    async def call(self, key: str, tool: base.Tool, name: str, arguments: str) -> ToolResult:
        """For its tools: wait until nobody else uses the container, and call."""
        while not self._holds:
            if not self.container.is_held:
                self.container.is_held = self._holds = True
            else:
                self.container.freed.clear()
                await self.container.freed.wait()
        session = await self.container.session(key, tool)
        return await session.call(name, arguments)

    def release(self) -> None:
        """The turn is over. On the loop that it was taken on."""
        if not self._is_over:
            self._is_over = True
            _release(self._containers, self.container, self._holds)

    def __del__(self) -> None:
        if not self._is_over and not self._loop.is_closed():  # wherever the last reference was dropped
            self._loop.call_soon_threadsafe(_release, self._containers, self.container, self._holds)


def _release(containers: Containers, container: Container, holds: bool) -> None:
    if holds:
        container.is_held = False
        container.freed.set()
    containers.left(container)


class _Kept:
    def __init__(self, lease: Lease, key: str, tool: base.Tool) -> None:
        self._lease, self._key, self._tool = lease, key, tool

    @property
    def namespace(self) -> ToolNamespace:
        return self._tool.namespace

    async def open(self) -> ToolSession:
        return _KeptSession(self._lease, self._key, self._tool)


class _KeptSession:
    """For one turn: closing it leaves the container's session as it is."""

    def __init__(self, lease: Lease, key: str, tool: base.Tool) -> None:
        self._lease, self._key, self._tool = lease, key, tool

    async def call(self, name: str, arguments: str) -> ToolResult:
        calls = self._lease._containers.calls
        return await calls.run(self._lease.call(self._key, self._tool, name, arguments))

    def citations(self, answer: str) -> Sequence[Citation]:
        session = self._lease.container.sessions.get(self._key)
        return () if session is None else session.citations(answer)

    async def aclose(self) -> None:
        pass


class Stoppable:
    """Functions whose calls end when the server stops; they keep nothing for a conversation."""

    def __init__(self, calls: Calls, functions: tuple[Function, ...], tools: FunctionTools, prefix: str = "") -> None:
        """Those `functions` of the `tools`, which know them without the prefix."""
        self.functions = functions
        self._calls, self._tools, self._prefix = calls, tools, prefix

    async def open(self) -> ToolSession:
        return _StoppableSession(self._calls, await self._tools.open(), self._prefix)


class _StoppableSession:
    def __init__(self, calls: Calls, session: ToolSession, prefix: str) -> None:
        self._calls, self._session, self._prefix = calls, session, prefix

    async def call(self, name: str, arguments: str) -> ToolResult:
        name = name.removeprefix("functions.").removeprefix(self._prefix)
        return await self._calls.run(self._session.call(name, arguments))

    def citations(self, answer: str) -> Sequence[Citation]:
        return ()

    async def aclose(self) -> None:
        await self._session.aclose()
