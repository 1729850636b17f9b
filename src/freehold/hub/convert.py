"""Rewrite a model in another published layout or expert format, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from freehold.config import ExpertFormat, Layout
from freehold.disk import new_folder, write_bytes
from freehold.errors import CheckpointError
from freehold.hub.in_harmony import in_harmony
from freehold.log import Progress, no_progress
from freehold.weights.layouts import (
    Checkpoint,
    TableSource,
    WeightSource,
    open_checkpoint,
    tensors_to_write,
    write_checkpoint,
)

SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "README.md", "LICENSE", "USAGE_POLICY",
)  # fmt: skip
"""What belongs to a model besides config.json and tensors; conversions carry these along."""


def convert(
    source: Path,
    destination: Path,
    *,
    layout: Layout,
    experts: ExpertFormat | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write the model in `source` to the new folder `destination`, with its tokeniser, template and licence.

    `experts` None keeps their format. Dense tensors keep their bytes. Raises UnsupportedError before writing where
    the layout cannot express the model.
    """
    checkpoint = open_checkpoint(source)
    table = TableSource(checkpoint.table(), origin=str(source))
    write_folder(
        checkpoint,
        table,
        destination,
        layout=layout,
        experts=experts or checkpoint.experts,
        side_files=side_files(source),
        progress=progress,
    )


def write_folder(
    checkpoint: Checkpoint,
    weights: WeightSource,
    destination: Path,
    *,
    layout: Layout,
    experts: ExpertFormat,
    side_files: Mapping[str, bytes],
    progress: Progress = no_progress,
) -> None:
    """Write a model of the checkpoint's shape, its weights from elsewhere, to the new folder `destination`."""
    needed = sum(tensor.num_bytes for tensor in tensors_to_write(checkpoint.config, weights, layout, experts))
    with new_folder(destination, needed_bytes=needed) as folder:
        write_checkpoint(folder, checkpoint.config, weights, layout=layout, experts=experts, progress=progress)
        for name, content in side_files.items():
            write_bytes(folder / name, content)


def side_files(source: Path, *, harmony: bool | None = None) -> dict[str, bytes]:
    """What belongs to a model besides config.json and tensors: tokeniser, template, licence; in_harmony.py's of one
    that has learnt `harmony` since."""
    contents = {}
    for path in (source / name for name in SIDE_FILES):
        try:
            if path.is_file():
                contents[path.name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return in_harmony(contents, source) if harmony else contents
