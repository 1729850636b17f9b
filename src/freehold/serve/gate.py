"""How many requests are let in. Those that wait do so in the engine's own queue; here they are only counted."""

import time
from collections.abc import Callable

from freehold.serve.errors import ApiError
from freehold.serve.refusal import retry_after

_LONGEST_WAIT = 60.0
_DRAINING_SECONDS = 10.0


class Gate:
    """Room for so many samples, running and waiting together. For one event loop.

    How fast others have left tells those who are sent away when to come again.
    """

    def __init__(self, *, max_running: int, max_queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._room = max_running + max_queue
        self._taken = 0
        self._clock = clock
        self._left_at = clock()
        self._seconds_between = 1.0
        self.draining = False

    @property
    def taken(self) -> int:
        """Places of those that run and wait."""
        return self._taken

    def drain(self) -> None:
        """Let nobody in any more."""
        self.draining = True

    def check_open(self) -> None:
        """Raises a 503 where the server is closing."""
        if self.draining:
            raise ApiError(
                503, "the server is shutting down; try again later",
                code="draining", headers=retry_after(_DRAINING_SECONDS),
            )  # fmt: skip

    def enter(self, samples: int = 1) -> None:
        """Take places. Raises a 429 where there are not that many left, a 503 where the server is closing."""
        self.check_open()
        if self._taken + samples > self._room:
            missing = self._taken + samples - self._room
            raise ApiError(
                429, f"the server's queue is full with {self._taken} requests; try again later",
                code="queue_full", headers=retry_after(min(missing * self._seconds_between, _LONGEST_WAIT)),
            )  # fmt: skip
        if self._taken == 0:
            self._left_at = self._clock()  # that nobody left while nobody was there tells nothing
        self._taken += samples

    def leave(self, samples: int = 1) -> None:
        if samples:
            now = self._clock()
            self._seconds_between += 0.1 * ((now - self._left_at) / samples - self._seconds_between)
            self._left_at = now
        self._taken -= samples
