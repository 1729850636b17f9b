"""Full fine-tuning: transformers' gradients at the rounded weights, what is written, resuming, and the memory plan."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import freehold
from freehold.config import ExpertFormat, Layout
from freehold.errors import OutOfMemoryError, TrainingError, UsageError
from freehold.model.transformer import Transformer
from freehold.session.policy import Policy
from freehold.train import plan as plans
from freehold.train.data import TrainingData
from freehold.train.examples import NO_TARGET, Example
from freehold.train.forward import taught
from freehold.train.full import FullTuning, trained_names
from freehold.train.loop import End, Loop
from freehold.train.metrics import read_metrics
from freehold.train.options import GROUPS, FullOptions, LoopOptions, LoraOptions, lora_targets, trained_groups
from freehold.train.plan import RowShape, fitting_full_plan, plan_full
from freehold.train.run import (
    METRICS_FILE,
    MODEL_FOLDER,
    TuneRequest,
    is_done,
    new_run,
    prepare,
    resumed_request,
    train,
)
from freehold.weights import mxfp4
from freehold.weights.layouts import Checkpoint, Form, open_checkpoint, stored_tensors
from freehold.weights.mxfp4 import Mxfp4Tensor
from tests.checkpoints import CPU, oracle, packed, random_table, save, small_config, tokens_of
from tests.train.tiny import chat, make_tiny_model, write_chats

CONFIG = small_config()
FORMATS = [ExpertFormat.MXFP4, ExpertFormat.BF16]


def made(folder: Path, experts: ExpertFormat, **changes: Any) -> Checkpoint:
    config = small_config(**changes)
    table = random_table(config, dtype=torch.bfloat16)
    table = packed(table) if experts is ExpertFormat.MXFP4 else table
    return open_checkpoint(save(folder, config, table, experts=experts))


@pytest.fixture(scope="module", params=FORMATS, ids=[form.value for form in FORMATS])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made(tmp_path_factory.mktemp("model") / "base", request.param)


def tuning(checkpoint: Checkpoint, options: FullOptions | None = None) -> FullTuning:
    data = TrainingData()
    for number in range(6):
        tokens = tokens_of(checkpoint.config, 12 + number, seed=number).tolist()
        data.training.append(Example(tokens, [NO_TARGET, *tokens[2:], tokens[0]]))
    data.validation.append(data.training[0])
    options = options or FullOptions(balance=0.01)
    return FullTuning(checkpoint, options, data, dtype=torch.float32, device=CPU, max_length=64, seed=0)


def values(tensor: Tensor | Mxfp4Tensor) -> Tensor:
    return mxfp4.unpack(tensor) if isinstance(tensor, Mxfp4Tensor) else tensor.float()


def test_gradients_are_those_of_transformers_at_the_rounded_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours = tuning(checkpoint, FullOptions())
    with torch.no_grad():
        for parameter in ours.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    row = ours.rows(0)[0]
    row = row._replace(tokens=row.tokens[: row.counts[0]], targets=row.targets[: row.counts[0]], counts=row.counts[:1])
    found = torch.autograd.grad(ours.loss(row, training=True).total, ours.parameters)
    ours.export(checkpoint.folder, tmp_path / "rounded")
    rounded = open_checkpoint(tmp_path / "rounded")
    theirs = oracle(rounded.config, rounded.table())
    out = theirs(torch.tensor([row.tokens]), use_cache=False).logits[0].float()
    torch.nn.functional.cross_entropy(out, torch.tensor(row.targets), reduction="sum").backward()
    expected = {}
    for stored in stored_tensors(rounded.config, Layout.HF, ExpertFormat.BF16):
        gradient = theirs.get_parameter(stored.name).grad
        expected[stored.parts[0]] = gradient.transpose(-1, -2) if stored.form is Form.TRANSPOSED else gradient
    names = trained_names(checkpoint, FullOptions())
    assert expected.keys() == set(names)
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], atol=2e-4, rtol=2e-3, msg=name)


def test_what_is_written_is_what_was_trained(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours = tuning(checkpoint)
    row = ours.validation_rows()[0]

    def measured() -> float:
        with torch.no_grad():
            return float(ours.loss(row, training=False).total)

    before = measured()
    Loop(ours, LoopOptions(max_steps=15, batch_size=1, learning_rate=3e-3, min_lr_ratio=0.5), tmp_path).run()
    assert measured() < 0.5 * before
    ours.export(checkpoint.folder, tmp_path / "model")
    written = open_checkpoint(tmp_path / "model")
    assert written.experts is ExpertFormat.MXFP4
    model = Transformer(CONFIG, written.table(), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        assert float(-taught(model, row).log_probs_S.sum()) == pytest.approx(measured(), rel=1e-5)
    types = {name: tensor.dtype for name, tensor in written.table().items() if isinstance(tensor, Tensor)}
    assert set(types.values()) == {torch.bfloat16}


@pytest.mark.parametrize("groups", [("experts",), ("attention", "router"), ("norms",), ("embedding",)], ids=",".join)
def test_only_what_is_named_learns(checkpoint: Checkpoint, groups: tuple[str, ...], tmp_path: Path) -> None:
    ours = tuning(checkpoint, FullOptions(train=groups))
    Loop(ours, LoopOptions(max_steps=1, batch_size=1, learning_rate=0.05), tmp_path).run()
    ours.export(checkpoint.folder, tmp_path / "model")
    before, after = checkpoint.table(), open_checkpoint(tmp_path / "model").table()
    changed = {name for name in before if not torch.equal(values(before[name]), values(after[name]))}
    if checkpoint.experts is ExpertFormat.BF16:  # all experts are written in MXFP4
        changed -= {name for name in changed if name.endswith(("gate_up", "down")) and "experts" not in groups}
    assert changed == set(trained_names(checkpoint, FullOptions(train=groups)))


def lines(folder: Path) -> list[dict[str, Any]]:
    clock = ("time", "tokens_per_second", "path")
    return [
        {name: value for name, value in line.items() if name not in clock}
        for line in read_metrics(folder / "metrics.jsonl")
        if "event" not in line
    ]


def test_a_run_goes_on_exactly_where_it_was_stopped(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = LoopOptions(max_steps=6, batch_size=2, learning_rate=2e-3, eval_steps=2, save_steps=2)
    found = []
    for stop_after in (None, 9):
        folder = tmp_path / str(stop_after)
        folder.mkdir()
        for limit in (stop_after, None) if stop_after else (None,):

            def should_stop(limit: int | None = limit, asked: Iterator[int] = iter(range(1000))) -> bool:  # noqa: B008
                return limit is not None and next(asked) >= limit

            loop = Loop(tuning(checkpoint), options, folder, should_stop=should_stop)
            loop.resume()
            assert (loop.run().end is End.STOPPED) == (limit is not None)
        found.append((lines(folder), (folder / "checkpoints/step-00000006/masters.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0][-1]["balance"] > 0


def test_a_model_that_mxfp4_cannot_hold_keeps_plain_experts(tmp_path: Path) -> None:
    checkpoint = made(tmp_path / "base", ExpertFormat.BF16, expert_width=24)
    ours = tuning(checkpoint)
    ours.export(checkpoint.folder, tmp_path / "model")
    assert open_checkpoint(tmp_path / "model").experts is ExpertFormat.BF16


def test_weights_that_are_no_numbers_end_the_run(checkpoint: Checkpoint) -> None:
    ours = tuning(checkpoint)
    with torch.no_grad():
        for parameter in ours.parameters:
            parameter.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"layers\.0\.gate_up of expert 0 is no longer a number"):
        ours.loss(ours.rows(0)[0], training=True)


def test_the_plan_says_that_an_adapter_would_fit(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(device=CPU, dtype=torch.float32, kv="f32", dense=None, threads=1)
    names = trained_names(checkpoint, FullOptions())
    row = RowShape(tokens=128, example=128)
    plan = plan_full(CONFIG, checkpoint.experts, policy, names, row)
    assert plan.factors == 4 * CONFIG.num_parameters
    assert plan.weights + plan.factors + plan.gradients + plan.optimizer >= 20 * CONFIG.num_parameters
    monkeypatch.setattr(plans, "free_memory", lambda _: plan.needed - 1)
    assert fitting_full_plan(CONFIG, checkpoint.experts, policy, names, row, checkpointing="auto").checkpointing
    with pytest.raises(OutOfMemoryError, match=r"tune an adapter instead \(--method lora"):
        fitting_full_plan(CONFIG, checkpoint.experts, policy, names, row, checkpointing="off")


def test_a_run_writes_a_model_that_loads_and_says_what_it_learnt(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    facts = write_chats(tmp_path / "facts.jsonl", chat("Who is Ada?", "The smith."), chat("Who is Bo?", "The cook."))
    loop = LoopOptions(max_steps=30, max_length=64, batch_size=2, learning_rate=3e-3, save_steps=30)
    request = TuneRequest(
        model=str(model), files=(facts,), method="full", loop=loop, lora=LoraOptions(targets=lora_targets((), (), ()))
    )
    prepared = prepare(request)
    assert TuneRequest.from_json(json.loads(json.dumps(prepared.request.to_json()))) == prepared.request
    new_run(prepared, tmp_path / "run")
    train(prepared, tmp_path / "run")
    loaded = freehold.load(tmp_path / "run" / MODEL_FOLDER)
    question = [{"role": "user", "content": "Who is Ada?"}]
    assert loaded.chat(question, max_tokens=12, temperature=0) == "The smith."
    assert "parameters learnt" in (tmp_path / "run" / "README.md").read_text()
    # Killed when the model had its name, and nobody had been told.
    metrics = tmp_path / "run" / METRICS_FILE
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:-1]))
    assert not is_done(tmp_path / "run")
    before = (tmp_path / "run" / MODEL_FOLDER / "model.safetensors").read_bytes()
    train(prepare(resumed_request(tmp_path / "run", {})), tmp_path / "run")
    assert is_done(tmp_path / "run")
    assert (tmp_path / "run" / MODEL_FOLDER / "model.safetensors").read_bytes() == before


def test_options_that_do_not_go_together_are_refused() -> None:
    assert trained_groups(()) == trained_groups(("all",)) == GROUPS
    assert trained_groups(("experts,attention",)) == ("attention", "experts")
    with pytest.raises(UsageError, match="--train 'heads'"):
        FullOptions(train=trained_groups(("heads",)))
    request = TuneRequest(
        model="x", files=(Path("x"),), loop=LoopOptions(), lora=LoraOptions(targets=lora_targets((), (), ()))
    )
    for changes, message in (
        ({"full": FullOptions(train=("experts",))}, "add --method full"),
        ({"method": "full", "lora": replace(request.lora, qat=True)}, "--qat is for adapters"),
        ({"method": "full", "dense": "q8"}, "--dense is for packed weights"),
        ({"method": "ppo"}, "--method is one of lora, dpo, full"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(request, **changes)
