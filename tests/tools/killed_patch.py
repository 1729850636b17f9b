"""Carries out a patch again and again in copies of a folder, killed a step later each time; run as a program.

    killed_patch.py FOLDER PATCH OUT

OUT gets a copy for each step at which it was killed, as it was left, and one more that was not.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from freehold.tools import patch_files
from freehold.tools.patch_format import parse

STEPS = ("mkdir", "link", "rename", "unlink", "rmdir", "fsync", "fchmod", "open")


def carry_out(root: Path, patch: str, step: int) -> None:
    directory = patch_files.PatchDirectory(root)
    changes = directory.plan(parse(patch))
    seen = 0

    def counted(do: Any) -> Any:
        def instead(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return do(*arguments, **named)

        return instead

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    directory.apply(changes)


def main() -> None:
    folder, patch, out = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8"), Path(sys.argv[3])
    for step in range(1000):
        root = out / f"{step:03}"
        shutil.copytree(folder, root)
        if (child := os.fork()) == 0:
            try:
                carry_out(root, patch, step)
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(status)


if __name__ == "__main__":
    main()
