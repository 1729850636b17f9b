"""Freehold's half of bench/serving.py: loads one model, then runs what it is asked to on the engine, in this process.

    python bench/serving_worker.py MODEL --threads 2 --streams 8 --context 256

    (once loaded)                                          {"version": …, "details": …}
    {"do": "tokenize", "text": "…"}                        {"tokens": […]}
    {"do": "serve", "prompts": [[…], …], "generate": 64}   {"replies": [{"sent": …, "arrivals": […], "tokens": […]}, …]}

One line of JSON each way. Everything runs on the CPU, and the process ends with its input. `serve` and `Reply` are what
bench/serving.py drives the other half with: both halves have the same clients and the same clock.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_worker import private_stdout

Generate = Callable[[list[int], int], AsyncIterator[list[int]]]
"""From a prompt and a number of new tokens to these tokens, as they come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """To one request, in seconds since the first one was sent: `tokens[i]` came together, at `arrivals[i]`."""

    sent: float
    arrivals: list[float]
    tokens: list[list[int]]


async def serve(generate: Generate, prompts: Sequence[list[int]], *, streams: int, new_tokens: int) -> list[Reply]:
    """One reply per prompt, in order. Each of the clients sends its next prompt as soon as its last reply has ended."""
    start = time.perf_counter()
    replies: dict[int, Reply] = {}

    async def client(first: int) -> None:
        for i in range(first, len(prompts), streams):
            reply = replies[i] = Reply(sent=time.perf_counter() - start, arrivals=[], tokens=[])
            async for tokens in generate(prompts[i], new_tokens):
                reply.arrivals.append(time.perf_counter() - start)
                reply.tokens.append(tokens)

    await asyncio.gather(*(client(first) for first in range(streams)))
    return [replies[i] for i in range(len(prompts))]


@contextlib.asynccontextmanager
async def freehold_requests(model: Any, *, cache: bool) -> AsyncIterator[Generate]:
    """The model's engine, whose requests share what their prompts have in common where `cache` says so. All that is
    known of engines here is in this function."""
    loop = importlib.import_module("freehold.engine.loop")
    request = importlib.import_module("freehold.engine.request")

    async def generate(prompt: list[int], new_tokens: int) -> AsyncIterator[list[int]]:
        asked = request.Request(
            prompt=prompt,
            sampling=request.Sampling(temperature=0.0),
            max_tokens=new_tokens,
            cache=cache,
        )
        async for step in engine.submit(asked):
            if step.tokens:
                yield list(step.tokens)

    async with loop.AsyncEngine(model.new_engine()) as engine:
        yield generate


async def answer_all(model: Any, *, streams: int, cache: bool, say: Callable[[dict[str, Any]], None]) -> None:
    async with freehold_requests(model, cache=cache) as generate:
        say(
            {
                "version": importlib.import_module("freehold").__version__,
                "details": model.policy.describe(model.experts),
            }
        )
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            if request["do"] == "tokenize":
                say({"tokens": model.tokenizer.encode(request["text"])})
            else:
                replies = await serve(generate, request["prompts"], streams=streams, new_tokens=request["generate"])
                say({"replies": [asdict(reply) for reply in replies]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True, help="requests that run at once")
    parser.add_argument("--context", type=int, required=True, help="positions that a request may need at most")
    parser.add_argument("--cache", action="store_true", help="let requests share the beginnings of their prompts")
    arguments = parser.parse_args()
    replies = private_stdout()

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")

    try:
        freehold, errors = importlib.import_module("freehold"), importlib.import_module("freehold.errors")
    except ImportError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    try:
        model = freehold.load(
            arguments.model,
            device="cpu",
            threads=arguments.threads,
            context=arguments.context,
            kv_tokens=arguments.streams * arguments.context,
            max_num_seqs=arguments.streams,
        )
        if model.tokenizer is None:
            raise errors.UsageError(f"{arguments.model} has no tokenizer, which makes the prompts")
        asyncio.run(answer_all(model, streams=arguments.streams, cache=arguments.cache, say=say))
    except (ImportError, errors.FreeholdError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
