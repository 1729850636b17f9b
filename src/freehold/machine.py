"""What this machine is: processor, cores, memory. Read from the system when asked, never at import."""

import os
import platform
from pathlib import Path

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


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the process's control group."""
    available = _meminfo("MemAvailable")
    return min(available, *limits) if (limits := _cgroup_headroom()) else available


def total_memory() -> int:
    """Bytes of main memory."""
    return _meminfo("MemTotal")


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


def _cgroup_headroom() -> list[int]:
    """Bytes left under a version 2 memory limit, if there is one."""
    group = Path("/sys/fs/cgroup")
    limit, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
    return [max(0, int(limit) - int(used))] if limit.isdigit() and used.isdigit() else []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
