"""The simplest way to generate: one sequence, a plain cache, one token after the other.

The oracle of the engine, and the bare loop that its cost is measured against.
"""

import random
from collections.abc import Iterator, Sequence

import torch

from freehold.kernels import ops
from freehold.model.transformer import Transformer
from freehold.sampling import Sampling


def generate(
    transformer: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    chunk: int = 512,
) -> Iterator[int]:
    """Yield new tokens until one of `stop_ids`, which is yielded too, or `max_tokens`.

    Of `sampling` only temperature, top-p, top-k, min-p and seed count. The prompt is read `chunk` tokens at a time.
    """
    draws = random.Random(sampling.seed)
    cache = transformer.new_cache(len(prompt) + max_tokens)
    tokens = list(prompt)
    for _ in range(max_tokens):
        with torch.inference_mode():
            for piece in torch.split(torch.tensor(tokens, device=transformer.device), chunk):
                hidden_TD = transformer.run(piece, cache)
            logits_V = transformer.unembed(hidden_TD[-1:])[0].cpu()
        token = ops.sample(
            logits_V,
            uniform=draws.random() if sampling.temperature else 0.0,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        yield token
        if token in stop_ids:
            return
        tokens = [token]
