"""The `python` tool: a Jupyter kernel of each conversation's own, in a sandbox that bubblewrap makes.

The code is taken for hostile. It sees the system's programs and libraries, the interpreter and the installed packages,
all read-only; an empty /tmp; and /mnt/data, a folder of its session, which outlives the kernel and ends with the
session. No network, not even a socket for one; nobody's home, environment, keys or processes. Between calls nothing in
it runs. `confinement` says how, `syscalls` what is left of the kernel's interface, `limits` how much may be taken:

- rlimits, which the code cannot raise: memory of a process, processes and threads of all, the size of a file;
- the size of /tmp and /dev/shm;
- a look ten times a second at the memory of all processes, with their page tables and sockets, at the contents of
  /mnt/data and at how many files /tmp and /dev/shm hold, which ends the kernel;
- time and output, after which the call is interrupted, and the kernel ended where that does not help within a second.

What it does not stop:

- a flaw in the Linux kernel, in the system calls that are left. The code runs on your kernel, not in a virtual machine;
- reading the installed packages, the system's programs, and what /proc tells of the machine: processor, memory in use,
  load, kernel version, the paths (not the contents) of what is mounted, among them that of the interpreter;
- using all processors for the time of a call, and seeing by timing that others use them too: side channels;
- more of memory or disk than the limits for a tenth of a second, or for as long as a look takes; and what else the
  kernel keeps: for pipes, locks, mappings. There is no control group around it;
- deleted files that are mapped or on their way through a socket: the disk they take, until the kernel ends;
- lying. Output, names and pictures are what the code says they are. Its result can be wrong or try to persuade the
  model; whoever opens a file from /mnt/data opens a file that somebody else's code has made.
"""

from freehold.tools.python.limits import Limits, read_limits
from freehold.tools.python.tool import PythonSession, PythonTool

__all__ = ["Limits", "PythonSession", "PythonTool", "read_limits"]
