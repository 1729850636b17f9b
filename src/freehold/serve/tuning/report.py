"""What a training run says, and what a job tells of it: lines of metrics.jsonl become events, checkpoints and figures.

Pure: bytes in, values out. A run that goes on from a checkpoint says some steps again, which are told once. A line that
is none is left out: a run that was killed may have ended within one.
"""

import json
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

_MOST_LINE_BYTES = 1 << 16
_READ_BYTES = 1 << 20
_NAMES = {"loss": "train_loss", "validation_loss": "valid_loss", "steps": "total_steps"}
"""As OpenAI's events have them; what they do not know keeps its name."""
_MOST_FIGURES = 32


class Lines:
    """A file's whole lines, each once, as they come. A run that goes on may have cut the file back, and written more
    than it cut: then it is read on from where it is no longer what was read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends, self._hashes = array("q", [0]), array("q")  # of what was read, line by line

    def more(self) -> list[dict[str, Any]]:
        """What was written since, up to a good deal of it."""
        try:
            with self._path.open("rb") as file:
                self._seek(file)
                data = file.read(_READ_BYTES)
        except FileNotFoundError:
            return []
        whole, newline, rest = data.rpartition(b"\n")
        if not newline:
            if len(rest) > _MOST_LINE_BYTES:
                self._pass(rest)
            return []
        lines = whole.split(newline)
        for line in lines:
            self._pass(line + newline)
        return [value for line in lines if (value := _line(line)) is not None]

    def _pass(self, data: bytes) -> None:
        self._ends.append(self._ends[-1] + len(data))
        self._hashes.append(hash(data))

    def _seek(self, file: BinaryIO) -> None:
        """To the end of the last line that is where it was."""
        while self._hashes:
            file.seek(self._ends[-2])
            if hash(file.read(self._ends[-1] - self._ends[-2])) == self._hashes[-1]:
                return
            self._ends.pop()
            self._hashes.pop()
        file.seek(0)

    def rest(self) -> list[dict[str, Any]]:
        """All that is there."""
        lines: list[dict[str, Any]] = []
        while more := self.more():
            lines += more
        return lines


def _line(data: bytes) -> dict[str, Any] | None:
    if len(data) > _MOST_LINE_BYTES:
        return None
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is. `step` and `saved` are the last ones that were told; `began` is when its first step of now was
    told, and `began_after` the steps that were done by then."""

    step: int = -1
    saved: int = 0
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    started: bool = False
    failure: str | None = None
    began: float | None = None
    began_after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Written after `step`, with the figures of then."""

    step: int
    created_at: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What lines came to. `finish` is when the run should end, going by its pace."""

    standing: Standing
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    finish: float | None = None


def read(lines: Iterable[Mapping[str, Any]], standing: Standing, *, now: float) -> Told:
    """What is new in these lines."""
    told = Told(standing=standing)
    for line in lines:
        step, time = _whole(line.get("step")), _number(line.get("time")) or now
        match line.get("event"):
            case None if step is not None and step > standing.step:
                standing = _after_step(line, step, time, standing)
                told.events.append(_step_event(line, step, standing, time))
            case "started":
                standing = replace(standing, started=True, failure=None, began=None)
            case "checkpoint" if step is not None and step > standing.saved:
                standing = replace(standing, saved=step)
                told.checkpoints.append(Checkpoint(step=step, created_at=time, metrics=_metrics(standing)))
                told.events.append(event(f"Checkpoint created at step {step}", time, data={"step": step}))
            case "notice" if not standing.started:  # what begins anew says it again
                told.events.append(event(str(line.get("message", ""))[:500], time, level="warn"))
            case "early_stop":
                message = str(line.get("message", ""))[:500]
                told.events.append(event(f"Training stops early: {message}", time))
            case "failed":
                standing = replace(standing, failure=str(line.get("message", ""))[:4000])
    return replace(told, standing=standing, finish=_finish(standing, now))


def event(message: str, time: float, *, level: str = "info", data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One of a job's events, as it is stored."""
    return {
        "created_at": int(time),
        "level": level,
        "message": message,
        "type": "message",
        "data": {} if data is None else dict(data),
    }


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """The result file: one line a step, in CSV."""
    rows = {
        step: ",".join([str(step), *("" if value is None else repr(value) for value in _losses(line))])
        for line in lines
        if line.get("event") is None and (step := _whole(line.get("step"))) is not None
    }
    return "\n".join(["step,train_loss,valid_loss", *(rows[step] for step in sorted(rows))]) + "\n"


def _losses(line: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return _number(line.get("loss")), _number(line.get("validation_loss"))


def _after_step(line: Mapping[str, Any], step: int, time: float, standing: Standing) -> Standing:
    loss, validation_loss = _losses(line)
    began = standing.began is not None
    return replace(
        standing,
        step=step,
        steps=_whole(line.get("steps")) or standing.steps,
        tokens=_whole(line.get("tokens")) or standing.tokens,
        loss=standing.loss if loss is None else loss,
        validation_loss=standing.validation_loss if validation_loss is None else validation_loss,
        started=True,
        began=standing.began if began else time,
        began_after=standing.began_after if began else step,
    )


def _step_event(line: Mapping[str, Any], step: int, standing: Standing, time: float) -> dict[str, Any]:
    loss, validation_loss = _losses(line)
    said = [f"{kind} loss={value:.4f}" for kind, value in (("training", loss), ("validation", validation_loss))
            if value is not None]  # fmt: skip
    figures = {key: value for key, value in line.items() if key != "time" and _number(value) is not None}
    data = {_NAMES.get(key, key): value for key, value in list(figures.items())[:_MOST_FIGURES]}
    total = "" if standing.steps is None else f"/{standing.steps}"
    message = f"Step {step}{total}" + (f": {', '.join(said)}" if said else "")
    return event(message, time, data=data) | {"type": "metrics"}


def _metrics(standing: Standing) -> dict[str, float]:
    found = {"step": float(standing.saved), "train_loss": standing.loss, "valid_loss": standing.validation_loss}
    return {name: value for name, value in found.items() if value is not None}


def _finish(standing: Standing, now: float) -> float | None:
    done = standing.step - standing.began_after
    if standing.steps is None or standing.began is None or done <= 0:
        return None
    return now + (now - standing.began) / done * (standing.steps - standing.step)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None
