"""Measures a model that speaks Harmony on what the default model is tuned for, asked as a chat asks it.

    python -m recipes.default.evaluate [MODEL] [--adapter DIR] [--json results.json] [--chatml]

- calls: 200 held-out turns with one to four functions offered, the grammar on, greedy: is it the right function, and
  are its arguments exactly the expected JSON. Functions, descriptions, parameter lists, sentences and the words of
  values are not in the training set (heldout.txt, `Values(held_out=True)`). The grammar enforces JSON, not the schemas,
  as it does for clients that do not ask for more; `strict` is the same with schemas enforced, and `single` that with
  nothing offered but the right function.
- needless: 40 questions that need none of the functions offered; is it an answer, and no call.
- questions: 100 short ones, whose answer is looked for in the reply.
- python: 60 problems with values of their own, in the sentences of the training set; is the tool called, and is what
  the answer adds to the question the true result.
- browser: 40 questions about made-up pages, in the sentences of the training set about other names; is `search` called,
  and does the answer have what the page says.
- perplexity: on the Apache licence, as the model card has it.

`--chatml` asks the questions in ChatML, for the model before it was tuned.
"""

import argparse
import asyncio
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from freehold.disk import new_file
from freehold.formats.conversation import Conversation, Message
from freehold.sampling import SamplingOptions
from freehold.session.agent import LocalRunner
from freehold.session.generation import Ask, SampleDone
from freehold.session.model import Model
from freehold.session.served import Served
from freehold.session.toolbox import Toolbox
from freehold.session.turn import TurnLimits, prepare
from freehold.tools.base import Tool
from freehold.tools.browser.browser import Browser
from freehold.tools.python import PythonTool
from recipes.default.asking import ask_all, load_model, the_adapter
from recipes.default.builtins import Pages, Sums
from recipes.default.functions import ask, offer, read_functions
from recipes.default.questions import questions
from recipes.default.values import Values

HERE = Path(__file__).parent
NUM_TURNS = 200
_SEED = "held out"
_GREEDY = SamplingOptions(temperature=0.0)
_MAX_TOKENS = 160
_PERPLEXITY_TOKENS = 1024


class HeldOut(NamedTuple):
    """A turn: what is offered and said, and the call that is right."""

    tools: list[Mapping[str, Any]]
    said: str
    name: str
    arguments: Mapping[str, Any]

    def alone(self) -> "HeldOut":
        """The same with nothing offered but the function that is right."""
        return self._replace(tools=[tool for tool in self.tools if tool["function"]["name"] == self.name])


def held_out_turns(count: int = NUM_TURNS) -> list[HeldOut]:
    """Every function equally often, beside none to three others of the held-out ones."""
    rng = random.Random(_SEED)
    functions = read_functions(HERE / "heldout.txt")
    values = Values(rng, held_out=True)
    turns = []
    for number in range(count):
        wanted = functions[number % len(functions)]
        others = rng.sample([function for function in functions if function is not wanted], rng.choice((0, 1, 2, 3)))
        offered = [offer(function, rng) for function in (wanted, *others)]
        phrase = wanted.phrases[number // len(functions) % len(wanted.phrases)]
        asked = ask(offered[0], values, phrase)
        name, tools = offered[0].name, [one.tool for one in offered]
        rng.shuffle(tools)
        turns.append(HeldOut(tools, asked.said, name, asked.arguments))
    return turns


class Scored(NamedTuple):
    right_function: bool
    right_arguments: bool
    got: str


def score(turn: HeldOut, said: Sequence[Message]) -> Scored:
    """The last message is the call, or there is none. Arguments are equal as JSON: order and spaces do not matter."""
    last = said[-1] if said else None
    if last is None or last.recipient is None:
        return Scored(False, False, "" if last is None else f"{last.channel}: {last.text:.80}")
    only_one = sum(message.recipient is not None for message in said) == 1
    right = only_one and last.recipient == f"functions.{turn.name}"
    try:
        arguments = json.loads(last.text)
    except ValueError:
        arguments = None
    return Scored(right, right and same(arguments, turn.arguments), f"{last.recipient} {last.text}")


def same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1, 2.0 is 2."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def contains(answer: str, expected: str) -> bool:
    """Whether one of the expected texts begins a word of an answer; one of digits is a whole number there."""
    answer = _without_separators(answer.lower())
    for text in expected.lower().split("|"):
        pattern = rf"(?<![\w.−-])0*{text}(?!\w|\.\d)" if text.isdigit() else rf"(?<!\w){re.escape(text)}"
        if re.search(pattern, answer):
            return True
    return False


def states(answer: str, truth: str, question: str) -> bool:
    """Whether an answer says a result, and not only what the question said: as a whole number or word, and once more
    than the question does. One that it cannot be told from the question does not count."""
    lines = truth.strip().splitlines()
    if not lines:
        return False
    result = re.escape(_without_separators(lines[-1].strip()))
    whole = re.compile(rf"(?<![\w.−-]){result}(?!\w|[.-]\w)")
    said, asked = (len(whole.findall(_without_separators(text))) for text in (answer, question))
    return said > asked


def _without_separators(text: str) -> str:
    """1,234 as 1234; numbers in a row stay apart."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


# --- asking ---------------------------------------------------------------------------------------------------


def asking(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Ask:
    conversation = Conversation.from_openai(messages, tools=tools)
    return Ask(conversation=conversation, sampling=_GREEDY, max_tokens=_MAX_TOKENS)


def enforced(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}


def calls(model: Model, *, strict: bool, limit: int, alone: bool = False) -> dict[str, Any]:
    turns = [turn.alone() if alone else turn for turn in held_out_turns()[:limit]]
    asks = [
        asking([{"role": "user", "content": turn.said}], [enforced(tool) if strict else tool for tool in turn.tools])
        for turn in turns
    ]
    scored = [score(turn, _said(done)) for turn, done in zip(turns, ask_all(model, asks, harmony=True), strict=True)]
    by_offer = {}
    for count in sorted({len(turn.tools) for turn in turns}):
        group = [one for turn, one in zip(turns, scored, strict=True) if len(turn.tools) == count]
        by_offer[str(count)] = {"turns": len(group), **_shares(group)}
    return {
        "turns": len(turns),
        **_shares(scored),
        "by_number_offered": by_offer,
        "each": [
            {"said": turn.said, "expected": f"functions.{turn.name} {json.dumps(turn.arguments)}", **one._asdict()}
            for turn, one in zip(turns, scored, strict=True)
        ],
    }


def _shares(scored: Sequence[Scored]) -> dict[str, float]:
    return {
        "right_function": sum(one.right_function for one in scored) / len(scored),
        "right_arguments": sum(one.right_arguments for one in scored) / len(scored),
    }


def _said(done: SampleDone | None) -> Sequence[Message]:
    return () if done is None else done.messages


def needless(model: Model) -> dict[str, Any]:
    """Questions beside functions that they do not need."""
    rng = random.Random(f"{_SEED} needless")
    functions = read_functions(HERE / "heldout.txt")
    asked = [question for question in questions() if question.kind == "fact"]
    asks = [
        asking(
            [{"role": "user", "content": question.text}],
            [offer(function, rng).tool for function in rng.sample(functions, rng.choice((1, 2, 3)))],
        )
        for question in asked
    ]
    replies = [_said(done) for done in ask_all(model, asks, harmony=True)]
    answered = [bool(said) and said[-1].recipient is None and said[-1].channel == "final" for said in replies]
    return {"turns": len(asked), "answered": sum(answered) / len(answered)}


def short_questions(model: Model, *, harmony: bool) -> dict[str, Any]:
    asked = questions()
    replies = ask_all(model, [asking([{"role": "user", "content": one.text}]) for one in asked], harmony=harmony)
    each = []
    for question, done in zip(asked, replies, strict=True):
        said = _said(done)
        answer = said[-1].text if said and said[-1].channel in (None, "final") and said[-1].recipient is None else ""
        each.append({**question._asdict(), "answer": answer, "right": contains(answer, question.expected)})
    kinds = Counter(str(one["kind"]) for one in each)
    return {
        "right": sum(bool(one["right"]) for one in each),
        "by_kind": {
            kind: f"{sum(bool(one['right']) for one in each if one['kind'] == kind)} of {of}"
            for kind, of in kinds.items()
        },
        "each": each,
    }


def python(model: Model, count: int) -> dict[str, Any]:
    """The real tool, through the agent loop."""
    return asyncio.run(_python(model, count))


async def _python(model: Model, count: int) -> dict[str, Any]:
    tool, served = PythonTool(), _served(model)
    sums = Sums(Values(random.Random(f"{_SEED} python"), held_out=True))
    each = []
    judge = await tool.open()
    try:
        for _ in range(count):
            problem = sums.draw()
            truth = (await judge.call("python", problem.code)).text
            said = await _answered(served, tool, problem.question)
            answer = said[-1].text if said and said[-1].channel == "final" else ""
            called = any(message.recipient == "python" for message in said)
            each.append(
                {
                    "question": problem.question,
                    "truth": truth,
                    "called": called,
                    "answer": answer,
                    "right": called and states(answer, truth, problem.question),
                }
            )
            sys.stderr.write(f"\r{len(each)} of {count} computed")
    finally:
        await judge.aclose()
        sys.stderr.write("\n")
    return {
        "problems": count,
        "called": _share(each, "called"),
        "right": _share(each, "right"),
        "each": each,
    }


def browser(model: Model, count: int) -> dict[str, Any]:
    """The real tool over made-up pages, through the agent loop."""
    return asyncio.run(_browser(model, count))


async def _browser(model: Model, count: int) -> dict[str, Any]:
    served, tokenizer = _served(model), model.prompting.the_tokenizer()
    values = Values(random.Random(f"{_SEED} browser"), held_out=True)
    each = []
    for _ in range(count):
        world = Pages(values, values.rng.choice(("web", "notes", "docs", "wiki", "handbook", "archive")))
        fact = values.rng.choice(values.rng.choice(world.pages).facts)
        with closing(Browser(sources=[world], tokenizer=tokenizer)) as tool:
            said = await _answered(served, tool, fact.question)
        answer = said[-1].text if said and said[-1].channel == "final" else ""
        searched = any(message.recipient == "browser.search" for message in said)
        right = searched and fact.value.lower() in answer.lower()
        each.append(
            {"question": fact.question, "truth": fact.value, "searched": searched, "answer": answer, "right": right}
        )
        sys.stderr.write(f"\r{len(each)} of {count} looked up")
    sys.stderr.write("\n")
    return {
        "questions": count,
        "searched": _share(each, "searched"),
        "right": _share(each, "right"),
        "each": each,
    }


def _share(each: Sequence[Mapping[str, Any]], what: str) -> float:
    return sum(bool(one[what]) for one in each) / len(each)


def _served(model: Model) -> Served:
    return Served(
        name="model",
        prompting=model.prompting,
        runner=LocalRunner(model.engine),
        harmony=True,
        adapter=the_adapter(model),
    )


async def _answered(served: Served, tool: Tool, question: str) -> Sequence[Message]:
    """All that is said in a turn with one tool."""
    toolbox = await Toolbox.open([tool])
    said: Sequence[Message] = ()
    try:
        ask = asking([{"role": "user", "content": question}])
        turn = await prepare(served, ask, toolbox, limits=TurnLimits(max_steps=3))
        async for batch in turn.events(served.runner):
            said = next((event.messages for event in batch if isinstance(event, SampleDone)), said)
    finally:
        await toolbox.aclose()
    return said


def perplexity(model: Model) -> float:
    """On the first tokens of the licence that lies beside the model, as the model card has it."""
    assert model.tokenizer is not None
    text = (model.path / "LICENSE").read_text("utf-8")
    ids = model.tokenizer.encode(text)[:_PERPLEXITY_TOKENS]
    logits_TV = model.logits(ids[:-1], adapter=the_adapter(model))
    return math.exp(float(F.cross_entropy(logits_TV, torch.tensor(ids[1:]))))


# --- the whole ------------------------------------------------------------------------------------------------


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chatml", action="store_true")
    parser.add_argument(
        "--only",
        nargs="*",
        default=["perplexity", "questions", "calls", "needless", "python", "browser", "strict", "single"],
    )
    parser.add_argument("--turns", type=int, default=NUM_TURNS)
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--pages", type=int, default=40)
    options = parser.parse_args()
    model = load_model(options.model, adapter=options.adapter)
    measures: dict[str, Callable[[], Any]] = {
        "calls": lambda: calls(model, strict=False, limit=options.turns),
        "strict": lambda: calls(model, strict=True, limit=options.turns),
        "single": lambda: calls(model, strict=True, limit=options.turns, alone=True),
        "needless": lambda: needless(model),
        "questions": lambda: short_questions(model, harmony=not options.chatml),
        "python": lambda: python(model, options.problems),
        "browser": lambda: browser(model, options.pages),
        "perplexity": lambda: perplexity(model),
    }
    results: dict[str, Any] = {"model": str(model.path), "adapter": options.adapter and str(options.adapter)}
    for name in options.only:
        results[name] = measures[name]()
        sys.stdout.write(f"{name}: {json.dumps(_short(results[name]))}\n")
        sys.stdout.flush()
        if options.json is not None:
            _write(options.json, results)


def _write(path: Path, results: Mapping[str, Any]) -> None:
    with new_file(path) as file:
        file.write((json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())


def _short(result: Any) -> Any:
    return {key: value for key, value in result.items() if key != "each"} if isinstance(result, dict) else result


if __name__ == "__main__":
    main()
