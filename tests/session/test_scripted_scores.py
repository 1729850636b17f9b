"""A script scores prompts as the engine does: nothing is generated where that is all that was asked."""

import asyncio

import pytest
from prometheus_client import generate_latest

from freehold.engine.request import Completion, Request
from freehold.sampling import Sampling
from freehold.session.scripted import ScriptedTurn, serve_script


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_a_script_scores_the_prompt(max_tokens: int) -> None:
    async def scenario() -> list[Completion]:
        served = serve_script([ScriptedTurn(completion="one two three four")])
        request = Request(
            prompt=[5, 6, 7], max_tokens=max_tokens, prompt_logprobs=1, n=2, sampling=Sampling(logprobs=0)
        )
        samples = [Completion(), Completion()]
        async for step in served.runner.submit(request):
            samples[step.index].add(step)
        assert "freehold_kv_cache_usage_ratio 0.0" in generate_latest(served.runner.metrics.registry).decode()
        return samples

    first, second = asyncio.run(scenario())
    assert first.prompt_logprobs == (None, (0.0, ((6, 0.0),)), (0.0, ((7, 0.0),)))
    assert second.prompt_logprobs is None
    for sample in (first, second):
        assert (sample.finish, len(sample.tokens), len(sample.logprobs or ())) == ("length", max_tokens, max_tokens)
