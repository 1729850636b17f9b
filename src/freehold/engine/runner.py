"""One step's forward pass: from a plan to the logits of those who draw, and the logprobs of the prompts that are to be
scored. Knows tensors, decides nothing."""

from typing import NamedTuple

import torch
from torch import Tensor

from freehold.engine import sampler
from freehold.engine.adapters import Adapters
from freehold.engine.kv_store import KvStore
from freehold.engine.request import TokenLogprobs
from freehold.engine.scheduler import Plan, Work
from freehold.model.transformer import Transformer

SCORED_AT_ONCE = 16
"""Rows of logits that a prompt's logprobs are taken from at a time; fewer than may be drawn from, so that they fit
where those go."""


class Result(NamedTuple):
    """Logits (S, V) in float32 on the CPU, the rows of each work of the plan in their order; and for each work the
    logprobs of the tokens after its `scored` positions."""

    logits_SV: Tensor
    prompt_logprobs: list[list[TokenLogprobs]]


class Runner:
    def __init__(self, transformer: Transformer, store: KvStore, adapters: Adapters) -> None:
        self._transformer = transformer
        self._store = store
        self._adapters = adapters

    @torch.inference_mode()
    def run(self, plan: Plan) -> Result:
        self._store.copy(plan.copies)
        tokens: list[int] = []
        rows: list[int] = []
        for work in plan.works:
            tokens += work.tokens
            rows += range(len(tokens) - work.num_rows, len(tokens))
        device = self._transformer.device
        batch = self._store.batch(plan.works, self._adapters.of_step(plan.works, device))
        hidden_TD = self._transformer.forward(torch.tensor(tokens, device=device), batch)
        prompt_logprobs, first = [], 0
        for work in plan.works:
            prompt_logprobs.append(self._score(work, hidden_TD[first : first + work.count]))
            first += work.count + len(work.guesses)
        if not rows:
            return Result(torch.empty((0, self._transformer.config.vocab_size)), prompt_logprobs)
        if len(rows) < len(tokens):
            hidden_TD = hidden_TD[torch.tensor(rows, device=device)]
        return Result(self._transformer.unembed(hidden_TD).cpu(), prompt_logprobs)

    def _score(self, work: Work, hidden_TD: Tensor) -> list[TokenLogprobs]:
        """In slices: all of a chunk's logits would be many times the rest of a step."""
        request, scored, logprobs = work.sequence.request, work.scored, []
        for start in range(scored.start, scored.stop, SCORED_AT_ONCE):
            stop = min(start + SCORED_AT_ONCE, scored.stop)
            assert request.prompt_logprobs is not None
            logits_RV = self._transformer.unembed(hidden_TD[start - work.start : stop - work.start])
            logprobs += sampler.score(logits_RV, request.prompt[start + 1 : stop + 1], request.prompt_logprobs)
        return logprobs
