"""How long a person waits: `freehold --help`, and the default model's answer to its first question.

    python bench/first_answer.py [--runs 5]

Whole processes, timed from outside, one warm-up each; the default model has to be in the cache. `import torch` alone is
timed in the same rounds: no answer can come before it.
"""

import argparse
import statistics
import subprocess
import sys
import time

QUESTION = "What is the capital of France?"
COMMANDS = {
    "freehold --help": ["freehold", "--help"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    "freehold chat (one answer)": ["freehold", "chat", QUESTION],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each command")
    runs = parser.parse_args().runs
    for command in COMMANDS.values():
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    for name, values in taken.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        sys.stdout.write(f"{name:<28} min {low:5.2f} s   median {middle:5.2f} s   max {high:5.2f} s\n")


if __name__ == "__main__":
    main()
