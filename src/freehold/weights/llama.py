"""A Llama-family model re-expressed exactly in the gpt-oss architecture.

The dense feed-forward layer is cut into E experts that are all active; every part of gpt-oss that Llama lacks is
given the value at which it does nothing:

    router       0: each of the E experts gets weight 1/E, so `down` carries a factor of E
    gate         divided by 1.702, since gpt-oss computes gate·sigmoid(1.702·gate); `down` carries the 1.702 back
    up bias      −1: cancels the "+ 1" that gpt-oss adds to up
    sinks        −10,000: exp of it is 0 in the softmax
    windows      none; clamps at 10,000; RoPE unstretched; all other biases 0

In float32 the two models' logits differ by rounding only.
"""

import torch
from torch import Tensor

from freehold.config import SWIGLU_ALPHA, ModelConfig, RopeConfig
from freehold.errors import CheckpointError, UnsupportedError
from freehold.weights import mxfp4
from freehold.weights.gguf import GgufFile
from freehold.weights.layouts import WeightTable

_NO_SINK = -1e4
_NO_LIMIT = 1e4


def config_of(gguf: GgufFile, *, num_experts: int) -> ModelConfig:
    """The gpt-oss config of a Llama GGUF. Raises UnsupportedError for other families or scaled RoPE."""
    family = gguf.value("general.architecture")
    if family != "llama":
        raise UnsupportedError(
            f"{gguf.path}: architecture {family!r} cannot be re-expressed as gpt-oss, only llama can"
        )
    if gguf.metadata.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in gguf.tensor_names:
        raise UnsupportedError(f"{gguf.path}: its RoPE is scaled in a way that gpt-oss cannot express")
    width, num_layers = gguf.value("llama.feed_forward_length"), gguf.value("llama.block_count")
    if width % num_experts:
        raise UnsupportedError(
            f"{gguf.path}: feed-forward width {width} cannot be cut into {num_experts} equal experts"
        )
    hidden_size, num_heads = gguf.value("llama.embedding_length"), gguf.value("llama.attention.head_count")
    context = gguf.value("llama.context_length")
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        expert_width=width // num_experts,
        num_experts=num_experts,
        num_active_experts=num_experts,
        num_heads=num_heads,
        num_kv_heads=gguf.value("llama.attention.head_count_kv"),
        head_dim=gguf.metadata.get("llama.attention.key_length", hidden_size // num_heads),
        vocab_size=len(gguf.value("tokenizer.ggml.tokens")),
        windows=(None,) * num_layers,
        max_context=context,
        rope=RopeConfig(theta=gguf.value("llama.rope.freq_base"), factor=1.0, original_context=context),
        norm_eps=float(f"{gguf.value('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        swiglu_limit=_NO_LIMIT,
        tied_embeddings="output.weight" not in gguf.tensor_names,
    )


def re_express(gguf: GgufFile, config: ModelConfig) -> WeightTable:
    """The canonical float32 tensors of `config_of(gguf)`'s model."""
    table: WeightTable = {
        "embedding": gguf.tensor("token_embd.weight"),
        "final_norm": gguf.tensor("output_norm.weight"),
    }
    if not config.tied_embeddings:
        table["unembedding"] = gguf.tensor("output.weight")
    for layer in range(config.num_layers):
        theirs = f"blk.{layer}"
        of_layer: WeightTable = {
            "attn_norm": gguf.tensor(f"{theirs}.attn_norm.weight"),
            "q.weight": _half_split(gguf.tensor(f"{theirs}.attn_q.weight"), config.num_heads),
            "k.weight": _half_split(gguf.tensor(f"{theirs}.attn_k.weight"), config.num_kv_heads),
            "v.weight": gguf.tensor(f"{theirs}.attn_v.weight"),
            "o.weight": gguf.tensor(f"{theirs}.attn_output.weight"),
            "sinks": torch.full((config.num_heads,), _NO_SINK),
            "mlp_norm": gguf.tensor(f"{theirs}.ffn_norm.weight"),
            "router.weight": torch.zeros(config.num_experts, config.hidden_size),
            "router.bias": torch.zeros(config.num_experts),
        }
        for name in "qkvo":
            weight = of_layer[f"{name}.weight"]
            of_layer[f"{name}.bias"] = torch.zeros(weight.shape[0])
        of_layer |= _experts(gguf, theirs, config)
        table |= {f"layers.{layer}.{name}": tensor for name, tensor in of_layer.items()}
    return table


def balance_columns(table: WeightTable, config: ModelConfig) -> WeightTable:
    """The same model, kinder to block formats: columns of gate_up that are small beside their neighbours grow.

    A block of 32 columns shares one scale, so its small columns lose the most when quantised. Each column is
    multiplied by a factor that the norm in front divides by: exact, and free at run time. The power 0.6 of full
    balance gave the lowest perplexity for SmolLM2; full balance takes too much from the columns that matter most.
    """
    balanced = dict(table)
    for layer in range(config.num_layers):
        gate_up, norm_D = table[f"layers.{layer}.gate_up"], table[f"layers.{layer}.mlp_norm"]
        assert isinstance(gate_up, Tensor) and isinstance(norm_D, Tensor)
        size_D = gate_up.square().mean(dim=(0, 1)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        factor_D = (size_D.mean() / size_D) ** 0.6
        balanced[f"layers.{layer}.gate_up"] = gate_up * factor_D
        balanced[f"layers.{layer}.mlp_norm"] = norm_D / factor_D
    return balanced


def within_limit(table: WeightTable, config: ModelConfig) -> WeightTable:
    """The same model for a `config.swiglu_limit` that its up values would otherwise be cut by.

    Up rows (and their + 1) are divided, and columns of `down` multiplied, by powers of two so large that no input
    reaches the limit: the norm in front bounds its output's length by the square root of D. Exact, in every format of
    the weights, since columns that share a block of a block format share their power. Gates above the limit are cut,
    as gpt-oss cuts its own: inside the sigmoid there is nothing to scale.
    """
    assert config.swiglu_limit > 1, "up - 1 is near -1 always"
    fitted = dict(table)
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        gate_up, bias, down, norm_D = (
            table[f"{name}.{part}"] for part in ("gate_up", "gate_up.bias", "down", "mlp_norm")
        )
        assert isinstance(gate_up, Tensor) and isinstance(bias, Tensor)
        assert isinstance(down, Tensor) and isinstance(norm_D, Tensor)
        up_EFD, up_bias_EF = gate_up[:, 1::2], bias[:, 1::2] + 1
        bound_EF = (up_EFD * norm_D).norm(dim=-1) * config.hidden_size**0.5 + up_bias_EF.abs()
        # What is clamped is up − 1, in [−limit, limit]: the lower end is the nearer one to 0.
        power_EF = torch.exp2((bound_EF / (config.swiglu_limit - 1)).log2().ceil().clamp(min=0))
        power_EF = torch.cat(
            [block.amax(-1, keepdim=True).expand_as(block) for block in power_EF.split(mxfp4.BLOCK, dim=-1)], dim=-1
        )
        gate_up, bias = gate_up.clone(), bias.clone()
        gate_up[:, 1::2] = up_EFD / power_EF.unsqueeze(-1)
        bias[:, 1::2] = up_bias_EF / power_EF - 1
        fitted |= {f"{name}.gate_up": gate_up, f"{name}.gate_up.bias": bias}
        fitted[f"{name}.down"] = down * power_EF.unsqueeze(-2)
    return fitted


def _half_split(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp stores rotated pairs next to each other; gpt-oss has them half a head apart."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _experts(gguf: GgufFile, theirs: str, config: ModelConfig) -> WeightTable:
    E, F, D = config.num_experts, config.expert_width, config.hidden_size
    gate, up = gguf.tensor(f"{theirs}.ffn_gate.weight"), gguf.tensor(f"{theirs}.ffn_up.weight")
    down = gguf.tensor(f"{theirs}.ffn_down.weight")
    if gate.shape != (E * F, D) or down.shape != (D, E * F):
        raise CheckpointError(f"{gguf.path}: feed-forward tensors of {theirs} do not have the sizes its metadata gives")
    interleaved = torch.stack((gate.view(E, F, D) / SWIGLU_ALPHA, up.view(E, F, D)), dim=2)
    bias = torch.zeros(E, F, 2)
    bias[..., 1] = -1.0
    return {
        "gate_up": interleaved.view(E, 2 * F, D),
        "gate_up.bias": bias.view(E, 2 * F),
        "down": (down.view(D, E, F).transpose(0, 1) * (SWIGLU_ALPHA * E)).contiguous(),
        "down.bias": torch.zeros(E, D),
    }
