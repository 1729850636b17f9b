"""Conversations in which `python` or `browser` is offered; what the tools said in them is what they really say.

Code runs in freehold's own sandbox, pages are shown by freehold's own browser over pages made up here. So the results
are rendered as they are in a chat, and no answer says what its tool did not.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freehold.formats.conversation import ToolNamespace
from freehold.formats.tokenizer import Tokenizer
from freehold.tools.base import ToolError, ToolSession
from freehold.tools.browser.browser import Browser
from freehold.tools.browser.content import Content, Hit
from freehold.tools.python import PythonTool
from recipes.default.calls import Calls
from recipes.default.dialogue import Dialogue, compact
from recipes.default.values import Values

# --- python ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sum:
    """Something to compute: `answer` has {} where the output goes."""

    question: str
    code: str
    answer: str


class Sums:
    """Questions for python. `held_out` ones have words of their own."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._rng = values.rng
        self._kinds: Sequence[tuple[Callable[[], Sum], int]] = (
            (self._product, 14), (self._sum, 8), (self._difference, 6), (self._quotient, 6), (self._percent, 8),
            (self._mean, 5), (self._power, 5), (self._root, 4), (self._between, 8), (self._later, 6),
            (self._weekday, 6),
            (self._letters, 9), (self._length, 5), (self._reversed, 5), (self._primes, 3), (self._sorted, 4),
            (self._degrees, 3), (self._factorial, 2), (self._words, 3),
        )  # fmt: skip

    def draw(self) -> Sum:
        kinds, weights = zip(*self._kinds, strict=True)
        made: Sum = self._rng.choices(kinds, weights=weights)[0]()
        return made

    def _of(self, *texts: str, **slots: Any) -> str:
        return self._rng.choice(texts).format(**slots)

    def _product(self) -> Sum:
        a, b = self._rng.randint(12, 9999), self._rng.randint(12, 999)
        says = (
            "What is {a} * {b}?",
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "Compute {a} x {b}",
            "{a} times {b}?",
        )
        return Sum(self._of(*says, a=a, b=b), f"print({a} * {b})", f"{a} * {b} = {{}}.")

    def _sum(self) -> Sum:
        numbers = [self._rng.randint(11, 9999) for _ in range(self._rng.choice((2, 3, 3, 4)))]
        plus = " + ".join(map(str, numbers))
        listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
        says = ("What is {plus}?", "Add {listed}.", "What is the sum of {listed}?", "Calculate {plus}.", "{plus} = ?")
        return Sum(self._of(*says, plus=plus, listed=listed), f"print({plus})", f"{plus} = {{}}.")

    def _difference(self) -> Sum:
        a, b = self._rng.randint(1000, 99999), self._rng.randint(100, 9999)
        says = ("What is {a} - {b}?", "Subtract {b} from {a}.", "What is {a} minus {b}?", "How much is {a} less {b}?")
        return Sum(self._of(*says, a=a, b=b), f"print({a} - {b})", f"{a} - {b} = {{}}.")

    def _quotient(self) -> Sum:
        b, c = self._rng.randint(3, 99), self._rng.randint(12, 999)
        says = (
            "What is {a} / {b}?",
            "Divide {a} by {b}.",
            "How often does {b} go into {a}?",
            "What is {a} divided by {b}?",
        )
        return Sum(self._of(*says, a=b * c, b=b), f"print({b * c} / {b})", f"{b * c} / {b} = {{}}.")

    def _percent(self) -> Sum:
        p, a = self._rng.randint(2, 95), self._rng.randint(20, 5000)
        says = (
            "What is {p}% of {a}?",
            "How much is {p} percent of {a}?",
            "Calculate {p}% of {a}.",
            "{p} percent of {a}?",
        )
        return Sum(self._of(*says, p=p, a=a), f"print({a} * {p} / 100)", f"{p}% of {a} is {{}}.")

    def _mean(self) -> Sum:
        numbers = [self._rng.randint(1, 200) for _ in range(self._rng.choice((3, 4, 5)))]
        listed = ", ".join(map(str, numbers))
        says = ("What is the average of {n}?", "Compute the mean of {n}.", "Average these numbers: {n}")
        return Sum(self._of(*says, n=listed), f"n = {numbers}\nprint(sum(n) / len(n))", "The average is {}.")

    def _power(self) -> Sum:
        a, b = self._rng.randint(2, 25), self._rng.randint(3, 12)
        says = ("What is {a} to the power of {b}?", "Compute {a}^{b}.", "What is {a}**{b}?")
        return Sum(self._of(*says, a=a, b=b), f"print({a} ** {b})", f"{a} to the power of {b} is {{}}.")

    def _root(self) -> Sum:
        a = self._rng.choice((self._rng.randint(12, 300) ** 2, self._rng.randint(50, 9999)))
        says = ("What is the square root of {a}?", "Compute sqrt({a}).", "Square root of {a}?")
        return Sum(self._of(*says, a=a), f"import math\nprint(math.sqrt({a}))", f"The square root of {a} is {{}}.")

    def _between(self) -> Sum:
        first, last = sorted((self._values.day(), self._values.day()))
        says = (
            "How many days are between {a} and {b}?", "How many days from {a} to {b}?", "Days between {a} and {b}?",
            "Count the days from {a} until {b}.",
        )  # fmt: skip
        code = f"from datetime import date\nprint(({_date(last)} - {_date(first)}).days)"
        return Sum(self._of(*says, a=first, b=last), code, f"There are {{}} days between {first} and {last}.")

    def _later(self) -> Sum:
        day, n = self._values.day(), self._rng.randint(8, 500)
        says = ("What date is {n} days after {a}?", "Which day comes {n} days after {a}?", "Add {n} days to {a}.")
        code = f"from datetime import date, timedelta\nprint({_date(day)} + timedelta(days={n}))"
        return Sum(self._of(*says, a=day, n=n), code, f"{n} days after {day} it is {{}}.")

    def _weekday(self) -> Sum:
        day = self._values.day()
        says = ("What day of the week is {a}?", "Which weekday is {a}?", "On which day of the week does {a} fall?")
        code = f'from datetime import date\nprint({_date(day)}.strftime("%A"))'
        return Sum(self._of(*says, a=day), code, f"{day} is a {{}}.")

    def _word(self) -> str:
        values = self._values
        return self._rng.choice((values.thing, values.city, values.topic, values.last_name))().replace(" ", "").lower()

    def _letters(self) -> Sum:
        word = self._word()
        letter = self._rng.choice(word)
        says = (
            'How many times does the letter "{c}" occur in "{w}"?',
            "How many {c}'s are in {w}?",
            'Count the letter {c} in "{w}".',
            'How often is "{c}" in the word {w}?',
        )
        return Sum(
            self._of(*says, c=letter, w=word),
            f'print("{word}".count("{letter}"))',
            f'The letter "{letter}" occurs {{}} times in "{word}".',
        )

    def _length(self) -> Sum:
        word = self._word()
        says = ('How many letters does "{w}" have?', "How long is the word {w}?", 'Count the letters of "{w}".')
        return Sum(self._of(*says, w=word), f'print(len("{word}"))', f'"{word}" has {{}} letters.')

    def _reversed(self) -> Sum:
        word = self._word()
        says = ('Reverse the word "{w}".', "What is {w} spelled backwards?", 'Write "{w}" backwards.')
        return Sum(self._of(*says, w=word), f'print("{word}"[::-1])', f'"{word}" backwards is "{{}}".')

    def _primes(self) -> Sum:
        a = self._rng.randint(50, 9999)
        says = ("Is {a} a prime number?", "Check whether {a} is prime.")
        return Sum(self._of(*says, a=a), f"print(all({a} % i for i in range(2, {a})))", f"Is {a} prime: {{}}.")

    def _sorted(self) -> Sum:
        numbers = [self._rng.randint(1, 400) for _ in range(self._rng.choice((4, 5, 6)))]
        listed = ", ".join(map(str, numbers))
        says = ("Sort these numbers: {n}", "Put {n} in order.", "Order the numbers {n}.")
        return Sum(self._of(*says, n=listed), f"print(sorted({numbers}))", "In order: {}.")

    def _degrees(self) -> Sum:
        a = self._rng.randint(-30, 110)
        if self._rng.random() < 0.5:
            says, code = (
                ("What is {a} degrees Celsius in Fahrenheit?", "Convert {a} C to F."),
                f"print({a} * 9 / 5 + 32)",
            )
            return Sum(self._of(*says, a=a), code, f"{a} degrees Celsius are {{}} degrees Fahrenheit.")
        says, code = (
            ("What is {a} degrees Fahrenheit in Celsius?", "Convert {a} F to C."),
            f"print(round(({a} - 32) * 5 / 9, 1))",
        )
        return Sum(self._of(*says, a=a), code, f"{a} degrees Fahrenheit are {{}} degrees Celsius.")

    def _factorial(self) -> Sum:
        a = self._rng.randint(5, 16)
        says = ("What is {a} factorial?", "Compute {a}!")
        return Sum(self._of(*says, a=a), f"import math\nprint(math.factorial({a}))", f"{a}! = {{}}.")

    def _words(self) -> Sum:
        text = self._values.message()
        says = ('How many words are in "{t}"?', 'Count the words: "{t}"')
        return Sum(self._of(*says, t=text), f'print(len("{text}".split()))', "The text has {} words.")


def _date(day: str) -> str:
    return "date({}, {}, {})".format(*map(int, day.split("-")))


def python_namespace() -> ToolNamespace:
    """As a chat describes it. Raises UnsupportedError where there is no sandbox."""
    return PythonTool().namespace


class Builtins:
    """Makes conversations with built-in tools. To be used within one event loop."""

    def __init__(self, rng: random.Random, calls: Calls, python: ToolNamespace, tokenizer: Tokenizer) -> None:
        self._rng = rng
        self._calls = calls
        self._python = python
        self._tokenizer = tokenizer
        self._values = Values(rng)
        self._sums = Sums(self._values)

    # --- python -----------------------------------------------------------------------------------------------

    async def python(self, session: ToolSession, problems: Sequence[Sum] = ()) -> dict[str, Any]:
        """One to three sums, each computed by python; of the `problems`, where there are some."""
        rng = self._rng
        functions = self._calls.offered(2) if rng.random() < 0.15 else ()
        dialogue = self._calls.dialogue(functions, builtins=[self._python], **({"effort": "low"} if problems else {}))
        for number in range(1 if problems else rng.choice((1, 1, 1, 2))):
            if number and rng.random() < 0.3:
                self._calls.small_talk(dialogue)
                continue
            problem = rng.choice(problems) if problems else self._sums.draw()
            dialogue.user(problem.question)
            if dialogue.effort == "high":
                dialogue.think(rng.choice(("I compute that with python.", "Python can compute this.")))
            dialogue.use("python", problem.code)
            result = (await session.call("python", problem.code)).text
            dialogue.result(result)
            dialogue.answer(problem.answer.format(result.splitlines()[-1] if result else ""))
        return dialogue.line()

    def idle(self) -> dict[str, Any]:
        """Built-in tools that are offered, and not needed."""
        dialogue = Dialogue(self._rng, builtins=[self._python])
        self._calls.small_talk(dialogue)
        return dialogue.line()

    # --- browser ----------------------------------------------------------------------------------------------

    async def browser(self) -> dict[str, Any]:
        """A question about made-up pages: searched, mostly opened, answered with the line that says it."""
        rng = self._rng
        world = Pages(self._values, rng.choice(("web", "web", "notes", "docs", "wiki", "handbook", "archive")))
        browser = Browser(sources=[world], tokenizer=self._tokenizer)
        session = await browser.open()
        try:
            builtins = [browser.namespace, self._python] if rng.random() < 0.12 else [browser.namespace]
            dialogue = self._calls.dialogue((), builtins=builtins)
            kind = rng.random()
            if kind < 0.08:
                self._calls.small_talk(dialogue)
            elif kind < 0.16:
                await self._nothing(dialogue, session)
            else:
                await self._searched(dialogue, session, world, by_address=kind < 0.30)
        finally:
            await session.aclose()
            browser.close()
        return dialogue.line()

    async def _nothing(self, dialogue: Dialogue, session: ToolSession) -> None:
        name = f"{self._values.last_name()} {self._rng.choice(('Institute', 'Palace', 'Express', 'Foundation'))}"
        dialogue.user(self._rng.choice(("Search for the {n}.", "What do you find about the {n}?")).format(n=name))
        await self._use(dialogue, session, "search", {"query": name})
        dialogue.answer(f"I found nothing about the {name}.")

    async def _searched(self, dialogue: Dialogue, session: ToolSession, world: "Pages", *, by_address: bool) -> None:
        rng = self._rng
        page = rng.choice(world.pages)
        fact = rng.choice(page.facts)
        if by_address:
            dialogue.user(
                rng.choice(("Open {u} and tell me: {q}", "{q} It says so on {u}.")).format(u=page.url, q=fact.question)
            )
            shown = await self._use(dialogue, session, "open", {"id": page.url})
            dialogue.answer(_cited(fact, shown, 0))
            return
        lead = rng.choice(("", "", "Search: ", "Look this up: ", "Please find out: "))
        dialogue.user(lead + fact.question)
        if dialogue.effort == "high":
            dialogue.think("I search for that.")
        found = await self._use(dialogue, session, "search", {"query": f"{page.title} {fact.about}"})
        if fact.sentence in _unwrapped(found):
            dialogue.answer(_cited(fact, found, 0))
            return
        link = re.search(rf"【(\d+)†{re.escape(page.title)}", found)
        assert link is not None, "a search finds the page whose title it has"
        shown = await self._use(dialogue, session, "open", {"id": int(link[1])})
        dialogue.answer(_cited(fact, shown, 1))

    async def _use(self, dialogue: Dialogue, session: ToolSession, name: str, arguments: dict[str, Any]) -> str:
        text = compact(arguments)
        dialogue.use(f"browser.{name}", text)
        try:
            result = (await session.call(f"browser.{name}", text)).text
        except ToolError as error:
            result = f"Error: {error}"
        dialogue.result(result)
        return result


def _unwrapped(shown: str) -> str:
    return re.sub(r"\nL\d+: ", " ", shown).replace("  ", " ")


def _cited(fact: "Fact", shown: str, cursor: int) -> str:
    """The sentence, and the line that it begins on."""
    begin = fact.sentence[:25]
    line = next((found[1] for found in re.finditer(r"^L(\d+): (.*)$", shown, re.MULTILINE) if begin in found[2]), None)
    return fact.sentence if line is None else f"{fact.sentence}【{cursor}†L{line}】"


# --- pages that are made up -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fact:
    about: str
    question: str
    sentence: str
    value: str


@dataclass(frozen=True, slots=True)
class MadePage:
    url: str
    title: str
    facts: tuple[Fact, ...]

    @property
    def text(self) -> str:
        return "\n".join(["", *(fact.sentence for fact in self.facts)])


def _value(sentence: str, slots: Mapping[str, Any]) -> str:
    """What a sentence says, besides of whom."""
    (name,) = set(re.findall(r"{(\w+)}", sentence)) - {"n"}
    return str(slots[name])


_FACTS: dict[str, Sequence[tuple[str, str, str]]] = {
    "museum": (
        ("opening year", "When was the {n} opened?", "The {n} was opened in {year}."),
        ("ticket price", "What does a ticket for the {n} cost?", "A ticket for the {n} costs {price} euros."),
        ("director", "Who directs the {n}?", "The {n} is directed by {person}."),
        ("city", "In which city is the {n}?", "The {n} is in {city}."),
        ("visitors", "How many visitors does the {n} have a year?", "The {n} has {big} visitors a year."),
    ),
    "company": (
        ("founder", "Who founded {n}?", "{n} was founded by {person}."),
        ("headquarters", "Where are the headquarters of {n}?", "The headquarters of {n} are in {city}."),
        ("employees", "How many people work at {n}?", "{n} has {big} employees."),
        ("product", "What does {n} make?", "{n} makes {thing}s."),
        ("founding year", "In which year was {n} founded?", "{n} was founded in {year}."),
    ),
    "bridge": (
        ("length", "How long is the {n}?", "The {n} is {big} meters long."),
        ("architect", "Who designed the {n}?", "The {n} was designed by {person}."),
        ("colour", "What colour is the {n}?", "The {n} is painted {colour}."),
        ("completion", "When was the {n} finished?", "The {n} was finished in {year}."),
    ),
    "festival": (
        ("date", "When does the {n} begin?", "The {n} begins on {day}."),
        ("theme", "What is the theme of the {n}?", "The theme of the {n} is {topic}."),
        ("place", "Where does the {n} take place?", "The {n} takes place in {city}."),
        ("fee", "How much is the entrance to the {n}?", "The entrance to the {n} costs {price} euros."),
    ),
    "project": (
        ("manager", "Who leads the {n}?", "The {n} is led by {person}."),
        ("budget", "What is the budget of the {n}?", "The budget of the {n} is {big} euros."),
        ("deadline", "What is the deadline of the {n}?", "The deadline of the {n} is {day}."),
        ("code", "What is the code of the {n}?", "The code of the {n} is {code}."),
    ),
}


class Pages:
    """A few pages, as a source of the browser: searched by the words that they share with the query."""

    local = False

    def __init__(self, values: Values, name: str) -> None:
        self.name = name
        kinds = values.rng.sample([*_FACTS], values.rng.choice((2, 3)))
        self.pages = tuple(self._page(kind, values) for kind in kinds)

    def _page(self, kind: str, values: Values) -> MadePage:
        name = values.company() if kind == "company" else f"{values.last_name()} {kind.capitalize()}"
        slots = {
            "n": name,
            "year": values.rng.randint(1790, 2023),
            "price": values.count(3, 90),
            "person": f"{values.first_name()} {values.last_name()}",
            "city": values.city(),
            "big": values.count(120, 90000),
            "thing": values.thing(),
            "colour": values.colour(),
            "day": values.day(),
            "topic": values.topic(),
            "code": values.code(),
        }
        chosen = values.rng.sample(_FACTS[kind], values.rng.choice((3, 4)))
        facts = tuple(
            Fact(about, question.format(**slots), sentence.format(**slots), _value(sentence, slots))
            for about, question, sentence in chosen
        )
        slug = name.lower().replace(" ", "-")
        host = "https://" + slug.split("-")[0] + ".example/" if self.name == "web" else f"{self.name}/"
        return MadePage(f"{host}{slug}.html", name, facts)

    def has(self, address: str) -> bool:
        return any(page.url == address for page in self.pages)

    async def search(self, query: str, topn: int) -> Sequence[Hit]:
        words = set(re.findall(r"\w+", query.lower()))
        ranked = []
        for page in self.pages:
            score = len(words & set(re.findall(r"\w+", f"{page.title} {page.text}".lower())) - _COMMON)
            if score:
                ranked.append((-score, page.title, page))
        hits = []
        for _, _, page in sorted(ranked)[:topn]:
            lines = page.text.split("\n")
            best = max(
                range(len(lines)), key=lambda i: len(words & set(re.findall(r"\w+", lines[i].lower())) - _COMMON)
            )
            place = page.url.split("/")[2] if self.name == "web" else self.name
            hits.append(
                Hit(url=page.url, title=page.title, place=place, summary=_teaser(lines, best, words), line=best)
            )
        return hits

    async def fetch(self, address: str, *, as_source: bool = False) -> Content:
        for page in self.pages:
            if page.url == address:
                return Content(url=page.url, shown=page.url, title=page.title, text=page.text)
        raise ToolError(f"`{address}` does not exist.")

    def close(self) -> None:
        pass


_COMMON = frozenset({"the", "of", "in", "a", "is", "was", "for", "and", *_FACTS})


def _teaser(lines: Sequence[str], best: int, words: set[str]) -> str:
    """What a list of results shows: the best line, or, of every third page, only another one, so that it is opened."""
    return lines[best] if len(lines[best]) % 3 else lines[1 if best != 1 else 2]
