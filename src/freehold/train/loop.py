"""The loop: steps of AdamW over an objective's rows, measured, written down, and exactly resumed.

A step's rows, their order and the random numbers of dropout are functions of the seed and the step, never of what came
before: a run that was killed goes on from its last checkpoint with the very losses of one that was not. What cannot go
on (a loss that is no number, divergence, a full disk, no memory) ends with an error that names a checkpoint: the
newest, where the run can go on from it, and else the last good one. Good is what measurements after it say: the
checkpoint with the lowest validation loss, where that is no worse than the model's before; else the newest one whose
weights gave the step after it a loss in line with the lowest so far.
The loop knows objectives (objective.py) and nothing of models; called by run.py.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from freehold.engine.core import is_out_of_memory
from freehold.errors import DiskError, OutOfMemoryError, TrainingError
from freehold.log import Progress, logger, no_progress
from freehold.train.checkpoints import Checkpoints, TrainingState
from freehold.train.metrics import Journal, Report
from freehold.train.objective import Objective
from freehold.train.options import LoopOptions

Row = TypeVar("Row")

_SMOOTHING = 0.9
_BEYOND = 2.0  # times the lowest smoothed loss, and _BEYOND_MORE, is too far
_BEYOND_MORE = 1.0
_MOST_BEYOND = 20  # steps in a row
_IN_LINE = 1.1  # times the lowest smoothed loss, and _IN_LINE_MORE: up to there it has not begun to rise
_IN_LINE_MORE = 0.1


class End(Enum):
    DONE = "done"
    EARLY_STOP = "early stop"
    STOPPED = "stopped"


class Outcome(NamedTuple):
    """`best` is the checkpoint with the lowest validation loss; the last one where there is no validation."""

    end: End
    state: TrainingState
    last: Path
    best: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What one step came to."""

    loss: float
    gradient_norm: float
    num_tokens: int
    figures: dict[str, float]


class Loop(Generic[Row]):
    """One run. `folder` gets metrics.jsonl and checkpoints/. `should_stop` is asked between rows. `notices` are what a
    run that begins says first."""

    def __init__(
        self,
        objective: Objective[Row],
        options: LoopOptions,
        folder: Path,
        *,
        report: Report = lambda line: None,
        progress: Progress = no_progress,
        should_stop: Callable[[], bool] = lambda: False,
        notices: Sequence[str] = (),
    ) -> None:
        self._objective = objective
        self._options = options
        self._folder = folder
        self._journal = Journal(folder / "metrics.jsonl", report)
        self._checkpoints = Checkpoints(folder / "checkpoints")
        self._progress = progress
        self._should_stop = should_stop
        self._notices = notices
        self._validation = objective.validation_rows()
        self._epoch: tuple[int, Any] = (-1, ())
        self.num_steps = options.num_steps(objective.rows_per_epoch)
        tenth = max(1, math.ceil(self.num_steps / 10))
        self._eval_steps = options.eval_steps or tenth
        self._save_steps = options.save_steps or tenth
        self._optimizer = torch.optim.AdamW(
            objective.parameters,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.weight_decay,
        )
        self.state = TrainingState()

    def resume(self) -> None:
        """Go on from the newest checkpoint, or begin anew where there is none yet. To be called before `run`."""
        steps = self._checkpoints.steps
        if steps:
            self._notices = ()
            self.state = self._checkpoints.restore(steps[-1], self._objective, self._optimizer)
        # A step that was stopped while it was measured is going to say what it has to say, but for its checkpoint.
        self._journal.cut_back(self.state.step - bool(self.state.unsaid) if steps else -1)
        if self.state.unsaid:
            self._tell_checkpoint(self._checkpoints.path(self.state.step))

    def run(self, finish: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
        """Train to the end and `finish`. When it was asked to stop it returns without, with a checkpoint of the last
        whole step. Raises TrainingError, DiskError and OutOfMemoryError, which name a checkpoint."""
        try:
            for notice in self._notices:
                self._journal.event("notice", self.state.step, message=notice)
            self._journal.event("started", self.state.step)
            outcome = self._train()
            if outcome.end is not End.STOPPED:
                finish(outcome)
                self._journal.event("done", self.state.step, path=self._folder)
        except Exception as error:
            typed = self._typed(error)
            self._journal.event("failed", self.state.step, message=str(typed) or type(typed).__name__, quietly=True)
            if typed is error:
                raise
            raise typed from None
        return outcome

    def _train(self) -> Outcome:
        end = End.DONE
        try:
            self._begin()
            while self.state.step < self.num_steps:
                if self._has_stalled():
                    end = End.EARLY_STOP
                    break
                self._advance()
        except _Stopped:
            end = End.STOPPED
        last = self._save()
        if end is End.EARLY_STOP:
            self._journal.event("early_stop", self.state.step, message=self._stalled_message())
        elif end is End.STOPPED:
            self._journal.event("stopped", self.state.step, message=f"{last} is where it can be resumed")
        if end is not End.STOPPED:
            self._tell_rise()
        best = self.state.best_step
        return Outcome(end, self.state, last, last if best is None else self._checkpoints.path(best))

    def _begin(self) -> None:
        state = self.state
        if state.unsaid:
            self._conclude()
        elif state.step == 0 and self._validation and state.first_validation_loss is None:
            loss = self._validate()
            state.first_validation_loss = loss
            self._journal.write({"step": 0, "steps": self.num_steps, "epoch": 0.0, "validation_loss": loss})

    def _advance(self) -> None:
        """One step, and what is due after it."""
        state = self.state
        began = time.monotonic()
        number = state.step + 1
        rate = self._options.learning_rate_at(number, self.num_steps)
        step = self._step(number, rate)
        seconds = time.monotonic() - began
        state.step = number
        state.loss = step.loss
        state.tokens += step.num_tokens
        state.seconds += seconds
        state.unsaid = {
            "step": number,
            "steps": self.num_steps,
            "epoch": self._rows_until(number) / self._objective.rows_per_epoch,
            "loss": step.loss,
            "learning_rate": rate,
            "gradient_norm": step.gradient_norm,
            "tokens": state.tokens,
            "tokens_per_second": step.num_tokens / max(seconds, 1e-9),
            **step.figures,
        }
        self._conclude()

    def _conclude(self) -> None:
        """Measure, write down and save what is due after a step. Who stops meanwhile can resume in front of this."""
        state, line = self.state, self.state.unsaid
        is_last = state.step == self.num_steps
        is_better = False
        if self._validation and (state.step % self._eval_steps == 0 or is_last):
            loss = self._validate()
            line["validation_loss"] = loss
            is_better = self._take_validation(loss)
        state.unsaid = {}
        self._journal.write(line)
        self._take_loss(line["loss"])
        if is_better:  # before anything can end the run: it is then the good one that a message names
            self._save()
        self._check_divergence()
        if not is_better and (state.step % self._save_steps == 0 or is_last):
            self._save()

    # --- one step -----------------------------------------------------------------------------------------------

    def _step(self, number: int, rate: float) -> _Step:
        rows = list(self._rows_of(number))
        sizes = [self._objective.size(row) for row in rows]
        num_targets = sum(size.num_targets for size in sizes)
        parameters = self._objective.parameters
        for parameter in parameters:
            parameter.grad = None
        total = 0.0
        figures: dict[str, float] = {}
        for index, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            if self._should_stop():
                raise _Stopped
            self._progress("step", index, len(rows))
            with _randomness(parameters[0].device, f"{self._options.seed} {number} {index}"):
                loss = self._objective.loss(row, training=True)
                # By the targets of the whole step: rows with more to learn count for more.
                shared = loss.total / num_targets
                if loss.penalty is not None:
                    shared = shared + loss.penalty * (size.num_targets / num_targets)
                shared.backward()
            total += float(loss.total.detach())
            if not math.isfinite(total):
                raise TrainingError(f"the loss of step {number} is {total}")
            for name, value in loss.figures.items():
                figures[name] = figures.get(name, 0.0) + value / num_targets
        self._progress("step", len(rows), len(rows))
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._options.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient of step {number} is {norm}")
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return _Step(
            loss=total / num_targets,
            gradient_norm=norm,
            num_tokens=sum(size.num_tokens for size in sizes),
            figures=figures,
        )

    def _rows_of(self, number: int) -> Iterator[Row]:
        """Of step `number`."""
        for index in range(self._rows_until(number - 1), self._rows_until(number)):
            epoch, row = divmod(index, self._objective.rows_per_epoch)
            if self._epoch[0] != epoch:
                self._epoch = (epoch, self._objective.rows(epoch))
            yield self._epoch[1][row]

    def _rows_until(self, number: int) -> int:
        """That steps up to `number` take, counted through all epochs."""
        return min(number * self._options.batch_size, self._options.num_rows(self._objective.rows_per_epoch))

    def _validate(self) -> float:
        total, num_targets = 0.0, 0
        with torch.no_grad():
            for index, row in enumerate(self._validation):
                if self._should_stop():
                    raise _Stopped
                self._progress("validation", index, len(self._validation))
                total += float(self._objective.loss(row, training=False).total)
                num_targets += self._objective.size(row).num_targets
        self._progress("validation", len(self._validation), len(self._validation))
        if not math.isfinite(total):
            raise TrainingError(f"the validation loss after step {self.state.step} is {total}")
        return total / num_targets

    # --- what is made of it -------------------------------------------------------------------------------------

    def _take_validation(self, loss: float) -> bool:
        """Whether it is the best so far."""
        state = self.state
        if state.best_validation_loss is None or loss < state.best_validation_loss:
            state.best_validation_loss, state.best_step, state.num_not_better = loss, state.step, 0
            return True
        state.num_not_better += 1
        return False

    def _has_stalled(self) -> bool:
        return self._options.patience is not None and self.state.num_not_better >= self._options.patience

    def _stalled_message(self) -> str:
        state = self.state
        return f"the validation loss has been no better than {state.best_validation_loss} since step {state.best_step}"

    def _tell_rise(self) -> None:
        """Where nothing that was measured is as good as what there was before: it is a result all the same."""
        before, best = self.state.first_validation_loss, self.state.best_validation_loss
        if before is not None and best is not None and best > before:
            logger.warning(
                "the validation loss was %.4f before and is %.4f at its best: keep what you had, or train anew with a "
                "lower --learning-rate, or other data", before, best,
            )  # fmt: skip

    def _take_loss(self, loss: float) -> None:
        state = self.state
        smoothed = loss if state.smoothed is None else _SMOOTHING * state.smoothed + (1 - _SMOOTHING) * loss
        lowest = smoothed if state.lowest_smoothed is None else min(smoothed, state.lowest_smoothed)
        state.smoothed, state.lowest_smoothed = smoothed, lowest
        # One step's rows may be harder than others, so that its own loss is given more room than the smoothed one.
        if smoothed <= _IN_LINE * lowest + _IN_LINE_MORE and loss <= _BEYOND * lowest + _BEYOND_MORE:
            state.good_until = state.step - 1
        state.num_beyond = state.num_beyond + 1 if smoothed > _BEYOND * lowest + _BEYOND_MORE else 0

    def _check_divergence(self) -> None:
        state = self.state
        if state.num_beyond >= _MOST_BEYOND:
            raise TrainingError(
                f"training diverges: at step {state.step} the loss is about {state.smoothed:.3g}, and it was "
                f"{state.lowest_smoothed:.3g}"
            )

    def _save(self) -> Path:
        is_new = self.state.step not in self._checkpoints.steps
        path = self._checkpoints.save(self._objective, self._optimizer, self.state)
        if is_new:
            self._tell_checkpoint(path)
        keep = {step for step in (self.state.best_step, self._good_step) if step is not None}
        self._checkpoints.prune(self._options.save_total_limit, keep)
        return path

    def _tell_checkpoint(self, path: Path) -> None:
        self._journal.event("checkpoint", self.state.step, path=path)

    @property
    def _good_step(self) -> int | None:
        """Of the last good checkpoint."""
        state = self.state
        before, best = state.first_validation_loss, state.best_validation_loss
        if best is not None and (before is None or best <= before):
            return state.best_step
        return max((step for step in self._checkpoints.steps if step <= state.good_until), default=None)

    def _typed(self, error: Exception) -> Exception:
        newest = self._checkpoints.newest
        kept = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"
        remedy = "begin again" if newest is None else "resume from it"
        match error:
            case TrainingError():
                good = self._good_step
                if good is not None:
                    kept = f"the last good checkpoint is {self._checkpoints.path(good)}"
                elif newest is not None:
                    kept = f"no checkpoint is known to be good, {newest} and older ones may be spoilt"
                return TrainingError(f"{error}; {kept}; train anew with a lower --learning-rate, or look at the data")
            case DiskError():
                return type(error)(f"{error}; {kept}; {remedy} when there is room")
            case _ if is_out_of_memory(error):
                return OutOfMemoryError(
                    f"memory ran out in step {self.state.step + 1}; {kept}; close other programs and resume, or train "
                    "anew with a smaller --max-length"
                )
            case _:
                return error


class _Stopped(Exception):  # noqa: N818 — nothing went wrong
    """Somebody asked to stop between two rows."""


@contextmanager
def _randomness(device: torch.device, seed: str) -> Iterator[None]:
    """Torch's generators as of this seed; what they were before, they are again."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest()) >> 1)
        yield
