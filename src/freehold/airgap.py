"""The air gap: this process, its threads and its children open no network socket any more, and never will again.

A seccomp filter refuses every new socket but Unix and netlink ones, with EACCES, so that callers see a PermissionError.
The kernel keeps to it; there is no way back. Sockets that are open stay open: bind and listen first, then close the
network, and connections are still accepted. io_uring, which opens sockets past such filters, is refused as well, and so
is all of it by way of the 32-bit and x32 system calls.

It stops what forgets or ignores that it is offline: libraries, tools, code that a model wrote. It does not stop what
asks somebody outside: a daemon behind a Unix socket (a name server's cache, a container engine) has a network of its
own. Nor does it stop hostile code in this very process from reusing a socket that is open already.
"""

import ctypes
import errno
import json
import os
import platform
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from freehold import seccomp
from freehold.errors import BackendError, UnsupportedError

_QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_NO_DOWNLOADS = {"PIP_NO_INDEX": "1"}

_SET_NO_NEW_PRIVS = 38  # prctl
_SECCOMP_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_IO_URING_SETUP, _PIDFD_GETFD = 425, 438  # the same everywhere


class _Machine(NamedTuple):
    socket: int
    socketpair: int
    seccomp: int
    old_refused: tuple[int, ...]  # numbers of the 32-bit calls that make sockets: socketcall, socket, socketpair


_MACHINES = {
    "x86_64": _Machine(41, 53, 317, (102, 359, 360)),
    "aarch64": _Machine(198, 199, 277, (102, 281, 288)),
}


class Attempt(NamedTuple):
    """One try to reach a network. `outcome` is what the system said."""

    name: str
    refused: bool
    outcome: str


def stay_offline() -> None:
    """Tell the libraries that could, and the children, neither to look anything up nor to report anything.

    Raises nothing and enforces nothing; call it before they are imported.
    """
    os.environ.update(_QUIET | _OFFLINE)


def close_network() -> None:
    """From here on, no thread of this process and no child opens a network socket. There is no way back.

    Raises UnsupportedError where system, machine or kernel cannot do it, and BackendError where the kernel said yes and
    a socket opens nevertheless.
    """
    architectures = seccomp.architectures()
    if architectures is None:
        raise UnsupportedError(
            f"the air gap needs 64-bit Linux on x86_64 or aarch64, and this is {sys.platform} on {platform.machine()}: "
            "run it in a network namespace of its own instead"
        )
    machine = _MACHINES[platform.machine()]
    stay_offline()
    os.environ.update(_NO_DOWNLOADS)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise _refused_by_kernel(os.strerror(ctypes.get_errno()))
    program = _program(machine, architectures)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    libc.syscall.restype = ctypes.c_long
    outcome = libc.syscall(
        ctypes.c_long(machine.seccomp),
        ctypes.c_long(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_long(_ALL_THREADS),
        ctypes.byref(header),
    )
    if outcome < 0:
        raise _refused_by_kernel(os.strerror(ctypes.get_errno()))
    if outcome > 0:
        raise _refused_by_kernel(f"thread {outcome} has a filter of its own")
    if not is_closed():
        raise BackendError(
            "the kernel took the filter of the air gap, but a network socket still opens: this sandbox does not "
            "enforce seccomp; run it in a network namespace of its own instead"
        )


def is_closed() -> bool:
    """Whether this process is refused network sockets; by an air gap, or by whoever started it."""
    return all(_tcp(family).refused for family in (socket.AF_INET, socket.AF_INET6))


def prove() -> list[Attempt]:
    """Close the network of a child, let the child and a child of its own try whatever there is, and tell the outcomes.

    Raises UnsupportedError where the air gap cannot be had.
    """
    script = "from freehold import airgap; airgap.report_attempts()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, env=_child_environment()
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
        raise UnsupportedError(f"no air gap can be had here: {last[0]}")
    return [Attempt(*fields) for fields in json.loads(done.stdout)]


def report_attempts() -> None:
    """The child of `prove`: its attempts as JSON on stdout."""
    close_network()
    sys.stdout.write(json.dumps(list(_attempts())))


def _program(machine: _Machine, architectures: seccomp.Architectures) -> bytes:
    calls = _IO_URING_SETUP, _PIDFD_GETFD
    native = (
        seccomp.refuse(errno.EACCES, *calls)
        + seccomp.only(errno.EACCES, machine.socket, 0, socket.AF_UNIX, socket.AF_NETLINK)
        + seccomp.only(errno.EACCES, machine.socketpair, 0, socket.AF_UNIX)
    )
    old = seccomp.refuse(errno.EACCES, *calls, *machine.old_refused)
    return seccomp.program(architectures, native, old, error=errno.EACCES)


def _refused_by_kernel(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"the kernel refuses the filter of the air gap ({reason}): run it in a network namespace of its own instead"
    )


def _child_environment() -> dict[str, str]:
    """Ours, and the way to this very package, wherever it was imported from."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH120, PTH100 — a string is wanted
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))}


def _attempts() -> Iterator[Attempt]:
    yield _tcp(socket.AF_INET)
    yield _tcp(socket.AF_INET6)
    yield _open("UDP", socket.AF_INET, socket.SOCK_DGRAM)
    yield _open("UDP over IPv6", socket.AF_INET6, socket.SOCK_DGRAM)
    yield _open("ICMP", socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    yield _open("raw IP", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    yield _open("raw packets", getattr(socket, "AF_PACKET", 17), socket.SOCK_RAW)
    yield _open("virtual machines' sockets", getattr(socket, "AF_VSOCK", 40), socket.SOCK_STREAM)
    yield _open("Bluetooth", getattr(socket, "AF_BLUETOOTH", 31), socket.SOCK_STREAM)
    yield _tried("DNS", lambda: socket.getaddrinfo("example.com", 443), also=socket.gaierror)
    machine = _MACHINES[platform.machine()]
    yield _called("TCP by system call", machine.socket, socket.AF_INET, socket.SOCK_STREAM, 0)
    yield _called("io_uring", _IO_URING_SETUP, 8, 0)
    if platform.machine() == "x86_64":
        yield _called("TCP by x32 system call", seccomp.X32 + machine.socket, socket.AF_INET, socket.SOCK_STREAM, 0)
    yield _by_child()


def _tcp(family: int) -> Attempt:
    return _open("TCP" if family == socket.AF_INET else "TCP over IPv6", family, socket.SOCK_STREAM)


def _open(name: str, family: int, kind: int, protocol: int = 0) -> Attempt:
    return _tried(name, lambda: socket.socket(family, kind, protocol).close())


def _tried(name: str, attempt: Callable[[], object], also: type[OSError] | None = None) -> Attempt:
    try:
        attempt()
    except OSError as error:
        refused = error.errno == errno.EACCES or (also is not None and isinstance(error, also))
        return Attempt(name, refused, f"{type(error).__name__}: {error.strerror or error}")
    return Attempt(name, False, "opened")


def _called(name: str, number: int, *arguments: int) -> Attempt:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    descriptor = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if descriptor >= 0:
        os.close(descriptor)
        return Attempt(name, False, "opened")
    code = ctypes.get_errno()
    return Attempt(name, code == errno.EACCES, os.strerror(code))


def _by_child() -> Attempt:
    script = "import socket, sys\ntry: socket.socket()\nexcept OSError as error: sys.exit(error.errno)"
    code = subprocess.run([sys.executable, "-I", "-S", "-c", script]).returncode
    return Attempt("TCP by a child process", code == errno.EACCES, os.strerror(code) if code > 0 else "opened")
