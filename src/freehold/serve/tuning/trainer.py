"""What a job asks of `freehold tune`: the command line, made of what was checked and of paths that the server made up.

Whoever starts the server (the command line, a test) says how training is begun; a server over a script has no trainer.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNE = (sys.executable, "-m", "freehold", "tune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """`model` is what is tuned, as `--model` takes it. `learning_rates` are those of `freehold tune`, by the type
    of a job's method: a job's own is a multiple of that. Its rows have `max_length` tokens. All trainings are given the
    `options`."""

    model: str
    learning_rates: Mapping[str, float]
    max_length: int = 2048
    command: tuple[str, ...] = TUNE
    options: tuple[str, ...] = ()

    def arguments(
        self,
        method: Mapping[str, Any],
        *,
        training: Path,
        validation: Path | None,
        output: Path,
        seed: int,
        resume: bool,
        adapter: Path | None = None,
    ) -> list[str]:
        """The whole command. `method` is the job's, on the wire; what it leaves to us is left to `freehold tune`. It
        begins with `adapter`, or a new one. A run that goes on is as it began, and knows how that was."""
        if resume:
            return [*self.command, "--resume", str(output)]
        kind = method["type"]
        asked = (method.get(kind) or {}).get("hyperparameters") or {}
        chosen = {name: value for name, value in asked.items() if value is not None and value != "auto"}
        command = [*self.command, str(training), "--model", self.model, "--output", str(output), "--seed", str(seed)]
        command += ["--max-length", str(self.max_length)]
        if adapter is not None:
            command += ["--adapter", str(adapter)]
        if validation is not None:
            command += ["--validation", str(validation)]
        if kind == "dpo":
            command += ["--method", "dpo"]
        if "beta" in chosen:
            command += ["--beta", repr(chosen["beta"])]
        if "n_epochs" in chosen:
            command += ["--epochs", str(chosen["n_epochs"])]
        if "batch_size" in chosen:
            command += ["--batch-size", str(chosen["batch_size"])]
        if "learning_rate_multiplier" in chosen:
            command += ["--learning-rate", repr(self.learning_rates[kind] * chosen["learning_rate_multiplier"])]
        return [*command, *self.options]
