"""Freehold's LoRA training beside transformers with PEFT: tokens a second, and peak memory, of the default model.

    python bench/tuning.py [--rounds 2] [--steps 8] [--tokens 1024] [--example 128] [--rank 16] [--threads 2]
                           [--peft-dtype bfloat16]

Both train adapters of one rank on q, k, v, o and on all experts, with AdamW, on the same tokens: examples of one
length, of which the last third is learnt. Freehold trains on its packed MXFP4 weights as `freehold tune` does, a row
of examples side by side; PEFT trains on the same weights written out in bfloat16, which is what it can train on, a
batch of examples. Both compute activations once (no gradient checkpointing). A round starts one process for each; then
they take turns, a step each, while the other waits: on a machine whose speed changes from minute to minute, only steps
that follow one another can be compared. The first step of each warms up; of the pairs' ratios the median counts.
`--peft-dtype float32` lets PEFT compute in what processors without instructions for bfloat16 are faster in. Random
tokens: nothing is learnt from them. Needs transformers and peft. Linux only.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from contest import GIB, ContestError, Worker, machine_line, markdown, positive, spread

_NAMES = ("freehold", "peft")
_KINDS = ("q", "k", "v", "o", "gate_up", "down")


def tokens_of(arguments: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Examples, and how many tokens at the end of each are learnt."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count = arguments.tokens // arguments.example
    drawn = torch.randint(17, 49_000, (count, arguments.example), generator=generator)
    return drawn.tolist(), arguments.example // 3


def freehold_step(arguments: argparse.Namespace) -> Callable[[], object]:
    import torch

    import freehold
    from freehold import machine
    from freehold.model.lora import AdapterSpec, Target, new_adapter
    from freehold.train.examples import NO_TARGET
    from freehold.train.forward import taught
    from freehold.train.packing import PackedRow

    model = freehold.load("default", context=arguments.tokens, threads=arguments.threads)
    # As `freehold tune` has it: the native kernels' threads and torch's would get in each other's way.
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    examples, num_taught = tokens_of(arguments)
    untaught = arguments.example - 1 - num_taught
    row = PackedRow(
        [token for example in examples for token in example],
        [t for example in examples for t in (*[NO_TARGET] * untaught, *example[-num_taught:], NO_TARGET)],
        [len(example) for example in examples],
    )
    target = Target(rank=arguments.rank, alpha=2 * arguments.rank)
    spec = AdapterSpec.of_kinds(model.config, dict.fromkeys(_KINDS, target))
    adapter = new_adapter(model.config, spec, seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters, lr=1e-4)

    def step() -> None:
        (-taught(model.transformer, row, adapter=adapter).log_probs_S.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(arguments: argparse.Namespace) -> Callable[[], object]:
    import warnings

    import peft
    import torch
    from transformers import GptOssForCausalLM

    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    base = GptOssForCausalLM.from_pretrained(
        arguments.folder, dtype=getattr(torch, arguments.peft_dtype), attn_implementation="eager"
    )
    settings = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=[f"{kind}_proj" for kind in "qkvo"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model: Any = peft.get_peft_model(base, settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    examples, num_taught = tokens_of(arguments)
    tokens = torch.tensor(examples)
    labels = tokens.clone()
    labels[:, :-num_taught] = -100

    def step() -> None:
        model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(arguments: argparse.Namespace) -> None:
    """One contestant's process: a step for each line that it reads, with its seconds and the peak of memory so far."""
    step = {"freehold": freehold_step, "peft": peft_step}[arguments.worker](arguments)
    answer({"ready": arguments.worker})
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def answer(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def one_round(arguments: argparse.Namespace, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """What each step of each took, side by side."""
    keys = ("tokens", "example", "rank", "threads", "peft_dtype")
    options = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in keys]
    with ExitStack() as contest:
        workers = {}
        for name in _NAMES:
            command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), *options]
            workers[name] = Worker(name, command, threads=arguments.threads)
            contest.callback(workers[name].close)
        pairs = [{name: worker.ask({}) for name, worker in workers.items()} for _ in range(1 + arguments.steps)]
    return pairs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("rounds", 2), ("steps", 8), ("tokens", 1024), ("example", 128), ("rank", 16)):
        parser.add_argument(f"--{option}", type=positive, default=default)
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--peft-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--worker", choices=_NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    if arguments.tokens % arguments.example:
        parser.error(f"--tokens {arguments.tokens} is no multiple of --example {arguments.example}")

    from freehold.config import ExpertFormat, Layout
    from freehold.hub.convert import convert
    from freehold.hub.default_model import ensure

    with tempfile.TemporaryDirectory(prefix="freehold-") as temporary:
        folder = Path(temporary) / "bfloat16"
        convert(ensure(), folder, layout=Layout.HF, experts=ExpertFormat.BF16)
        pairs = []
        for round_ in range(arguments.rounds):
            try:
                pairs += (found := one_round(arguments, folder))
            except ContestError as error:
                sys.exit(str(error))
            rates = {name: [arguments.tokens / pair[name]["seconds"] for pair in found] for name in _NAMES}
            said = ", ".join(f"{name} {spread(each)} tokens/s" for name, each in rates.items())
            sys.stderr.write(f"round {round_ + 1}: {said}\n")
    ours, theirs = _NAMES
    faster = [pair[theirs]["seconds"] / pair[ours]["seconds"] for pair in pairs]
    rates = {name: [arguments.tokens / pair[name]["seconds"] for pair in pairs] for name in _NAMES}
    peaks = {name: max(pair[name]["peak"] for pair in pairs) / GIB for name in _NAMES}
    rows = [
        ["", *_NAMES, "freehold ÷ peft"],
        ["tokens/s: median (lowest to highest)", *(spread(rates[name]) for name in _NAMES), spread(faster)],
        ["peak memory, GiB", *(f"{peaks[name]:.2f}" for name in _NAMES), f"{peaks[ours] / peaks[theirs]:.2f}"],
    ]
    shape = (
        f"{arguments.tokens // arguments.example} examples of {arguments.example} tokens, rank {arguments.rank}, "
        f"PEFT in {arguments.peft_dtype}"
    )
    sys.stdout.write("\n".join([*markdown(rows), "", shape, machine_line(arguments.threads), ""]))


if __name__ == "__main__":
    main()
