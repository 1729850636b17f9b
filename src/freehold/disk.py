"""Writing to disk: whole or not at all.

What is written appears under its final name only when every byte is on the disk; whatever fails on the way, and
Ctrl-C, leaves nothing behind. What a killed process left is removed by the next one that writes to the same name:
a lock tells abandoned work from work going on. Failures of the disk are typed errors that name the path.
"""

import errno
import fcntl
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from freehold.errors import DiskError, DiskSpaceError, UsageError


@contextmanager
def new_folder(destination: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary sibling of `destination`, which takes its name when the block ends well.

    Raises UsageError if the destination is already there, DiskError if it cannot be written, DiskSpaceError if fewer
    than `needed_bytes` are free or the disk fills up.
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
        _remove_abandoned(destination)
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
def new_file(destination: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that replaces `destination` when the block ends well."""
    destination = destination.absolute()
    partial = _partial_name(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination)
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


def write_text(path: Path, text: str) -> None:
    """Write a small file, replacing what was there."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file, replacing what was there."""
    with new_file(path) as file:
        file.write(data)


_SETTLED = 60  # seconds: what is younger may have been made a moment ago, and not be locked yet


def _partial_name(path: Path) -> Path:
    # Random, not the process id: containers that share a volume may all be process 1.
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(destination: Path) -> None:
    """Remove what killed processes left of this name; what a living one holds is locked, and stays."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.partial-*"):
        try:
            if time.time() - left.stat().st_mtime < _SETTLED:
                continue
            with _locked(left):
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
        except OSError:  # in use, or gone by now
            continue


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
