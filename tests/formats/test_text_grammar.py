"""The grammar of plain text: it has the form that was asked for, and then it ends."""

from typing import Any

import numpy as np
import pytest

from freehold.errors import RequestError, SchemaError, UsageError
from freehold.formats.forms import Choice, FreeText, JsonObject, JsonSchema, Lark, Regex
from freehold.formats.text_grammar import TextGrammar
from freehold.formats.tokenizer import Tokenizer

END, END_OF_TEXT = 2, 0  # of the small vocabulary


def allowed(constraint: Any, vocab_size: int) -> set[int]:
    row = np.full(-(-vocab_size // 32), -1, np.int32)
    constraint.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[:vocab_size].tolist())


def after(tokenizer: Tokenizer, form: Any, text: str, stop_ids: tuple[int, ...] = (END,)) -> Any:
    """The constraint after this text, each token of which may come where it does."""
    constraint = TextGrammar(tokenizer, form, stop_ids)()
    for token in tokenizer.encode(text):
        assert token in allowed(constraint, tokenizer.vocab_size)
        constraint.accept(token)
    return constraint


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (JsonObject(), '{"a": [1, {"b": "<|im_end|>"}]}'),
        (JsonSchema({"type": "array", "items": {"type": "integer"}}), "[1, 2]"),
        (Regex("[a-z]{2}/é"), "ab/é"),
        (Lark('start: "yes" | "no" /[0-9]/'), "no1"),
        (Choice(("yes", "no")), "yes"),
        (Choice(('"<|im_end|>\\\n"', "x")), '"<|im_end|>\\\n"'),
    ],
)
def test_what_is_complete_ends(small: Tokenizer, form: Any, text: str) -> None:
    constraint = after(small, form, text)
    assert constraint.forced() == [END] and allowed(constraint, small.vocab_size) == {END}
    assert not constraint.is_finished()
    constraint.accept(END)
    assert constraint.is_finished() and constraint.forced() == []


def test_what_is_complete_may_go_on_where_the_form_does(small: Tokenizer) -> None:
    constraint = after(small, Choice(("no", "nothing")), "no", (END, END_OF_TEXT))
    assert constraint.forced() == []
    assert allowed(constraint, small.vocab_size) == {END, END_OF_TEXT, *small.encode("t")}
    for token in small.encode("thing"):
        constraint.accept(token)
    assert allowed(constraint, small.vocab_size) == {END, END_OF_TEXT}
    constraint.accept(END_OF_TEXT)
    assert constraint.is_finished()


def test_what_is_not_complete_does_not_end(small: Tokenizer) -> None:
    for form, text in ((Regex("a+b"), "aa"), (JsonObject(), '{"a":1'), (Choice(("yes", "no")), "ye")):
        constraint = after(small, form, text)
        assert not allowed(constraint, small.vocab_size) & set(small.control_tokens.values())
        with pytest.raises(RequestError, match="cannot come here"):
            constraint.accept(END)


def test_the_first_token_is_of_the_form(small: Tokenizer) -> None:
    assert TextGrammar(small, JsonSchema({"const": {"a": 1}}), {END})().forced() == small.encode("{")
    assert allowed(TextGrammar(small, Choice(("x", "yz")), {END})(), small.vocab_size) == set(small.encode("xy"))
    assert END in allowed(TextGrammar(small, Regex("a*"), {END})(), small.vocab_size)


def test_only_control_tokens_end_a_text(small: Tokenizer) -> None:
    """ "a" may be part of it; where it stops the sample all the same, that is its end."""
    (letter,) = small.encode("a")
    grammar = TextGrammar(small, Regex("[ab]+"), {letter, END, 10**6})
    assert grammar.stop_ids == {END}
    constraint = grammar()
    assert allowed(constraint, small.vocab_size) == {*small.encode("ab")}
    with pytest.raises(UsageError, match="a control token"):
        TextGrammar(small, Regex("[ab]+"), {letter})


def test_samples_do_not_share_their_state(small: Tokenizer) -> None:
    grammar = TextGrammar(small, Choice(("a", "b")), {END})
    one, other = grammar(), grammar()
    one.accept(*small.encode("a"))
    assert one.forced() == [END] and allowed(other, small.vocab_size) == set(small.encode("ab"))


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        (UsageError, FreeText(), "response_format must be"),
        (UsageError, Regex("(?=a)"), "look-around"),
        (UsageError, Lark("start: <|im_end|>"), "reaches beyond"),
        (UsageError, Lark("start: a\na: a"), "no text matches"),
        (SchemaError, JsonSchema({"properties": {"a": {"not": {}}}}), "/properties/a/not"),
    ],
)
def test_what_cannot_be_enforced_is_refused(small: Tokenizer, kind: type[Exception], form: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        TextGrammar(small, form, {END})


def test_gpt_oss_has_the_same(gpt_oss: Tokenizer) -> None:
    ends = (gpt_oss.control_id("<|return|>"), gpt_oss.control_id("<|endoftext|>"))
    constraint = after(gpt_oss, JsonSchema({"enum": ["a b c", 1]}), '"a b c"', ends)
    assert allowed(constraint, gpt_oss.vocab_size) == set(ends)
