"""Both published layouts: names and shapes as published, bit-equal round trips, and every kind of damage refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from freehold.config import NAMED_CONFIGS, ExpertFormat, Layout, ModelConfig
from freehold.errors import CheckpointError, FreeholdError, ModelNotFoundError, UnsupportedError, UsageError
from freehold.weights import mxfp4
from freehold.weights.layouts import (
    TableSource,
    WeightTable,
    canonical_shapes,
    open_checkpoint,
    stored_shape,
    stored_tensors,
    tensors_to_write,
    write_checkpoint,
)
from freehold.weights.mxfp4 import Mxfp4Tensor
from freehold.weights.synth import RandomSource
from tests.checkpoints import packed, plain, random_table, save, small_config

LAYOUTS = list(Layout)
FORMATS = list(ExpertFormat)
SHARDED = 30_000  # bytes: at least three shards of the small model


def table_in(config: ModelConfig, experts: ExpertFormat, dtype: torch.dtype = torch.bfloat16) -> WeightTable:
    table = random_table(config, dtype=dtype)
    return packed(table) if experts is ExpertFormat.MXFP4 else table


def assert_same(ours: WeightTable, expected: WeightTable) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        other = ours[name]
        if isinstance(tensor, Mxfp4Tensor):
            assert isinstance(other, Mxfp4Tensor)
            assert torch.equal(other.blocks, tensor.blocks), name
            assert torch.equal(other.scales, tensor.scales), name
        else:
            assert isinstance(other, Tensor)
            assert other.dtype == tensor.dtype, name
            assert torch.equal(other, tensor), name


# --- names and shapes -------------------------------------------------------------------------------------------

PUBLISHED_SHAPES = {
    Layout.HF: {
        "model.embed_tokens.weight": (201088, 2880),
        "model.layers.0.input_layernorm.weight": (2880,),
        "model.layers.0.self_attn.q_proj.weight": (4096, 2880),
        "model.layers.0.self_attn.k_proj.bias": (512,),
        "model.layers.0.self_attn.o_proj.weight": (2880, 4096),
        "model.layers.0.self_attn.sinks": (64,),
        "model.layers.0.mlp.router.weight": (32, 2880),
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
        "model.layers.0.mlp.experts.gate_up_proj_scales": (32, 5760, 90),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (32, 5760),
        "model.layers.23.mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
        "model.layers.23.mlp.experts.down_proj_bias": (32, 2880),
        "model.layers.23.post_attention_layernorm.weight": (2880,),
        "model.norm.weight": (2880,),
        "lm_head.weight": (201088, 2880),
    },
    Layout.ORIGINAL: {
        "embedding.weight": (201088, 2880),
        "block.0.attn.norm.scale": (2880,),
        "block.0.attn.qkv.weight": (5120, 2880),
        "block.0.attn.qkv.bias": (5120,),
        "block.0.attn.sinks": (64,),
        "block.0.attn.out.weight": (2880, 4096),
        "block.0.mlp.norm.scale": (2880,),
        "block.0.mlp.gate.weight": (32, 2880),
        "block.0.mlp.mlp1_weight.blocks": (32, 5760, 90, 16),
        "block.0.mlp.mlp1_weight.scales": (32, 5760, 90),
        "block.0.mlp.mlp1_bias": (32, 5760),
        "block.23.mlp.mlp2_weight.blocks": (32, 2880, 90, 16),
        "block.23.mlp.mlp2_bias": (32, 2880),
        "norm.scale": (2880,),
        "unembedding.weight": (201088, 2880),
    },
}


@pytest.mark.parametrize(("layout", "count"), [(Layout.HF, 459), (Layout.ORIGINAL, 363)])
def test_gpt_oss_20b_has_the_published_tensors(layout: Layout, count: int) -> None:
    # The counts are those of the published index files.
    config = NAMED_CONFIGS["gpt-oss-20b"]
    shapes = canonical_shapes(config)
    tensors = {s.name: stored_shape(s, shapes) for s in stored_tensors(config, layout, ExpertFormat.MXFP4)}
    assert len(tensors) == count
    assert tensors.items() >= PUBLISHED_SHAPES[layout].items()


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_size_on_disk_is_the_published_one(name: str, gib: float) -> None:
    config = NAMED_CONFIGS[name]
    tensors = tensors_to_write(config, RandomSource(config, 0), Layout.HF, ExpertFormat.MXFP4)
    assert round(sum(tensor.num_bytes for tensor in tensors) / 2**30, 1) == gib


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dense", [torch.float32, torch.bfloat16])
def test_predicted_size_is_the_written_size(
    tmp_path: Path, experts: ExpertFormat, tied: bool, layout: Layout, dense: torch.dtype
) -> None:
    config = small_config(tied_embeddings=tied)
    table = table_in(config, experts, dense)
    predicted = sum(t.num_bytes for t in tensors_to_write(config, TableSource(table, "a test"), layout, experts))
    save(tmp_path, config, table, layout, experts)
    assert predicted == open_checkpoint(tmp_path).files.num_bytes


def test_nan_experts_are_named(tmp_path: Path) -> None:
    config = small_config()
    table = table_in(config, ExpertFormat.BF16)
    damaged = table["layers.0.down"]
    assert isinstance(damaged, Tensor)
    damaged[1, 2, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"a test: layers\.0\.down of expert 1: .*NaN.*download"):
        write_checkpoint(tmp_path, config, TableSource(table, "a test"), layout=Layout.HF, experts=ExpertFormat.MXFP4)


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1 << 40, SHARDED])
@pytest.mark.parametrize("experts", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path: Path, layout: Layout, experts: ExpertFormat, shard_bytes: int) -> None:
    config = small_config()
    table = table_in(config, experts)
    save(tmp_path, config, table, layout, experts, shard_bytes)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config, checkpoint.layout, checkpoint.experts) == (config, layout, experts)
    assert_same(checkpoint.table(), table)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes == SHARDED:
        separator = {Layout.HF: "-", Layout.ORIGINAL: "--"}[layout]
        assert len(shards) >= 3
        assert shards == [
            f"model{separator}{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    else:
        assert shards == ["model.safetensors"]


@pytest.mark.parametrize("experts", FORMATS)
def test_there_and_back_through_the_other_layout(tmp_path: Path, experts: ExpertFormat) -> None:
    config = small_config()
    first = save(tmp_path / "a", config, table_in(config, experts), Layout.HF, experts, SHARDED)
    middle = save(tmp_path / "b", config, open_checkpoint(first).table(), Layout.ORIGINAL, experts)
    last = save(tmp_path / "c", config, open_checkpoint(middle).table(), Layout.HF, experts, SHARDED)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in last.iterdir()}


def test_changing_the_expert_format(tmp_path: Path) -> None:
    config = small_config()
    table = random_table(config, dtype=torch.bfloat16)
    save(tmp_path / "a", config, table, experts=ExpertFormat.MXFP4)
    assert_same(open_checkpoint(tmp_path / "a").table(), packed(table))
    # Packed values are exact in bfloat16, so writing them out loses nothing and packing them again finds them.
    save(tmp_path / "b", config, open_checkpoint(tmp_path / "a").table(), Layout.ORIGINAL, ExpertFormat.BF16)
    out = open_checkpoint(tmp_path / "b").table()
    expected = plain(packed(table))
    assert all(torch.equal(value, expected[name]) for name, value in plain(out).items())
    again = packed(out)["layers.0.down"]
    assert isinstance(again, Mxfp4Tensor)
    assert torch.equal(mxfp4.unpack(again), expected["layers.0.down"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_stays_float32(tmp_path: Path, layout: Layout) -> None:
    config = small_config()
    save(tmp_path, config, table_in(config, ExpertFormat.MXFP4, torch.float32), layout)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint.table(), table_in(config, ExpertFormat.MXFP4, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_embeddings(tmp_path: Path, layout: Layout) -> None:
    config = small_config(tied_embeddings=True)
    save(tmp_path, config, table_in(config, ExpertFormat.MXFP4), layout)
    checkpoint = open_checkpoint(tmp_path)
    table = checkpoint.table()
    embedding = table["embedding"]
    assert isinstance(embedding, Tensor)
    assert checkpoint.config.tied_embeddings == (layout is Layout.HF)
    assert ("unembedding" in table) == (layout is Layout.ORIGINAL)
    if layout is Layout.ORIGINAL:  # has no word for it: the table is stored twice
        unembedding = table["unembedding"]
        assert isinstance(unembedding, Tensor)
        assert torch.equal(unembedding, embedding)


def test_a_head_that_repeats_tied_embeddings_is_welcome(tmp_path: Path) -> None:
    config = small_config(tied_embeddings=True)
    save(tmp_path, config, table_in(config, ExpertFormat.MXFP4))
    edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert "unembedding" not in open_checkpoint(tmp_path).table()


@pytest.mark.parametrize("experts", FORMATS)
def test_transformers_loads_our_hf_layout(tmp_path: Path, experts: ExpertFormat) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    config = small_config()
    table = table_in(config, experts)
    save(tmp_path, config, table, Layout.HF, experts, SHARDED)
    settings = {"quantization_config": Mxfp4Config(dequantize=True)} if experts is ExpertFormat.MXFP4 else {}
    theirs = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **settings).state_dict()
    expected = plain(table)
    assert torch.equal(theirs["model.layers.1.self_attn.k_proj.weight"], expected["layers.1.k.weight"])
    assert torch.equal(theirs["model.layers.1.mlp.router.bias"], expected["layers.1.router.bias"])
    for name in ("gate_up", "down"):
        values = theirs[f"model.layers.0.mlp.experts.{name}_proj"].transpose(1, 2).float()
        assert torch.equal(values, expected[f"layers.0.{name}"].float())
        assert torch.equal(theirs[f"model.layers.0.mlp.experts.{name}_proj_bias"], expected[f"layers.0.{name}.bias"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_is_views_of_the_files(tmp_path: Path, layout: Layout) -> None:
    config = small_config()
    save(tmp_path, config, table_in(config, ExpertFormat.BF16), layout, ExpertFormat.BF16)
    table = open_checkpoint(tmp_path).table()
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    mapped = [[int(address, 16) for address in line.split()[0].split("-")] for line in lines]
    for name, tensor in plain(table).items():
        assert any(start <= tensor.data_ptr() < end for start, end in mapped), name


# --- what cannot be written -------------------------------------------------------------------------------------


def test_mxfp4_needs_whole_blocks(tmp_path: Path) -> None:
    config = small_config(expert_width=40)
    table = random_table(config, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="divisible by 32"):
        save(tmp_path, config, table, experts=ExpertFormat.MXFP4)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, config, table, experts=ExpertFormat.BF16)
    assert_same(open_checkpoint(tmp_path).table(), table)


def test_a_layout_that_cannot_say_it_writes_nothing(tmp_path: Path) -> None:
    config = small_config(windows=(None, 8))
    with pytest.raises(UnsupportedError, match="original layout"):
        save(tmp_path, config, table_in(config, ExpertFormat.MXFP4), Layout.ORIGINAL)
    assert list(tmp_path.iterdir()) == []


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.value)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint of one layer."""
    config = small_config(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=20)
    folder = tmp_path_factory.mktemp("sound")
    return save(folder, config, table_in(config, ExpertFormat.MXFP4), request.param, shard_bytes=3_000)


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrites the tensors as one file, with safetensors' own writer."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
    save_file(change(tensors), folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load_all(folder: Path) -> None:
    """Opens a model as a user would; what opens must be whole."""
    checkpoint = open_checkpoint(folder)
    table = checkpoint.table()
    assert {name: tuple(tensor.shape) for name, tensor in table.items()} == canonical_shapes(checkpoint.config)


def refusal(folder: Path) -> str:
    with pytest.raises(FreeholdError) as caught:
        load_all(folder)
    message = str(caught.value)
    assert not isinstance(caught.value, UsageError)
    assert message.isprintable(), "one line"
    assert str(folder) in message, "names the file or the folder"
    return message


def test_every_shard_is_needed(broken: Path) -> None:
    shards = sorted(broken.glob("*.safetensors"))
    assert len(shards) >= 3
    for path in shards:
        content = path.read_bytes()
        path.unlink()
        assert path.name in refusal(broken)
        path.write_bytes(b"")
        assert str(path) in refusal(broken)
        path.write_bytes(content)
    load_all(broken)
    (broken / "model.safetensors.index.json").unlink()
    load_all(broken)  # the index is only a promise
    shards[0].unlink()
    assert "is missing" in refusal(broken)


def test_every_tensor_is_needed(broken: Path) -> None:
    edit_tensors(broken, lambda tensors: tensors)
    load_all(broken)
    names = load_file(broken / "model.safetensors").keys()
    for name in names:
        copy = Path(shutil.copytree(broken, broken.with_name("copy"), dirs_exist_ok=True))
        edit_tensors(copy, lambda tensors, name=name: {n: t for n, t in tensors.items() if n != name})  # type: ignore[misc]
        message = refusal(copy)
        # Without the blocks of a sole layer the experts read as bfloat16, whose tensor is then the missing one.
        assert name.removesuffix("_blocks").removesuffix(".blocks") in message
        assert "missing" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[:-1].contiguous(), "has shape"),
        (lambda t: t.unsqueeze(0), "has shape"),
        (lambda t: t.to(torch.int32), "is stored as I32"),
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as F8_E4M3"),
    ],
)
def test_tensors_of_the_wrong_kind(broken: Path, change: Callable[[Tensor], Tensor], said: str) -> None:
    edit_tensors(broken, lambda tensors: tensors)
    for name in load_file(broken / "model.safetensors"):
        copy = Path(shutil.copytree(broken, broken.with_name("copy"), dirs_exist_ok=True))
        edit_tensors(copy, lambda tensors, name=name: tensors | {name: change(tensors[name])})  # type: ignore[misc]
        message = refusal(copy)
        assert f"{copy / 'model.safetensors'}: tensor {name} {said}" in message


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.sinks", "block.1.attn.sinks", "vision_tower\nweight"])
def test_tensors_that_do_not_belong(broken: Path, name: str) -> None:
    edit_tensors(broken, lambda tensors: tensors | {name: torch.zeros(3)})
    assert f"tensor {name}".replace("\n", r"\n") in refusal(broken)


def test_a_head_has_no_place_in_the_original_layout(tmp_path: Path) -> None:
    config = small_config()
    save(tmp_path, config, table_in(config, ExpertFormat.MXFP4), Layout.ORIGINAL)
    edit_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["unembedding.weight"].clone()})
    assert "tensor lm_head.weight has no place" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, "has shape"),
        ({"vocab_size": 21}, "has shape"),
        ({"num_hidden_layers": 2, "layer_types": None}, "is missing"),
        ({"intermediate_size": 33}, "divisible by 32"),
        ({"model_type": "llama"}, "gpt-oss models only"),
    ],
)
def test_config_and_tensors_that_do_not_fit(broken: Path, changes: dict[str, Any], said: str) -> None:
    edit_config(broken, **changes)
    assert said in refusal(broken)


@pytest.mark.parametrize("value", ["mxfp4", 5, {"quant_method": "awq"}, {"quant_method": None}, {"bits": 4}])
def test_other_quantisations_are_refused(tmp_path: Path, value: object) -> None:
    config = small_config()
    save(tmp_path, config, table_in(config, ExpertFormat.MXFP4))
    edit_config(tmp_path, quantization_config=value)
    assert f"{tmp_path / 'config.json'}: experts quantised as" in refusal(tmp_path)


def test_there_has_to_be_a_model(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(ModelNotFoundError, match=r"name (a|the) folder"):
            open_checkpoint(folder)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(tmp_path)


def test_a_model_of_another_family(tmp_path: Path) -> None:
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model_type is 'llama', not 'gpt_oss'"):
        open_checkpoint(tmp_path)


def some_file(data: st.DataObject, folder: Path) -> Path:
    return data.draw(st.sampled_from(sorted(folder.iterdir())), label="file")


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_truncated_file_is_refused(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("cut"), dirs_exist_ok=True))
    path = some_file(data, folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole.rstrip()) - 1), label="length")])
    assert path.name in refusal(folder)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_flipped_bytes_are_refused_or_harmless(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("flip"), dirs_exist_ok=True))
    path = some_file(data, folder)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_all(folder)
    except FreeholdError:
        refusal(folder)
