"""What the engine costs and saves, against the bare model loop and against itself without its memory.

    python bench/engine.py [--model default] [--rounds 5] [--threads 2]

- cost: tokens of one stream through the engine, beside the same tokens by the simple loop.
- turns: time to the first token of a second turn after a long history, beside a cold prefill of the same prompt; once
  as the history grew, and once with the reasoning dropped from its end, which moves everything behind it.
- guess: tokens a second with guesses from the text so far, beside the same without, where the answer quotes its
  prompt, edits it, or tells something new.
- stall: time between the tokens of a running stream while a long prompt comes in, beside that stream alone.

Each round measures both sides in turn; a ratio is the median of the rounds' ratios.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

import freehold
from freehold.engine.core import Engine
from freehold.engine.loop import LocalEngine
from freehold.engine.request import Request
from freehold.formats.conversation import Conversation
from freehold.model import simple
from freehold.sampling import Sampling
from freehold.session.model import Model
from freehold.session.receipt import text

_GREEDY = Sampling(temperature=0.0)
_TOKENS = 128  # of a stream whose cost is measured
_IN_TURN = 8
_HISTORY = 2000
_REASONING = 120
_ANSWER = 40
_QUESTION = 20
_LONG_PROMPT = 4096
_PASSAGE = (
    "The lighthouse keeper counted nine ships on the horizon, each with red sails and a brass bell. By evening the fog "
    "had swallowed all but two, and the keeper lit the lamp an hour early, just as his father had taught him."
)
_CODE = """def average(numbers):
    total = 0
    for number in numbers:
        total = total + number
    return total / len(numbers)


def largest(numbers):
    best = numbers[0]
    for number in numbers:
        if number > best:
            best = number
    return best
"""
_QUESTIONS = {
    "quoting": f"Repeat the following text word for word.\n\n{_PASSAGE}",
    "editing": f"Rename `numbers` to `values` in this Python code and show all of it.\n\n{_CODE}",
    "a story": "Tell me a story about a fox and a well.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    model = freehold.load(given.model, device="cpu", threads=given.threads)
    torch.set_num_threads(1)  # as the engine does it for itself; the simple loop gets the same
    assert model.tokenizer is not None
    words = model.tokenizer.encode(text())
    sys.stdout.write(f"{model.path.name}: {model.policy.describe(model.experts)}\n")
    for name, measure in (("cost", _cost), ("turns", _turns), ("guess", _guess), ("stall", _stall)):
        for line in measure(model, words, given.rounds):
            sys.stdout.write(f"{name:6} {line}\n")
            sys.stdout.flush()


def _cost(model: Model, words: Sequence[int], rounds: int) -> list[str]:
    """Both loops run side by side, a few tokens in turn: a clock that changes slows both."""
    ratios: list[float] = []
    sides: tuple[list[float], list[float]] = ([], [])
    engine = LocalEngine(_new_engine(model, lookup=False))
    request = Request(prompt=words[:16], max_tokens=_TOKENS, sampling=_GREEDY, cache=False)
    for _ in range(rounds):
        bare = simple.generate(model.transformer, words[:16], max_tokens=_TOKENS, sampling=_GREEDY)
        steps = engine.stream(request)
        for _ in range(_TOKENS // _IN_TURN - 1):
            taken = [_seconds(loop, _IN_TURN) for loop in (bare, steps)]
            for side, seconds in zip(sides, taken, strict=True):
                side.append(seconds / _IN_TURN * 1e3)
            ratios.append(taken[1] / taken[0])
    alone, through = map(statistics.median, sides)
    cost = statistics.median(ratios) - 1
    return [f"{alone:.2f} ms a token by the simple loop, {through:.2f} ms by the engine: {cost:+.1%}"]


def _seconds(tokens: Iterator[object], count: int) -> float:
    """For so many after the next one, which may have a prompt to read."""
    next(tokens)
    start = time.perf_counter()
    for _ in range(count - 1):
        next(tokens)
    return (time.perf_counter() - start) * count / (count - 1)


def _turns(model: Model, words: Sequence[int], rounds: int) -> list[str]:
    history, rest = list(words[:_HISTORY]), list(words[_HISTORY:])
    reasoning, answer = rest[:_REASONING], rest[_REASONING : _REASONING + _ANSWER]
    question = rest[_REASONING + _ANSWER :][:_QUESTION]
    grown = history + reasoning + answer
    lines = []
    for what, second in (("as it grew", grown + question), ("reasoning dropped", history + answer + question)):
        cold, warm = [], []
        for _ in range(rounds):
            cold.append(_first_token(model.new_engine(), Request(prompt=second, max_tokens=1, sampling=_GREEDY)))
            engine = model.new_engine()
            # What a chat leaves behind: the prompt, and the reply that the model wrote after it.
            _first_token(engine, Request(prompt=history, max_tokens=1, sampling=_GREEDY, boundaries=[len(history)]))
            _first_token(engine, Request(prompt=grown, max_tokens=1, sampling=_GREEDY, boundaries=[len(grown)]))
            warm.append(_first_token(engine, Request(prompt=second, max_tokens=1, sampling=_GREEDY)))
        ratio = statistics.median(c / w for c, w in zip(cold, warm, strict=True))
        lines.append(
            f"{what}: {statistics.median(cold):.2f} s cold for {len(second)} tokens, {statistics.median(warm):.3f} s "
            f"after the first turn: 1/{ratio:.1f}"
        )
    return lines


def _new_engine(model: Model, *, lookup: bool) -> Engine:
    return Engine(model.transformer, replace(model.plan.options, lookup=lookup))


def _first_token(engine: Engine, request: Request) -> float:
    start = time.perf_counter()
    engine.submit(request)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def _guess(model: Model, words: Sequence[int], rounds: int) -> list[str]:
    lines = []
    chat_format = model.prompting.chat_format()
    for what, question in _QUESTIONS.items():
        turn = chat_format.turn(Conversation.from_openai([{"role": "user", "content": question}]))
        request = Request(prompt=turn.prompt.ids, max_tokens=160, sampling=_GREEDY, stop_ids=turn.stop_ids, cache=False)
        pairs, engine = [], model.new_engine()
        for _ in range(rounds + 1):
            pair = []
            for lookup in (False, True):
                engine = _new_engine(model, lookup=lookup)
                ((completion,),) = LocalEngine(engine).generate_batch([request])
                assert completion.stats is not None
                pair.append(completion.stats.seconds_per_token or 0.0)
            pairs.append(pair)
        gain = statistics.median(without / guessing for without, guessing in pairs[1:])
        stats = engine.stats()
        lines.append(
            f"{what}: {gain:.2f} times as fast over {stats.generated_tokens} tokens; {stats.right_guesses} of "
            f"{stats.guessed_tokens} guesses right"
        )
    return lines


def _stall(model: Model, words: Sequence[int], rounds: int) -> list[str]:
    """The same stream runs alone in a second engine, a few tokens in turn: a clock that changes slows both."""
    ratios: list[float] = []
    arrivals: list[float] = []
    stream = Request(prompt=words[-64:], max_tokens=model.plan.context - 64, sampling=_GREEDY, cache=False)
    prompt = Request(prompt=words[:_LONG_PROMPT], max_tokens=1, sampling=_GREEDY, cache=False)
    for _ in range(rounds):
        beside, alone = (_new_engine(model, lookup=False) for _ in range(2))
        beside_id, alone_id = beside.submit(stream), alone.submit(stream)
        _gaps(beside, beside_id, 16)
        other, taken = beside.submit(prompt), 0.0
        while beside.is_live(other):
            usual = statistics.median(_gaps(alone, alone_id, 5))
            start = time.perf_counter()
            ratios += [gap / usual for gap in _gaps(beside, beside_id, _IN_TURN)]
            taken += time.perf_counter() - start
        arrivals.append(taken)
        beside.close()
        alone.close()
    median, slowest = statistics.median(ratios), sorted(ratios)[int(len(ratios) * 0.95)]
    return [
        f"{_LONG_PROMPT} tokens come in during {statistics.median(arrivals):.1f} s: time between a running stream's "
        f"tokens {median:.2f} times what it is alone (mean {statistics.fmean(ratios):.2f}, 95th percentile "
        f"{slowest:.2f})"
    ]


def _gaps(engine: Engine, stream: int, count: int) -> list[float]:
    """Seconds between so many of a stream's next tokens."""
    times: list[float] = []
    while len(times) <= count:
        if any(output.request_id == stream for output in engine.step()):
            times.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(times)]


if __name__ == "__main__":
    main()
