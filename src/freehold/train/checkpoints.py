"""Where a run stands, on disk: what has been learnt, the optimizer's state, and the few numbers that the loop keeps.

    DIR/checkpoints/step-00000100/adapter_config.json, adapter_model.safetensors     what the objective saves
                                  training_state.safetensors, training_state.json    what the loop needs to go on

A checkpoint is there whole or not at all, also after a kill. Everything is kept to the last bit: a run that goes on
from one says the numbers that it would have said. Called by the loop.
"""

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from freehold.disk import new_folder, remove, remove_all_abandoned, write_text
from freehold.errors import CheckpointError
from freehold.train.objective import Objective
from freehold.weights.files import TensorToWrite, header_bytes, read_header, read_json, write_data

_TENSORS = "training_state.safetensors"
_STATE = "training_state.json"
_NAME = re.compile(r"step-(\d{8,})")
_REMEDY = "remove it, and resume from the one before"


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """After `step` steps. `unsaid` is the step's line of metrics, as long as what is due after the step is not done.
    `smoothed` and `lowest_smoothed` are of the training loss, which was far above its lowest for
    `num_beyond` steps. `good_until` is the last step that the next one's loss has shown to have done no harm. The
    validation loss has not fallen for `num_not_better` measurements."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    unsaid: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    smoothed: float | None = None
    lowest_smoothed: float | None = None
    num_beyond: int = 0
    good_until: int = 0
    first_validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int | None = None
    num_not_better: int = 0


class Checkpoints:
    """Those of one run. `steps` are whole ones, the newest last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    @property
    def steps(self) -> list[int]:
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    @property
    def newest(self) -> Path | None:
        return self.path(self.steps[-1]) if self.steps else None

    def save(self, objective: Objective[Any], optimizer: torch.optim.Optimizer, state: TrainingState) -> Path:
        """Raises DiskError, and leaves nothing half-written."""
        path = self.path(state.step)
        if path.exists():
            return path
        tensors = _optimizer_tensors(objective.parameters, optimizer)
        needed = objective.save_bytes + sum(tensor.num_bytes for tensor in tensors)
        with new_folder(path, needed_bytes=needed) as partial:
            objective.save(partial)
            with (partial / _TENSORS).open("wb") as file:
                file.write(header_bytes(tensors, {"format": "pt"}))
                for _ in write_data(file, tensors):
                    pass
                file.flush()
                os.fsync(file.fileno())
            write_text(partial / _STATE, json.dumps(asdict(state), indent=2) + "\n")
        return path

    def restore(self, step: int, objective: Objective[Any], optimizer: torch.optim.Optimizer) -> TrainingState:
        """Raises CheckpointError for what is damaged."""
        path = self.path(step)
        state = _read_state(path / _STATE)
        objective.restore(path)
        _restore_optimizer(path / _TENSORS, objective.parameters, optimizer)
        return state

    def prune(self, num_newest: int, keep: Collection[int]) -> None:
        """All but the newest, and those to `keep`; what killed processes left goes too."""
        remove_all_abandoned(self._folder)
        for step in self.steps[:-num_newest]:
            if step not in keep:
                remove(self.path(step))


def _optimizer_tensors(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> list[TensorToWrite]:
    """By the parameter's number; none before the first step."""

    def to_write(name: str, tensor: Tensor) -> TensorToWrite:
        return TensorToWrite(name, tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))

    return [
        to_write(f"{number}.{name}", tensor)
        for number, parameter in enumerate(parameters)
        for name, tensor in sorted(optimizer.state[parameter].items())
    ]


def _restore_optimizer(path: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    try:
        names = list(read_header(path))
        with safe_open(path, framework="pt") as file:
            for name in names:
                number, _, kind = name.partition(".")
                parameter = parameters[int(number)]
                # A copy: what is mapped lies where the file has it, and sums may depend on how memory is aligned.
                tensor = file.get_tensor(name).clone()
                on_cpu = kind == "step"  # torch keeps the count there, whatever the device
                optimizer.state[parameter][kind] = tensor if on_cpu else tensor.to(parameter.device)
    except (SafetensorError, OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_REMEDY}") from None


def _read_state(path: Path) -> TrainingState:
    raw = read_json(path)
    # Versions before had no `good_until`: what they wrote counts as not known to be good.
    if raw.keys() | {"good_until"} != {field.name for field in fields(TrainingState)}:
        raise CheckpointError(f"{path} is not what this version of Freehold writes; {_REMEDY}")
    return TrainingState(**raw)
