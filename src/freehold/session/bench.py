"""How fast a model runs here: prefill and decode at several lengths and depths, held against what the machine can do.

The two bounds are measured in between: bytes a second that all threads together read from memory, which limits
decode, and int8 multiply-adds a second on registers alone, which limit prefill. Everything runs through the engine.
"""

import importlib.util
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from freehold import machine
from freehold.config import ExpertFormat, ModelConfig
from freehold.disk import new_file
from freehold.engine.adapters import Adapters
from freehold.engine.options import EngineOptions
from freehold.errors import BackendError, DiskError, UsageError
from freehold.kernels import backends
from freehold.kernels.kv import kv_bytes_per_token
from freehold.kernels.ops import Weight
from freehold.log import NOTICE, Progress, logger, no_progress
from freehold.model.transformer import Transformer
from freehold.session.memory import fitting_plan, free_memory, gib
from freehold.session.model import load
from freehold.session.policy import Policy, decide, use_threads
from freehold.session.runs import WARM_UP, TimedRuns, Together
from freehold.weights.packed import PackedMatrix
from freehold.weights.synth import RANDOM_EMBEDDINGS, random_packed_table

_BANDWIDTH_BYTES = 1 << 30  # more than caches hold
_BANDWIDTH_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured, in tokens. Raises UsageError for values below 1 (depths below 0)."""

    prompts: Sequence[int]
    depths: Sequence[int]
    generate: int
    rounds: int
    concurrency: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, values, least in (
            ("prompt", self.prompts, 1),
            ("depth", self.depths, 0),
            ("generate", [self.generate], 1),
            ("rounds", [self.rounds], 1),
            ("concurrency", self.concurrency or [1], 1),
        ):
            if not values or min(values) < least:
                raise UsageError(f"{name} must be {least} or more, got {', '.join(map(str, values)) or 'nothing'}")

    @property
    def context(self) -> int:
        """What a model must have room for."""
        return max(self.depths) + max(self.prompts) + self.generate + WARM_UP

    @property
    def max_num_seqs(self) -> int:
        """How many streams it has at once."""
        return max(self.concurrency, default=1)

    @property
    def kv_tokens(self) -> int:
        """What the KV cache must have room for: all streams."""
        return max(self.context, self.max_num_seqs * (max(self.prompts) + self.generate))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """A prompt of `tokens` after `depth` others. `share_of_peak` is of the measured int8 multiply-adds; None where
    the reference ops run."""

    tokens: int
    depth: int
    prefill_tok_s: float
    gmac_s: float
    share_of_peak: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """`tokens` generated after `depth` others. `share_of_bandwidth` is of the measured bandwidth, counting every byte
    of weights and cache that a token has to read; `share_of_least_depth` compares speeds."""

    tokens: int
    depth: int
    decode_tok_s: float
    gb_s: float
    share_of_bandwidth: float | None
    share_of_least_depth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """So many at once, each with a prompt of its own of `prompt` tokens and `tokens` generated. `generated_tok_s` is of
    all together, their prompts' time included; the rest are medians over the streams."""

    streams: int
    prompt: int
    tokens: int
    generated_tok_s: float
    first_token_seconds: float
    seconds_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    model: str
    policy: str
    cpu: str
    load_seconds: float
    bytes_per_token: int
    macs_per_token: int
    read_bandwidth: float | None
    peak_macs: float | None
    planned_bytes: int
    peak_rss_bytes: int
    prefill: list[Prefill]
    decode: list[Decode]
    streams: list[Streams]

    @property
    def prefill_tok_s(self) -> float:
        """Of the longest prompt at depth 0, or what comes closest."""
        return min(self.prefill, key=lambda row: (row.depth, -row.tokens)).prefill_tok_s

    @property
    def decode_tok_s(self) -> float:
        """At the least depth."""
        return min(self.decode, key=lambda row: row.depth).decode_tok_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What is measured: a transformer ready to run, with one of its `adapters` where one is named, and what is known of
    it."""

    name: str
    transformer: Transformer
    experts: ExpertFormat
    policy: Policy
    options: EngineOptions
    planned_bytes: int
    load_seconds: float
    adapters: Adapters | None = None
    adapter: str | None = None


def load_for_bench(
    model: str, work: Workload, *, adapter: Path | None = None, progress: Progress = no_progress, **options: object
) -> Loaded:
    """A model as `freehold.load` gives it, with room for this work; `options` are load's."""
    start = time.perf_counter()
    name = None if adapter is None else "measured"
    loaded = load(
        model,
        context=work.context,
        kv_tokens=work.kv_tokens,
        max_num_seqs=work.max_num_seqs,
        adapters={} if adapter is None or name is None else {name: adapter},
        progress=progress,
        **options,  # type: ignore[arg-type]
    )
    return Loaded(
        name=str(loaded.path) if adapter is None else f"{loaded.path} with {adapter}",
        transformer=loaded.transformer,
        experts=ExpertFormat(loaded.experts),
        policy=loaded.policy,
        options=loaded.plan.options,
        planned_bytes=loaded.plan.total,
        load_seconds=time.perf_counter() - start,
        adapters=loaded.adapter_set,
        adapter=name,
    )


def synthetic(
    name: str,
    config: ModelConfig,
    work: Workload,
    *,
    dense: str | None = None,
    kv_dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Loaded:
    """A model of this shape with random weights, made in memory: nothing is downloaded or written.

    Raises BackendError without native kernels, OutOfMemoryError with the numbers where it does not fit.
    """
    policy = decide(config, device="cpu", dense=dense, kv_dtype=kv_dtype, threads=threads)
    if policy.dense is None:
        raise BackendError("random weights are made for the native CPU kernels, and they do not run here")
    plan = fitting_plan(
        config,
        ExpertFormat.MXFP4,
        policy,
        context=work.context,
        kv_tokens=work.kv_tokens,
        max_num_seqs=work.max_num_seqs,
    )
    logger.log(NOTICE, "memory: %s of %s free", plan.describe(), gib(free_memory(policy)))
    start = time.perf_counter()
    use_threads(policy.threads)
    table: Mapping[str, Weight] = random_packed_table(config, policy.dense, progress=progress)
    transformer = Transformer(config, table, dtype=policy.dtype, device=policy.device, kv_type=policy.kv)
    return Loaded(
        name=f"{name}, random weights",
        transformer=transformer,
        experts=ExpertFormat.MXFP4,
        policy=policy,
        options=plan.options,
        planned_bytes=plan.total,
        load_seconds=time.perf_counter() - start,
    )


def measure(loaded: Loaded, work: Workload, *, progress: Progress = no_progress) -> Bench:
    """Medians over the rounds for every prompt length, depth and number of streams, on a model loaded for this work."""
    prompts, depths, generate, rounds = work.prompts, work.depths, work.generate, work.rounds
    config = loaded.transformer.config
    macs = macs_per_token(config)
    bounds = _Bounds(loaded)
    timed = TimedRuns(
        loaded.transformer,
        loaded.options,
        num_tokens=min(config.vocab_size, RANDOM_EMBEDDINGS),
        adapters=loaded.adapters,
        adapter=loaded.adapter,
    )
    prefill_runs = {(tokens, depth): _Runs() for depth in depths for tokens in prompts}
    decode_runs = {depth: _Runs() for depth in depths}
    streams: dict[int, list[Together]] = {count: [] for count in work.concurrency}
    steps, done = rounds * (len(prefill_runs) + len(decode_runs) + len(streams)), 0
    for _ in range(rounds):  # all of them in each round: a machine that slows down for a while slows down everything
        for (tokens, depth), runs in prefill_runs.items():
            runs.add(tokens * macs, timed.prefill(tokens, depth), bounds.macs())
            progress("measuring", done := done + 1, steps)
        for depth, runs in decode_runs.items():
            read = generate * bytes_per_token(loaded, depth)
            runs.add(read, timed.decode(generate, depth), bounds.bandwidth())
            progress("measuring", done := done + 1, steps)
        for count, rounds_of_it in streams.items():
            rounds_of_it.append(timed.together(count, prompts[0], generate))
            progress("measuring", done := done + 1, steps)
    peak_rss = machine.process_status().get("VmHWM", 0)  # before the machine's own figures take memory
    bounds.complete()
    least_deep = decode_runs[min(depths)]
    return Bench(
        model=loaded.name,
        policy=loaded.policy.describe(loaded.experts.value),
        cpu=machine.cpu_name(),
        load_seconds=loaded.load_seconds,
        bytes_per_token=bytes_per_token(loaded, 0),
        macs_per_token=macs,
        read_bandwidth=bounds.median_bandwidth,
        peak_macs=bounds.median_macs,
        planned_bytes=loaded.planned_bytes,
        peak_rss_bytes=peak_rss,
        prefill=[
            Prefill(
                tokens=tokens,
                depth=depth,
                prefill_tok_s=tokens / runs.seconds,
                gmac_s=runs.rate / 1e9,
                share_of_peak=runs.share_of(bounds.median_macs),
            )
            for (tokens, depth), runs in prefill_runs.items()
        ],
        decode=[
            Decode(
                tokens=generate,
                depth=depth,
                decode_tok_s=generate / runs.seconds,
                gb_s=runs.rate / 1e9,
                share_of_bandwidth=runs.share_of(bounds.median_bandwidth),
                share_of_least_depth=runs.speed_beside(least_deep),
            )
            for depth, runs in decode_runs.items()
        ],
        streams=[_streams(runs, prompts[0], generate) for runs in streams.values()],
    )


def _streams(runs: Sequence[Together], prompt: int, tokens: int) -> Streams:
    count = len(runs[0].stats)
    every = [stats for run in runs for stats in run.stats]
    between = [stats.seconds_per_token for stats in every if stats.seconds_per_token is not None]
    return Streams(
        streams=count,
        prompt=prompt,
        tokens=tokens,
        generated_tok_s=count * tokens / statistics.median(run.seconds for run in runs),
        first_token_seconds=statistics.median(stats.first_token_seconds or 0.0 for stats in every),
        seconds_per_token=statistics.median(between) if between else None,
    )


class _Runs:
    """The same work, once a round, with what the machine could do at that moment."""

    def __init__(self) -> None:
        self._work = 0
        self._seconds: list[float] = []
        self._bounds: list[float | None] = []

    def add(self, work: int, seconds: float, bound: float | None) -> None:
        self._work = work
        self._seconds.append(seconds)
        self._bounds.append(bound)

    @property
    def seconds(self) -> float:
        return statistics.median(self._seconds)

    @property
    def rate(self) -> float:
        return self._work / self.seconds

    def share_of(self, bound: float | None) -> float | None:
        """The median share of the bounds met in each round, or else of `bound`."""
        pairs = ((seconds, then or bound) for seconds, then in zip(self._seconds, self._bounds, strict=True))
        shares = [self._work / seconds / limit for seconds, limit in pairs if limit]
        return statistics.median(shares) if shares else None

    def speed_beside(self, other: "_Runs") -> float:
        return statistics.median(b / a for a, b in zip(self._seconds, other._seconds, strict=True))


class _Bounds:
    """What this machine can do, measured between the model's own runs, since it changes from minute to minute.

    The bandwidth is that of reading the model's own weights, if there are more of them than caches hold. If not, it is
    measured once at the end, on memory of its own.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._native = backends.native() if loaded.policy.native else None
        self._weights = _more_than_caches_hold(loaded.transformer)
        self._bandwidths: list[float] = []
        self._macs: list[float] = []

    def macs(self) -> float | None:
        if self._native is None:
            return None
        self._macs.append(self._native.dot_rate())
        return self._macs[-1]

    def bandwidth(self) -> float | None:
        if self._native is None or not self._weights:
            return None
        seconds = sum(data.nbytes / self._native.read_bandwidth(data) for data in self._weights)
        self._bandwidths.append(sum(data.nbytes for data in self._weights) / seconds)
        return self._bandwidths[-1]

    def complete(self) -> None:
        if self._native is None or self._bandwidths:
            return
        buffer = torch.ones(min(_BANDWIDTH_BYTES, machine.available_memory() // 4), dtype=torch.uint8)
        self._bandwidths = [self._native.read_bandwidth(buffer) for _ in range(_BANDWIDTH_ROUNDS)]

    @property
    def median_bandwidth(self) -> float | None:
        return statistics.median(self._bandwidths) if self._bandwidths else None

    @property
    def median_macs(self) -> float | None:
        return statistics.median(self._macs) if self._macs else None


def _more_than_caches_hold(transformer: Transformer) -> list[Tensor]:
    """Packed weights of _BANDWIDTH_BYTES or a little more; none where there are fewer."""
    found: list[Tensor] = []
    for layer in transformer.layers:
        if sum(data.nbytes for data in found) >= _BANDWIDTH_BYTES:
            return found
        if isinstance(layer.experts.gate_up, PackedMatrix):
            found.append(layer.experts.gate_up.data)
    return []


def macs_per_token(config: ModelConfig) -> int:
    """Multiply-adds with weights for one prompt token: all but the output layer, which runs for the last token only."""
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    attention = D * (N + 2 * K) * H + N * H * D + D * config.num_experts
    return config.num_layers * (attention + config.num_active_experts * 3 * config.expert_width * D)


def bytes_per_token(loaded: Loaded, depth: int) -> int:
    """Weights and cache that decoding one token has to read, in the forms they are kept in."""
    transformer, config = loaded.transformer, loaded.transformer.config
    share = config.num_active_experts / config.num_experts
    total = float(_bytes(transformer.unembedding_VD))
    for layer in transformer.layers:
        total += sum(
            _bytes(linear.weight_OD) for linear in (layer.attention.qkv, layer.attention.o, layer.experts.router)
        )
        total += share * (_bytes(layer.experts.gate_up) + _bytes(layer.experts.down))
    per_row = kv_bytes_per_token(loaded.policy.kv, config.num_kv_heads, config.head_dim)
    rows = sum(depth if window is None else min(window, depth) for window in config.windows)
    return round(total) + rows * per_row


def _bytes(weight: Weight) -> int:
    return weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes


def check_chart(path: Path) -> None:
    """Before minutes of measuring: raises BackendError where matplotlib is missing, DiskError where there is no such
    folder."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError("a chart needs matplotlib, which is not installed; run pip install 'freehold[bench]'")
    if not path.parent.is_dir():
        raise DiskError(f"{path} cannot be written: there is no folder {path.parent}; make it first")


def write_chart(bench: Bench, path: Path) -> None:
    """Bars of prefill and decode beside their bounds, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [f"{row.tokens} at {row.depth}" for row in bench.prefill]
    left.bar(labels, [row.prefill_tok_s for row in bench.prefill], color="tab:blue")
    left.set(title="prefill", ylabel="tokens a second", xlabel="prompt tokens at depth")
    if bench.peak_macs:
        left.axhline(bench.peak_macs / bench.macs_per_token, color="gray", linestyle="--", label="int8 multiply-adds")
        left.legend()
    right.bar([str(row.depth) for row in bench.decode], [row.decode_tok_s for row in bench.decode], color="tab:orange")
    right.set(title="decode", ylabel="tokens a second", xlabel="depth")
    if bench.read_bandwidth:
        right.axhline(
            bench.read_bandwidth / bench.bytes_per_token, color="gray", linestyle="--", label="memory bandwidth"
        )
        right.legend()
    figure.suptitle(bench.model, fontsize=10)
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
