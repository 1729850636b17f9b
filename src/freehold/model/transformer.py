"""The gpt-oss transformer, whole, to be read from top to bottom.

Weights are plain tensors, or packed for the CPU kernels, in named places; the forward pass is functions over them, with
the tokens and the cache as arguments and no state of its own. Everything heavy is an op of freehold.kernels.ops, so a
faster kernel changes nothing here. Shape legend: T tokens, D hidden, N query heads, K kv heads, H head dim, E experts,
A active experts, F expert width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.config import SWIGLU_ALPHA, ModelConfig
from freehold.kernels import ops
from freehold.kernels.kv import KvType
from freehold.kernels.ops import Norm, Rotation, Weight
from freehold.log import Progress, no_progress
from freehold.model import rope
from freehold.model.batch import Batch
from freehold.model.kv_cache import KVCache
from freehold.weights.packed import PackedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    weight_OD: Tensor | PackedMatrix
    bias_O: Tensor

    def __call__(self, x_TD: Tensor, *, norm: Norm | None = None, residual_TO: Tensor | None = None) -> Tensor:
        return ops.linear(x_TD, self.weight_OD, self.bias_O, norm=norm, residual_TO=residual_TO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """`qkv` gives all heads at once: N of queries, K of keys, K of values."""

    norm: Norm
    qkv: Linear
    o: Linear
    sinks_N: Tensor
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """`gate_up` is (E, 2F, D) with gate rows even and up rows odd, `down` is (E, D, F)."""

    norm: Norm
    router: Linear
    gate_up: Weight
    gate_up_bias: Tensor
    down: Weight
    down_bias: Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    attention: Attention
    experts: Experts


class Transformer:
    """A model ready to run on one device in one dtype."""

    def __init__(
        self,
        config: ModelConfig,
        table: Mapping[str, Weight],
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_type: KvType | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """The table has canonical names (weights.layouts), or q, k and v joined as `qkv`. Plain dense tensors become
        `dtype` on `device`, without a copy where they are that already. Experts and packed tensors keep the form they
        are stored in. `kv_type` is the KV cache's type; None keeps what the activations have."""
        self.config = config
        self.dtype = dtype
        self.device = device
        self.kv_type: KvType = kv_type or ("f32" if dtype == torch.float32 else "bf16")
        self._frequencies = rope.inverse_frequencies(config.rope, config.head_dim).to(device)

        def dense(name: str) -> Tensor:
            tensor = table[name]
            assert isinstance(tensor, Tensor), f"{name} is packed"
            return tensor.to(device=device, dtype=dtype)

        def matrix(name: str) -> Tensor | PackedMatrix:
            tensor = table[name]
            return tensor if isinstance(tensor, PackedMatrix) else dense(name)

        def experts(name: str) -> Weight:
            tensor = table[name]
            return tensor if isinstance(tensor, PackedMatrix) else tensor.to(device)

        def norm(name: str) -> Norm:
            return Norm(dense(name), config.norm_eps)

        def linear(name: str) -> Linear:
            return Linear(weight_OD=matrix(f"{name}.weight"), bias_O=dense(f"{name}.bias"))

        def joined_qkv(layer: str) -> Linear:
            if f"{layer}.qkv.weight" in table:
                return linear(f"{layer}.qkv")
            weight, bias = (
                torch.cat([dense(f"{layer}.{name}.{part}") for name in "qkv"]) for part in ("weight", "bias")
            )
            return Linear(weight_OD=weight, bias_O=bias)

        def layer(i: int, window: int | None) -> Layer:
            progress("loading layers", i, config.num_layers)
            name = f"layers.{i}"
            return Layer(
                Attention(
                    norm=norm(f"{name}.attn_norm"),
                    qkv=joined_qkv(name),
                    o=linear(f"{name}.o"),
                    sinks_N=dense(f"{name}.sinks"),
                    window=window,
                ),
                Experts(
                    norm=norm(f"{name}.mlp_norm"),
                    router=linear(f"{name}.router"),
                    gate_up=experts(f"{name}.gate_up"),
                    gate_up_bias=dense(f"{name}.gate_up.bias"),
                    down=experts(f"{name}.down"),
                    down_bias=dense(f"{name}.down.bias"),
                ),
            )

        # Only the rows that tokens name are ever read: a large table stays where it is mapped, in its own type.
        stored = table["embedding"]
        assert isinstance(stored, Tensor | PackedMatrix)
        self.embedding_VD = stored if isinstance(stored, PackedMatrix) else stored.to(device)
        self.layers = [layer(i, window) for i, window in enumerate(config.windows)]
        progress("loading layers", config.num_layers, config.num_layers)
        self.final_norm = norm("final_norm")
        self.unembedding_VD = matrix("embedding" if config.tied_embeddings else "unembedding")

    def new_cache(self, max_length: int | None = None) -> KVCache:
        """For one sequence of at most `max_length` tokens; None is the model's context."""
        return KVCache(self.config, type=self.kv_type, device=self.device, max_length=max_length)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """The residual stream's start, (T, D)."""
        if isinstance(self.embedding_VD, PackedMatrix):
            return self.embedding_VD.rows(tokens_T)
        return F.embedding(tokens_T, self.embedding_VD).to(self.dtype)

    def forward(self, tokens_T: Tensor, batch: Batch) -> Tensor:
        """Run a batch's tokens; returns their hidden states (T, D) before the final norm."""
        x_TD = self.embed(tokens_T)
        rotation = self.rotation(batch)
        for index in range(len(self.layers)):
            x_TD = self.layer(x_TD, index, batch, rotation)
        return x_TD

    def rotation(self, batch: Batch) -> Rotation:
        """By which every layer turns the heads of these positions."""
        return Rotation(*rope.tables(self._frequencies, self.config.rope.concentration, batch.positions_T))

    def layer(self, x_TD: Tensor, index: int, batch: Batch, rotation: Rotation) -> Tensor:
        """One layer, (T, D) to (T, D): for who goes through them one by one, as gradient checkpointing does."""
        x_TD = self.attention(x_TD, index, batch, rotation)
        return self._experts(x_TD, index, batch)

    def run(self, tokens_T: Tensor, cache: KVCache) -> Tensor:
        """`forward` for the next T tokens of the cache's sequence."""
        return self.forward(tokens_T, cache.extend(len(tokens_T)))

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        """Logits (T, V) in float32."""
        return ops.linear(hidden_TD, self.unembedding_VD, norm=self.final_norm).float()

    def attention(self, x_TD: Tensor, index: int, batch: Batch, rotation: Rotation) -> Tensor:
        """The first half of a layer, residual included."""
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        weights, adapters, name = self.layers[index].attention, batch.adapters, f"layers.{index}"
        joined_TO = weights.qkv(x_TD, norm=weights.norm)
        if adapters is not None:
            joined_TO = adapters.qkv(name, x_TD, joined_TO, weights.norm)
        q_TNH, k_TKH, v_TKH = torch.split_with_sizes(joined_TO.view(-1, N + 2 * K, H), (N, K, K), 1)
        mixed_TNH = batch.layers[index].attend(
            q_TNH, k_TKH, v_TKH, weights.sinks_N, scale=H**-0.5, window=weights.window, rotation=rotation
        )
        mixed_TO = mixed_TNH.view(-1, N * H)
        out_TD = weights.o(mixed_TO, residual_TO=x_TD)
        return out_TD if adapters is None else adapters.linear(f"{name}.o", mixed_TO, out_TD)

    def _experts(self, x_TD: Tensor, index: int, batch: Batch) -> Tensor:
        weights, adapters, name = self.layers[index].experts, batch.adapters, f"layers.{index}"
        logits_TE = weights.router(x_TD, norm=weights.norm)
        if adapters is not None:
            logits_TE = adapters.linear(f"{name}.router", x_TD, logits_TE, weights.norm)
        routing = ops.route(logits_TE, self.config.num_active_experts)
        if batch.watch is not None:
            batch.watch(index, logits_TE, routing)
        return ops.moe(
            x_TD,
            routing,
            weights.gate_up,
            weights.gate_up_bias,
            weights.down,
            weights.down_bias,
            alpha=SWIGLU_ALPHA,
            limit=self.config.swiglu_limit,
            norm=weights.norm,
            residual_TD=x_TD,
            loras=() if adapters is None else adapters.experts(name),
        )
