"""Timed runs of random prompts through the engine, alone or together.

Depth is a cached prefix of random keys and values: what they are does not change the time, and computing them would
take minutes.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from freehold.engine.adapters import Adapters
from freehold.engine.core import Engine
from freehold.engine.options import EngineOptions
from freehold.engine.request import Request, RequestStats
from freehold.model.transformer import Transformer
from freehold.sampling import Sampling
from freehold.weights.files import TensorSpec

WARM_UP = 2
"""Tokens that are generated before decoding is timed."""

_GREEDY = Sampling(temperature=0.0)


class Together(NamedTuple):
    """Several requests at once: seconds from the first submission to the last token, and how each of them fared."""

    seconds: float
    stats: list[RequestStats]


class TimedRuns:
    """`num_tokens` is how many of the vocabulary's tokens prompts are made of. All requests have the `adapter`."""

    def __init__(
        self,
        transformer: Transformer,
        options: EngineOptions,
        *,
        num_tokens: int,
        adapters: Adapters | None = None,
        adapter: str | None = None,
    ) -> None:
        options = replace(options, lookup=False)  # each step one token, whatever it is
        self._engine = Engine(transformer, options, adapters=adapters)
        self._adapter = adapter
        self._num_tokens = num_tokens
        self._generator = torch.Generator().manual_seed(0)
        self._prefixes: dict[int, list[int]] = {}

    def prefill(self, tokens: int, depth: int) -> float:
        """Seconds from submission to the first token."""
        _, (stats,) = self._run([self._prompt(tokens, depth)], 1)
        assert stats.first_token_seconds is not None
        return stats.first_token_seconds

    def decode(self, tokens: int, depth: int) -> float:
        """Seconds for so many tokens, after the first few."""
        start = 0.0
        self._engine.submit(self._request(self._prompt(1, depth), tokens + WARM_UP))
        done = 0
        while self._engine.has_work:
            done += sum(len(output.step.tokens) for output in self._engine.step())
            if done == WARM_UP:
                start = time.perf_counter()
        return time.perf_counter() - start

    def together(self, streams: int, prompt: int, tokens: int) -> Together:
        """So many streams with prompts of their own, submitted at once; nothing of them is cached."""
        return self._run([self._random(prompt) for _ in range(streams)], tokens, cache=False)

    def _run(self, prompts: Sequence[list[int]], max_tokens: int, *, cache: bool = True) -> Together:
        start = time.perf_counter()
        for prompt in prompts:
            self._engine.submit(self._request(prompt, max_tokens, cache=cache))
        stats: list[RequestStats] = []
        while self._engine.has_work:
            for _, step in self._engine.step():
                if step.error is not None:
                    raise step.error
                if step.stats is not None:
                    stats.append(step.stats)
        return Together(time.perf_counter() - start, stats)

    def _request(self, prompt: list[int], max_tokens: int, *, cache: bool = True) -> Request:
        return Request(prompt=prompt, max_tokens=max_tokens, sampling=_GREEDY, cache=cache, adapter=self._adapter)

    def _prompt(self, tokens: int, depth: int) -> list[int]:
        """Random tokens after a cached prefix of `depth` others."""
        self._engine.clear_prefixes()
        if depth == 0:
            return self._random(tokens)
        prefix = self._random(depth)
        self._engine.adopt(prefix, self._random_numbers, adapter=self._adapter)
        return prefix + self._random(tokens)

    def _random_numbers(self, spec: TensorSpec) -> Tensor:
        if spec.dtype == torch.int8:
            return torch.randint(-127, 128, spec.shape, dtype=torch.int8, generator=self._generator)
        if spec.dtype == torch.float16:  # the steps of int8 numbers
            return torch.full(spec.shape, 1 / 127, dtype=torch.float16)
        return torch.randn(spec.shape, generator=self._generator).to(spec.dtype)

    def _random(self, count: int) -> list[int]:
        tokens: list[int] = torch.randint(self._num_tokens, (count,), generator=self._generator).tolist()
        return tokens
