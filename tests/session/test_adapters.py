"""Adapters of a loaded model: what PEFT computes, who asks for which, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch

import freehold
from freehold import machine
from freehold.config import ExpertFormat, ModelConfig
from freehold.errors import CheckpointError, ModelNotFoundError, OutOfMemoryError, UsageError
from freehold.kernels import backends
from freehold.model.peft_files import CONFIG_FILE
from freehold.session.model import Model
from freehold.weights.layouts import WeightTable, open_checkpoint
from tests.checkpoints import (
    oracle,
    oracle_logits,
    plain,
    random_table,
    save,
    small_config,
    tokens_of,
    write_adapter,
)

pytestmark = [
    pytest.mark.usefixtures("native_settings"),
    # peft still asks transformers by a name that it had before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CONFIG = small_config()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    return save(folder, CONFIG, random_table(CONFIG), experts=ExpertFormat.BF16)


@pytest.fixture(scope="module")
def everything(base: Path) -> Path:
    return write_adapter(base.parent / "everything", CONFIG)


@pytest.fixture(params=["native", "reference"])
def model(request: pytest.FixtureRequest, base: Path, everything: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """In float32 throughout, by both kinds of kernels."""
    adapters = {"everything": everything}
    if request.param == "reference":
        request.getfixturevalue("reference_ops")
        return freehold.load(base, device="cpu", dtype="float32", adapters=adapters)
    if backends.native() is None:
        pytest.skip("the native kernels are not built")
    return freehold.load(base, device="cpu", dense="f32", kv_dtype="f32", adapters=adapters)


def test_logits_are_peft_s(model: Model, base: Path, everything: Path) -> None:
    import peft

    tokens = tokens_of(CONFIG, 30)
    table: WeightTable = {name: tensor.float() for name, tensor in plain(open_checkpoint(base).table()).items()}
    theirs = oracle(CONFIG, table)
    for name in (None, "everything"):
        if name is not None:
            theirs = peft.PeftModel.from_pretrained(theirs, everything).eval()
        found = model.logits(tokens.tolist(), adapter=name)
        torch.testing.assert_close(found, oracle_logits(theirs, tokens), atol=2e-4, rtol=2e-4)


def test_each_call_names_its_adapter(model: Model, base: Path) -> None:
    prompt = tokens_of(CONFIG, 9).tolist()
    bare, tuned = (list(model.generate(prompt, max_tokens=8, temperature=0, adapter=a)) for a in (None, "everything"))
    assert bare != tuned
    assert list(model.generate(prompt, max_tokens=8, temperature=0)) == bare
    with pytest.raises(UsageError, match="there is no adapter 'poet'; there are everything"):
        model.generate(prompt, adapter="poet")
    late = write_adapter(base.parent / f"late-{model.policy.native}", CONFIG, seed=2)
    model.add_adapter("late", late)
    assert model.adapters == ("everything", "late")
    assert list(model.generate(prompt, max_tokens=8, temperature=0, adapter="late")) not in (bare, tuned)
    with pytest.raises(UsageError, match="already"):
        model.add_adapter("late", late)


def test_what_does_not_fit_is_refused_before_the_weights_are_read(
    base: Path, everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = write_adapter(base.parent / "foreign", small_config(num_layers=3), "q")
    wide = write_adapter(base.parent / "wide", small_config(hidden_size=96), "q")

    def load(**adapters: Path) -> None:
        freehold.load(base, device="cpu", adapters=adapters)

    monkeypatch.setattr("freehold.session.model.Transformer", None)
    with pytest.raises(CheckpointError, match="layer 2 is adapted and the model has 2"):
        load(ok=everything, foreign=foreign)
    with pytest.raises(CheckpointError, match=r"shape \(3, 96\).*the adapter is for another model"):
        load(wide=wide)
    with pytest.raises(ModelNotFoundError, match="name the folder of an adapter"):
        load(nothing=base)
    with pytest.raises(UsageError, match="cannot be called 'a:b'"):
        load(**{"a:b": everything})
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 20)
    with pytest.raises(OutOfMemoryError, match="adapters"):
        load(ok=everything)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (small_config(num_layers=3), "layer 2 is adapted"),
        (small_config(num_layers=1), "there are no factors for it"),
        (small_config(hidden_size=96), "has shape"),
    ],
)
def test_what_does_not_fit_is_told_by_the_base_that_it_names(
    other: ModelConfig, words: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "poet", other, ["gate_up"])
    config = json.loads((adapter / CONFIG_FILE).read_text())

    def refusal(named: str | None) -> str:
        (adapter / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": named}))
        with pytest.raises(CheckpointError, match=words) as caught:
            freehold.load(base, device="cpu", adapters={"poet": adapter})
        return str(caught.value)

    assert refusal(None) == refusal(str(base))
    assert refusal("openai/gpt-oss-20b") == (
        f"{adapter / CONFIG_FILE} says that the adapter is for 'openai/gpt-oss-20b', and it does not fit "
        f"{str(base)!r}; give --model what it is for. If both are one model under two names: {refusal(None)}"
    )


def test_what_is_damaged_is_not_told_by_its_base(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "poet", CONFIG, ["q"])
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": "openai/gpt-oss-20b", "r": 0}))
    with pytest.raises(CheckpointError, match="r is 0, not a positive number") as caught:
        freehold.load(base, device="cpu", adapters={"poet": adapter})
    assert "gpt-oss-20b" not in str(caught.value)


def test_an_adapter_is_read_only_where_there_is_room_to_read_it(
    model: Model, everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that runs is not to be ended for one adapter more, for which there would have been room in the end."""
    needed = model.plan.adapters
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * needed)
    before = model.adapters
    with pytest.raises(OutOfMemoryError, match="3 times that while it is read"):
        model.add_adapter("one-more", everything)
    assert model.adapters == before
    monkeypatch.setattr(machine, "available_memory", lambda: 3 * needed)
    model.add_adapter("one-more", everything)
    model.remove_adapter("one-more")
    assert model.adapters == before


def test_the_plan_counts_what_adapters_take(model: Model) -> None:
    loaded = model.transformer.config
    assert loaded == CONFIG
    factors = 2 * (2 * 64 + 2 * 64 + 64 + 32 + 64 + 32 + 64 + 64 + 64 + 4)
    assert model.plan.adapters >= 3 * 4 * factors // 2
    assert "adapters" in model.plan.describe()
    assert model.plan.needed > model.plan.dense + model.plan.experts + model.plan.kv_cache + model.plan.scratch
