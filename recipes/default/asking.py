"""Many questions to one model at once, through the product: rendering, grammar, engine, parser."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from freehold.errors import FreeholdError
from freehold.session.generation import Ask, SampleDone, prepare_generation
from freehold.session.model import Model, load
from freehold.session.served import Served, serve_model

_AT_ONCE = 16
_ADAPTER = "adapter"


def load_model(name: str, *, adapter: Path | None = None) -> Model:
    """A model by name or folder, for sixteen short conversations at once, which is asked with the adapter, if any."""
    adapters = {} if adapter is None else {_ADAPTER: adapter}
    return load(name, kv_tokens=_AT_ONCE * 2048, max_num_seqs=_AT_ONCE, adapters=adapters)


def the_adapter(model: Model) -> str | None:
    """Of one that `load_model` has given one."""
    return _ADAPTER if _ADAPTER in model.adapters else None


def ask_all(model: Model, asks: Sequence[Ask], *, harmony: bool) -> list[SampleDone | None]:
    """What the model says to each; None where it says nothing that can be read, or cannot be asked."""
    return asyncio.run(_ask_all(model, asks, harmony))


async def _ask_all(model: Model, asks: Sequence[Ask], harmony: bool) -> list[SampleDone | None]:
    served = serve_model(model, name="model", harmony=harmony)
    if (adapter := the_adapter(model)) is not None:
        served = served.with_adapter(adapter)
    room = asyncio.Semaphore(_AT_ONCE)
    done = 0

    async def one(ask: Ask) -> SampleDone | None:
        nonlocal done
        async with room:
            answer = await _answer(served, ask)
        done += 1
        if done % 20 == 0 or done == len(asks):
            sys.stderr.write(f"\r{done} of {len(asks)} answered")
        return answer

    try:
        answers = await asyncio.gather(*map(one, asks))
    finally:
        await served.runner.drain()
    sys.stderr.write("\n")
    return answers


async def _answer(served: Served, ask: Ask) -> SampleDone | None:
    found: SampleDone | None = None
    try:
        generation = await prepare_generation(served, ask)
        async for batch in generation.events(served.runner):
            for event in batch:
                if isinstance(event, SampleDone):
                    found = event
    except FreeholdError as error:
        sys.stderr.write(f"\na question failed: {error}\n")
    return found
