"""What a gradient through packed weights costs: multiply-adds a second of `linear`'s backward pass beside its forward.

    python bench/backward.py [--rounds 5] [--threads 1]

Two shapes of gpt-oss-20b and one of the default model, for every instruction set of this machine. Forward and backward
take turns, a median of rounds counts. Nothing here needs a checkpoint: the weights are random.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from freehold import _native
from freehold.kernels import backends, native
from freehold.weights import mxfp4
from freehold.weights.packed import Form, pack

CASES: tuple[tuple[Form, int, int, int], ...] = (  # form, rows, columns, tokens
    ("mxfp4", 5760, 2880, 512),
    ("mxfp4", 5760, 2880, 64),
    ("q8", 4096, 2880, 512),
    ("q8", 49152, 576, 512),
    ("mxfp4", 3072, 576, 64),
)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rates(form: Form, R: int, C: int, T: int, rounds: int) -> dict[str, tuple[float, float]]:
    """G multiply-adds a second, forward and backward, of each instruction set."""
    values = torch.randn(R, C)
    weight = pack(mxfp4.pack(values) if form == "mxfp4" else values, form)
    x, gradient = torch.randn(T, C), torch.randn(T, R)
    found = {}
    for name in _native.instruction_sets()[1:] or ["scalar"]:  # scalar comes first, and takes a hundred times as long
        _native.use_instruction_set(name)
        taken = [
            (
                seconds(lambda: native.linear(x, weight, None, None, 0.0, None)),
                seconds(lambda: native.linear_backward(gradient, weight)),
            )
            for _ in range(rounds + 1)
        ][1:]  # the first warms up
        forward, backward = (T * R * C / 1e9 / statistics.median(times) for times in zip(*taken, strict=True))
        found[name] = forward, backward
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=native.threads())
    options = parser.parse_args()
    native.set_threads(options.threads)
    sys.stdout.write(f"{options.threads} threads; G multiply-adds a second, medians of {options.rounds}\n")
    with backends.one_torch_thread(), torch.no_grad():
        for form, R, C, T in CASES:
            for name, (forward, backward) in rates(form, R, C, T, options.rounds).items():
                sys.stdout.write(
                    f"{form:5} {R:6} x {C} {T:4} tokens  {name:7} forward {forward:6.1f}  backward {backward:6.1f}"
                    f"  backward / forward {backward / forward:.2f}\n"
                )


if __name__ == "__main__":
    main()
