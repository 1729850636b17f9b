"""`freehold bench`: how fast a model runs here, or would run."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import AdapterDir, Dense, Json, KvDtype, Threads
from freehold.config import NAMED_CONFIGS
from freehold.errors import UsageError

if TYPE_CHECKING:
    from freehold.session.bench import Bench


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model folder, a name in a cache, or 'default'.")
    ] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Random weights of this shape instead: gpt-oss-20b, gpt-oss-120b or tiny.")
    ] = None,
    adapter: AdapterDir = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt lengths, with commas between several. Default: 512."),
    ] = None,
    generate: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    depth: Annotated[
        list[str] | None, typer.Option(help="Tokens in front of prompt and answer, as above. Default: 0.")
    ] = None,
    concurrency: Annotated[
        list[str] | None, typer.Option(help="Also so many streams at once, with prompts of the first length: 1,8,32.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Every figure is the median of so many.")] = 3,
    dense: Dense = None,
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    png: Annotated[Path | None, typer.Option(help="Draw a chart into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode, beside what this machine's memory and arithmetic allow.

    \b
    freehold bench
    freehold bench --synthetic gpt-oss-20b --prompt 256,512 --depth 0,8192
    freehold bench --prompt 110 --concurrency 1,8,32
    """
    from freehold.session import bench

    if synthetic is not None and model is not None:
        raise UsageError(f"name either a model ({model}) or --synthetic {synthetic}, not both")
    if synthetic is not None and synthetic not in NAMED_CONFIGS:
        raise UsageError(f"--synthetic must be one of {', '.join(NAMED_CONFIGS)}, got {synthetic!r}")
    if synthetic is not None and adapter is not None:
        raise UsageError(f"random weights have no adapter; leave --adapter {adapter} out, or name a model")
    work = bench.Workload(
        prompts=_numbers("prompt", prompt) or [512],
        depths=_numbers("depth", depth) or [0],
        generate=generate,
        rounds=rounds,
        concurrency=_numbers("concurrency", concurrency),
    )
    if png is not None:
        bench.check_chart(png)
    with terminal.progress_bars() as progress:
        if synthetic is not None:
            loaded = bench.synthetic(
                synthetic,
                NAMED_CONFIGS[synthetic],
                work,
                dense=dense,
                kv_dtype=kv_dtype,
                threads=threads,
                progress=progress,
            )
        else:
            loaded = bench.load_for_bench(
                model or "default",
                work,
                adapter=adapter,
                device="cpu",
                dense=dense,
                kv_dtype=kv_dtype,
                threads=threads,
                progress=progress,
            )
        result = bench.measure(loaded, work, progress=progress)
    if as_json:
        facts = {"prefill_tok_s": result.prefill_tok_s, "decode_tok_s": result.decode_tok_s}
        terminal.write(json.dumps(facts | dataclasses.asdict(result), indent=2) + "\n")
    else:
        _print(result)
    if png is not None:
        bench.write_chart(result, png)


def _numbers(name: str, given: list[str] | None) -> list[int]:
    words = [word for option in given or [] for word in option.split(",")]
    try:
        return [int(word) for word in words]
    except ValueError:
        raise UsageError(f"--{name} takes whole numbers, with commas between several, got {','.join(words)}") from None


def _print(result: "Bench") -> None:
    from rich.console import Console
    from rich.table import Table

    def share(value: float | None, of: str) -> str:
        return "" if value is None else f"{value:.0%} {of}"

    table = Table("", "tokens", "depth", "tokens/s", "rate", "of this machine's", box=None, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in result.prefill:
        of = share(row.share_of_peak, "multiply-adds")
        table.add_row(
            "prefill", str(row.tokens), str(row.depth), f"{row.prefill_tok_s:.1f}", f"{row.gmac_s:.1f} GMAC/s", of
        )
    least_depth = min(line.depth for line in result.decode)
    for line in result.decode:
        shares = [share(line.share_of_bandwidth, "bandwidth")]
        if line.depth != least_depth:
            shares.append(f"{line.share_of_least_depth:.0%} of depth {least_depth}")
        of = ", ".join(filter(None, shares))
        table.add_row(
            "decode", str(line.tokens), str(line.depth), f"{line.decode_tok_s:.2f}", f"{line.gb_s:.1f} GB/s", of
        )
    terminal.write(f"{result.model}\n{result.policy}\n{result.cpu}\n\n")
    Console(highlight=False).print(table)
    if result.streams:
        together = Table(
            "streams", "prompt", "tokens", "tokens/s", "first token", "per token", box=None, pad_edge=False
        )
        for column in together.columns:
            column.justify = "right"
        for many in result.streams:
            each = "" if many.seconds_per_token is None else f"{many.seconds_per_token * 1e3:.0f} ms"
            together.add_row(
                str(many.streams), str(many.prompt), str(many.tokens), f"{many.generated_tok_s:.1f}",
                f"{many.first_token_seconds:.2f} s", each,
            )  # fmt: skip
        terminal.write("\n")
        Console(highlight=False).print(together)
    bounds = ""
    if result.read_bandwidth and result.peak_macs:
        bandwidth, peak = result.read_bandwidth / 1e9, result.peak_macs / 1e9
        bounds = f"measured here: {bandwidth:.1f} GB/s read, {peak:.0f} G int8 multiply-adds/s\n"
    terminal.write(
        f"\n{bounds}loaded in {result.load_seconds:.1f} s; peak resident memory {terminal.gib(result.peak_rss_bytes)} "
        f"of {terminal.gib(result.planned_bytes)} planned\n"
    )
