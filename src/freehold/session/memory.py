"""The memory contract: what a model will take, computed from its shape before anything is allocated, held against what
is free. What does not fit is refused with the numbers and a remedy, not left to the system to kill.
"""

import math
from dataclasses import dataclass

import torch

from freehold import machine
from freehold.config import ExpertFormat, ModelConfig
from freehold.engine.kv_store import kv_store_bytes, page_counts
from freehold.engine.options import MAX_NUM_SEQS, EngineOptions
from freehold.engine.pace import MOST_GUESSED
from freehold.errors import OutOfMemoryError, UsageError
from freehold.kernels.kv import PAGE, SPLIT
from freehold.session.policy import Policy
from freehold.weights.pack_file import packed_table_bytes

_LEAST_CONTEXT = 2048  # tokens: a default that fits no more than this is no default worth having
_SCORES_AT_ONCE = 256  # query rows of one attention block in the reference ops
_MAPPED_AT_ONCE = 1 << 16  # of a mapped file, around each place that is read
_WIDE_RANK = 256  # of an adapter; few have more
_SLACK = 64 << 20  # what torch reads of itself when it first runs, and what malloc does not give back


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes for an engine with these options. `program` is what the process has resident before the model comes."""

    options: EngineOptions
    dense: int
    experts: int
    kv_cache: int
    scratch: int
    program: int
    adapters: int = 0

    @property
    def context(self) -> int:
        """The most tokens of one sequence."""
        return self.options.context

    @property
    def needed(self) -> int:
        """What has to be free now."""
        return self.dense + self.experts + self.adapters + self.kv_cache + self.scratch

    @property
    def total(self) -> int:
        """What will be resident at most, in all."""
        return self.needed + self.program

    def describe(self) -> str:
        adapters = f"{gib(self.adapters)} adapters + " if self.adapters else ""
        return (
            f"{gib(self.dense + self.experts)} weights + {adapters}{gib(self.kv_cache)} KV cache for "
            f"{self.options.tokens} tokens + {gib(self.scratch)} scratch = {gib(self.needed)}"
        )


def plan_memory(
    config: ModelConfig, experts: ExpertFormat, policy: Policy, options: EngineOptions, *, adapters: int = 0
) -> MemoryPlan:
    """What an engine needs, and a plain cache of one such sequence too. Peak resident memory stays below; an untied
    embedding counts with the rows that the cache's tokens can touch. `adapters` are the bytes of all of them."""
    if policy.native:
        assert policy.dense is not None
        weights = packed_table_bytes(config, experts, policy.dense)
        row = config.hidden_size * 2
        touched = min(weights.embedding, options.tokens * (row + _MAPPED_AT_ONCE))
        dense, expert_bytes = weights.dense + touched, weights.experts
        scratch = _native_scratch(config, experts, policy, options)
    else:
        width = policy.dtype.itemsize
        # Beside weights that take another type, what they were made from stays mapped.
        dense = (config.num_parameters - config.num_expert_weights) * (width if width == 2 else width + 2)
        expert_bytes = round(config.num_expert_weights * (4.25 if experts is ExpertFormat.MXFP4 else 16) / 8)
        scratch = _reference_scratch(config, width, options)
    if adapters:
        scratch += _adapter_scratch(config, options)
    pages = page_counts(config, tokens=options.tokens, max_num_seqs=options.max_num_seqs, chunk=options.chunk)
    program = machine.process_status().get("VmRSS", 0)
    return MemoryPlan(
        options=options,
        dense=dense,
        experts=expert_bytes,
        kv_cache=kv_store_bytes(config, pages, policy.kv),
        scratch=scratch,
        program=program,
        adapters=adapters,
    )


def check_context(config: ModelConfig, context: int | None) -> None:
    """Raise UsageError, naming the value, where a model cannot have such a context. None is whatever it can have."""
    longest = config.max_context
    if context is not None and (type(context) is not int or not 1 <= context <= longest):
        raise UsageError(f"context must be between 1 and {longest} for this model, got {context!r}")


def fitting_plan(
    config: ModelConfig,
    experts: ExpertFormat,
    policy: Policy,
    *,
    context: int | None,
    kv_tokens: int | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    adapters: int = 0,
) -> MemoryPlan:
    """The plan for `context` tokens, or for as much of the model's own context as fits where that is None.

    Raises OutOfMemoryError, with the numbers and a remedy, where memory is short; UsageError for an impossible context.
    """
    longest = config.max_context if kv_tokens is None else max(1, min(config.max_context, kv_tokens))
    check_context(config, context)
    free = free_memory(policy)

    def plan_of(tokens: int) -> MemoryPlan:
        options = EngineOptions(context=tokens, kv_tokens=kv_tokens, max_num_seqs=max_num_seqs)
        return plan_memory(config, experts, policy, options, adapters=adapters)

    plan = plan_of(context or longest)
    if plan.needed <= free:
        return plan
    if context is None:
        least = plan_of(min(_LEAST_CONTEXT, longest))
        if least.needed <= free:
            low, high = least.context, longest  # the plan of `low` fits, that of `high` does not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if plan_of(middle).needed <= free else (low, middle)
            return plan_of(low)
        plan = least
    raise OutOfMemoryError(f"{plan.describe()} are needed, and {gib(free)} are free; {_remedy(config, policy, plan)}")


def free_memory(policy: Policy) -> int:
    """Bytes that a model may take, on the device that it is going to run on."""
    if policy.device.type == "cuda":
        return int(torch.cuda.mem_get_info(policy.device)[0])
    return machine.available_memory()


def _remedy(config: ModelConfig, policy: Policy, plan: MemoryPlan) -> str:
    remedies = []
    if plan.context > 1024 and plan.kv_cache > plan.needed // 20:
        remedies.append(f"a smaller context (--context {max(1024, plan.context // 4)})")
    if policy.kv != "q8" and config.head_dim % 32 == 0 and plan.kv_cache > plan.needed // 20:
        remedies.append("a smaller KV cache (--kv-dtype q8)")
    if policy.dense in ("f32", "bf16"):
        remedies.append("smaller dense weights (--dense q8)")
    if policy.dense is None and policy.dtype == torch.float32:
        remedies.append("bfloat16 (--dtype bfloat16)")
    if policy.native and policy.threads > machine.physical_cores():
        remedies.append(f"fewer threads (--threads {machine.physical_cores()})")
    if plan.adapters > plan.needed // 20:
        remedies.append("fewer adapters")
    remedies.append("a smaller model, or more memory: close other programs")
    return "use " + ", ".join(remedies[:-1]) + (", or " if len(remedies) > 1 else "") + remedies[-1]


def _native_scratch(config: ModelConfig, experts: ExpertFormat, policy: Policy, options: EngineOptions) -> int:
    """Activations of one step, the kernels' own form of them, partial results of attention, and logits: those that
    tokens are drawn from, which leave room for the few at a time that a prompt is scored by (engine.runner)."""
    T = _step_tokens(options)
    D, F, H, A = config.hidden_size, config.expert_width, config.head_dim, config.num_active_experts
    N, K = config.num_heads, config.num_kv_heads
    activations = 4 * T * (7 * D + 2 * (N + 2 * K) * H + 2 * N * H)
    # Bytes of an activation where it meets weights: int8 or int16 and its share of a block's scale and sum, or float32.
    at_dense = 2.25 if policy.dense == "q8" else 4
    at_experts = 1.25 if experts is ExpertFormat.MXFP4 else at_dense
    converted = round(max(T * A * (D + F) * at_experts, T * max(N * H, D) * at_dense))
    logits = 4 * config.vocab_size * (options.max_num_seqs + MOST_GUESSED + 2)
    return activations + converted + _attention_scratch(config, policy, options) + logits + _SLACK


def _adapter_scratch(config: ModelConfig, options: EngineOptions) -> int:
    """What adapters read of experts' inputs and hidden values, before that is quantised, and what it narrows to."""
    visits = _step_tokens(options) * config.num_active_experts
    return 4 * visits * (config.hidden_size + config.expert_width + _WIDE_RANK)


def _step_tokens(options: EngineOptions) -> int:
    """The most that run at once: a chunk of prompts beside one token of each other sequence, and guesses."""
    return min(options.chunk, options.tokens) + options.max_num_seqs - 1 + MOST_GUESSED


def _attention_scratch(config: ModelConfig, policy: Policy, options: EngineOptions) -> int:
    """As csrc/kernels/ops.cpp takes it: every thread works on rows of one kv head; where there are few such pieces of
    work they are split by keys, and each split has a result of its own."""
    T, H, K = _step_tokens(options), config.head_dim, config.num_kv_heads
    group = config.num_heads // K
    queries = min(max(64 // group, 1), T)
    rows, padded = queries * group, -(-H // 16) * 16
    partial = 4 * rows * (padded + 2)
    per_thread = 4 * rows * H + 16 * rows + 4 * (PAGE * padded + rows * SPLIT) + partial
    split_items = min(4 * policy.threads - 1, math.ceil(T / queries) * K)
    num_partials = max(policy.threads, split_items * (math.ceil(options.context / SPLIT) + 1))
    return policy.threads * per_thread + num_partials * partial


def _reference_scratch(config: ModelConfig, width: int, options: EngineOptions) -> int:
    D, F, N, V = config.hidden_size, config.expert_width, config.num_heads, config.vocab_size
    chunk = _step_tokens(options)
    scores = 3 * N * min(_SCORES_AT_ONCE, chunk) * options.context * 4
    one_expert = 2 * F * D * (width + 2)  # expanded values, and the byte indices they are looked up by
    logits = 4 * V * (options.max_num_seqs + MOST_GUESSED + 2)
    return scores + one_expert + chunk * (6 * D + 4 * F) * 4 + logits + _SLACK


def gib(num_bytes: float) -> str:
    """Bytes for people: 12.80 GiB, or 146 MiB where it is less than one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
