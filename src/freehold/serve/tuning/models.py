"""Models that came of fine-tuning, and their checkpoints: whose they are, and their adapters in the running model.

An adapter is read when somebody first asks for it, or when its job has ended, and stays until the server ends: the
model lets none go, since a request that waits may name it. A model that was deleted is nobody's from then on.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from freehold.serve.threads import Threads
from freehold.session.store.records import ModelRecord

AddAdapter = Callable[[str, Path], None]
"""Have the running model answer by another adapter, of this name, too. Raises FreeholdError where it cannot be read."""


class TunedModels:
    """Of one place. For one event loop; `known` and `may_use` may be asked from anywhere."""

    def __init__(self, root: Path, threads: Threads, add_adapter: AddAdapter | None) -> None:
        self._root, self._threads, self._add_adapter = root, threads, add_adapter
        self._records: dict[str, ModelRecord] = {}
        self._loaded: set[str] = set()
        self._deleted: set[str] = set()
        self._loading = asyncio.Lock()

    def take(self, records: Sequence[ModelRecord]) -> None:
        """These are there, as the store has it."""
        self._records |= {record.name: record for record in records}

    def of(self, owner: str) -> list[ModelRecord]:
        """An owner's models without checkpoints, the oldest first."""
        return [record for record in self._records.values() if record.owner == owner and record.step is None]

    def find(self, name: str, owner: str) -> ModelRecord | None:
        """An owner's model or checkpoint of this name."""
        record = self._records.get(name)
        return record if record is not None and record.owner == owner else None

    def is_tuned(self, name: str) -> bool:
        """Whether an adapter of this name was made here, by whomever; else it is the operator's, and everybody's."""
        return name in self._records or name in self._deleted

    def folder(self, record: ModelRecord) -> Path:
        return self._root / str(record.model["folder"])

    async def load(self, name: str, folder: Path | None = None) -> None:
        """Have it answer. Raises FreeholdError where its adapter cannot be read."""
        if self._add_adapter is None:
            return
        async with self._loading:
            if name not in self._loaded:
                await self._threads.run(self._add_adapter, name, folder or self.folder(self._records[name]))
                self._loaded.add(name)

    def delete(self, name: str) -> None:
        """Nobody's any more."""
        if self._records.pop(name, None) is not None:
            self._deleted.add(name)
