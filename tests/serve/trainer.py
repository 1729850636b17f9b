"""A training that says what a test has it say: what `freehold tune` writes, without learning anything.

The test's lines go into a file; `sys.argv` is that file and what a job asks of `freehold tune`. Each line is done in
turn: a line of metrics is written (a checkpoint's folder is made) or `raw` text, or it is one of `say`, `exit`, `kill`,
`wait`, `wait_while` (a file is there), `adapter`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEARNING_RATES = {"supervised": 1e-4, "dpo": 2e-5}
"""What it has by itself."""


def main(script: str, *arguments: str) -> None:
    resumed = "--resume" in arguments
    output = Path(arguments[arguments.index("--resume" if resumed else "--output") + 1])
    output.mkdir(exist_ok=True)
    (output.parent / "arguments.jsonl").open("a").write(json.dumps(arguments) + "\n")
    (output / "nice").write_text(str(os.nice(0)))
    if not (output / "run.json").exists():
        loop = {"epochs": 3.0, "batch_size": 4, "learning_rate": _learning_rate(arguments)}
        (output / "run.json").write_text(json.dumps({"request": {"loop": loop}}))
    for line in Path(script).read_text().splitlines():
        _do(json.loads(line), output, resumed)


def _learning_rate(arguments: Sequence[str]) -> float:
    if "--learning-rate" in arguments:
        return float(arguments[arguments.index("--learning-rate") + 1])
    return LEARNING_RATES["dpo" if "dpo" in arguments else "supervised"]


def _do(line: dict[str, Any], output: Path, resumed: bool) -> None:
    match line:
        case {"unless_resumed": inner}:
            if not resumed:
                _do(inner, output, resumed)
        case {"say": text}:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        case {"raw": text}:
            with (output / "metrics.jsonl").open("a") as file:
                file.write(text + "\n")
        case {"exit": code}:
            sys.exit(code)
        case {"kill": number}:
            os.kill(os.getpid(), number)
        case {"ignore_sigterm": _}:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case {"wait_while": name}:
            (output.parent / name).touch()
            while (output.parent / name).exists():
                time.sleep(0.01)
        case {"wait": _}:
            (output.parent / "waits").touch()
            while True:
                time.sleep(60)
        case {"adapter": text}:
            (output / "adapter_config.json").write_text("{}")
            (output / "adapter_model.safetensors").write_text(text)
        case _:
            if line.get("event") == "checkpoint":
                folder = output / "checkpoints" / f"step-{line['step']:08d}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "adapter_config.json").write_text("{}")
                (folder / "adapter_model.safetensors").write_text("so far")
                (folder / "training_state.safetensors").write_text("moments")
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"time": time.time(), **line}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
