"""Writing to disk: whole or not at all.

What is written appears under its final name only when every byte is on the disk; whatever fails on the way, and
Ctrl-C, leaves nothing behind. Failures of the disk are typed errors that name the path.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from freehold.errors import DiskSpaceError, FreeholdError, UsageError


@contextmanager
def new_folder(destination: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary sibling of `destination`, which takes its name when the block ends well.

    Raises UsageError if the destination is already there or cannot be written, DiskSpaceError if fewer than
    `needed_bytes` are free or the disk fills up.
    """
    destination = destination.absolute()
    partial = _partial_name(destination)
    try:
        if destination.is_symlink() or destination.exists():
            raise UsageError(f"{destination} exists already; name a new folder or remove it first")
        destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(destination.parent).free
        if needed_bytes > free:
            raise DiskSpaceError(
                f"{destination} needs {needed_bytes / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB free; "
                "free some space or name a folder on another disk"
            )
        partial.mkdir()
        yield partial
        partial.rename(destination)
        _sync(destination.parent)
    except OSError as error:
        raise _typed(destination, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(destination: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that replaces `destination` when the block ends well."""
    destination = destination.absolute()
    partial = _partial_name(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
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


def write_text(path: Path, text: str) -> None:
    """Write a small file, replacing what was there."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _typed(path: Path, error: OSError) -> FreeholdError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f"{path} cannot be written: the disk is full; free some space and run it again")
    return UsageError(f"{path} cannot be written ({error.strerror or error}); check the path and its permissions")
