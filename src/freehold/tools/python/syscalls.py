"""Which system calls code in the sandbox may make: the filter that bubblewrap installs before the kernel starts.

All are allowed but those that work on data never needs and that lead out, or have led out before: mounts, namespaces,
other processes' memory, keys, kernel modules, BPF, io_uring, every socket but Unix ones. Some are refused because what
they take is counted against no limit: memory without a mapping (memfd), memory that outlives its process (System V),
extended attributes, larger buffers of sockets. Sockets answer no questions about interfaces: those that the host hands
in are of the host's network. A call newer than this table does not exist. 32-bit and x32 calls fail, all of them.

It makes the kernel's surface smaller. It is one wall of several, and not the one that keeps files and network away:
that is what namespaces do.
"""

import errno
import platform
import socket

from freehold import seccomp
from freehold.errors import UnsupportedError

# Numbers on x86_64 and aarch64; None where a machine has no such call.
_REFUSED = {
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "unshare": (272, 97),
    "setns": (308, 268),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # the kernel itself, and large surfaces of it
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "create_module": (174, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "vmsplice": (278, 75),
    "remap_file_pages": (216, 234),
    "lsm_set_self_attr": (460, 460),
    # the machine
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "sysctl": (156, None),
    "personality": (135, 92),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    # memory that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_UNSUPPORTED = {  # as on a file system without them, which is what copying programs expect
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
}
_MISSING = {"clone3": (435, 435), "openat2": (437, 437)}  # their arguments lie in memory: callers fall back on the old
_CLONE, _IOCTL, _SOCKET, _SOCKETPAIR, _SETSOCKOPT = (56, 220), (16, 29), (41, 198), (53, 199), (54, 208)
_FIRST_UNKNOWN = 467  # the same everywhere

# Calls that set a file's mode, and which argument has it.
_MODES = {
    "chmod": ((90, None), 1),
    "fchmod": ((91, 52), 1),
    "fchmodat": ((268, 53), 2),
    "fchmodat2": ((452, 452), 2),
    "open": ((2, None), 2),
    "creat": ((85, None), 1),
    "openat": ((257, 56), 3),
    "mkdir": ((83, None), 1),
    "mkdirat": ((258, 34), 2),
    "mknod": ((133, None), 1),
    "mknodat": ((259, 33), 2),
}
_SET_USER_OR_GROUP_ID = 0o6000

# CLONE_NEWTIME, …NEWNS, …NEWCGROUP, …NEWUTS, …NEWIPC, …NEWUSER, …NEWPID, …NEWNET. The first shares a bit with the
# signal that clone3 has elsewhere: no signal is that high.
_NEW_NAMESPACES = 0x80 | 0x20000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # typing into somebody's terminal
_OF_INTERFACES = range(0x8900, 0x8A00)  # SIOC…


def program() -> bytes:
    """The filter for this machine. Raises UnsupportedError where there is none."""
    architectures = seccomp.architectures()
    if architectures is None:
        raise UnsupportedError(
            f"the python tool needs 64-bit Linux on x86_64 or aarch64, and this is {platform.system()} on "
            f"{platform.machine()}: leave the tool out here"
        )
    column = 0 if platform.machine() == "x86_64" else 1
    refused = [numbers[column] for numbers in _REFUSED.values()]
    pieces = [
        seccomp.at_least(_FIRST_UNKNOWN, errno.ENOSYS),
        seccomp.refuse(errno.ENOSYS, *(numbers[column] for numbers in _MISSING.values())),
        seccomp.refuse(errno.EPERM, *(number for number in refused if number is not None)),
        seccomp.without_bits(errno.EPERM, _CLONE[column], 0, _NEW_NAMESPACES),
        seccomp.refuse(errno.ENOTSUP, *(numbers[column] for numbers in _UNSUPPORTED.values())),
        seccomp.none_of(errno.EPERM, _IOCTL[column], 1, _TIOCSTI, _TIOCLINUX, _OF_INTERFACES),
        seccomp.none_of(errno.EPERM, _SETSOCKOPT[column], 2, socket.SO_SNDBUF),
        seccomp.only(errno.EACCES, _SOCKET[column], 0, socket.AF_UNIX),
        seccomp.only(errno.EACCES, _SOCKETPAIR[column], 0, socket.AF_UNIX),
    ]
    for numbers, argument in _MODES.values():
        number = numbers[column]
        if number is not None:
            pieces.append(seccomp.without_bits(errno.EPERM, number, argument, _SET_USER_OR_GROUP_ID))
    old = seccomp.at_least(0, errno.EPERM)
    return seccomp.program(architectures, b"".join(pieces), old, error=errno.EPERM)
