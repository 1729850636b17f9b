"""A small objective of the loop, and a program that kills runs of it.

    fitting.py OUT

OUT/whole is a run that nobody disturbed. In OUT/0, OUT/1, … each is killed once, at another place, and gone on with.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from freehold.train.loop import Loop
from freehold.train.objective import RowLoss, RowSize
from freehold.train.options import LoopOptions

Row = tuple[Tensor, Tensor]
Moment = Callable[[str], None]


class Fitting:
    """Learns a linear map; rows have one to four examples. `moment` is called at moments that have names."""

    def __init__(
        self,
        *,
        num_rows: int = 6,
        dropout: float = 0.25,
        validation: int = 2,
        noise: float = 0.0,
        penalty: float = 0.0,
        moment: Moment = lambda name: None,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        truth = torch.randn(3, 2, generator=generator)

        def row(count: int, of: Tensor) -> Row:
            x = torch.randn(count, 3, generator=generator)
            return x, x @ of + noise * torch.randn(count, 2, generator=generator)

        self.training = [row(1 + index % 4, truth) for index in range(num_rows)]
        self.validation = [row(3, truth) for _ in range(validation)]
        self.weight = torch.zeros(3, 2, requires_grad=True)
        self.bias = torch.zeros(2, requires_grad=True)
        self.dropout = dropout
        self.penalty = penalty
        self.moment = moment

    @property
    def parameters(self) -> Sequence[Tensor]:
        return (self.weight, self.bias)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.training)

    def rows(self, epoch: int) -> Sequence[Row]:
        order = list(range(len(self.training)))
        Random(epoch).shuffle(order)
        return [self.training[index] for index in order]

    def validation_rows(self) -> Sequence[Row]:
        return self.validation

    def size(self, row: Row) -> RowSize:
        return RowSize(num_targets=len(row[0]), num_tokens=10 * len(row[0]))

    def loss(self, row: Row, *, training: bool) -> RowLoss:
        self.moment("row" if training else "validation row")
        x, y = row
        if training:
            x = torch.nn.functional.dropout(x, self.dropout)
        total = (x @ self.weight + self.bias - y).square().sum()
        if not self.penalty:
            return RowLoss(total)
        return RowLoss(total, self.penalty * self.bias.square().sum(), {"examples": float(len(x))})

    def save(self, folder: Path) -> None:
        save_file({"weight": self.weight.detach()}, folder / "weight.safetensors")
        self.moment("saving")
        save_file({"bias": self.bias.detach()}, folder / "bias.safetensors")

    def restore(self, folder: Path) -> None:
        with torch.no_grad():
            self.weight.copy_(load_file(folder / "weight.safetensors")["weight"])
            self.bias.copy_(load_file(folder / "bias.safetensors")["bias"])

    @property
    def save_bytes(self) -> int:
        return 32


OPTIONS = LoopOptions(epochs=4, batch_size=2, learning_rate=0.1, eval_steps=3, save_steps=4)
"""Twelve steps."""


def run(folder: Path, **changes: Any) -> Fitting:
    """To the end, from wherever the folder is."""
    fitting = Fitting(**changes)
    folder.mkdir(exist_ok=True)
    loop = Loop(fitting, OPTIONS, folder, report=lambda line: fitting.moment("line"))
    loop.resume()
    loop.run(lambda outcome: fitting.save(folder))
    return fitting


def _die_at(wanted: str, count: int) -> Moment:
    seen = 0

    def moment(name: str) -> None:
        nonlocal seen
        seen += name == wanted
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return moment


def _killed_runs(out: Path) -> None:
    moments = [("row", 1), ("row", 20), ("validation row", 1), ("validation row", 6), ("saving", 1), ("saving", 3)]
    moments += [("line", number) for number in (2, 6, 18, 19)]
    run(out / "whole")
    for number, (name, count) in enumerate(moments):
        folder = out / str(number)
        if not (child := os.fork()):
            moment = _die_at(name, count)
            run(folder, moment=moment)
            os._exit(0)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            sys.exit(f"not killed at {name} {count}")
        run(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _killed_runs(Path(sys.argv[1]))
