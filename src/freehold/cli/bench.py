"""`freehold bench`: how fast a model runs here, or would run."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import Dense, Json, KvDtype, Threads
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
    prompt: Annotated[list[int] | None, typer.Option(help="Prompt length; may be repeated. Default: 512.")] = None,
    generate: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    depth: Annotated[
        list[int] | None, typer.Option(help="Tokens in front of prompt and answer; may be repeated. Default: 0.")
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
    freehold bench --synthetic gpt-oss-20b --prompt 256 --prompt 512 --depth 0 --depth 8192
    """
    from freehold.session import bench

    if synthetic is not None and model is not None:
        raise UsageError(f"name either a model ({model}) or --synthetic {synthetic}, not both")
    if synthetic is not None and synthetic not in NAMED_CONFIGS:
        raise UsageError(f"--synthetic must be one of {', '.join(NAMED_CONFIGS)}, got {synthetic!r}")
    work = bench.Workload(prompts=prompt or [512], depths=depth or [0], generate=generate, rounds=rounds)
    if png is not None:
        bench.check_chart(png)
    with terminal.progress_bars() as progress:
        if synthetic is not None:
            loaded = bench.synthetic(
                synthetic,
                NAMED_CONFIGS[synthetic],
                context=work.context,
                dense=dense,
                kv_dtype=kv_dtype,
                threads=threads,
                progress=progress,
            )
        else:
            loaded = bench.load_for_bench(
                model or "default",
                context=work.context,
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
        of = share(line.share_of_bandwidth, "bandwidth")
        if line.depth != least_depth:
            of += f", {line.share_of_least_depth:.0%} of depth {least_depth}"
        table.add_row(
            "decode", str(line.tokens), str(line.depth), f"{line.decode_tok_s:.2f}", f"{line.gb_s:.1f} GB/s", of
        )
    terminal.write(f"{result.model}\n{result.policy}\n{result.cpu}\n\n")
    Console(highlight=False).print(table)
    bounds = ""
    if result.read_bandwidth and result.peak_macs:
        bandwidth, peak = result.read_bandwidth / 1e9, result.peak_macs / 1e9
        bounds = f"measured here: {bandwidth:.1f} GB/s read, {peak:.0f} G int8 multiply-adds/s\n"
    terminal.write(
        f"\n{bounds}loaded in {result.load_seconds:.1f} s; peak resident memory {terminal.gib(result.peak_rss_bytes)} "
        f"of {terminal.gib(result.planned_bytes)} planned\n"
    )
