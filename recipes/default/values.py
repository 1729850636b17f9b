"""Values that users say and calls repeat: names, places, dates, codes, numbers, short texts.

Two worlds that share none of their words: what is trained on, and what the held-out set asks about. Half of the names
and places are made of syllables, so that there are more of them than a model can remember; it has to copy. Numbers,
times and letters of codes are everybody's. Draws only from the `random.Random` that it is given.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

from recipes.default.texts import lines_of, lists_of

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_COMPANIES = ("Ltd", "Inc", "Group", "Labs", "Foods", "Bank", "Motors", "Media")


@cache
def _messages() -> tuple[list[str], list[str]]:
    lines = lines_of("messages.txt")
    bar = lines.index("|")
    return lines[:bar], lines[bar + 1 :]


@dataclass(frozen=True)
class Values:
    """A world of values. `held_out` ones have words that no training value has."""

    rng: random.Random
    held_out: bool = False

    def _of(self, title: str) -> str:
        return self.rng.choice(self._list(title))

    def _list(self, title: str) -> Sequence[str]:
        return lists_of("words.txt")[title][self.held_out]

    def _letters(self, count: int) -> str:
        return "".join(self.rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=count))

    def _digits(self, count: int) -> str:
        return "".join(self.rng.choices("0123456789", k=count))

    def _made_up(self) -> str:
        begin = "".join(self.rng.choices(self._list("syllables"), k=self.rng.choice((1, 2, 2))))
        return (begin + self._of("endings")).capitalize()

    def first_name(self) -> str:
        return self._made_up() if self.rng.random() < 0.3 else self._of("first names")

    def last_name(self) -> str:
        return self._made_up() if self.rng.random() < 0.4 else self._of("last names")

    def person(self) -> str:
        return f"{self.first_name()} {self.last_name()}" if self.rng.random() < 0.7 else self.first_name()

    def city(self) -> str:
        return self._made_up() if self.rng.random() < 0.25 else self._of("cities")

    def country(self) -> str:
        return self._of("countries")

    def language(self) -> str:
        return self._of("languages")

    def thing(self) -> str:
        return self._of("things")

    def food(self) -> str:
        return self._of("foods")

    def colour(self) -> str:
        return self._of("colours")

    def topic(self) -> str:
        return self._of("topics")

    def title(self) -> str:
        words = (self._of("adjectives"), self._of("nouns"))
        return " ".join(word.capitalize() for word in (("The", *words) if self.rng.random() < 0.4 else words))

    def company(self) -> str:
        return f"{self._made_up()} {self.rng.choice(_COMPANIES)}"

    def street(self) -> str:
        street = self._of("nouns").capitalize()
        return f"{self.rng.randint(1, 240)} {street} {self.rng.choice(('Street', 'Road', 'Avenue', 'Lane'))}"

    def message(self) -> str:
        text = self.rng.choice(_messages()[self.held_out]).format(
            time=self.time(), n=self.rng.randint(2, 60), thing=self.thing(), day=self.rng.choice(_DAYS),
            adj=self._of("adjectives"), noun=self._of("nouns"),
        )  # fmt: skip
        return text if self.rng.random() < 0.4 else text[0].upper() + text[1:]

    def email(self) -> str:
        name = self.first_name().lower()
        if self.rng.random() < 0.5:
            name += f".{self.last_name().lower()}"
        return f"{name}@{self._of('domains')}"

    def url(self) -> str:
        path = f"/{self._of('nouns')}" if self.rng.random() < 0.6 else ""
        return f"https://{self._made_up().lower()}.{self.rng.choice(('com', 'org', 'net'))}{path}"

    def file_name(self) -> str:
        stem = f"{self._of('adjectives')}_{self._of('nouns')}"
        return f"{stem}.{self.rng.choice(('txt', 'pdf', 'csv', 'png', 'docx', 'json'))}"

    def code(self) -> str:
        shape = self.rng.randrange(5)
        if shape == 0:
            return f"{self._letters(2)}-{self._digits(4)}"
        if shape == 1:
            return f"{self._letters(1)}{self._digits(3)}"
        if shape == 2:
            return f"{self._letters(3)}-{self.rng.randint(2022, 2027)}-{self._digits(3)}"
        return f"{self._letters(2)}{self._digits(5)}" if shape == 3 else f"{self.rng.randint(1, 9)}{self._digits(5)}"

    def phone(self) -> str:
        return f"+{self.rng.randint(1, 98)} {self.rng.randint(200, 999)} {self.rng.randint(1000, 9999)}"

    def day(self) -> str:
        first = date(2031, 1, 1) if self.held_out else date(2024, 1, 1)
        return (first + timedelta(days=self.rng.randrange(4 * 365))).isoformat()

    def time(self) -> str:
        return f"{self.rng.randint(6, 22):02}:{self.rng.choice(('00', '15', '30', '45', '10', '20', '05'))}"

    def weekday(self) -> str:
        return self.rng.choice(_DAYS)

    def count(self, low: int = 1, high: int = 12) -> int:
        return self.rng.randint(low, high)

    def number(self, low: float, high: float) -> int | float:
        """A whole one, or one with one or two decimals."""
        if self.rng.random() < 0.5:
            return self.rng.randint(int(low), int(high))
        value = round(self.rng.uniform(low, high), self.rng.choice((1, 2)))
        return int(value) if value == int(value) else value


def distinct_words(held_out: bool) -> frozenset[str]:
    """Every word that stands in one world's lists, in small letters: what tests compare."""
    lists = (sides for title, sides in lists_of("words.txt").items() if title not in ("syllables", "endings"))
    return frozenset(value.lower() for sides in lists for value in sides[held_out])
