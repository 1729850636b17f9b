"""`freehold pack`: lay a model's weights out for the CPU kernels before they are first used."""

import time
from typing import Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import Dense, ModelArgument


def command(
    model: ModelArgument,
    dense: Dense = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is there in full, and pack again if a byte is wrong.")
    ] = False,
) -> None:
    """Write the packed weights that loading maps, unless they are there, and print where.

    \b
    freehold pack default
    freehold pack openai/gpt-oss-20b --dense bf16
    freehold pack default --verify
    """
    from freehold.hub.find import find_model
    from freehold.weights.layouts import open_checkpoint
    from freehold.weights.pack_file import DEFAULT_DENSE, dense_form, ensure_packed

    form = dense_form(dense or DEFAULT_DENSE)
    with terminal.progress_bars() as progress:
        checkpoint = open_checkpoint(find_model(model, progress))
        started = time.perf_counter()
        packed = ensure_packed(checkpoint, form, verify=verify, progress=progress)
    seconds = time.perf_counter() - started
    done = f"packed in {seconds:.1f} s" if packed.is_new else "were packed already"
    checked = ", and every byte is as it was written" if verify else ""
    terminal.say(f"{terminal.gib(packed.num_bytes)} of weights {done}{checked}")
    terminal.write(f"{packed.path}\n")
