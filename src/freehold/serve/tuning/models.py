"""Models that came of fine-tuning, and their checkpoints: whose they are, and their adapters in the running model.

An adapter is read when somebody first asks for it, or when its job has ended. So many are held at once: where there is
no room for one more, the one goes that nobody is using and that was used longest ago. Who asks has a `hold` until the
answer is complete, and nothing that is held goes. A model that was deleted is nobody's from then on, and leaves memory
when the last answer by it is complete.
"""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from freehold.errors import ModelNotFoundError, OutOfMemoryError
from freehold.log import logger
from freehold.serve.threads import Threads
from freehold.session.store.records import ModelRecord

MOST_HELD = 16

AddAdapter = Callable[[str, Path], None]
"""Have the running model answer by another adapter, of this name, too. Raises FreeholdError where it cannot be read."""
RemoveAdapter = Callable[[str], None]
"""Take that away again. What runs with it goes on."""


class Hold:
    """As long as somebody has it, the model that it stands for stays."""

    __slots__ = ("__weakref__",)


class TunedModels:
    """Of one place. For one event loop; only `take`, `find`, `is_tuned` and `delete` may be called from elsewhere."""

    def __init__(
        self,
        root: Path,
        threads: Threads,
        add_adapter: AddAdapter | None,
        remove_adapter: RemoveAdapter | None = None,
        *,
        most_held: int = MOST_HELD,
    ) -> None:
        self._root, self._threads, self._most_held = root, threads, most_held
        self._add_adapter, self._remove_adapter = add_adapter, remove_adapter
        self._records: dict[str, ModelRecord] = {}  # never changed, only replaced: jobs are forgotten on a thread
        self._changing = threading.Lock()
        self._held: dict[str, weakref.ref[Hold]] = {}  # the one that was asked for last is the last
        self._deleted: set[str] = set()
        self._tuned: set[str] = set()  # all names that there ever were, also of what is only being loaded
        self._loading = asyncio.Lock()
        self._loads: set[asyncio.Task[Hold]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def take(self, records: Sequence[ModelRecord]) -> None:
        """These are there, as the store has it."""
        with self._changing:
            self._records = self._records | {record.name: record for record in records}
            self._tuned.update(record.name for record in records)

    def of(self, owner: str) -> list[ModelRecord]:
        """An owner's models without checkpoints, the oldest first."""
        return [record for record in self._records.values() if record.owner == owner and record.step is None]

    def find(self, name: str, owner: str) -> ModelRecord | None:
        """An owner's model or checkpoint of this name."""
        record = self._records.get(name)
        return record if record is not None and record.owner == owner else None

    def is_tuned(self, name: str) -> bool:
        """Whether an adapter of this name was made here, by whomever; else it is the operator's, and everybody's."""
        return name in self._tuned

    def folder(self, record: ModelRecord) -> Path:
        return self._root / str(record.model["folder"])

    def folder_of(self, name: str) -> Path:
        """Raises ModelNotFoundError."""
        if (record := self._records.get(name)) is None:
            raise ModelNotFoundError(f"there is no model {name!r} any more: it was deleted meanwhile")
        return self.folder(record)

    async def load(self, name: str, folder: Path | None = None) -> Hold | None:
        """Have it answer, at least for as long as what is returned is kept. Raises FreeholdError where its adapter
        cannot be read, OutOfMemoryError where there is no room for it now."""
        if self._add_adapter is None:
            return None
        self._loop = asyncio.get_running_loop()
        self._tuned.add(name)  # before it is there: at no time is it the operator's, and everybody's
        # A client that goes away ends its wait, not the reading: a thread is at it, and has to be waited for.
        load = asyncio.create_task(self._load(self._add_adapter, name, folder or self.folder_of(name)))
        self._loads.add(load)
        load.add_done_callback(self._loaded)
        return await asyncio.shield(load)

    def delete(self, name: str) -> None:
        """Nobody's any more."""
        with self._changing:
            if name not in self._records:
                return
            self._deleted.add(name)
            self._records = {other: record for other, record in self._records.items() if other != name}
        self._soon_let_go()

    async def _load(self, add_adapter: AddAdapter, name: str, folder: Path) -> Hold:
        async with self._loading:
            known = self._held.pop(name, None)
            hold = None if known is None else known()
            if known is None:
                self._make_room()
                while True:
                    try:
                        await self._threads.run(add_adapter, name, folder)
                        break
                    except OutOfMemoryError:
                        if (idle := self._first_idle()) is None:
                            raise
                        self._let_go(idle)
            hold = hold or Hold()
            self._held[name] = weakref.ref(hold, lambda _: self._soon_let_go())
            return hold

    def _loaded(self, load: asyncio.Task[Hold]) -> None:
        self._loads.discard(load)
        if not load.cancelled():
            load.exception()  # whoever waits for it hears of it; it may be that nobody does

    def _idle(self) -> list[str]:
        return [name for name, hold in self._held.items() if hold() is None]

    def _first_idle(self) -> str | None:
        """Who goes first where there is no room."""
        idle = self._idle()
        if not idle:
            gc.collect()  # a request that failed may be held by nothing but its own error
            idle = self._idle()
        return idle[0] if idle else None

    def _make_room(self) -> None:
        while len(self._held) >= self._most_held:
            if (idle := self._first_idle()) is None:
                raise OutOfMemoryError(
                    f"{len(self._held)} fine-tuned models are being asked, and no more are held at once; try later"
                )
            self._let_go(idle)

    def _let_go(self, name: str) -> None:
        logger.info("the fine-tuned model %s leaves memory", name)
        del self._held[name]
        if self._remove_adapter is not None:
            self._remove_adapter(name)

    def _soon_let_go(self) -> None:
        """Deleted models that nobody uses any more. Called wherever a hold or a model ends, be it by the garbage
        collector on some thread."""
        if self._loop is not None and self._deleted:
            with suppress(RuntimeError):  # the loop has ended, and all goes with it
                self._loop.call_soon_threadsafe(self._let_deleted_go)

    def _let_deleted_go(self) -> None:
        for name in self._idle():
            if name in self._deleted:
                self._let_go(name)
