"""The memory contract of training: what a run will take, computed from shapes before anything is allocated.

Weights are those of inference. To them come the factors, their gradients and what the optimizer keeps of each; and what
a row of tokens leaves behind for its backward pass: of every layer, or, where activations are computed twice, of one
layer and the residual stream between them. Called by run.py.
"""

import math
from dataclasses import dataclass

from freehold import machine
from freehold.config import ExpertFormat, ModelConfig
from freehold.engine.options import EngineOptions
from freehold.errors import OutOfMemoryError
from freehold.model.lora import EXPERT_KINDS, AdapterSpec, factor_shapes
from freehold.session.memory import free_memory, gib, plan_memory
from freehold.session.policy import Policy

_QUERIES_AT_ONCE = 256  # rows of attention whose scores are there together
_LOGITS_AT_ONCE = 3 * 4 << 24  # bytes: pieces of logits, what becomes of them, and their gradient
_TRAINER = 192 << 20  # what torch's optimizers and matplotlib read of themselves
_KEPT_BY_MALLOC = 0.25  # of activations that were let go, in pieces that the next ones do not fit
_KEPT_TWICE = 0.6  # the same where they are computed twice, of those that are let go in between
_MOST_KEPT_TWICE = 768 << 20  # where large pieces go back to the system at once (machine.return_large_memory)
_SCORES = 4  # such arrays of scores: they, their softmax, the gradients of both


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """The most tokens of a row, and of an example in it."""

    tokens: int
    example: int


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

    @property
    def needed(self) -> int:
        """What has to be free now."""
        return self.weights + self.factors + self.gradients + self.optimizer + self.activations + self.scratch

    @property
    def total(self) -> int:
        """What will be resident at most, in all."""
        return self.needed + self.program

    def describe(self) -> str:
        twice = ", computed twice" if self.checkpointing else ""
        return (
            f"{gib(self.weights)} weights + {gib(self.factors)} factors + {gib(self.gradients)} gradients + "
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
    checkpointing: bool = False,
) -> TrainingPlan:
    """What a step of LoRA needs with rows of this shape. Peak resident memory stays below."""
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
    layer = row.tokens * _kept_of_layer(config, spec, width, dropout)
    stream = row.tokens * config.hidden_size * width
    everything = config.num_layers * layer
    if checkpointing:
        kept = config.num_layers * stream + layer + min(round(_KEPT_TWICE * everything), _MOST_KEPT_TWICE)
    else:
        kept = round((1 + _KEPT_BY_MALLOC) * everything)
    return TrainingPlan(
        weights=run.dense + run.experts,
        factors=factors,
        gradients=factors + of_layer,
        optimizer=2 * factors,
        activations=kept + 2 * stream,
        scratch=run.scratch
        + _expert_scratch(config, row, width)
        + _attention_scratch(config, row)
        + _LOGITS_AT_ONCE
        + _TRAINER,
        program=machine.process_status().get("VmRSS", 0),
        checkpointing=checkpointing,
    )


def fitting_lora_plan(
    config: ModelConfig,
    experts: ExpertFormat,
    policy: Policy,
    spec: AdapterSpec,
    row: RowShape,
    *,
    dropout: bool,
    checkpointing: str,
) -> TrainingPlan:
    """The plan that fits: activations are kept if they can be, where `checkpointing` is auto.

    Raises OutOfMemoryError, with the numbers and a remedy.
    """
    free = free_memory(policy)
    plan = plan_lora(config, experts, policy, spec, row, dropout=dropout, checkpointing=checkpointing == "on")
    if plan.needed > free and checkpointing == "auto":
        plan = plan_lora(config, experts, policy, spec, row, dropout=dropout, checkpointing=True)
    if plan.needed <= free:
        return plan
    raise OutOfMemoryError(f"{plan.describe()} are needed, and {gib(free)} are free; {_remedy(plan, row, policy)}")


def _kept_of_layer(config: ModelConfig, spec: AdapterSpec, width: int, dropout: bool) -> int:
    """Bytes that a layer keeps for each token: its two inputs, normed where adapters read them; heads before and after
    they are turned; attention's result; the routing; and what dropout left of the inputs of adapters."""
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    heads = (N + 2 * K) * H
    kept = 4 * D + 3 * heads + 2 * N * H + N + 4 * config.num_experts + 4 * config.num_active_experts
    if dropout:
        inputs = {"q": D, "k": D, "v": D, "o": N * H, "router": D}
        kinds = {name.rpartition(".")[2] for name in spec.targets}
        kept += 2 * sum(size for kind, size in inputs.items() if kind in kinds)
    ranks = sum(target.rank for name, target in spec.targets.items() if name.startswith("layers.0."))
    return width * (kept + ranks)


def _expert_scratch(config: ModelConfig, row: RowShape, width: int) -> int:
    """Of the backward pass through one expert, which may have all tokens: hidden values with what they were made of,
    and the gradients of all that; and what is added up over experts."""
    D, F = config.hidden_size, config.expert_width
    return row.tokens * width * (16 * F + 10 * D)


def _attention_scratch(config: ModelConfig, row: RowShape) -> int:
    queries = min(_QUERIES_AT_ONCE, row.example)
    return (
        _SCORES * 4 * config.num_heads * queries * row.example + 4 * row.tokens * config.num_heads * config.head_dim * 4
    )


def _remedy(plan: TrainingPlan, row: RowShape, policy: Policy) -> str:
    remedies = []
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
