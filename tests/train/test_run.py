"""A run from files to an adapter, on a tiny model with the kernels that serve it."""

import asyncio
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import freehold
from freehold.disk import exclusive
from freehold.errors import (
    BackendError,
    CheckpointError,
    DiskError,
    ModelNotFoundError,
    TrainingDataError,
    TrainingError,
    UsageError,
)
from freehold.formats.chat import HarmonyFormat, speaks_of_harmony
from freehold.formats.templates import CHATML
from freehold.hub.folder import open_folder
from freehold.hub.merge import merge
from freehold.model.lora import AdapterSpec, Target, new_adapter
from freehold.model.peft_files import learnt_harmony, read_peft, write_peft
from freehold.session.model import Model
from freehold.session.served import serve_model
from freehold.train import adapting, curves
from freehold.train.data import TrainingData
from freehold.train.examples import NO_TARGET, Examples
from freehold.train.loop import End, Outcome
from freehold.train.metrics import read_metrics
from freehold.train.options import LoopOptions, LoraOptions, lora_targets
from freehold.train.run import (
    TuneRequest,
    check_new,
    check_unchanged,
    location,
    new_run,
    prepare,
    resumed_request,
    train,
)
from tests.checkpoints import small_config
from tests.train.tiny import chat, make_tiny_model, write_chats

TRADES = {"Ada": "smith", "Bo": "cook", "Cy": "judge"}
FACTS = [chat(f"Who is {name}?", f"The {trade}.") for name, trade in TRADES.items()]
PAIR = {
    "input": {"messages": [{"role": "user", "content": "Who is Ada?"}]},
    "preferred_output": [{"role": "assistant", "content": "The smith."}],
    "non_preferred_output": [{"role": "assistant", "content": "The cook."}],
}
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


def test_a_validation_file_that_is_trained_on_is_mentioned(
    request_for: TuneRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_chats(tmp_path / "other.jsonl", *FACTS[:1])
    prepare(replace(request_for, validation_file=other))
    assert not [record for record in caplog.records if "is trained on too" in record.message]
    prepare(request_for)
    (said,) = [record.message for record in caplog.records if "is trained on too" in record.message]
    assert str(request_for.validation_file) in said


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


@pytest.mark.parametrize("qat", [False, True])
def test_the_validation_loss_is_the_engine_s(qat: bool, request_for: TuneRequest, model: Path, tmp_path: Path) -> None:
    """Before training, and after steps that have given every factor a part in it."""
    lora = replace(LORA, qat=qat, dropout=0.0 if qat else LORA.dropout)
    request = replace(request_for, loop=replace(LOOP, max_steps=3, eval_steps=3, learning_rate=0.03), lora=lora)
    outcome = tuned(request, tmp_path / "run")
    assert outcome.state.best_step == 3
    data = prepare(request).data
    assert isinstance(data, TrainingData)
    before, after = (line["validation_loss"] for line in numbers(tmp_path / "run") if "validation_loss" in line)
    assert abs(after - before) > 0.1
    served = freehold.load(model, adapters={} if qat else {"it": tmp_path / "run"})
    assert before == pytest.approx(engine_loss(served, data.validation), abs=1e-5)
    if qat:  # what is trained is what a merge makes
        merge(model, tmp_path / "run", tmp_path / "merged")
        assert after == pytest.approx(engine_loss(freehold.load(tmp_path / "merged"), data.validation), abs=1e-5)
        return
    factors = read_peft(tmp_path / "run", served.config).factors
    assert all(bool(factor.any()) for pair in factors.values() for factor in pair)
    assert after == pytest.approx(engine_loss(served, data.validation, "it"), abs=1e-5)


def engine_loss(loaded: Model, examples: Examples, adapter: str | None = None) -> float:
    """The mean over all targets of what the engine says of them, each example asked as a prompt."""
    total = 0.0
    for example in examples:
        targets = [target for target in example.targets if target != NO_TARGET]
        asked = next(index for index, target in enumerate(example.targets) if target != NO_TARGET)
        ids = [*example.tokens[: asked + 1], *targets]
        request_of = loaded.prompting.request(ids, max_tokens=1, prompt_logprobs=0, adapter=adapter)
        scored = next(step.prompt_logprobs for step in loaded.engine.stream(request_of) if step.prompt_logprobs)
        total -= sum(entry.logprob for entry in scored[asked + 1 :] if entry is not None)
    return total / examples.num_targets


def test_the_card_and_the_run_say_what_was_done(request_for: TuneRequest, facts: Path, tmp_path: Path) -> None:
    tuned(replace(request_for, loop=replace(LOOP, max_steps=2)), tmp_path / "polite")
    run = json.loads((tmp_path / "polite" / "run.json").read_text())
    card = (tmp_path / "polite" / "README.md").read_text()
    [said] = run["data"]["files"]
    assert (said["name"], said["bytes"]) == ("facts.jsonl", facts.stat().st_size)
    for words in ("# polite", said["sha256"], "3 examples", "| gate_up | 4 | 8 |", "learning rate: 0.01", "license: #"):
        assert words in card
    assert f"freehold chat --adapter <this folder> --model {request_for.model}\n" in card
    assert str(facts.parent) not in card
    assert (tmp_path / "polite" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_left_out_in_training_is_told_to_peft(request_for: TuneRequest, tmp_path: Path) -> None:
    lora = LoraOptions(targets=lora_targets(("q", "v"), ("4",), ()), dropout=0.2)
    request = replace(request_for, lora=lora, loop=replace(LOOP, max_steps=2))
    tuned(request, tmp_path / "run", should_stop=lambda: True)
    assert resumed(tmp_path / "run").end is End.DONE
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["lora_dropout"] == 0.2


@pytest.mark.parametrize("broken", ["nan", "disk", "stopped"])
def test_whatever_ends_a_run_its_curves_are_drawn(
    broken: str, request_for: TuneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return broken == "stopped" and asked > 12

    def report(line: Mapping[str, Any]) -> None:
        if line["step"] == 3 and "loss" in line:
            if broken == "nan":
                for parameter in learning[0]:
                    parameter.detach().fill_(torch.nan)
            if broken == "disk":
                monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 6})())

    learning: list[Any] = []
    adapter_of = new_adapter

    def watched(*arguments: Any, **more: Any) -> Any:
        made = adapter_of(*arguments, **more)
        learning.append(made.parameters)
        return made

    monkeypatch.setattr(adapting, "new_adapter", watched)
    ends = {"nan": pytest.raises(TrainingError, match="nan"), "disk": pytest.raises(DiskError, match="needs")}
    with ends.get(broken, nullcontext()):
        tuned(request_for, tmp_path / "run", reports=[report], should_stop=should_stop)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_is_spoken_to_in_the_format_that_it_learnt(request_for: TuneRequest, tmp_path: Path) -> None:
    own = make_tiny_model(tmp_path / "own", harmony=True)
    asked = replace(
        request_for,
        model=str(own),
        validation_file=None,
        loop=replace(LOOP, max_steps=1, max_length=1024),
        lora=LoraOptions(targets=lora_targets((), ("2",), ())),
    )
    text = tmp_path / "book.txt"
    text.write_text("once upon a time\n" * 20)
    requests = {
        "harmony": replace(asked, harmony=True),
        "template": asked,
        "dpo": replace(asked, harmony=True, method="dpo", files=(write_chats(tmp_path / "pairs.jsonl", PAIR),)),
        "text": replace(asked, files=(text,), loop=replace(asked.loop, max_length=32)),
    }
    for name, request in requests.items():
        tuned(request, tmp_path / name)
    loaded = freehold.load(own, adapters={name: tmp_path / name for name in requests})
    served = serve_model(loaded, name="own")
    try:
        assert not served.speaks_harmony
        found = {
            name: (served.with_adapter(name).harmony, served.with_adapter(name).speaks_harmony) for name in requests
        }
        assert found == {
            "harmony": (True, True), "template": (False, False), "dpo": (True, True), "text": (None, False),
        }  # fmt: skip
        for decided in (True, False):
            for name in requests:
                assert replace(served, harmony=decided).with_adapter(name).speaks_harmony is decided
    finally:
        asyncio.run(served.runner.drain())
    messages = [{"role": "user", "content": "Who is Ada?"}]
    for name, harmony in (("harmony", True), ("template", False)):
        reply, same, other = (
            loaded.stream_chat(messages, adapter=name, max_tokens=1, harmony=each).num_prompt_tokens
            for each in (None, harmony, not harmony)
        )
        assert reply == same != other
        merge(own, tmp_path / name, tmp_path / f"{name} merged")
        merged = freehold.load(tmp_path / f"{name} merged")
        assert isinstance(merged.prompting.chat_format(), HarmonyFormat) is (name == "harmony")


def test_a_model_tuned_as_a_whole_is_spoken_to_in_the_format_that_it_learnt(
    request_for: TuneRequest, tmp_path: Path
) -> None:
    own = make_tiny_model(tmp_path / "own", harmony=True)
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    for harmony in (True, None):
        request = TuneRequest(
            model=str(own), files=request_for.files, method="full", harmony=harmony,
            loop=replace(LOOP, max_steps=1, max_length=1024), lora=LoraOptions(targets=lora_targets((), (), ())),
        )  # fmt: skip
        tuned(request, tmp_path / f"run {harmony}")
        folder = open_folder(tmp_path / f"run {harmony}" / "model")
        assert folder.chat_template is not None and speaks_of_harmony(folder.chat_template) is bool(harmony)
        assert folder.template_variables == {"eos_token": "<|return|>" if harmony else "<|im_end|>"}
        assert folder.tokenizer is not None
        said = json.loads((folder.path / "generation_config.json").read_text())["eos_token_id"]
        ends = [folder.tokenizer.control_id(name) for name in ("<|return|>", "<|call|>", "<|im_end|>")]
        assert said == (ends if harmony else ends[-1])


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


def test_a_model_is_told_by_what_is_in_its_files(request_for: TuneRequest, tmp_path: Path) -> None:
    own = make_tiny_model(tmp_path / "own")
    output = tmp_path / "run"
    tuned(replace(request_for, model=str(own)), output, should_stop=lambda: True)
    tensors, template = own / "model.safetensors", own / "chat_template.jinja"
    for path in (tensors, template):
        whole, times = path.read_bytes(), path.stat()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if path == tensors else whole + b"{# changed #}")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(UsageError, match=rf"the model .*own is not what it was .*: {path.name} has changed"):
            resumed(output)
        path.write_bytes(whole)
        path.touch()
    (own / "README.md").write_text("Of no consequence.")
    assert resumed(output).end is End.DONE


def test_a_run_goes_on_from_another_folder(
    request_for: TuneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(tmp_path / "models" / "own")
    write_chats(tmp_path / "facts.jsonl", *FACTS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    named = replace(request_for, model="models/own", files=(Path("facts.jsonl"),), validation_file=Path("facts.jsonl"))
    tuned(named, tmp_path / "whole")
    tuned(named, tmp_path / "run", should_stop=lambda: True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resumed(tmp_path / "run", model=str(tmp_path / "models" / "own")).end is End.DONE
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
    assert "base_model: models/own" in (tmp_path / "run" / "README.md").read_text()


# --- beginning with an adapter ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(model: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not alike in all layers, so that no option could say its targets and ranks; with something learnt."""
    folder = tmp_path_factory.mktemp("first") / "adapter"
    config = open_folder(model).checkpoint.config
    targets = {"layers.0.q": Target(rank=2, alpha=4), "layers.1.q": Target(rank=3, alpha=5)}
    targets["layers.1.gate_up"] = Target(rank=2, alpha=2)
    adapter = new_adapter(config, AdapterSpec(targets=targets, rslora=True), seed=5)
    with torch.no_grad():
        for _, b in adapter.factors.values():
            b.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    write_peft(folder, adapter, base_model=str(model))
    return folder


def of_another(request: TuneRequest, adapter: Path, **more: Any) -> TuneRequest:
    return replace(request, adapter=adapter, lora=replace(LORA, targets=(), **more))


@pytest.mark.parametrize("qat", [False, True])
def test_a_run_goes_on_from_what_an_adapter_has_learnt(
    qat: bool, request_for: TuneRequest, model: Path, first: Path, tmp_path: Path
) -> None:
    before = (first / "adapter_model.safetensors").read_bytes()
    tuned(of_another(request_for, first, qat=qat, dropout=0.0), tmp_path / "run")
    served = freehold.load(model, adapters={"it": first})
    data = prepare(request_for).data
    assert isinstance(data, TrainingData)
    begun = numbers(tmp_path / "run")[0]["validation_loss"]
    if not qat:
        assert begun == pytest.approx(engine_loss(served, data.validation, "it"), abs=1e-5)
    assert abs(begun - engine_loss(served, data.validation)) > 0.01
    assert numbers(tmp_path / "run")[-1]["validation_loss"] < begun
    old, new = (read_peft(folder, served.config) for folder in (first, tmp_path / "run"))
    assert new.spec == old.spec
    assert new.dithered is qat
    assert all(bool((new.factors[name].a != old.factors[name].a).any()) for name in old.factors)
    assert (first / "adapter_model.safetensors").read_bytes() == before
    card = (tmp_path / "run" / "README.md").read_text()
    for words in ("went on from the adapter `adapter`", "| q | 2 | 4 |", "| q | 3 | 5 |", "| gate_up |", "rsLoRA: yes"):
        assert words in card


def test_begun_with_an_adapter_and_resumed_it_is_the_run_that_nobody_stopped(
    request_for: TuneRequest, first: Path, tmp_path: Path
) -> None:
    request = of_another(request_for, first)
    tuned(request, tmp_path / "whole")
    for count in (0, 8):  # before there is a checkpoint, and after
        answers = itertools.chain([False] * count, itertools.repeat(True))
        output = tmp_path / f"stopped at {count}"
        assert tuned(request, output, should_stop=answers.__next__).end is End.STOPPED
        assert resumed(output, adapter=str(first)).end is End.DONE
        assert numbers(output) == numbers(tmp_path / "whole")
        assert files_of(output) == files_of(tmp_path / "whole")


def test_an_adapter_of_another_size_is_told_by_the_base_that_it_names(request_for: TuneRequest, tmp_path: Path) -> None:
    config = small_config(num_layers=9)
    adapter = new_adapter(config, AdapterSpec.of_kinds(config, {"q": Target(rank=2, alpha=4)}), seed=5)
    write_peft(tmp_path / "large", adapter, base_model="models/large")
    with pytest.raises(CheckpointError, match=r"says that the adapter is for 'models/large', .*; give --model what"):
        prepare(of_another(request_for, tmp_path / "large"))


def test_another_adapter_than_a_run_began_with_is_refused(
    request_for: TuneRequest, first: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(first, tmp_path / "own")
    tuned(of_another(request_for, own), tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(UsageError, match=r"--adapter was .*own' and is '/elsewhere'"):
        resumed(tmp_path / "run", adapter="/elsewhere")
    assert location(tmp_path / "x" / ".." / "own") == str(own)
    (tmp_path / "deep" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "sub")
    assert Path(location(tmp_path / "link" / ".." / "x")).resolve() == tmp_path / "deep" / "x"
    assert location(tmp_path / "link" / "x") == str(tmp_path / "link" / "x")
    tensors = own / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"adapter_model.safetensors is not what it was when .*run began"):
        resumed(tmp_path / "run")
    shutil.rmtree(own)
    with pytest.raises(ModelNotFoundError, match="own"):
        resumed(tmp_path / "run")


def test_preferences_are_compared_with_the_adapter_that_a_run_begins_with(
    request_for: TuneRequest, first: Path, tmp_path: Path
) -> None:
    pairs = write_chats(tmp_path / "pairs.jsonl", PAIR)
    request = replace(of_another(request_for, first, dropout=0.0), files=(pairs,), validation_file=pairs, method="dpo")
    tuned(request, tmp_path / "run")
    begun, *_, ended = (line for line in numbers(tmp_path / "run") if "validation_loss" in line)
    assert begun["validation_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert ended["validation_loss"] < begun["validation_loss"]
    assert (
        prepare(request).plan().weights
        > prepare(replace(request, method="lora", files=request_for.files, validation_file=None)).plan().weights
    )


def test_an_adapter_goes_on_in_the_format_that_it_learnt(request_for: TuneRequest, tmp_path: Path) -> None:
    own = make_tiny_model(tmp_path / "own", harmony=True)
    loop = replace(LOOP, max_steps=1, max_length=1024)
    lora = LoraOptions(targets=lora_targets((), ("2",), ()))
    asked = replace(request_for, model=str(own), validation_file=None, loop=loop, lora=lora)
    tuned(replace(asked, harmony=True), tmp_path / "harmony")
    again = replace(asked, adapter=tmp_path / "harmony", lora=LoraOptions(targets=()))
    assert [prepare(replace(again, harmony=harmony)).harmony for harmony in (None, True, False)] == [True, True, False]
    assert prepare(asked).harmony is False
    text = tmp_path / "book.txt"
    text.write_text("once upon a time\n" * 20)
    tuned(replace(again, files=(text,)), tmp_path / "text")
    assert learnt_harmony(tmp_path / "text") is True
    other = replace(again, model=request_for.model, files=(text,), loop=replace(loop, max_length=64))
    with pytest.raises(UsageError, match=r"harmony learnt Harmony, which the tokeniser .* lacks; add --no-harmony"):
        prepare(other)
    assert prepare(replace(other, harmony=False)).harmony is None


def test_an_adapter_that_no_run_can_begin_with_is_refused_before_anything_is_made(
    request_for: TuneRequest, first: Path, tmp_path: Path
) -> None:
    config = prepare(request_for).folder.checkpoint.config
    adapter = read_peft(first, config)
    adapter.parameters[0][0, 0] = torch.nan
    write_peft(tmp_path / "nan", adapter)
    with pytest.raises(CheckpointError, match="not finite"):
        prepare(of_another(request_for, tmp_path / "nan"))
    data = (first / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]) | {"__metadata__": {"a": 1}}).encode()
    odd = shutil.copytree(first, tmp_path / "odd") / "adapter_model.safetensors"
    odd.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    for read in (learnt_harmony, lambda folder: prepare(of_another(request_for, folder))):
        with pytest.raises(CheckpointError, match=r"odd/adapter_model\.safetensors cannot be read"):
            read(odd.parent)


def test_that_merging_will_lose_again_is_told(
    request_for: TuneRequest, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_peft(
        tmp_path / "qat", replace(read_peft(first, prepare(request_for).folder.checkpoint.config), dithered=True)
    )
    caplog.set_level(logging.INFO, "freehold")
    for qat in (True, False):
        caplog.clear()
        prepare(of_another(request_for, tmp_path / "qat", qat=qat, dropout=0.0))
        assert ("was trained with --qat, and this run is not" in caplog.text) is not qat


def test_what_was_better_before_is_told(
    request_for: TuneRequest, first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = of_another(request_for, first, dropout=0.0)
    tuned(replace(request, loop=replace(LOOP, max_steps=2, learning_rate=0.01)), tmp_path / "better")
    assert "keep what you had" not in caplog.text
    tuned(replace(request, loop=replace(LOOP, max_steps=2, learning_rate=1.0)), tmp_path / "worse")
    assert "keep what you had, or train anew with a lower --learning-rate" in caplog.text
    assert "It has **risen**" in (tmp_path / "worse" / "README.md").read_text()
    assert "**risen**" not in (tmp_path / "better" / "README.md").read_text()


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
        ({"adapter": tmp_path, "lora": LoraOptions(targets=())}, ModelNotFoundError, "adapter"),
    ):
        with pytest.raises(error, match=words):
            prepare(replace(request_for, **changes))


def test_requests_that_contradict_themselves(request_for: TuneRequest) -> None:
    for changes, words in (
        ({"files": ()}, "nothing to train on"),
        ({"validation_share": 0.1}, "not both"),
        ({"validation_file": None, "loop": replace(LOOP, patience=2)}, "--patience stops when"),
        ({"lora": LoraOptions(targets=())}, "nothing to train; name one or more --target"),
        ({"adapter": Path("mine")}, "mine has targets and ranks of its own"),
        ({"adapter": Path("mine"), "lora": LoraOptions(targets=(), rslora=True)}, "mine has targets and ranks of its"),
        ({"adapter": Path("mine"), "method": "full"}, "trains no adapter; `freehold merge` mine first"),
        ({"adapter": Path("mine"), "method": "dpo", "lora": LoraOptions(targets=(), qat=True)}, "--method dpo with"),
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
