"""What the turn's grammar costs, on gpt-oss's vocabulary of 201,088 tokens.

    python bench/grammar.py [--tools 20] [--turns 40] [--seed 0]

- prepare: reading the vocabulary into llguidance, once per process.
- compile: a `TurnGrammar` of so many tools, all free, all strict, and strict with a response format and a budget for
  the reasoning; then making the constraint of one sample.
- mask: the row of allowed tokens as the engine reads it, over turns walked at random the way that models write: words
  of text, calls with arguments, answers. The 99th percentile is of masks that meet a part of the grammar for the first
  time.
- rest: what the engine's own thread waits for at each token: `accept`, and asking what is forced.
- forced: how many of the turns' tokens the grammar forces, which cost no sampling step.

Times are of one thread. `compile` and `mask` take no Python lock, so other requests' steps go on meanwhile; masks are
made while the model computes the logits that they are for.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from freehold.engine.sampler import forbidden_tokens
from freehold.formats.conversation import Tool, ToolNamespace
from freehold.formats.forms import JsonSchema
from freehold.formats.guidance import prepare
from freehold.formats.harmony.grammar import TurnGrammar, TurnOptions
from freehold.formats.harmony.offer import Offer
from freehold.formats.tokenizer import Tokenizer

_ROUNDS = 15
_WORDS = (
    "The user asks about weather in several cities; we should call the tool with a city and a unit.\n\n"
    "First, list what is known: 3 places, 12 °C at noon, naïve “estimates”, and a café… Then answer (briefly)! "
)
_KINDS: Sequence[dict[str, Any]] = (
    {"type": "string", "description": "A city"},
    {"type": "string", "enum": ["celsius", "fahrenheit", "kelvin"]},
    {"type": "integer", "minimum": 1, "maximum": 100},
    {"type": "array", "items": {"type": "string"}, "maxItems": 10},
    {"type": ["number", "null"]},
    {"type": "string", "format": "date-time"},
    {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
    {"type": "boolean"},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    {"type": "object", "additionalProperties": {"type": "string"}},
)
_PLACE = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 80}, "latitude": {"type": "number"}},
    "required": ["name"],
    "additionalProperties": False,
}


def offer(num_tools: int, *, strict: bool) -> Offer:
    tools = []
    for i in range(num_tools):
        names = ["city", "unit", "count", "tags", "limit", "since", "place", "verbose", "code", "labels"]
        kinds = {name: _KINDS[(i + k) % len(_KINDS)] for k, name in enumerate(names[: 3 + i % 8])}
        schema = {
            "type": "object",
            "properties": kinds,
            "required": names[: 1 + i % 3],
            "additionalProperties": False,
            "$defs": {"place": _PLACE},
        }
        tools.append(Tool(name=f"{('get', 'list', 'find', 'set')[i % 4]}_item_{i}", parameters=schema, strict=strict))
    browser = ToolNamespace(name="browser", tools=(Tool(name="search"), Tool(name="open")))
    return Offer(functions=tuple(tools), builtins=(ToolNamespace(name="python"), browser))


def cases(num_tools: int) -> dict[str, TurnOptions]:
    strict = offer(num_tools, strict=True)
    form = JsonSchema({"type": "array", "items": _PLACE})
    return {
        "free": TurnOptions(offer=offer(num_tools, strict=False)),
        "strict": TurnOptions(offer=strict),
        "strict, form, budget": TurnOptions(offer=strict, response_format=form, max_reasoning_tokens=100),
    }


def milliseconds(work: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)


class Taken(NamedTuple):
    """Seconds of one token: of its mask, None where it was forced, and of what comes after it."""

    mask: float | None
    rest: float


def walk(grammar: TurnGrammar, tokenizer: Tokenizer, source: random.Random) -> Iterator[Taken]:
    """One turn; words of text where those may come."""
    constraint, words = grammar(), tokenizer.encode(_WORDS)
    ends = [*tokenizer.control_tokens.values(), *(tokenizer.encode(end)[0] for end in ('"', '",', '"}', "}", "]"))]
    text, end = 0, source.randint(20, 60)
    for _ in range(1500):
        if constraint.is_finished():
            return
        forced = constraint.forced()
        for token in forced:
            constraint.accept(token)
            yield Taken(None, 0.0)
        if forced:
            continue
        begin = time.perf_counter()
        forbidden = forbidden_tokens(constraint, tokenizer.vocab_size)
        mask = time.perf_counter() - begin
        word = words[text % len(words)]
        text += 1
        closing = [token for token in ends if not forbidden[token]]
        if closing and text >= end:
            word = source.choice(closing)
            end = text + source.randint(3, 40)
        elif forbidden[word]:  # of few choices one at random
            word = int(source.choice(np.flatnonzero(~forbidden)))
        begin = time.perf_counter()
        constraint.accept(word)
        constraint.forced()
        yield Taken(mask, time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=int, default=20)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = Tokenizer.o200k_harmony()
    begin = time.perf_counter()
    prepare(tokenizer)
    sys.stdout.write(f"prepare: {time.perf_counter() - begin:.2f} s for {tokenizer.vocab_size:,} tokens\n")
    for name, options in cases(args.tools).items():
        times = milliseconds(lambda options=options: TurnGrammar(tokenizer, options))  # type: ignore[misc]
        grammar, source = TurnGrammar(tokenizer, options), random.Random(args.seed)
        copies = milliseconds(grammar)
        tokens = [taken for _ in range(args.turns) for taken in walk(grammar, tokenizer, source)]
        masks = [1e6 * taken.mask for taken in tokens if taken.mask is not None]
        rests = [1e6 * taken.rest for taken in tokens if taken.mask is not None]
        centiles, rest = statistics.quantiles(masks, n=100), statistics.quantiles(rests, n=100)
        sys.stdout.write(
            f"{name}, {args.tools} tools: compile {statistics.median(times):.1f} ms (worst {times[-1]:.1f}), "
            f"sample {1e3 * statistics.median(copies):.0f} us; {len(masks)} masks: "
            f"median {statistics.median(masks):.0f} us, 99% {centiles[98]:.0f} us, worst {max(masks):.0f} us; "
            f"rest: median {rest[49]:.0f} us, 99% {rest[98]:.0f} us; "
            f"forced {100 * (len(tokens) - len(masks)) / len(tokens):.0f}% of the tokens\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
