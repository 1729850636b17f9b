"""How many requests are let in. Those that wait do so in the engine's own queue; here they are only counted."""

from freehold.serve.errors import ApiError


class Gate:
    """Room for so many samples, running and waiting together. For one event loop."""

    def __init__(self, *, max_running: int, max_queue: int) -> None:
        self._room = max_running + max_queue
        self._taken = 0
        self.draining = False

    def enter(self, samples: int = 1) -> None:
        """Take places. Raises a 429 where there are not that many left, a 503 where the server is closing."""
        if self.draining:
            raise ApiError(503, "the server is shutting down; try again later", headers={"retry-after": "5"})
        if self._taken + samples > self._room:
            raise ApiError(
                429, f"the server's queue is full with {self._taken} requests; try again later",
                code="queue_full", headers={"retry-after": "1"},
            )  # fmt: skip
        self._taken += samples

    def leave(self, samples: int = 1) -> None:
        self._taken -= samples
