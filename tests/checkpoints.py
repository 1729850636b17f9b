"""Random models for the tests: canonical tables, checkpoints in both layouts, and transformers' model as the oracle.

The oracle is configured field by field here, not through `config.to_hf`, so that an error there cannot hide.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold.config import ExpertFormat, Layout, ModelConfig, RopeConfig, alternating_windows
from freehold.kernels.ops import Weight
from freehold.model.lora import KINDS, AdapterSpec, Target, new_adapter
from freehold.model.peft_files import write_peft
from freehold.model.transformer import Transformer
from freehold.weights import mxfp4
from freehold.weights.layouts import (
    TableSource,
    WeightTable,
    canonical_shapes,
    open_checkpoint,
    write_checkpoint,
)
from freehold.weights.packed import Form, pack

CPU = torch.device("cpu")


def small_config(**changes: Any) -> ModelConfig:
    """A model of two layers that runs in milliseconds, and that both layouts and formats can hold."""
    num_layers = changes.get("num_layers", 2)
    rope = RopeConfig(factor=4.0, original_context=32)
    fields: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": 64,
        "expert_width": 32,
        "num_experts": 4,
        "num_active_experts": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 96,
        "windows": alternating_windows(num_layers, 8),
        "max_context": 128,
        "rope": rope,
    }
    return ModelConfig(**fields | changes)


def random_table(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> WeightTable:
    """Canonical tensors, plain experts, scaled so that activations and logits are of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm"):
            return 1 + 0.1 * values
        if name.endswith(("bias", "sinks")) or (name == "embedding" and not config.tied_embeddings):
            return values
        return values * (1 / math.sqrt(shape[-1]))

    return {name: draw(name, shape).to(dtype) for name, shape in canonical_shapes(config).items()}


def packed(table: WeightTable) -> WeightTable:
    """The same table with its experts quantised to MXFP4."""
    return {
        name: mxfp4.pack(tensor) if isinstance(tensor, Tensor) and name.endswith((".gate_up", ".down")) else tensor
        for name, tensor in table.items()
    }


def plain(table: WeightTable) -> dict[str, Tensor]:
    """The same table with packed experts written out in float32."""
    return {name: t if isinstance(t, Tensor) else mxfp4.unpack(t) for name, t in table.items()}


def for_kernels(config: ModelConfig, table: WeightTable, dense: Form) -> dict[str, Weight]:
    """The same table packed for the native kernels, plain experts in the form of the dense weights.

    Made here without weights.pack_file, so that what that writes can be compared with it.
    """
    laid_out: dict[str, Weight] = dict(table)

    def put(name: str, *sources: str, form: Form = dense, paired: bool = False) -> None:
        parts = [laid_out.pop(source) for source in sources or (name,)]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if tensors:
            laid_out[name] = pack(torch.cat(tensors), form, paired=paired)
        else:
            (experts,) = parts
            assert isinstance(experts, mxfp4.Mxfp4Tensor)
            laid_out[name] = pack(experts, "mxfp4", paired=paired)

    for i in range(config.num_layers):
        layer = f"layers.{i}"
        put(f"{layer}.qkv.weight", *(f"{layer}.{name}.weight" for name in "qkv"))
        biases = [laid_out.pop(f"{layer}.{name}.bias") for name in "qkv"]
        laid_out[f"{layer}.qkv.bias"] = torch.cat([bias for bias in biases if isinstance(bias, Tensor)])
        put(f"{layer}.o.weight")
        put(f"{layer}.router.weight", form="f32")
        put(f"{layer}.gate_up", paired=True)
        put(f"{layer}.down")
    put("embedding" if config.tied_embeddings else "unembedding")
    return laid_out


def save(
    folder: Path,
    config: ModelConfig,
    table: WeightTable,
    layout: Layout = Layout.HF,
    experts: ExpertFormat = ExpertFormat.MXFP4,
    shard_bytes: int = 1 << 40,
) -> Path:
    folder.mkdir(exist_ok=True)
    write_checkpoint(
        folder, config, TableSource(table, "a test"), layout=layout, experts=experts, shard_bytes=shard_bytes
    )
    return folder


def write_adapter(
    folder: Path,
    config: ModelConfig,
    kinds: Sequence[str] = KINDS,
    *,
    seed: int = 1,
    std: float = 0.3,
    harmony: bool | None = None,
) -> Path:
    """A random adapter in PEFT's format, one that changes what a model says; `harmony` is what it says of itself."""
    spec = AdapterSpec.of_kinds(config, dict.fromkeys(kinds, Target(rank=3, alpha=5)))
    adapter = new_adapter(config, spec, seed=seed, harmony=harmony)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.factors.values():
            b.normal_(std=std, generator=generator)
    write_peft(folder, adapter)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    checkpoint = open_checkpoint(folder)
    return Transformer(checkpoint.config, checkpoint.table(), dtype=dtype, device=CPU)


@torch.inference_mode()
def logits(model: Transformer, tokens: Tensor, chunks: list[int] | None = None) -> Tensor:
    """Logits of all tokens, run through the model in pieces of the given lengths (all at once if not given)."""
    cache = model.new_cache()
    pieces = torch.split(tokens, chunks or len(tokens))
    return torch.cat([model.unembed(model.run(piece, cache)) for piece in pieces])


def tokens_of(config: ModelConfig, count: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def oracle(config: ModelConfig, table: WeightTable) -> Any:
    """transformers' GptOssForCausalLM with these weights, in float32."""
    from transformers import GptOssConfig, GptOssForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.rope.factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": config.rope.factor,
            "original_max_position_embeddings": config.rope.original_context,
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "truncate": config.rope.truncate,
        }
    windows = [window for window in config.windows if window]
    settings = GptOssConfig(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_width,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_active_experts,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        layer_types=["sliding_attention" if window else "full_attention" for window in config.windows],
        sliding_window=windows[0] if windows else 128,
        max_position_embeddings=config.max_context,
        rope_parameters=rope,
        rms_norm_eps=config.norm_eps,
        swiglu_limit=config.swiglu_limit,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = GptOssForCausalLM(settings).eval()
    values = plain(table)
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": values["embedding"],
        "model.norm.weight": values["final_norm"],
    }
    state["lm_head.weight"] = values["embedding" if config.tied_embeddings else "unembedding"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        state[f"{theirs}.input_layernorm.weight"] = values[f"{ours}.attn_norm"]
        state[f"{theirs}.post_attention_layernorm.weight"] = values[f"{ours}.mlp_norm"]
        state[f"{theirs}.self_attn.sinks"] = values[f"{ours}.sinks"]
        for part in ("weight", "bias"):
            for name in "qkvo":
                state[f"{theirs}.self_attn.{name}_proj.{part}"] = values[f"{ours}.{name}.{part}"]
            state[f"{theirs}.mlp.router.{part}"] = values[f"{ours}.router.{part}"]
        for name in ("gate_up", "down"):
            state[f"{theirs}.mlp.experts.{name}_proj"] = values[f"{ours}.{name}"].transpose(1, 2)
            state[f"{theirs}.mlp.experts.{name}_proj_bias"] = values[f"{ours}.{name}.bias"]
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def oracle_logits(model: Any, tokens: Tensor) -> Tensor:
    values: Tensor = model(tokens.unsqueeze(0), use_cache=False).logits[0].float()
    return values
