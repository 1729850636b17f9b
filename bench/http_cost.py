"""What HTTP costs: the same requests on the engine itself and through `freehold serve`, interleaved in one run.

    python bench/http_cost.py [--model default] [--streams 1 32] [--endpoint chat]

Both halves run in processes of their own with the same weights; one works while the other waits. The engine's half
reads its own steps (bench/serving_worker.py); the other half's client sits in this process and takes its share of the
cores, which is counted as HTTP's cost although a client is mostly elsewhere. Every stream asks for exactly --generate
tokens, greedily; both halves get the same prompts, in turns one or the other first, and every round new ones. What is
compared is the time from the first request to the last token, by the median of the ratios within one round.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from contest import ContestError, Worker, machine_line, markdown, positive, spread
from http_client import Answer, HttpServer, ask, http_server, stream

_WORKER = Path(__file__).with_name("serving_worker.py")
_QUESTION = "Tell me a long story about a lighthouse, its keeper, a storm, and a ship that came too near."


class Prompts:
    """The same prompts for both halves, none of which was there before: as messages, and as token ids."""

    def __init__(self, server: HttpServer, endpoint: str) -> None:
        self._server = server
        self._endpoint = endpoint
        self._count = 0

    async def new(self, generate: int) -> tuple[tuple[str, dict[str, Any]], list[int]]:
        """Where to send what, and the ids that the engine will see."""
        self._count += 1
        messages = [{"role": "user", "content": f"{self._count}. {_QUESTION}"}]
        ids = await self._ids({"messages": messages})
        common = {"model": "default", "stream": True, "temperature": 0.0, "ignore_eos": True, "max_tokens": generate}
        match self._endpoint:
            case "completions":
                return ("/v1/completions", {**common, "prompt": ids}), ids
            case "chat":
                return ("/v1/chat/completions", {**common, "messages": messages}), ids
        raise ContestError(f"no endpoint {self._endpoint!r}; chat and completions are known")

    async def _ids(self, body: dict[str, Any]) -> list[int]:
        status, answer = await ask(self._server.port, "/tokenize", body)
        if status != 200:
            raise ContestError(f"/tokenize answered {status}: {answer.decode(errors='replace')}")
        ids: list[int] = json.loads(answer)["tokens"]
        return ids


async def _over_http(server: HttpServer, requests: list[tuple[str, dict[str, Any]]]) -> float:
    answers = [Answer() for _ in requests]
    start = time.perf_counter()
    await asyncio.gather(
        *(stream(server.port, *request, answer) for request, answer in zip(requests, answers, strict=True))
    )
    seconds = time.perf_counter() - start
    for answer in answers:
        if answer.status != 200 or not answer.whole:
            raise ContestError(f"an answer ended early: status {answer.status}, {answer.events} events")
    return seconds


def _on_the_engine(worker: Worker, prompts: list[list[int]], generate: int) -> float:
    replies = worker.ask({"do": "serve", "prompts": prompts, "generate": generate})["replies"]
    return max(float(reply["arrivals"][-1]) for reply in replies)


async def _new_prompts(prompts: Prompts, streams: int, generate: int) -> tuple[list[Any], list[list[int]]]:
    made = [await prompts.new(generate) for _ in range(streams)]
    return [request for request, _ in made], [ids for _, ids in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--streams", type=positive, nargs="+", default=[1, 32])
    parser.add_argument("--generate", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--endpoint", choices=["chat", "completions"], default="chat")
    options = parser.parse_args()
    rows = [["streams", "engine, tokens/s", "over HTTP, tokens/s", "HTTP adds"]]
    try:
        rows += [_compare(options, streams) for streams in options.streams]
    except ContestError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    sys.stdout.write("\n".join([machine_line(options.threads), *markdown(rows)]) + "\n")


def _compare(options: argparse.Namespace, streams: int) -> list[str]:
    from freehold.hub.find import find_model

    context, generate = 512, options.generate
    folder = find_model(options.model, lambda *_: None)
    command = [sys.executable, str(_WORKER), str(folder), "--threads", str(options.threads)]
    worker = Worker(
        "engine", [*command, "--streams", str(streams), "--context", str(context), "--cache"], threads=options.threads
    )
    serving = ["--context", str(context), "--kv-tokens", str(streams * context), "--max-concurrency", str(streams)]
    try:
        with http_server(options.model, serving, threads=options.threads) as server:
            prompts = Prompts(server, options.endpoint)
            engine, http = [], []
            for round_ in range(options.rounds + 1):
                requests, ids = asyncio.run(_new_prompts(prompts, streams, generate))
                if round_ % 2:
                    direct = _on_the_engine(worker, ids, generate)
                    over = asyncio.run(_over_http(server, requests))
                else:
                    over = asyncio.run(_over_http(server, requests))
                    direct = _on_the_engine(worker, ids, generate)
                if round_:  # the first one warms up
                    engine.append(direct)
                    http.append(over)
                sys.stderr.write(f"{streams} streams, round {round_}: {direct:.3f} s, over HTTP {over:.3f} s\n")
    finally:
        worker.close()
    tokens = streams * generate
    adds = statistics.median(over / direct - 1 for direct, over in zip(engine, http, strict=True))
    rates = [spread([tokens / seconds for seconds in half]) for half in (engine, http)]
    return [str(streams), *rates, f"{adds:+.1%}"]


if __name__ == "__main__":
    main()
