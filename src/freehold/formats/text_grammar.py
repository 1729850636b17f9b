"""A grammar for plain text: completions, and models whose chat template knows nothing of Harmony.

    text = the form that was asked for, then one of the stop tokens

The text begins with the first new token. Where it is complete a stop token may follow, and must where nothing else can.
A stop token that is no control token ends no text here: it may be part of one.

A `TextGrammar` is what the engine's `Request.constraint` wants: each call makes the constraint of one sample. What it
refuses, and what making one costs, is told in `guidance.py`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from freehold.errors import UsageError
from freehold.formats.forms import AnswerFormat, check_answer_format
from freehold.formats.guidance import MatcherConstraint, Parts
from freehold.formats.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance


class TextGrammar:
    """Compiled once; each call makes the constraint of one sample. Safe to share between threads.

    `stop_ids` are the tokens that end a text: those of the given ones that are control tokens.
    """

    __slots__ = ("_prototype", "stop_ids")

    stop_ids: frozenset[int]
    _prototype: "llguidance.LLMatcher"

    def __init__(self, tokenizer: Tokenizer, form: AnswerFormat, stop_ids: Iterable[int]) -> None:
        """Raises SchemaError or UsageError for what cannot be enforced, and where no stop token is a control token."""
        check_answer_format(form)
        given = sorted(stop_ids)
        self.stop_ids = frozenset(token for token in given if tokenizer.control_name(token) is not None)
        if not self.stop_ids:
            raise UsageError(f"a text of a given form ends with a control token, and none of {given} is one; add one")
        parts = Parts()
        stops = " | ".join(f"<[{token}]>" for token in sorted(self.stop_ids))
        (self._prototype,) = parts.compile(tokenizer, f"start: {parts.form('answer', form)} stop\nstop: {stops}")

    def __call__(self) -> MatcherConstraint:
        return MatcherConstraint(self._prototype.deep_copy(), ends=self.stop_ids)
