"""Why a training failed, as its job tells it: of an exit code and what the process said last. Pure.

What `freehold tune` says of data and disk is told as it was said, without the server's own paths. What it says before
training has begun is about the files, which are read and checked first.
"""

import re
import signal
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from freehold.serve.tuning.report import Standing

_USAGE = 2  # what the command line exits with where a value given to it cannot be used
_MOST_LINES = 5
_MOST_CHARACTERS = 4000
_ERROR = re.compile(r"^error: ")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class Failure(NamedTuple):
    """OpenAI's error object of a job."""

    code: str
    message: str
    param: str | None = None


def why(
    exit_code: int,
    last_lines: Sequence[str],
    standing: Standing,
    *,
    validation_file: str | None = None,
    hide: Iterable[str] = (),
) -> Failure:
    """`exit_code` is negative for a signal, as `subprocess` has it."""
    said = _said(last_lines, standing, hide)
    if exit_code == -signal.SIGKILL:
        return Failure("training_killed", f"the training was killed; most often because memory ran out{_after(said)}")
    if exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in {each.value for each in signal.Signals} else exit_code
        return Failure("training_crashed", f"the training ended by {name}{_after(said)}")
    if exit_code == _USAGE and not standing.started:
        of_validation = validation_file is not None and validation_file in said
        param = "validation_file" if of_validation else "training_file"
        return Failure("invalid_training_file", said or "the files cannot be trained on", param)
    return Failure("training_failed", said or f"the training ended with the exit code {exit_code}")


def _said(lines: Sequence[str], standing: Standing, hide: Iterable[str]) -> str:
    """From the last error on; else the last lines, whatever they are."""
    begins = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    if begins:
        text = "\n".join(lines[begins[-1] :]).removeprefix("error: ")
    else:
        text = standing.failure or "\n".join(lines[-_MOST_LINES:])
    for path in sorted(hide, key=len, reverse=True):
        if "/" in path and len(path) > 1:  # a model's name may be any word
            text = text.replace(f"{path}/", "").replace(path, "…")
    text = _CONTROL.sub("", text)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _after(said: str) -> str:
    return f". It said last: {said}" if said else ""
