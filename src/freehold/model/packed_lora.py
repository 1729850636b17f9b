"""Adapters for serving on the CPU: packed for the native kernels, which compute with several of them at once.

A token's numbers depend neither on the others of its batch nor on their adapters, to the last bit; tokens without an
adapter keep those of the model as it is. No gradients: training uses the factors as they are (model/lora.py). Who
serves elsewhere does, too. Shape legend: T tokens, O output, E experts, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from freehold.config import ModelConfig
from freehold.errors import UsageError
from freehold.kernels import ops
from freehold.kernels.ops import Norm
from freehold.kernels.packed_lora import LoraParts, PackedExpertLora, PackedLora, PackedLoras
from freehold.model.lora import EXPERT_KINDS, Adapter, AdapterSpec, factor_shapes
from freehold.weights.packed import pack, packed_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedAdapter:
    """`factors` by their targets' names; `experts` by layer, those of them that are inside a mixture."""

    config: ModelConfig
    factors: Mapping[str, PackedLora]
    experts: Mapping[str, PackedExpertLora]


def pack_adapter(adapter: Adapter) -> PackedAdapter:
    """A copy, in float32."""
    factors = {
        name: PackedLora(
            pack(pair.a.detach().float(), "f32"),
            pack(pair.b.detach().float(), "f32", paired=name.endswith(".gate_up")),
            adapter.spec.scaling(name),
        )
        for name, pair in adapter.factors.items()
    }
    layers = dict.fromkeys(name.rpartition(".")[0] for name in factors if name.endswith(EXPERT_KINDS))
    experts = {
        layer: PackedExpertLora(*(factors.get(f"{layer}.{kind}") for kind in ("gate_up", "down"))) for layer in layers
    }
    return PackedAdapter(config=adapter.config, factors=factors, experts=experts)


def packed_adapter_bytes(config: ModelConfig, spec: AdapterSpec) -> int:
    """What such an adapter takes once it is packed."""
    return sum(
        packed_bytes("f32", a) + packed_bytes("f32", b, paired=name.endswith(".gate_up"))
        for name, (a, b) in factor_shapes(config, spec).items()
    )


class PackedTokenAdapters:
    """What a forward pass asks, as model.lora.TokenAdapters has it. `linear` and `qkv` add to the result in place.

    `rows_T[t]` is an index into `adapters`, or -1.
    """

    def __init__(self, adapters: Sequence[PackedAdapter], rows_T: Tensor) -> None:
        if rows_T.ndim != 1 or rows_T.dtype != torch.int64:
            raise UsageError(f"adapter rows are one int64 per token; got {rows_T.dtype} of {tuple(rows_T.shape)}")
        if len(rows_T) and not -1 <= int(rows_T.min()) <= int(rows_T.max()) < len(adapters):
            raise UsageError(f"adapter rows go beyond the {len(adapters)} adapters given; -1 is none")
        self._adapters = adapters
        self._rows_T = rows_T.contiguous()
        self._parts: dict[str, LoraParts | None] = {}
        self._experts: dict[str, PackedLoras | tuple[()]] = {}

    def linear(self, name: str, x_TI: Tensor, out_TO: Tensor, norm: Norm | None = None) -> Tensor:
        if name not in self._parts:
            self._parts[name] = self._found([(name, 0)])
        return self._added(self._parts[name], x_TI, out_TO, norm)

    def qkv(self, layer: str, x_TD: Tensor, out_TO: Tensor, norm: Norm | None = None) -> Tensor:
        if layer not in self._parts:
            config = self._adapters[0].config
            queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            columns = (0, queries, queries + keys)
            self._parts[layer] = self._found([(f"{layer}.{k}", at) for k, at in zip("qkv", columns, strict=True)])
        return self._added(self._parts[layer], x_TD, out_TO, norm)

    def experts(self, layer: str) -> PackedLoras | tuple[()]:
        if layer not in self._experts:
            loras = [adapter.experts.get(layer, _NOTHING) for adapter in self._adapters]
            touched = any(lora is not _NOTHING for lora in loras)
            self._experts[layer] = PackedLoras(loras, self._rows_T) if touched else ()
        return self._experts[layer]

    def _found(self, targets: Sequence[tuple[str, int]]) -> LoraParts | None:
        found = [
            (adapter.factors[name], row, column)
            for row, adapter in enumerate(self._adapters)
            for name, column in targets
            if name in adapter.factors
        ]
        if not found:
            return None
        loras, rows, columns = zip(*found, strict=True)
        return LoraParts(loras, rows, columns, self._rows_T)

    @staticmethod
    def _added(parts: LoraParts | None, x_TI: Tensor, out_TO: Tensor, norm: Norm | None) -> Tensor:
        return out_TO if parts is None else ops.add_lora(out_TO, x_TI, parts, norm=norm)


_NOTHING = PackedExpertLora(None, None)
