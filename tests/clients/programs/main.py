"""Runs the functions of a module beside this file, by name, as they are asked for on stdin: `[function, url]` a line.

With no function, runs the code that stands in the place of the url. Answers null on stdout, or the traceback; what a
client prints goes to stderr.
"""

import asyncio
import importlib
import inspect
import json
import os
import sys
import traceback
from typing import TextIO


def main(program: str, answers: TextIO) -> None:
    functions = importlib.import_module(program)
    loop = asyncio.new_event_loop()
    for line in sys.stdin:
        step, url = json.loads(line)
        failure = None
        try:
            if not step:
                exec(url, {})  # noqa: S102 - it stands in our own docs
            elif inspect.iscoroutine(result := getattr(functions, step)(url)):
                loop.run_until_complete(result)
        except Exception:  # noqa: BLE001 - the test says which
            failure = traceback.format_exc()
        answers.write(json.dumps(failure) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as ours:
        os.dup2(2, 1)
        main(sys.argv[1], ours)
