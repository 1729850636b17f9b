"""The python tool, from outside and from inside: what works, and what code in the sandbox tries in vain."""

import asyncio
import base64
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from freehold.errors import UnsupportedError, UsageError
from freehold.tools.base import ToolError, ToolResult
from freehold.tools.python import PythonSession, PythonTool
from freehold.tools.python.output import plain

SECRET = "a-secret-of-the-host"
PRELUDE = """
import ctypes, errno, fcntl, os, resource, signal, socket, subprocess, sys, threading, time, zmq
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
def call(on_x86, on_arm, *arguments):
    number = on_x86 if x86 else on_arm
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def attempt(what):
    try:
        return f"GOT {what()!r}"
    except socket.gaierror:
        return "refused: no name server"
    except OSError as error:
        return f"refused: {errno.errorcode.get(error.errno, error.errno)}"
"""

REFUSED = {
    # network
    "TCP": "socket.socket()",
    "TCP over IPv6": "socket.socket(socket.AF_INET6)",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "ping": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
    "a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)",
    "a packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "vsock": "socket.socket(socket.AF_VSOCK)",
    "the kernel's crypto": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "a name server": "socket.getaddrinfo('example.com', 443)",
    "TCP by system call": "call(41, 198, 2, 1, 0)",
    "TCP by x32": "call(0x40000000 + 41, 198, 2, 1, 0)",
    "TCP through io_uring": "call(425, 425, 8, 0)",
    "the network of process 1": "call(308, 268, os.open('/proc/1/ns/net', 0), 0)",
    # files
    "/root": "os.listdir('/root')",
    "/home": "os.listdir('/home')",
    "/var": "os.listdir('/var')",
    "/run": "os.listdir('/run')",
    "/sys": "os.listdir('/sys')",
    "passwords": "open('/etc/shadow').read()",
    "the host's name servers": "open('/etc/resolv.conf').read()",
    "keys for SSH": "open('/root/.ssh/id_rsa').read()",
    "the machine's id": "open('/etc/machine-id').read()",
    "physical memory": "open('/dev/mem', 'rb').read(1)",
    "the kernel's log": "open('/dev/kmsg', 'rb').read(1)",
    "the kernel's memory": "open('/proc/kcore', 'rb').read(64)",
    "the boot's command line": "open('/proc/cmdline').read(64)",
    "a disk": "os.listdir('/dev/disk')",
    "writing to /": "open('/x', 'w')",
    "writing to /etc": "open('/etc/passwd', 'a')",
    "writing to /usr": "open('/usr/x', 'w')",
    "writing to /dev": "open('/dev/x', 'w')",
    "writing to the interpreter": "open(os.__file__, 'a')",
    "writing to the packages": "open(zmq.__file__, 'a')",
    "writing to the kernel's program": "open('/opt/freehold/kernel.py', 'a')",
    "a setting of the system": "open('/proc/sys/kernel/core_pattern', 'w').write('|/mnt/data/x')",
    "SysRq": "open('/proc/sysrq-trigger', 'w').write('b')",
    "process 1's memory": "open('/proc/1/mem', 'r+b')",
    "escaping the OOM killer": "open('/proc/self/oom_score_adj', 'w').write('-1000')",
    "a hard link to the system": "os.link('/usr/bin/env', '/mnt/data/env')",
    "moving /mnt/data away": "os.rename('/mnt/data', '/tmp/data')",
    # privileges
    "becoming root": "os.setuid(0)",
    "becoming the one who set it up": "os.setuid(1)",
    "a group": "os.setgroups([0])",
    "a file that makes its user root": "os.chmod(os.open('s', os.O_CREAT), 0o4755)",
    "the same while making it": "os.open('t', os.O_CREAT | os.O_WRONLY, 0o4755)",
    "a character device": "os.mknod('null', 0o20666, os.makedev(1, 3))",
    "a block device": "os.mknod('disk', 0o60666, os.makedev(254, 0))",
    "mount": "call(165, 40, b'none', b'/mnt', b'tmpfs', 0, 0)",
    "mount, the new way": "call(430, 430, b'tmpfs', 0)",
    "umount": "call(166, 39, b'/mnt/data', 2)",
    "pivot_root": "call(155, 41, b'/mnt/data', b'/mnt/data')",
    "chroot": "os.chroot('/mnt/data')",
    "a user namespace": "call(272, 97, 0x10000000)",
    "a user namespace by clone": "call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)",
    "a namespace by clone3": "call(435, 435, ctypes.create_string_buffer(88), 88)",
    "a time namespace by clone": "call(56, 220, 0x80 | 17, 0, 0, 0, 0)",
    "ptrace": "call(101, 117, 16, 1, 0, 0)",
    "ptrace of oneself": "call(101, 117, 0, 0, 0, 0)",
    "another's memory": "call(310, 270, 1, 0, 0, 0, 0, 0)",
    "another's file descriptor": "call(438, 438, os.pidfd_open(1), 0, 0)",
    "files by handle": "call(304, 265, 3, 0, 0)",
    "keys": "call(250, 219, 0, -3, 0)",
    "adding keys": "call(248, 217, b'user', b'x', b'y', 1, -3)",
    "BPF": "call(321, 280, 0, 0, 0)",
    "perf": "call(298, 241, 0, 0, 0, -1, 0)",
    "userfaultfd": "call(323, 282, 0)",
    "a kernel module": "call(175, 105, 0, 0, 0)",
    "another kernel": "call(246, 104, 0, 0, 0, 0)",
    "reboot": "call(169, 142, 0xfee1dead, 672274793, 0x1234567, 0)",
    "swap": "call(168, 225, b'/x')",
    "the host's name": "socket.sethostname('x')",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "ports": "call(172, 1, 3) if x86 else os.chroot('/')",
    "another personality": "call(135, 92, 0x0040000)",
    "hidden memory": "os.memfd_create('x')",
    "memory that outlives its process": "call(29, 194, 0, 1 << 20, 0o1666)",
    "a message queue": "call(240, 180, b'x', 66, 0o600, 0)",
    "a system call of tomorrow": "call(480, 480)",
    "typing into the terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "higher priority": "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "more memory": "resource.prlimit(0, resource.RLIMIT_DATA, (1 << 50, 1 << 50))",
    "limits of process 1": "resource.prlimit(1, resource.RLIMIT_NPROC, (1 << 20, 1 << 20))",
}

HARMLESS = {
    "the environment": ("sorted(os.environ)", lambda text: SECRET not in text and "PYTEST" not in text),
    "process 1's environment": ("open('/proc/1/environ').read()", lambda text: text == "''"),
    "process 1's command line": (
        "open('/proc/1/cmdline').read()",
        lambda text: "/opt/python" in text and str(Path.home()) not in text and "freehold-python" not in text,
    ),
    "process 1's files": ("sorted(os.listdir('/proc/1/root/'))", lambda text: "root" not in text and "home" not in text),
    "all processes": (
        "len([name for name in os.listdir('/proc') if name.isdigit()])",
        lambda text: int(text) <= 3,
    ),
    "what is open": (
        "[os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}')]",
        lambda text: "freehold-python" not in text and "/work" not in text and "/home" not in text,
    ),
    "who it is": ("os.getuid(), os.getgroups(), os.uname().nodename", lambda text: text == "(1000, [], 'freehold')"),
    "no privileges to be had": (
        "[line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapPrm', 'CapEff', 'NoNewPrivs', 'Seccomp:'))]",
        lambda text: text == "['0000000000000000', '0000000000000000', '1', '2']",
    ),
    "mounts are read-only but three": (
        "sorted(l.split()[1] for l in open('/proc/mounts') if l.split()[3].startswith('rw') and not l.split()[1].startswith('/dev/'))",
        lambda text: text == "['/mnt/data', '/tmp']",
    ),
    "interfaces": ("[name for _, name in socket.if_nameindex()] if False else open('/proc/net/dev').read().count(':')",
                   lambda text: text == "1"),
    "process 1 cannot be killed": ("os.kill(1, signal.SIGKILL), time.sleep(.05), os.getpid()", lambda text: ", 2)" in text),
    "where packages lie": ("sys.prefix, sys.path, zmq.__file__", lambda text: str(Path.home()) not in text),
}

Run = Callable[[str], ToolResult]


def make(**limits: float) -> PythonTool:
    try:
        return PythonTool(**limits)  # type: ignore[arg-type]
    except UnsupportedError as error:
        pytest.skip(str(error))


def runs(limits: dict[str, float]) -> Iterator[Run]:
    tool = make(**limits)
    with asyncio.Runner() as runner:
        session = runner.run(tool.open())

        def run(code: str) -> ToolResult:
            return runner.run(session.call("python", textwrap.dedent(code)))

        run.session = session  # type: ignore[attr-defined]
        run.runner = runner  # type: ignore[attr-defined]
        yield run
        runner.run(session.aclose())
    assert not list(Path("/tmp").glob("nothing"))
    assert "freehold-python" not in Path("/proc/mounts").read_text()
    assert not _kernels()


def _kernels() -> list[str]:
    """Kernels of this very process that live."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"bwrap" in command[:1] and parent == os.getpid():
                found.append(folder.name)
    return found


@pytest.fixture(scope="module")
def inside() -> Iterator[Run]:
    os.environ["FREEHOLD_TEST_SECRET"] = SECRET
    for run in runs({"seconds": 30}):
        yield lambda code: run(f"if 'attempt' not in globals():\n{textwrap.indent(PRELUDE, '    ')}\n{code}")
    del os.environ["FREEHOLD_TEST_SECRET"]


TIGHT = {
    "seconds": 2,
    "memory_bytes": 256 << 20,
    "scratch_bytes": 8 << 20,
    "processes": 40,
    "disk_bytes": 8 << 20,
    "files": 200,
    "output_bytes": 4 << 20,
    "output_chars": 4000,
}


@pytest.fixture(scope="module")
def tight() -> Iterator[Run]:
    for run in runs(TIGHT):
        yield run


@pytest.mark.parametrize("name", REFUSED)
def test_code_is_refused(inside: Run, name: str) -> None:
    assert inside(f"attempt(lambda: {REFUSED[name]})").text.startswith("'refused: "), name


@pytest.mark.parametrize("name", HARMLESS)
def test_code_sees_nothing_of_the_host(inside: Run, name: str) -> None:
    expression, harmless = HARMLESS[name]
    text = inside(expression).text
    assert "Traceback" not in text and harmless(text), text
