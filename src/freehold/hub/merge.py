"""An adapter folded into its model: a new checkpoint in which every weight is the old one plus the adapter's share.

What the adapter leaves alone keeps its bytes: tensors that it does not target, and every expert of which a factor is
zero. What it changes is computed in float32 and stored in the checkpoint's types. In MXFP4 nearly all of that would
vanish, since the base's numbers lie on that format's grid and a change is mostly far smaller than half of a step there:
so numbers are rounded up or down by chance, in proportion to what is nearer. The mean of many is then what it should
be, where rounding to the nearest would leave all of them where they were (docs/performance.md has the figures).

Refuses adapters that do not fit, and writes whole checkpoints or none; whether one is meant for this model, bases.py
knows. `freehold merge` calls this; what a merge cost is measured in session/merge_receipt.py. GGUF files are made of
what is written here (gguf.py).
"""

from collections.abc import Mapping
from pathlib import Path

from freehold.config import ExpertFormat, Layout, Rounding
from freehold.errors import UsageError
from freehold.hub.convert import side_files, write_folder
from freehold.hub.merged import MergedSource, RandomlyRounded, Touched
from freehold.log import Progress, no_progress
from freehold.model.peft_files import read_peft
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
    beside: Mapping[str, bytes] | None = None,
    progress: Progress = no_progress,
) -> Touched:
    """Write the model in `source` with the adapter in `adapter` folded in to the new folder `destination`.

    `experts` None keeps their format. `beside` are the files that are no weights; None takes those of the model, with
    Harmony's template and ends where the adapter learnt Harmony.
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
        side_files=_side_files(source, adapter, factors.harmony) if beside is None else beside,
        progress=progress,
    )
    return weights.touched()


def _side_files(source: Path, adapter: Path, harmony: bool | None) -> dict[str, bytes]:
    files = side_files(source, harmony=harmony)
    if _CARD in files:
        note = f"\n\n**Merged.** `freehold merge` folded the adapter `{adapter.absolute().name}` into these weights.\n"
        files[_CARD] += note.encode()
    return files
