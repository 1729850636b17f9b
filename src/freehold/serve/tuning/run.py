"""One training run as a process of its own: begun, watched, ended. Knows no jobs and no store.

The process and nobody else holds the lock of its folder (`child.lock`), so that one that lives on where its server died
is found there, and ended, before another begins in its place. On Linux none does: see child.py.
"""

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from freehold.errors import DiskError, FreeholdError
from freehold.log import logger

LOG = "log.txt"
_LOCK = "child.lock"
_LAST_BYTES = 8192
_PATIENCE_SECONDS = 30.0
_LOOK_SECONDS = 0.05


class Run:
    """Made by `Run.begin`."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process, self._folder = process, folder
        self._ended = asyncio.ensure_future(process.wait())

    @classmethod
    async def begin(cls, command: Sequence[str], folder: Path) -> "Run":
        """Raises DiskError where the folder cannot be written, FreeholdError where an older run does not end."""
        lock = await _acquire(folder / _LOCK)
        try:
            with (folder / LOG).open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "freehold.serve.tuning.child", str(os.getpid()), *command,
                    stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True,
                )  # fmt: skip
            os.pwrite(lock, f"{process.pid}\n".encode(), 0)
        except OSError as error:
            raise DiskError(f"{folder} cannot be written ({error.strerror}); check its permissions") from None
        finally:
            os.close(lock)  # the process has its own
        return cls(process, folder)

    async def wait(self, seconds: float) -> int | None:
        """The exit code, once it has ended; None where it goes on after so many seconds."""
        await asyncio.wait((self._ended,), timeout=seconds)
        return self._ended.result() if self._ended.done() else None

    async def stop(self, seconds: float) -> None:
        """Ask it to end, and end it where it has not after so many seconds."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        if await self.wait(seconds) is None:
            await self.kill()

    async def kill(self) -> None:
        """End it and whatever it has started."""
        if not self._ended.done():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._ended

    def last_lines(self) -> list[str]:
        """The end of what it said, for people."""
        try:
            with (self._folder / LOG).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_BYTES))
                return [line.rstrip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            return []


async def _acquire(path: Path) -> int:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error.strerror}); check its permissions") from None
    try:
        for _ in range(round(_PATIENCE_SECONDS / _LOOK_SECONDS)):
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(lock, 0)
                return lock
            _end_the_holder(lock)
            await asyncio.sleep(_LOOK_SECONDS)
        raise FreeholdError(f"an older training run still works in {path.parent}; end it")
    except BaseException:
        os.close(lock)
        raise


def _end_the_holder(lock: int) -> None:
    """Who holds the lock is the process whose number stands in it: it was written by its server."""
    written = os.pread(lock, 32, 0)
    if written.endswith(b"\n") and written.strip().isdigit():
        logger.warning("a training run has outlived its server, and is ended: process %s", written.decode().strip())
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(written), signal.SIGKILL)
