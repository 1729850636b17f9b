"""Freehold's engine beside llama.cpp's server: tokens a second that several clients get at once, interleaved.

    python bench/serving.py --model FOLDER --gguf FILE --llama-server PATH [--streams 8 32]
    python bench/serving.py --gguf FILE FILE --llama-server PATH --llama-argument=--kv-unified

FOLDER is what Freehold loads, FILE the same model as GGUF (`freehold convert FOLDER FILE`), PATH a llama-server,
compiled where it is measured, or for the same instructions as Freehold's kernels (FREEHOLD_CPU). For each number of
streams, as many clients send their requests one after another; each asks for exactly --generate tokens after a prompt
of exactly --prompt tokens, greedily, whatever ends a text. The prompts are English, no two that one process sees begin
with the same token, and the server's own caches of prompts are off. Both halves get the same token ids and give every
token back as it comes: Freehold's within its process (bench/serving_worker.py), the server's over HTTP.

In each round, for each number of streams, each contestant is started, warmed up with a short request per stream,
measured, ended: only one runs at a time. A table shows the median over rounds; a ratio is the median of the ratios
within one round. What other processes took meanwhile is printed below it: a run on a busy machine shows that things
work, and no more. So is how much of each reply is the same as the first contestant's: the speed of a wrong answer is no
result, though greedy texts part at a near tie, and then for good. Linux only.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from contest import (
    ContestError,
    Process,
    Usage,
    Worker,
    busy_seconds,
    machine_line,
    markdown,
    positive,
    spread,
)
from serving_worker import Reply, serve

_WORKER = Path(__file__).with_name("serving_worker.py")
_WARM_UP_TOKENS = 4
_SLOT_STEP = 256  # llama.cpp rounds a slot's context up to this
_UNKNOWN = -1  # a token that the server did not name
# Nothing of a finished request may serve a later one, so keeping it would only cost the server time.
_NOTHING_KEPT = ("--cache-ram", "0"), ("--ctx-checkpoints", "0")

_ADJECTIVES = """
    ancient bitter bright broken careful cheap clever cold crowded curious damp dark deep distant eager early empty
    famous fierce formal fragile gentle golden grey heavy hidden hollow honest huge humble icy idle jealous kind late
    lazy little local lonely loud lucky modern muddy narrow noisy odd pale patient plain polite proud quick quiet rare
    red rough rusty sharp silent slow soft solid steep strange strong sudden tall tender thin tired ugly usual vast
    warm weak wet wild wise wooden young
"""
_NOUNS = """
    actor apple artist baker barrel basket bell bicycle bird boat book bottle box bridge brother camera candle captain
    carpet castle cat chair cheese clock cloud coat cousin cow daughter desk doctor dog door dragon driver drum engine
    farmer feather fence fish flag flower forest friend garden gate glass guitar hammer hat horse hotel island judge
    kettle key king kitchen knife ladder lady lamp lawyer leaf letter lion map market mirror monkey mountain neighbour
    nurse onion orange painter paper pencil pilot planet poet pony potato prince queen rabbit river rope sailor salt
    school sister soldier spider star stone student table teacher tiger tower train tree uncle valley violin wagon
    wheel widow window wolf
"""
_VERBS = """
    admired avoided borrowed bought built carried chased copied counted covered described discovered drew feared fixed
    followed forgot found guarded heard helped ignored invited kept lifted liked lost loved mended missed moved needed
    noticed opened ordered painted praised pulled pushed reached remembered saved served shook sold stole studied
    threw touched traded trusted visited washed watched
"""
_PLACES = """
    across the bay; after the storm; at the station; behind the mill; before dinner; below the hill; beside the lake;
    during the war; for a penny; from the roof; in the rain; near the border; on a Sunday; outside the church; over
    the wall; through the tunnel; under the bridge; until the morning; with great care; without a word
"""


class Running(Protocol):
    """A contestant that has loaded its model for some number of streams. One call at a time."""

    details: str

    def tokenize(self, text: str) -> list[int]: ...

    def serve(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Reply]: ...

    def usage(self) -> Usage: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """`server` is None for Freehold."""

    name: str
    model: Path
    server: Path | None = None
    arguments: tuple[str, ...] = ()

    def start(self, *, streams: int, threads: int, context: int) -> Running:
        if self.server is None:
            return FreeholdEngine(self.name, self.model, streams=streams, threads=threads, context=context)
        return LlamaServer(
            self.name,
            self.server,
            self.model,
            streams=streams,
            threads=threads,
            context=context,
            arguments=self.arguments,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Seconds: `first` from a request to its first token, `between` from there to the next ones (medians, and what 95 %
    keep below). `others` and `client` are in cores: processes outside the comparison, and this one, which is the
    server's client. `same` is how many tokens at the beginning of a reply are the first contestant's, on average.
    `disk_reads` are page faults that had to wait for the disk."""

    round: int
    contestant: str
    streams: int
    tokens_per_second: float
    seconds: float
    first_p50: float
    first_p95: float
    between_p50: float
    between_p95: float
    same: float
    others: float
    client: float
    disk_reads: int


class FreeholdEngine(Worker):
    def __init__(self, name: str, model: Path, *, streams: int, threads: int, context: int) -> None:
        command = [sys.executable, str(_WORKER), str(model)]
        command += [f"--streams={streams}", f"--threads={threads}", f"--context={context}"]
        super().__init__(name, command, threads=threads)
        self.details = f"freehold {self.ready['version']} ({self.ready['details']})"

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self.ask({"do": "tokenize", "text": text})["tokens"]
        return tokens

    def serve(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Reply]:
        answer = self.ask({"do": "serve", "prompts": prompts, "generate": new_tokens})
        return [Reply(**reply) for reply in answer["replies"]]


class LlamaServer(Process):
    """llama.cpp's server on a port of its own, with a slot per stream and continuous batching, which is its default."""

    def __init__(
        self,
        name: str,
        binary: Path,
        model: Path,
        *,
        streams: int,
        threads: int,
        context: int,
        arguments: Sequence[str],
    ) -> None:
        self._streams = streams
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        known = _output_of(binary, "--help")
        version = re.search(r"^version: (.+)", _output_of(binary, "--version"), re.MULTILINE)
        self.details = " ".join(["llama-server", version[1] if version else "of unknown version", *arguments])
        settings = ["--model", str(model), "--host", "127.0.0.1", "--port", str(self._port)]
        settings += ["--parallel", str(streams), "--ctx-size", str(streams * -(-context // _SLOT_STEP) * _SLOT_STEP)]
        settings += ["--threads", str(threads), "--threads-batch", str(threads)]
        settings += ["--no-webui"] if "--no-webui" in known else []
        settings += [text for option in _NOTHING_KEPT if option[0] in known for text in option]
        super().__init__(name, [str(binary), *settings, *arguments], threads=threads)
        try:
            while self._call("GET", "/health")[0] != http.client.OK:
                time.sleep(0.05)
        except BaseException:
            self.close()
            raise

    def tokenize(self, text: str) -> list[int]:
        status, body = self._call("POST", "/tokenize", {"content": text})
        if status != http.client.OK:
            raise ContestError(f"{self.name} does not tokenize: {body.decode(errors='replace')}")
        tokens: list[int] = json.loads(body)["tokens"]
        return tokens

    def serve(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Reply]:
        try:
            return asyncio.run(serve(self._generate, prompts, streams=self._streams, new_tokens=new_tokens))
        except (OSError, EOFError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
                raise self._ended() from None
            raise ContestError(f"{self.name} broke off an answer: {error}") from None

    async def _generate(self, prompt: list[int], new_tokens: int) -> AsyncIterator[list[int]]:
        asked = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        count = 0
        async for event in self._events(asked):
            tokens = event["tokens"]
            # Bytes that are no whole character yet are kept back, and of several tokens only the last one is named.
            tokens = [_UNKNOWN] * (event["tokens_predicted"] - count - len(tokens)) + tokens
            count += len(tokens)
            if tokens:
                yield tokens
            if event["stop"]:
                read, kept = event["tokens_evaluated"], event.get("timings", {}).get("cache_n", 0)
                if (count, read, kept) != (new_tokens, len(prompt), 0):
                    raise ContestError(
                        f"{self.name} ran {read - kept} tokens and generated {count}, "
                        f"not {len(prompt)} and {new_tokens} as it was asked to"
                    )

    async def _events(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events of one completion. The server sends each in a chunk, so that a chunk's head is a line."""
        body = json.dumps(asked).encode()
        head = f"POST /completion HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)
        try:
            writer.write(head.encode() + body)
            line = await reader.readline()
            if line and b" 200 " not in line:
                answer = (await reader.read()).decode(errors="replace").splitlines()
                raise ContestError(f"{self.name} refused a request: {answer[-1] if answer else line.decode()}")
            ended = False
            while not ended:
                line = await reader.readline()
                if not line:
                    raise EOFError("the connection was closed")
                if line.startswith(b"error:"):
                    raise ContestError(f"{self.name} failed: {line.decode(errors='replace').strip()}")
                if line.startswith(b"data:"):
                    event = json.loads(line[len(b"data:") :])
                    if "error" in event:
                        raise ContestError(f"{self.name} failed: {event['error']}")
                    ended = event["stop"]
                    yield event
        finally:
            writer.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status 0 where nobody listens yet."""
        if self._process.poll() is not None:
            raise self._ended()
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(method, path, json.dumps(body) if body else None)
            response = connection.getresponse()
            return response.status, response.read()
        except ConnectionRefusedError:
            return 0, b"connection refused"
        except (OSError, http.client.HTTPException) as error:
            raise ContestError(f"{self.name} does not answer {path}: {error}") from None
        finally:
            connection.close()


class Comparison:
    """Runs the rounds, and keeps the samples and what the contestants say of themselves."""

    def __init__(
        self,
        contestants: Sequence[Contestant],
        *,
        streams: Sequence[int],
        prompt_tokens: int,
        new_tokens: int,
        requests: int,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        self.contestants = contestants
        self.streams = streams
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self.requests = requests
        self.threads = threads
        self.samples: list[Sample] = []
        self.details: dict[str, str] = {}
        self._say = say

    def run(self, rounds: int) -> None:
        for round_, streams in itertools.product(range(1, rounds + 1), self.streams):
            prompts: list[list[int]] = []
            firsts: list[list[int]] = []
            for contestant in self.contestants:
                with self._started(contestant, streams) as running:
                    own = self._prompts(running, f"round {round_}, {streams} streams", streams)
                    prompts = prompts or own
                    if own != prompts:
                        raise ContestError(
                            f"not the same vocabulary: {contestant.model} and {self.contestants[0].model} "
                            "divide the same text into different tokens"
                        )
                    replies = self._measure(round_, contestant.name, running, own, firsts)
                    firsts = firsts or replies

    def of(self, contestant: str, streams: int, field: str = "tokens_per_second") -> list[float]:
        """By round."""
        return [getattr(s, field) for s in self.samples if (s.contestant, s.streams) == (contestant, streams)]

    def ratio(self, contestant: str, streams: int) -> float:
        """How many times as fast the first contestant is as this one."""
        firsts = self.of(self.contestants[0].name, streams)
        return statistics.median(a / b for a, b in zip(firsts, self.of(contestant, streams), strict=True))

    @contextlib.contextmanager
    def _started(self, contestant: Contestant, streams: int) -> Iterator[Running]:
        self._say(f"{contestant.name}: loading {contestant.model} for {streams} streams")
        # Two more positions than are filled: at the end of its context llama.cpp stops a little early.
        context = self.prompt_tokens + self.new_tokens + 2
        running = contestant.start(streams=streams, threads=self.threads, context=context)
        try:
            self.details[contestant.name] = running.details
            yield running
        finally:
            running.close()

    def _prompts(self, running: Running, seed: str, streams: int) -> list[list[int]]:
        """The first `streams` are for the warm-up."""
        count = streams * (1 + self.requests)
        prompts: dict[int, list[int]] = {}
        for text in _texts(random.Random(seed), self.prompt_tokens):
            tokens = running.tokenize(text)[: self.prompt_tokens]
            if len(tokens) == self.prompt_tokens:
                prompts.setdefault(tokens[0], tokens)
            if len(prompts) == count:
                return list(prompts.values())
        raise ContestError(
            f"{streams} streams need {count} prompts of {self.prompt_tokens} tokens that begin differently, "
            f"and only {len(prompts)} can be made: use fewer --streams or --requests"
        )

    def _measure(
        self, round_: int, name: str, running: Running, prompts: Sequence[list[int]], firsts: Sequence[list[int]]
    ) -> list[list[int]]:
        """Warms up and takes a sample; returns the tokens of the replies."""
        streams = len(prompts) // (1 + self.requests)
        running.serve(prompts[:streams], min(_WARM_UP_TOKENS, self.new_tokens))
        start, busy, own, client = time.perf_counter(), busy_seconds(), running.usage(), time.process_time()
        replies = running.serve(prompts[streams:], self.new_tokens)
        elapsed, own_after, client = time.perf_counter() - start, running.usage(), time.process_time() - client
        busy = busy_seconds() - busy
        texts = [list(itertools.chain.from_iterable(reply.tokens)) for reply in replies]
        if wrong := [text for text in texts if len(text) != self.new_tokens]:
            raise ContestError(f"{name} generated {len(wrong[0])} tokens, not {self.new_tokens} as it was asked to")
        seconds = max(reply.arrivals[-1] for reply in replies)
        first = [reply.arrivals[0] - reply.sent for reply in replies]
        between = [b - a for reply in replies for a, b in itertools.pairwise(reply.arrivals)]
        sample = Sample(
            round=round_,
            contestant=name,
            streams=streams,
            tokens_per_second=len(replies) * self.new_tokens / seconds,
            seconds=seconds,
            first_p50=_quantile(first, 0.5),
            first_p95=_quantile(first, 0.95),
            between_p50=_quantile(between, 0.5),
            between_p95=_quantile(between, 0.95),
            same=statistics.mean(_shared(a, b) for a, b in zip(texts, firsts or texts, strict=True)),
            others=max(0.0, busy - client - (own_after.cpu_seconds - own.cpu_seconds)) / elapsed,
            client=client / elapsed,
            disk_reads=own_after.disk_reads - own.disk_reads,
        )
        self.samples.append(sample)
        self._say(f"round {round_}, {streams} streams, {name}: {sample.tokens_per_second:.2f} tokens/s")
        return texts


def table(comparison: Comparison) -> str:
    """Markdown, to be pasted into docs/performance.md."""
    names = [contestant.name for contestant in comparison.contestants]
    rows = [["generated tokens/s: median (lowest to highest)", *names]]
    rows += [
        [f"{streams} streams", *(spread(comparison.of(name, streams)) for name in names)]
        for streams in comparison.streams
    ]
    rows += [
        [f"{streams} streams: {names[0]} ÷ it", *(f"{comparison.ratio(name, streams):.2f}" for name in names)]
        for streams in comparison.streams
    ]
    for label, field in {"first token": "first", "between tokens": "between"}.items():
        for streams in comparison.streams:
            cells = [
                " / ".join(_milliseconds(comparison.of(name, streams, f"{field}_{p}")) for p in ("p50", "p95"))
                for name in names
            ]
            rows.append([f"{streams} streams: {label}, ms, p50 / p95", *cells])
    for streams in comparison.streams:
        cells = [f"{statistics.mean(comparison.of(name, streams, 'same')):.1f}" for name in names]
        rows.append([f"{streams} streams: tokens of a reply as {names[0]}'s, until they part", *cells])
    others, client, reads = (
        [getattr(s, key) for s in comparison.samples] for key in ("others", "client", "disk_reads")
    )
    lines = [
        *markdown(rows),
        "",
        *(f"{name}: {comparison.details[name]}" for name in names),
        f"{comparison.requests} requests a stream: prompts of {comparison.prompt_tokens} tokens, none seen before, "
        f"{comparison.new_tokens} new tokens each, greedy",
        machine_line(comparison.threads),
        f"other processes kept {statistics.median(others):.2f} cores busy in the median, {max(others):.2f} at worst; "
        f"the HTTP client {max(client):.2f} at worst; {max(reads)} pages came from the disk while one was timed",
    ]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison) -> str:
    names = [contestant.name for contestant in comparison.contestants]
    return json.dumps(
        {
            "machine": machine_line(comparison.threads),
            "prompt_tokens": comparison.prompt_tokens,
            "new_tokens": comparison.new_tokens,
            "requests_per_stream": comparison.requests,
            "contestants": {
                contestant.name: {"model": str(contestant.model), "details": comparison.details[contestant.name]}
                for contestant in comparison.contestants
            },
            "samples": [asdict(sample) for sample in comparison.samples],
            "medians": {
                streams: {
                    name: {
                        "tokens_per_second": statistics.median(comparison.of(name, streams)),
                        "first_divided_by_it": comparison.ratio(name, streams),
                    }
                    for name in names
                }
                for streams in comparison.streams
            },
        },
        indent=1,
    )


def contestants_of(arguments: argparse.Namespace) -> list[Contestant]:
    """Freehold first, then the server with every GGUF file. Raises ContestError where an argument names nothing."""
    server: Path | None = arguments.llama_server and arguments.llama_server.absolute()  # never looked for in PATH
    if bool(arguments.gguf) != bool(server):
        raise ContestError("--gguf and --llama-server need each other")
    for path in [arguments.model, server, *arguments.gguf]:
        if path and not path.exists():
            raise ContestError(f"{path} does not exist")
    contestants = [Contestant(name="freehold", model=arguments.model)] if arguments.model else []
    for model in arguments.gguf:
        name = f"llama.cpp {model.stem}" if len(arguments.gguf) > 1 else "llama.cpp"
        extra = tuple(arguments.llama_argument)
        contestants.append(Contestant(name=name, model=model, server=server, arguments=extra))
    if not contestants:
        raise ContestError("nobody to measure: give --model, or --gguf and --llama-server")
    if len({contestant.name for contestant in contestants}) < len(contestants):
        raise ContestError("two GGUF files have the same name")
    return contestants


def _texts(source: random.Random, words: int) -> Iterator[str]:
    """English of at least so many words, each text with another beginning, until there is none left."""
    adjectives, nouns, verbs = (words.split() for words in (_ADJECTIVES, _NOUNS, _VERBS))
    places = [place.strip() for place in _PLACES.split(";")]
    openers = [variant for word in adjectives + nouns + verbs for variant in (word, word.capitalize())]
    openers = [variant for opener in openers for variant in (opener, f" {opener}")]
    source.shuffle(openers)
    for opener in openers:
        text = opener
        while len(text.split()) < words:
            subject, object_ = (f"{source.choice(adjectives)} {source.choice(nouns)}" for _ in range(2))
            text += f" and the {subject} {source.choice(verbs)} the {object_} {source.choice(places)}."
            text += f" {source.choice(nouns).capitalize()}"
        yield text


def _output_of(binary: Path, option: str) -> str:
    try:
        ended = subprocess.run([binary, option], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ContestError(f"{binary} cannot be started: {error.strerror}") from None
    return ended.stdout + ended.stderr


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two replies have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if _UNKNOWN not in (x, y) and x != y), len(a))


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="what Freehold loads; without it, the server alone"
    )
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="what the server loads")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="without it, Freehold alone")
    parser.add_argument(
        "--llama-argument", action="append", default=[], metavar="ARGUMENT", help="one more for the server; repeatable"
    )
    parser.add_argument("--streams", type=positive, nargs="+", default=[8, 32], help="clients at once")
    parser.add_argument("--prompt", type=positive, default=110, help="tokens of a prompt")
    parser.add_argument("--generate", type=positive, default=64, help="new tokens of a request")
    parser.add_argument("--requests", type=positive, default=2, help="of each client, one after another")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--json", action="store_true", help="everything, as JSON, instead of the table")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # an exit ends the contestants too
    try:
        comparison = Comparison(
            contestants_of(arguments),
            streams=arguments.streams,
            prompt_tokens=arguments.prompt,
            new_tokens=arguments.generate,
            requests=arguments.requests,
            threads=arguments.threads,
            say=say,
        )
        comparison.run(arguments.rounds)
    except ContestError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).name}: interrupted")
    if arguments.rounds < 3:
        say("fewer than 3 rounds: this shows that things work, and no more")
    sys.stdout.write(as_json(comparison) + "\n" if arguments.json else table(comparison))


if __name__ == "__main__":
    main()
