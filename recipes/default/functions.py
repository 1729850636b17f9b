"""Functions to call, and sentences that call them: read from the text files beside this one, or put together.

A block of such a file reads

    name / other name | Description. / Another one.
    city/place: city "What the parameter means"; days?: 1..10; unit?: (celsius|fahrenheit); express?: flag
    > What is the weather in {city}[ in {unit}]?
    = temperature: -8..36 -> It is {temperature} degrees in {city}.

Slashes part variants, of which each use takes one; `?` marks parameters that may be missing, and `[...]` what is said
only with them; `[?express ...]` is said where a flag is true. A type is a method of `Values`, a range, a choice, a flag
or a `list` of something. What follows `=` is the result, and the answer that tells it.

`made_up` puts functions together from verbs, nouns and attributes, more than any model can learn by heart.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from recipes.default.texts import lines_of
from recipes.default.values import Values

_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)")
_PARAMETER = re.compile(r'(?P<names>[\w?/]+):\s*(?P<kind>\([^)]*\)|list \w+|[\w.\-]+)\s*(?:"(?P<about>[^"]*)")?')
_OPTIONAL = re.compile(r"\[(\?\w+ )?([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """`key` is how sentences call it, `names` are what schemas may call it."""

    key: str
    names: tuple[str, ...]
    kind: str
    about: str = ""
    optional: bool = False

    def draw(self, values: Values) -> Any:
        return draw(self.kind, values)

    def schema(self) -> dict[str, Any]:
        if self.kind == "flag" or self.kind == "yes_no":
            return {"type": "boolean"}
        if self.kind.startswith("("):
            return {"type": "string", "enum": self.kind[1:-1].split("|")}
        if self.kind.startswith("list "):
            return {"type": "array", "items": {"type": "string"}}
        if found := _RANGE.fullmatch(self.kind):
            return {"type": "number" if "." in found[1] else "integer"}
        return {"type": "string"}


def draw(kind: str, values: Values) -> Any:
    """A value of a type."""
    if found := _RANGE.fullmatch(kind):
        return (
            values.number(float(found[1]), float(found[2]))
            if "." in found[1]
            else values.count(int(found[1]), int(found[2]))
        )
    if kind.startswith("("):
        return values.rng.choice(kind[1:-1].split("|"))
    if kind.startswith("list "):
        several = [getattr(values, kind.removeprefix("list "))() for _ in range(values.rng.choice((2, 2, 3)))]
        return list(dict.fromkeys(several))
    if kind == "flag":
        return True
    return values.rng.random() < 0.5 if kind == "yes_no" else getattr(values, kind)()


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """Something that can be offered; `phrases` ask for it, `result` and `answers` tell what came of it."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    phrases: tuple[str, ...]
    result: tuple[Parameter, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A function as it is offered in one conversation: `tool` is OpenAI's, `named` maps keys to parameters' names."""

    function: Function
    tool: Mapping[str, Any]
    named: Mapping[str, str]

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a user says, and the arguments that this means, in the schema's order."""

    said: str
    arguments: Mapping[str, Any]
    values: Mapping[str, Any]


# --- reading --------------------------------------------------------------------------------------------------


def read_functions(path: Path) -> tuple[Function, ...]:
    """All functions of a file. Raises ValueError, with the block, for what is none."""
    text = "\n".join(line for line in path.read_text("utf-8").splitlines() if not line.startswith("#"))
    return tuple(_function(block.strip()) for block in re.split(r"\n\s*\n", text) if block.strip())


def _function(block: str) -> Function:
    lines = [line.strip() for line in block.splitlines()]
    names, bar, descriptions = lines[0].partition(" | ")
    phrases = tuple(line.removeprefix("> ") for line in lines[2:] if line.startswith("> "))
    results = [line.removeprefix("= ") for line in lines[2:] if line.startswith("= ")]
    if not bar or not phrases or len(phrases) + len(results) != len(lines) - 2:
        raise ValueError(f"no function: {block!r:.120}")
    result, _, answer = results[0].partition(" -> ") if results else ("", "", "")
    function = Function(
        names=_variants(names),
        descriptions=_variants(descriptions),
        parameters=_parameters(lines[1]),
        phrases=phrases,
        result=_parameters(result),
        answers=(answer.strip(),) if answer else (),
    )
    known = {parameter.key for parameter in (*function.parameters, *function.result)}
    for text in (*phrases, *function.answers):
        if unknown := set(_SLOT.findall(text)) - known:
            raise ValueError(f"{names}: no parameter {min(unknown)!r} for {text!r}")
    return function


def _variants(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(" / "))


def _parameters(line: str) -> tuple[Parameter, ...]:
    found = []
    for text in filter(None, map(str.strip, line.split(";"))):
        match = _PARAMETER.fullmatch(text)
        if match is None:
            raise ValueError(f"no parameter: {text!r}")
        names = tuple(name.strip("?") for name in match["names"].split("/"))
        found.append(
            Parameter(
                key=names[0],
                names=names,
                kind=match["kind"],
                about=match["about"] or "",
                optional="?" in match["names"],
            )
        )
    return tuple(found)


# --- using ----------------------------------------------------------------------------------------------------


def offer(function: Function, rng: random.Random) -> Offered:
    """One variant of a function: its name, description, and the names of its parameters."""
    named: dict[str, str] = {}
    properties: dict[str, Any] = {}
    explains = rng.random()
    for parameter in function.parameters:
        name = next(name for name in rng.sample(parameter.names, len(parameter.names)) if name not in properties)
        named[parameter.key] = name
        properties[name] = parameter.schema()
        if parameter.about and explains < 0.5:
            properties[name] = {"description": parameter.about, **properties[name]}
    required = [named[parameter.key] for parameter in function.parameters if not parameter.optional]
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    name = rng.choice(function.names)
    if len(function.names) > 1 and rng.random() < 0.1:
        head, *rest = name.split("_")
        name = head + "".join(word.capitalize() for word in rest)
    described: dict[str, Any] = {
        "name": name,
        "description": rng.choice(function.descriptions),
        "parameters": parameters,
    }
    return Offered(function=function, tool={"type": "function", "function": described}, named=named)


def ask(offered: Offered, values: Values, phrase: str | None = None) -> Asked:
    """A sentence that asks for a call, with values of its own."""
    function, rng = offered.function, values.rng
    phrase = phrase or rng.choice(function.phrases)
    drawn: dict[str, Any] = {}
    for parameter in function.parameters:
        drawn[parameter.key] = parameter.draw(values)
        while not isinstance(drawn[parameter.key], bool) and [*drawn.values()].count(drawn[parameter.key]) > 1:
            drawn[parameter.key] = parameter.draw(values)
    given = {parameter.key for parameter in function.parameters if not parameter.optional}

    def optional(match: re.Match[str]) -> str:
        keys = {match[1][1:-1]} if match[1] else set(_SLOT.findall(match[2]))
        if rng.random() < 0.5:
            return ""
        given.update(keys)
        return match[2]

    said = _OPTIONAL.sub(optional, phrase)
    given.update(_SLOT.findall(said))
    first = _SLOT.match(said)
    said = " ".join(filled(said, drawn).split())
    if first is not None and any(one.key == first[1] and one.kind.startswith("(") for one in function.parameters):
        said = said[0].upper() + said[1:]  # a choice, which has its own way to be written
    arguments = {offered.named[key]: value for key, value in drawn.items() if key in given}
    return Asked(said=said, arguments=arguments, values={key: value for key, value in drawn.items() if key in given})


def filled(template: str, values: Mapping[str, Any]) -> str:
    """A text with its slots filled."""
    return _SLOT.sub(lambda match: spoken(values[match[1]]), template)


def spoken(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, list):
        return " and ".join(filter(None, (", ".join(value[:-1]), value[-1])))
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


_AROUND = (
    "Hi! {}",
    "{} Thanks!",
    "Hello, {}",
    "Please: {}",
    "{} Thank you.",
    "One more thing: {}",
    "Now this: {}",
    "Hey, {}",
    "Next: {}",
    "Quick question. {}",
)


def roughened(said: str, rng: random.Random) -> str:
    """As people type: with a greeting, or without large letters and full stops at its ends."""
    chance = rng.random()
    if chance < 0.14:
        return rng.choice(_AROUND).format(said)
    if chance < 0.20 and said[:1].isupper() and said[1:2].islower() and said.split()[0].lower() in _SMALL:
        said = said[0].lower() + said[1:]
    return said.rstrip(".?") if chance > 0.92 and not said.endswith('"') else said


_SMALL = frozenset({
    "what", "how", "tell", "is", "give", "set", "start", "wake", "remind", "create", "send", "email", "write", "text",
    "call", "please", "ring", "add", "put", "book", "find", "get", "where", "track", "play", "turn", "make", "show",
    "search", "order", "cancel", "convert", "log", "record", "open", "read", "rename", "change", "delete", "the", "we",
    "do", "it", "register", "plan", "check",
})  # fmt: skip
"""Words that may stand first with a small letter: none is a name."""


# --- put together ---------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """Verbs as names, users and descriptions have them; nouns; attributes' names, types and ways to be said."""

    verbs: tuple[tuple[str, str, str], ...]
    nouns: tuple[str, ...]
    attributes: tuple[tuple[str, str, tuple[str, ...]], ...]


@cache
def _parts() -> _Parts:
    verbs, nouns, *attributes = lines_of("parts.txt")
    return _Parts(
        tuple(_verb(text) for text in verbs.removeprefix("verbs: ").split(";")),
        tuple(map(str.strip, nouns.removeprefix("nouns: ").split(","))),
        tuple(_attribute(text) for text in attributes),
    )


def _verb(text: str) -> tuple[str, str, str]:
    name, says, does = map(str.strip, text.split("="))
    return name, says, does


def _attribute(text: str) -> tuple[str, str, tuple[str, ...]]:
    names, _, rest = text.partition(": ")
    kind, _, ways = rest.partition(" > ")
    return names, kind, tuple(ways.split(" / ")) if ways else ()


_PLAIN = ("with {w} {v}", "{w} {v}", "{w}: {v}", "the {w} is {v}", "{w} = {v}", "with the {w} {v}")
_OPENINGS = (
    "",
    "",
    "",
    "Please ",
    "Can you ",
    "Could you ",
    "I need you to ",
    "I want to ",
    "I'd like to ",
    "Hi, please ",
    "Let's ",
)


_STATEMENTS = (
    "New {words}", "{Words}", "There should be {article} {words}", "We need {article} {words}",
    "I need {article} {words}", "It is about {article} {words}", "Next {words}", "{Article} {words}, please",
)  # fmt: skip
_FLAGS = (
    ("include_{noun}", "including the {noun}"), ("with_{noun}", "with {noun}"), ("skip_{noun}", "skip the {noun}"),
    ("needs_{noun}", "a {noun} is needed"), ("{noun}_only", "only the {noun}"), ("express", "by express"),
    ("anonymous", "without a name"), ("in_advance", "in advance"), ("confirmed", "it is confirmed"),
    ("replace_{noun}", "and replace the {noun}"), ("has_{noun}", "it has a {noun}"), ("draft", "only as a draft"),
)  # fmt: skip
_TOLD = ("code", "day", "time", "1.0..5000.0", "100..90000", "2..60", "0..100", "5..180", "(open|closed|pending)")


def made_up(rng: random.Random) -> Function:
    """A function that hardly any other conversation has."""
    verb, says, does = rng.choice(_parts().verbs)
    noun = rng.choice(_parts().nouns)
    kind = rng.choice(_parts().nouns) if rng.random() < 0.3 else ""
    words = f"{kind} {noun}" if kind and kind != noun else noun
    article = "an" if words[0] in "aeiou" else "a"
    parameters, ways = _made_up_parameters(rng, noun)

    phrases = tuple(_made_up_phrase(rng, says, words, parameters, ways) for _ in range(3))
    name_words = [verb, *words.split()]
    name = "_".join(name_words if rng.random() < 0.85 else [*words.split(), verb])
    result_names, result_kind, _ = rng.choice([entry for entry in _parts().attributes if entry[1] in _TOLD])
    result_name = result_names.split("/")[0]
    result = Parameter(key=f"r_{result_name}", names=(result_name,), kind=result_kind)
    done = rng.choice(
        (f"The {words} is done", f"Done. The {words} is ready", f"The {words} was found", "That worked", "Done")
    )
    pronoun = rng.choice(("its", "the"))
    return Function(
        names=(name,),
        descriptions=(
            f"{does} {article} {words}.", f"{does} {article} {words} in the system.", f"{says} {article} {words}.",
            f"{words.capitalize()}: {verb}.", f"Use this to {says.lower()} {article} {words}.",
        ),
        parameters=tuple(parameters),
        phrases=phrases,
        result=(result,),
        answers=(f"{done}; {pronoun} {result_name.replace('_', ' ')} is {{{result.key}}}.",),
    )  # fmt: skip


def _made_up_parameters(rng: random.Random, noun: str) -> tuple[list[Parameter], dict[str, tuple[str, ...]]]:
    """Parameters, and the natural ways to say each."""
    parameters: list[Parameter] = []
    ways: dict[str, tuple[str, ...]] = {}
    for number, (names, kind, says) in enumerate(rng.sample(_parts().attributes, rng.choice((1, 2, 2, 3, 3, 4)))):
        name = rng.choice(names.split("/"))
        if number and rng.random() < 0.12:
            others = rng.sample(_parts().nouns, 3)
            name, kind, says = (
                rng.choice(("type", "kind", "mode")),
                f"({'|'.join(others)})",
                ("of the kind {v}", "as {v}"),
            )
        if number and rng.random() < 0.15:
            flag, way = rng.choice(_FLAGS)
            other = rng.choice(_parts().nouns)
            name, kind, says = flag.format(noun=other), "flag", (way.format(noun=other),)
        if name in ways:
            continue
        ways[name] = says
        about = f"The {noun}'s {name.replace('_', ' ')}" if rng.random() < 0.4 else ""
        optional = kind == "flag" or (number > 0 and rng.random() < 0.3)
        parameters.append(Parameter(key=name, names=(name,), kind=kind, about=about, optional=optional))
    return parameters, ways


def _made_up_phrase(
    rng: random.Random, says: str, words: str, parameters: Sequence[Parameter], ways: Mapping[str, Sequence[str]]
) -> str:
    article = "an" if words[0] in "aeiou" else "a"
    plain, comma = rng.choice(_PLAIN), rng.choice((", ", ", ", " "))
    if plain == "the {w} is {v}":
        comma = ", "
    if rng.random() < 0.3:
        start, end = rng.choice(_STATEMENTS), rng.choice((".", ""))
        start = start.format(words=words, Words=words.capitalize(), article=article, Article=article.capitalize())
    else:
        opening = rng.choice(_OPENINGS)
        start = f"{opening}{says.lower() if opening else says} {rng.choice((article, 'the', article))} {words}"
        end = "?" if opening.startswith(("Can", "Could")) else rng.choice((".", ".", "", " please."))
    parts: list[str] = []
    for parameter in rng.sample(parameters, len(parameters)):
        natural = ways[parameter.key] if rng.random() < 0.7 or parameter.kind == "flag" else ()
        way = rng.choice(natural) if natural else plain
        part = way.replace("{w}", parameter.key.replace("_", " ")).replace("{v}", "{" + parameter.key + "}")
        before = " " if natural and not parts and not parameter.optional else comma
        if parameter.kind == "flag":
            part = f"[?{parameter.key} {comma}{part}]"
        else:
            part = f"[{before}{part}]" if parameter.optional else f"{before}{part}"
        parts.append(part)
    return start + "".join(parts) + end
