"""Conversations in which functions are offered: called, answered from their results, left alone, or missed.

Which function a sentence asks for, and with which arguments, is known because the sentence was made of them. The turn
before a call has no reasoning but at high effort: the prompt with the tools can then be shared by several calls.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from recipes.default.dialogue import Dialogue, compact
from recipes.default.functions import Asked, Function, Offered, ask, draw, filled, made_up, offer, roughened, spoken
from recipes.default.texts import lines_of
from recipes.default.values import Values

INSTRUCTIONS = (
    "You are a helpful assistant.", "Be brief.", "Answer politely.", "You help the customers of a shop.",
    "Use the tools where they help.", "You are the assistant of a small office.", "Keep answers to one sentence.",
    "You work for a travel agency.", "Only call tools that exist.", "Help the user with everyday tasks.",
)  # fmt: skip


class Talk(NamedTuple):
    """What needs no tool: a question, what there is to think about it, and an answer."""

    question: str
    reasoning: str
    answer: str


def plain_talk() -> list[Talk]:
    """That of talk.txt."""
    return [Talk(*map(str.strip, line.split(" | "))) for line in lines_of("talk.txt")]


class Calls:
    """Makes conversations with functions, from the ones that were read and ones that it makes up."""

    def __init__(
        self, rng: random.Random, functions: Sequence[Function], talk: Sequence[Talk], *, made_up_share: float = 0.48
    ) -> None:
        self._rng = rng
        self._talk = talk
        self._values = Values(rng)
        self._functions = functions
        self._made_up_share = made_up_share

    def _some(self) -> Function:
        rng = self._rng
        return made_up(rng) if rng.random() < self._made_up_share else rng.choice(self._functions)

    def offered(self, most: int = 4) -> list[Offered]:
        """One to `most` functions, each of another name."""
        count = self._rng.choices(range(1, most + 1), weights=(30, 30, 25, 15)[:most])[0]
        found: dict[str, Offered] = {}
        while len(found) < count:
            new = offer(self._some(), self._rng)
            found.setdefault(new.name, new)
        return [*found.values()]

    def dialogue(self, offered: Sequence[Offered], **options: Any) -> Dialogue:
        instructions = self._rng.choice(INSTRUCTIONS) if self._rng.random() < 0.12 else None
        return Dialogue(self._rng, functions=[one.tool for one in offered], instructions=instructions, **options)

    # --- kinds of conversations -------------------------------------------------------------------------------

    def single(self) -> dict[str, Any]:
        """One call, and nothing after it."""
        offered = self.offered()
        dialogue = self.dialogue(offered)
        self._call(dialogue, self._rng.choice(offered))
        return dialogue.line()

    def several(self) -> dict[str, Any]:
        """Calls with their results and answers; sometimes a question in between that needs none."""
        offered = self.offered()
        dialogue = self.dialogue(offered)
        for number in range(self._rng.choice((1, 2, 2, 2, 3, 3))):
            if number and self._rng.random() < 0.12:
                self.small_talk(dialogue)
                continue
            one = self._rng.choice(offered)
            asked = self._call(dialogue, one)
            self._result(dialogue, one, asked)
        return dialogue.line()

    def unneeded(self) -> dict[str, Any]:
        """A question that needs none of the functions."""
        dialogue = self.dialogue(self.offered(3))
        self.small_talk(dialogue)
        return dialogue.line()

    def missed(self) -> dict[str, Any]:
        """A wish that no function on offer fulfils; or one for a tool that does not exist, by its name."""
        rng = self._rng
        wanted, *others = self.offered(3)
        while not others and rng.random() < 0.8:
            wanted, *others = self.offered(3)
        dialogue = self.dialogue(others)
        names = " and ".join(one.name for one in others)
        if rng.random() < 0.4:
            said = rng.choice(
                (
                    "Use {name} to help me.",
                    "Call the tool {name}.",
                    "Run {name} now.",
                    "Please use {name} for this: {said}",
                )
            )
            dialogue.user(said.format(name=wanted.name, said=ask(wanted, self._values).said))
            dialogue.think(f"There is no tool {wanted.name}.")
            answer = f"There is no tool called {wanted.name} here."
        else:
            dialogue.user(ask(wanted, self._values).said)
            what = wanted.tool["function"]["description"].rstrip(".")
            dialogue.think(f"That takes a tool which I do not have.{f' There is only {names}.' if others else ''}")
            answer = rng.choice(("I cannot do that: I have no tool for it.", "I'm sorry, I have no tool for that."))
            if not what.startswith(("Facts", "Weather", "Currency")) and rng.random() < 0.3:
                answer = f"I'm sorry, I have no tool for that ({what.lower()})."
        dialogue.answer(f"{answer} I have {names}." if others and rng.random() < 0.6 else answer)
        return dialogue.line()

    def unclear(self) -> dict[str, Any]:
        """A wish without what the function needs; the call comes when the user has said it."""
        for one in iter(lambda: offer(self._some(), self._rng), None):
            needed = [parameter for parameter in one.function.parameters if not parameter.optional]
            if len(needed) == 1 and needed[0].kind not in ("flag", "yes_no", "message"):
                break
        parameter = needed[0]
        dialogue = self.dialogue([one], effort="low")
        words = one.name.replace("_", " ")
        dialogue.user(
            self._rng.choice(("Use {name}.", "I need {words}.", "{words} please", "Can you do {words}?")).format(
                name=one.name, words=words
            )
        )
        asked_for = one.named[parameter.key].replace("_", " ")
        dialogue.answer(f"What is the {asked_for}?")
        value = draw(parameter.kind, self._values)
        dialogue.user(self._rng.choice(("{value}", "It is {value}.", "{value} please")).format(value=spoken(value)))
        dialogue.call(one.name, {one.named[parameter.key]: value})
        return dialogue.line()

    # --- parts of them ----------------------------------------------------------------------------------------

    def _call(self, dialogue: Dialogue, one: Offered) -> Asked:
        asked = ask(one, self._values)
        dialogue.user(roughened(asked.said, self._rng))
        if dialogue.effort == "high":
            dialogue.think(
                self._rng.choice(("This is for {name}.", "{name} does that.", "I call {name}.")).format(name=one.name)
            )
        dialogue.call(one.name, asked.arguments)
        return asked

    def _result(self, dialogue: Dialogue, one: Offered, asked: Asked) -> None:
        """What the function gave, and the answer that tells it; now and then it failed."""
        rng, function = self._rng, one.function
        if rng.random() < 0.06:
            error = rng.choice(("not found", "service unavailable", "permission denied", "invalid value", "timeout"))
            dialogue.result(compact({"error": error}))
            dialogue.answer(rng.choice((f"That did not work: {error}.", f"I'm sorry, the call failed: {error}.")))
            return
        values = {
            **asked.values,
            **{parameter.key: draw(parameter.kind, self._values) for parameter in function.result},
        }
        told = {parameter.names[0]: values[parameter.key] for parameter in function.result}
        dialogue.result(compact(told))
        answer = rng.choice(function.answers)
        if all("{" + key + "}" not in answer or key in values for key in values):
            dialogue.answer(filled(answer, values))

    def small_talk(self, dialogue: Dialogue) -> None:
        """A question and an answer, without any of the tools."""
        said = self._rng.choice(self._talk)
        dialogue.user(said.question)
        dialogue.think(f"{said.reasoning} No tool is needed.")
        dialogue.answer(said.answer)


def call_lines(
    rng: random.Random, functions: Sequence[Function], talk: Sequence[Talk], count: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many conversations, each with the name of its kind."""
    calls = Calls(rng, functions, talk)
    kinds = {
        "one call": (calls.single, 42), "calls and answers": (calls.several, 44), "no call needed": (calls.unneeded, 5),
        "no such tool": (calls.missed, 6), "asks back": (calls.unclear, 3),
    }  # fmt: skip
    for kind in rng.choices([*kinds], weights=[weight for _, weight in kinds.values()], k=count):
        yield kind, kinds[kind][0]()
