"""The folder that the sandbox sees as /mnt/data, from the host's side.

All that lies in it was made by code that may be hostile: names of any bytes, links to anywhere, pipes that never end,
trees too deep for a path. So nothing here follows a link or a path of more than one name: folders are opened one by
one, relative to the one above, and only regular files are read. What is handed out are copies in a folder that the
sandbox does not see, so that a file cannot become a link between the look and the reading.
"""

import mimetypes
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from freehold.errors import DiskError, UsageError
from freehold.tools.base import ToolFile
from freehold.tools.python.limits import amount
from freehold.tools.python.output import plain

_MAX_DEPTH = 32
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Mark(NamedTuple):
    """What tells one state of an entry from another."""

    kind: int
    size: int
    inode: int
    changed_ns: int


class Contents(NamedTuple):
    """What lies in the drive: entries by path, bytes in all. `countless` says that not all of it was looked at."""

    entries: Mapping[tuple[str, ...], Mark]
    size: int
    countless: bool


class Drive:
    """`folder` is where it lies, `copies` where copies of its files go; both exist and are nobody else's."""

    def __init__(self, folder: Path, copies: Path, *, max_bytes: int, max_files: int, owner: int | None) -> None:
        self.folder = folder
        self._copies = copies
        self._handed_out: dict[tuple[str, ...], tuple[Path, int]] = {}  # folder and bytes of each copy, the latest last
        self._copied_bytes = 0
        self._numbers = count()
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._owner = owner
        self.device = folder.stat().st_dev

    def contents(self, *, most: int | None = None) -> Contents:
        """A look at all of it, up to that many entries."""
        most = self._max_files if most is None else most
        entries: dict[tuple[str, ...], Mark] = {}
        size = 0
        looks = 0  # not the entries: a name that comes and goes can be met any number of times
        countless = False
        folders: list[tuple[str, ...]] = [()]
        with _opened(self.folder) as top:
            while folders and not countless:
                path = folders.pop()
                try:
                    with _walked(top, path) as handle:
                        for name in _names(handle):
                            looks += 1
                            with suppress(FileNotFoundError):
                                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                                entries[*path, name] = _mark(status)
                                size += max(status.st_size, status.st_blocks * 512)
                                if stat.S_ISDIR(status.st_mode):
                                    folders.append((*path, name))
                            if looks > most or len(path) >= _MAX_DEPTH:
                                countless = True
                                break
                except PermissionError:  # a folder that its maker has closed could hide anything
                    countless = True
                except OSError:  # gone meanwhile, or a link by now
                    continue
        return Contents(entries, size, countless)

    def too_full(self, contents: Contents, deleted_bytes: int = 0) -> str | None:
        """What is wrong with how much lies there, or None."""
        if contents.size + deleted_bytes > self._max_bytes:
            return f"/mnt/data may hold {amount(self._max_bytes)} in all"
        if contents.countless:
            return f"/mnt/data may hold {self._max_files:,} files, in readable folders no more than {_MAX_DEPTH} deep"
        return None

    def _full_with(self, size: int) -> str | None:
        """What would be wrong if one more file lay there."""
        now = self.contents(most=self._max_files - 1)
        return self.too_full(now, size)

    def restore(self, before: Contents) -> None:
        """Remove what was not there, or was otherwise, when `before` was looked at. Nothing may run in the sandbox."""
        trash = self._copies / "removed"
        trash.mkdir(exist_ok=True)
        with _opened(self.folder) as top, _opened(trash) as bin_:
            moved = 0
            progress = True
            while progress:
                now = self.contents(most=2 * self._max_files)  # what is to stay is not more than half of it
                progress = False
                for path, mark in now.entries.items():
                    if before.entries.get(path) == mark or (stat.S_ISDIR(mark.kind) and path in before.entries):
                        continue
                    with suppress(FileNotFoundError), _walked(top, path[:-1]) as parent:
                        _move(path[-1], parent, str(moved), bin_)
                        moved += 1
                        progress = True
            if now.countless:  # what could not be looked at goes too, and all beside it
                for name in list(_names(top)):
                    _move(name, top, str(moved), bin_)
                    moved += 1
        remove_tree(trash)

    def put(self, source: Path, name: str | None = None) -> str:
        """Copy a file of the host in, under a name that is free; returns the name in /mnt/data.

        Raises UsageError if it is no file or does not fit, DiskError where it cannot be read or written.
        """
        wanted = source.name if name is None else name
        if wanted in ("", ".", "..") or "/" in wanted or "\0" in wanted:
            raise UsageError(f"{wanted!r} cannot be a file's name in /mnt/data: give one without slashes")
        try:
            with source.open("rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UsageError(f"{source} is not a file: give files one by one")
                if full := self._full_with(status.st_size):
                    raise UsageError(f"{source} has {amount(status.st_size)} and does not fit: {full}")
                with _opened(self.folder) as top:
                    name, handle = self._create(top, wanted)
                    with os.fdopen(handle, "wb") as target:
                        shutil.copyfileobj(file, target, 1 << 20)
        except OSError as error:
            raise DiskError(f"{source} cannot be copied into /mnt/data ({error.strerror}); check its path") from None
        return name

    def write(self, name: str, data: bytes) -> str:
        """Make a file; returns its name, which is another where that one is taken.

        Raises DiskError, also where it does not fit.
        """
        if full := self._full_with(len(data)):
            raise DiskError(f"{name} has {amount(len(data))} and does not fit: {full}")
        try:
            with _opened(self.folder) as top:
                name, handle = self._create(top, name)
                with os.fdopen(handle, "wb") as target:
                    target.write(data)
        except OSError as error:
            raise DiskError(f"{name} cannot be written into /mnt/data ({error.strerror})") from None
        return name

    def _create(self, top: int, wanted: str) -> tuple[str, int]:
        stem, suffix = Path(wanted).stem, Path(wanted).suffix
        for number in range(1, 10_000):
            name = wanted if number == 1 else f"{stem}-{number}{suffix}"
            with suppress(FileExistsError):
                handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=top)
                if self._owner is not None:
                    os.fchown(handle, self._owner, self._owner)
                return name, handle
        raise FileExistsError(0, "no name is free")

    def hand_out(self, paths: list[tuple[str, ...]]) -> tuple[ToolFile, ...]:
        """Copies of these files, for the user. What is no regular file any more is left out.

        The copies of earlier calls go when all together would be more than the drive may hold.
        """
        files = []
        with _opened(self.folder) as top:
            for path in paths:
                with suppress(OSError):
                    files.append(self._copied(top, path))
        return tuple(files)

    def _place(self, path: tuple[str, ...], size: int) -> Path:
        """A folder for a copy. Those of other files go, the oldest first, where all would be too much."""
        place, before = self._handed_out.pop(path, (self._copies / str(next(self._numbers)), 0))
        self._handed_out[path] = place, size
        self._copied_bytes += size - before
        while self._copied_bytes > self._max_bytes or len(self._handed_out) > self._max_files:
            oldest, before = self._handed_out.pop(next(iter(self._handed_out)))
            self._copied_bytes -= before
            remove_tree(oldest)
        place.mkdir(exist_ok=True)
        return place

    def _copied(self, top: int, path: tuple[str, ...]) -> ToolFile:
        name = shown(path)
        with _walked(top, path[:-1]) as parent:
            handle = os.open(path[-1], _OPEN_FILE, dir_fd=parent)
            with os.fdopen(handle, "rb") as source:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError("not a regular file")
                place = self._place(path, status.st_size)
                target = place / (safe_name(path[-1]) or "file")
                partial = place / ".partial"
                with partial.open("wb") as copy:
                    left = min(status.st_size, self._max_bytes)  # it may be growing
                    while left and (piece := source.read(min(left, 1 << 20))):
                        copy.write(piece)
                        left -= len(piece)
                partial.replace(target)
        media_type = mimetypes.guess_type(target.name)[0] or "application/octet-stream"
        return ToolFile(name=name, path=target, media_type=media_type)


def changed(before: Contents, after: Contents) -> list[tuple[str, ...]]:
    """Regular files that are new or other than before."""
    return sorted(
        path for path, mark in after.entries.items() if stat.S_ISREG(mark.kind) and before.entries.get(path) != mark
    )


def listing(contents: Contents, *, most: int = 50) -> str:
    """What lies in the drive, for the model."""
    lines = []
    for path, mark in sorted(contents.entries.items()):
        if not stat.S_ISDIR(mark.kind):
            what = amount(mark.size) if stat.S_ISREG(mark.kind) else _kind(mark.kind)
            lines.append(f"{shown(path)} ({what})")
    left = len(lines) - most
    return "\n".join(lines[:most] + ([f"… and {left} more"] if left > 0 else []))


def shown(path: tuple[str, ...]) -> str:
    """A path in the drive as text, whatever bytes its names have."""
    return plain("/".join(path)).replace("\n", "\\n").replace("\t", "\\t")


def safe_name(name: str) -> str:
    """A name that any program can be given: no control characters, no leading dash or dot, not too long."""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name).lstrip(".-")
    return Path(kept).stem[:60] + Path(kept).suffix[:20]


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, however deep and whatever its permissions; nothing runs in it any more.

    Folders in folders are moved up before they are emptied, so no path becomes long and nothing recurses.
    """
    with suppress(FileNotFoundError):
        folder.chmod(0o700)
        unused = f".{secrets.token_hex(8)}-"
        moved = 0
        with _opened(folder) as top:
            while names := list(_names(top)):
                for name in names:
                    if not _is_folder(name, top):
                        os.unlink(name, dir_fd=top)
                        continue
                    _open_up(name, top)
                    with _walked(top, (name,)) as handle:
                        for inner in list(_names(handle)):
                            if _is_folder(inner, handle):
                                _move(inner, handle, f"{unused}{moved}", top)
                                moved += 1
                            else:
                                os.unlink(inner, dir_fd=handle)
                    os.rmdir(name, dir_fd=top)
        folder.rmdir()


def _move(name: str, source: int, new_name: str, destination: int) -> None:
    if _is_folder(name, source):
        _open_up(name, source)  # else it cannot be moved
    os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=destination)


def _open_up(name: str, parent: int) -> None:
    """Let its owner into a folder."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{handle}", 0o700)  # noqa: PTH101 — by name it would follow a link
    finally:
        os.close(handle)


def _is_folder(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, _OPEN_FOLDER)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _walked(top: int, path: tuple[str, ...]) -> Iterator[int]:
    handle = os.dup(top)
    try:
        for name in path:
            inner = os.open(name, _OPEN_FOLDER, dir_fd=handle)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _names(handle: int) -> Iterator[str]:
    with os.scandir(handle) as entries:
        for entry in entries:
            yield entry.name


def _mark(status: os.stat_result) -> Mark:
    return Mark(status.st_mode, status.st_size, status.st_ino, max(status.st_mtime_ns, status.st_ctime_ns))


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "link"
    return "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "special"
