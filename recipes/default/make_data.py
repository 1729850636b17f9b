"""Makes the training set of the default model, from nothing but this folder and the model's own base.

    python -m recipes.default.make_data --output data [--tokens 1500000] [--seed 0] [--share browser=0.2] [--sft DIR]

Writes `train.jsonl`, which `freehold tune` reads, and `counts.json`; prints how many conversations and tokens each part
has. The lines are shuffled, so that any beginning of the file is a smaller training set of the same kind. The base's
answers are kept in `answers.jsonl`: they are made once. The same seed makes the same files. `--share` gives a part
another share of the tokens; the others keep theirs in proportion.

`--sft` names the folder with self_instruct_seed_tasks.jsonl (Apache-2.0) and gsm8k_train.jsonl.gz (MIT); without it,
and where they are missing, the set is made without them.
"""

import argparse
import asyncio
import gzip
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from freehold.disk import new_file
from freehold.formats.chat import HarmonyFormat
from freehold.formats.conversation import SystemContent
from freehold.formats.tokenizer import Tokenizer
from freehold.hub.find import find_model
from freehold.hub.folder import open_folder
from freehold.tools.python import PythonTool
from freehold.train.chats import Chat, read_example
from freehold.train.examples import chat_examples
from recipes.default.asking import load_model
from recipes.default.builtins import Builtins, Sum
from recipes.default.calls import Calls, Talk, call_lines, plain_talk
from recipes.default.evaluate import held_out_turns
from recipes.default.functions import read_functions
from recipes.default.general import Answered, Prompt, answered, base_says, general_lines, prompts
from recipes.default.questions import questions

HERE = Path(__file__).parent
SEED_TASKS, GSM8K = "self_instruct_seed_tasks.jsonl", "gsm8k_train.jsonl.gz"
_SHARES = {"functions": 0.64, "python": 0.11, "browser": 0.09, "general": 0.16}
MAX_TOKENS = 1152
"""Of a sequence; longer ones are left out."""
_TIME = re.compile(r"\d\d:\d\d")
_STEP = re.compile(r"<<([\d\s.+\-*/()]+)=([\d.]+)>>")


class Line(NamedTuple):
    part: str
    kind: str
    raw: dict[str, Any]
    num_tokens: int
    num_targets: int
    num_examples: int


class Measure:
    """Tokens of lines as training sees them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._format = HarmonyFormat(tokenizer, system=SystemContent())

    def line(self, part: str, kind: str, raw: dict[str, Any]) -> Line:
        chat = read_example(raw)
        assert isinstance(chat, Chat)
        examples = chat_examples(chat, self._format)
        tokens = sum(len(example.tokens) for example in examples)
        return Line(part, kind, raw, tokens, sum(example.num_targets for example in examples), len(examples))


# --- parts ----------------------------------------------------------------------------------------------------


async def builtin_lines(
    rng: random.Random, tokenizer: Tokenizer, talk: Sequence[Talk], problems: Sequence[Sum], part: str
) -> list[tuple[str, dict[str, Any]]]:
    """A thousand conversations with python, or some hundred with the browser; more than are needed."""
    tool = PythonTool()
    calls = Calls(rng, read_functions(HERE / "functions.txt"), talk)
    builtins = Builtins(rng, calls, tool.namespace, tokenizer)
    if part == "browser":
        return [("browser", await builtins.browser()) for _ in range(320)]
    lines: list[tuple[str, dict[str, Any]]] = []
    session = await tool.open()
    try:
        for _ in range(900):
            kind = rng.random()
            if kind < 0.15:
                lines.append(("no code needed", builtins.idle()))
            elif kind < 0.27 and problems:
                lines.append(("word problems", await builtins.python(session, problems)))
            else:
                lines.append(("sums, dates, letters", await builtins.python(session)))
    finally:
        await session.aclose()
    return lines


def word_problems(path: Path) -> list[Sum]:
    """Short ones of GSM8K whose answer is computed in at most three steps, as code."""
    if not path.is_file():
        return []
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for text in file:
            task = json.loads(text)
            steps = _STEP.findall(task["answer"])
            answer = task["answer"].rpartition("####")[2].strip()
            if not 1 <= len(steps) <= 3 or len(task["question"].split()) > 45 or steps[-1][1] != answer:
                continue
            if any(re.search(r"(?<!\d)0\d", step) for step, _ in steps):
                continue
            code = "\n".join(f"print({' '.join(re.findall(r'[0-9.]+|[-+*/()]', step))})" for step, _ in steps)
            found.append(Sum(task["question"].strip(), code, "The answer is {}."))
    return found


def base_answers(output: Path, asked: Sequence[Prompt]) -> list[Answered]:
    """What the base says; what it has been asked before stands in `answers.jsonl`."""
    kept = output / "answers.jsonl"
    known: dict[str, str] = {}
    if kept.is_file():
        known = {raw["prompt"]: raw["said"] for raw in map(json.loads, kept.read_text("utf-8").splitlines())}
    if new := [prompt.text for prompt in asked if prompt.text not in known]:
        known |= zip(new, base_says(load_model("default-base"), new), strict=True)
        with new_file(kept) as file:
            for prompt, said in known.items():
                file.write((json.dumps({"prompt": prompt, "said": said}, ensure_ascii=False) + "\n").encode())
    return answered(asked, [known[prompt.text] for prompt in asked])


# --- the whole ------------------------------------------------------------------------------------------------


def make(
    output: Path, *, tokens: int, seed: int, sft: Path | None, shares: Mapping[str, float] = _SHARES
) -> list[Line]:
    """Write the training set; the lines, as they stand in it."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = open_folder(find_model("default-base")).tokenizer
    assert tokenizer is not None
    measure = Measure(tokenizer)
    rngs = {part: random.Random(f"{seed} {part}") for part in (*_SHARES, "prompts", "order")}
    asked = prompts(rngs["prompts"], 1100, None if sft is None else sft / SEED_TASKS)
    answers = base_answers(output, asked)
    problems = [] if sft is None else word_problems(sft / GSM8K)
    talk = [*plain_talk(), *plain_talk(), *(answer.talk for answer in answers if len(answer.answer) < 160)]
    sources: dict[str, Iterator[tuple[str, dict[str, Any]]]] = {
        "functions": call_lines(rngs["functions"], read_functions(HERE / "functions.txt"), talk, 50_000),
        "python": iter(asyncio.run(builtin_lines(rngs["python"], tokenizer, talk, problems, "python"))),
        "browser": iter(asyncio.run(builtin_lines(rngs["browser"], tokenizer, talk, problems, "browser"))),
        "general": general_lines(rngs["general"], answers, 50_000),
    }
    held_out = held_out_words()
    lines: list[Line] = []
    for part, source in sources.items():
        left = tokens * shares[part]
        for kind, raw in source:
            if is_near(raw, held_out):
                continue
            line = measure.line(part, kind, raw)
            if line.num_tokens / line.num_examples > MAX_TOKENS:
                continue
            lines.append(line)
            left -= line.num_tokens
            if left <= 0:
                break
    rngs["order"].shuffle(lines)
    with new_file(output / "train.jsonl") as file:
        for line in lines:
            file.write((json.dumps(line.raw, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
    return lines


def shares_with(given: Sequence[str]) -> dict[str, float]:
    """Of what is typed: `browser=0.2`."""
    try:
        chosen = {part: float(share) for part, _, share in (text.partition("=") for text in given)}
    except ValueError:
        sys.exit(f"--share {' '.join(given)}: give a part and its share, such as browser=0.2")
    if unknown := chosen.keys() - _SHARES.keys():
        sys.exit(f"--share {min(unknown)}: the parts are {', '.join(_SHARES)}")
    rest = sum(share for part, share in _SHARES.items() if part not in chosen)
    if not (rest and min(chosen.values(), default=0) >= 0 and sum(chosen.values()) < 1):  # nor of a NaN
        sys.exit(f"--share {' '.join(given)}: shares are of 1, and leave something to the other parts")
    return {part: chosen.get(part, share * (1 - sum(chosen.values())) / rest) for part, share in _SHARES.items()}


def held_out_words() -> frozenset[str]:
    """What no line of the training set may say: names and descriptions of the held-out functions, and the texts, other
    than choices and times of day, that their calls have."""
    found: set[str] = {question.text for question in questions()}
    for function in read_functions(HERE / "heldout.txt"):
        found.update((*function.names, *function.descriptions))
    for turn in held_out_turns():
        for tool in turn.tools:
            for name, schema in tool["function"]["parameters"]["properties"].items():
                value = turn.arguments.get(name) if tool["function"]["name"] == turn.name else None
                if isinstance(value, str) and "enum" not in schema and not _TIME.fullmatch(value):
                    found.add(value)
    return frozenset(found)


def is_near(raw: Any, held_out: frozenset[str]) -> bool:
    """Whether anything in a line is, as a whole, one of these texts."""
    if isinstance(raw, dict):
        return any(is_near(value, held_out) for value in raw.values())
    if isinstance(raw, list):
        return any(is_near(value, held_out) for value in raw)
    if not isinstance(raw, str):
        return False
    if raw.startswith("{"):
        with suppress(ValueError):
            return is_near(json.loads(raw), held_out)
    return raw in held_out


def table(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Counts by part and kind, and of all."""
    kinds = Counter((line.part, line.kind) for line in lines)
    groups = [
        (part, kind, [line for line in lines if (line.part, line.kind) == (part, kind)]) for part, kind in sorted(kinds)
    ]
    rows: list[tuple[str, ...]] = [
        ("part", "kind", "lines", "sequences", "tokens", "taught", "tokens a line", "longest")
    ]
    for part, kind, group in (*groups, ("all", "", list(lines))):
        total = sum(line.num_tokens for line in group)
        rows.append(
            (
                part, kind, f"{len(group):,}", f"{sum(line.num_examples for line in group):,}", f"{total:,}",
                f"{sum(line.num_targets for line in group):,}", f"{total / max(len(group), 1):.0f}",
                f"{max((line.num_tokens for line in group), default=0):,}",
            )
        )  # fmt: skip
    return rows


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", action="append", default=[], metavar="PART=SHARE")
    parser.add_argument("--sft", type=Path)
    options = parser.parse_args()
    shares = shares_with(options.share)
    lines = make(options.output, tokens=options.tokens, seed=options.seed, sft=options.sft, shares=shares)
    rows = table(lines)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        sys.stdout.write(
            "  ".join(f"{text:<{widths[i]}}" if i < 2 else f"{text:>{widths[i]}}" for i, text in enumerate(row)) + "\n"
        )
    counts = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    with new_file(options.output / "counts.json") as file:
        file.write((json.dumps({"seed": options.seed, "parts": counts}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
