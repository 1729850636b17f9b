"""How training begins: `python -m freehold.serve.tuning.child SERVER COMMAND ...` makes itself small, and then becomes
the command.

It comes after serving where both want the processor, it is the first to go where memory runs out, and it does not
outlive the server that started it: what it learnt up to its last checkpoint is taken up by the next one. Imports
nothing of Freehold's. Started by `run.py`.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress

_NICENESS = 15
_OUT_OF_MEMORY_SCORE = 800
_SET_PARENT_DEATH_SIGNAL = 1  # prctl


def main(arguments: list[str]) -> None:
    server, command = int(arguments[0]), arguments[1:]
    with suppress(OSError):
        os.nice(_NICENESS)
    if sys.platform == "linux":
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write(str(_OUT_OF_MEMORY_SCORE))
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != server:  # it died before it could have been noticed
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
