"""Threads for one kind of work that blocks, so that it holds up no other kind.

asyncio has a few threads for everybody. A database that another process has locked would soon have all of them wait,
and with them requests that need no database.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Threads:
    """So many, each made when it is needed and idle afterwards."""

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `asyncio.to_thread` does, here."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args, **kwargs))
