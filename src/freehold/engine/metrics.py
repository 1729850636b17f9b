"""What an engine does, for Prometheus: a registry of its own, read whenever somebody scrapes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from freehold.engine.request import Step

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Now, and since the engine was made. `pages_in_use` are those of sequences and cached prefixes, per group,
    `pages_held` those that running sequences need, so that nothing else could have them; `kv_bytes` is what all pages
    take once they have been written. Taken while a step runs on another thread, they are nearly right."""

    running: int
    waiting: int
    cached_prefixes: int
    pages_in_use: tuple[int, ...]
    pages_held: tuple[int, ...]
    pages: tuple[int, ...]
    kv_bytes: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    guessed_tokens: int
    right_guesses: int
    preemptions: int
    steps: int
    busy_seconds: float


class EngineMetrics:
    """`registry` has everything; `observe` is called for each step of each request."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(stats))

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"freehold_{name}_seconds", text, buckets=_SECONDS, registry=self.registry)

        self._queue = histogram("queue", "From submission to a sequence's first step.")
        self._first_token = histogram("time_to_first_token", "From submission to a sequence's first token.")
        self._per_token = histogram("time_per_output_token", "Between a sequence's tokens, on average over it.")
        self._total = histogram("request", "From submission to a sequence's end.")
        self._finished = Counter(
            "freehold_finished", "Sequences, by how they ended.", ["reason"], registry=self.registry
        )

    def lose(self, num_samples: int) -> None:
        """So many ended with an error that no step of theirs tells of."""
        self._finished.labels("error").inc(num_samples)

    def observe(self, step: Step) -> None:
        if step.finish is None:
            return
        self._finished.labels(step.finish).inc()
        if step.stats is None:
            return
        for histogram, seconds in (
            (self._queue, step.stats.queue_seconds),
            (self._first_token, step.stats.first_token_seconds),
            (self._per_token, step.stats.seconds_per_token),
            (self._total, step.stats.total_seconds),
        ):
            if seconds is not None:
                histogram.observe(seconds)


class _Now(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator["Metric"]:
        stats = self._stats()
        for name, text, value in (
            ("running", "Sequences in the batch.", stats.running),
            ("waiting", "Sequences that wait.", stats.waiting),
            ("cached_prefixes", "Prefixes that later prompts may go on from.", stats.cached_prefixes),
            (
                "kv_cache_usage_ratio",
                "Of the KV cache's pages, the part that running sequences hold, in the group that is fullest.",
                max((held / total for held, total in zip(stats.pages_held, stats.pages, strict=True)), default=0.0),
            ),
        ):
            yield GaugeMetricFamily(f"freehold_{name}", text, value)
        pages = GaugeMetricFamily("freehold_pages", "Pages of the KV cache.", labels=["group"])
        used = GaugeMetricFamily("freehold_pages_in_use", "Of sequences and cached prefixes.", labels=["group"])
        for group, (total, in_use) in enumerate(zip(stats.pages, stats.pages_in_use, strict=True)):
            pages.add_metric([str(group)], total)
            used.add_metric([str(group)], in_use)
        yield from (pages, used)
        for name, text, count in (
            ("requests", "Requests submitted.", stats.requests),
            ("prompt_tokens", "Tokens of their prompts.", stats.prompt_tokens),
            ("cached_tokens", "Of these, tokens that the prefix cache spared.", stats.cached_tokens),
            ("generated_tokens", "Tokens generated.", stats.generated_tokens),
            ("guessed_tokens", "Tokens guessed at, and read along.", stats.guessed_tokens),
            ("right_guesses", "Of these, tokens that were drawn.", stats.right_guesses),
            ("preemptions", "Sequences pushed out for want of pages, by those that have ended.", stats.preemptions),
            ("steps", "Forward passes.", stats.steps),
            ("busy_seconds", "Time spent in them.", stats.busy_seconds),
        ):
            yield CounterMetricFamily(f"freehold_{name}", text, count)
