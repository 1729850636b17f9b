"""A kernel that runs in its sandbox, and the host's hold on it.

`start` makes one; from then on it is running, stopped (between calls nothing in it runs) or ended. The sockets are made
and listened on by the host and handed in: the sandbox sees no folder of sockets, and can neither remove one nor put
something else in its place. Ending it ends the first process of its process namespace, and with that, all others.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path

from freehold.tools.python import processes
from freehold.tools.python.confinement import Confinement, depth
from freehold.tools.python.limits import Limits
from freehold.tools.python.wire import Message, Wire, WireError, request

_PROGRAM = Path(__file__).with_name("kernel.py")
_INSIDE = "/opt/freehold/kernel.py"
_CHANNELS = ("shell", "stdin", "control", "iopub")  # in the order in which ipykernel binds them
_PIECE_CHARS = 1 << 14
_UNTOUCHED_BYTES = 16 << 30  # address space beyond memory: libraries, reserved and never touched
_NICE = 5
_DEATH_SECONDS = 5.0
_LAST_OUTPUT_SECONDS = 1.0
_ARGUMENTS = ["--InteractiveShell.colors=NoColor", "--InteractiveShell.xmode=Plain", "--HistoryManager.enabled=False"]

Listener = Callable[[Message], None]


class KernelError(Exception):
    """The kernel does not come up, or is gone. For this package."""


class RunningKernel:
    """Made by `start`. For the event loop it was made in."""

    def __init__(self, process: subprocess.Popen[bytes], said: int) -> None:
        self._process = process
        self._said = said
        self._loop = asyncio.get_running_loop()
        self._pid_handle = os.pidfd_open(process.pid)
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pid_handle, self._process_ended)
        self.first = 0  # the first process inside, by its number outside
        self.root = Path()  # what the sandbox has as /, as long as it lives
        self._interpreter_handle = -1
        self._shell: Wire | None = None
        self._wires: list[Wire] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._listener: Listener | None = None
        self._replied: asyncio.Event = asyncio.Event()
        self._idle: asyncio.Event = asyncio.Event()
        self._current = ""
        self._broken: WireError | None = None
        self._heard = 0  # messages

    @classmethod
    async def start(cls, confinement: Confinement, limits: Limits, folder: Path) -> "RunningKernel":
        """Start one in a session's folder, where `data` is what it sees as /mnt/data. Raises KernelError."""
        with contextlib.ExitStack() as held:
            sockets = folder / "sockets"
            sockets.mkdir(exist_ok=True)
            near = os.open(sockets, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, near)
            places = {name: Path(f"/proc/self/fd/{near}/{name}") for name in _CHANNELS}  # a path of a socket is short
            listeners = [_listen(held, place) for place in places.values()]
            arguments = confinement.arguments(
                held,
                data=folder / "data",
                empty=folder / "empty",
                scratch_bytes=limits.scratch_bytes,
                files=[(_INSIDE, _PROGRAM.read_bytes())],
            )
            said, says = os.pipe()
            os.set_blocking(says, False)  # nobody reads it while all is well: who writes more than fits has lost it
            os.set_blocking(said, False)
            settings = json.dumps(_settings(limits, [listener.fileno() for listener in listeners]))
            try:
                process = subprocess.Popen(
                    confinement.command(arguments, [confinement.interpreter.executable, "-P", _INSIDE, settings]),
                    executable=confinement.bubblewrap,
                    pass_fds=(*arguments.descriptors, *(listener.fileno() for listener in listeners)),
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=says,
                    stderr=says,
                    start_new_session=True,  # Ctrl-C in a terminal is not meant for it
                )
            except OSError as error:
                os.close(said)
                raise KernelError(str(error)) from None
            finally:
                os.close(says)
            kernel = cls(process, said)
            try:
                await kernel._come_up(places, limits)
            except BaseException:
                await kernel.kill()
                raise
            return kernel

    async def _come_up(self, places: dict[str, Path], limits: Limits) -> None:
        try:
            async with asyncio.timeout(limits.start_seconds):
                await self._until_ended(self._connect(places))
        except TimeoutError:
            raise KernelError(f"it was not up after {limits.start_seconds:g} seconds") from None
        inside = self._process.pid
        line = [inside := _only_child(inside) for _ in range(depth() + 1)]
        self.first = line[-2]
        self.root = Path(f"/proc/{line[-1]}/root")
        self._interpreter_handle = os.pidfd_open(line[-1])
        with contextlib.suppress(OSError):  # when memory runs out, it goes before the model does
            Path(f"/proc/{line[-1]}/oom_score_adj").write_text("800")

    async def _connect(self, places: dict[str, Path]) -> None:
        for channel, kind in (("iopub", "SUB"), ("shell", "DEALER")):
            wire = await Wire.connect(places[channel], kind)
            self._wires.append(wire)
            self._pumps.append(self._loop.create_task(self._pump(wire)))
        self._shell = self._wires[-1]
        while True:  # until what it publishes is heard: a subscription takes a moment to arrive
            if await self._ask("kernel_info_request", {}, idle_seconds=0.05):
                return

    async def _until_ended(self, doing: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(doing)
        try:
            await asyncio.wait({task, self.ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                return
        except WireError as error:
            raise KernelError(f"{error}: {await self._last_words()}") from None
        finally:
            task.cancel()
        raise KernelError(await self._last_words())

    async def _last_words(self) -> str:
        """What it said where nobody listens, when it went down before it was up."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), 1)
        try:
            lines = os.read(self._said, 1 << 16).decode(errors="replace").strip().splitlines()
        except BlockingIOError:
            lines = []
        return lines[-1] if lines else f"it ended with {self._process.returncode}"

    def _process_ended(self) -> None:
        self._loop.remove_reader(self._pid_handle)
        self._process.wait()
        if not self.ended.done():
            self.ended.set_result(None)

    async def _pump(self, wire: Wire) -> None:
        """Reads to the end, whether somebody listens or not: in the middle of a message nothing may stop it."""
        try:
            while True:
                message = await wire.receive()
                self._heard += 1
                if self._listener is not None and message.size:
                    self._listener(message)
                if message.parent == self._current:
                    if message.kind.endswith("_reply"):
                        self._replied.set()
                    elif message.kind == "status" and message.content.get("execution_state") == "idle":
                        self._idle.set()
        except WireError as error:
            self._broken = error
            self._replied.set()

    async def _ask(self, kind: str, content: dict[str, object], *, idle_seconds: float) -> bool:
        """Send a request, wait for its reply; whether it was also heard that all output has come."""
        assert self._shell is not None
        if self._broken is not None:
            raise self._broken
        self._replied.clear()
        self._idle.clear()
        self._current, parts = request(kind, content)
        await self._shell.send(parts)
        await self._replied.wait()
        if self._broken is not None:
            raise self._broken
        heard = -1
        while not self._idle.is_set() and heard != self._heard:  # as long as more comes
            heard = self._heard
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), idle_seconds)
        return self._idle.is_set()

    async def execute(self, code: str, listener: Listener) -> None:
        """Run code; what comes of it goes to the listener, which looks at the parent. Raises WireError.

        Returns when the kernel says that it is done; it waits for that without end. Cancelling it leaves the code
        running.
        """

        def heard(message: Message) -> None:
            if message.parent == self._current or not message.kind:
                listener(message)

        content: dict[str, object] = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": False,  # it would drop a request that comes right after an error
        }
        self._listener = heard
        try:
            await self._ask("execute_request", content, idle_seconds=_LAST_OUTPUT_SECONDS)
        finally:
            self._listener = None

    def interrupt(self) -> None:
        """As Ctrl-C in a notebook."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._interpreter_handle, signal.SIGINT)

    async def stop(self) -> bool:
        """Nothing in it runs from now on; whether that was possible."""
        return await asyncio.to_thread(processes.stop, self.first)

    def go_on(self) -> None:
        """Let it run again."""
        processes.go_on(self.first)

    def size(self) -> int:
        """How many processes it has."""
        return len(processes.descendants(self.first))

    async def kill(self) -> None:
        """End it and all in it, and wait until that is so."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                if self.first:
                    os.kill(self.first, signal.SIGKILL)
                else:
                    self._process.kill()
            done, _ = await asyncio.wait({self.ended}, timeout=_DEATH_SECONDS)
            if not done:
                self._process.kill()
                await asyncio.wait({self.ended}, timeout=_DEATH_SECONDS)
        self.release()

    def release(self) -> None:
        """Close what is open for it. It has ended."""
        for wire in self._wires:
            wire.close()
        for pump in self._pumps:
            pump.cancel()
        self._wires.clear()
        self._pumps.clear()
        for handle in (self._pid_handle, self._interpreter_handle, self._said):
            if handle >= 0:
                with contextlib.suppress(OSError):
                    os.close(handle)
        self._pid_handle = self._interpreter_handle = self._said = -1


def _settings(limits: Limits, sockets: list[int]) -> dict[str, object]:
    return {
        "sockets": sockets,
        "nice": _NICE,
        "piece_chars": _PIECE_CHARS,
        "arguments": _ARGUMENTS,
        "limits": {
            "RLIMIT_DATA": limits.memory_bytes,
            "RLIMIT_AS": limits.memory_bytes + _UNTOUCHED_BYTES,
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_FSIZE": limits.disk_bytes,
            "RLIMIT_NOFILE": 512,
            "RLIMIT_CORE": 0,
            "RLIMIT_MSGQUEUE": 0,
        },
    }


def _listen(held: contextlib.ExitStack, place: Path) -> socket.socket:
    place.unlink(missing_ok=True)
    listener = held.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
    listener.bind(str(place))
    listener.listen(1)
    return listener


def _only_child(pid: int) -> int:
    found = list(processes.children(pid))
    if len(found) != 1:
        raise KernelError("it is not one process")
    return found[0]
