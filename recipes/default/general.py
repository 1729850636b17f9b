"""General conversation: what the model's own base says in ChatML, as short reasoning and a short answer.

Prompts are made of templates, and of the instructions of self-instruct's seed tasks where that file is there. Answers
that are cut off, repeat themselves, apologise or speak of themselves are dropped; where a table knows what is right, so
are wrong ones. Small sums, the date and who the model is are answered by rule.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freehold.formats.conversation import Conversation, text_message
from freehold.sampling import SamplingOptions
from freehold.session.generation import Ask
from freehold.session.model import Model
from recipes.default.asking import ask_all
from recipes.default.calls import Talk, plain_talk
from recipes.default.dialogue import Dialogue
from recipes.default.texts import lists_of

_TEMPLATES: Sequence[tuple[str, str, str]] = (  # prompt, reasoning, the list of what goes in
    ("What is {x}?", "The user asks what {x} is. A short explanation will do.", "things"),
    ("Why is {x} important?", "The user asks why {x} matters. I give a reason.", "things"),
    ("Write one sentence about {x}.", "I write a sentence about {x}.", "things"),
    ("How can I {x}?", "The user wants to {x}. I give short advice.", "deeds"),
    ("Give me a tip: how do I {x}?", "One tip on how to {x}.", "deeds"),
    ("What do I need to {x}?", "The user wants to {x}. I name what it takes.", "deeds"),
)
_BAD = re.compile(
    r"(?i)\b(as an ai|i'm sorry|i am sorry|i'm unable|i cannot|i can't|language model|chatbot|http|\[|\{|here are|"
    r"the following)"
)
_SENTENCE = re.compile(r"(?<=[a-z)\"'][.!?])\s+(?=[A-Z\"])")
_MAX_WORDS = 55
_CHATTER = ("I'm ", "I am ", "Sure", "Certainly", "What a", "Great", "Thank", "There's no one")


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    reasoning: str
    expected: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    prompt: Prompt
    answer: str

    @property
    def talk(self) -> Talk:
        return Talk(self.prompt.text, self.prompt.reasoning, self.answer)


def prompts(rng: random.Random, count: int, seed_tasks: Path | None) -> list[Prompt]:
    """So many different ones at most."""
    subjects = lists_of("subjects.txt")
    made = [
        Prompt(template.format(x=thing), reasoning.format(x=thing))
        for template, reasoning, things in _TEMPLATES
        for thing in subjects[things][0]
    ]
    made = rng.sample(made, min(count, len(made)))
    made += [
        Prompt(f"What is the capital of {country}?", f"The capital of {country} is {capital}.", capital)
        for country, capital in (entry.split(" = ") for entry in subjects["capitals"][0])
    ]
    if seed_tasks is not None and seed_tasks.is_file():
        made += _of_seed_tasks(seed_tasks)
    return made


def _of_seed_tasks(path: Path) -> list[Prompt]:
    """Those that are a single question or wish; with texts to work on, so small a model writes nonsense."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        task = json.loads(line)
        text = task["instruction"].strip()
        if not task["instances"][0]["input"].strip() and len(text.split()) <= 25:
            found.append(Prompt(text, "The user gives a task. I keep the answer short."))
    return found


def base_says(model: Model, asked: Sequence[str]) -> list[str]:
    """What the base says to these prompts in ChatML, as it says it."""
    asks = [
        Ask(
            conversation=Conversation(messages=(text_message("user", text),)),
            sampling=SamplingOptions(temperature=0.0, repetition_penalty=1.05),
            max_tokens=90,
        )
        for text in asked
    ]
    said = ask_all(model, asks, harmony=False)
    return ["" if done is None else " ".join(message.text for message in done.messages) for done in said]


def answered(asked: Sequence[Prompt], said: Sequence[str]) -> list[Answered]:
    """The answers, shortened; without what is not good enough."""
    found = []
    for prompt, text in zip(asked, said, strict=True):
        answer = good_part(text)
        if answer and prompt.expected in answer:
            found.append(Answered(prompt, answer))
    return found


def good_part(text: str) -> str:
    """The first sentences of an answer, one to three; empty where they are not fit to be learnt."""
    if "\n" in text.strip():  # lists and letters: only what stands before them
        text = text.strip().split("\n")[0]
    sentences = [*filter(None, map(str.strip, _SENTENCE.split(text.strip())))]
    kept: list[str] = []
    for sentence in sentences[:3]:
        whole = sentence[-1:] in '.!?"' and not sentence.endswith(":")
        if not whole or len(" ".join([*kept, sentence]).split()) > _MAX_WORDS or sentence in kept:
            break
        kept.append(sentence)
    answer = " ".join(kept)
    if answer.count('"') % 2:
        answer = answer.removesuffix('"')
    words = answer.lower().split()
    if (
        len(words) < 6
        or answer.startswith(_CHATTER)
        or _BAD.search(answer)
        or answer.endswith("?")
        or not answer.isprintable()
    ):
        return ""
    return "" if len({*zip(words, words[1:], words[2:], strict=False)}) < 0.85 * (len(words) - 2) else answer


# --- lines ----------------------------------------------------------------------------------------------------


def general_lines(rng: random.Random, answers: Sequence[Answered], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many conversations, each with the name of its kind; every answer of the base is in one at least."""
    left: list[Answered] = []

    def next_answer() -> Answered:
        if not left:
            left.extend(rng.sample(answers, len(answers)))
        return left.pop()

    for kind in rng.choices(("base", "sum", "known"), weights=(56, 26, 18), k=count):
        dialogue = Dialogue(rng, instructions="You are a helpful assistant." if rng.random() < 0.06 else None)
        turns = rng.choice((1, 1, 1, 2)) if kind != "known" else 1
        for _ in range(turns):
            if kind == "base":
                said = next_answer()
                dialogue.user(said.prompt.text)
                dialogue.think(said.prompt.reasoning)
                dialogue.answer(said.answer)
            elif kind == "sum":
                _small_sum(rng, dialogue)
            else:
                _known(rng, dialogue)
        yield (
            {"base": "answers of the base", "sum": "small sums", "known": "facts, date, itself"}[kind],
            dialogue.line(),
        )


def _small_sum(rng: random.Random, dialogue: Dialogue) -> None:
    kind = rng.choice("++-*")
    a, b = (rng.randint(2, 12), rng.randint(2, 12)) if kind == "*" else (rng.randint(1, 60), rng.randint(1, 40))
    if kind == "-" and b > a:
        a, b = b, a
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    words = {"+": "plus", "-": "minus", "*": "times"}[kind]
    if rng.random() < 0.25 and kind != "*":
        thing = rng.choice(("apples", "books", "coins", "eggs", "pens", "cards"))
        more = "get {b} more" if kind == "+" else "give away {b}"
        dialogue.user(f"I have {a} {thing} and {more.format(b=b)}. How many {thing} do I have?")
        dialogue.think(f"{a} {kind} {b} = {result}.")
        dialogue.answer(f"You have {result} {thing}.")
        return
    dialogue.user(
        rng.choice(
            (
                f"What is {a} {kind} {b}?",
                f"What is {a} {words} {b}?",
                f"{a} {kind} {b} = ?",
                f"How much is {a} {words} {b}?",
            )
        )
    )
    dialogue.think(f"{a} {kind} {b} = {result}.")
    dialogue.answer(rng.choice((f"{a} {kind} {b} = {result}.", f"{a} {words} {b} is {result}.")))


def _known(rng: random.Random, dialogue: Dialogue) -> None:
    if rng.random() < 0.14:
        dialogue.user(
            rng.choice(("What is today's date?", "What day is it today?", "Which date is it?", "Tell me the date."))
        )
        dialogue.think(f"The current date is {dialogue.date}.")
        dialogue.answer(f"Today is {dialogue.date}.")
        return
    said = rng.choice(plain_talk())
    dialogue.user(said.question)
    dialogue.think(said.reasoning)
    dialogue.answer(said.answer)
