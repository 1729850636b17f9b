"""`freehold merge`: an adapter folded into its model, and a receipt of what that kept."""

import dataclasses
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold import __version__
from freehold.cli import terminal
from freehold.cli.convert import check_destination
from freehold.cli.options import DenseOption, DestinationArgument, ExpertsOption, Json, LayoutOption, ModelArgument
from freehold.config import DenseFormat, Layout, Rounding
from freehold.disk import refuse_existing, scratch_folder, write_text
from freehold.errors import CheckpointError, UsageError
from freehold.log import Progress

if TYPE_CHECKING:
    from freehold.hub.merged import Touched
    from freehold.session.merge_receipt import Example, MergeReceipt
    from freehold.train.examples import Examples

RECEIPT_FILE = "merge_receipt.json"


def command(
    model: ModelArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of an adapter, in PEFT's format.")],
    destination: DestinationArgument,
    layout: LayoutOption = None,
    experts: ExpertsOption = None,
    dense: DenseOption = None,
    rounding: Annotated[
        Rounding,
        typer.Option(
            help="Changes too small for MXFP4 are kept in the mean, at random, or lost to the nearest number."
        ),
    ] = Rounding.RANDOM,
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts (.jsonl or .txt) to measure on what the merge kept. Default: what `freehold tune` held out.",
        ),
    ] = None,
    measure_tokens: Annotated[int, typer.Option(help="Measure on so many tokens of them; 0 measures nothing.")] = 4096,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Fold it in even if the adapter names another model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its model: a new checkpoint, or a GGUF file for llama.cpp, that needs no adapter.

    \b
    freehold merge default my-adapter /tmp/merged
    freehold merge default my-adapter /tmp/merged.gguf
    freehold merge default my-adapter /tmp/original --layout original --measure chats.jsonl

    Only experts that the adapter changes are quantised again; all else keeps its bytes. What that kept of what was
    learnt is measured and written down, as merge_receipt.json in the new folder or NAME.merge_receipt.json beside a
    .gguf.
    """
    to_gguf = check_destination(destination, layout, dense)
    receipt_path = (
        destination.with_name(f"{destination.name}.{RECEIPT_FILE}") if to_gguf else destination / RECEIPT_FILE
    )
    refuse_existing(receipt_path)
    from freehold.hub import gguf
    from freehold.hub.bases import check_base
    from freehold.hub.find import find_model
    from freehold.hub.merge import merge
    from freehold.model.peft_files import read_spec
    from freehold.session.merge_receipt import measure_merge
    from freehold.weights.layouts import open_checkpoint

    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress_bars())
        folder = find_model(model, progress)
        if not any_base:
            check_base(adapter, model, folder)
        read_spec(adapter, open_checkpoint(folder).config)  # what cannot be merged is refused before it is measured
        text = _text(folder, adapter, measure, measure_tokens, progress)
        # llama.cpp's file is made of a checkpoint. What is measured is what stays.
        merged = stack.enter_context(scratch_folder(destination)) / "merged" if to_gguf else destination
        touched = merge(
            folder, adapter, merged, layout=layout or Layout.HF, experts=experts, rounding=rounding, progress=progress
        )
        if to_gguf:
            gguf.export(merged, destination, dense=dense or DenseFormat.Q8, progress=progress)
        receipt = None
        if text.examples:
            receipt = measure_merge(folder, adapter, destination, text.examples, progress=progress)
    terminal.say(f"{destination} is complete")
    facts = _facts(model, adapter, rounding, touched, receipt, text)
    write_text(receipt_path, json.dumps(facts, indent=2) + "\n")
    if as_json:
        terminal.write(json.dumps(facts, indent=2) + "\n")
        return
    terminal.write(f"{touched.describe()}\n")
    if receipt is not None:
        terminal.write(_table(receipt))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """What is measured on, `held_out` of its files or the beginning of them all; without examples nothing is."""

    examples: "list[Example]"
    files: "list[dict[str, Any]]" = field(default_factory=list)
    held_out: bool = False


def _text(folder: Path, adapter: Path, measure: Path | None, most_tokens: int, progress: Progress) -> _Text:
    """A file that is given, or what the adapter's own run held out; where there is neither it says so. Raises
    UsageError where the latter has changed since."""
    from freehold.formats.conversation import SystemContent
    from freehold.hub.folder import open_folder
    from freehold.model.peft_files import learnt_harmony
    from freehold.train.data import DataOptions, read_examples
    from freehold.train.examples import Pairs
    from freehold.train.run import RUN_FILE, chat_format_of, check_held_out, file_facts, prepare, recorded_request

    if most_tokens < 0:
        raise UsageError(f"--measure-tokens must be 0 or more, got {most_tokens}")
    if not most_tokens:
        return _Text(examples=[])
    if (request := recorded_request(adapter)) is not None:
        # Its machine may have had another device. Only its texts are wanted.
        request = replace(request, device="cpu", dtype=None, dense=None, threads=None)
        request = replace(request, model=str(folder), loop=replace(request.loop, patience=None))
        if request.adapter is not None:  # which may be gone; this one has the same targets
            request = replace(request, adapter=adapter)
        if measure is not None:
            request = replace(request, files=(measure,), validation_file=None, validation_share=0.0)
        elif request.validation_file is None and not request.validation_share:
            return _nothing_to_measure("the adapter's run held nothing out")
        _check_there(adapter, (*request.files, *filter(None, [request.validation_file])))
        prepared = prepare(request, progress)
        if measure is None:
            check_held_out(prepared, adapter)
        side = prepared.data.training if measure is not None else prepared.data.validation
        return _Text(
            examples=_first_tokens(side.chosen if isinstance(side, Pairs) else side, most_tokens),
            files=prepared.facts["data"]["files" if request.validation_file is None else "validation_files"],
            held_out=measure is None and request.validation_file is None,
        )
    if measure is None:
        return _nothing_to_measure(f"{adapter} has no {RUN_FILE}")
    model = open_folder(folder)
    if model.tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer.json, so it cannot read {measure}; leave --measure out")
    chat_format = chat_format_of(model, model.tokenizer, system=SystemContent.today(), harmony=learnt_harmony(adapter))
    options = DataOptions(max_length=min(most_tokens, model.checkpoint.config.max_context))
    facts = file_facts(measure)
    examples = read_examples([measure], chat_format, model.tokenizer, options, progress).training
    return _Text(examples=_first_tokens(examples, most_tokens), files=[facts])


def _nothing_to_measure(why: str) -> _Text:
    terminal.say(f"{why}, so the merge is not measured; name a file of texts with --measure")
    return _Text(examples=[])


def _check_there(adapter: Path, files: Iterable[Path]) -> None:
    for path in files:
        if not path.is_file():
            raise UsageError(
                f"{path}, on which {adapter} was trained or measured, is not there any more; name a file with "
                "--measure, or measure nothing with --measure-tokens 0"
            )


def _first_tokens(examples: "Examples", most_tokens: int) -> "list[Example]":
    """Whole examples, as long as there is room; at least a part of one. Raises UsageError where no part of that size
    has anything that is learnt."""
    from freehold.train.examples import NO_TARGET

    chosen: list[Example] = []
    for tokens, targets in examples:
        room = most_tokens - sum(len(example[0]) for example in chosen)
        if len(tokens) > room and chosen:
            break
        if any(target != NO_TARGET for target in targets[:room]):
            chosen.append((tokens[:room], targets[:room]))
    if not chosen:
        raise UsageError(f"the first {most_tokens} tokens of no example have any to be learnt; raise --measure-tokens")
    return chosen


def _facts(
    model: str, adapter: Path, rounding: Rounding, touched: "Touched", receipt: "MergeReceipt | None", text: _Text
) -> dict[str, Any]:
    measured = None
    if receipt is not None:
        measured = {**receipt.to_json(), "text": {"files": text.files, "held_out": text.held_out}}
    return {
        "freehold": __version__,
        "model": model,
        "adapter": str(adapter.absolute()),
        "rounding": rounding.value,
        "touched": dataclasses.asdict(touched),
        "measured": measured,
    }


def _table(receipt: "MergeReceipt") -> str:
    rows = [
        ("base", receipt.base_loss, None, None),
        ("with the adapter", receipt.adapter_loss, None, 1.0),
        ("merged, experts bf16", receipt.merged_loss, receipt.merged_kl, receipt.merged_share),
        ("as it was written", receipt.stored_loss, receipt.stored_kl, receipt.stored_share),
    ]
    lines = [
        f"  {'on ' + str(receipt.num_targets) + ' tokens':22}     loss   KL from the adapted   kept of what was learnt"
    ]
    for what, loss, divergence, share in rows:
        kl = "" if divergence is None else f"{divergence:.5f}"
        lines.append(f"  {what:22}   {loss:6.4f}   {kl:>19}   {'' if share is None else f'{share:.1%}':>23}".rstrip())
    return "\n".join(lines) + "\n"
