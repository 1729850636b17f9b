"""`freehold generate`: continue a text, with no conversation around it."""

import sys
from typing import Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import (
    ADAPTER,
    AdapterDir,
    Context,
    Dense,
    Device,
    Dtype,
    KvDtype,
    MaxTokens,
    MinP,
    ModelOption,
    PrefixCacheDir,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from freehold.errors import UsageError


def command(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue. Without it: read from a pipe.")] = None,
    model: ModelOption = "default",
    adapter: AdapterDir = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    dense: Dense = None,
    kv_dtype: KvDtype = None,
    context: Context = None,
    threads: Threads = None,
    prefix_cache_dir: PrefixCacheDir = None,
) -> None:
    """Continue a text: raw completion, no chat format.

    \b
    freehold generate "The three primary colours are" --max-tokens 20
    freehold generate --temperature 0.8 --seed 1 < story.txt
    """
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("there is no text to continue; give it as an argument or through a pipe")
        prompt = terminal.read_stdin()
    from freehold.session.model import load

    with terminal.progress_bars() as progress:
        loaded = load(
            model,
            device=device,
            dtype=dtype,
            dense=dense,
            kv_dtype=kv_dtype,
            context=context,
            threads=threads,
            prefix_cache_dir=prefix_cache_dir,
            adapters={} if adapter is None else {ADAPTER: adapter},
            progress=progress,
        )
    pieces = loaded.stream_text(
        prompt,
        adapter=None if adapter is None else ADAPTER,
        stop=stop or (),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
    )
    try:
        for piece in pieces:
            terminal.write(piece)
        terminal.write("\n")
    except KeyboardInterrupt:
        terminal.write("\n")
        sys.exit(130)
