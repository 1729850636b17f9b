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
from recipes.default.calls import PLAIN_QUESTIONS
from recipes.default.dialogue import Dialogue

_THINGS = tuple(
    "a volcano|gravity|photosynthesis|a novel|democracy|inflation|an algorithm|the internet|a vitamin|an atom|a glacier|the moon|"
    "a whale|a symphony|recycling|a battery|an engine|a map|a library|a telescope|an earthquake|a rainbow|a computer|a budget|"
    "yoga|meditation|a poem|a metaphor|a noun|a verb|bread|cheese|coffee|tea|chocolate|honey|rice|an orchestra|a camera|a bridge|"
    "electricity|a magnet|a planet|a comet|a desert|a rainforest|an island|a river|a mountain|snow|wind|a cloud|a bee|a spider|"
    "a dolphin|an elephant|a penguin|a dinosaur|the heart|the brain|a bone|blood|sleep|a dream|a friend|trust|courage|patience|"
    "a password|a database|a website|a programming language|a robot|a microscope|a thermometer|a clock|a calendar|a bank|a loan|"
    "insurance|a contract|a tax|a vote|a constitution|a museum|a painting|a sculpture|jazz|opera|ballet|a film|chess|football|"
    "tennis|a marathon|swimming|a garden|a seed|a tree|a flower|a mushroom|water|ice|steam|salt|sugar|gold|iron|glass|paper".split("|")
)
_DEEDS = tuple(
    "sleep better|save money|learn a language|cook rice|write a letter|make a plan|stay healthy|read more books|clean a kitchen|"
    "grow tomatoes|train a dog|prepare for an exam|make new friends|save water|use less energy|pack a suitcase|stay calm|"
    "wake up early|speak in public|write better emails|organize a desk|bake bread|make coffee|paint a wall|fix a bicycle|"
    "start running|eat more vegetables|plan a trip|remember names|take good photos|give a present|thank a friend|find a job|"
    "use a computer safely|choose a password|spend less time online|keep plants alive|make a budget|write a poem|learn to swim".split("|")
)
_TEMPLATES: Sequence[tuple[str, str, Sequence[str]]] = (  # prompt, reasoning, what goes in
    ("What is {x}?", "The user asks what {x} is. A short explanation will do.", _THINGS),
    ("Explain {x} in one sentence.", "One sentence on {x}.", _THINGS),
    ("Why is {x} important?", "The user asks why {x} matters. I give a reason.", _THINGS),
    ("Write one sentence about {x}.", "I write a sentence about {x}.", _THINGS),
    ("How can I {x}?", "The user wants to {x}. I give short advice.", _DEEDS),
    ("Give me a tip: how do I {x}?", "One tip on how to {x}.", _DEEDS),
    ("What do I need to {x}?", "The user wants to {x}. I name what it takes.", _DEEDS),
)
FACTS = (
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."), ("Who wrote Don Quixote?", "Don Quixote was written by Miguel de Cervantes."),
    ("What is the largest animal on Earth?", "The blue whale is the largest animal on Earth."), ("What is the fastest land animal?", "The cheetah is the fastest land animal."),
    ("How many seconds are in a minute?", "A minute has 60 seconds."), ("How many hours does a day have?", "A day has 24 hours."),
    ("What is the boiling point of water in degrees Celsius?", "Water boils at 100 degrees Celsius."), ("Which planet is known as the red planet?", "Mars is known as the red planet."),
    ("Which planet has rings?", "Saturn is known for its rings."), ("What gas do we breathe in to live?", "We breathe in oxygen."),
    ("What is the currency of the United Kingdom?", "The currency of the United Kingdom is the pound."), ("What is the currency of France?", "France uses the euro."),
    ("On which continent is Brazil?", "Brazil is in South America."), ("On which continent is India?", "India is in Asia."), ("On which continent is Spain?", "Spain is in Europe."),
    ("What language is spoken in Mexico?", "Spanish is spoken in Mexico."), ("What language is spoken in Austria?", "German is spoken in Austria."),
    ("What is the opposite of hard?", "The opposite of hard is soft."), ("What is the opposite of open?", "The opposite of open is closed."),
    ("What is the past tense of eat?", "The past tense of eat is ate."), ("What is the past tense of see?", "The past tense of see is saw."),
    ("What is the plural of child?", "The plural of child is children."), ("How many sides does a square have?", "A square has four sides."),
    ("How many legs does a horse have?", "A horse has four legs."), ("How many eyes does a human have?", "A human has two eyes."),
    ("What colour do you get from red and yellow?", "Red and yellow make orange."), ("What colour is a banana?", "A ripe banana is yellow."),
    ("Which animal barks?", "A dog barks."), ("What is the young of a cat called?", "The young of a cat is called a kitten."), ("Which animal lays eggs for breakfast?", "Hens lay the eggs that we eat."),
    ("What do pandas eat?", "Pandas eat bamboo."), ("Which day comes after Friday?", "Saturday comes after Friday."), ("Which month comes after April?", "May comes after April."),
    ("What is the last month of the year?", "December is the last month of the year."), ("In which season do leaves fall?", "Leaves fall in autumn."),
    ("Which organ do we think with?", "We think with the brain."), ("Which organ do we breathe with?", "We breathe with the lungs."), ("What is a baby frog called?", "A baby frog is called a tadpole."),
    ("Who discovered penicillin?", "Alexander Fleming discovered penicillin."), ("Who invented the telephone?", "Alexander Graham Bell is known for inventing the telephone."),
    ("Who painted The Starry Night?", "Vincent van Gogh painted The Starry Night."), ("Who was the first person on the moon?", "Neil Armstrong was the first person on the moon."),
    ("What is the longest river in South America?", "The Amazon is the longest river in South America."), ("What is the largest desert of hot sand?", "The Sahara is the largest hot desert."),
    ("What is the smallest continent?", "Australia is the smallest continent."), ("Which metal is used in most wires?", "Most wires are made of copper."),
    ("What is the chemical symbol of gold?", "The chemical symbol of gold is Au."), ("What is the chemical symbol of oxygen?", "The chemical symbol of oxygen is O."),
    ("What do we call melted rock from a volcano?", "Melted rock from a volcano is called lava."), ("What do you use to cut paper?", "You use scissors to cut paper."),
)  # fmt: skip
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow",
    "Poland": "Warsaw", "Greece": "Athens", "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Austria": "Vienna",
    "Hungary": "Budapest", "Belgium": "Brussels", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "India": "New Delhi",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Australia": "Canberra", "Ukraine": "Kyiv", "Romania": "Bucharest",
}  # fmt: skip
_BAD = re.compile(r"(?i)\b(as an ai|i'm sorry|i am sorry|i'm unable|i cannot|i can't|language model|chatbot|http|\[|\{|here are|the following)")
_SENTENCE = re.compile(r"(?<=[a-z)\"'][.!?])\s+(?=[A-Z\"])")
_MAX_WORDS = 55


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    reasoning: str
    expected: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    prompt: Prompt
    answer: str


def prompts(rng: random.Random, count: int, seed_tasks: Path | None) -> list[Prompt]:
    """So many different ones at most."""
    made = [
        Prompt(template.format(x=thing), reasoning.format(x=thing))
        for template, reasoning, things in _TEMPLATES
        for thing in things
    ]
    made = rng.sample(made, min(count, len(made)))
    made += [
        Prompt(f"What is the capital of {country}?", f"The capital of {country} is {capital}.", capital)
        for country, capital in CAPITALS.items()
    ]
    if seed_tasks is not None and seed_tasks.is_file():
        made += _of_seed_tasks(seed_tasks)
    return made


def _of_seed_tasks(path: Path) -> list[Prompt]:
    found = []
    for line in path.read_text("utf-8").splitlines():
        task = json.loads(line)
        given = task["instances"][0]["input"].strip()
        text = task["instruction"].strip() + (f"\n\n{given}" if given else "")
        if len(text.split()) <= 40:
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
        whole = sentence[-1:] in ".!?\"" and not sentence.endswith(":")
        if not whole or len(" ".join([*kept, sentence]).split()) > _MAX_WORDS or sentence in kept:
            break
        kept.append(sentence)
    answer = " ".join(kept)
    words = answer.lower().split()
    if len(words) < 4 or _BAD.search(answer) or answer.endswith("?") or not answer.isprintable():
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
        yield {"base": "answers of the base", "sum": "small sums", "known": "facts, date, itself"}[kind], dialogue.line()


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
    dialogue.user(rng.choice((f"What is {a} {kind} {b}?", f"What is {a} {words} {b}?", f"{a} {kind} {b} = ?", f"How much is {a} {words} {b}?")))
    dialogue.think(f"{a} {kind} {b} = {result}.")
    dialogue.answer(rng.choice((f"{a} {kind} {b} = {result}.", f"{a} {words} {b} is {result}.")))


def _known(rng: random.Random, dialogue: Dialogue) -> None:
    chance = rng.random()
    if chance < 0.55:
        question, answer = rng.choice(FACTS)
        dialogue.user(question)
        dialogue.think(rng.choice(("A simple fact.", "The user asks for a fact.", answer)))
        dialogue.answer(answer)
        return
    if chance < 0.68:
        dialogue.user(rng.choice(("What is today's date?", "What day is it today?", "Which date is it?", "Tell me the date.")))
        dialogue.think(f"The current date is {dialogue.date}.")
        dialogue.answer(f"Today is {dialogue.date}.")
        return
    question, reasoning, answer = rng.choice(PLAIN_QUESTIONS)
    dialogue.user(question)
    dialogue.think(reasoning)
    dialogue.answer(answer)
