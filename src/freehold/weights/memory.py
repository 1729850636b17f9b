"""How much memory a model needs: weights, KV cache and scratch, computed from its shape alone."""

from dataclasses import dataclass

from freehold.config import ModelConfig

PREFILL_CHUNK = 512
"""Tokens of a prompt that run through the model at once; bounds scratch memory."""

_SCORES_AT_ONCE = 256  # query rows of one attention block in the reference ops


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes. Scratch is an estimate for the reference ops."""

    dense: int
    experts: int
    kv_cache: int
    scratch: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.kv_cache + self.scratch


def worth_expanding(config: ModelConfig, *, dense_bytes: int, machine_bytes: int) -> bool:
    """Whether the reference ops do better with packed experts written out once: where all take under 1/32 of memory."""
    return _expert_weights(config) * dense_bytes <= machine_bytes // 32


def _expert_weights(config: ModelConfig) -> int:
    return config.num_layers * config.num_experts * 3 * config.expert_width * config.hidden_size


def plan_memory(config: ModelConfig, *, context: int, expert_bits: float, dense_bytes: int) -> MemoryPlan:
    """The plan for one sequence of `context` tokens.

    `expert_bits` is the width of an expert weight (4.25 for MXFP4, 16 for bfloat16), `dense_bytes` the width
    of every other number, KV cache included, in the type the model runs in.
    """
    D, F, N, V = config.hidden_size, config.expert_width, config.num_heads, config.vocab_size
    expert_weights = _expert_weights(config)
    kv_per_token = 2 * config.num_kv_heads * config.head_dim * dense_bytes
    kept = sum(context if window is None else min(window - 1, context) for window in config.windows)
    chunk = min(PREFILL_CHUNK, context)
    scores = 3 * N * min(_SCORES_AT_ONCE, chunk) * context * 4
    one_expert = 2 * F * D * (dense_bytes + 2)  # expanded values, and the byte indices they are looked up by
    activations = chunk * (6 * D + 4 * F) * 4 + V * 8
    return MemoryPlan(
        dense=(config.num_parameters - expert_weights) * dense_bytes,
        experts=round(expert_weights * expert_bits / 8),
        kv_cache=kept * kv_per_token,
        scratch=scores + one_expert + activations,
    )
