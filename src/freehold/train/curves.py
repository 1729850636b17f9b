"""Charts of a run's metrics: curves.png, and TensorBoard's files. Each takes a package that is not always there."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freehold.disk import new_file
from freehold.errors import BackendError
from freehold.train.metrics import Report

NO_CHART = "no curves.png: it needs matplotlib; pip install 'freehold[tune]'"
_NO_SCALARS = ("step", "steps", "time")


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, learning rate and gradient norm by step, as a PNG. Raises DiskError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(2, 1), sharex=True)
    steps = [line for line in metrics if "loss" in line]
    measured = [line for line in metrics if "validation_loss" in line]
    upper.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="tab:blue", label="training")
    if measured:
        upper.plot(
            [line["step"] for line in measured],
            [line["validation_loss"] for line in measured],
            color="tab:orange",
            marker="o",
            label="validation",
        )
    upper.set(ylabel=f"loss per {'pair' if any('rewards_margin' in line for line in steps) else 'token'}")
    upper.legend(loc="upper right")  # finding the best place takes seconds where there is much to draw
    upper.grid(alpha=0.3)
    lower.plot([line["step"] for line in steps], [line["gradient_norm"] for line in steps], color="tab:green")
    lower.set(ylabel="gradient norm", xlabel="step")
    rates = lower.twinx()
    rates.plot(
        [line["step"] for line in steps], [line["learning_rate"] for line in steps], color="gray", linestyle="--"
    )
    rates.set(ylabel="learning rate")
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def check_tensorboard() -> None:
    """Raises BackendError where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise BackendError(
            "--tensorboard needs the package tensorboard, which is not installed; run pip install 'freehold[tune]'"
        )


def tensorboard(folder: Path) -> Report:
    """Writes every number of metrics.jsonl for TensorBoard. What a killed run said beyond its checkpoint is purged."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None

    def report(line: Mapping[str, Any]) -> None:
        nonlocal writer
        if writer is None:  # the first line says where the run begins
            writer = SummaryWriter(str(folder), purge_step=line["step"] + 1)
        for name, value in line.items():
            if name not in _NO_SCALARS and isinstance(value, float):
                writer.add_scalar(name, value, line["step"], walltime=line["time"])
        writer.flush()

    return report
