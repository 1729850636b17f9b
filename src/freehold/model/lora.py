"""LoRA adapters: what one is, and what it adds to a linear layer and to experts.

An adapter holds two small factors for each weight it targets; the weight acts as W + scaling · B·A, and W itself is
never changed. Targets carry canonical names (weights.layouts) without `.weight`: `layers.N.{q,k,v,o,router}` and, for
every expert of its own, `layers.N.{gate_up,down}`. Everything here is plain torch, differentiable, on any device; it
refuses targets and shapes that the model does not have. `TokenAdapters` is what a forward pass asks, in training (one
adapter for all tokens, dropout) as in serving (an adapter, or none, for each token). Nothing here reads files: see
model/peft_files.py. Shape legend: T tokens, S rows of one expert, I input, O output, R rank, E experts.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from freehold.config import ModelConfig
from freehold.errors import UsageError
from freehold.kernels import low_rank, ops
from freehold.kernels.lora import ExpertLora, Lora
from freehold.kernels.ops import Norm
from freehold.kernels.packed_lora import PackedLoras
from freehold.weights.layouts import canonical_shapes

KINDS = ("q", "k", "v", "o", "router", "gate_up", "down")
EXPERT_KINDS = ("gate_up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How one weight is adapted. `alpha` over the rank (rsLoRA: over its root) is the factor of what is added."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise UsageError(f"a LoRA target needs a rank of at least 1 and a positive alpha; got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Which weights an adapter targets, and how. Names are looked up where a model's sizes are known.

    `rslora` divides alpha by the root of the rank, not the rank (https://arxiv.org/abs/2312.03732).
    """

    targets: Mapping[str, Target]
    rslora: bool = False

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError(f"an adapter needs a target; name one or more of {', '.join(KINDS)}")

    @classmethod
    def of_kinds(
        cls,
        config: ModelConfig,
        kinds: Mapping[str, Target],
        *,
        layers: Sequence[int] | None = None,
        rslora: bool = False,
    ) -> "AdapterSpec":
        """The same targets in the given layers, in all of them if none are given."""
        chosen = range(config.num_layers) if layers is None else layers
        return cls(
            targets={f"layers.{layer}.{kind}": target for layer in chosen for kind, target in kinds.items()},
            rslora=rslora,
        )

    def scaling(self, name: str) -> float:
        target = self.targets[name]
        return target.alpha / (math.sqrt(target.rank) if self.rslora else target.rank)


class Factors(NamedTuple):
    """A is (R, I) and B (O, R); of experts, (E, R, I) and (E, O, R). O of gate_up has gate and up rows interleaved."""

    a: Tensor
    b: Tensor


def weight_name(target: str) -> str:
    """The canonical tensor that a target adapts."""
    return target if target.endswith(EXPERT_KINDS) else f"{target}.weight"


def factor_shapes(config: ModelConfig, spec: AdapterSpec) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of A and B for each target, in the order of the model. Raises UsageError for an unknown target."""
    known = {
        f"layers.{layer}.{kind}": canonical[weight_name(f"layers.{layer}.{kind}")]
        for canonical in [canonical_shapes(config)]
        for layer in range(config.num_layers)
        for kind in KINDS
    }
    unknown = spec.targets.keys() - known.keys()
    if unknown:
        raise UsageError(
            f"{min(unknown)} is nothing an adapter can target; targets are layers.N.KIND with N below "
            f"{config.num_layers} and KIND one of {', '.join(KINDS)}"
        )
    return {
        name: ((*shape[:-2], spec.targets[name].rank, shape[-1]), (*shape[:-1], spec.targets[name].rank))
        for name, shape in known.items()
        if name in spec.targets
    }


def adapter_bytes(config: ModelConfig, spec: AdapterSpec, dtype: torch.dtype) -> int:
    """What the factors of such an adapter take."""
    shapes = [shape for pair in factor_shapes(config, spec).values() for shape in pair]
    return sum(map(math.prod, shapes)) * dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """Trained or trainable factors for a model of these sizes, all of one type and on one device. A `dithered` one was
    trained on weights that had it in them by mxfp4.pack_dithered: that is how it is to be merged. `harmony` is whether
    the chats that it learnt from were written in Harmony or by the model's template; None where nothing says.

    Raises UsageError where factors are missing, surplus or of another shape than spec and model ask for.
    """

    config: ModelConfig
    spec: AdapterSpec
    factors: Mapping[str, Factors]
    dithered: bool = False
    harmony: bool | None = None

    def __post_init__(self) -> None:
        shapes = factor_shapes(self.config, self.spec)
        if self.factors.keys() != shapes.keys():
            name = min(self.factors.keys() ^ shapes.keys())
            where = "has no place in" if name in self.factors else "is missing from"
            raise UsageError(f"{name} {where} this adapter, whose targets are {', '.join(shapes)}")
        for name, expected in shapes.items():
            factors = self.factors[name]
            for letter, factor, shape in zip("AB", factors, expected, strict=True):
                if tuple(factor.shape) != shape:
                    raise UsageError(f"{letter} of {name} has shape {tuple(factor.shape)}; this model needs {shape}")
        if len({(factor.dtype, factor.device) for factors in self.factors.values() for factor in factors}) > 1:
            raise UsageError("an adapter's factors differ in type or device; move all of them to one")

    @property
    def parameters(self) -> list[Tensor]:
        """What training changes, in the order of the model."""
        return [factor for factors in self.factors.values() for factor in factors]

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> "Adapter":
        def moved(factor: Tensor) -> Tensor:
            return factor.to(dtype=dtype or factor.dtype, device=device or factor.device)

        return replace(
            self, factors={name: Factors(moved(pair.a), moved(pair.b)) for name, pair in self.factors.items()}
        )

    def weight_delta(self, name: str, expert: int | None = None) -> Tensor:
        """What a target's canonical weight gains: (O, I), or (E, O, I), of which `expert` asks for one. As large as the
        weight: for merging."""
        a, b = self.factors[name]
        if expert is not None:
            a, b = a[expert], b[expert]
        return torch.matmul(b, a) * self.spec.scaling(name)


def new_adapter(
    config: ModelConfig,
    spec: AdapterSpec,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    dithered: bool = False,
    harmony: bool | None = None,
) -> Adapter:
    """An adapter that changes nothing yet: A uniform in ±1/√I as PEFT draws it, B zero.

    The same seed gives the same numbers on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (a_shape, b_shape) in factor_shapes(config, spec).items():
        bound = 1 / math.sqrt(a_shape[-1])
        a = torch.empty(a_shape).uniform_(-bound, bound, generator=generator)
        factors[name] = Factors(
            a.to(dtype=dtype, device=device).requires_grad_(), torch.zeros(b_shape, dtype=dtype, device=device)
        )
        factors[name].b.requires_grad_()
    return Adapter(config=config, spec=spec, factors=factors, dithered=dithered, harmony=harmony)


def delta(x_SI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scaling: float, dropout: float = 0.0) -> Tensor:
    """What one pair of factors adds to a linear layer's output, (S, O), in the type of `x_SI`.

    It is computed in the factors' type. `dropout` draws from torch's own generator, as gradient checkpointing expects.
    """
    x = x_SI.to(a_RI.dtype)
    if dropout:
        x = F.dropout(x, dropout)
    return (F.linear(F.linear(x, a_RI), b_OR) * scaling).to(x_SI.dtype)


class LayerAdapters(Protocol):
    """What a forward pass asks of its batch's adapters, layer by layer. `x` is what a linear layer read, before its
    norm where there is one; `out` is what came of it, and may be changed."""

    def linear(self, name: str, x_TI: Tensor, out_TO: Tensor, norm: Norm | None = None) -> Tensor: ...

    def qkv(self, layer: str, x_TD: Tensor, out_TO: Tensor, norm: Norm | None = None) -> Tensor:
        """`linear` for the three projections whose rows the model keeps joined: queries, keys, values."""

    def experts(self, layer: str) -> Sequence[ExpertLora] | PackedLoras:
        """What ops.moe takes."""


class TokenAdapters:
    """The adapters of one batch, and which of them each token is computed with.

    `rows_T[t]` is an index into `adapters`, or -1 for the model as it is. `dropout` is for training alone. Every
    method returns the sum, for which it may change `out_TO`; tokens without an adapter keep their numbers to the
    last bit. `folded`: the model's weights have the adapter in them already, so that nothing is added, and the factors
    get the gradients that they would have if it were.
    """

    def __init__(
        self, adapters: Sequence[Adapter], rows_T: Tensor, *, dropout: float = 0.0, folded: bool = False
    ) -> None:
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout {dropout} is not a share; give a number from 0 up to, but not, 1")
        if rows_T.ndim != 1 or rows_T.dtype not in (torch.int32, torch.int64):
            raise UsageError(f"adapter rows are one integer per token; got {rows_T.dtype} of {tuple(rows_T.shape)}")
        # Asked once for the whole forward pass: on a GPU every such question waits for what was queued before it.
        self._used: list[int] = [row for row in torch.unique(rows_T).tolist() if row != -1]
        if self._used and not 0 <= self._used[0] <= self._used[-1] < len(adapters):
            raise UsageError(f"adapter rows {self._used} go beyond the {len(adapters)} adapters given; -1 is none")
        if folded and not torch.is_grad_enabled():
            self._used = []  # nothing is added, and nothing is asked for
        self._adapters = list(adapters)
        self._rows_T = rows_T
        self._uniform = bool(self._used) and bool((rows_T == self._used[0]).all())
        self._tokens = {} if self._uniform else {row: torch.where(rows_T == row)[0] for row in self._used}
        self._dropout = dropout
        self._folded = folded

    def touches(self, *names: str) -> bool:
        """Whether any token's adapter has one of these targets."""
        return any(name in self._adapters[row].factors for row in self._used for name in names)

    def linear(self, name: str, x_TI: Tensor, out_TO: Tensor, norm: Norm | None = None) -> Tensor:
        """`out_TO` with what adapters add to it; `x_TI` is the layer's input, before the norm where there is one."""
        if norm is not None and self.touches(name):
            x_TI = ops.rms_norm(x_TI, norm.weight_D, eps=norm.eps)
        for row in self._used:
            adapter = self._adapters[row]
            if name not in adapter.factors:
                continue
            if self._uniform and not self._dropout and low_rank.suits(x_TI):
                out_TO = low_rank.add(out_TO, x_TI, [self._part(adapter, name, 0)], folded=self._folded)
            elif self._uniform:
                out_TO = out_TO + self._delta(adapter, name, x_TI)
            else:
                tokens = self._tokens[row]
                out_TO = out_TO.index_add(0, tokens, self._delta(adapter, name, x_TI[tokens]))
        return out_TO

    def qkv(self, layer: str, x_TD: Tensor, out_TO: Tensor, norm: Norm | None = None) -> Tensor:
        """`linear` for the three projections whose rows the model keeps joined: queries, keys, values."""
        names = [f"{layer}.{kind}" for kind in "qkv"]
        if not self.touches(*names):
            return out_TO
        if norm is not None:
            x_TD = ops.rms_norm(x_TD, norm.weight_D, eps=norm.eps)
        config = self._adapters[self._used[0]].config
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        if self._uniform and not self._dropout and low_rank.suits(x_TD):
            adapter, columns = self._adapters[self._used[0]], itertools.accumulate(sizes, initial=0)
            own = [(name, column) for name, column in zip(names, columns, strict=False) if name in adapter.factors]
            added = [self._part(adapter, name, column) for name, column in own]
            return low_rank.add(out_TO, x_TD, added, folded=self._folded)
        parts = torch.split_with_sizes(out_TO, sizes, 1)
        return torch.cat([self.linear(name, x_TD, part) for name, part in zip(names, parts, strict=True)], dim=1)

    def experts(self, layer: str) -> list[ExpertLora]:
        """What ops.moe takes: of each adapter that targets this layer's experts, their factors and its tokens."""
        loras = []
        for row in self._used:
            gate_up, down = (self._lora(self._adapters[row], f"{layer}.{kind}") for kind in EXPERT_KINDS)
            if gate_up is not None or down is not None:
                tokens_T = None if self._uniform else self._rows_T == row
                loras.append(ExpertLora(gate_up, down, tokens_T, self._dropout, self._folded))
        return loras

    @staticmethod
    def _lora(adapter: Adapter, name: str) -> Lora | None:
        factors = adapter.factors.get(name)
        return None if factors is None else Lora(*factors, adapter.spec.scaling(name))

    @staticmethod
    def _part(adapter: Adapter, name: str, column: int) -> low_rank.Part:
        return low_rank.Part(*adapter.factors[name], adapter.spec.scaling(name), column)

    def _delta(self, adapter: Adapter, name: str, x_SI: Tensor) -> Tensor:
        a, b = adapter.factors[name]
        scaling = adapter.spec.scaling(name)
        if self._folded:
            share = delta(x_SI.detach(), a, b, scaling=scaling)
            return share - share.detach()
        return delta(x_SI, a, b, scaling=scaling, dropout=self._dropout)
