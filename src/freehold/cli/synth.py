"""`freehold synth`: a random checkpoint of a given size."""

from pathlib import Path
from typing import Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import Destination
from freehold.config import NAMED_CONFIGS, ExpertFormat, Layout
from freehold.errors import UsageError


def command(
    size: Annotated[str, typer.Argument(help="gpt-oss-20b, gpt-oss-120b, tiny, or the path of a config.json.")],
    folder: Destination,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    layout: Annotated[Layout, typer.Option(help="Hugging Face's names, or OpenAI's original ones.")] = Layout.HF,
    experts: Annotated[ExpertFormat, typer.Option(help="How experts are stored.")] = ExpertFormat.MXFP4,
    shard_gb: Annotated[float, typer.Option(help="Size of a file at most, in GB.", min=0.001, max=1e6)] = 5.0,
) -> None:
    """Write random weights of any gpt-oss shape, for tests and for measuring speed.

    \b
    freehold synth tiny /tmp/tiny-model
    freehold synth gpt-oss-20b /data/random-20b
    """
    from freehold.weights.layouts import read_config
    from freehold.weights.synth import write_random_checkpoint

    if size in NAMED_CONFIGS:
        config = NAMED_CONFIGS[size]
    elif Path(size).is_file():
        _, config = read_config(Path(size))
    else:
        raise UsageError(f"size {size!r} is neither one of {', '.join(NAMED_CONFIGS)} nor the path of a config.json")
    with terminal.progress_bars() as progress:
        write_random_checkpoint(
            folder,
            config,
            seed=seed,
            layout=layout,
            experts=experts,
            shard_bytes=round(shard_gb * 1e9),
            progress=progress,
        )
    terminal.say(f"random weights of {config.num_parameters / 1e9:.3g} billion parameters are in {folder}")
