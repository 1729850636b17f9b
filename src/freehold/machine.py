"""What this machine is: processor, cores, memory. Read from the system when asked, never at import."""

import ctypes
import os
import platform
from pathlib import Path

from freehold.errors import UsageError

MOST_THREADS = 1024

_VECTOR_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    return _cpuinfo_field("model name") or platform.processor() or platform.machine()


def vector_features() -> list[str]:
    """The vector instruction sets that matter to kernels, as Linux names them; empty where it does not tell."""
    present = set((_cpuinfo_field("flags") or _cpuinfo_field("Features") or "").split())
    return [flag for flag in _VECTOR_FLAGS if flag in present]


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Cores that this process may run on, hyperthreads of one core counted once."""
    siblings = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        siblings.add(_read(topology / "thread_siblings_list").strip() or str(cpu))
    return len(siblings)


def available_memory() -> int:
    """Bytes that can be allocated without swapping, and within a container's limit."""
    available, limit = _meminfo("MemAvailable"), _container_limit()
    return available if limit is None else min(available, limit - _container_use())


def total_memory() -> int:
    """Bytes of main memory, or of a container's limit."""
    total, limit = _meminfo("MemTotal"), _container_limit()
    return total if limit is None else min(total, limit)


def process_status() -> dict[str, int]:
    """This process's memory in bytes, by the names of /proc/self/status: VmRSS, VmHWM (the peak), RssAnon and so on."""
    fields = {}
    for line in _read(Path("/proc/self/status")).splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0]) * 1024
    return fields


def return_freed_memory() -> None:
    """Give the system back what malloc keeps of freed memory: threads that are gone leave tens of megabytes each."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def return_large_memory() -> None:
    """From now on what is freed in pieces of 4 MiB or more goes back to the system at once, instead of staying in
    pieces that later ones may not fit. It takes time: new pages are zeroed. For the rest of the process."""
    _mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def keep_freed_memory() -> None:
    """From now on what is freed stays with the process, but for pieces of 32 MiB or more: for work that does the same
    again and again, which then finds its pages there, not to be zeroed anew. For the rest of the process."""
    _mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    _mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _mallopt(setting: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(setting, value)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def check_threads(count: object) -> int:
    """A number of threads for the kernels. Raises UsageError for what is none."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_THREADS:
        raise UsageError(f"threads must be between 1 and {MOST_THREADS}, got {count!r}")
    return count


def _cpuinfo_field(name: str) -> str | None:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _meminfo(name: str) -> int:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_CONTAINER = Path("/sys/fs/cgroup")  # inside a container, its own control group (version 2)


def _container_limit() -> int | None:
    limit = _read(_CONTAINER / "memory.max").strip()
    return int(limit) if limit.isdigit() else None


def _container_use() -> int:
    """Bytes in use, without the file cache, which gives way."""
    used = _read(_CONTAINER / "memory.current").strip()
    fields = dict(line.split() for line in _read(_CONTAINER / "memory.stat").splitlines())
    return max(0, int(used) - int(fields.get("inactive_file", 0))) if used.isdigit() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
