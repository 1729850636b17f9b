"""The GGUF that llama.cpp reads: every tensor under the name, shape and bits that the gguf package knows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from freehold.config import DenseFormat, ExpertFormat, ModelConfig, RopeConfig, alternating_windows
from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.log import warn_once
from freehold.weights import gguf_export, mxfp4
from freehold.weights.gguf import GgufFile
from freehold.weights.gguf_export import MetadataValue
from freehold.weights.layouts import TableSource, WeightTable, is_expert_matrix
from freehold.weights.mxfp4 import Mxfp4Tensor
from tests.checkpoints import random_table, small_config

Q8, BF16, F32 = DenseFormat
ODD = {"hidden_size": 96, "expert_width": 160, "num_experts": 3, "num_heads": 9, "num_kv_heads": 3, "head_dim": 32}


def packed(table: WeightTable) -> WeightTable:
    return {
        name: mxfp4.pack(tensor) if is_expert_matrix(name) and isinstance(tensor, Tensor) else tensor
        for name, tensor in table.items()
    }


def write(
    path: Path, config: ModelConfig, table: WeightTable, dense: DenseFormat, experts: ExpertFormat
) -> dict[str, Any]:
    """Export, read back with the gguf package; the tensors by name."""
    source = TableSource(table, origin="the table")
    metadata = gguf_export.architecture(config, name="test", dense=dense, experts=experts)
    tensors = gguf_export.tensors_to_write(config, source, dense=dense, experts=experts)
    with path.open("wb") as file:
        gguf_export.write(file, metadata, tensors)
    assert path.stat().st_size == gguf_export.num_bytes(metadata, tensors)
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def expected_names(config: ModelConfig) -> set[str]:
    """llama.cpp's own list for gpt-oss. It gives most of them a weight, linear layers a bias too."""
    M = MODEL_TENSOR
    biased = {
        M.ATTN_Q, M.ATTN_K, M.ATTN_V, M.ATTN_OUT, M.FFN_GATE_INP, M.FFN_GATE_EXP, M.FFN_UP_EXP, M.FFN_DOWN_EXP,
    }  # fmt: skip
    names = set()
    for tensor in set(MODEL_TENSORS[MODEL_ARCH.GPT_OSS]) - {M.ATTN_QKV}:  # q, k and v in one: an alternative
        for layer in range(config.num_layers):
            stem = TENSOR_NAMES[tensor].format(bid=layer)
            names |= {f"{stem}.weight"} | ({f"{stem}.bias"} if tensor in biased else set())
    return names


def canonical(name: str, table: WeightTable) -> Tensor | Mxfp4Tensor:
    """What a tensor of the file has to hold, spelt out independently of the code under test."""
    if name == "token_embd.weight":
        return table["embedding"]
    if name == "output.weight":
        return table.get("unembedding", table["embedding"])
    if name == "output_norm.weight":
        return table["final_norm"]
    _, layer, part, kind = name.split(".")
    ours = f"layers.{layer}."
    if part in ("ffn_gate_exps", "ffn_up_exps"):
        both = table[ours + ("gate_up" if kind == "weight" else "gate_up.bias")]
        offset = 0 if part == "ffn_gate_exps" else 1
        if isinstance(both, Mxfp4Tensor):
            return Mxfp4Tensor(both.blocks[:, offset::2], both.scales[:, offset::2])
        return both[:, offset::2]
    if part == "ffn_down_exps":
        return table[ours + ("down" if kind == "weight" else "down.bias")]
    plain = {
        "attn_norm": "attn_norm", "post_attention_norm": "mlp_norm", "attn_sinks": "sinks",
    }  # fmt: skip
    if part in plain:
        return table[ours + plain[part]]
    linear = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_gate_inp": "router"}
    return table[f"{ours}{linear[part]}.{kind}"]


@pytest.mark.parametrize("dense", DenseFormat)
@pytest.mark.parametrize("experts", ExpertFormat)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{}, ODD, {"num_layers": 3, "num_experts": 1, "num_active_experts": 1}])
def test_every_tensor_bit_for_bit(
    tmp_path: Path, dense: DenseFormat, experts: ExpertFormat, tied: bool, changes: dict[str, Any]
) -> None:
    config = small_config(**changes, tied_embeddings=tied)
    table = random_table(config, dtype=torch.bfloat16)
    if experts is ExpertFormat.MXFP4:
        table = packed(table)
    stored = write(tmp_path / "model.gguf", config, table, dense, experts)
    assert stored.keys() == expected_names(config)
    for name, tensor in stored.items():
        expected = canonical(name, table)
        assert tuple(tensor.shape[::-1]) == tuple(expected.shape), name
        values = dequantize(tensor.data, tensor.tensor_type)
        if isinstance(expected, Mxfp4Tensor):
            assert tensor.tensor_type == GGMLQuantizationType.MXFP4, name
            assert np.array_equal(values, mxfp4.unpack(expected).numpy()), name
            continue
        small = expected.ndim == 1 or name.endswith((".bias", "ffn_gate_inp.weight"))
        kind = "F32" if small else {Q8: "Q8_0", BF16: "BF16", F32: "F32"}[dense]
        assert tensor.tensor_type.name == kind, name
        expected_f32 = expected.float().numpy()
        if kind == "Q8_0":
            assert np.array_equal(tensor.data, quantize(expected_f32, GGMLQuantizationType.Q8_0)), name
        else:
            assert np.array_equal(values, expected_f32), name


def test_experts_are_expanded_or_packed_on_request(tmp_path: Path) -> None:
    config = small_config()
    plain = random_table(config)
    table = packed(plain)
    expanded = write(tmp_path / "expanded.gguf", config, table, F32, ExpertFormat.BF16)
    repacked = write(tmp_path / "packed.gguf", config, plain, F32, ExpertFormat.MXFP4)
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        expected = canonical(f"blk.1.{name}.weight", table)
        assert isinstance(expected, Mxfp4Tensor)
        for stored in (expanded, repacked):
            tensor = stored[f"blk.1.{name}.weight"]
            assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), mxfp4.unpack(expected).numpy())
    assert expanded["blk.0.ffn_up_exps.weight"].tensor_type.name == "F32"
    assert repacked["blk.0.ffn_up_exps.weight"].tensor_type.name == "MXFP4"


@settings(deadline=None)
@given(
    blocks=arrays.arrays(np.uint8, (3, 2, 16)),
    scales=arrays.arrays(np.uint8, (3, 2), elements=st.integers(0, 252)),  # beyond, float32 overflows
)
def test_any_codes_and_scales_are_repacked(blocks: Any, scales: Any) -> None:
    tensor = Mxfp4Tensor(torch.from_numpy(blocks), torch.from_numpy(scales))
    data = gguf_export.pack_mxfp4(tensor).numpy()
    assert data.shape == (3, 2 * 17)
    assert np.array_equal(dequantize(data, GGMLQuantizationType.MXFP4), mxfp4.unpack(tensor).numpy())


def test_q8_rounds_as_ggml_does() -> None:
    generator = np.random.default_rng(0)
    exponents = generator.integers(-30, 6, (500, 1))
    values = (generator.standard_normal((500, 96)) * 10.0**exponents).astype(np.float32)
    values[::7, :32] = 0
    halves = np.arange(-127, 127.5, 0.5, dtype=np.float32)
    for row, start in enumerate(range(0, len(halves) - 32, 31)):  # scale 1: halves stay halves
        values[row, 32:64] = halves[start : start + 32]
        values[row, 63] = 127
    values[:3, 40] = -0.0, 1e-45, -1e-45
    data = gguf_export.pack_q8(torch.from_numpy(values)).numpy()
    assert np.array_equal(data, quantize(values, GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 9e6])
def test_what_q8_cannot_hold(bad: float) -> None:
    values = torch.ones(1, 64)
    values[0, 40] = bad
    with pytest.raises(UsageError, match="cannot hold"):
        gguf_export.pack_q8(values)


@pytest.mark.parametrize(("name", "experts"), [("layers.1.q.weight", ExpertFormat.BF16), ("layers.1.down", None)])
def test_a_damaged_tensor_is_named(tmp_path: Path, name: str, experts: ExpertFormat | None) -> None:
    config = small_config()
    table = random_table(config)
    tensor = table[name]
    assert isinstance(tensor, Tensor)
    tensor.view(-1)[-1] = torch.nan
    with pytest.raises(CheckpointError, match=rf"the table: {name}.*cannot hold NaN"):
        write(tmp_path / "model.gguf", config, table, Q8, experts or ExpertFormat.MXFP4)


# --- metadata ---------------------------------------------------------------------------------------------------


def metadata(config: ModelConfig, dense: DenseFormat = Q8, experts: ExpertFormat = ExpertFormat.MXFP4) -> Any:
    return gguf_export.architecture(config, name="test", dense=dense, experts=experts)


def test_metadata_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    rope = RopeConfig(theta=10_000.0, factor=4.0, original_context=32, truncate=True)
    config = small_config(rope=rope, norm_eps=1e-6)
    write(tmp_path / "model.gguf", config, packed(random_table(config)), Q8, ExpertFormat.MXFP4)
    read = dict(GgufFile(tmp_path / "model.gguf").metadata)
    described = {key.removeprefix("gpt-oss."): value for key, value in read.items() if key.startswith("gpt-oss.")}
    assert described == {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 32,
        "expert_feed_forward_length": 32,
        "expert_count": 4,
        "expert_used_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.sliding_window": 8,
        "rope.dimension_count": 16,
        "rope.freq_base": 10_000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    assert read["general.architecture"] == "gpt-oss"
    assert read["general.file_type"] == 38


def test_all_kinds_of_metadata_survive(tmp_path: Path) -> None:
    values: dict[str, MetadataValue] = {
        "text": "Grüße, 世界",
        "none": "",
        "yes": True,
        "count": 2**32 - 1,
        "part": 0.5,
        "ids": [-1, 2],
        "words": ["–", ""],
    }
    with (tmp_path / "x.gguf").open("wb") as file:
        gguf_export.write(file, values, [])
    read = GgufFile(tmp_path / "x.gguf").metadata
    assert {key: read[key] for key in values} == values


@pytest.mark.parametrize(
    ("windows", "written"),
    [
        (alternating_windows(4, 16), 16),
        ((None, None, None, None), 128),  # as long as the context: it hides nothing
        ((128, 128, 200, None), 128),
        ((16, 128, 16, 300), 16),
    ],
)
def test_windows_that_llama_cpp_can_have(windows: tuple[int | None, ...], written: int) -> None:
    config = small_config(num_layers=4, windows=windows)
    assert metadata(config)["gpt-oss.attention.sliding_window"] == written


@pytest.mark.parametrize("windows", [(None, 16), (16, 16), (16, None, 8), (16, None, None)])
def test_other_windows_are_refused(windows: tuple[int | None, ...]) -> None:
    with pytest.raises(UnsupportedError, match="one attention window on layers 0, 2"):
        metadata(small_config(num_layers=len(windows), windows=windows))


def test_constants_that_llama_cpp_does_not_read_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"clamps.* at 7, this model at 10000"):
        metadata(small_config(swiglu_limit=1e4))
    rope = RopeConfig(factor=4.0, original_context=32, beta_fast=16.0)
    with pytest.raises(UnsupportedError, match="this model has 16 and 1"):
        metadata(small_config(rope=rope))
    unstretched = RopeConfig(factor=1.0, original_context=128, beta_fast=16.0)  # there no beta matters
    assert metadata(small_config(rope=unstretched))["gpt-oss.rope.scaling.type"] == "none"


def test_the_rounded_range_of_yarn_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for truncate, told in ((True, ""), (False, "llama.cpp rounds the range")):
        warn_once.cache_clear()
        caplog.clear()
        metadata(small_config(rope=RopeConfig(factor=4.0, original_context=32, truncate=truncate)))
        assert told in caplog.text
        assert bool(told) == bool(caplog.text)


def test_rows_that_do_not_fit_a_block_are_refused(tmp_path: Path) -> None:
    config = small_config(hidden_size=48)
    table = random_table(config)
    for dense, experts, words in (
        (BF16, ExpertFormat.MXFP4, r"MXFP4 needs rows of a multiple of 32 .* 48; write its experts as bf16"),
        (Q8, ExpertFormat.BF16, r"Q8_0 needs rows of a multiple of 32 .* 48; write its matrices as bf16 or f32"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            write(tmp_path / "model.gguf", config, table, dense, experts)
    stored = write(tmp_path / "model.gguf", config, table, BF16, ExpertFormat.BF16)
    assert stored.keys() == expected_names(config)


# --- streaming --------------------------------------------------------------------------------------------------


def test_one_piece_at_a_time(tmp_path: Path) -> None:
    """A big embedding is one view of a mapped file: it is not turned into bytes as a whole."""
    config = small_config(vocab_size=200_000)
    table = packed(random_table(config, dtype=torch.bfloat16))
    source = TableSource(table, origin="the table")
    tensors = gguf_export.tensors_to_write(config, source, dense=F32, experts=ExpertFormat.MXFP4)
    for tensor in tensors:
        sizes = [piece.numel() for piece in tensor.produce()]
        assert sum(sizes) == tensor.num_bytes
        if tensor.name.endswith("_exps.weight"):
            assert len(sizes) == config.num_experts
        assert max(sizes) <= 1 << 24
    seen: list[tuple[int, int]] = []
    with (tmp_path / "model.gguf").open("wb") as file:
        gguf_export.write(file, {}, tensors, progress=lambda label, done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(tensor.num_bytes for tensor in tensors)
