"""Adapters in PEFT's format, against `peft` itself on transformers' GptOssForCausalLM: both ways, with equal logits."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from freehold.config import ModelConfig
from freehold.errors import CheckpointError, FreeholdError, ModelNotFoundError, UnsupportedError, UsageError
from freehold.model.lora import Adapter, AdapterSpec, Target, new_adapter, weight_name
from freehold.model.peft_files import CONFIG_FILE, TENSOR_FILE, read_peft, read_spec, write_peft
from freehold.model.transformer import Transformer
from freehold.weights.layouts import WeightTable
from tests.checkpoints import CPU, logits, oracle, oracle_logits, random_table, small_config, tokens_of

pytestmark = [
    # peft still asks transformers by a name that it had before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It looks for these among modules alone, and honours them for parameters all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

TOLERANCE = 1e-4  # of float32 logits of order 1, as for the model itself
CONFIG = small_config(num_layers=3, expert_width=48)
SMALL, LARGE = Target(rank=2, alpha=5), Target(rank=3, alpha=2.5)


def trained(config: ModelConfig, spec: AdapterSpec) -> Adapter:
    """An adapter whose B is not zero, and whose effect on the logits is of order 1."""
    adapter = new_adapter(config, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, b in adapter.factors.values():
            b.normal_(std=0.3, generator=generator)
    return adapter


def folded(table: WeightTable, adapter: Adapter) -> WeightTable:
    """The model's weights with the adapter added to them."""
    sums: dict[str, Tensor] = {}
    for name in adapter.factors:
        weight = table[weight_name(name)]
        assert isinstance(weight, Tensor)
        sums[weight_name(name)] = weight + adapter.weight_delta(name).detach()
    return table | sums


def folded_logits(config: ModelConfig, table: WeightTable, adapter: Adapter, tokens: Tensor) -> Tensor:
    return logits(Transformer(config, folded(table, adapter), dtype=torch.float32, device=CPU), tokens)


SPECS = {
    "attention": AdapterSpec.of_kinds(CONFIG, dict.fromkeys("qkvo", SMALL)),
    "everything, experts of another rank": AdapterSpec.of_kinds(
        CONFIG, {"q": SMALL, "v": SMALL, "o": LARGE, "router": SMALL, "gate_up": LARGE, "down": SMALL}
    ),
    "experts alone, rank-stabilised": AdapterSpec.of_kinds(CONFIG, {"gate_up": SMALL, "down": LARGE}, rslora=True),
    "one of the experts' two": AdapterSpec.of_kinds(CONFIG, {"down": SMALL}),
    "each layer as it likes": AdapterSpec(
        targets={
            "layers.0.gate_up": SMALL,
            "layers.1.gate_up": LARGE,
            "layers.1.down": SMALL,
            "layers.2.down": LARGE,
            "layers.2.q": Target(rank=4, alpha=1),
            "layers.1.router": LARGE,
        }
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_peft_computes_with_our_files_what_the_folded_weights_compute(spec: AdapterSpec, tmp_path: Path) -> None:
    import peft

    table, tokens = random_table(CONFIG), tokens_of(CONFIG, 20)
    adapter = replace(trained(CONFIG, spec), dithered=True, harmony=True)
    write_peft(tmp_path / "adapter", adapter)
    theirs = peft.PeftModel.from_pretrained(oracle(CONFIG, table), tmp_path / "adapter").eval()
    expected = oracle_logits(theirs, tokens)
    assert (expected - logits(Transformer(CONFIG, table, dtype=torch.float32, device=CPU), tokens)).abs().max() > 0.1
    torch.testing.assert_close(folded_logits(CONFIG, table, adapter, tokens), expected, atol=TOLERANCE, rtol=TOLERANCE)
    again = read_peft(tmp_path / "adapter", CONFIG)
    assert (again.spec, again.dithered, again.harmony) == (spec, True, True)
    for name, pair in adapter.factors.items():
        assert all(torch.equal(ours, read) for ours, read in zip(pair, again.factors[name], strict=True))


@pytest.mark.parametrize(("kinds", "told"), [(("q", "v"), 0.2), (("q", "router"), 0.0)])
def test_dropout_is_told_where_peft_can_have_it(kinds: Sequence[str], told: float, tmp_path: Path) -> None:
    """Of parameters, PEFT refuses to load an adapter whose config has any."""
    import peft

    spec = AdapterSpec.of_kinds(CONFIG, dict.fromkeys(kinds, SMALL))
    write_peft(tmp_path / "adapter", trained(CONFIG, spec), dropout=0.2)
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["lora_dropout"] == told
    peft.PeftModel.from_pretrained(oracle(CONFIG, random_table(CONFIG)), tmp_path / "adapter")
    assert read_peft(tmp_path / "adapter", CONFIG).spec == spec


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "as its guide says for gpt-oss": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 3},
        "target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj", "2.mlp.experts.down_proj"],
    },
    "patterns, dropout, some layers": {
        "r": 4,
        "lora_alpha": 7,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj"],
        "layers_to_transform": [0, 2],
        "alpha_pattern": {r"layers\.[02]\..*q_proj": 3},
        "rank_pattern": {"o_proj": 2},
    },
    "parameters alone": {
        "r": 2,
        "target_modules": [],
        "target_parameters": ["experts.down_proj", "router.weight", "experts.gate_up_proj"],
    },
}


@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_what_peft_made_computes_the_same_here(settings: dict[str, Any], tmp_path: Path) -> None:
    import peft

    table, tokens = random_table(CONFIG), tokens_of(CONFIG, 20)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        oracle(CONFIG, table), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = read_peft(tmp_path / "adapter", CONFIG)
    expected = oracle_logits(theirs, tokens)
    torch.testing.assert_close(folded_logits(CONFIG, table, adapter, tokens), expected, atol=TOLERANCE, rtol=TOLERANCE)


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(raw | changes))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSOR_FILE).items()}
        change(tensors)
        save_file(tensors, folder / TENSOR_FILE)

    return damage


def _rename(old: str, new: str) -> Callable[[Path], None]:
    def renamed(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return _tensors(renamed)


def write_header(path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSALS: dict[str, tuple[Callable[[Path], object], type[FreeholdError], str]] = {
    "DoRA": (_config(use_dora=True), UnsupportedError, "DoRA"),
    "biases": (_config(bias="lora_only"), UnsupportedError, "trained biases"),
    "biases of its own": (_config(lora_bias=True), UnsupportedError, "lora_bias"),
    "whole modules": (_config(modules_to_save=["lm_head"]), UnsupportedError, "modules_to_save"),
    "another method": (_config(peft_type="LOHA"), UnsupportedError, "'LOHA'"),
    "an option of the future": (_config(use_zora=True), UnsupportedError, "use_zora"),
    "an init that moved the base": (_config(init_lora_weights="pissa"), UnsupportedError, "pissa"),
    "an endless pattern": (_config(rank_pattern={"(a+)+b": 3}), UnsupportedError, r"\(a\+\)\+b"),
    "a broken pattern": (_config(alpha_pattern={"q_proj(": 3}), UnsupportedError, r"q_proj\("),
    "no rank": (_config(r=0), CheckpointError, "r is 0"),
    "half a rank": (_config(r=1.5), CheckpointError, "not a whole number"),
    "true as alpha": (_config(lora_alpha=True), CheckpointError, "lora_alpha is True"),
    "another rank": (_config(r=7), CheckpointError, r"layers.0.q has shape \(2, 64\); rank 7"),
    "a rank beyond all memory": (
        _config(r=2**31 - 1),
        CheckpointError,
        r"layers.0.q has shape \(2, 64\); rank 2147483647",
    ),
    "a negative rank": (_config(r=-4), CheckpointError, "r is -4"),
    "a rank that is no number": (_config(r=float("nan")), CheckpointError, "r is nan"),
    "an infinite alpha": (_config(lora_alpha=float("inf")), CheckpointError, "lora_alpha is inf"),
    "optional parts in a row": (_config(rank_pattern={".?" * 40 + "!": 3}), UnsupportedError, "may never end"),
    "alternatives in a row": (_config(rank_pattern={"(.|.)" * 40 + "!": 3}), UnsupportedError, "may never end"),
    "a count beyond all numbers": (
        _config(rank_pattern={"a{99999999999999999999}": 3}),
        UnsupportedError,
        "rank_pattern has",
    ),
    "a million patterns": (
        _config(alpha_pattern={f"n{number}": 3 for number in range(20_000)}),
        UnsupportedError,
        "may never end",
    ),
    "a config without end": (_config(target_modules=["q" * 2_000_000]), CheckpointError, "more than 1,048,576 bytes"),
    "a config that is nested without end": (
        lambda folder: (folder / CONFIG_FILE).write_text('{"r": ' + "[" * 100_000),
        CheckpointError,
        "cannot be read",
    ),
    "an option that fills the screen": (
        _config(modules_to_save=["x" * 100_000]),
        UnsupportedError,
        r"modules_to_save is \['x{60,90} \(modules",
    ),
    "a header without end": (
        lambda folder: (folder / TENSOR_FILE).write_bytes((1 << 26).to_bytes(8, "little")),
        CheckpointError,
        "header",
    ),
    "a shape beyond all numbers": (
        lambda folder: write_header(
            folder / TENSOR_FILE,
            {f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [10**4000] * 1000, "data_offsets": [0, 0]}},
        ),
        CheckpointError,
        "malformed header entry",
    ),
    "a layer under two names": (
        _tensors(lambda t: t.update({name.replace("layers.0", "layers.00"): t[name].clone() for name in list(t)})),
        UnsupportedError,
        r"layers\.00",
    ),
    "a layer in other digits": (_rename("layers.1.", "layers.\u0661."), UnsupportedError, "is no LoRA factor"),
    "numbers of eight bits": (
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.float8_e4m3fn)})),
        CheckpointError,
        "lora_A of layers.0.q is stored as F8_E4M3",
    ),
    "whole numbers": (
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.int32)})),
        CheckpointError,
        "lora_A of layers.0.q is stored as I32",
    ),
    "finite only in float64": (
        _tensors(lambda t: t.update({f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"].double() + 1e300})),
        CheckpointError,
        "lora_B of layers.0.q holds values that are not finite",
    ),
    "parameters not named": (_config(target_parameters=None), CheckpointError, "targets none of them"),
    "a parameter without factors": (_config(target_parameters=["router.weight"]), CheckpointError, "none of them"),
    "embeddings": (_rename("self_attn.q_proj.lora_A", "embed.lora_embedding_A"), UnsupportedError, "lora_embedding"),
    "an unknown module": (_rename("self_attn.q_proj", "self_attn.z_proj"), UnsupportedError, "self_attn.z_proj"),
    "a layer too many": (_rename("layers.2.", "layers.9."), CheckpointError, "layer 9"),
    "half a pair": (_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), CheckpointError, "lora_B of layers.0.q"),
    "not finite": (_tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan)), CheckpointError, "not finite"),
    "nothing": (_tensors(lambda t: t.clear()), CheckpointError, "holds no tensors"),
    "a layer's experts missing": (
        _tensors(lambda t: [t.pop(name) for name in list(t) if "layers.2.mlp" in name]),
        CheckpointError,
        "model.layers.2.mlp.experts.gate_up_proj",
    ),
    "cut short": (
        lambda folder: (folder / TENSOR_FILE).write_bytes((folder / TENSOR_FILE).read_bytes()[:-1]),
        CheckpointError,
        "truncated",
    ),
    "a pickle": (
        lambda folder: (folder / TENSOR_FILE).rename(folder / "adapter_model.bin"),
        UnsupportedError,
        "pickle",
    ),
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), ModelNotFoundError, CONFIG_FILE),
}


@pytest.mark.parametrize(("damage", "kind", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_used_is_refused_by_name(
    damage: Callable[[Path], object], kind: type[FreeholdError], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    write_peft(folder, trained(CONFIG, AdapterSpec.of_kinds(CONFIG, {"q": SMALL, "gate_up": SMALL})))
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        read_peft(folder, CONFIG)
    assert len(str(caught.value)) < 1000
    if "finite" not in message:  # what the headers say is refused before memory is planned for it
        with pytest.raises(kind, match=message):
            read_spec(folder, CONFIG)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", trained(CONFIG, AdapterSpec.of_kinds(CONFIG, {"down": SMALL})))
    with pytest.raises(CheckpointError, match=r"lora_A of layers.0.down has shape \(8, 48\).*\(8, 32\)"):
        read_peft(tmp_path / "adapter", small_config(num_layers=3))


def test_nothing_is_written_over_or_that_peft_could_not_read(tmp_path: Path) -> None:
    one_expert = small_config(num_experts=1, num_active_experts=1)
    with pytest.raises(UnsupportedError, match="leave gate_up and down out"):
        write_peft(tmp_path / "one", trained(one_expert, AdapterSpec.of_kinds(one_expert, {"down": SMALL})))
    adapter = trained(CONFIG, AdapterSpec.of_kinds(CONFIG, {"q": SMALL}))
    write_peft(tmp_path / "adapter", adapter)
    with pytest.raises(UsageError, match="exists already"):
        write_peft(tmp_path / "adapter", adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
