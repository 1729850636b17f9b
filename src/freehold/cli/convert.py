"""`freehold convert`: the same model in another layout or expert format, or as one GGUF file."""

from pathlib import Path

from freehold.cli import terminal
from freehold.cli.options import DenseOption, DestinationArgument, ExpertsOption, LayoutOption, ModelArgument
from freehold.config import DenseFormat, Layout
from freehold.disk import refuse_existing
from freehold.errors import UsageError


def command(
    source: ModelArgument,
    destination: DestinationArgument,
    layout: LayoutOption = None,
    experts: ExpertsOption = None,
    dense: DenseOption = None,
) -> None:
    """Rewrite a model in another layout or expert format, or as a GGUF file for llama.cpp.

    \b
    freehold convert default /tmp/original --layout original
    freehold convert default /tmp/bf16 --experts bf16
    freehold convert default /tmp/model.gguf
    """
    to_gguf = check_destination(destination, layout, dense)
    from freehold.hub import gguf
    from freehold.hub.convert import convert
    from freehold.hub.find import find_model

    with terminal.progress_bars() as progress:
        model = find_model(source, progress)
        if to_gguf:
            gguf.export(model, destination, dense=dense or DenseFormat.Q8, experts=experts, progress=progress)
        else:
            convert(model, destination, layout=layout or Layout.HF, experts=experts, progress=progress)
    terminal.say(f"{destination} is complete")


def check_destination(destination: Path, layout: Layout | None, dense: DenseFormat | None) -> bool:
    """Whether a GGUF file is asked for. Raises UsageError for what is not of that format or there already: before a
    model is fetched."""
    to_gguf = destination.suffix.lower() == ".gguf"
    if to_gguf and layout is not None:
        raise UsageError("--layout is for folders, and a .gguf file has a layout of its own; leave it out")
    if not to_gguf and dense is not None:
        raise UsageError(
            f"--dense is for .gguf files, and {destination} will be a folder, whose dense tensors stay as they are; "
            "leave it out or name a file that ends in .gguf"
        )
    refuse_existing(destination)
    return to_gguf
