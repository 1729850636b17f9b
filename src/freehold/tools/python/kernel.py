"""What runs in the sandbox: sets the limits that a process sets for itself, then becomes a Jupyter kernel.

It is given to the sandbox as a file and imports nothing of Freehold. Its argument is JSON: the file descriptors of the
sockets that the host listens on for it, the limits, how long pieces of output may be. From the first cell on, nothing
here can be relied on: whatever code in the kernel must not do, the host and the sandbox have to prevent.
"""

import codecs
import contextlib
import importlib
import json
import os
import resource
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any

_PIPE_BYTES = 1 << 20  # more fits into no pipe


def main() -> None:
    settings = json.loads(sys.argv[1])
    for name, value in settings["limits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    os.nice(settings["nice"])
    sys.argv[1:] = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 — of names
        if descriptor > 2 and descriptor not in settings["sockets"]:  # what bubblewrap has left open
            with contextlib.suppress(OSError):
                os.close(descriptor)

    zmq: Any = importlib.import_module("zmq")
    from ipykernel import iostream
    from ipykernel.iostream import IOPubThread
    from ipykernel.kernelapp import IPKernelApp
    from traitlets.config import Config
    from zmq.eventloop.zmqstream import ZMQStream

    iostream.OutStream = _output(iostream.OutStream, settings["piece_chars"])
    forked = f"ipc:///tmp/.output-{os.getpid()}"

    def listen_to_forked(thread: Any) -> None:
        """What processes print that the kernel has forked; ipykernel would use TCP."""
        thread._pipe_uuid = os.urandom(16)
        pipe = thread.socket.context.socket(zmq.PULL)
        pipe.linger = 0
        pipe.bind(forked)
        thread._pipe_in = ZMQStream(pipe, thread.io_loop)
        thread._pipe_in.on_recv(thread._handle_pipe_msg)

    def reach_from_forked(thread: Any) -> tuple[Any, Any]:
        context = zmq.Context()
        pipe = context.socket(zmq.PUSH)
        pipe.linger = 3000
        pipe.connect(forked)
        return context, pipe

    IOPubThread._setup_pipe_in = listen_to_forked
    IOPubThread._setup_pipe_out = reach_from_forked
    descriptors = iter(settings["sockets"])

    class App(IPKernelApp):  # type: ignore[misc]
        """A kernel on sockets that are open already, with no connection file, no poller, no heartbeat."""

        def _bind_socket(self, socket: Any, port: int) -> int:
            descriptor: int = next(descriptors)
            if socket.type in (zmq.PUB, zmq.XPUB):  # to wait while the host is busy, not to drop what it has to hear
                socket.set(zmq.XPUB_NODROP, 1)
            socket.set(zmq.USE_FD, descriptor)
            socket.bind(f"ipc:///freehold/{descriptor}")  # a name: the socket is bound already
            return descriptor

        def init_heartbeat(self) -> None:
            pass

        def write_connection_file(self, **kwargs: Any) -> None:
            pass

        def cleanup_connection_file(self) -> None:
            pass

    app = App.instance(config=Config({"Session": {"key": b""}}))  # messages are not signed
    app.transport = "ipc"
    app.initialize(settings["arguments"])
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        app.shell.events.register("post_run_cell", stream.end_call)
    app.start()


def _output(streams: Any, piece_chars: int) -> Any:
    """The class of sys.stdout and sys.stderr, on ipykernel's: small pieces, nobody ahead of the host, all in its place.

    What child processes print comes to a stream by a pipe. ipykernel has a thread that reads it, some time; here who
    writes or flushes reads it first, so that it stands where it was printed and never comes after a call's end. And
    ipykernel copies it to where the kernel's own output goes: nobody reads that, and once it is full the thread ends.
    """

    class Output(streams):  # type: ignore[misc]
        flush_timeout = None
        """It is stopped for long between calls, which is no reason to complain; and where it would, nobody reads."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self._waiting_chars = 0
            self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
            self._reading = threading.RLock()  # a signal's handler may print, too
            self._should_watch: bool
            self._fid: int
            super().__init__(*arguments, **settings)

        def fileno(self) -> int:
            """Where child processes write that are given this stream: to its pipe as well."""
            return int(self._original_stdstream_fd)

        def write(self, text: str) -> Any:
            self._read_pipe()
            return self._write_and_wait(text)

        def flush(self) -> None:
            self._read_pipe()
            super().flush()

        def end_call(self, _: Any) -> None:
            """What is half a character now stays one."""
            self._read_pipe()
            with self._reading:
                if text := self._decode(b"", final=True):
                    self._write_and_wait(text)

        def _watch_pipe_fd(self) -> None:
            while self._should_watch:
                select.select([self._fid], [], [])
                self._read_pipe()

        def _read_pipe(self) -> None:
            if not (self._should_watch and self._is_master_process()) or self._sends():
                return
            with self._reading:
                if select.select([self._fid], [], [], 0)[0]:
                    data = os.read(self._fid, _PIPE_BYTES)
                    if not data:  # no process can write to it any more
                        self._should_watch = False
                    elif text := self._decode(data):
                        self._write_and_wait(text)

        def _write_and_wait(self, text: str) -> Any:
            """Waits where more is said than can be sent: what waits takes memory."""
            written = super().write(text)
            self._waiting_chars += len(text)
            if self._waiting_chars > 16 * piece_chars and not self._sends():
                self._waiting_chars = 0
                super().flush()
            return written

        def _sends(self) -> bool:
            """Whether this is the thread that others wait for. It comes to print by what garbage collection runs on it,
            and must wait for nobody."""
            return self.pub_thread is not None and threading.current_thread() is self.pub_thread.thread

        def _flush_buffers(self) -> Iterator[tuple[Any, str]]:
            """The host keeps no more than so much of one message, and half a surrogate pair would lose all of it."""
            for parent, text in super()._flush_buffers():
                text = text.encode("utf-8", "backslashreplace").decode()
                for start in range(0, len(text), piece_chars):
                    yield parent, text[start : start + piece_chars]

    return Output


if __name__ == "__main__":
    main()
