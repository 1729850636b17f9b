"""`freehold convert`: the same model in another layout or expert format."""

from typing import Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import Destination, ModelArgument
from freehold.config import ExpertFormat, Layout


def command(
    source: ModelArgument,
    folder: Destination,
    layout: Annotated[Layout, typer.Option(help="Hugging Face's names, or OpenAI's original ones.")] = Layout.HF,
    experts: Annotated[ExpertFormat | None, typer.Option(help="How experts are stored. Default: as they are.")] = None,
) -> None:
    """Rewrite a model in another published layout or expert format.

    \b
    freehold convert default /tmp/original --layout original
    freehold convert default /tmp/bf16 --experts bf16
    """
    from freehold.hub.convert import convert
    from freehold.hub.find import find_model

    with terminal.progress_bars() as progress:
        convert(
            find_model(source, progress),
            folder,
            layout=layout,
            experts=experts,
            progress=progress,
        )
    terminal.say(f"{folder} is complete")
