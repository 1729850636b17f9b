"""A hundred short questions with answers that can be looked for: none of them is in the training set."""

import random
from typing import NamedTuple

_CAPITALS = {
    "Portugal": "Lisbon",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Switzerland": "Bern",
    "Argentina": "Buenos Aires",
    "South Korea": "Seoul",
    "the Netherlands": "Amsterdam",
    "the United Kingdom": "London",
    "the United States": "Washington",
    "Czechia": "Prague",
    "Colombia": "Bogot",
    "Israel": "Jerusalem",
    "Nepal": "Kathmandu",
    "Iceland": "Reykjav",
    "Croatia": "Zagreb",
    "Bulgaria": "Sofia",
    "Lebanon": "Beirut",
    "the Philippines": "Manila",
    "Ghana": "Accra",
    "Jamaica": "Kingston",
}
_FACTS = (
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What is the largest planet in the solar system?", "Jupiter"),
    ("Which planet is closest to the sun?", "Mercury"),
    ("What is the chemical formula of water?", "H2O|H₂O"),
    ("What is the freezing point of water in degrees Celsius?", "0|zero"),
    ("How many continents are there?", "7|seven"),
    ("Which gas do plants take in?", "carbon dioxide|CO2"),
    ("Who painted the Mona Lisa?", "Leonardo|da Vinci"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("How many minutes are in an hour?", "60|sixty"),
    ("How many months are in a year?", "12|twelve"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("Which animal is called the king of the jungle?", "lion"),
    ("What is the tallest mountain in the world?", "Everest"),
    ("Who was the first president of the United States?", "Washington"),
    ("What do cows drink as calves?", "milk"),
    ("What is the opposite of large?", "small|little"),
    ("What is the opposite of up?", "down"),
    ("What is the past tense of go?", "went"),
    ("What colour do you get from blue and yellow?", "green"),
    ("How many sides does a triangle have?", "3|three"),
    ("How many wheels does a bicycle have?", "2|two"),
    ("What is the currency of Japan?", "yen"),
    ("On which continent is Egypt?", "Africa"),
    ("What is the hardest natural substance?", "diamond"),
    ("Which organ pumps blood through the body?", "heart"),
    ("What is frozen water called?", "ice"),
    ("Which star does the Earth orbit?", "sun"),
    ("What is the name of our galaxy?", "Milky Way"),
    ("How many letters are in the English alphabet?", "26|twenty-six"),
    ("What is the first month of the year?", "January"),
    ("Which day comes after Monday?", "Tuesday"),
    ("What is the young of a dog called?", "pup"),
    ("Which animal gives us wool?", "sheep"),
    ("What is the longest river in Africa?", "Nile"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("What metal is liquid at room temperature?", "mercury"),
    ("What force makes things fall to the ground?", "gravity"),
    ("What do caterpillars turn into?", "butterfl"),
    ("Which season is the coldest?", "winter"),
)


class Question(NamedTuple):
    kind: str
    text: str
    expected: str
    """Any of these, between bars, in whatever case; numbers as whole words."""


def questions() -> list[Question]:
    """Twenty capitals, forty facts, forty sums."""
    rng = random.Random("questions")
    found = [
        Question("capital", f"What is the capital of {country}?", capital) for country, capital in _CAPITALS.items()
    ]
    found += [Question("fact", text, expected) for text, expected in _FACTS]
    while len(found) < 100:
        a, b, kind = rng.randint(2, 60), rng.randint(2, 40), rng.choice("+-")
        if kind == "-" and b > a:
            continue
        words = {"+": "plus", "-": "minus"}[kind]
        text = rng.choice((f"Calculate {a} {kind} {b}.", f"What do you get for {a} {words} {b}?"))
        found.append(Question("sum", text, str(a + b if kind == "+" else a - b)))
    return found
