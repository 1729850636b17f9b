"""Files in and out of the python tool: what the user gives goes into /mnt/data, what calls make comes back.

A file of the user's is never written over: what has the name of one that was there before comes back under another.
None comes back under a name with a dot in front: shells and other programs obey such files, and nobody sees them.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from freehold import disk
from freehold.errors import UsageError
from freehold.tools.base import ToolFile
from freehold.tools.python import PythonSession


class Exchange:
    """`given` are files and folders; what comes back lies in the first folder, or beside the first file."""

    def __init__(self, given: Sequence[Path]) -> None:
        """Raises UsageError for what is not there."""
        for path in given:
            if not path.exists():
                raise UsageError(f"--files: there is no {path}")
        self._given = given
        self._folder = next((path for path in given if path.is_dir()), given[0].absolute().parent)
        self._ours: dict[str, Path] = {}  # what came back, by its name in /mnt/data

    async def put(self, session: PythonSession) -> None:
        """Give a new conversation its files. Raises UsageError where one does not fit."""
        for path in self._given:
            inside = [file for file in sorted(path.iterdir()) if _is_plain(file)] if path.is_dir() else [path]
            for file in inside:
                await session.put(file)

    def keep(self, file: ToolFile) -> Path:
        """Where a file that a call made lies now. Raises DiskError."""
        place = self._ours.get(file.name) or self._free_place(file.path.name)
        with disk.new_file(place, replace=file.name in self._ours) as copy, file.path.open("rb") as source:
            shutil.copyfileobj(source, copy, 1 << 20)
        self._ours[file.name] = place
        return place

    def _free_place(self, name: str) -> Path:
        place, number = self._folder / name, 2
        while place.exists() or place.is_symlink():
            place = self._folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
            number += 1
        return place


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")
