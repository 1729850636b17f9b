"""The python tool, from outside and from inside: what works, and what code in the sandbox tries in vain."""

import asyncio
import base64
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from freehold.errors import UnsupportedError, UsageError
from freehold.tools.base import ToolError, ToolResult
from freehold.tools.python import PythonSession, PythonTool
from freehold.tools.python.output import plain
from freehold.tools.python.tool import _remove_abandoned

SECRET = "a-secret-of-the-host"
PRELUDE = """
import ctypes, errno, fcntl, os, resource, signal, socket, stat, struct, subprocess, sys, threading, time, zmq
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
def call(on_x86, on_arm, *arguments):
    number = on_x86 if x86 else on_arm
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def of_the_host(listening):
    for number in map(int, os.listdir("/proc/self/fd")):
        if os.path.exists(f"/dev/fd/{number}") and stat.S_ISSOCK(os.fstat(number).st_mode):
            found = socket.socket(fileno=os.dup(number))
            maker = struct.unpack("3i", found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            if maker == 0 and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == listening:
                return found
def host_process():
    return of_the_host(0).getsockopt(socket.SOL_SOCKET, 77)  # SO_PEERPIDFD
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
    "the host's addresses by its socket": "fcntl.ioctl(of_the_host(1), 0x8912, bytearray(16))",
    "the host's hardware by its socket": "fcntl.ioctl(of_the_host(0), 0x8910, bytearray(16) + struct.pack('i20x', 1))",
    "the host's network by its socket": "fcntl.ioctl(of_the_host(1), 0x894C)",
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
    "a file that makes its user root": "os.chmod(os.open('/tmp/s', os.O_CREAT), 0o4755)",
    "the same while making it": "os.open('/tmp/t', os.O_CREAT | os.O_WRONLY, 0o4755)",
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
    "a signal to the host by its socket": "signal.pidfd_send_signal(host_process(), 0)",
    "the host's namespace by its socket": "call(308, 268, fcntl.ioctl(host_process(), 0xFF03), 0)",
    "the host's files by its socket": "call(438, 438, host_process(), 0, 0)",
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
    "memory in attributes": "os.setxattr('/tmp', 'user.x', bytes(1 << 16))",
    "memory in buffers": "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)",
    "memory that outlives its process": "call(29, 194, 0, 1 << 20, 0o1666)",
    "a message queue": "call(240, 180, b'x', 66, 0o600, 0)",
    "a system call of tomorrow": "call(480, 480)",
    "typing into the terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "higher priority": "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "more memory": "resource.prlimit(0, resource.RLIMIT_DATA, (1 << 50, 1 << 50))",
    "limits of process 1": "resource.prlimit(1, resource.RLIMIT_NPROC, (1 << 20, 1 << 20))",
}

HARMLESS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "the environment": ("sorted(os.environ)", lambda text: SECRET not in text and "PYTEST" not in text),
    "process 1's environment": ("open('/proc/1/environ').read()", lambda text: text in ("''", r"'PWD=/\x00'")),
    "process 1's command line": (
        "open('/proc/1/cmdline').read()",
        lambda text: "/opt/python" in text and str(Path.home()) not in text and "freehold-python" not in text,
    ),
    "process 1's files": (
        "sorted(os.listdir('/proc/1/root/'))",
        lambda text: "root" not in text and "home" not in text,
    ),
    "all processes": (
        "len([name for name in os.listdir('/proc') if name.isdigit()])",
        lambda text: int(text) <= 3,
    ),
    "what is open": (
        "[os.readlink(f'/proc/self/fd/{n}') for n in range(99) if os.path.exists(f'/dev/fd/{n}')]",
        lambda text: not any(word in text for word in ("freehold-python", "/work", "/home", "user:", "memfd")),
    ),
    "who it is": (
        "os.getuid(), {*os.getgroups()} - {65534}, os.uname().nodename",
        lambda text: text == "(1000, set(), 'freehold')",
    ),
    "no privileges to be had": (
        "[line.split()[1] for line in open('/proc/self/status') if line[:6] in ('CapEff', 'NoNewP', 'Seccom')]",
        lambda text: text == "['0000000000000000', '1', '2', '1']",
    ),
    "mounts are read-only but three": (
        "sorted(l.split()[1] for l in open('/proc/mounts') if ' rw,' in l and ' /dev/' not in l)",
        lambda text: text == "['/mnt/data', '/tmp']",
    ),
    "interfaces": (
        "[name for _, name in socket.if_nameindex()] if False else open('/proc/net/dev').read().count(':')",
        lambda text: text == "1",
    ),
    "process 1 cannot be killed": (
        "os.kill(1, signal.SIGKILL), time.sleep(.05), os.getpid()",
        lambda text: ", 2)" in text,
    ),
    "where packages lie": ("sys.prefix, sys.path, zmq.__file__", lambda text: str(Path.home()) not in text),
}


def make(**limits: float) -> PythonTool:
    try:
        return PythonTool(**limits)  # type: ignore[arg-type]
    except UnsupportedError as error:
        pytest.skip(str(error))


class Run:
    """A session that is called as a function."""

    def __init__(self, runner: asyncio.Runner, session: PythonSession, prelude: str = "") -> None:
        self.runner = runner
        self.session = session
        self._prelude = prelude

    def __call__(self, code: str) -> ToolResult:
        code = textwrap.dedent(code)
        if self._prelude and not self.lives():
            self.runner.run(self.session.call("python", self._prelude))
        return self.runner.run(self.session.call("python", code))

    def lives(self) -> bool:
        return self.session._kernel is not None and not self.session._kernel.ended.done()


def runs(limits: Mapping[str, float], prelude: str = "") -> Iterator[Run]:
    tool = make(**limits)
    with asyncio.Runner() as runner:
        run = Run(runner, runner.run(tool.open()), prelude)
        yield run
        run("1")
        kernel = run.session._kernel
        assert kernel is not None
        processes = [kernel.first, *_below(kernel.first)]
        runner.run(run.session.aclose())
        assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
        assert not run.session._folder.exists()
        assert "freehold-python" not in Path("/proc/mounts").read_text()


def _below(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in _below(child)]


def _with_freehold() -> dict[str, str]:
    """An environment in which another Python finds this very package."""
    source = str(Path(sys.modules["freehold"].__file__ or "").parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))}


@pytest.fixture(scope="module")
def inside() -> Iterator[Run]:
    os.environ["FREEHOLD_TEST_SECRET"] = SECRET
    yield from runs({"seconds": 300}, PRELUDE)
    del os.environ["FREEHOLD_TEST_SECRET"]


TIGHT = {
    "seconds": 10,
    "memory_bytes": 256 << 20,
    "scratch_bytes": 8 << 20,
    "processes": 40,
    "disk_bytes": 8 << 20,
    "files": 200,
    "output_bytes": 4 << 20,
    "output_chars": 4000,
}
BRIEF = TIGHT | {"seconds": 0.8}
SOON = 30.0
"""Seconds. On a busy machine; without a limit, what is timed would never end."""


@pytest.fixture(scope="module")
def tight() -> Iterator[Run]:
    yield from runs(TIGHT)


Attempt = Callable[[PythonSession, str], Awaitable[None]]


def each(names: Iterable[str], attempt: Attempt, limits: Mapping[str, float], *, lanes: int = 3) -> None:
    """Try each in a session that comes new or from another; several sessions at a time, which mostly wait."""
    tool, left = make(**limits), list(names)
    failed: dict[str, BaseException] = {}

    async def lane() -> None:
        session = await tool.open()
        while left:
            name = left.pop()
            try:
                await attempt(session, name)
            except (AssertionError, ToolError) as error:
                failed[name] = error
        await session.aclose()

    async def all_lanes() -> None:
        await asyncio.gather(*(lane() for _ in range(lanes)))

    asyncio.run(all_lanes())
    assert not failed


async def said(session: PythonSession, code: str) -> str:
    return (await session.call("python", textwrap.dedent(code))).text


async def warm(session: PythonSession) -> float:
    """Start its kernel where there is none; returns the time."""
    await said(session, "import os, signal")
    return time.monotonic()


@pytest.mark.parametrize("name", REFUSED)
def test_code_is_refused(inside: Run, name: str) -> None:
    assert inside(f"attempt(lambda: {REFUSED[name]})").text.startswith("'refused: "), name


@pytest.mark.parametrize("name", HARMLESS)
def test_code_sees_nothing_of_the_host(inside: Run, name: str) -> None:
    expression, harmless = HARMLESS[name]
    text = inside(expression).text
    assert "Traceback" not in text and harmless(text), text


def test_a_conversation_keeps_its_state_and_sees_results_errors_and_files(inside: Run, tmp_path: Path) -> None:
    assert inside("value = 6 * 7").text == ""
    text = inside(
        "print('to stdout'); print('to stderr', file=sys.stderr); code = os.system('echo from a child'); value"
    ).text
    assert sorted(text.splitlines()) == ["42", "from a child", "to stderr", "to stdout"] and text.endswith("\n42")
    assert text.index("to stdout") < text.index("from a child")
    text = inside("def f(n):\n    return f(n + 1)\nf(0)").text
    assert text.startswith("Traceback") and text.endswith("RecursionError: maximum recursion depth exceeded")
    assert len(text.splitlines()) < 50 and "left out" in text
    assert inside("input('name? ')").text.splitlines()[-1].startswith("StdinNotImplementedError")

    result = inside("open('täble.csv', 'w').write('1,2'); os.makedirs('a/b'); open('a/b/c.txt', 'w').close()")
    assert result.text.endswith("Files in /mnt/data:\na/b/c.txt (0 bytes)\ntäble.csv (3 bytes)")
    assert [(file.name, file.media_type) for file in result.files] == [
        ("a/b/c.txt", "text/plain"),
        ("täble.csv", "text/csv"),
    ]
    assert result.files[1].path.read_text() == "1,2"
    assert inside("1").files == () and inside("1").text == "1"
    assert inside("os.remove('täble.csv')").text == "Files in /mnt/data:\na/b/c.txt (0 bytes)"


def test_what_children_print_stands_where_they_printed_it(inside: Run) -> None:
    code = "for n in range(20):\n    print(2 * n); code = os.system(f'echo {2 * n + 1}')\n40"
    assert inside(code).text.splitlines() == [str(n) for n in range(41)]
    for _ in range(5):
        assert inside("code = os.write(1, b'a'); b'b'").text == "a\nb'b'"
    halves = "half = 'é'.encode()\ncode = os.write(1, half[:1]); sys.stdout.flush(); code = os.write(1, half[1:])"
    assert inside(halves).text == "é"
    assert inside("code = os.write(1, half[:1])").text == "�"
    assert inside("code = os.write(1, b'next')").text == "next"


def test_children_may_be_given_a_stream(inside: Run) -> None:
    for stream in ("stdout", "stderr"):
        text = inside(f"subprocess.run(['seq', '50000'], stdout=sys.{stream}).returncode").text
        assert text.startswith("1\n2\n3\n") and text.endswith("\n49999\n50000\n0")
    assert (
        inside("subprocess.run(['echo', 'child'], stdout=sys.stdout, stderr=sys.stderr).returncode").text == "child\n0"
    )


def test_a_child_may_complain_without_end_while_nobody_listens(tight: Run) -> None:
    tight("""
        import subprocess, sys
        type(sys.stderr).__mro__[1].flush_timeout = 0.0005  # as if between its calls this took long
        kept = subprocess.Popen(["yes", "no"], stdout=2)
    """)
    for _ in range(3):
        text = tight("print('two')").text
        assert "The kernel was ended" not in text
    tight("kept.kill(); kept.wait()")
    tight("print('three')")
    assert tight("print('four')").text == "four"


def test_children_print_as_much_as_they_like(inside: Run) -> None:
    """More than a pipe holds, in one call and in many: the thread that reads it must go on."""
    for n in range(5):
        text = inside(f"""code = os.system("printf '{n}%.0s' $(seq 50000); echo; echo end")""").text
        assert set(text.splitlines()[0]) == {str(n)} and text.endswith("\nend")


def test_what_garbage_collection_prints_stops_nothing(inside: Run) -> None:
    """It comes on any thread, on that one too which sends what others print and wait for."""
    text = inside("""
        import gc, threading, time
        class Noisy:
            def __init__(self): self.me = self
            def __del__(self): print("bye")
        child = subprocess.Popen(["sh", "-c", "head -c 4000000 /dev/zero | tr '\\\\0' x"])
        while child.poll() is None:
            for n in range(50):
                Noisy()
            sys.stdout.pub_thread.schedule(gc.collect)
            time.sleep(0.01)
        collected = threading.Event()
        sys.stdout.pub_thread.schedule(collected.set)
        code = collected.wait()
        code = gc.collect()
        print("over")
    """).text
    assert text.endswith("over")


def test_children_of_the_kernel_find_the_packages_and_say_what_they_print(inside: Run) -> None:
    text = inside("""
        import multiprocessing
        subprocess.run([sys.executable, "-c", "import zmq; print('child', zmq.__name__)"])
        process = multiprocessing.get_context("fork").Process(target=lambda: print("forked", flush=True))
        process.start(); process.join()
        multiprocessing.get_context("spawn").Pool(2).map(abs, [-1, -2])
    """).text
    assert "child zmq" in text and "forked" in text and "[1, 2]" in text


def test_files_go_in_and_a_name_that_is_taken_stays(inside: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("given")
    names = [inside.runner.run(inside.session.put(source)) for _ in range(2)]
    assert names == ["in.txt", "in-2.txt"]
    assert inside("open('in-2.txt').read()").text == "'given'"
    with pytest.raises(UsageError, match="not a file"):
        inside.runner.run(inside.session.put(Path("/dev/zero")))
    with pytest.raises(UsageError, match="without slashes"):
        inside.runner.run(inside.session.put(source, "../x"))


def test_what_is_no_call_of_python_is_an_error_for_the_model(inside: Run) -> None:
    for name, code in (("python.exec", "1"), ("python", "x" * (1 << 20) + "x")):
        with pytest.raises(ToolError):
            inside.runner.run(inside.session.call(name, code))


def test_output_is_text_and_no_more(inside: Run) -> None:
    text = inside(r"""
        print("\x1b[31mred\x1b[0m \x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x9b5m")
        print("\x08\x00 \u202eabc \ud800")
        print("10%\r50%\r100%")
        os.write(1, b"\xff\xfe bytes\n"); time.sleep(0.1)
        from IPython.display import display, HTML, Javascript
        display({"text/html": "<script>", "application/javascript": "alert(1)", "text/plain": "just text"}, raw=True)
        display({"application/x-python-pickle": "gASVIQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU"}, raw=True)
    """).text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "red" in text and "title" not in text and "aGk" not in text and "link" in text
    assert "\\x08\\x00" in text and "\\u202eabc \\ud800" in text
    assert (
        "\n100%\n" in text and "50%" not in text and "bytes" in text and "just text" in text and "<script>" not in text
    )


@pytest.mark.parametrize("code", ["'x' * 10_000_000", "print('\\n' * 10_000_000)"])
def test_ten_megabytes_are_cut(inside: Run, code: str) -> None:
    text = inside(code).text
    assert len(text) < 21_000 and "left out" in text


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(100)).decode()


def test_pictures_become_files_and_what_is_none_does_not(inside: Run, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("untouched")
    result = inside(f"""
        from IPython.display import display
        os.symlink({str(tmp_path / "victim")!r}, "figure-1.png")
        display({{"image/png": {PNG!r}, "text/plain": "<Figure>"}}, raw=True)
        display({{"image/png": "bm90IGEgcGljdHVyZQ==", "text/plain": "no picture"}}, raw=True)
        display({{"image/svg+xml": "<svg onload='x'/>", "text/plain": "a drawing"}}, raw=True)
    """)
    assert "no picture" in result.text and "a drawing" in result.text and "<Figure>" not in result.text
    assert "[A picture was saved as /mnt/data/figure-1-2.png]" in result.text
    assert [file.name for file in result.files] == ["figure-1-2.png"]
    assert result.files[0].path.read_bytes() == base64.b64decode(PNG) and result.files[0].media_type == "image/png"
    assert (tmp_path / "victim").read_text() == "untouched"


def test_a_figure_of_matplotlib_is_a_picture(inside: Run) -> None:
    pytest.importorskip("matplotlib")
    result = inside("import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.title('T')")
    assert "[A picture was saved as /mnt/data/figure-" in result.text, result.text
    assert result.files[0].media_type == "image/png" and result.files[0].path.stat().st_size > 1000


def test_the_host_follows_no_link_out_of_the_drive(inside: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    result = inside(f"""
        os.makedirs("links/inner")
        os.symlink({str(tmp_path / "secret")!r}, "links/file")
        os.symlink({str(tmp_path)!r}, "links/folder")
        os.symlink("../../../../../.." + {str(tmp_path / "secret")!r}, "links/up")
        os.symlink("/mnt/data/links", "links/inner/loop")
        os.mkfifo("links/pipe")
        keep = socket.socket(socket.AF_UNIX); keep.bind("links/socket")
        open("links/real", "w").write("good")
    """)
    assert [file.name for file in result.files] == ["links/real"]
    for line in (
        "links/file (link)",
        "links/folder (link)",
        "links/pipe (pipe)",
        "links/socket (socket)",
        "links/up (link)",
    ):
        assert line in result.text
    assert SECRET not in result.text

    handed_out = result.files[0].path
    again = inside(f"os.remove('links/real'); os.symlink({str(tmp_path / 'secret')!r}, 'links/real')")
    assert again.files == () and handed_out.read_text() == "good" and not handed_out.is_symlink()


def test_names_of_files_are_shown_and_not_obeyed(inside: Run) -> None:
    result = inside(r"""
        os.mkdir("names")
        names = b"\xff\xfe", b"line\nbreak", b"\x1b]0;title\x07", b"-rf", b"..hidden", b"x" * 250, "\u202etxt".encode()
        for name in names:
            open(b"names/" + name, "w").close()
    """)
    assert all(c.isprintable() or c == "\n" for c in result.text) and "\\nbreak" in result.text
    assert len(result.files) == 7
    for file in result.files:
        assert (
            file.path.is_file()
            and file.path.name.isprintable()
            and file.path.name[0] not in "-."
            and len(file.path.name) < 100
        )


def test_nothing_runs_between_calls(inside: Run) -> None:
    inside("""
        n = 0
        def count():
            global n
            while True: n += 1
        threading.Thread(target=count, daemon=True).start()
        spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    """)
    kernel = inside.session._kernel
    assert kernel is not None
    children = _below(kernel.first)
    assert len(children) >= 2
    assert {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children} == {"T"}
    assert int(inside("spinner.kill(); n").text) > 0


def test_conversations_do_not_meet(inside: Run, tight: Run, tmp_path: Path) -> None:
    meeting = socket.socket(socket.AF_UNIX)
    meeting.bind("\0freehold-test-host")
    meeting.listen()
    with meeting:
        for way in ("socket.socket(socket.AF_UNIX)", "of_the_host(1)", "of_the_host(0)"):
            assert "'refused: " in inside(f"attempt(lambda: {way}.connect('\\0freehold-test-host'))").text
    inside("""
        meeting = socket.socket(socket.AF_UNIX); meeting.bind("\\0meeting"); meeting.listen()
        open("mine.txt", "w").write("x"); open("/tmp/mine.txt", "w").write("x"); open("/dev/shm/mine", "w").write("x")
    """)
    text = tight("""
        import os, socket
        try: socket.socket(socket.AF_UNIX).connect("\\0meeting"); print("met")
        except OSError as error: print(error)
        print([os.path.exists(path) for path in ("/mnt/data/mine.txt", "/tmp/mine.txt", "/dev/shm/mine")])
        print(len([name for name in os.listdir("/proc") if name.isdigit()]))
    """).text
    assert text == "[Errno 111] Connection refused\n[False, False, False]\n2"


FORGED = """
    import json, zmq
    kernel = get_ipython().kernel
    parent = kernel.get_parent()
    iopub = kernel.iopub_socket
    send = lambda kind, content, to=parent: kernel.session.send(iopub, kind, content, parent=to)
    send("stream", {"name": "stdout", "text": "for another\\n"}, {"header": {}, "msg_id": "0" * 32})
    send("stream", {"text": {"a": 1}}); send("stream", {}); send("stream", [])
    send("error", {"traceback": [1, None], "ename": [], "evalue": {}})
    send("execute_result", {"data": ["x"]}); send("display_data", {"data": {"image/png": 5, "text/plain": ["x"]}})
    send("display_data", {"data": {"image/png": "!!!", "image/jpeg": ""}})
    send("status", {"execution_state": "idle"}); send("no such thing", {"x": 1})
    for parts in ([b"<IDS|MSG>"], [b"x"], [b""] * 500, [b"<IDS|MSG>", b"", b"[" * 100_000, b"{", b"\\xff", b""],
                  [b"<IDS|MSG>", b"", b"{}", b"[]", b"{}", b"1"], [b"x" * (9 << 20)]):
        iopub.send_multipart(parts)
"""


NAMELESS = """
    import ctypes, os
    ctypes.CDLL(None).prctl(15, b"\\xff\\nState: T\\n")
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, b"\\xfe) T")
        while True: pass
"""


def test_a_process_is_stopped_whatever_it_calls_itself(tight: Run) -> None:
    tight(NAMELESS)
    kernel = tight.session._kernel
    assert kernel is not None
    states = [Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] for pid in _below(kernel.first)]
    assert states == [b"T", b"T"]
    tight("os._exit(0)")


def test_what_is_said_while_the_host_is_busy_is_heard(inside: Run) -> None:
    drive = inside.session._drive.folder
    code = "open('begun', 'w').close()\nfor i in range(2000): display(i)\nopen('ended', 'w').close()"

    async def busy() -> str:
        call = asyncio.create_task(inside.session.call("python", code))
        while not (drive / "begun").exists():
            await asyncio.sleep(0.01)
        deadline = time.monotonic() + 1.5
        while not (drive / "ended").exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # nothing else runs on this loop
        return (await call).text

    text = inside.runner.run(busy())
    inside("import os; os.remove('begun'); os.remove('ended')")
    assert text.splitlines()[:2000] == [str(i) for i in range(2000)]


def test_forged_messages_harm_nobody(tight: Run) -> None:
    tight("kept = 1")
    text = tight(FORGED).text
    assert "for another" not in text
    assert tight("kept").text == "1"


RAW = """
    import os, socket, stat
    for number in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode) and socket.socket(fileno=os.dup(number)).getpeername() != 0:
                os.set_blocking(number, True)
                os.write(number, {bytes})
                for _ in range({times}): os.write(number, {more})
        except OSError: pass
"""


NONSENSE = {
    "nonsense": ("b'GET / HTTP/1.1'", "b''", 0),
    "parts": (r"b'\x03' + bytes(7) + b'\xff'", "b'x' * 65536", 200),
    "empty parts without end": (r"b''", r"(b'\x01\x00' * 32768)", 200),
    "a part without end": (r"b'\x02' + b'\x7f' + b'\xff' * 7", "b'x' * 65536", 200),
}


def test_nonsense_on_the_sockets_ends_a_call_and_not_the_host() -> None:
    async def attempt(session: PythonSession, name: str) -> None:
        first, more, times = NONSENSE[name]
        began = await warm(session)
        text = await said(
            session,
            RAW.replace("{bytes}", first).replace("{more}", more).replace("{times}", str(times)),
        )
        assert time.monotonic() - began < SOON
        assert "The next call starts a new one" in text or await said(session, "1 + 1") == "2"
        await session._end_kernel()

    each(NONSENSE, attempt, TIGHT | {"seconds": 1})


ENDINGS = {
    "it exits": "import os; os._exit(3)",
    "it kills its group": "import os; os.kill(0, 9)",
    "it crashes": "import ctypes; ctypes.string_at(0)",
    "it closes everything": "import os; os.closerange(0, 512)",
    "it stops itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "it hangs in C": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); sum(iter(int, 1))",
    "it replaces itself": "import os; os.execv('/usr/bin/sleep', ['sleep', '1000'])",
}


def test_a_kernel_that_ends_or_must_be_ended_is_started_anew() -> None:
    async def attempt(session: PythonSession, name: str) -> None:
        await said(session, "open('kept.txt', 'w').write('x')")
        began = time.monotonic()
        text = await said(session, ENDINGS[name])
        assert time.monotonic() - began < SOON
        assert "[The kernel was ended: " in text and "variables and imports are gone" in text
        assert await said(session, "import os; os.path.exists('kept.txt')") == "True"

    each(ENDINGS, attempt, BRIEF)


TOO_LONG = {
    "a loop": ("while True: pass", "longer than 0.8 seconds"),
    "sleep": ("import time; time.sleep(1000)", "longer than 0.8 seconds"),
    "a child": ("import subprocess; subprocess.run(['sleep', '1000'])", "longer than 0.8 seconds"),
    "output": ("while True: print('x' * 1000)", ""),
    "flushed output": ("while True: print('x', flush=True)", ""),
    "a child's output": ("import subprocess; subprocess.run(['yes'])", ""),
}


def test_what_takes_too_long_is_interrupted_and_the_kernel_kept() -> None:
    async def attempt(session: PythonSession, name: str) -> None:
        code, why = TOO_LONG[name]
        await said(session, "kept = 5")
        began = time.monotonic()
        text = await said(session, code)
        assert time.monotonic() - began < SOON
        assert why in text and "and was interrupted. Variables are kept.]" in text and len(text) < 6000
        assert await said(session, "kept") == "5"

    each(TOO_LONG, attempt, BRIEF, lanes=2)


def test_more_output_than_allowed_is_interrupted(tight: Run) -> None:
    text = tight("while True: print('x' * 10_000)").text
    assert "said more than 4 MiB and was interrupted" in text and len(text) < 6000


GOING_ON = {
    "memory": ("bytearray(1 << 30)", "MemoryError"),
    "a thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
        "can't start new thread",
    ),
    "a large file": ("open('large', 'wb').write(bytes(9 << 20))", "File too large"),
    "a file of nothing": ("open('sparse', 'wb').truncate(1 << 40)", "File too large"),
    "/tmp": ("open('/tmp/x', 'wb').write(bytes(7 << 20)); open('/tmp/y', 'wb').write(bytes(7 << 20))", "No space left"),
    "/dev/shm": (
        "open('/dev/shm/x', 'wb').write(bytes(7 << 20)); open('/dev/shm/y', 'wb').write(bytes(7 << 20))",
        "No space",
    ),
    "open files": ("kept_open = [open('/dev/null') for _ in range(10_000)]", "Too many open files"),
}


def test_a_fork_bomb_ends_with_its_call() -> None:
    async def attempt(session: PythonSession, name: str) -> None:
        began = await warm(session)
        text = await said(session, "while True:\n    try: os.fork()\n    except OSError: pass")
        assert time.monotonic() - began < SOON
        assert "[The kernel was ended: " in text and session._kernel is None
        assert await said(session, "1 + 1") == "2"

    each(["fork bomb"], attempt, BRIEF, lanes=1)


@pytest.mark.parametrize("name", GOING_ON)
def test_what_goes_too_far_is_stopped_and_the_kernel_kept(tight: Run, name: str) -> None:
    code, what = GOING_ON[name]
    tight("kept = 5")
    result = tight(code)
    assert what in result.text and len(result.text) < 6000
    tight("""
        import glob, os
        kept_open = 0
        for path in [*glob.glob("/tmp/[xy]"), *glob.glob("/dev/shm/*"), "large", "sparse"]:
            if os.path.exists(path): os.remove(path)
    """)
    assert tight("kept").text == "5"
    if name == "a thread bomb":
        tight("os._exit(0)")


FILLING = {
    "many files": "for i in range(10): open(f'{i}', 'wb').write(bytes(1 << 20))",
    "small files": "for i in range(1000): open(f'{i}', 'w').close()",
    "deep folders": "import os\nfor i in range(1000): os.mkdir('d'); os.chdir('d')",
    "a closed folder": "import os; os.mkdir('d'); open('d/x', 'w').close(); os.chmod('d', 0)",
    "files without names": """
        import os, time
        handles = []
        for i in range(4):
            handles.append(open("x", "wb")); handles[-1].write(bytes(3 << 20)); handles[-1].flush(); os.remove("x")
        time.sleep(1000)
    """,
}


def test_a_drive_that_is_filled_is_emptied_of_what_the_call_wrote() -> None:
    async def attempt(session: PythonSession, name: str) -> None:
        await said(session, "import os; os.chdir('/mnt/data'); open('kept.txt', 'w').close()")
        text = await said(session, FILLING[name])
        assert "/mnt/data may hold" in text and "what the call wrote there was removed" in text
        assert [path.name for path in session._drive.folder.iterdir()] == ["kept.txt"]
        if session._kernel is not None:  # it may be in a folder that is gone
            await session._end_kernel()

    # Nothing is closed to root.
    each([name for name in FILLING if os.geteuid() or name != "a closed folder"], attempt, TIGHT)


SCRATCH = {
    "memory of a tree": (
        """
        import mmap
        for _ in range(6):
            if os.fork() == 0:
                memory = mmap.mmap(-1, 100 << 20); memory.write(b"x" * (100 << 20)); signal.pause()
        """,
        "may take 256 MiB of memory",
    ),
    "files of nothing": ("for i in range(9000): open(f'/tmp/{i}', 'w').close()", "/tmp may hold 2,048 files"),
    "names in shared memory": ("for i in range(9000): os.symlink('x', f'/dev/shm/{i}')", "/dev/shm may hold"),
    "what waits in sockets": (
        """
        import socket
        for _ in range(4):
            if os.fork() == 0:
                kept = [socket.socketpair() for _ in range(200)]; signal.pause()
        """,
        "may take 256 MiB of memory",
    ),
    "tables of pages": (
        """
        import mmap
        for _ in range(12):
            if os.fork() == 0:
                memory = mmap.mmap(-1, 12 << 30, mmap.MAP_PRIVATE | 0x4000, mmap.PROT_READ)
                memory.madvise(15)
                for place in range(0, 12 << 30, 2 << 20): memory[place]
                signal.pause()
        """,
        "may take 256 MiB of memory",
    ),
}


def test_what_the_system_keeps_for_the_code_is_counted_too() -> None:
    async def attempt(session: PythonSession, name: str) -> None:
        await warm(session)
        code, why = SCRATCH[name]
        assert why in await said(session, textwrap.dedent(code) + "\nsignal.pause()")

    each(SCRATCH, attempt, TIGHT)


def test_copies_of_files_take_no_more_than_the_drive(tight: Run) -> None:
    earlier = [tight(f"open('{n}', 'wb').write(bytes(3 << 20))").files[0].path for n in range(2)]
    tight("import os; os.remove('0'); os.remove('1')")
    later = [tight(f"open('{n}', 'wb').write(bytes(3 << 20))").files[0].path for n in range(2, 4)]
    assert [path.exists() for path in earlier + later] == [False, False, True, True]
    tight("os.remove('2'); os.remove('3')")


def test_pictures_fill_no_drive(tight: Run) -> None:
    text = tight(f"""
        import base64
        from IPython.display import display
        open("most", "wb").write(bytes((8 << 20) - 1000))
        display({{"image/png": base64.b64encode(base64.b64decode({PNG!r}) + bytes(2000)).decode()}}, raw=True)
    """).text
    assert "A picture was lost: figure-1.png has 2.1 KiB and does not fit" in text
    tight("import os; os.remove('most')")


def test_a_cancelled_call_is_interrupted_and_its_state_kept(tight: Run) -> None:
    session: PythonSession = tight.session

    async def cancelled(before: str) -> float:
        started = session._drive.folder / "started"
        call = asyncio.create_task(session.call("python", before + "\nopen('started', 'w').close()\nwhile True: pass"))
        while not started.exists() and not call.done():
            await asyncio.sleep(0.01)
        began = time.monotonic()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        started.unlink()
        return time.monotonic() - began

    tight("kept = 8")
    assert tight.runner.run(cancelled("")) < TIGHT["seconds"]  # and not because its time is over
    assert tight("kept").text.startswith("8")
    assert tight.runner.run(cancelled("import signal; signal.signal(2, signal.SIG_IGN)")) < TIGHT["seconds"]
    assert session._kernel is None and "NameError" in tight("kept").text


HOST = """
import asyncio, sys, tempfile
from freehold.tools.python import PythonTool
async def main():
    session = await PythonTool().open()
    await session.call("python", "import subprocess; child = subprocess.Popen(['sleep', '1000'])")
    print(session._kernel.first, session._folder, flush=True)
    await session.call("python", "while True: pass")
asyncio.run(main())
"""


def test_nothing_is_left_of_a_host_that_is_killed(inside: Run) -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True, env=_with_freehold())
    with host:
        assert host.stdout is not None
        first, folder = host.stdout.readline().split()
        below = [int(first), *_below(int(first))]
        assert len(below) == 3
        host.kill()
    deadline = time.monotonic() + SOON
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
    assert Path(folder).exists()
    make()
    assert not Path(folder).exists()
    assert inside("1 + 1").text == "2"  # that of a living host stays


def test_a_new_folder_is_not_taken_for_abandoned() -> None:
    async def opened() -> None:
        for _ in range(100):
            session = await tool.open()
            assert session._folder.is_dir()
            await session.aclose()

    tool, done = make(), threading.Event()

    def remove() -> None:
        while not done.is_set():
            _remove_abandoned()

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        asyncio.run(opened())
    finally:
        done.set()
        thread.join()


def test_without_user_namespaces_there_is_no_tool() -> None:
    tool = make()
    script = "from freehold.tools.python import PythonTool; PythonTool()"
    done = subprocess.run(
        [
            tool._confinement.bubblewrap,
            "--unshare-user",
            "--disable-userns",
            "--dev-bind",
            "/",
            "/",
            sys.executable,
            "-c",
            script,
        ],
        capture_output=True,
        text=True,
        env=_with_freehold(),
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("freehold.errors.UnsupportedError: the python tool is off") and "user namespaces" in last


def test_limits_that_cannot_be_kept_to_are_refused() -> None:
    for limits in ({"seconds": 0}, {"memory_bytes": 1}, {"processes": -1}, {"output_chars": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(limits))):
            PythonTool(**limits)


def test_the_model_is_told_what_is_so() -> None:
    description = make(seconds=30).namespace.description or ""
    assert "time out after 30.0 seconds" in description and "UNKNOWN" not in description and "disabled" in description


def test_text_is_made_plain_in_time() -> None:
    for text in ("\r" * 300_000, "\x1b" * 300_000, "\x1b]" * 300_000, "\x1b[" * 300_000, "x" * 300_000 + "\r"):
        began = time.monotonic()
        assert all(c.isprintable() for c in plain(text))
        assert time.monotonic() - began < 5
