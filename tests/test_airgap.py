"""The air gap, from inside a process that has closed its network, and from outside it."""

import errno
import json
import platform
import socket
import subprocess
import sys

import pytest

from freehold import airgap
from freehold.errors import UnsupportedError

HAS_SECCOMP = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
needs_seccomp = pytest.mark.skipif(not HAS_SECCOMP, reason="the air gap needs Linux on x86_64 or aarch64")

INSIDE = """
import asyncio, ctypes, json, mmap, os, platform, socket, subprocess, sys, threading
from freehold import airgap

def errno_of(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno
    return 0

outcomes = {"before": errno_of(lambda: socket.socket().close())}
listener = socket.create_server(("127.0.0.1", 0))
closed, from_thread = threading.Event(), []
thread = threading.Thread(
    target=lambda: (closed.wait(), from_thread.append(errno_of(lambda: socket.socket().close())))
)
thread.start()  # is there before the filter is
airgap.close_network()
closed.set()
thread.join()
outcomes["a thread that was there before"] = from_thread[0]

for family in range(1, 46):
    if family not in (socket.AF_UNIX, socket.AF_NETLINK):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            outcomes[f"family {family}, kind {kind}"] = errno_of(lambda: socket.socket(family, kind).close())
outcomes["a pair of another family"] = errno_of(lambda: socket.socketpair(30, socket.SOCK_STREAM))

ours = "import socket\\ntry: socket.socket()\\nexcept OSError as error: raise SystemExit(error.errno)"
outcomes["a child"] = subprocess.run([sys.executable, "-c", ours]).returncode
outcomes["a grandchild"] = subprocess.run(["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, ours]).returncode
outcomes["a thread made later"] = None
late = threading.Thread(target=lambda: outcomes.update({"a thread made later": errno_of(lambda: socket.socket())}))
late.start(), late.join()

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    result = libc.syscall(*(ctypes.c_long(value) for value in (number, *arguments)))
    return ctypes.get_errno() if result < 0 else 0

number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
outcomes["by system call"] = call(number, socket.AF_INET, socket.SOCK_STREAM, 0)
outcomes["with high bits that the kernel drops"] = call(number, 1 << 32 | socket.AF_INET, socket.SOCK_STREAM, 0)
outcomes["io_uring"] = call(425, 8, 0)
outcomes["another process's socket"] = call(438, -1, 0, 0)
if platform.machine() == "x86_64":
    outcomes["x32"] = call(0x40000000 + number, socket.AF_INET, socket.SOCK_STREAM, 0)
again = errno_of(airgap.close_network)  # a second filter upon the first changes nothing

async def serve():
    served = asyncio.Event()
    async def answer(reader, writer):
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()
        served.set()
    async with await asyncio.start_server(answer, sock=listener):
        print(listener.getsockname()[1], flush=True)
        await served.wait()
        await asyncio.sleep(0)

print(json.dumps(outcomes), flush=True)
here, there = socket.socketpair()
here.send(b"x")
assert there.recv(1) == b"x" and again == 0 and airgap.is_closed()
assert os.environ["HF_HUB_OFFLINE"] == "1" == os.environ["PIP_NO_INDEX"]
asyncio.run(serve())
"""


@needs_seccomp
def test_behind_the_gap_no_socket_opens_by_any_way_and_one_that_listens_still_accepts() -> None:
    with subprocess.Popen([sys.executable, "-c", INSIDE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            outcomes = json.loads(process.stdout.readline())
            assert outcomes.pop("before") == 0
            assert {name: code for name, code in outcomes.items() if code != errno.EACCES} == {}
            assert len(outcomes) > 150
            with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=30) as client:
                client.sendall(b"still here\n")
                assert client.makefile("rb").read() == b"still here\n"
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert not airgap.is_closed()  # the child's gap is the child's


IN_32_BITS = """
import ctypes, mmap, signal, socket, sys
from freehold import airgap
code = bytes.fromhex("53 89f8 89f3 87ca cd80 5b c3")  # eax, ebx, ecx, edx = the four arguments; int 0x80
memory = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(code)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
call = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int] * 4)(address)
descriptor = call(359, socket.AF_INET, socket.SOCK_STREAM, 0)
assert descriptor > 0, descriptor
print("ready", flush=True)
airgap.close_network()
print(call(359, socket.AF_INET, socket.SOCK_STREAM, 0), call(102, 1, 0, 0), call(425, 8, 0, 0), call(20, 0, 0, 0) > 0)
"""


@pytest.mark.skipif(not HAS_SECCOMP or platform.machine() != "x86_64", reason="x86_64 has 32-bit system calls")
def test_nor_by_a_32_bit_system_call() -> None:
    done = subprocess.run([sys.executable, "-c", IN_32_BITS], capture_output=True, text=True, check=False)
    if "ready" not in done.stdout:
        pytest.skip("this kernel has no 32-bit system calls")
    assert done.stdout.split() == ["ready", *[str(-errno.EACCES)] * 3, "True"], done.stderr


@needs_seccomp
def test_the_proof_tries_every_way_and_each_is_refused() -> None:
    attempts = {attempt.name: attempt for attempt in airgap.prove()}
    assert all(attempt.refused for attempt in attempts.values())
    assert {"TCP", "TCP over IPv6", "UDP", "DNS", "raw IP", "io_uring", "TCP by a child process"} <= set(attempts)
    assert "Permission denied" in attempts["TCP"].outcome


def test_without_a_gap_the_same_attempts_are_not_called_refused() -> None:
    assert not airgap.is_closed()
    outcomes = {attempt.name: attempt.refused for attempt in airgap._attempts() if attempt.name != "DNS"}
    assert not any(outcomes[name] for name in ("TCP", "UDP", "TCP by system call", "TCP by a child process"))


def test_where_it_cannot_be_had_it_says_so_and_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UnsupportedError, match=r"needs 64-bit Linux on x86_64 or aarch64.*riscv64.*namespace"):
        airgap.close_network()
    assert not airgap.is_closed()
