"""The turn's grammar: what a turn may be, what is forced, that schemas are enforced whole or refused."""

import codecs
import json
import random
import time
from typing import Any

import numpy as np
import pytest

from freehold.errors import RequestError, SchemaError, UsageError
from freehold.formats import guidance
from freehold.formats.conversation import Conversation, Tool, ToolNamespace
from freehold.formats.events import ArgumentsDelta, CallDone
from freehold.formats.forms import Choice, FreeText, JsonObject, JsonSchema, Lark, Regex
from freehold.formats.harmony.grammar import AllowedTools, NamedTool, TurnConstraint, TurnGrammar, TurnOptions
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.parser import HarmonyParser
from freehold.formats.harmony.render import render
from freehold.formats.harmony.vocabulary import CONTROL_TOKENS
from freehold.formats.schema import enforceable
from freehold.formats.tokenizer import Tokenizer
from tests.schemas import SCHEMAS, validator

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = Offer(
    functions=(
        Tool(name="get", parameters=WEATHER),
        Tool(name="get_weather", parameters=WEATHER, strict=True),
        Tool(name="stop", strict=True),
    ),
    builtins=(ToolNamespace(name="python"), ToolNamespace(name="browser", tools=(Tool(name="search"),))),
)
SUPPORTED = [entry for entry in SCHEMAS if "refused" not in entry]
REFUSED = [entry for entry in SCHEMAS if "refused" in entry]

CALL = "<|channel|>commentary to=functions."
FINAL = "<|channel|>final<|message|>"
THINK = "<|channel|>analysis<|message|>"
NEXT = "<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def small_harmony(small: Tokenizer) -> Tokenizer:
    return small.with_control_tokens(CONTROL_TOKENS)


def allowed(constraint: TurnConstraint, vocab_size: int) -> set[int]:
    row = np.full(-(-vocab_size // 32), -1, np.int32)
    constraint.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[:vocab_size].tolist())


def refused_at(tokenizer: Tokenizer, options: TurnOptions, text: str) -> str | None:
    """What of the turn is left where it stops being legal; None for a whole one, "" where it could go on."""
    constraint = TurnGrammar(tokenizer, options)()
    tokens = tokenizer.encode_with_control(text)
    for i, token in enumerate(tokens):
        assert not constraint.is_finished()
        forced = constraint.forced()
        if token not in allowed(constraint, tokenizer.vocab_size):
            with pytest.raises(RequestError, match="cannot come here"):
                constraint.accept(token)
            return tokenizer.decode(tokens[i:], control="show")
        assert list(forced) == tokens[i : i + len(forced)] or tokens[i] == forced[0], "what is forced is canonical"
        constraint.accept(token)
    return None if constraint.is_finished() else ""


def is_legal(tokenizer: Tokenizer, text: str, **options: Any) -> bool:
    return refused_at(tokenizer, TurnOptions(**{"offer": TOOLS} | options), text) is None


# --- a turn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn",
    [
        f"{FINAL}Hello.<|return|>",
        f'{THINK}Say "hi"\n\tto 世界 🎉<|end|><|start|>assistant{FINAL}hi<|return|>',
        f"{THINK}One.{NEXT}{THINK}Two.{NEXT}{FINAL}<|return|>",
        f'{THINK}Call.{NEXT}{CALL}get_weather <|constrain|>json<|message|>{{"city":"Rome"}}<|call|>',
        f"<|channel|>commentary<|message|>First I look.{NEXT}{CALL}get<|constrain|>json<|message|>{{}}<|call|>",
        f'{CALL}get json<|message|>{{"anything": [1, {{"goes": null}}]}}<|call|>',
        f'{CALL}get<|message|>{{\n  "city": "Rome",\n  "days": 3\n}}<|call|>',
        f'{CALL}get json<|message|>{{"a": "\\u00e9\\ud83c\\udf89"}}<|call|>',
        f"{CALL}stop json<|message|>{{}}<|call|>",
        " to=functions.get_weather<|channel|>commentary json<|message|>" + '{"city": "Rome", "days": 3}<|call|>',
        "<|channel|>analysis to=python code<|message|>print('<|cal')\n<|call|>",
        "<|channel|>analysis to=python<|message|>1+1<|call|>",
        '<|channel|>analysis to=browser.search code<|message|>{"query": "x"}<|call|>',
        " to=browser.search<|channel|>analysis <|constrain|>json<|message|>{}<|call|>",
    ],
)
def test_legal_turns(gpt_oss: Tokenizer, turn: str) -> None:
    assert refused_at(gpt_oss, TurnOptions(offer=TOOLS), turn) is None


@pytest.mark.parametrize(
    ("turn", "rest"),
    [
        ("Hello<|return|>", "Hello<|return|>"),
        ("<|channel|>thoughts<|message|>", "thoughts<|message|>"),
        (f"{FINAL}Hello.<|end|>", "<|end|>"),
        (f"{FINAL}Hello.<|call|>", "<|call|>"),
        (f"{THINK}Hm.<|return|>", "<|return|>"),
        (f"{THINK}Hm.<|channel|>", "<|channel|>"),
        (f"{THINK}Hm.<|end|><|start|>user<|message|>", "user<|message|>"),
        ("<|channel|>final to=functions.get<|message|>", " to=functions.get<|message|>"),
        ("<|channel|>analysis to=functions.get<|message|>", "functions.get<|message|>"),
        ("<|channel|>commentary to=python code<|message|>", "python code<|message|>"),
        (f"{CALL}delete json<|message|>", ".delete json<|message|>"),
        (f"{CALL}get code<|message|>", " code<|message|>"),
        (f"{CALL}get json<|message|>[]<|call|>", "[]<|call|>"),
        (f"{CALL}get json<|message|>{{}}<|end|>", "<|end|>"),
        (f"{CALL}get json<|message|>{{\n\n\n}}<|call|>", "{\n\n\n}<|call|>"),
        (f'{CALL}get_weather json<|message|>{{"days":3}}<|call|>', 'days":3}<|call|>'),
        (f'{CALL}get_weather json<|message|>{{"city":"Rome","days":0}}<|call|>', "0}<|call|>"),
        (f'{CALL}stop json<|message|>{{"a":1}}<|call|>', '{"a":1}<|call|>'),
    ],
)
def test_illegal_turns(gpt_oss: Tokenizer, turn: str, rest: str) -> None:
    assert refused_at(gpt_oss, TurnOptions(offer=TOOLS), turn) == rest


def test_who_may_be_called(gpt_oss: Tokenizer) -> None:
    answer, call = f"{FINAL}Hello.<|return|>", f"{CALL}stop json<|message|>{{}}<|call|>"
    code = "<|channel|>analysis to=python code<|message|>1<|call|>"
    preamble = f"<|channel|>commentary<|message|>Now.{NEXT}"

    def legal(**options: Any) -> list[bool]:
        return [is_legal(gpt_oss, turn, **options) for turn in (answer, call, code, preamble + answer, preamble + call)]

    assert legal() == legal(tool_choice="auto") == [True, True, True, True, True]
    assert legal(tool_choice="none") == [True, False, False, False, False]
    assert legal(tool_choice="required") == [False, True, True, False, True]
    assert legal(tool_choice=NamedTool("functions.stop")) == [False, True, False, False, True]
    assert legal(offer=Offer()) == [True, False, False, False, False]


def test_some_of_the_tools_may_be_called(gpt_oss: Tokenizer) -> None:
    answer = f"{FINAL}Hello.<|return|>"
    stop, get = (f"{CALL}{name} json<|message|>{{}}<|call|>" for name in ("stop", "get"))
    code = "<|channel|>analysis to=python code<|message|>1<|call|>"

    def legal(*recipients: str, required: bool) -> list[bool]:
        choice = AllowedTools(recipients=recipients, required=required)
        return [is_legal(gpt_oss, turn, tool_choice=choice) for turn in (answer, stop, get, code)]

    assert legal("functions.stop", "python", required=False) == [True, True, False, True]
    assert legal("functions.stop", required=True) == [False, True, False, False]
    several = TurnOptions(
        offer=TOOLS, tool_choice=AllowedTools(recipients=("functions.stop",)), parallel_tool_calls=True
    )
    assert refused_at(gpt_oss, several, f"{stop}<|start|>assistant{stop}<|return|>") is None
    assert (
        refused_at(gpt_oss, several, f"{stop}<|start|>assistant{get}<|return|>")
        == ".get json<|message|>{}<|call|><|return|>"
    )


# --- tools that are sent text ---------------------------------------------------------------------------------------

PATCH = """start: "*** Begin Patch" LF hunk+ "*** End Patch" LF?
hunk: "*** Add File: " /.+/ LF ("+" /.*/ LF)+ -> add
    | "*** Delete File: " /.+/ LF
%import common.LF
"""
TEXTS = Offer(
    functions=(
        Tool(name="note", text_format=FreeText()),
        Tool(name="python", text_format=FreeText()),
        Tool(name="code", text_format=Regex("[A-Z]{2}-[0-9]+")),
        Tool(name="apply_patch", description="Changes files.", text_format=Lark(PATCH)),
        Tool(name="get", parameters=WEATHER, strict=True),
    )
)
ADD = "*** Begin Patch\n*** Add File: a/é.py\n+print('<|call|>')\n+\n*** End Patch"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("note", ""),
        ("note", "{"),
        ("note", '{"code": "1"}'),
        ("note", "assistantfinal <|call|><|end|> 世界 🎉\n\n"),
        ("python", "print(1)"),
        ("python", '{"code": "1"}'),
        ("code", "AB-123"),
        ("apply_patch", ADD),
        ("apply_patch", ADD + "\n"),
    ],
)
@pytest.mark.parametrize("kind", ["", " code", " <|constrain|>code"])
def test_text_for_a_tool_goes_there_and_back(gpt_oss: Tokenizer, name: str, text: str, kind: str) -> None:
    """The grammar takes it, the parser hands it over as it is, and history writes the same tokens."""
    header = gpt_oss.encode_with_control(f" to=functions.{name}<|channel|>commentary{kind}<|message|>")
    tokens = [*header, *gpt_oss.encode(text), gpt_oss.control_id("<|call|>")]
    constraint = TurnGrammar(gpt_oss, TurnOptions(offer=TEXTS))()
    parser = HarmonyParser(gpt_oss, offer=TEXTS, plain_headers=False)
    events = []
    for token in tokens:
        assert token in allowed(constraint, gpt_oss.vocab_size)
        constraint.accept(token)
        events += parser.feed(token)
    assert constraint.is_finished()
    assert not parser.flush() and not parser.diagnostics
    assert "".join(event.text for event in events if isinstance(event, ArgumentsDelta)) == text
    (done,) = [event for event in events if isinstance(event, CallDone)]
    assert done == CallDone(recipient=f"functions.{name}", arguments=text)
    written = render(Conversation(messages=parser.messages), gpt_oss, upto=None).ids
    assert written == [*gpt_oss.encode_with_control("<|start|>assistant"), *tokens]


@pytest.mark.parametrize(
    ("turn", "rest"),
    [
        (f"{CALL}code<|message|>AB12<|call|>", "12<|call|>"),
        (f"{CALL}code<|message|>AB-<|call|>", "<|call|>"),
        (f"{CALL}code json<|message|>AB-1<|call|>", " json<|message|>AB-1<|call|>"),
        (f"{CALL}apply_patch<|message|>{{}}<|call|>", "{}<|call|>"),
        (f"{CALL}note<|message|>a<|end|>", "<|end|>"),
        (f"{CALL}get<|message|>Rome<|call|>", "Rome<|call|>"),
    ],
)
def test_text_that_a_tool_is_not_sent(gpt_oss: Tokenizer, turn: str, rest: str) -> None:
    assert refused_at(gpt_oss, TurnOptions(offer=TEXTS), turn) == rest


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Regex("("), r"the regex '\(' of functions.f cannot be enforced: .*unclosed group"),
        (Regex(r"[^\s\S]"), "of functions.f cannot be enforced: no text matches"),
        (Regex("a" * 20_001), "the regex of functions.f has 20,001 characters"),
        (Lark("start: missing"), 'the Lark grammar of functions.f .*unknown name: "missing"'),
        (Lark("start: <|call|>"), "the Lark grammar of functions.f uses .* reaches beyond"),
    ],
)
def test_tools_whose_text_cannot_be_enforced_are_named(gpt_oss: Tokenizer, form: Any, message: str) -> None:
    offer = Offer(functions=(Tool(name="g"), Tool(name="f", text_format=form)))
    with pytest.raises(UsageError, match=message):
        TurnGrammar(gpt_oss, TurnOptions(offer=offer))


# --- several calls --------------------------------------------------------------------------------------------------


def test_parallel_calls(gpt_oss: Tokenizer) -> None:
    call, code = f"{CALL}stop json<|message|>{{}}<|call|>", "<|channel|>analysis to=python code<|message|>1<|call|>"
    several = f"{THINK}Two.{NEXT}{call}<|start|>assistant{code}<|start|>assistant{call}<|return|>"
    assert is_legal(gpt_oss, several, parallel_tool_calls=True)
    assert is_legal(gpt_oss, f"{call}<|return|>", parallel_tool_calls=True)
    assert not is_legal(gpt_oss, call, parallel_tool_calls=True)
    assert not is_legal(gpt_oss, f"{call}<|start|>assistant{FINAL}<|return|>", parallel_tool_calls=True)
    control = gpt_oss.control_tokens
    both = frozenset({control["<|return|>"], control["<|call|>"]})
    assert TurnGrammar(gpt_oss, TurnOptions(offer=TOOLS)).stop_ids == both
    parallel = TurnGrammar(gpt_oss, TurnOptions(offer=TOOLS, parallel_tool_calls=True))
    assert parallel.stop_ids == {control["<|return|>"]}


def test_reasoning_can_be_required(gpt_oss: Tokenizer) -> None:
    answer = f"{FINAL}Hello.<|return|>"
    assert not is_legal(gpt_oss, answer, reasoning="required")
    assert is_legal(gpt_oss, f"{THINK}Hm.{NEXT}{answer}", reasoning="required")
    constraint = TurnGrammar(gpt_oss, TurnOptions(offer=TOOLS, reasoning="required"))()
    assert gpt_oss.decode(constraint.forced(), control="show") == THINK


# --- what is forced -----------------------------------------------------------------------------------------------


def test_headers_are_forced_in_canonical_tokens(gpt_oss: Tokenizer) -> None:
    """All of a header but its choices, token for token as the tokeniser writes it."""
    options = TurnOptions(offer=Offer(functions=(Tool(name="get_weather"),)))
    constraint = TurnGrammar(gpt_oss, options)()
    turn = f"{THINK}Look it up.{NEXT}{CALL}get_weather <|constrain|>json<|message|>{{}}<|call|>"
    tokens, drawn = gpt_oss.encode_with_control(turn), []
    while tokens:
        forced = constraint.forced()
        assert forced == tokens[: len(forced)]
        drawn += [] if forced else [gpt_oss.decode(tokens[:1], control="show")]
        for token in forced or tokens[:1]:
            constraint.accept(token)
        tokens = tokens[max(1, len(forced)) :]
    assert constraint.is_finished() and constraint.forced() == []
    header = drawn[drawn.index("<|end|>") + 1 :]
    assert header == ["<|channel|>", "comment", " to", " ", "<|constrain|>", "{}"]


def test_asking_accepts_nothing(gpt_oss: Tokenizer) -> None:
    constraint = TurnGrammar(gpt_oss, TurnOptions(offer=Offer()))()
    assert constraint.forced() == constraint.forced() == [gpt_oss.control_tokens["<|channel|>"]]
    assert allowed(constraint, gpt_oss.vocab_size) == {gpt_oss.control_tokens["<|channel|>"]}


def test_samples_do_not_share_their_state(small_harmony: Tokenizer) -> None:
    turns = TurnGrammar(small_harmony, TurnOptions(offer=TOOLS))
    one, other = turns(), turns()
    for token in small_harmony.encode_with_control(f"{FINAL}x<|return|>"):
        one.accept(token)
    assert one.is_finished() and not other.is_finished()
    assert small_harmony.control_tokens["<|channel|>"] in allowed(other, small_harmony.vocab_size)


def test_masks_fill_rows_of_any_length(small_harmony: Tokenizer) -> None:
    """A model may have more rows than its vocabulary has tokens; what was in the row before is gone."""
    constraint = TurnGrammar(small_harmony, TurnOptions(offer=Offer()))()
    for extra in (0, 1, 100):
        assert allowed(constraint, small_harmony.vocab_size + extra) == set(constraint.forced())


def test_text_can_be_anything_but_control_tokens(gpt_oss: Tokenizer) -> None:
    constraint = TurnGrammar(gpt_oss, TurnOptions(offer=TOOLS))()
    for token in gpt_oss.encode_with_control(THINK):
        constraint.accept(token)
    control = set(gpt_oss.control_tokens.values())
    may = allowed(constraint, gpt_oss.vocab_size)
    assert may & control == {gpt_oss.control_tokens["<|end|>"]}
    for token in set(range(gpt_oss.vocab_size)) - control - may:  # what no text begins with
        with pytest.raises(UnicodeDecodeError):
            codecs.getincrementaldecoder("utf-8")().decode(gpt_oss.token_bytes(token))
    for token in gpt_oss.encode("𒐫"):  # of several tokens
        assert token in allowed(constraint, gpt_oss.vocab_size)
        constraint.accept(token)


# --- the reasoning's budget ---------------------------------------------------------------------------------------


def think(tokenizer: Tokenizer, budget: int, text: str, offer: Offer = TOOLS) -> tuple[list[int], TurnConstraint]:
    """The tokens of reasoning that are taken until it is closed, and the constraint then."""
    constraint = TurnGrammar(tokenizer, TurnOptions(offer=offer, max_reasoning_tokens=budget))()
    for token in tokenizer.encode_with_control(THINK):
        constraint.accept(token)
    taken = []
    for token in tokenizer.encode(text):
        if constraint.forced() == closing(tokenizer):
            break
        constraint.accept(token)
        taken.append(token)
    return taken, constraint


def closing(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_with_control(NEXT)


def test_a_spent_budget_closes_the_reasoning(gpt_oss: Tokenizer) -> None:
    taken, constraint = think(gpt_oss, 3, "one two three four five")
    assert gpt_oss.decode(taken) == "one two three"
    for token in closing(gpt_oss):
        assert allowed(constraint, gpt_oss.vocab_size) == {token}
        with pytest.raises(RequestError, match="being closed"):
            constraint.accept(token + 1)
        constraint.accept(token)
    for token in gpt_oss.encode_with_control("<|channel|>analysis"):
        constraint.accept(token)
    assert gpt_oss.control_tokens["<|message|>"] not in allowed(constraint, gpt_oss.vocab_size)  # only " to="
    _, constraint = think(gpt_oss, 3, "one two three four five", Offer())
    for token in closing(gpt_oss):
        constraint.accept(token)
    assert gpt_oss.decode(constraint.forced(), control="show") == FINAL


def test_the_budget_is_of_the_turn(gpt_oss: Tokenizer) -> None:
    constraint = TurnGrammar(gpt_oss, TurnOptions(offer=TOOLS, max_reasoning_tokens=5))()
    for token in gpt_oss.encode_with_control(
        f"{THINK}one two{NEXT}<|channel|>commentary<|message|>a b c d e f{NEXT}{THINK}"
    ):
        constraint.accept(token)
    for token in gpt_oss.encode(" three four five"):
        assert not constraint.forced()
        constraint.accept(token)
    assert constraint.forced() == closing(gpt_oss)


def test_a_character_is_finished_first(small_harmony: Tokenizer) -> None:
    for budget, kept in ((1, "🎉"), (4, "🎉"), (5, "🎉é"), (6, "🎉é"), (7, "🎉éa")):
        taken, _ = think(small_harmony, budget, "🎉éa世")
        assert small_harmony.decode(taken) == kept
        assert budget <= len(taken) <= budget + 3


def test_no_character_is_cut_by_tokens_that_end_one_and_begin_another(gpt_oss: Tokenizer) -> None:
    text = "გუგუნი უუუუუუუ" * 2
    (ends_and_begins,) = [i for i in gpt_oss.encode("უუუუ") if gpt_oss.token_bytes(i) == b"\xa3\xe1\x83"][:1]
    for budget in range(1, 12):
        constraint = TurnGrammar(gpt_oss, TurnOptions(offer=TOOLS, max_reasoning_tokens=budget))()
        for token in gpt_oss.encode_with_control(THINK):
            constraint.accept(token)
        taken: list[int] = []
        wanted = [*gpt_oss.encode("ი"), *gpt_oss.encode(text)][:1] + [ends_and_begins] * 20
        while not constraint.forced():
            row = allowed(constraint, gpt_oss.vocab_size)
            token = wanted[len(taken)] if wanted[len(taken)] in row else min(i for i in row if len(taken) or i > 255)
            constraint.accept(token)
            taken.append(token)
        assert "\ufffd" not in gpt_oss.decode(taken)
        assert budget <= len(taken) <= budget + 3


def test_no_reasoning_at_all(gpt_oss: Tokenizer) -> None:
    assert not is_legal(gpt_oss, f"{THINK}Hm.{NEXT}{FINAL}<|return|>", max_reasoning_tokens=0)
    assert is_legal(gpt_oss, "<|channel|>analysis to=python code<|message|>1<|call|>", max_reasoning_tokens=0)
    assert is_legal(gpt_oss, f"{FINAL}<|return|>", max_reasoning_tokens=0)


# --- the answer's form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (JsonObject(), ['{"a": [1, {"b": null}]}', "{}"], ["[1]", "x", "{"]),
        (JsonSchema({"type": "array", "items": {"type": "integer"}}), ["[1, 2]", "[]"], ['["a"]', "1"]),
        (JsonSchema(True), ["1", '"x"', "[]"], ["x"]),
        (JsonSchema({"enum": ["a", 1, None]}), ['"a"', "1", "null"], ["2", "true"]),
        (Regex(r"[a-z]{2}/\d+"), ["ab/12"], ["ab", "AB/1"]),
        (Regex('^"[^"]*"$'), ['"x/y"'], ["x"]),
        (Regex("(?:yes|no)\n"), ["yes\n"], ["yes"]),
        (Regex(""), [""], ["x"]),
        (
            Choice(("yes", "no", "no, never", '"\\\n<|x|>', "é🎉")),
            ["no", "no, never", '"\\\n<|x|>', "é🎉"],
            ["n", "no,", ""],
        ),
        (Lark('start: "yes" | "no" NUMBER\nNUMBER: /[0-9]+/ // comment "<|call|>"'), ["yes", "no12"], ["no", "maybe"]),
        (Lark('start: "<|call|>"'), [], ["x"]),
    ],
)
def test_the_answer_has_the_form_that_was_asked_for(
    gpt_oss: Tokenizer, form: Any, good: list[str], bad: list[str]
) -> None:
    reasoning = f"{THINK}Free text: {{[.{NEXT}"
    for text in good:
        assert is_legal(gpt_oss, f"{reasoning}{FINAL}{text}<|return|>", response_format=form)
    for text in bad:
        assert not is_legal(gpt_oss, f"{reasoning}{FINAL}{text}<|return|>", response_format=form)
    assert is_legal(gpt_oss, f"{CALL}get json<|message|>{{}}<|call|>", response_format=form)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Regex("("), "unclosed group"),
        (Regex("a\\"), "backslash"),
        (Regex("(?=a)"), "look-around"),
        (Regex(r"(?-u:\xff)"), "invalid UTF-8"),
        (Regex(r"[^\s\S]"), "no text matches"),
        (Regex("a" * 200_000), "200,000 characters"),
        (Choice(("a" * 10_000, "b" * 10_001)), "the choice has 20,001 characters"),
        (Choice(("\ud800",)), "cannot be enforced"),
        (Lark(f'start: "{"a" * 200_000}"'), "200,009 characters"),
        (Lark("start: a\na: a"), "no text matches"),
        (Lark(""), "no start rule"),
        (Lark("start: missing"), 'unknown name: "missing"'),
        (Lark("start: <|call|>"), "reaches beyond"),
        (Lark("start: <[200012]>"), "reaches beyond"),
        (Lark('start: /a"/ <|call|> /"b/'), "reaches beyond"),
        (Lark('start: "a//" <|call|>'), "reaches beyond"),
        (Lark('start: /a\n"/ <|call|> "/"'), "reaches beyond"),
        (Lark("start: X\nX: ~/a/"), "reaches beyond"),
        (Lark("start: @answer"), "reaches beyond"),
        (Lark('start: %json {"not": {}}'), "reaches beyond"),
        (Lark('%llguidance {"allow_invalid_utf8": true}\nstart: /(?-u:.)/'), "reaches beyond"),
        (Lark('start: a "x"\na[stop=""]: /.*/'), "reaches beyond"),
    ],
)
def test_forms_that_cannot_be_enforced_are_refused(gpt_oss: Tokenizer, form: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TurnGrammar(gpt_oss, TurnOptions(offer=TOOLS, response_format=form))


@pytest.mark.parametrize("text", ['start: a\na: "x" a', 'start: (("x"{1000}){1000}){1000}'])
def test_grammars_that_lead_nowhere_end_in_errors(gpt_oss: Tokenizer, text: str) -> None:
    constraint = TurnGrammar(gpt_oss, TurnOptions(offer=Offer(), response_format=Lark(text)))()
    with pytest.raises(RequestError, match=r"grammar|cannot come here"):
        for token in gpt_oss.encode_with_control(FINAL + "x" * 100):
            constraint.forced()
            allowed(constraint, gpt_oss.vocab_size)
            constraint.accept(token)


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="one recipient at least"):
        AllowedTools(recipients=())
    for options, message in (
        ({"tool_choice": NamedTool("functions.delete")}, "functions.delete"),
        ({"tool_choice": "always"}, "always"),
        ({"tool_choice": AllowedTools(recipients=("functions.stop", "functions.x"))}, "functions.x"),
        ({"response_format": FreeText()}, "response_format must be"),
        ({"offer": Offer(), "tool_choice": "required"}, "no tools"),
        ({"max_reasoning_tokens": -1}, "-1"),
        ({"max_reasoning_tokens": True}, "True"),
        ({"reasoning": "never"}, "never"),
        ({"reasoning": "required", "max_reasoning_tokens": 0}, "required"),
    ):
        with pytest.raises(UsageError, match=message):
            TurnOptions(**{"offer": TOOLS, **options})  # type: ignore[arg-type]


# --- schemas ------------------------------------------------------------------------------------------------------


def answers(tokenizer: Tokenizer, schema: Any) -> TurnGrammar:
    return TurnGrammar(
        tokenizer, TurnOptions(offer=Offer(), response_format=JsonSchema(schema), max_reasoning_tokens=0)
    )


def accepts(tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    return _accepts(answers(tokenizer, schema), tokenizer, text)


def _accepts(turns: TurnGrammar, tokenizer: Tokenizer, text: str) -> bool:
    constraint = turns()
    try:
        for token in tokenizer.encode_with_control(f"{FINAL}{text}<|return|>"):
            constraint.accept(token)
    except RequestError:
        return False
    return constraint.is_finished()


def walk(constraint: TurnConstraint, tokenizer: Tokenizer, source: random.Random, soon: int = 60) -> str | None:
    """The answer of a turn of tokens drawn at random; after so many of them those that lead to an end come first."""
    text = b""
    for i in range(1200):
        if constraint.is_finished():
            return text.decode()
        forced = constraint.forced()
        if not forced:
            may = sorted(allowed(constraint, tokenizer.vocab_size))
            ending = [token for token in may if tokenizer.token_bytes(token) in (b"", b'"', b"}", b"]")]
            forced = [source.choice(ending if ending and i > soon else may)]
        for token in forced:
            constraint.accept(token)
            text = b"" if token == tokenizer.control_tokens["<|message|>"] else text + tokenizer.token_bytes(token)
    return None


def test_there_are_enough_schemas() -> None:
    assert len(SUPPORTED) >= 200 and len({entry["name"] for entry in SCHEMAS}) == len(SCHEMAS)


@pytest.mark.parametrize("entry", SUPPORTED, ids=lambda entry: str(entry["name"]))
def test_what_is_written_under_a_schema_matches_it(small_harmony: Tokenizer, entry: dict[str, Any]) -> None:
    turns, judge, source = answers(small_harmony, entry["schema"]), validator(entry["schema"]), random.Random(1)
    finished = 0
    for _ in range(4):
        if (text := walk(turns(), small_harmony, source)) is not None:
            judge.validate(json.loads(text))
            finished += 1
    assert finished or "valid" in entry  # what needs a certain word is not found by chance
    for value in entry.get("valid", ()):
        judge.validate(value)
        assert _accepts(turns, small_harmony, json.dumps(value, ensure_ascii=False))
        assert _accepts(turns, small_harmony, json.dumps(value, ensure_ascii=False, separators=(",", ":")))


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: str(entry["name"]))
def test_what_cannot_be_enforced_is_refused_with_its_pointer(small_harmony: Tokenizer, entry: dict[str, Any]) -> None:
    tool = Tool(name="f", parameters=entry["schema"], strict=True)
    with pytest.raises(SchemaError, match=r"the parameters of functions\.f at /") as caught:
        TurnGrammar(small_harmony, TurnOptions(offer=Offer(functions=(tool,))))
    assert caught.value.pointer == entry["refused"]
    TurnGrammar(small_harmony, TurnOptions(offer=Offer(functions=(Tool(name="f", parameters=entry["schema"]),))))


OBJECT = {"type": "object"}
TYPED_REST = {**OBJECT, "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        # A name in disguise is still that name.
        ({**OBJECT, "properties": {"a": {"type": "integer"}}}, '{"a":1,"b":"x"}', '{"b":1,"\\u0061":"x"}'),
        ({**OBJECT, "required": ["a"], "additionalProperties": {"type": "integer"}}, '{"a":1}', '{"a":1,"\\u0061":2}'),
        ({**OBJECT, "additionalProperties": {"type": "integer"}}, '{"\\u0061":1}', '{"a":"x"}'),
        # `additionalProperties` is for the names that are not listed.
        (TYPED_REST, '{"a":1}', '{"a":"x"}'),
        (TYPED_REST, '{"a":1,"b":"x","ab":"y","":"z"}', '{"a":1,"b":2}'),
        (TYPED_REST, '{"a":1,"A":"x"}', '{"a":1,"\\u0061":"x"}'),
        ({**TYPED_REST, "required": ["a", "c"]}, '{"a":1,"c":"x"}', '{"a":1,"c":1}'),
        ({**TYPED_REST, "properties": {'é"\\': {"type": "integer"}}}, '{"é\\"\\\\":1,"é\\"":"x"}', '{"é\\"\\\\":"x"}'),
        (
            {**OBJECT, "properties": {"name": {"type": "string"}}, "additionalProperties": {"maxLength": 2}},
            '{"name":"Rome","n":"ab"}',
            '{"n":"abc"}',
        ),
        ({"const": "a\x00b"}, '"a\\u0000b"', '"ab"'),
        ({"type": "string", "pattern": "^\\x01a$"}, '"\\u0001a"', '"a"'),
        # ECMA-262's reading of patterns.
        ({"type": "string", "pattern": "^[a&&b]+$"}, '"&"', '"c"'),
        ({"type": "string", "pattern": "^[^[]+$"}, '"a"', '"["'),
        ({"type": "string", "pattern": "a|^b$"}, '"xax"', '"bb"'),
        ({"type": "string", "pattern": "^\\d$"}, '"7"', '"٧"'),
        ({"type": "string", "maxLength": 1}, '"😀"', '"ab"'),
        *(
            ({"type": "string", "pattern": pattern}, good, bad)
            for pattern, good, bad in (
                ("^[\\x00-\\x1f]$", '"\\u0001"', '"\\\\"'),
                ("^[\\x00-\\x1f]$", '"\\n"', '"\\""'),
                ("^[^ -~]$", '"é"', '"\\""'),
                ('^[^"]*$', '"a\\n\\\\"', '"a\\"b"'),
                ("^[^\\\\]*$", '"a\\"b"', '"a\\\\"'),
                ("^\\P{P}$", '"a"', '"\\""'),
                ("^[^/\\u0022]+$", '"\\\\"', '"\\""'),
                ("^(?:[\\x00-\\x0f]|[\\x10-\\x1f])$", '"\\u001f"', '"\\""'),
                ("^[^a]$", '"\\u0000"', '"a"'),
                ("^[^a]$", '"\\""', '"aa"'),
                (".", '"\\""', '""'),
            )
        ),
        # Dates are dates.
        ({"type": "string", "format": "date"}, '"2024-02-29"', '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"2000-02-29"', '"1900-02-29"'),
        ({"type": "string", "format": "date"}, '"0001-12-31"', '"0000-12-31"'),
        (
            {"type": "string", "format": "date-time", "pattern": "Z$"},
            '"2024-02-29T23:59:59.5Z"',
            '"2024-02-29T23:59:59+01:00"',
        ),
        # Numbers.
        ({"type": "integer", "format": "int32"}, "2147483647", "2147483648"),
        ({"type": "integer", "maximum": 2**53 + 1}, str(2**53), str(2**53 + 2)),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "-5", str(2**63)),
        ({"type": "number", "multipleOf": 0.01}, "1.1", "1.111"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0.1", "0"),
        ({"allOf": [{"type": "number", "minimum": -1.5}, {"exclusiveMaximum": -1}]}, "-1.25", "-1"),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 1.5}, "1", "0"),
        (
            {
                "$schema": "http://json-schema.org/draft-04/schema#",
                "type": "integer",
                "minimum": 1,
                "exclusiveMinimum": True,
            },
            "2",
            "1",
        ),
        # References.
        ({"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"type": "integer"}}}, "1", '"x"'),
        ({"$ref": "#here", "$defs": {"x": {"$anchor": "here", "type": "integer"}}}, "1", '"x"'),
        ({"$id": "https://x.y/s", "$ref": "https://x.y/s#/$defs/a", "$defs": {"a": {"type": "integer"}}}, "1", '"x"'),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "null", "1"),
        # Merging, in any order of the keywords.
        (
            {
                "additionalProperties": False,
                "allOf": [{"required": ["a"]}],
                "properties": {"a": {"type": "null"}},
                **OBJECT,
            },
            '{"a":null}',
            '{"a":null,"b":1}',
        ),
        (
            {"type": "array", "items": False, "prefixItems": [{"type": "string"}], "additionalItems": True},
            '["a"]',
            '["a",1]',
        ),
        (
            {"anyOf": [{"type": "string"}, {"type": "integer"}], "oneOf": [{"type": "integer"}, {"type": "null"}]},
            "1",
            "null",
        ),
        # What some readers take for options of theirs.
        ({"x-guidance": {"lenient": True}, "type": "integer"}, "1", '"x"'),
        ({"type": "string", "nullable": True}, "null", "1"),
        (True, '{"a":[]}', "{]"),
    ],
)
def test_schemas_are_enforced_to_the_letter(small_harmony: Tokenizer, schema: Any, good: str, bad: str) -> None:
    assert accepts(small_harmony, schema, good)
    assert not accepts(small_harmony, schema, bad)


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        (False, ""),
        (3, ""),
        ({"properties": {"a/b~c": {"not": {}}}}, "/properties/a~1b~0c/not"),
        ({"type": "strin"}, "/type"),
        ({"items": [{"$ref": "#/$defs/none"}]}, "/items/0/$ref"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "/$defs/a"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "/allOf"),
        ({**OBJECT, "patternProperties": {"^a": {}}}, "/patternProperties"),
        ({**OBJECT, "properties": {"a" * 400: {}}, "additionalProperties": {"type": "null"}}, "/additionalProperties"),
        ({**OBJECT, "patternProperties": {"a": {}, "b": {}}, "additionalProperties": False}, "/patternProperties"),
        ({**OBJECT, "properties": {"a": {}}, "minProperties": 1}, "/minProperties"),
        ({"type": "array", "maxItems": 10**9}, "/maxItems"),
        ({"type": "string", "minLength": -1}, "/minLength"),
        ({"type": "string", "minLength": 1e400}, "/minLength"),
        ({"type": "string", "format": ["date"]}, "/format"),
        ({"format": {}}, "/format"),
        ({"type": "number", "minimum": "1"}, "/minimum"),
        ({"type": "number", "multipleOf": 0}, "/multipleOf"),
        ({"type": "number", "multipleOf": 0.07}, "/multipleOf"),
        ({"type": "integer", "multipleOf": 999_983}, "/multipleOf"),
        (
            {"type": "integer", "allOf": [{"multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 83}]},
            "/allOf/2/multipleOf",
        ),
        ({"items": {"multipleOf": 6000}, "properties": {"a": {"multipleOf": 6001}}}, "/items/multipleOf"),
        ({"enum": ["a", "x" * 3_000_000]}, "/enum"),
        # Nothing matches these; where a property is optional it would only be left out.
        ({"properties": {"a": {"type": "array", "minItems": 3, "maxItems": 2}}}, "/properties/a/maxItems"),
        ({"properties": {"a": {"minLength": 3, "maxLength": 2}}}, "/properties/a/maxLength"),
        ({"properties": {"a": {"minimum": 3, "exclusiveMaximum": 2}}}, "/properties/a/exclusiveMaximum"),
        ({"properties": {"a": {"type": "integer", "format": "uint8", "minimum": 256}}}, "/properties/a"),
        ({"properties": {"a": {"const": "a", "enum": ["b"]}}}, "/properties/a/const"),
        ({"properties": {"a": {"type": "string", "enum": [1]}}}, "/properties/a/enum"),
        ({"const": 2**53 + 1}, "/const"),
        ({"enum": [1, {"a": 0.1 + 0.2}]}, "/enum/1/a"),
        ({"const": float("nan")}, "/const"),
        ({"enum": []}, "/enum"),
        ({"type": "string", "pattern": "a{,3}"}, "/pattern"),
        ({"type": "string", "pattern": "[a--b]"}, "/pattern"),
        ({"type": "string", "pattern": "a\\"}, "/pattern"),
        ({"type": "string", "pattern": "a++"}, "/pattern"),
        ({"type": "string", "pattern": "[]"}, "/pattern"),
        ({"type": "string", "pattern": "^(?:\\x00|[\\x01-\\x1f])$"}, "/pattern"),
        ({"type": "integer", "format": "date"} | {"format": "unix"}, "/format"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "/oneOf"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "/prefixItems"),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema", "items": [{}]}, "/items"),
        ({"properties": {"a": {"$id": "other.json"}}}, "/properties/a/$id"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "/not"),
        ({**OBJECT, "properties": {f"p{i}": {} for i in range(1001)}}, "/properties"),
    ],
)
def test_pointers(small_harmony: Tokenizer, schema: Any, pointer: str) -> None:
    with pytest.raises(SchemaError, match="the response format at ") as caught:
        answers(small_harmony, schema)
    assert caught.value.pointer == pointer
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_schemas_that_would_take_for_ever_are_refused(small_harmony: Tokenizer) -> None:
    deep: Any = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    wide = {"allOf": [{"anyOf": [{**OBJECT, "required": [f"{i}-{j}"]} for j in range(10)]} for i in range(6)]}
    many = {"anyOf": [{"const": i} for i in range(300)]}
    properties = {f"p{i}": True for i in range(900)}
    some = {"allOf": [{**OBJECT, "properties": properties, "additionalProperties": False}, {"minProperties": 1}]}
    names = {"$defs": {name: {"oneOf": [{"$ref": f"#/$defs/{other}"} for other in "abcd"]} for name in "abcd"}}
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 6} for i in range(11)}
    alike = {"allOf": [{"anyOf": [{"$ref": "#/$defs/a"}, OBJECT]}] * 5}
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}
    for schema in (
        *(deep, wide, many, some, {**names, "$ref": "#/$defs/a"}, {"type": "string", "pattern": "(" * 500}),
        {"oneOf": [{"$ref": "#/$defs/d0"}] * 2, "$defs": {**twice, "d11": OBJECT}},
        {"oneOf": [{"$ref": "#/$defs/a"}] * 2, "$defs": {"a": {**OBJECT, **alike}}},
        {"$ref": "#/$defs/d0", "$defs": {**chain, "d3000": OBJECT}},
        {**OBJECT, "required": [str(i) for i in range(20_000)]},
    ):
        begin = time.monotonic()
        with pytest.raises(SchemaError):
            answers(small_harmony, schema)
        assert time.monotonic() - begin < 5
    accepts(small_harmony, {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"}, '"aa"')


def test_many_options_and_references_are_read_soon(small_harmony: Tokenizer) -> None:
    anchors = {str(i): {"$anchor": f"a{i}", "type": "string"} for i in range(3000)}
    begin = time.monotonic()
    assert accepts(small_harmony, {"oneOf": [{"const": i} for i in range(200)]}, "199")
    assert accepts(
        small_harmony, {"$defs": anchors, "properties": {f"p{i}": {"$ref": f"#a{i}"} for i in range(900)}}, '{"p1":"x"}'
    )
    assert time.monotonic() - begin < 5


def random_value(source: random.Random, depth: int = 0) -> Any:
    kind = source.randrange(12 if depth < 3 else 9)
    if kind < 9:
        return source.choice(
            [None, True, -1, 0, 2, 0.5, 1e400, -1e400, float("nan"), 10**400, "", "a", "#/items/0", "["]
        )
    if kind == 9:
        return [random_value(source, depth + 1) for _ in range(source.randrange(3))]
    return {source.choice(KEYWORDS): random_value(source, depth + 1) for _ in range(source.randrange(4))}


KEYWORDS = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "nullable"),
    *("minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems", "additionalItems", "$ref"),
    *("minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", "allOf", "anyOf", "oneOf", "$defs", "definitions", "$id", "$anchor", "$schema", "uniqueItems"),
)


def test_whatever_is_no_schema_is_refused_as_one(small_harmony: Tokenizer) -> None:
    source = random.Random(2)
    far = {"items": [{}], "$ref": f"#/items/{'9' * 5000}"}
    singles = [{keyword: random_value(source)} for keyword in KEYWORDS for _ in range(12)]
    doubles = [{key: random_value(source) for key in source.sample(KEYWORDS, 3)} for _ in range(300)]
    for schema in (far, *singles, *doubles):
        try:
            answers(small_harmony, schema)
        except (SchemaError, UsageError) as error:
            assert len(str(error)) < 1000, schema


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": 0, "maximum": 9.99},
        {"minimum": -9.99},
        {"minimum": 1.25, "maximum": 1.75},
        {"minimum": -2.25, "maximum": -1.75},
        {"exclusiveMaximum": 9.95},
        {"maximum": 9.999999999},
        {"maximum": 9.05},
        {"multipleOf": 0.25, "minimum": 0.5, "maximum": 2.5},
        {"multipleOf": 0.125},
        {"multipleOf": 0.75, "exclusiveMinimum": 0, "maximum": 9.75},
        {"multipleOf": 0.01, "maximum": 9.99},
        {"const": -0.0},
        {"enum": [-0.0, 1.5]},
    ],
)
def test_numbers_within_bounds_can_be_written(small_harmony: Tokenizer, bounds: dict[str, Any]) -> None:
    judge = validator(bounds)
    numbers = [*(step / 40 for step in range(100)), *(step / 20 for step in range(180, 202)), 9.99, 9.98, 9.999, 9.991]
    for schema in ({"type": "number", **bounds}, {"type": ["number", "null"], "allOf": [bounds]}):
        turns = answers(small_harmony, schema)
        for number in (*numbers, *(-number for number in numbers if number)):
            text = f"{number:g}"
            assert _accepts(turns, small_harmony, text) == judge.is_valid(number), text


def test_choices_have_as_many_properties_as_can_be_followed(small_harmony: Tokenizer) -> None:
    def choice(num_options: int, first: dict[str, Any]) -> dict[str, Any]:
        closed = {**OBJECT, "additionalProperties": False, "required": list(first)}
        optional = [{f"{i}-{j}": {"type": "string"} for j in range(35)} for i in range(num_options)]
        tags = [
            {name: {"const": str(i)} if tag is None else tag for name, tag in first.items()} for i in range(num_options)
        ]
        return {"anyOf": [{**closed, "properties": {**tags[i], **optional[i]}} for i in range(num_options)]}

    assert accepts(small_harmony, choice(25, {}), '{"7-1":"x","7-2":"y"}')
    assert accepts(small_harmony, choice(200, {"kind": None}), '{"kind":"7","7-1":"x"}')
    assert accepts(small_harmony, choice(40, {"kind": {"type": "string"}}), '{"kind":"7","7-1":"x"}')
    half = choice(30, {})
    for schema in (choice(40, {}), {"properties": {"a": choice(40, {})}}, {"anyOf": [half, half]}):
        with pytest.raises(SchemaError, match="optional properties"):
            answers(small_harmony, schema)


def test_definitions_may_nest_far(small_harmony: Tokenizer) -> None:
    chain: dict[str, Any] = {f"d{i}": {**OBJECT, "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(90)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, "d90": {"type": "integer"}}}
    assert accepts(small_harmony, schema, '{"x":' * 90 + "1" + "}" * 90)
    assert not accepts(small_harmony, schema, '{"x":' * 89 + "1" + "}" * 89)


def test_only_what_constrains_is_left() -> None:
    schema = {"title": "T", "description": "D", "default": 1, "examples": [2], "type": "integer", "x-order": 3}
    assert enforceable(schema) == {"type": "integer"}


def test_arguments_are_objects(small_harmony: Tokenizer) -> None:
    for parameters in ({"properties": {"a": {"type": "integer"}}}, {"anyOf": [{"type": "string"}, OBJECT]}, {}):
        options = TurnOptions(offer=Offer(functions=(Tool(name="f", parameters=parameters, strict=True),)))
        assert refused_at(small_harmony, options, CALL + 'f json<|message|>{"a":1}<|call|>') is None
        assert refused_at(small_harmony, options, CALL + 'f json<|message|>"a"<|call|>')


def test_arguments_that_can_be_no_object_are_refused(small_harmony: Tokenizer) -> None:
    options = TurnOptions(offer=Offer(functions=(Tool(name="f", parameters={"enum": ["a"]}, strict=True),)))
    with pytest.raises(SchemaError, match="object"):
        TurnGrammar(small_harmony, options)


def test_the_vocabulary_is_prepared_once(small_harmony: Tokenizer) -> None:
    assert guidance.prepare(small_harmony) is guidance.prepare(small_harmony)
