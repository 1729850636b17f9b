"""`freehold tune`: teach a model by examples."""

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import Dense, Device, Dtype, ModelOption, Threads
from freehold.errors import UsageError
from freehold.train.options import (
    DEFAULT_RANK,
    DEFAULT_TARGETS,
    LEARNING_RATES,
    DpoOptions,
    FullOptions,
    LoopOptions,
    LoraOptions,
    lora_targets,
    option_name,
    trained_groups,
)

_LOOP, _DPO = LoopOptions(), DpoOptions()
_TENTH = "ten times in all"


def _learning_rates() -> str:
    return ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())


def command(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILES", help="Examples: .jsonl in OpenAI's shape, or .txt as plain text."),
    ] = None,
    model: ModelOption = "default",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="A new folder for the run and the adapter.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a run that was stopped or killed, as it began.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: show what would be learnt, and what it takes.")
    ] = False,
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples to measure on, and never to learn from.")
    ] = None,
    validation_share: Annotated[float, typer.Option(help="This share of the lines is for that instead.")] = 0.0,
    harmony: Annotated[
        bool | None,
        typer.Option(help="Write chats in Harmony, or by the model's template. Default: what the model was made for."),
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(metavar="YYYY-MM-DD", help="The day that Harmony's system message names.", show_default="today"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="lora|dpo|full",
            help="An adapter learns what examples say; or from preference pairs which of two answers is better; or all "
            "weights learn.",
        ),
    ] = "lora",
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Begin with what this adapter has learnt, with its targets, ranks and rsLoRA, in the chat format that "
            "it learnt.",
            show_default="a new one",
        ),
    ] = None,
    beta: Annotated[float, typer.Option(help="DPO's: the higher, the nearer to the model as it was.")] = _DPO.beta,
    label_smoothing: Annotated[
        float, typer.Option(help="DPO's: the share of pairs that are taken to be the wrong way round.")
    ] = _DPO.label_smoothing,
    qat: Annotated[
        bool,
        typer.Option("--qat", help="Train on weights that are merged and rounded: `freehold merge` loses nothing."),
    ] = False,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="What learns with --method full: attention, router, experts, norms, embedding.", show_default="all"
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What adapters change: q, k, v, o, router, gate_up, down.", show_default=",".join(DEFAULT_TARGETS)
        ),
    ] = None,
    rank: Annotated[
        list[str] | None, typer.Option(help="Of adapters; `gate_up=8` for one target.", show_default=str(DEFAULT_RANK))
    ] = None,
    alpha: Annotated[list[str] | None, typer.Option(help="The same for alpha.", show_default="twice the rank")] = None,
    router: Annotated[bool, typer.Option("--router", help="Adapt the router, too.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Divide alpha by the root of the rank.")] = False,
    dropout: Annotated[float, typer.Option(help="Of what adapters read.")] = 0.0,
    balance: Annotated[
        float, typer.Option(help="Weight of a term that keeps experts evenly used; 0.01 is usual.")
    ] = 0.0,
    epochs: Annotated[float, typer.Option(help="How often to go through all examples.")] = _LOOP.epochs,
    max_steps: Annotated[int | None, typer.Option(help="So many steps, whatever the epochs.")] = _LOOP.max_steps,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a row. Examples share rows; longer ones are cut.")
    ] = _LOOP.max_length,
    batch_size: Annotated[int, typer.Option(help="Rows of a step, computed one after another.")] = _LOOP.batch_size,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="At its highest.", show_default=_learning_rates()),
    ] = None,
    warmup_ratio: Annotated[float, typer.Option(help="The share of the steps in which it rises.")] = _LOOP.warmup_ratio,
    min_lr_ratio: Annotated[
        float, typer.Option(help="Where the cosine ends, as a share of the highest.")
    ] = _LOOP.min_lr_ratio,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = _LOOP.weight_decay,
    adam_beta1: Annotated[float, typer.Option(help="AdamW's.")] = _LOOP.adam_beta1,
    adam_beta2: Annotated[float, typer.Option(help="AdamW's.")] = _LOOP.adam_beta2,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = _LOOP.max_grad_norm,
    eval_steps: Annotated[
        int | None, typer.Option(help="Measure the validation loss every so many steps.", show_default=_TENTH)
    ] = _LOOP.eval_steps,
    save_steps: Annotated[
        int | None, typer.Option(help="Write a checkpoint every so many steps.", show_default=_TENTH)
    ] = _LOOP.save_steps,
    save_total_limit: Annotated[
        int, typer.Option(help="Keep so many checkpoints, the best, and the last good one.")
    ] = _LOOP.save_total_limit,
    patience: Annotated[
        int | None, typer.Option(help="Stop when the validation loss has not fallen so many times.")
    ] = _LOOP.patience,
    checkpointing: Annotated[
        str,
        typer.Option(
            metavar="auto|on|off", help="Compute activations twice, to save memory; auto: where they do not fit."
        ),
    ] = _LOOP.checkpointing,
    seed: Annotated[int, typer.Option(help="The same seed gives the same losses.")] = _LOOP.seed,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write for TensorBoard, too, in DIR/tensorboard.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    dense: Dense = None,
    threads: Threads = None,
) -> None:
    """Teach a model by examples, as a LoRA adapter over the weights as they are served, experts included.

    \b
    freehold tune chats.jsonl --dry-run
    freehold tune chats.jsonl --output my-adapter
    freehold tune chats.jsonl book.txt --validation-share 0.05 --patience 3 --output my-adapter
    freehold tune more-chats.jsonl --adapter my-adapter --output my-second-adapter
    freehold tune pairs.jsonl --method dpo --beta 0.1 --output my-adapter
    freehold tune chats.jsonl --method full --output my-model
    freehold tune --resume my-adapter
    """
    if dry_run and resume is not None:
        raise UsageError("--dry-run shows a run that has not begun; leave it or --resume out")
    if resume is None and output is None and not dry_run:
        raise UsageError("there is no --output; name a folder for the adapter, or look first with --dry-run")
    if resume is not None and output is not None and output.absolute() != resume.absolute():
        raise UsageError(f"--resume goes on in {resume}; leave --output {output} out")
    for_adapters = [name for name in _FOR_ADAPTERS if _is_typed(context, name)]
    if method == "full" and for_adapters:
        raise UsageError(f"{option_name(for_adapters[0])} is for adapters, and --method full has none; leave one out")
    for name, of_method in _FOR_METHODS.items():
        if resume is None and method != of_method and _is_typed(context, name):
            raise UsageError(f"{option_name(name)} is for --method {of_method}; add that, or leave it out")
    if resume is None and eval_steps is not None and validation is None and not validation_share:
        raise UsageError(
            "--eval-steps says how often the validation loss is measured, and there is none; give --validation FILE or "
            "--validation-share"
        )
    of_new = [name for name in _FOR_NEW_ADAPTERS if _is_typed(context, name)]
    if adapter is not None and of_new:
        raise UsageError(f"{option_name(of_new[0])} is for new adapters, and {adapter} has its own; leave one out")
    lora = LoraOptions(
        targets=() if adapter is not None else lora_targets(target or (), rank or (), alpha or (), router=router),
        rslora=rslora,
        dropout=dropout,
        balance=balance,
        qat=qat,
    )
    full = FullOptions(train=trained_groups(train or ()), balance=balance if method == "full" else 0.0)
    loop = LoopOptions(
        epochs=epochs,
        max_steps=max_steps,
        max_length=max_length,
        batch_size=batch_size,
        learning_rate=LEARNING_RATES.get(method, _LOOP.learning_rate) if learning_rate is None else learning_rate,
        warmup_ratio=warmup_ratio,
        min_lr_ratio=min_lr_ratio,
        weight_decay=weight_decay,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        max_grad_norm=max_grad_norm,
        eval_steps=eval_steps,
        save_steps=save_steps,
        save_total_limit=save_total_limit,
        patience=patience,
        checkpointing=checkpointing,
        seed=seed,
    )
    from freehold.cli.tuning import print_dry_run, tuning_screen
    from freehold.log import NOTICE, logger
    from freehold.session.memory import free_memory
    from freehold.train import curves, run
    from freehold.train.card import chat_command
    from freehold.train.loop import End

    if resume is None:
        if output is not None:
            run.check_new(output)
        request = run.TuneRequest(
            model=model,
            files=tuple(files or ()),
            method=method,
            adapter=adapter,
            validation_file=validation,
            validation_share=validation_share,
            harmony=harmony,
            date=date,
            loop=loop,
            lora=lora,
            full=full,
            dpo=DpoOptions(beta=beta, label_smoothing=label_smoothing),
            device=device,
            dtype=dtype,
            dense=dense,
            threads=threads,
        )
    else:
        asked = {
            "files": [run.location(path) for path in files or ()],
            "adapter": None if adapter is None else run.location(adapter),
            "validation_file": None if validation is None else run.location(validation),
            "targets": [list(each) for each in lora.targets],
            "train": list(full.train),
            **{name: context.params[name] for name in _AS_THEY_ARE},
            "model": run.model_location(model),
        }
        request = run.resumed_request(resume, {name: asked[name] for name in _given(context)})
    folder = output if resume is None else resume
    if tensorboard:
        curves.check_tensorboard()
    with terminal.progress_bars() as progress:
        prepared = run.prepare(request, progress)
    if dry_run:
        print_dry_run(prepared)
        return
    assert folder is not None
    plan = prepared.plan()
    logger.log(NOTICE, "memory: %s of %s free", plan.describe(), terminal.gib(free_memory(prepared.policy)))
    with terminal.progress_bars() as progress:
        if resume is None:
            run.new_run(prepared, folder, progress)
        else:
            run.check_unchanged(prepared, folder, progress)
    with _stops() as should_stop, tuning_screen(prepared) as screen:
        reports = [screen.report]
        if tensorboard:
            reports.append(curves.tensorboard(folder / "tensorboard"))
        outcome = run.train(
            prepared, folder, reports=reports, progress=screen.progress, should_stop=lambda: bool(should_stop)
        )
    if outcome.end is End.STOPPED:
        terminal.say(f"stopped after step {outcome.state.step}; go on with: freehold tune --resume {folder}")
        sys.exit(128 + should_stop[0])
    if not curves.can_draw():
        terminal.say(curves.NO_CHART)
    if request.method == "full":
        terminal.say(f"{folder / run.MODEL_FOLDER} holds the model; {folder / 'README.md'} says what it is")
        terminal.say(f"  freehold chat --model {folder / run.MODEL_FOLDER}")
        return
    terminal.say(f"{folder} holds the adapter; its README.md says what it is")
    terminal.say(f"  {chat_command(folder, request.model)}")
    terminal.say(f"  freehold merge {request.model} {folder} NEW-MODEL")


_AS_THEY_ARE = (
    "model", "method", "beta", "label_smoothing",
    "validation_share", "harmony", "date", "qat", "rslora", "dropout", "balance", "device", "dtype", "dense",
    "threads", *(field.name for field in dataclasses.fields(LoopOptions)),
)  # fmt: skip
_FOR_NEW_ADAPTERS = ("target", "rank", "alpha", "router", "rslora")
_FOR_METHODS = {"beta": "dpo", "label_smoothing": "dpo", "train": "full"}
_FOR_ADAPTERS = ("adapter", *_FOR_NEW_ADAPTERS, "dropout")
_MADE_OF = {
    "target": "targets", "rank": "targets", "alpha": "targets", "router": "targets", "validation": "validation_file",
    "files": "files", "train": "train", "adapter": "adapter",
}  # fmt: skip
"""Parameters that a run's folder keeps under another name, or together."""


def _given(context: typer.Context) -> list[str]:
    """What of a run was typed, by the names that its folder has."""
    known = _MADE_OF | {name: name for name in _AS_THEY_ARE}
    names = []
    for parameter, name in known.items():
        if _is_typed(context, parameter) and name not in names:
            names.append(name)
    return names


def _is_typed(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def _stops() -> Iterator[list[int]]:
    """Fills with the signal that asks to stop: Ctrl-C, or SIGTERM. The second one ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        terminal.say("stopping; what is under way is left out (again: at once)")

    # Who started us in the background, and wants no Ctrl-C to reach us, has said so.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
