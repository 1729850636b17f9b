"""Adapters folded into checkpoints: what is left alone, to the byte; what the sum computes, here and in transformers;
what rounding to MXFP4 by inputs keeps that rounding to the nearest loses."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from freehold.config import ExpertFormat, Layout, ModelConfig
from freehold.errors import CheckpointError, DiskSpaceError, UsageError
from freehold.hub.convert import convert
from freehold.hub.merge import check_base, merge
from freehold.hub.merged import Touched
from freehold.kernels import backends
from freehold.model.batch import Batch
from freehold.model.lora import Adapter, AdapterSpec, Target, TokenAdapters, new_adapter
from freehold.model.peft_files import CONFIG_FILE, write_peft
from freehold.model.transformer import Transformer
from freehold.session.merge_receipt import measure_merge
from freehold.weights.files import TensorFiles
from freehold.weights.layouts import open_checkpoint
from tests.checkpoints import CPU, load, logits, packed, random_table, save, small_config, tokens_of

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
def test_the_sum_computes_what_base_and_adapter_compute(
    plain_model: Path, adapter: Path, tmp_path: Path, layout: Layout
) -> None:
    source = plain_model
    if layout is Layout.ORIGINAL:
        source = tmp_path / "original"
        convert(plain_model, source, layout=layout)
    touched = merge(source, adapter, tmp_path / "merged", layout=layout)
    assert touched == Touched(dense=15, matrices=24, of_matrices=24)
    tokens = tokens_of(CONFIG, 40)
    expected = adapted_logits(load(plain_model), trained(CONFIG, AdapterSpec.of_kinds(CONFIG, EVERYTHING)), tokens)
    found = logits(load(tmp_path / "merged"), tokens)
    assert (expected - logits(load(plain_model), tokens)).abs().max() > 0.3
    # Sums of bfloat16 experts are bfloat16: a share of 2^-9 of what each weight does.
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)
    checkpoint = open_checkpoint(tmp_path / "merged")
    assert (checkpoint.layout, checkpoint.experts, checkpoint.config) == (layout, BF16, CONFIG)


@pytest.mark.parametrize("experts", ExpertFormat)
def test_what_is_exported_computes_the_same_in_transformers(
    packed_model: Path, adapter: Path, tmp_path: Path, experts: ExpertFormat
) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    merge(packed_model, adapter, tmp_path / "merged", experts=experts, calibration=sequences(CONFIG, 2, 64, seed=1))
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
    touched = merge(
        packed_model, tmp_path / "adapter", tmp_path / "merged", calibration=sequences(CONFIG, 2, 64, seed=1)
    )
    assert touched == Touched(dense=1, matrices=2, of_matrices=24)
    before, after = digests(packed_model), digests(tmp_path / "merged")
    assert before.keys() == after.keys()
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {f"{experts}_scales"} == {"model.layers.1.self_attn.q_proj.weight", f"{experts}_blocks"}
    for part in ("blocks", "scales"):
        old, new = (TensorFiles(folder).tensor(f"{experts}_{part}") for folder in (packed_model, tmp_path / "merged"))
        assert torch.equal(old[[0, 2]], new[[0, 2]])


def test_an_adapter_that_adds_nothing_changes_nothing(packed_model: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "new", new_adapter(CONFIG, AdapterSpec.of_kinds(CONFIG, EVERYTHING), seed=0))
    touched = merge(packed_model, tmp_path / "new", tmp_path / "merged", calibration=sequences(CONFIG, 1, 32, seed=1))
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


@pytest.mark.parametrize("layout", Layout)
def test_rounding_by_inputs_keeps_what_the_nearest_numbers_lose(
    packed_model: Path, tmp_path: Path, layout: Layout
) -> None:
    """An adapter of experts alone, whose share of each weight is a small part of a step between two numbers."""
    write_peft(
        tmp_path / "adapter",
        trained(CONFIG, AdapterSpec.of_kinds(CONFIG, {kind: EVERYTHING[kind] for kind in ("gate_up", "down")})),
    )
    examples = [(tokens[:-1], tokens[1:]) for tokens in sequences(CONFIG, 2, 65, seed=99)]
    found = {}
    for name, calibration in {"nearest": [], "fitted": sequences(CONFIG, 32, 64, seed=1)}.items():
        merge(packed_model, tmp_path / "adapter", tmp_path / name, layout=layout, calibration=calibration)
        found[name] = measure_merge(packed_model, tmp_path / "adapter", tmp_path / name, examples)
    print(found)
    assert found["fitted"].stored_kl < found["nearest"].stored_kl / 2
