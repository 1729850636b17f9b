"""An adapter folded into its model: a new checkpoint in which every weight is the old one plus the adapter's share.

What the adapter leaves alone keeps its bytes: tensors that it does not target, and every expert of which a factor is
zero. What it changes is computed in float32 and stored in the checkpoint's types. In MXFP4 nearly all of that would
vanish, since the base's numbers lie on that format's grid and a change is mostly far smaller than half of a step there:
so numbers are rounded up or down by chance, in proportion to what is nearer. The mean of many is then what it should
be, where rounding to the nearest would leave all of them where they were (docs/performance.md has the figures).

Refuses adapters of other models, and writes whole checkpoints or none. `freehold merge` calls this; what a merge cost
is measured in session/merge_receipt.py. GGUF files are made of what is written here (gguf.py).
"""

from pathlib import Path

from freehold.config import ExpertFormat, Layout, Rounding
from freehold.errors import UsageError
from freehold.hub import default_base
from freehold.hub.convert import side_files, write_folder
from freehold.hub.find import DEFAULT, DEFAULT_BASE
from freehold.hub.merged import MergedSource, RandomlyRounded, Touched
from freehold.log import Progress, no_progress
from freehold.model.peft_files import CONFIG_FILE, base_model_of, read_peft
from freehold.weights.layouts import open_checkpoint

_CARD = "README.md"


def merge(
    source: Path,
    adapter: Path,
    destination: Path,
    *,
    layout: Layout = Layout.HF,
    experts: ExpertFormat | None = None,
    rounding: Rounding = Rounding.RANDOM,
    progress: Progress = no_progress,
) -> Touched:
    """Write the model in `source` with the adapter in `adapter` folded in to the new folder `destination`.

    `experts` None keeps their format. With an adapter that learnt Harmony, a template for something else stays behind.
    Raises what `read_peft` raises, and UnsupportedError where the layout cannot express the model.
    """
    checkpoint = open_checkpoint(source)
    experts = experts or checkpoint.experts
    factors = read_peft(adapter, checkpoint.config)
    if factors.dithered and rounding is not Rounding.RANDOM:
        raise UsageError(
            f"{adapter} was trained with --qat for one way of rounding, and would lose by {rounding.value}; leave "
            "--rounding out"
        )
    at_random = experts is ExpertFormat.MXFP4 and rounding is Rounding.RANDOM
    weights = (RandomlyRounded if at_random else MergedSource)(
        checkpoint.table(), factors, origin=f"{source} with {adapter}"
    )
    write_folder(
        checkpoint,
        weights,
        destination,
        layout=layout,
        experts=experts,
        side_files=_side_files(source, adapter, factors.harmony),
        progress=progress,
    )
    return weights.touched()


def check_base(adapter: Path, model: str, folder: Path) -> None:
    """Raise UsageError where an adapter names another base model than the one that was asked for as `model`."""
    if (named := other_base(adapter, model, folder)) is not None:
        raise UsageError(
            f"{adapter / CONFIG_FILE} says that the adapter is for {named!r:.200}, and the model is {model!r} "
            f"({folder}); name that model, or --any-base if it is the same under another name"
        )


def other_base(adapter: Path, model: str, folder: Path) -> str | None:
    """The base model that an adapter names, where that is another one."""
    if (named := base_model_of(adapter)) is None:
        return None
    # Folders are moved, and the hub's names have owners: the last part of a name is what stays.
    known = {_last_part(str(folder)), *map(_hub_name, folder.parts)}
    if model != DEFAULT:  # what that stands for changes with every tuning
        known.add(_last_part(model))
    if folder == default_base.folder():
        known.add(DEFAULT_BASE)
    return None if _last_part(named) in known else named


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _hub_name(part: str) -> str:
    """Of a folder in Hugging Face's cache, models--owner--name."""
    return part.rpartition("--")[2].lower() if part.startswith("models--") else ""


def _side_files(source: Path, adapter: Path, harmony: bool | None) -> dict[str, bytes]:
    files = side_files(source, harmony=harmony)
    if _CARD in files:
        note = f"\n\n**Merged.** `freehold merge` folded the adapter `{adapter.absolute().name}` into these weights.\n"
        files[_CARD] += note.encode()
    return files
