"""Responses that are made while nobody waits for them: tasks of the server, which outlive the client that asked.

Events are given to those who follow only after they are in the store, so that whoever comes back after a crash never
knows more than the store does. Writing goes on while the next events come: what has come meanwhile is written together.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from freehold.serve.errors import ApiError, api_error
from freehold.serve.journal import log_failure
from freehold.serve.responses.output import Event
from freehold.serve.responses.stream import ResponseStream
from freehold.serve.sse import dumps
from freehold.serve.threads import Threads
from freehold.session.store.records import ResponseRecord
from freehold.session.store.store import Store
from freehold.session.turn import TurnEvent


class Batches(Protocol):
    """What a turn says, batch by batch; see freehold.serve.server.Reading."""

    def __aiter__(self) -> AsyncIterator[Sequence[TurnEvent]]: ...

    async def aclose(self) -> None: ...


Record = Callable[[dict[str, Any]], ResponseRecord]
Numbered = tuple[int, str]
"""An event of a stream: its sequence number, and its JSON."""


def numbered(events: Sequence[Event]) -> list[Numbered]:
    return [(event["sequence_number"], dumps(event)) for event in events]


class Background:
    """All responses that are being made in the background, by owner and id. For one event loop."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], Run] = {}

    async def begin(
        self, store: Store, threads: Threads, stream: ResponseStream, record: Record, *, keep_events: bool
    ) -> "Run":
        """Store a response that waits, so that its id can be told; `Run.start` sets it going."""
        run = Run(store, threads, stream, record, keep_events=keep_events, ended=self._forget)
        await run.queue()
        self._runs[run.key] = run
        return run

    def find(self, owner: str, name: str) -> "Run | None":
        return self._runs.get((owner, name))

    async def finish(self, timeout: float | None = None) -> None:
        """Wait for all of them, so many seconds at most; they end when the engine does, if not before."""
        if tasks := [run.task for run in self._runs.values() if run.task is not None]:
            await asyncio.wait(tasks, timeout=timeout)

    def _forget(self, run: "Run") -> None:
        self._runs.pop(run.key, None)


class Run:
    """One response in the background."""

    def __init__(
        self,
        store: Store,
        threads: Threads,
        stream: ResponseStream,
        record: Record,
        *,
        keep_events: bool,
        ended: Callable[["Run"], None],
    ) -> None:
        first = record(stream.stored)
        self.key = (first.owner, first.id)
        self.keeps_events = keep_events
        self.task: asyncio.Task[None] | None = None
        self._store = store
        self._threads = threads
        self._stream = stream
        self._record = record
        self._ended = ended
        self._reading: asyncio.Task[None] | None = None
        self._said: list[Event] = []  # and not written yet
        self._told: list[Numbered] = []
        self._is_over = False  # nothing more is said
        self._is_told = False  # and everybody has been told
        self._news = asyncio.Event()
        self._to_write = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more is said; the store may not know yet."""
        return self._is_over or self._stream.is_ended

    @property
    def response(self) -> dict[str, Any]:
        """As it is by now."""
        return self._stream.response

    @property
    def stored(self) -> dict[str, Any]:
        """The same with what is not for the wire."""
        return self._stream.stored

    async def queue(self) -> None:
        events = numbered(self._stream.created())
        await self._threads.run(self._put, events)
        self._tell(events)

    def start(self, batches: Batches) -> None:
        """Set it going; whatever becomes of it is stored."""
        self._reading = asyncio.create_task(self._read(batches))
        self.task = asyncio.create_task(self._run(self._reading, batches))

    async def cancel(self) -> None:
        """End it, and wait until that is stored."""
        if self._reading is not None:
            self._reading.cancel()
        if self.task is not None:
            await asyncio.shield(self.task)

    async def follow(self, after: int = -1) -> AsyncGenerator[list[Numbered], None]:
        """Its events with higher numbers, as they are stored, until the last."""
        place = 0
        while True:
            news = [event for event in self._told[place:] if event[0] > after]
            place = len(self._told)
            if news:
                yield news
            elif self._is_told:
                return
            else:
                await self._news.wait()

    async def _run(self, reading: asyncio.Task[None], batches: Batches) -> None:
        writing = asyncio.create_task(self._write())
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                reading.cancel()  # what cannot be stored need not be made
            await asyncio.wait((reading,))
            await batches.aclose()
        finally:
            self._is_over = True
            self._to_write.set()
            reading.cancel()  # where it is the server that stops
        self._judge(reading)
        try:
            await writing
            last = numbered([*self._said, *self._stream.ended()])
            await self._threads.run(self._put, last)
        except Exception as error:  # noqa: BLE001 - nobody waits for this task
            log_failure("a response could not be stored", error)
            self._stream.fail(ApiError(500, "the response could not be stored; send it again"))
            last = numbered([*self._said, *self._stream.ended()])
            await self._put_failure(last)
        self._is_told = True
        self._tell(last)
        self._ended(self)

    async def _put_failure(self, last: Sequence[Numbered]) -> None:
        """The store may have been busy for a moment; otherwise the next start will find what is not finished."""
        try:
            await self._threads.run(self._put, last)
        except Exception as error:  # noqa: BLE001 - it has been told of already
            log_failure("nor could its failure", error)

    def _judge(self, reading: asyncio.Task[None]) -> None:
        if reading.cancelled():
            self._stream.cancel()
        elif (error := reading.exception()) is not None:
            log_failure("a response in the background failed", error)
            self._stream.fail(api_error(error))

    async def _read(self, batches: Batches) -> None:
        async for batch in batches:
            said = self._stream.started() if self._stream.response["status"] == "queued" else []
            said += [told for event in batch for told in self._stream.feed(event)]
            if self.keeps_events:  # nobody else could ask for them
                self._said += said
                self._to_write.set()

    async def _write(self) -> None:
        """Whatever has been said while the last writing went on is written together; what comes last is left."""
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            if self._is_over:
                return
            if said := self._said:
                self._said = []
                events = numbered(said)
                await self._threads.run(self._store.append_events, self.key[1], self.key[0], events)
                self._tell(events)

    def _put(self, events: Sequence[Numbered]) -> None:
        self._store.put_response(self._record(self._stream.stored), events if self.keeps_events else ())

    def _tell(self, events: Sequence[Numbered]) -> None:
        if self.keeps_events:
            self._told += events
        news, self._news = self._news, asyncio.Event()
        news.set()
