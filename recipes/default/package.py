"""Puts a tuned adapter into the package, as what the default model is made of.

    python -m recipes.default.package TUNED

The factors become bfloat16, which is finer than what MXFP4 makes of them. `freehold.hub.default_model.NAME` is to be
counted up with every tuning, so that nobody's cache is taken for it.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

import freehold.hub
from freehold.hub.find import DEFAULT_BASE, find_model
from freehold.model.peft_files import read_peft, write_peft_files
from freehold.weights.layouts import open_checkpoint

ADAPTER = Path(freehold.hub.__path__[0]) / "data" / "default_adapter"
MOST_BYTES = 25_000_000


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="The folder of a run, or of one of its checkpoints.")
    config = open_checkpoint(find_model(DEFAULT_BASE)).config
    adapter = read_peft(parser.parse_args().tuned, config, dtype=torch.bfloat16)
    ADAPTER.mkdir(parents=True, exist_ok=True)
    write_peft_files(ADAPTER, dataclasses.replace(adapter, harmony=True), base_model=DEFAULT_BASE)
    size = sum(path.stat().st_size for path in ADAPTER.iterdir())
    if size > MOST_BYTES:
        sys.exit(f"{ADAPTER} has {size:,} bytes, and may have {MOST_BYTES:,}: tune with a lower --rank")
    sys.stdout.write(f"{ADAPTER}: {size:,} bytes\n")


if __name__ == "__main__":
    main()
