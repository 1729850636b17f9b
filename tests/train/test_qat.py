"""LoRA on weights that are merged and rounded: straight-through gradients, and that merging changes nothing at all."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from freehold.config import ExpertFormat
from freehold.errors import CheckpointError, UsageError
from freehold.hub.merge import merge
from freehold.hub.merged import MergedSource
from freehold.kernels import backends
from freehold.model.lora import KINDS, Adapter
from freehold.model.peft_files import read_peft
from freehold.model.transformer import Transformer
from freehold.train.adapting import starting_adapter
from freehold.train.data import PreferenceData, TrainingData
from freehold.train.dpo import DpoTuning
from freehold.train.examples import NO_TARGET, Example, Pair
from freehold.train.forward import taught
from freehold.train.loop import End, Loop
from freehold.train.metrics import read_metrics
from freehold.train.options import DpoOptions, LoopOptions, LoraOptions, LoraTarget
from freehold.train.packing import PackedRow
from freehold.train.sft import LoraTuning
from freehold.weights import mxfp4
from freehold.weights.layouts import open_checkpoint
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.pack_file import load_packed
from tests.checkpoints import CPU, packed, random_table, save, small_config, tokens_of

CONFIG = small_config()
TARGETS = tuple(LoraTarget(kind, 2, 4.0) for kind in KINDS)
QAT = LoraOptions(targets=TARGETS, qat=True, balance=0.01)
TYPES = {"as published": ExpertFormat.MXFP4, "plain experts": ExpertFormat.BF16}

needs_native = pytest.mark.skipif(backends.native() is None, reason="the native kernels are not built")


@pytest.fixture(scope="module", params=list(TYPES.values()), ids=list(TYPES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    table = random_table(CONFIG, dtype=torch.bfloat16)
    return save(folder, CONFIG, packed(table) if request.param is ExpertFormat.MXFP4 else table, experts=request.param)


def published(folder: Path) -> Transformer:
    return Transformer(CONFIG, open_checkpoint(folder).table(), dtype=torch.float32, device=CPU)


def native(folder: Path) -> Transformer:
    return Transformer(CONFIG, load_packed(open_checkpoint(folder), "q8"), dtype=torch.float32, device=CPU)


def examples(seed: int = 0, count: int = 6) -> TrainingData:
    data = TrainingData()
    for number in range(count):
        tokens = tokens_of(CONFIG, 12 + number, seed=10 * seed + number).tolist()
        data.training.append(Example(tokens, [NO_TARGET, *tokens[2:], tokens[0]]))
    data.validation.append(data.training[0])
    return data


def tuning(model: Transformer, folder: Path, options: LoraOptions = QAT) -> LoraTuning:
    table = open_checkpoint(folder).table() if options.qat else None
    adapter = starting_adapter(CONFIG, options, seed=0)
    return LoraTuning(model, adapter, options, examples(), max_length=64, seed=0, table=table)


def stir(adapter: Adapter, strength: float = 0.05) -> None:
    with torch.no_grad():
        for _, b in adapter.factors.values():
            b.normal_(std=strength, generator=torch.Generator().manual_seed(1))


def test_gradients_go_straight_through_the_rounding(checkpoint: Path) -> None:
    """Against torch's own autograd, through W + (rounded − W) of which the second part has no gradient."""
    ours = tuning(published(checkpoint), checkpoint)
    stir(ours.adapter)
    row = ours.rows(0)[0]
    found = ours.loss(row, training=True)
    assert found.penalty is not None
    gradients = torch.autograd.grad(found.total + found.penalty, ours.parameters)

    source, base = MergedSource(open_checkpoint(checkpoint).table(), ours.adapter, origin=""), _plain(checkpoint)
    table: dict[str, Tensor] = dict(base)
    for name in ours.adapter.factors:
        weight = name if name in table else f"{name}.weight"
        with torch.no_grad():
            rounded = source.dense(weight) if weight != name else torch.stack([*map(_values, source.experts(name))])
        added = ours.adapter.weight_delta(name)
        table[weight] = rounded.float() + added - added.detach()
    model = Transformer(CONFIG, table, dtype=torch.float32, device=CPU)
    said = taught(model, row, balance=True)
    expected = torch.autograd.grad(-said.log_probs_S.sum() + 0.01 * said.balance, ours.parameters)
    torch.testing.assert_close(found.total.detach(), -said.log_probs_S.detach().sum(), atol=1e-4, rtol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


@needs_native
def test_the_native_kernels_compute_with_the_merged_weights_alone(checkpoint: Path) -> None:
    """In training as in the engine: the adapter is not there a second time, nor in the gradient."""
    found = []
    for load in (native, published):
        ours = tuning(load(checkpoint), checkpoint, replace(QAT, balance=0.0))
        stir(ours.adapter, 0.3)
        row = ours.rows(0)[0]
        total = ours.loss(row, training=True).total
        assert float(total.detach()) == pytest.approx(measured(ours, row), rel=1e-4)
        found.append(torch.autograd.grad(total, ours.parameters))
    for one, exact in zip(*found, strict=True):
        assert (one - exact).norm() < 0.25 * exact.norm() + 1e-4  # activations are int8 there


def _values(matrix: Tensor | Mxfp4Tensor) -> Tensor:
    return mxfp4.unpack(matrix) if isinstance(matrix, Mxfp4Tensor) else matrix.to(torch.bfloat16).float()


def _plain(folder: Path) -> dict[str, Tensor]:
    return {name: _values(tensor) for name, tensor in open_checkpoint(folder).table().items()}


@needs_native
def test_merging_gives_the_very_model_that_was_trained(checkpoint: Path, tmp_path: Path) -> None:
    """To the last bit of its log-probabilities: the rounding is in the training loss, and so is all that it costs."""
    ours, plain = tuning(native(checkpoint), checkpoint), tuning(native(checkpoint), checkpoint, _without(QAT))
    row = ours.validation_rows()[0]
    before = measured(ours, row)
    options = LoopOptions(max_steps=12, batch_size=1, learning_rate=0.02, min_lr_ratio=0.5)
    for name, objective in (("ours", ours), ("plain", plain)):
        (tmp_path / name).mkdir()
        Loop(objective, options, tmp_path / name).run()
        objective.save(tmp_path / name)
        merge(checkpoint, tmp_path / name, tmp_path / f"{name} merged")
    for load in (native, published):
        trained = tuning(load(checkpoint), checkpoint)
        trained.restore(tmp_path / "ours")
        with torch.no_grad():
            merged = -taught(load(tmp_path / "ours merged"), row).log_probs_S.sum()
        assert float(merged) == measured(trained, row)
    assert before - measured(ours, row) > 0.9 * (before - measured(plain, row)) > 0


def measured(objective: LoraTuning, row: PackedRow) -> float:
    with torch.no_grad():
        return float(objective.loss(row, training=False).total)


def _without(options: LoraOptions) -> LoraOptions:
    return LoraOptions(targets=options.targets, balance=options.balance)


def test_only_experts_that_have_learnt_are_rounded_anew(checkpoint: Path) -> None:
    ours, base = tuning(published(checkpoint), checkpoint), published(checkpoint)
    with torch.no_grad():
        ours.adapter.factors["layers.1.down"].b[2].normal_()
    row = ours.rows(0)[0]
    assert ours._folded is not None
    changed = [
        (i, kind, expert)
        for i, (new, old) in enumerate(zip(ours._folded.transformer().layers, base.layers, strict=True))
        for kind in ("gate_up", "down")
        for expert in range(CONFIG.num_experts)
        if not torch.equal(*(_values(getattr(layer.experts, kind)[expert]) for layer in (new, old)))
    ]
    assert changed == [(1, "down", 2)]
    with torch.no_grad():
        ours.adapter.factors["layers.1.down"].b.zero_()
    with torch.no_grad():
        assert measured(ours, row) == float(-taught(base, row).log_probs_S.sum())  # what was changed is as it was


def lines(folder: Path) -> list[dict[str, Any]]:
    clock = ("time", "tokens_per_second", "path")
    return [
        {name: value for name, value in line.items() if name not in clock}
        for line in read_metrics(folder / "metrics.jsonl")
        if "event" not in line
    ]


def pairs(folder: Path, model: Transformer) -> DpoTuning:
    data = PreferenceData()
    for number in range(5):
        prompt, *answers = (tokens_of(CONFIG, 5, seed=3 * number + i).tolist() for i in range(3))
        made = [Example(prompt + said[:-1], [NO_TARGET] * 4 + said) for said in answers]
        (data.validation if number == 4 else data.training).append(Pair(*made))
    adapter, table = starting_adapter(CONFIG, QAT, seed=0), open_checkpoint(folder).table()
    return DpoTuning(model, adapter, QAT, DpoOptions(beta=0.5), data, seed=0, table=table)


@needs_native
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_goes_on_exactly_where_it_was_stopped(checkpoint: Path, method: str, tmp_path: Path) -> None:
    options = LoopOptions(max_steps=6, batch_size=2, learning_rate=0.02, eval_steps=2, save_steps=2)
    found = []
    for stop_after in (None, 9):
        folder = tmp_path / str(stop_after)
        folder.mkdir()
        for limit in (stop_after, None) if stop_after else (None,):
            model, asked = native(checkpoint), iter(range(1000))
            objective: Any = pairs(checkpoint, model) if method == "dpo" else tuning(model, checkpoint)

            def should_stop(limit: int | None = limit, asked: Iterator[int] = asked) -> bool:
                return limit is not None and next(asked) >= limit

            loop = Loop(objective, options, folder, should_stop=should_stop)
            loop.resume()
            assert (loop.run().end is End.STOPPED) == (limit is not None)
        found.append((lines(folder), (folder / "checkpoints/step-00000006/adapter_model.safetensors").read_bytes()))
    assert found[0] == found[1]
    said = found[0][0]
    assert said[-1]["loss"] < said[1]["loss"] and said[-1]["balance"] > 0
    if method == "dpo":
        assert said[1]["rewards_margin"] == 0 and said[-1]["rewards_accuracy"] == 1


def test_an_adapter_says_that_it_was_trained_so(checkpoint: Path, tmp_path: Path) -> None:
    for options in (QAT, _without(QAT)):
        ours = tuning(published(checkpoint), checkpoint, options)
        ours.save(tmp_path)
        assert read_peft(tmp_path, CONFIG).dithered == options.qat
        ours.restore(tmp_path)
    with pytest.raises(CheckpointError, match="this run"):
        tuning(published(checkpoint), checkpoint).restore(tmp_path)


def test_dropout_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--dropout .* --qat"):
        LoraOptions(targets=TARGETS, qat=True, dropout=0.1)
