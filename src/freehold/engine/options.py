"""How an engine is set up. Values only; session.memory plans with them before anything is allocated."""

from dataclasses import dataclass

from freehold.errors import UsageError

MAX_NUM_SEQS = 32
PREFILL_CHUNK = 512
"""Tokens of prompts that run through the model at once; bounds scratch memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Raises UsageError for values out of range.

    `context` is the most tokens of one sequence, prompt and answer together. `kv_tokens` is how many the KV cache holds
    in all, those of cached prefixes included; None is as many as `context`. `max_num_seqs` is how many sequences run
    together. While no more requests wait to be read than are being written, a step that
    carries prompt tokens along takes at most about `stretch` times as long for those who write.
    `lookup` lets it guess at tokens (engine.lookup) where that saves time.
    """

    context: int
    kv_tokens: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    chunk: int = PREFILL_CHUNK
    stretch: float = 2.0
    lookup: bool = True

    def __post_init__(self) -> None:
        for name, value in (("context", self.context), ("max_num_seqs", self.max_num_seqs), ("chunk", self.chunk)):
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} must be 1 or more, got {value!r}")
        if self.kv_tokens is not None and (type(self.kv_tokens) is not int or self.kv_tokens < self.context):
            raise UsageError(
                f"kv_tokens must be at least the context of {self.context}, so that one sequence fits, "
                f"got {self.kv_tokens!r}"
            )
        if not self.stretch >= 1:
            raise UsageError(f"stretch must be 1 or more, got {self.stretch!r}")

    @property
    def tokens(self) -> int:
        """That the KV cache holds."""
        return self.context if self.kv_tokens is None else self.kv_tokens
