"""What HTTP costs: the same requests on the engine itself and through `freehold serve`, interleaved in one run.

    python bench/http_cost.py [--model default] [--streams 1 32] [--endpoint chat]

Both halves run in processes of their own with the same weights; one works while the other waits. The engine's half
reads its own steps (bench/serving_worker.py); the other half's client sits in this process and takes its share of the
cores, which is counted as HTTP's cost although a client is mostly elsewhere. Every stream asks for exactly --generate
tokens after the same prompt, greedily. What is compared is the time from the first request to the last token, by the
median of the ratios within one round.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from contest import ContestError, Worker, machine_line, markdown, positive, spread
from http_client import Answer, HttpServer, http_server, stream

_WORKER = Path(__file__).with_name("serving_worker.py")
_QUESTION = "Tell me a long story about a lighthouse, its keeper, a storm, and a ship that came too near. "


def _body(endpoint: str, prompt: list[int], generate: int, stream_number: int) -> tuple[str, dict[str, Any]]:
    common = {"model": "default", "stream": True, "temperature": 0.0, "ignore_eos": True, "max_tokens": generate}
    match endpoint:
        case "completions":
            return "/v1/completions", {**common, "prompt": [*prompt, stream_number + 1000]}
        case "chat":
            content = f"{_QUESTION} {stream_number}"
            return "/v1/chat/completions", {**common, "messages": [{"role": "user", "content": content}]}
    raise ContestError(f"no endpoint {endpoint!r}; chat and completions are known")


async def _over_http(server: HttpServer, endpoint: str, prompt: list[int], streams: int, generate: int) -> float:
    answers = [Answer() for _ in range(streams)]
    start = time.perf_counter()
    await asyncio.gather(
        *(
            stream(server.port, *_body(endpoint, prompt, generate, number), answer)
            for number, answer in enumerate(answers)
        )
    )
    seconds = time.perf_counter() - start
    for answer in answers:
        if answer.status != 200 or not answer.whole:
            raise ContestError(f"an answer ended early: status {answer.status}, {answer.events} events")
    return seconds


def _on_the_engine(worker: Worker, prompt: list[int], streams: int, generate: int) -> float:
    prompts = [[*prompt, number + 1000] for number in range(streams)]
    replies = worker.ask({"do": "serve", "prompts": prompts, "generate": generate})["replies"]
    return max(float(reply["arrivals"][-1]) for reply in replies)


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
    worker = Worker("engine", [*command, "--streams", str(streams), "--context", str(context)], threads=options.threads)
    serving = ["--context", str(context), "--kv-tokens", str(streams * context), "--max-concurrency", str(streams)]
    try:
        prompt = worker.ask({"do": "tokenize", "text": _QUESTION})["tokens"]
        with http_server(options.model, serving, threads=options.threads) as server:
            engine, http = [], []
            for round_ in range(options.rounds + 1):
                direct = _on_the_engine(worker, prompt, streams, generate)
                over = asyncio.run(_over_http(server, options.endpoint, prompt, streams, generate))
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
