"""Rewrite a model in another published layout or expert format, whole or not at all."""

import shutil
from pathlib import Path

from freehold.config import ExpertFormat, Layout
from freehold.disk import new_folder
from freehold.hub.folder import SIDE_FILES
from freehold.log import Progress, no_progress
from freehold.weights.layouts import (
    TableSource,
    config_json,
    num_bytes_to_write,
    open_checkpoint,
    write_checkpoint,
)


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
    experts = experts or checkpoint.experts
    config_json(checkpoint.config, layout, experts)
    needed = num_bytes_to_write(checkpoint.config, experts, dense_bytes=checkpoint.dense_bytes)
    with new_folder(destination, needed_bytes=needed) as folder:
        table = TableSource(checkpoint.table())
        write_checkpoint(folder, checkpoint.config, table, layout=layout, experts=experts, progress=progress)
        for name in SIDE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
