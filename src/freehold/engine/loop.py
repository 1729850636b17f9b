"""Who drives the engine. `LocalEngine` does it on the threads that ask, for a person at a terminal and for scripts.
`AsyncEngine` does it on a thread of its own, for many clients of one event loop.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import chain

from freehold.engine.core import Engine, Output
from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.engine.request import Completion, Request, Step
from freehold.errors import ClosedError, FreeholdError, RequestError
from freehold.log import logger

_CLOSED = "the engine is closing down and takes no more requests"


class LocalEngine:
    """Steps run on the thread that waits for one; whoever steps takes everyone's tokens along."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._mail: dict[int, deque[Step]] = {}
        self._dropped: deque[int] = deque()  # requests that nobody reads any more

    def stream(self, request: Request) -> Iterator[Step]:
        """The request's steps as they come. It begins with the first `next`; closing the iterator ends it.

        Raises UsageError at once for a request that cannot run, and the request's own error where that is how it ends.
        """
        self._engine.check(request)
        return self._stream(request)

    def generate_batch(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Run them together; returns each one's samples in order.

        Raises UsageError, before anything runs, for one that cannot; what goes wrong later is in the completions.
        """
        for request in requests:
            self._engine.check(request)
        completions = [[Completion() for _ in range(request.n)] for request in requests]
        ids: dict[int, int] = {}
        with self._lock:
            for i, request in enumerate(requests):
                try:
                    request_id = self._engine.submit(request)
                except FreeholdError as error:
                    completions[i] = [Completion(finish="error", error=error) for _ in range(request.n)]
                else:
                    ids[request_id] = i
                    self._mail[request_id] = deque()
        try:
            for request_id, i in ids.items():
                for step in self._steps(request_id, requests[i].n):
                    completions[i][step.index].add(step)
        finally:
            for request_id in ids:
                self._forget(request_id)
        return completions

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check_integrity(self) -> None:
        """Raise AssertionError where the engine's books do not balance."""
        with self._lock:
            self._engine.check_integrity()

    def clear_prefixes(self) -> None:
        """Forget every cached prefix."""
        with self._lock:
            self._engine.clear_prefixes()

    def close(self) -> None:
        with self._lock:
            self._engine.close()

    def _stream(self, request: Request) -> Iterator[Step]:
        with self._lock:
            request_id = self._engine.submit(request)
            self._mail[request_id] = deque()
        try:
            for step in self._steps(request_id, request.n):
                if step.error is not None:
                    raise step.error
                yield step
        finally:
            self._forget(request_id)

    def _steps(self, request_id: int, num_samples: int) -> Iterator[Step]:
        mail = self._mail[request_id]
        while num_samples:
            if not mail:
                with self._lock:
                    self._sweep()
                    if not mail:
                        if not self._engine.is_live(request_id):
                            raise RequestError("the request was interrupted; send it again")
                        self._deliver(self._engine.step())
                continue
            step = mail.popleft()
            num_samples -= step.finish is not None
            yield step

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for request_id, step in outputs:
            if request_id in self._mail:
                self._mail[request_id].append(step)

    def _forget(self, request_id: int) -> None:
        """Now, or when whoever holds the lock comes to it: that may be this very thread, in whose midst the garbage
        collector finds a stream that was dropped."""
        self._dropped.append(request_id)
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
                _tend(self._engine)
            finally:
                self._lock.release()

    def _sweep(self) -> None:
        while self._dropped:
            request_id = self._dropped.popleft()
            self._engine.abort(request_id)
            self._mail.pop(request_id, None)


class AsyncEngine:
    """Runs the engine on a thread of its own until `drain` or `close`.

    A client that stops reading delays nobody: its steps wait for it, no more of them than it asked for tokens, and what
    has come of a sample in the meantime is read as one step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._mail: dict[int, _Mailbox] = {}
        self._closing = False  # no new requests
        self._stopping = False  # the thread ends
        self._idle = threading.Event()
        self._idle.set()
        self._ended = threading.Event()
        self.metrics = EngineMetrics(engine.stats)
        self._thread = threading.Thread(target=self._run, name="freehold-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain(0)

    def submit(self, request: Request) -> "Stream":
        """The request's steps. To be called, and read, on an event loop; `aclose` or forgetting it ends the request.

        Raises UsageError for a request that cannot run, ClosedError while or after draining. What goes wrong later is
        raised by the iterator.
        """
        if self._closing:
            raise ClosedError(_CLOSED)
        self._engine.check(request)
        mailbox = _Mailbox(asyncio.get_running_loop(), request.n)
        self._command(lambda: self._begin(request, mailbox))
        if self._ended.is_set():  # just now: nobody will read this command any more
            raise ClosedError(_CLOSED)
        return Stream(mailbox, request.n, self._abort)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def check_integrity(self) -> None:
        """Between two steps; raise AssertionError where the engine's books do not balance, or a request has no reader
        or a reader no request."""
        checked: Future[None] = Future()

        def check() -> None:
            try:
                self._check()
            except BaseException as error:  # noqa: BLE001 - it goes to who asked
                checked.set_exception(error)
            else:
                checked.set_result(None)

        self._command(check)
        if self._ended.is_set():  # nothing changes any more, and nobody may come to read this command
            self._check()
        else:
            await asyncio.wrap_future(checked)

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, let those that run come to their end, or end them after `timeout` seconds."""
        self._closing = True
        await asyncio.to_thread(self._wait_until_idle, timeout)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End every request with reason "abort", and the thread."""
        self._closing = True
        self._command(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wait_until_idle(self, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        settled = threading.Event()
        self._command(settled.set)  # what was submitted before has arrived
        while not settled.wait(0.02):
            if self._ended.is_set() or (end is not None and time.monotonic() >= end):
                return
        self._idle.wait(None if end is None else max(0.0, end - time.monotonic()))

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    def _abort(self, mailbox: "_Mailbox") -> None:
        self._command(lambda: self._drop(mailbox))

    # --- on the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._obey()
                if not self._stopping:
                    self._deliver(self._engine.step())
            except BaseException as error:  # noqa: BLE001 - a bug: every request hears of it, and the engine goes on
                logger.critical("the engine failed and starts anew", exc_info=error)
                self._fail_all(error)
        try:
            self._deliver([output for request_id in list(self._mail) for output in self._engine.abort(request_id)])
            self._engine.close()
        except BaseException as error:  # noqa: BLE001 - nobody is left waiting for it
            logger.critical("the engine failed while it closed", exc_info=error)
            self._fail_all(error)
        self._ended.set()
        self._idle.set()
        while not self._commands.empty():  # what came too late is told so
            self._commands.get()()

    def _obey(self) -> None:
        """Do what was asked for since the last step; wait for something where there is nothing else to do."""
        if not self._engine.has_work:
            self._idle.set()
            _tend(self._engine, unless=lambda: not self._commands.empty())
            command = self._commands.get()
            self._idle.clear()
            command()
        while not self._commands.empty():
            self._commands.get()()

    def _begin(self, request: Request, mailbox: "_Mailbox") -> None:
        if mailbox.closed:
            return
        if self._ended.is_set():
            _send_error(mailbox, ClosedError(_CLOSED))
            return
        try:
            mailbox.request_id = self._engine.submit(request)
            self._mail[mailbox.request_id] = mailbox
        except FreeholdError as error:
            _send_error(mailbox, error)
        except Exception as error:  # noqa: BLE001 - a bug, but nothing of this request has begun
            logger.error("a request could not be taken in", exc_info=error)
            _send_error(mailbox, RequestError(f"the engine failed: {type(error).__name__}: {error}"))

    def _check(self) -> None:
        self._engine.check_integrity()
        orphans = [request_id for request_id in self._mail if not self._engine.is_live(request_id)]
        assert not orphans, f"mailboxes of requests {orphans} were left behind"
        assert len(self._mail) == self._engine.num_live, "a request runs that nobody reads"

    def _drop(self, mailbox: "_Mailbox") -> None:
        if mailbox.request_id is not None and self._mail.pop(mailbox.request_id, None) is not None:
            self._deliver(self._engine.abort(mailbox.request_id))  # to the books alone

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, outputs: Sequence[Output]) -> None:
        letters: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Step]]] = {}
        for request_id, step in outputs:
            self.metrics.observe(step)
            mailbox = self._mail.get(request_id)
            if mailbox is None:
                continue
            letters.setdefault(mailbox.loop, []).append((mailbox, step))
            if step.finish is not None:
                mailbox.num_samples -= 1
                if not mailbox.num_samples:
                    del self._mail[request_id]
        for loop, steps in letters.items():
            if not _send(loop, steps):
                for mailbox, _ in steps:
                    self._drop(mailbox)

    def _fail_all(self, error: BaseException) -> None:
        typed = RequestError(f"the engine failed: {type(error).__name__}: {error}")
        for mailbox in self._mail.values():
            self.metrics.lose(mailbox.num_samples)
            _send_error(mailbox, typed)
        self._mail.clear()
        self._engine.reset()


def _tend(engine: Engine, unless: Callable[[], bool] = lambda: False) -> None:
    """Use an idle moment. What fails there is no request's fault, and none's trouble."""
    try:
        while not engine.has_work and not unless() and engine.tend():
            pass
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001 - see above
        logger.warning("a prefix could not be kept: %r", error)


class _Mailbox:
    """Where one request's steps wait for their reader, on the reader's event loop."""

    __slots__ = ("_arrival", "closed", "loop", "num_samples", "request_id", "steps")

    def __init__(self, loop: asyncio.AbstractEventLoop, num_samples: int) -> None:
        self.loop = loop
        self.request_id: int | None = None  # this and the next are the engine's thread's
        self.num_samples = num_samples  # that have not ended
        self.closed = False
        self.steps: deque[Step] = deque()
        self._arrival: asyncio.Future[None] | None = None

    def put(self, step: Step) -> None:
        if not self.closed:
            self.steps.append(step)
            self.wake()

    def wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def wait(self) -> None:
        """Until something has come, or nothing will."""
        if self._arrival is not None:
            raise RuntimeError("two tasks cannot read one stream")
        self._arrival = self.loop.create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    def take(self) -> Step:
        """The first step, joined with what has come of the same sample since, up to an error, which ends them all."""
        first = self.steps.popleft()
        if not self.steps or first.error is not None:
            return first
        same, others = [first], deque[Step]()
        while self.steps and self.steps[0].error is None:
            step = self.steps.popleft()
            (same if step.index == first.index else others).append(step)
        self.steps.extendleft(reversed(others))
        return _joined(same)


class Stream(AsyncIterator[Step]):
    """The reader's end of a mailbox. When it is closed, cancelled or forgotten, so is the request."""

    def __init__(self, mailbox: _Mailbox, num_samples: int, abort: Callable[[_Mailbox], None]) -> None:
        self._mailbox = mailbox
        self._open = num_samples
        self._abort = abort

    async def __anext__(self) -> Step:
        mailbox = self._mailbox
        while not mailbox.steps:
            if mailbox.closed or not self._open:
                raise StopAsyncIteration
            try:
                await mailbox.wait()
            except asyncio.CancelledError:
                self._close()
                raise
        step = mailbox.take()
        if step.finish is not None:
            self._open -= 1
        if step.error is not None:
            self._close()
            raise step.error
        return step

    async def aclose(self) -> None:
        """End the request; nothing more comes."""
        self._close()

    def __del__(self) -> None:
        self._leave()  # on whatever thread the garbage collector runs; nobody waits any more

    def _close(self) -> None:
        self._leave()
        self._mailbox.wake()

    def _leave(self) -> None:
        mailbox = self._mailbox
        if not mailbox.closed:
            mailbox.closed = True
            mailbox.steps.clear()
            if self._open:
                self._open = 0
                self._abort(mailbox)


def _joined(steps: Sequence[Step]) -> Step:
    """Of one sample, in order."""
    if len(steps) == 1:
        return steps[0]
    return replace(
        steps[-1],
        tokens=tuple(chain.from_iterable(step.tokens for step in steps)),
        logprobs=tuple(chain.from_iterable(step.logprobs or () for step in steps)) or None,
        prompt_logprobs=next((step.prompt_logprobs for step in steps if step.prompt_logprobs is not None), None),
    )


def _send_error(mailbox: _Mailbox, error: FreeholdError) -> None:
    _send(mailbox.loop, [(mailbox, Step(index=0, tokens=(), finish="error", error=error))])


def _send(loop: asyncio.AbstractEventLoop, steps: Sequence[tuple[_Mailbox, Step]]) -> bool:
    """Hand steps over; False where the loop is gone and nobody will read them."""

    def put() -> None:
        for mailbox, step in steps:
            mailbox.put(step)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        return False
    return True
