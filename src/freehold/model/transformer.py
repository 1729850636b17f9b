"""The gpt-oss transformer, whole, to be read from top to bottom.

Weights are plain tensors in named places; the forward pass is functions over them, with the tokens and the cache as
arguments and no state of its own. Everything heavy is an op of freehold.kernels.ops, so a faster kernel changes
nothing here. Shape legend: T tokens, D hidden, N query heads, K kv heads, H head dim, E experts, A active experts,
F expert width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.config import SWIGLU_ALPHA, ModelConfig
from freehold.kernels import ops
from freehold.log import Progress, no_progress
from freehold.model import rope
from freehold.model.kv_cache import FullLayer, KVCache, WindowedLayer
from freehold.weights.layouts import WeightTable
from freehold.weights.mxfp4 import Mxfp4Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    weight_OD: Tensor
    bias_O: Tensor

    def __call__(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD, self.weight_OD, self.bias_O)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    norm_D: Tensor
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    sinks_N: Tensor
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """`gate_up` is (E, 2F, D) with gate rows even and up rows odd, `down` is (E, D, F); packed or plain."""

    norm_D: Tensor
    router: Linear
    gate_up: Mxfp4Tensor | Tensor
    gate_up_bias: Tensor
    down: Mxfp4Tensor | Tensor
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
        table: WeightTable,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> None:
        """Dense tensors become `dtype` on `device`, without a copy where they are that already. Experts keep the
        form they are stored in: packed or bfloat16 experts are never expanded as a whole."""
        self.config = config
        self.dtype = dtype
        self.device = device
        self._frequencies = rope.inverse_frequencies(config.rope, config.head_dim).to(device)

        def dense(name: str) -> Tensor:
            tensor = table[name]
            assert isinstance(tensor, Tensor), f"{name} is packed"
            return tensor.to(device=device, dtype=dtype)

        def linear(name: str) -> Linear:
            return Linear(weight_OD=dense(f"{name}.weight"), bias_O=dense(f"{name}.bias"))

        def layer(i: int, window: int | None) -> Layer:
            progress("loading layers", i, config.num_layers)
            attention = Attention(
                norm_D=dense(f"layers.{i}.attn_norm"),
                q=linear(f"layers.{i}.q"),
                k=linear(f"layers.{i}.k"),
                v=linear(f"layers.{i}.v"),
                o=linear(f"layers.{i}.o"),
                sinks_N=dense(f"layers.{i}.sinks"),
                window=window,
            )
            experts = Experts(
                norm_D=dense(f"layers.{i}.mlp_norm"),
                router=linear(f"layers.{i}.router"),
                gate_up=table[f"layers.{i}.gate_up"].to(device),
                gate_up_bias=dense(f"layers.{i}.gate_up.bias"),
                down=table[f"layers.{i}.down"].to(device),
                down_bias=dense(f"layers.{i}.down.bias"),
            )
            return Layer(attention, experts)

        self.embedding_VD = dense("embedding")
        self.layers = [layer(i, window) for i, window in enumerate(config.windows)]
        progress("loading layers", config.num_layers, config.num_layers)
        self.final_norm_D = dense("final_norm")
        self.unembedding_VD = self.embedding_VD if config.tied_embeddings else dense("unembedding")

    def new_cache(self) -> KVCache:
        return KVCache(self.config, dtype=self.dtype, device=self.device)

    def forward(self, tokens_T: Tensor, cache: KVCache) -> Tensor:
        """Run T more tokens of the cache's sequence; returns their normed hidden states (T, D)."""
        x_TD = F.embedding(tokens_T, self.embedding_VD)
        cos_TH, sin_TH = rope.tables(self._frequencies, self.config.rope.concentration, cache.length, len(tokens_T))
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_TD = x_TD + self._attention(x_TD, layer.attention, cos_TH, sin_TH, layer_cache)
            x_TD = x_TD + self._experts(x_TD, layer.experts)
        cache.length += len(tokens_T)
        return ops.rms_norm(x_TD, self.final_norm_D, eps=self.config.norm_eps)

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        """Logits (T, V) in float32."""
        return ops.linear(hidden_TD, self.unembedding_VD).float()

    def _attention(
        self,
        x_TD: Tensor,
        weights: Attention,
        cos_TH: Tensor,
        sin_TH: Tensor,
        cache: FullLayer | WindowedLayer,
    ) -> Tensor:
        H = self.config.head_dim
        x_TD = ops.rms_norm(x_TD, weights.norm_D, eps=self.config.norm_eps)
        q_TNH = ops.rope(torch.unflatten(weights.q(x_TD), -1, (-1, H)), cos_TH, sin_TH)
        k_TKH = ops.rope(torch.unflatten(weights.k(x_TD), -1, (-1, H)), cos_TH, sin_TH)
        v_TKH = torch.unflatten(weights.v(x_TD), -1, (-1, H))
        seen = cache.append(k_TKH, v_TKH)
        mixed_TNH = ops.attention(q_TNH, seen.keys, seen.values, weights.sinks_N, scale=H**-0.5, window=weights.window)
        return weights.o(mixed_TNH.flatten(-2))

    def _experts(self, x_TD: Tensor, weights: Experts) -> Tensor:
        x_TD = ops.rms_norm(x_TD, weights.norm_D, eps=self.config.norm_eps)
        routing = ops.route(weights.router(x_TD), self.config.num_active_experts)
        return ops.moe(
            x_TD,
            routing,
            weights.gate_up,
            weights.gate_up_bias,
            weights.down,
            weights.down_bias,
            alpha=SWIGLU_ALPHA,
            limit=self.config.swiglu_limit,
        )
