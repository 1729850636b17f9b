"""Work that blocks, on threads of its own, told to stop when whoever waits for it is cancelled."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
Stopped = Callable[[], bool]


class Threads:
    """A few threads, started when they are needed. Work is given a function that says whether it is still wanted."""

    def __init__(self, name: str, count: int = 4) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=f"freehold-{name}")
        self._closing = threading.Event()

    async def run(self, work: Callable[[Stopped], _T]) -> _T:
        """What `work` returns or raises. Cancelled, it tells the thread and does not wait for it."""
        unwanted = threading.Event()
        future = self._pool.submit(work, lambda: unwanted.is_set() or self._closing.is_set())
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            unwanted.set()
            raise

    def close(self) -> None:
        """Stop all work, and wait until it has."""
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
