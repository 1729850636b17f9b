"""Preference pairs: the loss and its gradient as they are written down, what is reported, and resuming."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freehold.model.transformer import Transformer
from freehold.train.adapting import starting_adapter
from freehold.train.data import PreferenceData
from freehold.train.dpo import DpoTuning, PairRow
from freehold.train.examples import NO_TARGET, Example, Pair
from freehold.train.forward import taught
from freehold.train.loop import End, Loop
from freehold.train.metrics import read_metrics
from freehold.train.options import DpoOptions, LoopOptions, LoraOptions, LoraTarget
from freehold.train.packing import PackedRow
from tests.checkpoints import CPU, for_kernels, packed, random_table, small_config, tokens_of

CONFIG = small_config()
KINDS = ("q", "o", "router", "gate_up", "down")
OPTIONS = LoraOptions(targets=tuple(LoraTarget(kind, 2, 4.0) for kind in KINDS))


def pair(number: int) -> Pair:
    """A prompt of some tokens, and two answers of other lengths."""
    prompt = tokens_of(CONFIG, 4 + number, seed=number).tolist()

    def answer(length: int, seed: int) -> Example:
        said = tokens_of(CONFIG, length, seed=seed).tolist()
        return Example(prompt + said[:-1], [NO_TARGET] * (len(prompt) - 1) + said)

    return Pair(answer(5 + number, 100 + number), answer(3, 200 + number))


def data(count: int, for_validation: int = 0) -> PreferenceData:
    made = PreferenceData()
    for number in range(count):
        made.training.append(pair(number))
    for number in range(for_validation):
        made.validation.append(pair(50 + number))
    return made


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, packed(random_table(CONFIG)), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def native() -> Transformer:
    table = for_kernels(CONFIG, packed(random_table(CONFIG)), "q8")
    return Transformer(CONFIG, table, dtype=torch.float32, device=CPU)


def dpo_tuning(
    model: Transformer, lora: LoraOptions, options: DpoOptions, pairs: PreferenceData, *, seed: int
) -> DpoTuning:
    return DpoTuning(model, starting_adapter(CONFIG, lora, seed=seed), lora, options, pairs, seed=seed)


def stirred(tuning: DpoTuning) -> DpoTuning:
    with torch.no_grad():
        for _, b in tuning.adapter.factors.values():
            b.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return tuning


def log_probability(model: Transformer, example: Example, tuning: DpoTuning | None) -> Tensor:
    """Of an answer that lies in a row of its own."""
    row = PackedRow(example.tokens, example.targets, [len(example.tokens)])
    return taught(model, row, adapter=None if tuning is None else tuning.adapter).log_probs_S.double().sum()


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (2.0, 0.2)])
def test_loss_and_gradient_are_those_of_the_formula_in_float64(
    model: Transformer, beta: float, smoothing: float
) -> None:
    options = DpoOptions(beta=beta, label_smoothing=smoothing)
    tuning = stirred(dpo_tuning(model, OPTIONS, options, data(2), seed=0))
    for row in tuning.rows(0):
        chosen, rejected = pair(row.name[1])
        (pi_c, pi_r), (ref_c, ref_r) = (
            [log_probability(model, answer, side) for answer in (chosen, rejected)] for side in (tuning, None)
        )
        z = beta * ((pi_c - pi_r) - (ref_c - ref_r).detach())
        written = -(1 - smoothing) * torch.log(1 / (1 + torch.exp(-z))) - smoothing * torch.log(1 / (1 + torch.exp(z)))
        expected = torch.autograd.grad(written, tuning.parameters)
        for _ in range(2):  # the second time, the reference's numbers are those that were kept
            found = tuning.loss(row, training=True)
            assert float(found.total.detach()) == pytest.approx(float(written.detach()), rel=1e-4)
            gradients = torch.autograd.grad(found.total, tuning.parameters)
            for ours, theirs in zip(gradients, expected, strict=True):
                torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-6)
        figures = found.figures
        assert figures["rewards_chosen"] == pytest.approx(beta * float((pi_c - ref_c).detach()), abs=1e-3)
        assert figures["rewards_rejected"] == pytest.approx(beta * float((pi_r - ref_r).detach()), abs=1e-3)
        assert figures["rewards_margin"] == pytest.approx(float(z.detach()), abs=1e-3)
        assert figures["rewards_accuracy"] == float(z.detach() > 0)
        assert tuning.size(row) == (1, len(chosen.tokens) + len(rejected.tokens))


def test_nothing_learnt_yet_is_a_coin_toss(native: Transformer) -> None:
    """To the last bit, also where activations are rounded."""
    tuning = dpo_tuning(native, OPTIONS, DpoOptions(), data(1), seed=0)
    for training in (True, False):
        said = tuning.loss(tuning.rows(0)[0], training=training)
        assert float(said.total.detach()) == pytest.approx(math.log(2), rel=1e-7)
        assert said.figures["rewards_margin"] == 0


def run(folder: Path, native: Transformer, *, stop_after: int | None = None) -> list[dict[str, object]]:
    """Three epochs over pairs, with the balance term and dropout; resumed where it was stopped."""
    options = LoopOptions(epochs=3, batch_size=2, learning_rate=0.05, eval_steps=2, save_steps=2, max_grad_norm=5)
    lora = LoraOptions(targets=OPTIONS.targets, dropout=0.1, balance=0.01)
    asked = iter(range(10**6))

    def loop(limit: int | None) -> Loop[PairRow]:
        tuning = dpo_tuning(native, lora, DpoOptions(beta=0.5), data(4, for_validation=1), seed=3)
        return Loop(tuning, options, folder, should_stop=lambda: limit is not None and next(asked) >= limit)

    first = loop(stop_after)
    outcome = first.run()
    assert (outcome.end is End.STOPPED) == (stop_after is not None)
    if stop_after is not None:
        second = loop(None)
        second.resume()
        assert 0 < second.state.step < 6
        assert second.run().end is End.DONE
    clock = ("time", "tokens_per_second", "path")
    return [
        {name: value for name, value in line.items() if name not in clock}
        for line in read_metrics(folder / "metrics.jsonl")
        if "event" not in line
    ]


def test_a_run_learns_to_prefer_and_goes_on_exactly_where_it_was_stopped(native: Transformer, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    whole = run(folders[0], native)
    assert run(folders[1], native, stop_after=9) == whole
    last = whole[-1]
    assert float(str(last["loss"])) < 0.5 and last["rewards_accuracy"] == 1 and float(str(last["rewards_margin"])) > 0.5
    assert {"rewards_chosen", "rewards_rejected", "balance", "validation_loss"} <= last.keys()
    assert _adapters(folders[0]) == _adapters(folders[1])


def _adapters(folder: Path) -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("checkpoints/*/adapter_model.safetensors"))]


def test_pairs_come_in_another_order_each_epoch_the_same_for_the_same_seed(model: Transformer) -> None:
    tunings = [dpo_tuning(model, OPTIONS, DpoOptions(), data(8), seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([[row.name[1] for row in tuning.rows(epoch)] for epoch in range(3)] for tuning in tunings)
    assert first == again != other and len({tuple(order) for order in first}) == 3
    assert all(sorted(order) == list(range(8)) for order in first)
