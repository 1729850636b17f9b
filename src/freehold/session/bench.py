"""How fast a model runs here: prefill and decode at several lengths and depths, held against what the machine can do.

The two bounds are measured in the same run: bytes a second that all threads together read from memory, which limits
decode, and int8 multiply-adds a second on registers alone, which limit prefill. Depth is filled with random keys and
values: what they are does not change the time, and computing them would take minutes.
"""

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
from freehold.errors import BackendError, UsageError
from freehold.kernels import backends
from freehold.kernels.kv import kv_bytes_per_token
from freehold.kernels.ops import Weight
from freehold.log import NOTICE, Progress, logger, no_progress
from freehold.model.kv_cache import KVCache
from freehold.model.transformer import Transformer
from freehold.session.memory import PREFILL_CHUNK, fitting_plan, free_memory, gib
from freehold.session.model import load
from freehold.session.policy import Policy, decide, use_threads
from freehold.weights.synth import RANDOM_EMBEDDINGS, random_packed_table

_BANDWIDTH_BYTES = 1 << 30  # more than caches hold
_BANDWIDTH_ROUNDS = 5
_WARM_UP = 2  # tokens


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
    of weights and cache that a token has to read."""

    tokens: int
    depth: int
    decode_tok_s: float
    gb_s: float
    share_of_bandwidth: float | None


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
    """What is measured: a transformer ready to run, and what is known of it."""

    name: str
    transformer: Transformer
    experts: ExpertFormat
    policy: Policy
    planned_bytes: int
    load_seconds: float


def load_for_bench(model: str, *, context: int, progress: Progress = no_progress, **options: object) -> Loaded:
    """A model as `freehold.load` gives it; `options` are load's."""
    start = time.perf_counter()
    loaded = load(model, context=context, progress=progress, **options)  # type: ignore[arg-type]
    return Loaded(
        name=str(loaded.path),
        transformer=loaded.transformer,
        experts=ExpertFormat(loaded.experts),
        policy=loaded.policy,
        planned_bytes=loaded.plan.total,
        load_seconds=time.perf_counter() - start,
    )


def synthetic(
    name: str,
    config: ModelConfig,
    *,
    context: int,
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
    plan = fitting_plan(config, ExpertFormat.MXFP4, policy, context=min(context, config.max_context))
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
        planned_bytes=plan.total,
        load_seconds=time.perf_counter() - start,
    )


@torch.inference_mode()
def measure(
    loaded: Loaded,
    *,
    prompts: Sequence[int],
    depths: Sequence[int],
    generate: int,
    rounds: int,
    progress: Progress = no_progress,
) -> Bench:
    """Medians of `rounds` for every prompt length and depth. Raises UsageError for values below 1 (depths below 0)."""
    for name, values, least in (
        ("prompt", prompts, 1),
        ("depth", depths, 0),
        ("generate", [generate], 1),
        ("rounds", [rounds], 1),
    ):
        if not values or min(values) < least:
            raise UsageError(f"{name} must be {least} or more, got {', '.join(map(str, values)) or 'nothing'}")
    transformer = loaded.transformer
    longest = max(depths) + max(*prompts, generate + _WARM_UP)
    if longest > transformer.config.max_context:
        raise UsageError(
            f"a depth of {max(depths)} and what comes after it make {longest} tokens, and this model's context is "
            f"{transformer.config.max_context}; choose smaller ones"
        )
    macs = macs_per_token(transformer.config)
    timed_prefill: list[tuple[int, int, float]] = []  # tokens, depth, seconds
    timed_decode: list[tuple[int, float]] = []  # depth, seconds
    steps, done = len(depths) * (len(prompts) + 1) * rounds, 0
    for depth in depths:
        for tokens in prompts:
            seconds = []
            for _ in range(rounds):
                seconds.append(_timed_prefill(transformer, tokens, depth))
                done += 1
                progress("measuring", done, steps)
            timed_prefill.append((tokens, depth, statistics.median(seconds)))
        seconds = []
        for _ in range(rounds):
            seconds.append(_timed_decode(transformer, generate, depth))
            done += 1
            progress("measuring", done, steps)
        timed_decode.append((depth, statistics.median(seconds)))
    peak_rss = machine.process_status().get("VmHWM", 0)  # before the machine's own figures take memory
    bandwidth, peak = _machine(loaded.policy)
    return Bench(
        model=loaded.name,
        policy=loaded.policy.describe(loaded.experts.value),
        cpu=machine.cpu_name(),
        load_seconds=loaded.load_seconds,
        bytes_per_token=bytes_per_token(loaded, 0),
        macs_per_token=macs,
        read_bandwidth=bandwidth,
        peak_macs=peak,
        planned_bytes=loaded.planned_bytes,
        peak_rss_bytes=peak_rss,
        prefill=[
            Prefill(
                tokens=tokens,
                depth=depth,
                prefill_tok_s=tokens / seconds,
                gmac_s=tokens * macs / seconds / 1e9,
                share_of_peak=tokens * macs / seconds / peak if peak else None,
            )
            for tokens, depth, seconds in timed_prefill
        ],
        decode=[
            Decode(
                tokens=generate,
                depth=depth,
                decode_tok_s=generate / seconds,
                gb_s=generate * bytes_per_token(loaded, depth) / seconds / 1e9,
                share_of_bandwidth=generate * bytes_per_token(loaded, depth) / seconds / bandwidth
                if bandwidth
                else None,
            )
            for depth, seconds in timed_decode
        ],
    )


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


def _machine(policy: Policy) -> tuple[float | None, float | None]:
    native = backends.native()
    if not policy.native or native is None:
        return None, None
    size = min(_BANDWIDTH_BYTES, machine.available_memory() // 4)
    buffer = torch.ones(size, dtype=torch.uint8)
    bandwidth = max(native.read_bandwidth(buffer) for _ in range(_BANDWIDTH_ROUNDS))
    return bandwidth, max(native.dot_rate() for _ in range(_BANDWIDTH_ROUNDS))


def _filled_cache(transformer: Transformer, depth: int) -> KVCache:
    cache, config = transformer.new_cache(), transformer.config
    generator = torch.Generator().manual_seed(depth)
    for layer in cache.layers:
        for start in range(0, depth, PREFILL_CHUNK):
            shape = (min(PREFILL_CHUNK, depth - start), config.num_kv_heads, config.head_dim)
            keys, values = (torch.randn(shape, generator=generator).to(transformer.dtype) for _ in range(2))
            layer.append(keys, values)
    cache.length = depth
    return cache


def _timed_prefill(transformer: Transformer, tokens: int, depth: int) -> float:
    cache = _filled_cache(transformer, depth)
    prompt = _random_tokens(transformer, tokens)
    start = time.perf_counter()
    for piece in torch.split(prompt, PREFILL_CHUNK):
        hidden_TD = transformer.forward(piece, cache)
    transformer.unembed(hidden_TD[-1:])
    return time.perf_counter() - start


def _timed_decode(transformer: Transformer, tokens: int, depth: int) -> float:
    cache = _filled_cache(transformer, depth)
    prompt = _random_tokens(transformer, tokens + _WARM_UP)

    def step(i: int) -> None:
        transformer.unembed(transformer.forward(prompt[i : i + 1], cache))

    for i in range(_WARM_UP):
        step(i)
    start = time.perf_counter()
    for i in range(_WARM_UP, tokens + _WARM_UP):
        step(i)
    return time.perf_counter() - start


def _random_tokens(transformer: Transformer, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(min(transformer.config.vocab_size, RANDOM_EMBEDDINGS), (count,), generator=generator)


def write_chart(bench: Bench, path: Path) -> None:
    """Bars of prefill and decode beside their bounds, as a PNG. Raises BackendError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError(
            "a chart needs matplotlib, which is not installed; run pip install 'freehold[bench]'"
        ) from None
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
