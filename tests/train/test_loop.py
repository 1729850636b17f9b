"""The loop on its own, with a small objective: what a step is, what is written down, how a run ends, and goes on."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from freehold.errors import CheckpointError, DiskError, DiskSpaceError, OutOfMemoryError, TrainingError
from freehold.train.loop import End, Loop, Outcome
from freehold.train.metrics import read_metrics
from freehold.train.objective import RowLoss
from freehold.train.options import LoopOptions
from tests.train import fitting
from tests.train.fitting import OPTIONS, Fitting


def trained(folder: Path, fit: Fitting | None = None, options: LoopOptions = OPTIONS) -> Outcome:
    folder.mkdir(exist_ok=True)
    return Loop(fit or Fitting(), options, folder).run()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What a run has measured, without what depends on the clock."""
    timeless = [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in metrics(folder)]
    return [line for line in timeless if "event" not in line]


def events(folder: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in metrics(folder) if "event" in line]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# --- steps ------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_down_how(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []
    outcome = Loop(Fitting(dropout=0), OPTIONS, tmp_path, report=seen.append).run()
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert seen == metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1].keys() == {
        "step", "steps", "epoch", "loss", "validation_loss", "learning_rate", "gradient_norm", "tokens",
        "tokens_per_second", "time",
    }  # fmt: skip
    assert (lines[-1]["steps"], lines[-1]["epoch"]) == (12, 4.0)
    assert lines[-1]["tokens"] == 4 * 10 * (1 + 2 + 3 + 4 + 1 + 2) == outcome.state.tokens
    assert [line["step"] for line in metrics(tmp_path) if "validation_loss" in line] == [0, 3, 6, 9, 12]
    assert events(tmp_path)[0] == ("started", 0)
    assert events(tmp_path)[-1] == ("done", 12)


def test_accumulated_rows_are_one_large_batch(tmp_path: Path) -> None:
    """By targets: a mean of the rows' means would be another number."""

    class Joined(Fitting):
        def rows(self, epoch: int) -> Any:
            return [tuple(torch.cat(parts) for parts in zip(*super().rows(epoch), strict=True))]

        @property
        def rows_per_epoch(self) -> int:
            return 1

    apart, joined = Fitting(dropout=0, penalty=0.3), Joined(dropout=0, penalty=0.3)
    trained(tmp_path / "apart", apart, replace(OPTIONS, batch_size=6))
    trained(tmp_path / "joined", joined, replace(OPTIONS, batch_size=1))
    for one, other in zip(numbers(tmp_path / "apart"), numbers(tmp_path / "joined"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert one.get("examples", 1.0) == pytest.approx(1)
    assert torch.allclose(apart.weight, joined.weight, rtol=1e-5)
    assert apart.bias.norm() > 0


def test_gradients_are_clipped_and_reported_as_they_were(tmp_path: Path) -> None:
    fit = Fitting()
    trained(tmp_path, fit, replace(OPTIONS, max_grad_norm=0.01))
    assert numbers(tmp_path)[1]["gradient_norm"] > 1
    left = torch.cat([parameter.grad.flatten() for parameter in fit.parameters if parameter.grad is not None])
    assert float(left.norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_rises_and_falls_along_a_cosine() -> None:
    options = LoopOptions(learning_rate=1.0, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [options.learning_rate_at(step, 10) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343], abs=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_every_step_learns_and_the_first_without_warm_up_at_the_highest_rate(num_steps: int) -> None:
    options = LoopOptions(learning_rate=1.0, warmup_ratio=0, min_lr_ratio=0)
    assert options.learning_rate_at(1, num_steps) == 1.0
    assert options.learning_rate_at(num_steps, num_steps) > 0


@pytest.mark.parametrize(
    ("epochs", "num_rows", "batch_size", "taken"), [(1, 5, 8, 5), (2.5, 6, 4, 15), (2.2, 25, 1, 55), (0.1, 3, 2, 1)]
)
def test_the_last_epoch_is_as_much_of_one_as_was_asked_for(
    tmp_path: Path, epochs: float, num_rows: int, batch_size: int, taken: int
) -> None:
    trained(tmp_path, Fitting(num_rows=num_rows), replace(OPTIONS, epochs=epochs, batch_size=batch_size))
    assert numbers(tmp_path)[-1]["epoch"] == taken / num_rows


def test_steps_go_across_epochs_and_an_epoch_may_be_a_part(tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=2.5, batch_size=4)
    assert (options.num_steps(6), replace(options, max_steps=3).num_steps(6)) == (4, 3)
    trained(tmp_path, Fitting(), options)
    assert numbers(tmp_path)[-1]["tokens"] == sum(10 * len(row[0]) for row in _rows_of(2)) + sum(
        10 * len(row[0]) for row in list(Fitting().rows(2))[:3]
    )


def _rows_of(epochs: int) -> list[fitting.Row]:
    return [row for epoch in range(epochs) for row in Fitting().rows(epoch)]


def test_the_same_seed_gives_the_same_numbers_to_the_last_bit(tmp_path: Path) -> None:
    trained(tmp_path / "one")
    torch.rand(3)  # what others draw in between changes nothing
    trained(tmp_path / "again")
    trained(tmp_path / "other", options=replace(OPTIONS, seed=1))
    assert numbers(tmp_path / "one") == numbers(tmp_path / "again") != numbers(tmp_path / "other")


# --- going on ---------------------------------------------------------------------------------------------------


def test_killed_anywhere_it_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    program = Path(fitting.__file__)
    subprocess.run([sys.executable, program, tmp_path], check=True, timeout=120)
    folders = [path for path in tmp_path.iterdir() if path.name != "whole"]
    assert len(folders) == 10
    for folder in folders:
        assert numbers(folder) == numbers(tmp_path / "whole"), folder.name
        for name in ("weight", "bias"):
            file = f"{name}.safetensors"
            assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        assert checkpoints(folder)[-2:] == checkpoints(tmp_path / "whole")[-2:]


@pytest.mark.parametrize("asked", [1, 2, 4, 7, 8, 9, 21])
def test_stopped_between_rows_it_keeps_the_last_whole_step_and_goes_on(tmp_path: Path, asked: int) -> None:
    count = 0

    def should_stop() -> bool:
        nonlocal count
        count += 1
        return count == asked

    outcome = Loop(Fitting(), OPTIONS, tmp_path, should_stop=should_stop).run()
    assert outcome.end is End.STOPPED
    assert outcome.last.is_dir()
    assert events(tmp_path)[-1] == ("stopped", outcome.state.step)
    fitting.run(tmp_path)
    whole = tmp_path / "whole"
    fitting.run(whole)
    assert numbers(tmp_path) == numbers(whole)
    kept = [step for event, step in events(tmp_path) if event == "checkpoint"]
    assert kept == sorted({step for event, step in events(whole) if event == "checkpoint"} | {outcome.state.step})
    assert (tmp_path / "weight.safetensors").read_bytes() == (whole / "weight.safetensors").read_bytes()


def test_a_best_checkpoint_knows_the_loss_of_its_step(tmp_path: Path) -> None:
    """What tells divergence, and which checkpoint is good, is also as it would have been."""
    options = replace(OPTIONS, eval_steps=1, save_steps=100, save_total_limit=100)
    whole = trained(tmp_path / "whole", options=options).state

    def die(line: Mapping[str, Any]) -> None:
        if line.get("event") == "checkpoint" and line["step"] == 6:
            raise KeyboardInterrupt

    killed = tmp_path / "killed"
    killed.mkdir()
    with pytest.raises(KeyboardInterrupt):
        Loop(Fitting(), options, killed, report=die).run()
    loop = Loop(Fitting(), options, killed)
    loop.resume()
    assert replace(loop.run().state, seconds=0) == replace(whole, seconds=0)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    newest = trained(tmp_path).last
    for name in ("training_state.safetensors", "training_state.json"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=name):
            Loop(Fitting(), OPTIONS, tmp_path).resume()
        (newest / name).write_bytes(content)


def test_half_a_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    trained(tmp_path)
    whole = metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert metrics(tmp_path) == whole
    Loop(Fitting(), OPTIONS, tmp_path).resume()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "checkpoint"


# --- ends -------------------------------------------------------------------------------------------------------


def test_it_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    """Eight examples with noise, and many passes: at some point it learns the noise."""
    options = replace(OPTIONS, epochs=100, eval_steps=2, save_steps=1, patience=3, learning_rate=0.3)
    outcome = trained(tmp_path, Fitting(noise=2.0, num_rows=4, dropout=0), options)
    measured = {line["step"]: line["validation_loss"] for line in numbers(tmp_path) if line.get("validation_loss")}
    assert outcome.end is End.EARLY_STOP
    assert outcome.state.step < options.num_steps(4)
    assert outcome.state.best_validation_loss == min(loss for step, loss in measured.items() if step)
    best, last = outcome.state.best_step, outcome.state.step
    assert best == last - 6
    assert checkpoints(tmp_path) == [f"step-{step:08d}" for step in (best, last - 1, last)]
    assert outcome.best.name == f"step-{best:08d}"
    assert [event for event, _ in events(tmp_path)][-2:] == ["early_stop", "done"]


def test_a_loss_that_is_no_number_ends_it_and_names_the_checkpoint(tmp_path: Path) -> None:
    for name, poisoned in (("loss", torch.nan), ("validation", torch.inf)):
        fit, folder = Fitting(), tmp_path / name
        rows = fit.validation if name == "validation" else fit.training

        def report(line: Mapping[str, Any], rows: Any = rows, poisoned: float = poisoned) -> None:
            if line.get("event") == "checkpoint":
                rows[0][1].fill_(poisoned)

        folder.mkdir()
        with pytest.raises(TrainingError, match=r"step \d is (nan|inf); the last good checkpoint is .*step-0000000"):
            Loop(fit, OPTIONS, folder, report=report).run()
        assert metrics(folder)[-1]["event"] == "failed"
        assert "last good checkpoint" in metrics(folder)[-1]["message"]
        assert all(torch.isfinite(parameter).all() for parameter in fit.parameters)


def test_a_gradient_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    class Steep(Fitting):
        def loss(self, row: fitting.Row, *, training: bool) -> RowLoss:
            return RowLoss(super().loss(row, training=training).total + self.weight.abs().sum().sqrt())

    fit = Steep(validation=0)
    with pytest.raises(TrainingError, match="gradient of step 1 is nan; there is no checkpoint yet"):
        trained(tmp_path, fit)
    assert not fit.weight.any()


def test_divergence_ends_it(tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=100, learning_rate=3.0, warmup_ratio=1)
    with pytest.raises(TrainingError, match=r"diverges: at step \d+ the loss is about .*; the last good checkpoint"):
        trained(tmp_path, Fitting(), options)


def test_a_checkpoint_of_a_run_that_diverges_is_not_called_good(tmp_path: Path) -> None:
    """The loss rises from some step on, until that is divergence. Checkpoints are written meanwhile."""
    for name, validation in (("by the loss of training", 0), ("by validation", 2)):

        class Soon(Fitting):
            steps = 0

            def loss(self, row: fitting.Row, *, training: bool) -> RowLoss:
                self.steps += training
                if training and self.steps > 60:  # 30 steps of two rows
                    with torch.no_grad():
                        self.weight *= 1.1
                return super().loss(row, training=training)

        fit, folder = Soon(validation=validation, dropout=0), tmp_path / name
        options = replace(OPTIONS, epochs=100, save_steps=3, eval_steps=3, save_total_limit=2)
        with pytest.raises(TrainingError, match=r"diverges: .*; the last good checkpoint is .*; train anew") as caught:
            trained(folder, fit, options)
        good = str(caught.value).split("the last good checkpoint is ")[1].split(";")[0]
        kept = checkpoints(folder)
        assert (kept[0], len(kept)) == (Path(good).name, 3)
        assert 9 <= int(kept[0].removeprefix("step-")) <= 30
        before, best, newest = (_loss_of(path) for path in (None, Path(good), folder / "checkpoints" / kept[-1]))
        assert best < before / 2
        assert newest > before


def _loss_of(checkpoint: Path | None) -> float:
    fit = Fitting()
    if checkpoint is not None:
        fit.restore(checkpoint)
    with torch.no_grad():
        return float(sum(fit.loss(row, training=False).total for row in fit.training))


def test_weights_that_the_last_step_spoilt_are_not_called_good(tmp_path: Path) -> None:
    """A checkpoint is written right after the step; that its weights are of no use shows in the next one."""

    class Spoilt(Fitting):
        rows_seen = 0

        def loss(self, row: fitting.Row, *, training: bool) -> RowLoss:
            self.rows_seen += 1
            if self.rows_seen == 19:
                with torch.no_grad():
                    self.weight += torch.inf
            return super().loss(row, training=training)

    options = replace(OPTIONS, save_steps=1, save_total_limit=1)
    with pytest.raises(TrainingError, match=r"step 10 is (nan|inf); the last good checkpoint is .*step-00000008; "):
        trained(tmp_path, Spoilt(validation=0), options)
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000009"]


def test_where_no_checkpoint_is_known_to_be_good_none_is_called_so(tmp_path: Path) -> None:
    fit = Fitting(validation=0)

    def report(line: Mapping[str, Any]) -> None:
        if line.get("event") == "checkpoint":
            fit.training[0][1].fill_(torch.nan)
            fit.training[1][1].fill_(torch.nan)

    options = replace(OPTIONS, save_steps=1, batch_size=6)
    with pytest.raises(TrainingError, match=r"step 2 is nan; no checkpoint is known to be good, .*step-00000001 and"):
        Loop(fit, options, tmp_path, report=report).run()


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path: Path) -> None:
    newest = trained(tmp_path).last / "training_state.json"
    raw = json.loads(newest.read_text())
    del raw["good_until"]
    newest.write_text(json.dumps(raw))
    loop = Loop(Fitting(), OPTIONS, tmp_path)
    loop.resume()
    assert (loop.state.step, loop.state.good_until) == (12, 0)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(line: Mapping[str, Any]) -> None:
        if line.get("event") == "checkpoint":
            monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 6})())

    with pytest.raises(DiskSpaceError, match=r"step-00000004 needs .*; the newest checkpoint is .*step-00000003"):
        Loop(Fitting(), OPTIONS, tmp_path, report=full).run()
    assert checkpoints(tmp_path) == ["step-00000003"]
    assert events(tmp_path)[-1] == ("failed", 4)
    monkeypatch.undo()
    fitting.run(tmp_path)
    fitting.run(tmp_path / "whole")
    assert numbers(tmp_path) == numbers(tmp_path / "whole")


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path) -> None:
    def fill(name: str) -> None:
        if name == "saving":
            raise OSError(28, "No space left on device")

    with pytest.raises(DiskSpaceError, match=r"the disk is full; .*; there is no checkpoint yet"):
        trained(tmp_path, Fitting(moment=fill))
    assert checkpoints(tmp_path) == []


def test_metrics_that_cannot_be_written_are_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written"):
        trained(tmp_path)


def test_memory_that_runs_out_is_told(tmp_path: Path) -> None:
    def allocate(name: str) -> None:
        if name == "row":
            torch.empty(1 << 60)

    with pytest.raises(OutOfMemoryError, match=r"memory ran out in step 1; there is no checkpoint yet; .*max-length"):
        trained(tmp_path, Fitting(moment=allocate))
