"""Writing to disk: whole or not at all.

What is written appears under its final name only when every byte is on the disk; whatever fails on the way, and
Ctrl-C, leaves nothing behind. What a killed process left is removed by the next one that writes to the same name:
a lock tells abandoned work from work going on. `exclusive` keeps two processes from doing the same work at once.
Failures of the disk are typed errors that name the path.
"""

import errno
import fcntl
import glob
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from freehold.errors import DiskError, DiskSpaceError, UsageError
from freehold.log import Progress, no_progress


@contextmanager
def new_folder(destination: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary sibling of `destination`, which takes its name when the block ends well.

    Raises UsageError if the destination is already there, DiskError if it cannot be written, DiskSpaceError if fewer
    than `needed_bytes` are free or the disk fills up.
    """
    destination = destination.absolute()
    partial = _partial_name(destination)
    try:
        refuse_existing(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        check_space(destination, needed_bytes)
        remove_abandoned(destination)
        partial.mkdir()
        with _locked(partial):
            yield partial
            partial.rename(destination)
        _sync(destination.parent)
    except OSError as error:
        raise _typed(destination, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_folder(destination: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `destination`, for what that is to be made of; it is removed when the block ends.

    Raises UsageError if the destination is already there, DiskError and DiskSpaceError as `new_folder` does.
    """
    destination = destination.absolute()
    partial = _partial_name(destination)
    try:
        refuse_existing(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(destination)
        partial.mkdir()
        with _locked(partial):
            yield partial
    except OSError as error:
        raise _typed(destination, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(destination: Path, *, replace: bool = True, needed_bytes: int = 0) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the name `destination` when the block ends well, in place of what was there.

    Raises UsageError if something is there already and `replace` is False, DiskError and DiskSpaceError as
    `new_folder` does.
    """
    destination = destination.absolute()
    partial = _partial_name(destination)
    try:
        if not replace:
            refuse_existing(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        check_space(destination, needed_bytes)
        remove_abandoned(destination)
        with partial.open("wb") as file, _locked(partial):
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(destination)
        _sync(destination.parent)
    except OSError as error:
        raise _typed(destination, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def refuse_existing(destination: Path) -> None:
    """Raises UsageError. What makes new files asks by itself; who has long work before that asks first."""
    if destination.is_symlink() or destination.exists():
        raise UsageError(f"{destination} exists already; give a new name or remove it first")


def check_space(destination: Path, needed_bytes: int) -> None:
    """Raises DiskSpaceError if fewer bytes are free where `destination` is to be written."""
    free = shutil.disk_usage(destination.parent).free
    if needed_bytes > free:
        raise DiskSpaceError(
            f"{destination} needs {_shown(needed_bytes, math.ceil)} and its disk has {_shown(free, math.floor)} free; "
            "free some space or write to another disk"
        )


def _shown(num_bytes: int, rounded: Callable[[float], int]) -> str:
    """In the largest unit that there is one of. Rounded up what is needed, and down what is there, so that little too
    little shows as well."""
    unit, name = next(each for each in _UNITS if num_bytes >= each[0] or each is _UNITS[-1])
    return f"{rounded(100 * num_bytes / unit) / 100:.2f} {name}"


_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """For who writes in another way than here: failures of the disk become typed errors that name the path."""
    try:
        yield
    except OSError as error:
        raise _typed(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a small file, replacing what was there."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, replacing what was there."""
    with new_file(path) as file:
        file.write(data)


@contextmanager
def exclusive(path: Path, *, wait: bool = True, progress: Progress = no_progress) -> Iterator[None]:
    """One holder at a time, in this process or another, for work that ends in `path`; the others wait here.

    Who comes second should look first whether the work is done. A process that dies lets go. Raises DiskError where
    the folder of `path` cannot be written, and UsageError where another holds it and one is not to `wait`.
    """
    lock = _lock_name(path.absolute())
    try:
        handle = _acquire(lock, wait, progress)
    except BlockingIOError:
        raise UsageError(f"another process is at work on {path}; wait for it, or end it first") from None
    except OSError as error:
        raise _typed(path, error) from None
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is held: whoever waits for it sees that it is gone, and makes a new one
        os.close(handle)


def _acquire(lock: Path, wait: bool, progress: Progress) -> int:
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                progress("waiting for another process", 0, 1)
                fcntl.flock(handle, fcntl.LOCK_EX)
                progress("waiting for another process", 1, 1)
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except FileNotFoundError:  # between the two looks at it
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


_SETTLED = 60  # seconds: what is younger may have been made a moment ago, and not be locked yet


def remove_abandoned(destination: Path, *, settled: float = _SETTLED) -> int:
    """Remove what killed processes left of this name; what a living one holds is locked, and stays.

    Work younger than `settled` seconds stays too; who holds `exclusive` for this name can say 0. Returns the bytes
    that were freed.
    """
    freed = 0
    partials = destination.parent.glob(f".{glob.escape(destination.name)}.partial-*")
    for left in [*partials, _lock_name(destination)]:
        try:
            if time.time() - left.stat().st_mtime < settled:
                continue
            with _locked(left):
                freed += remove(left)
        except (OSError, DiskError):  # in use, or gone by now
            continue
    return freed


def remove_all_abandoned(folder: Path, *, settled: float = _SETTLED) -> int:
    """`remove_abandoned` for every name in a folder."""
    names = {left.name[1:].rpartition(".")[0] for left in unfinished_in(folder)}
    return sum(remove_abandoned(folder / name, settled=settled) for name in sorted(names))


def unfinished_in(folder: Path) -> list[Path]:
    """What is being written in a folder, or was when its process was killed; locks too."""
    return [path for path in sorted(folder.glob(".*")) if re.search(r"\.(partial-[0-9a-f]{8}|lock)$", path.name)]


def remove(path: Path) -> int:
    """Remove a file, or a folder with all that is in it; returns the bytes that were freed. Gone already is as good.

    On Linux a file in use can be removed: its contents stay good for whoever has it open or mapped, and the disk gets
    the space back when the last of them ends. Raises DiskError where it cannot be removed.
    """
    try:
        freed = size_of(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise DiskError(f"{path} cannot be removed ({error.strerror}); check its permissions") from None
    return freed


def size_of(path: Path) -> int:
    """Bytes in a file, or in all files of a folder; a link counts as a link."""
    if path.is_dir() and not path.is_symlink():
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return path.lstat().st_size


def _partial_name(path: Path) -> Path:
    # Random, not the process id: containers that share a volume may all be process 1.
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def _lock_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Over NFS an exclusive lock needs a file that is open for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _typed(path: Path, error: OSError) -> DiskError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f"{path} cannot be written: the disk is full; free some space and run it again")
    return DiskError(f"{path} cannot be written ({error.strerror or error}); check the path and its permissions")
