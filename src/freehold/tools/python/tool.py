"""`PythonTool`, and the session that a conversation has of it."""

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freehold.errors import DiskError
from freehold.formats.conversation import ToolNamespace
from freehold.formats.harmony.builtins import PYTHON
from freehold.tools.base import Citation, ToolError, ToolFile, ToolResult
from freehold.tools.python import drive as drives
from freehold.tools.python import processes
from freehold.tools.python.confinement import Confinement, owner_outside
from freehold.tools.python.drive import Contents, Drive
from freehold.tools.python.limits import Limits, amount
from freehold.tools.python.output import Transcript
from freehold.tools.python.running import KernelError, RunningKernel
from freehold.tools.python.wire import Message, WireError

_PREFIX = "freehold-python-"
_GRACE_SECONDS = 1.0  # for an interrupted call to end by itself; less than the 2 s that a time-out may be late
_LOOK_SECONDS = 0.1
_FILE_BYTES = 1 << 12  # of scratch space, at least
_MAX_CODE_CHARS = 1 << 20
_MAX_MESSAGES = 20_000
_NEW = "The next call starts a new one: variables and imports are gone, files in /mnt/data are kept."


@dataclass(frozen=True, kw_only=True)
class PythonTool(Limits):
    """Runs the model's Python in a Jupyter kernel of each conversation's own, in a sandbox. See this package's
    docstring for what that keeps to, and what it does not stop.

    Raises UnsupportedError where there can be no sandbox: there is no other way to run.
    """

    _confinement: Confinement = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_confinement", Confinement.prepare())
        _remove_abandoned()

    @property
    def namespace(self) -> ToolNamespace:
        assert PYTHON.description is not None
        description = PYTHON.description.replace("120.0 seconds", f"{self.seconds:.1f} seconds")
        start = description.index("Internet access")
        return dataclasses.replace(PYTHON, description=description[:start] + "Internet access is disabled.")

    async def open(self) -> "PythonSession":
        """A conversation's own. Its kernel starts with the first call. Raises DiskError."""
        return PythonSession(self, self._confinement)


class PythonSession:
    """One conversation's kernel and drive. For one event loop; calls come one after another."""

    def __init__(self, limits: Limits, confinement: Confinement) -> None:
        self._limits = limits
        self._confinement = confinement
        self._kernel: RunningKernel | None = None
        self._seen: Contents | None = None
        self._closed = False
        try:
            self._folder, self._lock = _own_folder()
            for name in ("data", "copies", "empty"):
                (self._folder / name).mkdir()
            owner = owner_outside()
            if owner is not None:
                os.chown(self._folder / "data", owner, owner)
        except OSError as error:
            raise DiskError(
                f"no folder for /mnt/data can be made in {tempfile.gettempdir()} ({error.strerror}); "
                "set TMPDIR to a folder that can be written"
            ) from None
        self._drive = Drive(
            self._folder / "data",
            self._folder / "copies",
            max_bytes=limits.disk_bytes,
            max_files=limits.files,
            owner=owner,
        )
        self._seen = self._drive.contents()

    async def put(self, source: Path, name: str | None = None) -> str:
        """Copy a file of this machine into /mnt/data; returns its name there, another where that one is taken.

        Raises UsageError if it is no file or does not fit, DiskError where it cannot be read or written.
        """
        name = await asyncio.to_thread(self._drive.put, source, name)
        self._seen = await asyncio.to_thread(self._drive.contents)
        return name

    async def call(self, name: str, arguments: str) -> ToolResult:
        """Run a cell. What it printed, its value and its error are the result, with what became of /mnt/data."""
        if name != "python":
            raise ToolError(f"{name} is not known: send the code to python, as it is")
        if len(arguments) > _MAX_CODE_CHARS:
            raise ToolError(f"the code has {len(arguments):,} characters: put data into files, or send it in parts")
        assert not self._closed
        kernel = await self._ready_kernel()
        call = _Call(kernel, self._drive, self._limits)
        before = await asyncio.to_thread(self._drive.contents)
        kernel.go_on()
        try:
            await call.run(arguments)
        except BaseException:
            if not call.over:
                await self._end_kernel()
            raise
        finally:
            if call.fatal is None and not kernel.ended.done() and not await kernel.stop():
                call.fatal = "its processes could not be stopped after the call"
            if call.fatal is None and kernel.size() > self._limits.processes // 2:
                call.fatal = f"the call left more than {self._limits.processes // 2} processes behind"
            if call.fatal is not None:
                await self._end_kernel()
        return await self._result(call, before)

    async def _ready_kernel(self) -> RunningKernel:
        if self._kernel is not None and self._kernel.ended.done():
            self._kernel.release()
            self._kernel = None
        if self._kernel is None:
            try:
                self._kernel = await RunningKernel.start(self._confinement, self._limits, self._folder)
            except KernelError as error:
                raise ToolError(f"the Python kernel does not start: {error}") from None
        return self._kernel

    async def _end_kernel(self) -> None:
        if self._kernel is not None:
            kernel, self._kernel = self._kernel, None
            await asyncio.shield(kernel.kill())

    async def _result(self, call: "_Call", before: Contents) -> ToolResult:
        notes = list(call.notes)
        after = await asyncio.to_thread(self._drive.contents)
        full = self._drive.too_full(after)
        fatal = call.fatal
        if fatal is not None:
            notes.append(f"[The kernel was ended: {fatal}. {_NEW}]")
        if full is not None or call.filled_drive:
            await asyncio.to_thread(self._drive.restore, before)
            notes.append(f"[{full or fatal}: what the call wrote there was removed.]")
        for number, (suffix, picture) in enumerate(call.transcript.pictures, start=1):
            try:
                name = await asyncio.to_thread(self._drive.write, f"figure-{number}{suffix}", picture)
            except DiskError as error:
                notes.append(f"[A picture was lost: {error}]")
            else:
                notes.append(f"[A picture was saved as /mnt/data/{name}]")
        files, listed = await asyncio.to_thread(self._what_changed)
        text = call.transcript.text().rstrip("\n")
        return ToolResult(text="\n".join(filter(None, [text, *notes, listed])), files=files)

    def _what_changed(self) -> tuple[tuple[ToolFile, ...], str]:
        assert self._seen is not None
        earlier, self._seen = self._seen, self._drive.contents()
        if earlier.entries == self._seen.entries:
            return (), ""
        files = self._drive.hand_out(drives.changed(earlier, self._seen))
        return files, "Files in /mnt/data:\n" + (drives.listing(self._seen) or "(none)")

    def citations(self, answer: str) -> Sequence[Citation]:
        return ()

    async def aclose(self) -> None:
        """End the kernel and remove the folder, with the copies of files that were handed out."""
        if not self._closed:
            self._closed = True
            await self._end_kernel()
            await asyncio.to_thread(drives.remove_tree, self._folder)
            os.close(self._lock)


class _Call:
    """One cell while it runs, and what came of it."""

    def __init__(self, kernel: RunningKernel, drive: Drive, limits: Limits) -> None:
        self._kernel = kernel
        self._drive = drive
        self._limits = limits
        self._bytes = 0
        self._messages = 0
        self._flooded = asyncio.Event()
        self.transcript = Transcript(max_chars=limits.output_chars, max_pictures=limits.pictures)
        self.notes: list[str] = []
        self.fatal: str | None = None  # why the kernel has to end
        self.filled_drive = False
        self.over = False  # the kernel is idle, or has to end

    def _heard(self, message: Message) -> None:
        self._bytes += message.size
        self._messages += 1
        if self._flooded.is_set():
            return
        if message.kind:
            self.transcript.take(message.kind, message.content)
        else:
            self.transcript.oversized(message.size)
        if self._bytes > self._limits.output_bytes or self._messages > _MAX_MESSAGES:
            self._flooded.set()

    async def run(self, code: str) -> None:
        running = asyncio.ensure_future(self._kernel.execute(code, self._heard))
        flooded = asyncio.ensure_future(self._flooded.wait())
        looking = asyncio.ensure_future(self._look())
        try:
            waited: set[asyncio.Future[Any]] = {running, flooded, looking, self._kernel.ended}
            await asyncio.wait(
                waited,
                timeout=self._limits.seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._kernel.ended.done():
                self.fatal = "it crashed, or the code ended it"
            elif looking.done():
                self.fatal = looking.result()
            elif running.done():
                try:
                    running.result()
                except WireError:
                    self.fatal = "it closed its sockets"
            else:
                what = (
                    f"The call said more than {amount(self._limits.output_bytes)}"
                    if flooded.done()
                    else f"The call took longer than {self._limits.seconds:g} seconds"
                )
                if await self._interrupted(running):
                    self.notes.append(f"[{what} and was interrupted. Variables are kept.]")
                else:
                    self.fatal = f"{what[0].lower()}{what[1:]} and could not be interrupted"
            self.over = True
        except asyncio.CancelledError:
            self.over = await self._interrupted(running)
            raise
        finally:
            for task in (running, flooded, looking):
                task.cancel()
            await asyncio.gather(running, flooded, looking, return_exceptions=True)

    async def _interrupted(self, running: "asyncio.Future[None]") -> bool:
        """Interrupt it; whether it has ended by itself then."""
        self._kernel.interrupt()
        await asyncio.wait({running, self._kernel.ended}, timeout=_GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return running.done() and running.exception() is None and not self._kernel.ended.done()

    async def _look(self) -> str:
        """Looks at what the call takes until that is too much; says what of it."""
        pause = _LOOK_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(pause)
            began = loop.time()
            reason = await asyncio.to_thread(self._excess)
            if reason is not None:
                return reason
            pause = max(_LOOK_SECONDS, 5 * (loop.time() - began))

    def _excess(self) -> str | None:
        used = processes.usage(self._kernel.first, device=self._drive.device, enough_bytes=self._limits.memory_bytes)
        if used.memory_bytes > self._limits.memory_bytes:
            return f"all its processes together may take {amount(self._limits.memory_bytes)} of memory"
        for place in ("tmp", "dev/shm"):  # whose size does not count files that are empty
            with contextlib.suppress(OSError):
                status = os.statvfs(self._kernel.root / place)
                if (status.f_files - status.f_ffree) * _FILE_BYTES > self._limits.scratch_bytes:
                    return f"/{place} may hold {self._limits.scratch_bytes // _FILE_BYTES:,} files"
        full = self._drive.too_full(self._drive.contents(), used.deleted_bytes)
        self.filled_drive = full is not None
        return full


def _own_folder() -> tuple[Path, int]:
    """A new folder, and the lock on it: whoever finds one that is not locked may remove it. Raises OSError."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # found before it was locked
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_nlink:
                    return folder, os.dup(handle)
            finally:
                os.close(handle)


def _remove_abandoned() -> None:
    """Remove the folders of sessions whose process was killed."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(handle).st_uid == os.geteuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    drives.remove_tree(folder)
            finally:
                os.close(handle)
