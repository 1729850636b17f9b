"""Adapters folded into checkpoints: what is left alone, to the byte; what the sum computes, here and in transformers;
what rounding to MXFP4 by chance keeps that rounding to the nearest loses; and what the receipt says of it."""

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freehold.config import ExpertFormat, Layout, ModelConfig, Rounding
from freehold.errors import CheckpointError, DiskSpaceError, FreeholdError, UsageError
from freehold.hub import default_base, default_model
from freehold.hub.bases import check_base
from freehold.hub.convert import convert
from freehold.hub.merge import merge
from freehold.hub.merged import MergedSource, Touched
from freehold.model.batch import Batch
from freehold.model.lora import Adapter, AdapterSpec, Factors, Target, TokenAdapters, new_adapter
from freehold.model.peft_files import CONFIG_FILE, read_peft, write_peft
from freehold.model.transformer import Transformer
from freehold.session.merge_receipt import MergeReceipt, measure_merge
from freehold.weights import mxfp4
from freehold.weights.files import TensorFiles
from freehold.weights.layouts import WeightTable, open_checkpoint
from freehold.weights.mxfp4 import Mxfp4Tensor
from tests.checkpoints import CPU, load, logits, packed, plain, random_table, save, small_config, tokens_of

MXFP4, BF16 = ExpertFormat.MXFP4, ExpertFormat.BF16
CONFIG = small_config(num_layers=3, vocab_size=128)
EVERYTHING = dict.fromkeys(("q", "k", "v", "o", "router", "gate_up", "down"), Target(rank=4, alpha=8))


def trained(config: ModelConfig, spec: AdapterSpec, *, strength: float = 0.05) -> Adapter:
    """An adapter that changes something."""
    adapter = new_adapter(config, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, b in adapter.factors.values():
            b.normal_(std=strength, generator=generator)
    return adapter


def adapted_logits(model: Transformer, adapter: Adapter, tokens: Tensor) -> Tensor:
    adapters = TokenAdapters([adapter], torch.zeros_like(tokens))
    batch = Batch.whole([len(tokens)], num_layers=len(model.layers), device=CPU, adapters=adapters)
    with torch.inference_mode():
        return model.unembed(model.forward(tokens, batch))


def sequences(config: ModelConfig, count: int, length: int, seed: int) -> Sequence[list[int]]:
    return [tokens_of(config, length, seed=seed + i).tolist() for i in range(count)]


def digests(folder: Path) -> dict[str, str]:
    files = TensorFiles(folder)
    return {
        name: hashlib.sha256(files.tensor(name).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name in files.infos
    }


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense tensors in float32, experts in bfloat16."""
    return save(tmp_path_factory.mktemp("models") / "plain", CONFIG, random_table(CONFIG), experts=BF16)


@pytest.fixture(scope="module")
def exact_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 64ths: bfloat16 has room for them, and for what `exact_adapter` adds."""
    table: WeightTable = {name: (tensor * 64).round() / 64 for name, tensor in plain(random_table(CONFIG)).items()}
    return save(tmp_path_factory.mktemp("models") / "exact", CONFIG, table, experts=BF16)


def exact_adapter(targets: Mapping[str, Target]) -> Adapter:
    """Its share of each weight is a small multiple of a 32nd."""
    adapter = trained(CONFIG, AdapterSpec.of_kinds(CONFIG, targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in adapter.parameters:
            factor.copy_(torch.randint(-1, 2, factor.shape, generator=generator) / 8)
    return adapter


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: MXFP4 and bfloat16."""
    table = packed(random_table(CONFIG, dtype=torch.bfloat16))
    return save(tmp_path_factory.mktemp("models") / "packed", CONFIG, table)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "everything"
    write_peft(folder, trained(CONFIG, AdapterSpec.of_kinds(CONFIG, EVERYTHING)))
    return folder


# --- what the sum computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", Layout)
def test_the_sum_computes_what_base_and_adapter_compute(exact_model: Path, tmp_path: Path, layout: Layout) -> None:
    source = exact_model
    if layout is Layout.ORIGINAL:
        source = tmp_path / "original"
        convert(exact_model, source, layout=layout)
    adapter = exact_adapter(EVERYTHING)
    write_peft(tmp_path / "adapter", adapter)
    touched = merge(source, tmp_path / "adapter", tmp_path / "merged", layout=layout)
    assert touched == Touched(dense=15, matrices=24, of_matrices=24)
    tokens = tokens_of(CONFIG, 40)
    expected = adapted_logits(load(exact_model), adapter, tokens)
    assert (expected - logits(load(exact_model), tokens)).abs().max() > 0.3
    torch.testing.assert_close(logits(load(tmp_path / "merged"), tokens), expected, atol=1e-4, rtol=1e-4)
    checkpoint = open_checkpoint(tmp_path / "merged")
    assert (checkpoint.layout, checkpoint.experts, checkpoint.config) == (layout, BF16, CONFIG)


@pytest.mark.parametrize("kind", EVERYTHING)
def test_transformers_computes_with_the_sum_what_base_and_adapter_compute(
    exact_model: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import GptOssForCausalLM

    adapter = exact_adapter({kind: EVERYTHING[kind]})
    write_peft(tmp_path / "adapter", adapter)
    merge(exact_model, tmp_path / "adapter", tmp_path / "merged")
    theirs = GptOssForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = tokens_of(CONFIG, 40)
    expected = adapted_logits(load(exact_model), adapter, tokens)
    assert (expected - logits(load(exact_model), tokens)).abs().max() > 0.1
    with torch.inference_mode():
        found = theirs(tokens.unsqueeze(0), use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("experts", ExpertFormat)
def test_what_is_exported_computes_the_same_in_transformers(
    packed_model: Path, adapter: Path, tmp_path: Path, experts: ExpertFormat
) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    merge(packed_model, adapter, tmp_path / "merged", experts=experts)
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if experts is MXFP4 else {}
    theirs = GptOssForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", **options
    ).eval()
    tokens = tokens_of(CONFIG, 40)
    with torch.inference_mode():
        expected = theirs(tokens.unsqueeze(0), use_cache=False).logits[0]
    torch.testing.assert_close(logits(load(tmp_path / "merged"), tokens), expected, atol=1e-3, rtol=1e-3)


# --- what is left alone -----------------------------------------------------------------------------------------


def test_what_an_adapter_leaves_alone_keeps_its_bytes(packed_model: Path, tmp_path: Path) -> None:
    """Here one layer's q, and two experts' gate_up: the other experts were sent no token, so that their B is zero."""
    spec = AdapterSpec(targets={"layers.1.q": Target(rank=2, alpha=4), "layers.1.gate_up": Target(rank=2, alpha=4)})
    factors = trained(CONFIG, spec)
    with torch.no_grad():
        factors.factors["layers.1.gate_up"].b[[0, 2]] = 0
    write_peft(tmp_path / "adapter", factors)
    touched = merge(packed_model, tmp_path / "adapter", tmp_path / "merged")
    assert touched == Touched(dense=1, matrices=2, of_matrices=24)
    before, after = digests(packed_model), digests(tmp_path / "merged")
    assert before.keys() == after.keys()
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {f"{experts}_scales"} == {"model.layers.1.self_attn.q_proj.weight", f"{experts}_blocks"}
    for part in ("blocks", "scales"):
        old, new = (TensorFiles(folder).tensor(f"{experts}_{part}") for folder in (packed_model, tmp_path / "merged"))
        assert torch.equal(old[[0, 2]], new[[0, 2]])


def test_the_sum_is_where_the_adapter_is(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training on a GPU needs it, of weights that are mapped. Torch's device without numbers stands for one: whether
    a factor is zero cannot be asked there."""
    meta = torch.device("meta")
    adapter = trained(CONFIG, AdapterSpec.of_kinds(CONFIG, EVERYTHING)).to(device=meta)
    source = MergedSource(open_checkpoint(packed_model).table(), adapter, origin="")
    monkeypatch.setattr(source, "touches", lambda *_: True)
    summed = source.expert("layers.1.gate_up", 0)
    assert isinstance(summed, Tensor)
    monkeypatch.setattr(source, "touches", lambda *_: False)
    kept, dense = source.expert("layers.1.gate_up", 0), source.dense("layers.1.q.weight")
    assert isinstance(kept, Mxfp4Tensor)
    assert {part.device for part in (summed, kept.blocks, kept.scales, dense)} == {meta}


def test_an_adapter_that_adds_nothing_changes_nothing(packed_model: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "new", new_adapter(CONFIG, AdapterSpec.of_kinds(CONFIG, EVERYTHING), seed=0))
    touched = merge(packed_model, tmp_path / "new", tmp_path / "merged")
    assert (touched.dense, touched.matrices) == (0, 0)
    assert digests(tmp_path / "merged") == digests(packed_model)


def test_tokeniser_template_and_licence_come_along(packed_model: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(packed_model, tmp_path / "base")
    carried = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}", "LICENSE": b"free", "README.md": b"# Base"}
    for name, content in carried.items():
        (tmp_path / "base" / name).write_bytes(content)
    merge(tmp_path / "base", adapter, tmp_path / "merged", layout=Layout.ORIGINAL)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.startswith("# Base") and "adapter `everything`" in card
    for name in carried.keys() - {"README.md"}:
        assert (tmp_path / "merged" / name).read_bytes() == carried[name]


# --- rounding ---------------------------------------------------------------------------------------------------


def share_kept(base: Path, merged: Path, adapter: Adapter) -> float:
    """Of the experts' change, what there is in the numbers that were written: the slope of a line through both."""
    before, after = open_checkpoint(base).table(), open_checkpoint(merged).table()
    wanted = made = 0.0
    for name in adapter.factors:
        change = adapter.weight_delta(name).detach().double()
        wanted += float((change * change).sum())
        made += float(((plain({name: after[name]})[name] - plain({name: before[name]})[name]) * change).sum())
    return made / wanted


@pytest.mark.parametrize(("strength", "of_nearest"), [(0.005, 0.1), (0.04, 0.8), (1.0, 1.05)])
def test_rounding_by_chance_keeps_what_the_nearest_numbers_lose(
    packed_model: Path, tmp_path: Path, strength: float, of_nearest: float
) -> None:
    """From a change of every weight that is a small part of a step between two numbers to one of several steps."""
    spec = AdapterSpec.of_kinds(CONFIG, {kind: EVERYTHING[kind] for kind in ("gate_up", "down")})
    adapter = trained(CONFIG, spec, strength=strength)
    write_peft(tmp_path / "adapter", adapter)
    kept = {}
    for rounding in Rounding:
        merge(packed_model, tmp_path / "adapter", tmp_path / rounding.value, rounding=rounding)
        kept[rounding] = share_kept(packed_model, tmp_path / rounding.value, adapter)
    assert kept[Rounding.NEAREST] < of_nearest
    assert 0.93 < kept[Rounding.RANDOM] < 1.05
    merge(packed_model, tmp_path / "adapter", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "random")


def test_bfloat16_experts_become_the_nearest_numbers_of_mxfp4(plain_model: Path, adapter: Path, tmp_path: Path) -> None:
    """What lies between two numbers anyhow goes up as often as down."""
    merge(plain_model, adapter, tmp_path / "merged", experts=MXFP4)
    merge(plain_model, adapter, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "converted", layout=Layout.HF, experts=MXFP4)
    one, other = (open_checkpoint(tmp_path / name).table() for name in ("merged", "converted"))
    for name in ("layers.0.gate_up", "layers.2.down"):
        # Not the same sums to the last bit: those of the other were bfloat16 in between.
        assert (plain({name: one[name]})[name] == plain({name: other[name]})[name]).float().mean() > 0.97


# --- refusals ---------------------------------------------------------------------------------------------------


def test_failures_leave_nothing(
    packed_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        merge(packed_model, adapter, tmp_path / "there")
    wider = save(
        tmp_path / "wider",
        small_config(num_layers=3, vocab_size=128, num_heads=8),
        packed(random_table(small_config(num_layers=3, vocab_size=128, num_heads=8))),
    )
    with pytest.raises(CheckpointError, match=r"lora_B of layers\.0\.q has shape .* for another model"):
        merge(wider, adapter, tmp_path / "merged")
    with monkeypatch.context() as full:
        usage = shutil.disk_usage(tmp_path)
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(DiskSpaceError, match="merged needs"):
            merge(packed_model, adapter, tmp_path / "merged")
    with monkeypatch.context() as full:
        full.setattr(mxfp4, "pack_dithered", no_room)
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            merge(packed_model, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "wider"]


@pytest.mark.parametrize("target", ["layers.1.o", "layers.1.down"])
def test_a_sum_beyond_all_numbers_is_not_written(
    target: str, plain_model: Path, packed_model: Path, adapter: Path, tmp_path: Path
) -> None:
    factors = read_peft(adapter, CONFIG)
    pair = factors.factors[target]
    huge = {**factors.factors, target: Factors(pair.a.clone().fill_(1e30), pair.b.clone().fill_(1e30))}
    write_peft(tmp_path / "huge", replace(factors, factors=huge))
    for model in (plain_model, packed_model):
        with pytest.raises(FreeholdError, match=r"beyond all numbers|NaN or infinity"):
            merge(model, tmp_path / "huge", tmp_path / "merged")
        assert [path.name for path in tmp_path.iterdir()] == ["huge"]


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "no room")


def test_an_adapter_of_another_model_is_refused_by_its_name(adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / CONFIG_FILE).read_text())

    def says(name: str | None) -> None:
        (folder / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": name}))

    says("openai/gpt-oss-20b")
    check_base(folder, "/models/GPT-OSS-20b/", Path("/models/GPT-OSS-20b"))
    check_base(folder, "x", Path("/cache/models--openai--gpt-oss-20b/snapshots/0123"))
    with pytest.raises(UsageError, match=r"'openai/gpt-oss-20b', and the model is 'openai/gpt-oss-120b'.*--any-base"):
        check_base(folder, "openai/gpt-oss-120b", Path("/models/gpt-oss-120b"))
    says(default_model.NAME)
    check_base(folder, "default", default_model.folder())
    says("default-base")
    check_base(folder, str(default_base.folder()), default_base.folder())
    with pytest.raises(UsageError, match="'default-base', and the model is 'default'"):
        check_base(folder, "default", default_model.folder())
    says("default")  # which is another one with every tuning
    with pytest.raises(UsageError, match="for 'default', and the model is 'default'"):
        check_base(folder, "default", default_model.folder())
    says(None)
    check_base(folder, "default", tmp_path)


# --- the receipt ------------------------------------------------------------------------------------------------


def test_the_receipt_tells_what_each_step_cost(packed_model: Path, adapter: Path, tmp_path: Path) -> None:
    """Against whole models: the base, the base with the adapter, and what was written."""
    merge(packed_model, adapter, tmp_path / "merged")
    merge(packed_model, adapter, tmp_path / "bf16", experts=BF16)
    examples = [(tokens[:-1], [-100, *tokens[2:]]) for tokens in sequences(CONFIG, 2, 33, seed=5)]
    found = measure_merge(packed_model, adapter, tmp_path / "merged", examples)

    def log_probs(folder: Path, factors: Adapter | None = None) -> Tensor:
        model = load(folder)
        of_each = []
        for tokens, _ in examples:
            ids = torch.tensor(tokens)
            values = logits(model, ids) if factors is None else adapted_logits(model, factors, ids)
            of_each.append(values[1:].log_softmax(-1))
        return torch.cat(of_each)

    targets = torch.tensor([target for _, targets in examples for target in targets[1:]])
    factors = read_peft(adapter, CONFIG)
    adapted = log_probs(packed_model, factors)
    for values, loss, divergence in (
        (log_probs(packed_model), found.base_loss, None),
        (adapted, found.adapter_loss, None),
        (log_probs(tmp_path / "bf16"), found.merged_loss, found.merged_kl),
        (log_probs(tmp_path / "merged"), found.stored_loss, found.stored_kl),
    ):
        assert loss == pytest.approx(float(torch.nn.functional.nll_loss(values, targets)), abs=1e-5)
        if divergence is not None:
            assert divergence == pytest.approx(float((adapted.exp() * (adapted - values)).sum(-1).mean()), abs=1e-5)
    assert found.num_targets == 62
    assert found.stored_kl > found.merged_kl > 0


def test_shares_are_of_what_the_adapter_gained() -> None:
    receipt = MergeReceipt(
        num_targets=1, tokens_sha256="", base_loss=3.0, adapter_loss=1.0, merged_loss=1.0, stored_loss=1.5,
        merged_kl=0.0, stored_kl=0.1,
    )  # fmt: skip
    assert (receipt.merged_share, receipt.stored_share) == (1.0, 0.75)
    assert replace(receipt, adapter_loss=3.0).stored_share is None
