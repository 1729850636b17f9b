"""The forms that a text can be asked to have: JSON, a schema, a regex, a Lark grammar, one of some texts.

Plain frozen values, of answers (`AnswerFormat`) and of what tools are sent (`TextFormat`). What can be told at once is
checked when they are made (UsageError); whether a form can be enforced shows where `guidance.py` compiles it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from freehold.errors import UsageError


@dataclass(frozen=True, slots=True)
class FreeText:
    """Any text."""


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that matches this schema."""

    schema: Mapping[str, Any] | bool


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole text matches this regular expression, in the syntax of Rust's `regex`, without look-around."""

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UsageError(f"a regex must be a string, got {self.pattern!r:.80}")


@dataclass(frozen=True, slots=True)
class Lark:
    """The text follows this grammar, in llguidance's variant of Lark, from its rule `start`.

    Without what reaches beyond text: references to tokens or other grammars, `~`, `%json`, `%llguidance`.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"a Lark grammar must be a string, got {self.text!r:.80}")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts, to the letter."""

    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple) or not self.values:
            raise UsageError(f"a choice is a tuple of one text at least, got {self.values!r:.80}")
        for value in self.values:
            if not isinstance(value, str) or not value:
                raise UsageError(f"what can be chosen is some text, got {value!r:.80}")


AnswerFormat = JsonObject | JsonSchema | Regex | Lark | Choice
"""What an answer can be asked to be."""

TextFormat = FreeText | Regex | Lark
"""What a tool can be sent instead of JSON arguments."""


def check_answer_format(form: AnswerFormat) -> None:
    """Raises UsageError for anything else."""
    if not isinstance(form, AnswerFormat):
        raise UsageError(
            "response_format must be JsonObject(), JsonSchema(...), Regex(...), Lark(...) or Choice(...), got "
            f"{form!r:.80}"
        )
