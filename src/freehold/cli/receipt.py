"""`freehold receipt`: what the native kernels' number formats cost, measured on a real text."""

import dataclasses
import json
from typing import Annotated

import typer

from freehold.cli import terminal
from freehold.cli.options import Dense, Json, KvDtype, ModelArgument, Threads


def command(
    model: ModelArgument = "default",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Length of the text; may be given several times. Default: 256 and 4096.")
    ] = None,
    dense: Dense = None,
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare a model on the native kernels with the float32 reference: KL divergence, agreement, perplexity.

    \b
    freehold receipt default
    freehold receipt default --dense bf16 --tokens 512
    """
    from freehold.session.model import load
    from freehold.session.receipt import LENGTHS, write_receipts

    with terminal.progress_bars() as progress:
        loaded = load(model, device="cpu", dense=dense, kv_dtype=kv_dtype, threads=threads, progress=progress)
        receipts = write_receipts(loaded, tokens or LENGTHS, progress=progress)
    policy = loaded.policy.describe(loaded.experts)
    if as_json:
        rows = [dataclasses.asdict(receipt) for receipt in receipts]
        terminal.write(json.dumps({"model": str(loaded.path), "policy": policy, "receipts": rows}, indent=2) + "\n")
        return
    terminal.write(f"{loaded.path}\n{policy}\n\n")
    terminal.write("  tokens   mean KL   max KL   same top-1   perplexity: reference   native\n")
    for receipt in receipts:
        terminal.write(
            f"  {receipt.num_tokens:6d}   {receipt.mean_kl:7.5f}   {receipt.largest_kl:6.3f}   "
            f"{receipt.top1_agreement:10.2%}   {receipt.reference_perplexity:21.3f}   "
            f"{receipt.native_perplexity:6.3f}\n"
        )
