"""A run from files to an adapter, on a tiny model with the kernels that serve it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import freehold
from freehold.disk import exclusive
from freehold.errors import BackendError, CheckpointError, TrainingDataError, UsageError
from freehold.model.peft_files import read_peft
from freehold.train import curves
from freehold.train.data import TrainingData
from freehold.train.loop import End, Outcome
from freehold.train.metrics import read_metrics
from freehold.train.options import LoopOptions, LoraOptions, lora_targets
from freehold.train.run import TuneRequest, check_new, check_unchanged, new_run, prepare, resumed_request, train
from tests.train.tiny import chat, make_tiny_model, write_chats

TRADES = {"Ada": "smith", "Bo": "cook", "Cy": "judge"}
FACTS = [chat(f"Who is {name}?", f"The {trade}.") for name, trade in TRADES.items()]
LOOP = LoopOptions(max_steps=6, max_length=64, batch_size=2, learning_rate=0.01, save_steps=2, eval_steps=2)
LORA = LoraOptions(targets=lora_targets((), ("4",), (), router=True), dropout=0.1, balance=0.01)

pytestmark = pytest.mark.usefixtures("native_settings")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "facts.jsonl", *FACTS)


@pytest.fixture
def request_for(model: Path, facts: Path) -> TuneRequest:
    return TuneRequest(model=str(model), files=(facts,), validation_file=facts, date="2025-08-05", loop=LOOP, lora=LORA)


def tuned(request: TuneRequest, output: Path, **more: Any) -> Outcome:
    prepared = prepare(request)
    new_run(prepared, output)
    return train(prepared, output, **more)


def resumed(output: Path, **given: Any) -> Outcome:
    prepared = prepare(resumed_request(output, given))
    check_unchanged(prepared, output)
    return train(prepared, output)


def numbers(output: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(output / "metrics.jsonl") if "event" not in line]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def files_of(output: Path) -> list[bytes]:
    return [(output / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]


# --- what comes out ---------------------------------------------------------------------------------------------


def test_a_tiny_model_learns_facts_by_heart(request_for: TuneRequest, tmp_path: Path) -> None:
    request = replace(
        request_for,
        loop=replace(
            LOOP, max_steps=80, max_length=256, batch_size=1, eval_steps=80, save_steps=80, learning_rate=0.03
        ),
        lora=LoraOptions(targets=lora_targets((), ("8",), ())),
    )
    outcome = tuned(request, tmp_path / "run")
    before, after = (line["validation_loss"] for line in numbers(tmp_path / "run") if "validation_loss" in line)
    assert before > 4
    assert after < 0.5
    assert outcome.end is End.DONE
    adapter = read_peft(tmp_path / "run", prepare(request).folder.checkpoint.config)
    assert {target.rank for target in adapter.spec.targets.values()} == {8}
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["event"] == "done"


def test_the_validation_loss_is_the_engine_s(request_for: TuneRequest, model: Path, tmp_path: Path) -> None:
    request = replace(request_for, loop=replace(LOOP, max_steps=1))
    tuned(request, tmp_path / "run")
    prepared = prepare(request)
    loaded = freehold.load(model)
    total = 0.0
    assert isinstance(prepared.data, TrainingData)
    for example in prepared.data.validation:
        targets = [target for target in example.targets if target != -100]
        [asked] = [index for index, target in enumerate(example.targets) if target == targets[0]][:1]
        ids = [*example.tokens[: asked + 1], *targets]
        request_of = loaded.prompting.request(ids, max_tokens=1, prompt_logprobs=0)
        scored = next(step.prompt_logprobs for step in loaded.engine.stream(request_of) if step.prompt_logprobs)
        total -= sum(entry.logprob for entry in scored[asked + 1 :] if entry is not None)
    assert numbers(tmp_path / "run")[0]["validation_loss"] == pytest.approx(
        total / prepared.data.validation.num_targets, abs=1e-5
    )


def test_the_card_and_the_run_say_what_was_done(request_for: TuneRequest, facts: Path, tmp_path: Path) -> None:
    tuned(replace(request_for, loop=replace(LOOP, max_steps=2)), tmp_path / "polite")
    run = json.loads((tmp_path / "polite" / "run.json").read_text())
    card = (tmp_path / "polite" / "README.md").read_text()
    [said] = run["data"]["files"]
    assert (said["name"], said["bytes"]) == ("facts.jsonl", facts.stat().st_size)
    for words in ("# polite", said["sha256"], "3 examples", "| gate_up | 4 | 8 |", "learning rate: 0.01", "license: #"):
        assert words in card
    assert str(facts.parent) not in card
    assert (tmp_path / "polite" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"--tensorboard needs .* pip install 'freehold\[tune\]'"):
        curves.check_tensorboard()
    assert not curves.can_draw()


# --- going on ---------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_it_is_the_run_that_nobody_stopped(request_for: TuneRequest, tmp_path: Path) -> None:
    tuned(request_for, tmp_path / "whole")
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 8

    assert tuned(request_for, tmp_path / "stopped", should_stop=should_stop).end is End.STOPPED
    assert resumed(tmp_path / "stopped", learning_rate=0.01).end is End.DONE
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    assert numbers(tmp_path / "whole")[-1]["balance"] >= 1


def test_what_is_not_as_it_was_is_refused_by_name(request_for: TuneRequest, model: Path, tmp_path: Path) -> None:
    own = write_chats(tmp_path / "own.jsonl", *FACTS)
    request = replace(request_for, files=(own,))
    output = tmp_path / "run"
    asked = iter([False, False, False, True])
    tuned(request, output, should_stop=lambda: next(asked))
    with pytest.raises(UsageError, match=r"unfinished run; go on with `freehold tune --resume .*run`"):
        check_new(output)
    for given, words in (
        ({"learning_rate": 1e-4}, "--learning-rate was 0.01 and is 0.0001"),
        ({"targets": [["q", 4, 8.0]]}, "--targets was"),
        ({"files": ["/elsewhere.jsonl"]}, "--files was"),
    ):
        with pytest.raises(UsageError, match=words):
            resumed_request(output, given)
    write_chats(own, *FACTS[::-1])
    with pytest.raises(UsageError, match=r"own\.jsonl is not what it was when .*run began"):
        resumed(output)
    write_chats(own, *FACTS)
    with exclusive(output / "run.json"), pytest.raises(UsageError, match="another process is at work on"):
        resumed(output)
    assert resumed(output).end is End.DONE
    with pytest.raises(UsageError, match="a run that is done; there is nothing to resume"):
        resumed(output)
    with pytest.raises(UsageError, match="a run that is done; give another"):
        check_new(output)
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        resumed(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        check_new(model)


def test_a_model_that_changed_is_refused(request_for: TuneRequest, tmp_path: Path) -> None:
    own = make_tiny_model(tmp_path / "own")
    asked = iter([True])
    output = tmp_path / "run"
    tuned(replace(request_for, model=str(own)), output, should_stop=lambda: next(asked))
    (own / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"the model .*own is not what it was"):
        resumed(output)


# --- what cannot begin ------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_told_before_anything_is_loaded(request_for: TuneRequest, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    (bare := make_tiny_model(tmp_path / "bare")).joinpath("tokenizer.json").unlink()
    targets = lora_targets(("q,nose",), (), ())
    for changes, error, words in (
        ({"files": (bad,)}, TrainingDataError, "line 1"),
        ({"lora": LoraOptions(targets=targets)}, UsageError, "--target 'nose': there are q, k"),
        ({"loop": replace(LOOP, max_length=257)}, UsageError, "more than this model's context of 256"),
        ({"model": str(bare)}, CheckpointError, r"bare has no tokenizer\.json"),
        ({"harmony": True}, CheckpointError, "Harmony"),
    ):
        with pytest.raises(error, match=words):
            prepare(replace(request_for, **changes))


def test_requests_that_contradict_themselves(request_for: TuneRequest) -> None:
    for changes, words in (
        ({"files": ()}, "nothing to train on"),
        ({"validation_share": 0.1}, "not both"),
        ({"validation_file": None, "loop": replace(LOOP, patience=2)}, "--patience stops when"),
    ):
        with pytest.raises(UsageError, match=words):
            replace(request_for, **changes)


def test_a_model_without_a_chat_format_learns_plain_text(request_for: TuneRequest, tmp_path: Path) -> None:
    own = make_tiny_model(tmp_path / "own")
    (own / "chat_template.jinja").unlink()
    text = tmp_path / "book.txt"
    text.write_text("once upon a time\n" * 20)
    request = replace(request_for, model=str(own), files=(text,), validation_file=None)
    assert prepare(request).data.training.num_targets == 17 * 20
    with pytest.raises(TrainingDataError, match="no chat format"):
        prepare(replace(request, files=request_for.files))
