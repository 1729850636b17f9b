"""Freehold beside llama.cpp and ik_llama.cpp on the same model and machine: prefill and decode, interleaved.

    python bench/peers.py --model FOLDER --gguf FILE [--peer llama.cpp=PYTHON] [--peer ik_llama.cpp=PYTHON]
    python bench/peers.py --gguf FILE --peer "plain=PYTHON,use_extra_bufts=0" --peer "repacked=PYTHON"

FOLDER is what Freehold loads, FILE the same model as GGUF (`freehold convert FOLDER FILE`). Each contestant runs in a
process of its own (bench/peer_worker.py), so peers may live in other virtual environments: PYTHON is the interpreter
of one that has llama-cpp-python or ik-llama-cpp-python. How that was built decides much: compile it where it is
measured (`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary PACKAGE PACKAGE`), or say for which instructions.

The rounds interleave, A B C A B C, and what a table shows is the median over rounds; a ratio is the median of the
ratios within one round. So a machine that slows down for an hour slows everyone. What other processes took meanwhile is
printed below the table: a run on a busy machine shows that things work, and no more. So is how much like the first
contestant's each one's logits are after the same prompt: the speed of a wrong answer is no result. Linux only.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contest import (
    GIB,
    ContestError,
    Worker,
    busy_seconds,
    cpu_name,
    machine_bytes,
    machine_line,
    markdown,
    natural,
    positive,
    spread,
)

_WORKER = Path(__file__).with_name("peer_worker.py")
_DEFAULT_PEERS = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp"}
_RESIDENT_SHARE = 0.7  # of the memory: beyond it, one contestant's pages push out another's


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    name: str
    engine: str
    python: str
    model: Path
    settings: tuple[str, ...] = ()

    @property
    def model_bytes(self) -> int:
        files = self.model.glob("*.safetensors") if self.model.is_dir() else [self.model]
        return sum(file.stat().st_size for file in files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    do: str
    tokens: int
    depth: int = 0

    @property
    def label(self) -> str:
        return f"{self.do} {self.tokens}" + (f" after {self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`others` and `idle` are in cores: processes outside the comparison, and contestants whose turn it was not.
    `disk_reads` are page faults that had to wait for the disk: with many of them, the disk was measured."""

    round: int
    contestant: str
    measure: str
    tokens_per_second: float
    others: float
    idle: float
    disk_reads: int


class PeerWorker(Worker):
    """A running contestant."""

    def __init__(self, contestant: Contestant, *, threads: int, context: int) -> None:
        self.contestant = contestant
        command = [contestant.python, str(_WORKER), contestant.engine, str(contestant.model)]
        command += [f"--threads={threads}", f"--context={context}", *(f"--set={item}" for item in contestant.settings)]
        super().__init__(contestant.name, command, threads=threads)

    def warm_up(self, measures: Sequence[Measure]) -> list[float]:
        """Runs enough for every page that the measures need to be in memory; returns logits after a fixed prompt."""
        prompts = [measure.tokens for measure in measures if measure.do == "prefill"]
        logits: list[float] = self.ask({"do": "check", "tokens": min(prompts, default=64)})["logits"]
        self.ask({"do": "decode", "tokens": 2, "depth": 0})
        return logits


class Comparison:
    """Runs the rounds, and keeps the samples and what the workers say of themselves."""

    def __init__(
        self,
        contestants: Sequence[Contestant],
        measures: Sequence[Measure],
        *,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        self.contestants = contestants
        self.measures = measures
        self.threads = threads
        self.samples: list[Sample] = []
        self.reports: dict[str, dict[str, Any]] = {}
        self.load_seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        self._context = max(measure.tokens + measure.depth for measure in measures)
        self._say = say

    def run_resident(self, rounds: int) -> None:
        """Everyone stays loaded; each measure goes round before the next one."""
        needed, total = sum(c.model_bytes for c in self.contestants), machine_bytes()
        if needed > _RESIDENT_SHARE * total:
            raise ContestError(
                f"the contestants' models take {needed / GIB:.1f} GiB together, and this machine has "
                f"{total / GIB:.1f} GiB: they would push each other out of memory; use --one-at-a-time"
            )
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(self._started(contestant)) for contestant in self.contestants]
            for round_ in range(1, rounds + 1):
                for measure in self.measures:
                    for worker in workers:
                        self._measure(round_, worker, measure, idle=[w for w in workers if w is not worker])

    def run_one_at_a_time(self, rounds: int) -> None:
        """In each round each contestant is started, warmed up, measured, ended."""
        for round_ in range(1, rounds + 1):
            for contestant in self.contestants:
                with self._started(contestant) as worker:
                    for measure in self.measures:
                        self._measure(round_, worker, measure, idle=[])

    def of(self, contestant: str, measure: str) -> list[float]:
        """Tokens per second, by round."""
        return [s.tokens_per_second for s in self.samples if (s.contestant, s.measure) == (contestant, measure)]

    def ratio(self, contestant: str, measure: str) -> float:
        """How many times as fast the first contestant is as this one."""
        firsts = self.of(self.contestants[0].name, measure)
        return statistics.median(a / b for a, b in zip(firsts, self.of(contestant, measure), strict=True))

    def likeness(self, contestant: str) -> float:
        """Correlation of its logits with the first contestant's: what is far below 1 computes something else."""
        first = self.reports[self.contestants[0].name]["logits"]
        return statistics.correlation(first, self.reports[contestant]["logits"])

    @contextlib.contextmanager
    def _started(self, contestant: Contestant) -> Iterator[PeerWorker]:
        self._say(f"{contestant.name}: loading {contestant.model}")
        worker = PeerWorker(contestant, threads=self.threads, context=self._context)
        try:
            self.load_seconds[contestant.name].append(worker.ready["load_seconds"])
            first = self.reports.setdefault(self.contestants[0].name, worker.ready)
            if worker.ready["vocabulary"] != first["vocabulary"]:
                raise ContestError(
                    f"not the same model: {contestant.model} has a vocabulary of {worker.ready['vocabulary']}, "
                    f"{self.contestants[0].model} has {first['vocabulary']}"
                )
            self.reports[contestant.name] = worker.ready | {"logits": worker.warm_up(self.measures)}
            yield worker
        finally:
            worker.close()

    def _measure(self, round_: int, worker: PeerWorker, measure: Measure, *, idle: Sequence[PeerWorker]) -> None:
        name = worker.contestant.name
        start, busy, own, resting = time.perf_counter(), busy_seconds(), worker.usage(), _cpu_seconds(idle)
        reply = worker.ask(asdict(measure))
        elapsed, own_after = time.perf_counter() - start, worker.usage()
        busy, resting = busy_seconds() - busy, _cpu_seconds(idle) - resting
        sample = Sample(
            round=round_,
            contestant=name,
            measure=measure.label,
            tokens_per_second=measure.tokens / reply["seconds"],
            others=max(0.0, busy - resting - (own_after.cpu_seconds - own.cpu_seconds)) / elapsed,
            idle=resting / elapsed,
            disk_reads=own_after.disk_reads - own.disk_reads,
        )
        self.samples.append(sample)
        self.reports[name] = self.reports[name] | reply
        self._say(f"round {round_}, {measure.label}, {name}: {sample.tokens_per_second:.2f} tokens/s")


def table(comparison: Comparison) -> str:
    """Markdown, to be pasted into docs/performance.md."""
    names = [contestant.name for contestant in comparison.contestants]
    rows = [["tokens/s: median (lowest to highest)", *names]]
    labels = [measure.label for measure in comparison.measures]
    rows += [[label, *(spread(comparison.of(name, label)) for name in names)] for label in labels]
    rows += [[f"{label}: {names[0]} ÷ it", *(f"{comparison.ratio(n, label):.2f}" for n in names)] for label in labels]
    rows.append([f"logits: correlation with {names[0]}", *(f"{comparison.likeness(name):.4f}" for name in names)])
    rows.append(["load, seconds", *(spread(comparison.load_seconds[name]) for name in names)])
    reports = [comparison.reports[name] for name in names]
    for label, key in {"peak memory, GiB": "peak_rss_bytes", "of it not from files": "private_bytes"}.items():
        rows.append([label, *(f"{report[key] / GIB:.2f}" for report in reports)])
    others, idle, reads = ([getattr(s, key) for s in comparison.samples] for key in ("others", "idle", "disk_reads"))
    lines = [
        *markdown(rows),
        "",
        *(f"{name}: {r['engine']} {r['version']} ({r['details']})" for name, r in zip(names, reports, strict=True)),
        machine_line(comparison.threads),
        f"other processes kept {statistics.median(others):.2f} cores busy in the median, {max(others):.2f} at worst; "
        f"idle contestants {max(idle):.2f} at worst; {max(reads)} pages came from the disk while one was timed",
    ]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison) -> str:
    names = [contestant.name for contestant in comparison.contestants]
    return json.dumps(
        {
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_bytes": machine_bytes()},
            "threads": comparison.threads,
            "contestants": [
                {
                    **asdict(contestant),
                    "model": str(contestant.model),
                    "model_bytes": contestant.model_bytes,
                    **{key: comparison.reports[contestant.name][key] for key in ("version", "details")},
                    "logits_correlation": comparison.likeness(contestant.name),
                    "load_seconds": comparison.load_seconds[contestant.name],
                    **{key: comparison.reports[contestant.name][key] for key in ("peak_rss_bytes", "private_bytes")},
                }
                for contestant in comparison.contestants
            ],
            "samples": [asdict(sample) for sample in comparison.samples],
            "medians": {
                measure.label: {
                    name: {
                        "tokens_per_second": statistics.median(comparison.of(name, measure.label)),
                        "first_divided_by_it": comparison.ratio(name, measure.label),
                    }
                    for name in names
                }
                for measure in comparison.measures
            },
        },
        indent=1,
    )


def contestants_of(arguments: argparse.Namespace) -> list[Contestant]:
    """Freehold first, then every peer with every GGUF file. Raises ContestError where an argument names nothing."""
    found = {name: name for name, module in _DEFAULT_PEERS.items() if importlib.util.find_spec(module)}
    peers = [_peer(text) for text in arguments.peer] or [(name, sys.executable, ()) for name in found]
    if arguments.model and not any(_engine(name) == "freehold" for name, _, _ in peers):
        peers.insert(0, ("freehold", sys.executable, ()))
    contestants = []
    for name, python, settings in peers:
        engine = _engine(name)
        models = [arguments.model] if engine == "freehold" else arguments.gguf
        if None in models or not models:
            raise ContestError(f"{name} has no model; give {'--model' if engine == 'freehold' else '--gguf'}")
        for model in models:
            if not model.exists():
                raise ContestError(f"{model} does not exist")
            label = f"{name} {model.stem}" if len(models) > 1 else name
            contestants.append(Contestant(name=label, engine=engine, python=python, model=model, settings=settings))
    if len({contestant.name for contestant in contestants}) < len(contestants):
        raise ContestError("two contestants have the same name; choose names in --peer NAME=PYTHON")
    if not contestants:
        raise ContestError("nobody to measure: give --model, or --gguf and a --peer")
    return contestants


def _peer(text: str) -> tuple[str, str, tuple[str, ...]]:
    name, _, rest = text.partition("=")
    python, *settings = rest.split(",")
    wrong = [item for item in settings if "=" not in item]
    if not name or wrong:
        raise ContestError(f"--peer is NAME=PYTHON[,FIELD=VALUE…], got {text!r}")
    return name, python or sys.executable, tuple(settings)


def _engine(name: str) -> str:
    if name.startswith("freehold"):
        return "freehold"
    return "ik_llama_cpp" if name.startswith("ik") else "llama_cpp"


def _cpu_seconds(workers: Sequence[PeerWorker]) -> float:
    return sum(worker.usage().cpu_seconds for worker in workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="what Freehold loads; without it, peers alone run")
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], metavar="FILE", help="what every peer loads")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON[,FIELD=VALUE…]",
        help="NAME begins with ik for ik_llama.cpp, with freehold for another Freehold, else it is llama.cpp; FIELDs "
        "are those of its parameter structs, or arguments of freehold.load; default: what this interpreter can import",
    )
    parser.add_argument("--prompt", type=positive, nargs="*", default=[256, 512], help="prompt lengths")
    parser.add_argument("--generate", type=positive, default=32, help="tokens of a decode")
    parser.add_argument("--depth", type=natural, nargs="*", default=[0], help="tokens in the cache before a decode")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--one-at-a-time", action="store_true", help="for models that do not fit in memory together")
    parser.add_argument("--json", action="store_true", help="everything, as JSON, instead of the table")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # an exit ends the workers too
    measures = [Measure(do="prefill", tokens=tokens) for tokens in arguments.prompt]
    measures += [Measure(do="decode", tokens=arguments.generate, depth=depth) for depth in arguments.depth]
    try:
        if not measures:
            raise ContestError("nothing to measure: give --prompt or --depth a length")
        comparison = Comparison(contestants_of(arguments), measures, threads=arguments.threads, say=say)
        run = comparison.run_one_at_a_time if arguments.one_at_a_time else comparison.run_resident
        run(arguments.rounds)
    except ContestError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    if arguments.rounds < 3:
        say("fewer than 3 rounds: this shows that things work, and no more")
    sys.stdout.write(as_json(comparison) + "\n" if arguments.json else table(comparison))


if __name__ == "__main__":
    main()
