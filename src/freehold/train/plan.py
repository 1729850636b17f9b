"""The memory contract of training: what a run will take, computed from shapes before anything is allocated.

Weights are those of inference. To them come the factors, their gradients and what the optimizer keeps of each; and what
a row of tokens leaves behind for its backward pass: of every layer, or, where activations are computed twice, of one
layer and the residual stream between them. What is kept is counted op by op: kernels/autograd.py, kernels/native_moe.py
and kernels/low_rank.py, or what torch's own autograd keeps of the reference. Called by run.py.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from freehold import machine
from freehold.config import ExpertFormat, ModelConfig
from freehold.engine.options import EngineOptions
from freehold.errors import OutOfMemoryError
from freehold.kernels import backends
from freehold.kernels.kv import PAGE, KvType, num_pages
from freehold.model.lora import EXPERT_KINDS, AdapterSpec, factor_shapes, weight_name
from freehold.session.memory import free_memory, gib, plan_memory
from freehold.session.policy import Policy
from freehold.weights.layouts import canonical_shapes
from freehold.weights.packed import PANEL, packed_bytes, packed_shapes

_QUERIES_AT_ONCE = 256  # rows of attention whose scores are there together
_LOGITS_AT_ONCE = 3 * 4 << 24  # bytes: pieces of logits, what becomes of them, and their gradient
_TRAINER = 192 << 20  # what torch's optimizers and matplotlib read of themselves
_KEPT_BY_MALLOC = 1.0  # of activations that were let go, in pieces that the next ones do not fit
_RETURNED_BY_MALLOC = 32 << 20  # pieces of this size go back to the system, whatever came before
_KEPT_TWICE = 0.6  # of all that layers would keep: what malloc does of it where that is computed twice
_MOST_KEPT_TWICE = 768 << 20  # where large pieces go back to the system at once (machine.return_large_memory)
_KV_WIDTHS: dict[KvType, float] = {"f32": 4, "bf16": 2, "q8": 1 + 2 / 32}
_SCORES = 4  # such arrays of scores: they, their softmax, the gradients of both


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """The most tokens of a row, and of an example in it; and the most that a row has with every example filled up to
    whole pages, None where that is one example's."""

    tokens: int
    example: int
    paged: int | None = None

    @property
    def page_tokens(self) -> int:
        return num_pages(self.tokens) * PAGE if self.paged is None else self.paged


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Bytes. `program` is what the process has resident before the model comes."""

    weights: int
    factors: int
    gradients: int
    optimizer: int
    activations: int
    scratch: int
    program: int
    checkpointing: bool
    merged: int = 0
    is_full: bool = False

    @property
    def needed(self) -> int:
        """What has to be free now."""
        return (
            self.weights
            + self.factors
            + self.gradients
            + self.optimizer
            + self.activations
            + self.scratch
            + self.merged
        )

    @property
    def total(self) -> int:
        """What will be resident at most, in all."""
        return self.needed + self.program

    def describe(self) -> str:
        merged = f"{gib(self.merged)} merged weights + " if self.merged else ""
        twice = ", computed twice" if self.checkpointing else ""
        learns = "masters" if self.is_full else "factors"
        return (
            f"{gib(self.weights)} weights + {merged}{gib(self.factors)} {learns} + {gib(self.gradients)} gradients + "
            f"{gib(self.optimizer)} optimizer + {gib(self.activations)} activations{twice} + "
            f"{gib(self.scratch)} scratch = {gib(self.needed)}"
        )


def plan_lora(
    config: ModelConfig,
    experts: ExpertFormat,
    policy: Policy,
    spec: AdapterSpec,
    row: RowShape,
    *,
    dropout: bool = False,
    qat: bool = False,
    compared: bool = False,
    checkpointing: bool = False,
) -> TrainingPlan:
    """What a step of LoRA needs with rows of this shape. One that is `compared` with what it began with (DPO) keeps a
    copy of that. Peak resident memory stays below."""
    run = plan_memory(config, experts, policy, EngineOptions(context=row.tokens, max_num_seqs=1, chunk=row.tokens))
    shapes = factor_shapes(config, spec)
    per_target = {name: 4 * (math.prod(a) + math.prod(b)) for name, (a, b) in shapes.items()}
    factors = sum(per_target.values())
    # An expert op's gradients are put together before they are added to those of the rows before.
    of_layer = max(
        (
            sum(
                of
                for name, of in per_target.items()
                if name.startswith(f"layers.{layer}.") and name.endswith(EXPERT_KINDS)
            )
        )
        for layer in range(config.num_layers)
    )
    width = policy.dtype.itemsize
    layer = (_kept_of_native_layer if policy.native else _kept_of_layer)(config, spec, policy, row, dropout)
    stream = row.tokens * config.hidden_size * width
    everything = config.num_layers * layer
    if checkpointing:
        kept = config.num_layers * stream + layer + min(round(_KEPT_TWICE * everything), _MOST_KEPT_TWICE)
    else:
        sums = row.tokens * _sums_per_token(config) if policy.native else 0
        returned = config.num_layers * sums if sums >= _RETURNED_BY_MALLOC else 0
        kept = everything + round(_KEPT_BY_MALLOC * (everything - returned))
    return TrainingPlan(
        weights=run.dense + run.experts + (factors if compared else 0),
        factors=factors,
        gradients=factors + of_layer,
        optimizer=2 * factors,
        activations=kept + 2 * stream,
        scratch=run.scratch
        + _expert_scratch(config, row, width)
        + (_dropout_scratch(config, row) if dropout else 0)
        + (_native_attention_scratch(config, row) if policy.native else _attention_scratch(config, row))
        + min(_LOGITS_AT_ONCE, 3 * 4 * row.tokens * config.vocab_size)
        + _TRAINER,
        program=machine.process_status().get("VmRSS", 0),
        checkpointing=checkpointing,
        merged=_merged_bytes(config, experts, policy, spec) if qat else 0,
    )


def fitting_lora_plan(
    config: ModelConfig,
    experts: ExpertFormat,
    policy: Policy,
    spec: AdapterSpec,
    row: RowShape,
    *,
    dropout: bool,
    qat: bool,
    compared: bool = False,
    checkpointing: str,
) -> TrainingPlan:
    """The plan that fits: activations are kept if they can be, where `checkpointing` is auto.

    Raises OutOfMemoryError, with the numbers and a remedy.
    """
    free = free_memory(policy)
    twice = checkpointing == "on"
    planned = partial(plan_lora, config, experts, policy, spec, row, dropout=dropout, qat=qat, compared=compared)
    plan = planned(checkpointing=twice)
    if plan.needed > free and checkpointing == "auto":
        plan = planned(checkpointing=True)
    if plan.needed <= free:
        return plan
    raise OutOfMemoryError(f"{plan.describe()} are needed, and {gib(free)} are free; {_remedy(plan, row, policy)}")


def plan_full(
    config: ModelConfig,
    experts: ExpertFormat,
    policy: Policy,
    names: Collection[str],
    row: RowShape,
    *,
    checkpointing: bool = False,
) -> TrainingPlan:
    """What a step of full fine-tuning needs: of each parameter that learns a master, a gradient, what the optimizer
    keeps of it, and the rounded number; what the model is made from stays mapped."""
    shapes = canonical_shapes(config)
    masters = sum(4 * math.prod(shapes[name]) for name in names)
    of_mxfp4 = config.num_expert_weights * 17 // 32
    mapped = 2 * (config.num_parameters - config.num_expert_weights)
    mapped += of_mxfp4 if experts is ExpertFormat.MXFP4 else 2 * config.num_expert_weights
    layer_weights = max(
        sum(math.prod(shapes[name]) for name in names if name.startswith(f"layers.{i}."))
        for i in range(config.num_layers)
    )
    width = policy.dtype.itemsize
    layer = row.tokens * _kept_of_plain_layer(config, width)
    stream = row.tokens * config.hidden_size * width
    kept = config.num_layers * stream + layer if checkpointing else config.num_layers * layer
    joined = 4 * config.num_layers * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    logits = _LOGITS_AT_ONCE + 2 * 4 * config.vocab_size * config.hidden_size
    return TrainingPlan(
        weights=masters + joined + mapped,
        factors=masters,
        gradients=masters + 2 * 4 * layer_weights,
        optimizer=2 * masters,
        activations=kept + 2 * stream,
        scratch=_expert_scratch(config, row, width) + _attention_scratch(config, row) + logits,
        program=machine.process_status().get("VmRSS", 0),
        checkpointing=checkpointing,
        is_full=True,
    )


def fitting_full_plan(
    config: ModelConfig,
    experts: ExpertFormat,
    policy: Policy,
    names: Collection[str],
    row: RowShape,
    *,
    checkpointing: str,
) -> TrainingPlan:
    """The plan that fits, as in fitting_lora_plan. Raises OutOfMemoryError, which says what LoRA would take."""
    free = free_memory(policy)
    plan = plan_full(config, experts, policy, names, row, checkpointing=checkpointing == "on")
    if plan.needed > free and checkpointing == "auto":
        plan = plan_full(config, experts, policy, names, row, checkpointing=True)
    if plan.needed <= free:
        return plan
    raise OutOfMemoryError(
        f"{plan.describe()} are needed, and {gib(free)} are free; full fine-tuning takes 20 bytes for each parameter "
        "that learns: tune an adapter instead (--method lora, and --qat), which learns against the packed weights, or "
        "--train less"
    )


def _kept_of_plain_layer(config: ModelConfig, width: int) -> int:
    """Bytes that a layer keeps for each token where plain torch computes it: of each active expert its input, its
    hidden values with all that they are made of, and its output."""
    D, F, A = config.hidden_size, config.expert_width, config.num_active_experts
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return width * (16 * D + 4 * heads + A * (4 * D + 14 * F) + 8 * config.num_experts)


def _merged_bytes(config: ModelConfig, experts: ExpertFormat, policy: Policy, spec: AdapterSpec) -> int:
    """What QAT adds: the weights that are adapted once more, as they are computed with; what they are made from, which
    stays mapped; and one matrix while it is rounded."""
    shapes = canonical_shapes(config)
    total = largest = 0
    for name in spec.targets:
        shape = shapes[weight_name(name)]
        numel = math.prod(shape)
        is_mxfp4 = name.endswith(EXPERT_KINDS) and experts is ExpertFormat.MXFP4
        stored = numel * 17 // 32 if is_mxfp4 else 2 * numel
        own = stored if is_mxfp4 else numel * policy.dtype.itemsize
        if policy.dense is not None:
            own = packed_bytes("mxfp4" if is_mxfp4 else policy.dense, shape, paired=name.endswith("gate_up"))
        total += stored + own
        largest = max(largest, math.prod(shape[-2:]))
    return total + 4 * 4 * largest


def _kept_of_native_layer(config: ModelConfig, spec: AdapterSpec, policy: Policy, row: RowShape, dropout: bool) -> int:
    """Bytes that a layer keeps where the kernels run: its two inputs, normed where adapters read them; queries, whole
    pages of keys and values, attention's result; the routing; of every visit of an expert what its activation was made
    from and the rows of adapters, padded as the kernels have them; and what dropout left of the inputs of adapters."""
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    A = config.num_active_experts
    of_gradient = backends.quick_gradient_type().itemsize
    ranks = _ranks(spec)
    kept = 4 * (2 * D + 2 * N * H + N) + 12 * config.num_experts + 40 * A
    kept += _sums_per_token(config)
    kept += sum(4 * A * -(-rank // PANEL) * PANEL for kind, rank in ranks.items() if kind in EXPERT_KINDS)
    if dropout:
        kept += 4 * D * (bool(ranks.keys() & {"q", "k", "v"}) + ("router" in ranks)) + _left_by_dropout(config, ranks)
    else:
        kept += of_gradient * D * (bool(ranks.keys() & {"q", "k", "v"}) + ("router" in ranks))
        kept += of_gradient * N * H * (of_gradient != 4 and "o" in ranks)
    in_pages = 2 * K * H * _KV_WIDTHS[policy.kv]
    return row.tokens * kept + round(row.page_tokens * in_pages)


def _sums_per_token(config: ModelConfig) -> int:
    """Bytes of what the activations of a layer's experts are made from: one piece of memory for all tokens."""
    panels, *_ = packed_shapes("mxfp4", (2 * config.expert_width, config.hidden_size), paired=True)[0]
    return config.num_active_experts * panels * PANEL * backends.quick_gradient_type().itemsize


def _kept_of_layer(config: ModelConfig, spec: AdapterSpec, policy: Policy, row: RowShape, dropout: bool) -> int:
    """The same where the reference runs: of every norm, which torch's autograd goes through, its input and result in
    float32 too; heads before and after they are turned; experts keep their input alone."""
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    width, ranks = policy.dtype.itemsize, _ranks(spec)
    norms = 2 + bool(ranks.keys() & {"q", "k", "v"}) + ("router" in ranks)
    kept = norms * (8 + width) * D + width * (2 * D + 2 * (N + 2 * K) * H + 2 * N * H) + 4 * N
    kept += 20 * config.num_experts + 40 * config.num_active_experts
    if width != 4:  # what adapters read, in their type
        kept += 4 * sum(size for kind, size in _read_by(config).items() if kind in ranks)
    kept += 4 * sum(rank for kind, rank in ranks.items() if kind not in EXPERT_KINDS)
    return row.tokens * (kept + (_left_by_dropout(config, ranks) if dropout else 0))


def _left_by_dropout(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Of the inputs of linear layers that are adapted: for each what is left, and by which numbers; and its rows."""
    return 4 * sum(2 * size + ranks[kind] for kind, size in _read_by(config).items() if kind in ranks)


def _read_by(config: ModelConfig) -> dict[str, int]:
    D = config.hidden_size
    return {"q": D, "k": D, "v": D, "o": config.num_heads * config.head_dim, "router": D}


def _ranks(spec: AdapterSpec) -> dict[str, int]:
    """By kind: the highest of any layer."""
    ranks: dict[str, int] = {}
    for name, target in spec.targets.items():
        kind = name.rpartition(".")[2]
        ranks[kind] = max(target.rank, ranks.get(kind, 0))
    return ranks


def _expert_scratch(config: ModelConfig, row: RowShape, width: int) -> int:
    """Of the backward pass through one expert, which may have all tokens: hidden values with what they were made of,
    and the gradients of all that; and what is added up over experts."""
    D, F = config.hidden_size, config.expert_width
    return row.tokens * width * (16 * F + 10 * D)


def _dropout_scratch(config: ModelConfig, row: RowShape) -> int:
    """By what the kernels multiply every visit's input and hidden values."""
    return 4 * row.tokens * config.num_active_experts * (config.hidden_size + config.expert_width)


def _native_attention_scratch(config: ModelConfig, row: RowShape) -> int:
    """Of the backward pass: keys and values in float32, and gradients of heads, apart and joined."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    return 4 * row.tokens * H * (5 * N + 8 * K)


def _attention_scratch(config: ModelConfig, row: RowShape) -> int:
    queries = min(_QUERIES_AT_ONCE, row.example)
    return (
        _SCORES * 4 * config.num_heads * queries * row.example + 4 * row.tokens * config.num_heads * config.head_dim * 4
    )


def _remedy(plan: TrainingPlan, row: RowShape, policy: Policy) -> str:
    remedies = ["training without --qat"] if plan.merged > plan.needed // 20 else []
    if not plan.checkpointing:
        remedies.append("activations that are computed twice (--checkpointing auto)")
    if row.tokens > 256 and plan.activations + plan.scratch > plan.needed // 20:
        remedies.append(f"shorter rows (--max-length {max(256, row.tokens // 2)})")
    if plan.factors * 4 > plan.needed // 20:
        remedies.append("a lower --rank, or fewer --target")
    if policy.dense in ("f32", "bf16"):
        remedies.append("smaller dense weights (--dense q8)")
    remedies.append("a smaller model, or more memory: close other programs")
    return "use " + ", ".join(remedies[:-1]) + (", or " if len(remedies) > 1 else "") + remedies[-1]
