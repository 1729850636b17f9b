"""A Llama re-expressed as gpt-oss computes what transformers' Llama computes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from torch import Tensor

from freehold.errors import CheckpointError, UnsupportedError
from freehold.model.transformer import Transformer
from freehold.weights.gguf import GgufFile
from freehold.weights.layouts import WeightTable
from freehold.weights.llama import balance_columns, config_of, re_express, within_limit
from tests.checkpoints import CPU, logits, oracle_logits, tokens_of


def llama(**changes: Any) -> Any:
    """A random Llama of transformers, with logits of order 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 80,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**fields | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            else:
                is_input_only = "embed" in name and not model.config.tie_word_embeddings
                weight.copy_(torch.randn_like(weight) * (1 if is_input_only else weight.shape[1] ** -0.5))
    return model


def permuted(weight: Tensor, num_heads: int) -> Tensor:
    """As llama.cpp's converter stores q and k: the two halves of each head interleaved."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, changes: dict[str, Any] | None = None, leave_out: str = "") -> Path:
    config = model.config
    changes = changes or {}
    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    values: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.context_length": config.max_position_embeddings,
    }
    for key, value in (values | changes).items():
        if key != leave_out:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(config.vocab_size)])
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    weights = dict(model.named_parameters())
    tensors = {"token_embd": weights["model.embed_tokens.weight"], "output_norm": weights["model.norm.weight"]}
    if not config.tie_word_embeddings:
        tensors["output"] = weights["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{i}.{theirs}.weight"]
            if ours == "attn_q":
                weight = permuted(weight, config.num_attention_heads)
            elif ours == "attn_k":
                weight = permuted(weight, config.num_key_value_heads)
            tensors[f"blk.{i}.{ours}"] = weight
    for name, tensor in tensors.items():
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(
    ("changes", "num_experts"),
    [
        ({}, 4),
        ({"tie_word_embeddings": True}, 1),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, 8),
        ({"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-6}, 2),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "num_hidden_layers": 3}, 4),
    ],
)
def test_logits_are_those_of_the_llama(
    tmp_path: Path, changes: dict[str, Any], num_experts: int, balanced: bool
) -> None:
    theirs = llama(**changes)
    gguf = GgufFile(write_gguf(tmp_path / "model.gguf", theirs))
    config = config_of(gguf, num_experts=num_experts)
    assert (config.num_experts, config.num_active_experts) == (num_experts, num_experts)
    assert config.tied_embeddings == theirs.config.tie_word_embeddings
    assert config.norm_eps == theirs.config.rms_norm_eps
    table = re_express(gguf, config)
    if balanced:
        table = balance_columns(table, config)
    tokens = tokens_of(config, 70)
    expected = oracle_logits(theirs, tokens)
    assert 0.5 < expected.std() < 2
    ours = logits(Transformer(config, table, dtype=torch.float32, device=CPU), tokens)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_balancing_evens_out_the_columns_and_leaves_the_original_alone(tmp_path: Path) -> None:
    theirs = llama()
    with torch.no_grad():
        theirs.model.layers[0].mlp.gate_proj.weight[:, 7] *= 50
        theirs.model.layers[0].mlp.up_proj.weight[:, 7] *= 50
    gguf = GgufFile(write_gguf(tmp_path / "model.gguf", theirs))
    config = config_of(gguf, num_experts=2)
    table = re_express(gguf, config)

    def spread(gate_up: Any) -> float:
        sizes = gate_up.square().mean(dim=(0, 1)).sqrt()
        return float(sizes.max() / sizes.min())

    before = spread(table["layers.0.gate_up"])
    after = spread(balance_columns(table, config)["layers.0.gate_up"])
    assert after < before / 5
    assert spread(table["layers.0.gate_up"]) == before


@pytest.mark.parametrize("num_experts", [1, 4])
def test_within_a_limit_no_up_value_is_cut(tmp_path: Path, num_experts: int) -> None:
    theirs = llama(intermediate_size=160)
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.mlp.up_proj.weight *= 40
            layer.mlp.down_proj.weight /= 40
    gguf = GgufFile(write_gguf(tmp_path / "model.gguf", theirs))
    config = config_of(gguf, num_experts=num_experts)
    limited = dataclasses.replace(config, swiglu_limit=7.0)
    table, tokens = re_express(gguf, config), tokens_of(config, 70)
    expected = oracle_logits(theirs, tokens)

    def off_by(table: WeightTable) -> float:
        ours = logits(Transformer(limited, table, dtype=torch.float32, device=CPU), tokens)
        return float((ours - expected).abs().max())

    assert off_by(table) > 0.1
    fitted = within_limit(table, limited)
    assert off_by(fitted) < 5e-4
    gate_up, was_gate_up = fitted["layers.0.gate_up"], table["layers.0.gate_up"]
    assert isinstance(gate_up, Tensor) and isinstance(was_gate_up, Tensor)
    powers = (was_gate_up / gate_up)[:, 1::2].mean(-1)  # one for each block of 32 columns of `down`
    assert torch.equal(powers, powers.log2().round().exp2())
    for block in powers.split(32, dim=-1):
        assert torch.equal(block, block[:, :1].expand_as(block))
    assert torch.equal(gate_up[:, 0::2], was_gate_up[:, 0::2])
    unlimited = within_limit(table, config)
    assert all(torch.equal(unlimited[name], table[name]) for name in table)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metadata", "num_experts", "said"),
    [
        ({"architecture": "qwen2"}, 4, "'qwen2' cannot be re-expressed"),
        ({"llama.rope.scaling.type": "linear"}, 4, "RoPE is scaled"),
        ({}, 5, "width 64 cannot be cut into 5"),
    ],
)
def test_what_cannot_be_re_expressed(tmp_path: Path, metadata: dict[str, Any], num_experts: int, said: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama(), metadata)
    with pytest.raises(UnsupportedError, match=said) as caught:
        config_of(GgufFile(path), num_experts=num_experts)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("missing", ["llama.block_count", "blk.1.ffn_up", "output_norm"])
def test_an_incomplete_file(tmp_path: Path, missing: str) -> None:
    gguf = GgufFile(write_gguf(tmp_path / "model.gguf", llama(), leave_out=missing))
    with pytest.raises(CheckpointError, match=missing):
        re_express(gguf, config_of(gguf, num_experts=4))


def test_tensors_that_contradict_the_metadata(tmp_path: Path) -> None:
    gguf = GgufFile(write_gguf(tmp_path / "model.gguf", llama(), {"llama.feed_forward_length": 128}))
    with pytest.raises(CheckpointError, match="do not have the sizes"):
        re_express(gguf, config_of(gguf, num_experts=4))
