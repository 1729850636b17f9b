"""How many requests there may be. The gate only counts: waiting itself is the engine's, whose queue is fair."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from freehold.errors import UsageError
from freehold.serve.refusal import RefusedError, retry_after

_LONGEST_WAIT = 60.0
_DRAINING_SECONDS = 10.0


class Gate:
    """For one event loop. Up to `max_running` requests run and `max_waiting` more wait; `draining` lets none in.

    `admit` is held for as long as a request takes. How long others took tells those who are refused when to return.
    """

    def __init__(self, max_running: int, max_waiting: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if max_running < 1 or max_waiting < 0:
            raise UsageError(f"at least 1 request must run and 0 or more may wait, got {max_running} and {max_waiting}")
        self._max_running, self._max_waiting, self._clock = max_running, max_waiting, clock
        self._inside = 0
        self._usual_seconds = 1.0
        self.draining = False

    @property
    def inside(self) -> int:
        """Requests that run or wait."""
        return self._inside

    def drain(self) -> None:
        """Let nobody in any more."""
        self.draining = True

    def check_open(self) -> None:
        """Raises RefusedError with 503 once the server is about to stop."""
        if self.draining:
            raise RefusedError(
                503,
                "this server is about to stop and takes no more requests",
                code="draining",
                headers=[retry_after(_DRAINING_SECONDS), (b"connection", b"close")],
            )

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Raises RefusedError: 503 while draining, 429 where as many run and wait as may."""
        self.check_open()
        if self._inside >= self._max_running + self._max_waiting:
            seconds = self._usual_seconds * (self._max_waiting + 1) / self._max_running
            raise RefusedError(
                429,
                f"{self._max_running} requests run and {self._max_waiting} wait, which is as many as this server "
                "takes: try again later",
                code="queue_full",
                headers=[retry_after(min(seconds, _LONGEST_WAIT))],
            )
        self._inside += 1
        start = self._clock()
        try:
            yield
        finally:
            self._inside -= 1
            self._usual_seconds += 0.1 * (self._clock() - start - self._usual_seconds)
