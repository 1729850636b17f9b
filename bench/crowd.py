"""A crowd: hundreds of clients that stream for minutes, a third of whom vanish in the middle; who is left, and what?

    python bench/crowd.py [--clients 200] [--seconds 180]

Starts `freehold serve` with the default model. Every client asks, reads, and asks again; each third one stops reading
after some events and cuts its connection. Another process asks for /health twenty times a second. In the end the server
is left to itself, and its pages, requests, tasks, descriptors and memory are held against what they were after a short
warm-up. Memory grows until every page of the KV cache has been used once.
Exits with 1 where an answer that was read to its end was not whole, or something leaked.
"""

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from contest import ContestError, machine_line, positive
from http_client import Answer, HttpServer, ask, http_server, stream

_TOPICS = ("the sea", "bread", "Rome", "clouds", "a bicycle", "the moon", "chess", "a garden", "tea", "the alphabet")


_FIGURES = ("freehold_running", "freehold_waiting", "freehold_kv_cache_usage_ratio", "freehold_tasks")


class State(NamedTuple):
    """What a server holds."""

    running: float
    waiting: float
    kv_usage: float
    tasks: float
    descriptors: int
    memory_mib: float


async def _state(server: HttpServer) -> State:
    _, body = await ask(server.port, "/metrics")
    values: defaultdict[str, float] = defaultdict(float)
    missing = [name for name in _FIGURES if name.encode() not in body]
    if missing:
        raise ContestError(f"/metrics lacks {', '.join(missing)}")
    for name, value in re.findall(r"^(freehold_\w+)(?:\{[^}]*\})? ([0-9.e+]+)$", body.decode(), re.MULTILINE):
        values[name] += float(value)
    status = Path(f"/proc/{server.pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
    descriptors = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
    running, waiting, kv_usage, tasks = (values[name] for name in _FIGURES)
    return State(running, waiting, kv_usage, tasks, descriptors, resident / 1024)


async def _client(server: HttpServer, number: int, until: float, counts: Counter[str]) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        question = f"Say something about {rng.choice(_TOPICS)}, number {rng.randrange(1000)}."
        body = {"model": "default", "stream": True, "max_tokens": rng.randint(8, 48), "messages": [
            {"role": "user", "content": question}]}  # fmt: skip
        vanishes = number % 3 == 0
        answer = Answer()
        try:
            await stream(
                server.port, "/v1/chat/completions", body, answer, stop_after=rng.randint(1, 6) if vanishes else None
            )
        except OSError as error:
            counts[f"connection: {type(error).__name__}"] += 1
            continue
        if vanishes:
            counts["vanished"] += 1
        elif answer.status == 200 and answer.whole:
            counts["whole"] += 1
        else:
            counts[f"failed with status {answer.status}"] += 1


async def _probe(port: int) -> None:
    """Ask for /health until the input ends, then print the seconds that each answer took. A process of its own: among
    the crowd it would wait for the crowd."""
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    while not ended.done():
        start = time.perf_counter()
        status, _ = await ask(port, "/health")
        sys.stdout.write(f"{status} {time.perf_counter() - start}\n")
        await asyncio.sleep(0.05)


def _seconds_of(answers: str) -> list[float]:
    """In rising order."""
    lines = [line.split() for line in answers.splitlines()]
    if bad := [status for status, _ in lines if status != "200"]:
        raise ContestError(f"/health answered {bad[0]}")
    return sorted(float(seconds) for _, seconds in lines)


async def _wait_until_idle(server: HttpServer) -> State:
    for _ in range(600):
        state = await _state(server)
        if not state.running and not state.waiting:
            await asyncio.sleep(1)
            return await _state(server)
        await asyncio.sleep(0.1)
    raise ContestError("the server does not come to rest")


async def _run(server: HttpServer, clients: int, seconds: float) -> bool:
    warm: Counter[str] = Counter()
    await asyncio.gather(*(_client(server, number, time.monotonic() + 10, warm) for number in range(clients)))
    before = await _wait_until_idle(server)
    counts: Counter[str] = Counter()
    command = [sys.executable, __file__, "--probe", str(server.port)]
    probe = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=2**24)
    until = time.monotonic() + seconds
    await asyncio.gather(*(_client(server, number, until, counts) for number in range(clients)))
    answers, _ = await probe.communicate(b"")
    health = _seconds_of(answers.decode())
    after = await _wait_until_idle(server)
    say = sys.stdout.write
    say(", ".join(f"{number} {what}" for what, number in counts.most_common()) + "\n")
    for share in (0.5, 0.99, 1.0):
        say(f"/health, {share:.0%} within {health[min(len(health) - 1, int(share * len(health)))] * 1000:.1f} ms\n")
    for name, was, is_ in zip(State._fields, before, after, strict=True):
        say(f"{name}: {was:g} after the warm-up, {is_:g} in the end\n")
    failed = any(what not in ("whole", "vanished") for what in counts)
    leaked = after[:3] != (0, 0, 0) or after.tasks > before.tasks or after.descriptors > before.descriptors
    return not failed and not leaked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--clients", type=positive, default=200)
    parser.add_argument("--seconds", type=positive, default=180)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--probe", type=positive, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        asyncio.run(_probe(options.probe))
        return
    sys.stdout.write(machine_line(options.threads) + "\n")
    try:
        with http_server(
            options.model, ["--context", "2048", "--kv-tokens", "32768"], threads=options.threads
        ) as server:
            fine = asyncio.run(_run(server, options.clients, options.seconds))
    except ContestError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    sys.exit(0 if fine else "something failed or leaked")


if __name__ == "__main__":
    main()
