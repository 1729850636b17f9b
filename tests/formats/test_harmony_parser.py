"""Harmony's parser: openai-harmony's equal on well-formed turns, a rule for every other, and no stream that breaks it.

FREEHOLD_FUZZ sets how many random streams are tried.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from freehold.formats.chat import choose
from freehold.formats.conversation import (
    ROLES,
    Conversation,
    Message,
    Role,
    Text,
    Tool,
    ToolNamespace,
    text_message,
)
from freehold.formats.events import (
    ArgumentsDelta,
    CallDone,
    CallStart,
    Diagnostic,
    Event,
    MessageDone,
    MessageStart,
    OtherDelta,
    ReasoningDelta,
    TextDelta,
    TurnDone,
)
from freehold.formats.forms import JsonObject
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.parser import HarmonyParser
from freehold.formats.harmony.render import render
from freehold.formats.harmony.vocabulary import CONTROL_TOKENS, HarmonyVocabulary
from freehold.formats.tokenizer import Tokenizer

WEATHER = Tool(name="get_weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}})
CODE = {"type": "object", "properties": {"code": {"type": "string"}}}
OFFER = Offer(
    functions=(WEATHER, Tool(name="now")),
    builtins=(ToolNamespace(name="python"), ToolNamespace(name="browser", tools=(Tool(name="search", parameters={}),))),
)
PYTHON_FUNCTION = Offer(functions=(Tool(name="python", parameters=CODE),))
MARKUP = (*CONTROL_TOKENS, "<|endoftext|>")


def parsed(parser: HarmonyParser, ids: Sequence[int]) -> list[Event]:
    return [event for id_ in ids for event in parser.feed(id_)] + parser.flush()


def read(tokenizer: Tokenizer, text: str, offer: Offer = OFFER) -> tuple[list[Event], list[str]]:
    """Events, and the codes of diagnostics, of a turn that names its control tokens; each token is accounted for."""
    return read_ids(tokenizer, tokenizer.encode_with_control(text), offer)


def read_ids(tokenizer: Tokenizer, ids: list[int], offer: Offer = OFFER) -> tuple[list[Event], list[str]]:
    parser = HarmonyParser(tokenizer, offer=offer)
    events = parsed(parser, ids)
    check(tokenizer, ids, events)
    diagnostics = [event for event in events if isinstance(event, Diagnostic)]
    assert parser.diagnostics == tuple(diagnostics)
    assert parser.messages == tuple(
        event.message for event in events if isinstance(event, MessageDone) and event.message.role == "assistant"
    )
    return [event for event in events if not isinstance(event, Diagnostic)], [event.code for event in diagnostics]


def check(tokenizer: Tokenizer, ids: Sequence[int], events: list[Event]) -> None:
    """That events come in order, that deltas are what they add up to, and that each token is accounted for once."""
    rest = dict(enumerate(ids))  # what no header and no diagnostic accounts for: bodies, and their endings

    def account(position: int, tokens: Sequence[int]) -> None:
        assert [rest.pop(i) for i in range(position, position + len(tokens))] == list(tokens)

    starts: list[tuple[int, int]] = []
    dones: list[MessageDone] = []
    turn_ends: list[int] = []
    start: MessageStart | None = None
    call: CallStart | CallDone | None = None
    text = arguments = ""
    for event in events:
        match event:
            case MessageStart():
                assert start is None
                start, call, text, arguments = event, None, "", ""
                account(event.position, event.tokens)
                starts.append((event.position, event.position + len(event.tokens)))
            case Diagnostic():
                account(event.position, event.tokens)
            case TextDelta() | ReasoningDelta() | OtherDelta():
                assert start is not None and call is None and event.text
                assert isinstance(event, OtherDelta) == (start.role != "assistant")
                text += event.text
            case CallStart():
                assert start is not None and call is None and not text and start.recipient == event.recipient
                call = event
            case ArgumentsDelta():
                assert isinstance(call, CallStart) and event.text
                arguments += event.text
            case CallDone():
                assert isinstance(call, CallStart) and event.recipient == call.recipient
                assert event.arguments == arguments
                call = event
            case TurnDone(stop_id=stop_id):
                assert start is None and dones[-1].stop_id is not None
                turn_ends.append(stop_id)
            case MessageDone(message=message):
                assert start is not None and not isinstance(call, CallStart)
                assert call is not None or message.text == text
                form = (start.content_type or "").removeprefix("<|constrain|>")
                for word in (start.channel, start.recipient, start.name, form, message.recipient, message.name):
                    assert not any(name in (word or "") for name in tokenizer.control_tokens)
                message.text.encode()
                dones.append(event)
                start = None
    assert start is None
    ends = [*(first for first, _ in starts), len(ids)][1:]
    for (_, first), end, done in zip(starts, ends, dones, strict=True):
        body = [rest.pop(position) for position in range(first, end) if position in rest]
        if turn_ends and body[-2:] == [done.stop_id, turn_ends[0]]:
            body.pop()
            turn_ends.pop(0)
        if done.stop_id is not None:
            assert body.pop() == done.stop_id
        assert all(tokenizer.control_name(token) is None for token in body)
        assert done.message.text == tokenizer.decode(body)
    assert not rest and not turn_ends


def messages(events: list[Event]) -> list[tuple[str | None, str | None, str]]:
    """Channel, recipient and text of the assistant's messages, as history has them."""
    done = [event.message for event in events if isinstance(event, MessageDone)]
    return [(message.channel, message.recipient, message.text) for message in done if message.role == "assistant"]


def calls(events: list[Event]) -> list[tuple[str, str, str | None]]:
    return [(e.recipient, e.arguments, e.problem) for e in events if isinstance(e, CallDone)]


# --- well-formed turns --------------------------------------------------------------------------------------


class Turns:
    """Random well-formed turns, as `<|start|>assistant` would go on."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def text(self) -> str:
        words = [
            "the",
            " sun",
            "é",
            "😀",
            "\n\n",
            " assistant",
            "<|end|>",
            "{",
            '"a"',
            "  ",
            "東京",
            "Final.",
            "1",
            " to=x",
        ]
        return "".join(self.random.choices(words, k=self.random.randrange(8)))

    def name(self) -> str:
        return self.random.choice(
            ["functions.get_weather", "functions.now", "python", "browser.search", "f", "a-b.c_1"]
        )

    def header(self) -> str:
        pick = self.random.choice
        channel = pick(["analysis", "commentary", "final", ""])
        mark = f"<|channel|>{channel}" if channel else ""
        if self.random.random() < 0.5:
            return mark
        form = pick(["", " json", " code", " <|constrain|>json", "<|constrain|>json"])
        to = f" to={self.name()}"
        return pick([f"{to}{mark}{form}", f"{mark}{to}{form}" if mark else f"{to}{form}"])

    def turn(self, tokenizer: Tokenizer) -> list[int]:
        ids: list[int] = []
        for index in range(self.random.randrange(1, 4)):
            header = self.header()
            stop = "<|call|>" if "to=" in header else self.random.choice(["<|end|>", "<|return|>"])
            ids += self._message(tokenizer, ("<|start|>assistant" if index else "") + header, stop)
            if self.random.random() < 0.2:
                tool = f"{self.name()} to=assistant<|channel|>commentary"
                ids += self._message(
                    tokenizer, "<|start|>" + self.random.choice(["user", "developer", tool]), "<|end|>"
                )
        return ids

    def _message(self, tokenizer: Tokenizer, header: str, stop: str) -> list[int]:
        text = tokenizer.encode(self.text())  # control tokens by name are text in there
        return [*tokenizer.encode_with_control(f"{header}<|message|>"), *text, tokenizer.control_id(stop)]


def theirs(oracle: Any, ids: list[int]) -> tuple[list[str], list[Any]]:
    import openai_harmony as oh

    parser = oh.StreamableParser(oracle, role=oh.Role.ASSISTANT)
    deltas = []
    for id_ in ids:
        parser.process(id_)
        deltas.append(parser.last_content_delta or "")
    return deltas, parser.messages


def test_well_formed_turns_read_as_openai_reads_them(gpt_oss: Tokenizer, oracle: Any) -> None:
    turns = Turns(0)
    for _ in range(5000):
        ids = turns.turn(gpt_oss)
        deltas, expected = theirs(oracle, ids)
        parser = HarmonyParser(gpt_oss)
        events: list[Event] = []
        for id_, delta in zip(ids, deltas, strict=True):
            new = parser.feed(id_)
            texts = [e.text for e in new if isinstance(e, TextDelta | ReasoningDelta | OtherDelta | ArgumentsDelta)]
            assert "".join(texts) == delta
            events += new
        assert parser.flush() == []
        check(gpt_oss, ids, events)
        starts = [event for event in events if isinstance(event, MessageStart)]
        dones = [event for event in events if isinstance(event, MessageDone)]
        assert [
            (start.role, start.name, start.channel, start.recipient, start.content_type, done.message.text)
            for start, done in zip(starts, dones, strict=True)
        ] == [
            (m.author.role, m.author.name, m.channel, m.recipient, m.content_type, m.content[0].text) for m in expected
        ]


@pytest.mark.parametrize(
    ("header", "ours", "openai"),
    [
        # An answer in a response format: a content type is no recipient.
        (
            "<|channel|>final <|constrain|>json",
            ("final", None, "<|constrain|>json"),
            ("final", "<|constrain|>json", None),
        ),
        ("<|channel|>final json", ("final", None, "json"), ("final", "json", None)),
    ],
)
def test_where_headers_are_read_otherwise_than_by_openai(
    gpt_oss: Tokenizer, oracle: Any, header: str, ours: Any, openai: Any
) -> None:
    ids = gpt_oss.encode_with_control(f"{header}<|message|>{{}}<|return|>")
    _, (message,) = theirs(oracle, ids)
    assert (message.channel, message.recipient, message.content_type) == openai
    start = next(event for event in read_ids(gpt_oss, ids)[0] if isinstance(event, MessageStart))
    assert (start.channel, start.recipient, start.content_type) == ours


def test_control_tokens_in_text_are_left_out_where_openai_shows_them(gpt_oss: Tokenizer, oracle: Any) -> None:
    ids = gpt_oss.encode_with_control("<|channel|>final<|message|>a<|constrain|>b<|return|>")
    assert theirs(oracle, ids)[1][0].content[0].text == "a<|constrain|>b"
    assert messages(read_ids(gpt_oss, ids)[0]) == [("final", None, "ab")]


def test_events_come_as_soon_as_they_can(gpt_oss: Tokenizer) -> None:
    parser = HarmonyParser(gpt_oss)
    ids = gpt_oss.encode_with_control("<|channel|>final<|message|>One two<|return|>")
    assert [parser.feed(id_) for id_ in ids] == [
        [],
        [],
        [MessageStart(role="assistant", channel="final")],
        [TextDelta("One")],
        [TextDelta(" two")],
        [MessageDone(message=text_message("assistant", "One two", channel="final"), stop_id=ids[-1])],
    ]
    assert parser.flush() == []


def test_a_call_is_told_when_its_name_is_known_and_again_when_it_is_whole(gpt_oss: Tokenizer) -> None:
    turn = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"東京"}<|call|>'
    events, diagnostics = read(gpt_oss, turn)
    assert diagnostics == []
    assert events[:2] == [
        MessageStart(
            role="assistant",
            channel="commentary",
            recipient="functions.get_weather",
            content_type="<|constrain|>json",
        ),
        CallStart("functions.get_weather"),
    ]
    assert events[-2] == CallDone(recipient="functions.get_weather", arguments='{"city":"東京"}')


def test_reasoning_preamble_and_answer_are_told_apart(gpt_oss: Tokenizer) -> None:
    events, diagnostics = read(
        gpt_oss,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
    )
    assert diagnostics == []
    deltas = [event for event in events if isinstance(event, ReasoningDelta | TextDelta)]
    assert deltas == [
        ReasoningDelta("Hm"),
        ReasoningDelta("."),
        TextDelta("Wait"),
        TextDelta("."),
        *map(TextDelta, ("Yes", ".")),
    ]


def test_several_calls_in_one_turn(gpt_oss: Tokenizer) -> None:
    one = "<|channel|>commentary to=functions.now json<|message|>{}<|call|>"
    events, diagnostics = read(gpt_oss, f"{one}<|start|>assistant{one}")
    assert calls(events) == [("functions.now", "{}", None)] * 2
    assert diagnostics == []
    events, diagnostics = read(gpt_oss, f"{one}<|start|>assistant{one}<|return|>")
    assert events[-1] == TurnDone(gpt_oss.control_id("<|return|>"))
    assert diagnostics == []
    assert read(gpt_oss, f"{one}<|return|><|return|>")[1] == ["misplaced control token"]


def test_whole_conversations_parse_back(gpt_oss: Tokenizer) -> None:
    original = (
        Message(role="user", parts=(Text(text="q"),), name="Ann"),
        Message(role="assistant", parts=(Text(text="é😀"),), channel="commentary", recipient="functions.f"),
        Message(role="tool", name="functions.f", recipient="assistant", channel="commentary", parts=(Text(text="42"),)),
        text_message("assistant", "done", channel="final"),
    )
    ids = render(Conversation(messages=original), gpt_oss, upto=None).ids
    events = parsed(HarmonyParser(gpt_oss, role=None), ids)
    check(gpt_oss, ids, events)
    assert tuple(event.message for event in events if isinstance(event, MessageDone)) == original


@pytest.mark.parametrize("role", ROLES)
def test_messages_of_any_role_are_read(gpt_oss: Tokenizer, role: Role) -> None:
    ids = gpt_oss.encode_with_control("<|message|>42<|end|>")
    events = parsed(HarmonyParser(gpt_oss, role=role), ids)
    check(gpt_oss, ids, events)
    (message,) = [event.message for event in events if isinstance(event, MessageDone)]
    assert (message.role, message.name, message.text) == (role, "tool" if role == "tool" else None, "42")


# --- recovery: text -----------------------------------------------------------------------------------------

FINAL = ("final", None, "Yes")


@pytest.mark.parametrize(
    ("turn", "expected", "codes"),
    [
        pytest.param(
            "<|channel|>final um hm<|message|>Yes<|return|>",
            [FINAL],
            ["junk in header"] * 2,
            id="words in a header that mean nothing are left out",
        ),
        pytest.param(
            "<|channel|>final<|reserved_200013|><|message|>Yes<|return|>",
            [FINAL],
            ["misplaced control token"],
            id="so are other control tokens in it",
        ),
        pytest.param("assistant<|channel|>final<|message|>Yes<|return|>", [FINAL], [], id="a role may be said twice"),
        pytest.param(
            "<|start|>assistant<|channel|>final<|message|>Yes<|return|>",
            [FINAL],
            ["missing message"],
            id="and the prompt's whole header",
        ),
        pytest.param(
            "<|channel|>analysis<|channel|>final<|message|>Yes<|return|>",
            [FINAL],
            ["junk in header"],
            id="of two channels the last one counts",
        ),
        pytest.param(
            "<|channel|>finaljson<|message|>Yes<|return|>",
            [FINAL],
            ["junk in header"],
            id="a content type stuck to the channel comes off",
        ),
        pytest.param(
            "<|channel|>ANALYSIS<|message|>Hm<|end|><|start|>assistant<|channel|>Final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), FINAL],
            ["junk in header"] * 2,
            id="in any case",
        ),
        pytest.param(
            "<|channel|>final-analysis<|message|>Hm<|end|>",
            [("analysis", None, "Hm")],
            ["junk in header"],
            id="what may be reasoning is no answer",
        ),
        pytest.param(
            " Analysis<|message|>Hm<|end|><|start|>Analysis<|message|>Hm<|end|>",
            [("analysis", None, "Hm")] * 2,
            ["leaked header"] * 2,
            id="wherever it stands",
        ),
        pytest.param(
            "<|message|>Yes<|return|>", [FINAL], ["missing channel"], id="text without a channel is an answer"
        ),
        pytest.param(
            "<|channel|>fine<|message|>Yes<|return|>",
            [FINAL],
            ["unknown channel"],
            id="so is text on an unknown one",
        ),
        pytest.param(
            " final<|message|>Yes<|return|>", [FINAL], ["leaked header"], id="a channel's name may lack <|channel|>"
        ),
        pytest.param(
            "<|end|><|start|>final<|message|>Yes<|return|>",
            [FINAL],
            ["missing message", "leaked header"],
            id="or stand where the role belongs",
        ),
        pytest.param(
            "<|end|><|start|>asistent<|channel|>final<|message|>Yes<|return|>",
            [FINAL],
            ["missing message", "unknown role"],
            id="an unknown role is the assistant's",
        ),
        pytest.param(
            "<|end|><|start|>functions.get_weather<|channel|>commentary<|message|>{}<|end|>",
            [],
            ["missing message", "role not the assistant's"],
            id="but a tool's name makes a tool's message, not a call",
        ),
        pytest.param("<|channel|>finalYes<|return|>", [FINAL], ["missing message"], id="<|message|> may be missing"),
        pytest.param(
            "<|channel|>final Yes, and so on.<|return|>",
            [("final", None, " Yes, and so on.")],
            ["missing message"],
            id="then the first word that belongs to no header is text",
        ),
        pytest.param(
            "Hello there<|return|>",
            [("final", None, "Hello there")],
            ["missing message", "missing channel"],
            id="a turn without any header is an answer",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm<|end|>assistant<|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), FINAL],
            ["missing start"],
            id="<|start|> may be missing",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm<|end|><|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), FINAL],
            ["missing start"],
            id="and the role with it",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), FINAL],
            ["missing end", "missing start"],
            id="and the end before it: <|channel|> in a text begins a message",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm.\nassistant<|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm.\n"), FINAL],
            ["missing end", "missing start"],
            id="even if the role before it is left over as text",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm<|start|>assistant<|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), FINAL],
            ["missing end"],
            id="a message ends where the next one starts",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm<|end|>So: <|start|>assistant<|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), ("final", None, "So: "), FINAL],
            ["text between messages", "missing channel", "missing end"],
            id="text between messages is a message",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm<|end|>So: <|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), ("final", None, "So: "), FINAL],
            ["text between messages", "missing channel", "missing end", "missing start"],
            id="also before a header without start",
        ),
        pytest.param(
            "<|channel|>analysis<|message|>Hm<|end|>\n\n<|start|>assistant<|channel|>final<|message|>Yes<|return|>",
            [("analysis", None, "Hm"), FINAL],
            ["text between messages"],
            id="but blanks between messages are none",
        ),
        pytest.param(
            "<|channel|>final<|message|>Y<|message|>e<|constrain|>s<|reserved_200013|><|return|>",
            [FINAL],
            ["misplaced control token"] * 3,
            id="control tokens in a text are left out",
        ),
        pytest.param(
            "<|channel|>final<|message|>Yes<|endoftext|>", [FINAL], ["broken off"], id="<|endoftext|> ends a message"
        ),
        pytest.param("<|channel|>final<|endoftext|>", [], ["broken off", "misplaced control token"], id="and a header"),
        pytest.param(
            "<|channel|>final<|message|>Yes<|call|>", [FINAL], ["wrong end of a message"], id="so does <|call|>"
        ),
        pytest.param(
            "<|channel|>final to=user<|message|>Yes<|return|>",
            [FINAL],
            [],
            id="what is sent to the user is no call, in history neither",
        ),
        *(
            pytest.param(
                f"<|channel|>commentary to={recipient}<|message|>Yes<|end|>",
                [("commentary", None, "Yes")],
                [],
                id=f"nor what is sent to {recipient}",
            )
            for recipient in ("user", "assistant", "all")
        ),
        pytest.param(
            "<|channel|>final to=somebody<|message|>Yes<|return|>",
            [FINAL],
            ["recipient not offered"],
            id="an answer to somebody unknown is an answer",
        ),
        pytest.param("<|channel|>final<|message|>Yes", [FINAL], ["broken off"], id="the stream may end in a message"),
        pytest.param("<|channel|>commentary to", [], ["broken off"], id="or in a header"),
        pytest.param("<|channel|>fin", [], ["broken off"], id="a word that is cut short there is no text"),
        pytest.param(
            "<|channel|>final<|return|>", [("final", None, "")], ["missing message"], id="an end may come too early"
        ),
        pytest.param(
            "<|end|><|end|><|call|>", [], ["missing message"] + ["misplaced control token"] * 2, id="or alone"
        ),
        pytest.param("", [], [], id="there may be nothing at all"),
        pytest.param(
            "<|channel|>final<|message|>Yes<|end|><|start|>user<|message|>And?<|end|>",
            [FINAL],
            ["role not the assistant's"],
            id="turns of others are no part of the reply",
        ),
    ],
)
def test_text_recovers(gpt_oss: Tokenizer, turn: str, expected: list[Any], codes: list[str]) -> None:
    events, diagnostics = read(gpt_oss, turn)
    assert messages(events) == expected
    assert diagnostics == codes


def test_markup_in_plain_characters_is_text(gpt_oss: Tokenizer) -> None:
    """Injection is a matter of token ids, not of what a text says."""
    known = HarmonyVocabulary.of(gpt_oss)
    text = "".join(MARKUP)
    ids = [known.channel, *gpt_oss.encode("final"), known.message, *gpt_oss.encode(text), known.return_]
    events, diagnostics = read_ids(gpt_oss, ids)
    assert messages(events) == [("final", None, text)]
    assert diagnostics == []


def test_a_long_text_without_any_header_does_not_wait_for_its_end(gpt_oss: Tokenizer) -> None:
    parser = HarmonyParser(gpt_oss)
    events = [event for id_ in gpt_oss.encode("word " * 100) for event in parser.feed(id_)]
    assert sum(len(event.text) for event in events if isinstance(event, TextDelta)) == 500


@pytest.mark.parametrize("longest", [0, 300])
def test_a_header_may_be_as_long_as_its_recipient_makes_it(gpt_oss: Tokenizer, longest: int) -> None:
    """And 256 characters longer; what the vocabulary does not have counts as one."""
    offer = Offer(functions=(Tool(name="f" * (longest - len("functions."))),) if longest else ())
    for id_ in (gpt_oss.encode(" ")[0], 201_088):
        parser = HarmonyParser(gpt_oss, offer=offer)
        silent = [id_] * (256 + longest)
        assert [event for token in silent for event in parser.feed(token)] == []
        assert isinstance(next(event for event in parser.feed(id_) if not isinstance(event, Diagnostic)), MessageStart)


def test_tokens_after_the_flush_go_on_between_messages(gpt_oss: Tokenizer) -> None:
    parser = HarmonyParser(gpt_oss)
    ids = gpt_oss.encode_with_control
    events = parsed(parser, ids("<|channel|>analysis<|message|>Hm"))
    more = parsed(parser, ids("<|start|>assistant<|channel|>final<|message|>Yes<|return|>"))
    assert messages(events + more) == [("analysis", None, "Hm"), FINAL]
    assert [diagnostic.code for diagnostic in parser.diagnostics] == ["broken off"]


def test_an_unfinished_character_ends_with_its_message(gpt_oss: Tokenizer) -> None:
    first_byte = gpt_oss.encode("\U0010ffff")[0]
    ids = gpt_oss.encode_with_control
    header = "<|channel|>final<|message|>"
    events, _ = read_ids(gpt_oss, [*ids(f"{header}a"), first_byte, *ids(f"<|end|><|start|>assistant{header}b<|end|>")])
    assert messages(events) == [("final", None, "a\ufffd"), ("final", None, "b")]
    events, diagnostics = read_ids(gpt_oss, [*ids(f"{header}a"), first_byte])
    assert messages(events) == [("final", None, "a\ufffd")]
    assert diagnostics == ["broken off"]


def test_a_character_waits_also_behind_a_misplaced_control_token(gpt_oss: Tokenizer) -> None:
    first, *others = gpt_oss.encode("\U0010ffff")
    ids = gpt_oss.encode_with_control("<|channel|>final<|message|>")
    events, diagnostics = read_ids(gpt_oss, [*ids, first, gpt_oss.control_id("<|message|>"), *others])
    assert messages(events) == [("final", None, "\U0010ffff")]
    assert diagnostics == ["misplaced control token", "broken off"]


@pytest.mark.parametrize("name", ["<repo_name>", "<file_sep>", "<|im_start|>"])
@pytest.mark.parametrize("header", ["commentary{} to=functions.now", "commentary to={}functions.now{} json"])
def test_no_control_token_is_a_word_of_a_header(grown: Tokenizer, header: str, name: str) -> None:
    events, diagnostics = read(grown, f"<|channel|>{header.replace('{}', name)}<|message|>{{}}<|call|>")
    assert calls(events) == [("functions.now", "{}", None)]
    assert set(diagnostics) <= {"misplaced control token", "recipient mended"}
    events, diagnostics = read(grown, f"<|channel|>{name}<|message|>Yes<|return|>")
    assert messages(events) == [("final", None, "Yes")]
    assert diagnostics == ["misplaced control token", "missing channel"]


@pytest.mark.parametrize("id_", [-1, 201_088, 2**70])
def test_ids_outside_of_the_vocabulary_are_reported_wherever_they_stand(gpt_oss: Tokenizer, id_: int) -> None:
    ids = gpt_oss.encode_with_control
    turn = [*ids("<|channel|>"), id_, *ids("final<|message|>a"), id_, *ids("b<|end|>"), id_]
    events, diagnostics = read_ids(gpt_oss, turn)
    assert messages(events) == [("final", None, "ab")]
    assert diagnostics == ["unknown token"] * 3


# --- recovery: calls ----------------------------------------------------------------------------------------

ARGUMENTS = '{"city":"Oslo"}'
CALL = ("functions.get_weather", ARGUMENTS, None)


@pytest.mark.parametrize(
    ("header", "codes"),
    [
        pytest.param(
            " to=functions.get_weather<|channel|>commentary <|constrain|>json", [], id="recipient in the role"
        ),
        pytest.param(
            "<|channel|>commentary to=functions.get_weather <|constrain|>json", [], id="or in the channel part"
        ),
        pytest.param("<|channel|>commentary to=functions.get_weather<|constrain|>json", [], id="constrain glued"),
        pytest.param("<|channel|>commentary to=functions.get_weather json", [], id="constrain missing"),
        pytest.param("<|channel|>commentary to=functions.get_weather <|constrain|> json", [], id="a space behind it"),
        pytest.param("<|channel|>commentary to=functions.get_weather", [], id="no content type"),
        pytest.param(
            "<|channel|>commentary to=functions.get_weather<|constrain|>json please",
            ["junk in header"],
            id="junk behind the content type",
        ),
        pytest.param(
            "<|channel|>commentary to=functions.get_weatherjson",
            ["recipient mended"],
            id="content type stuck to the recipient",
        ),
        pytest.param("<|channel|>commentary to=get_weather", ["recipient mended"], id="no functions. prefix"),
        pytest.param("<|channel|>commentary functions.get_weather", ["recipient mended"], id="no to="),
        pytest.param("<|channel|>commentary to= functions.get_weather", ["recipient mended"], id="a space behind to="),
        pytest.param("<|channel|>commentaryto=functions.get_weather", ["recipient mended"], id="no space before to="),
        pytest.param("<|channel|>to=functions.get_weather commentary", [], id="recipient before the channel"),
        pytest.param(
            "<|channel|>commentary to=functions.get_weather<|channel|>commentary json", [], id="channel twice"
        ),
        pytest.param(
            "<|channel|>analysis to=functions.get_weather", ["wrong channel for a call"], id="on the wrong channel"
        ),
        pytest.param(
            "<|channel|>final to=functions.get_weather", ["wrong channel for a call"], id="on the answer's channel"
        ),
        pytest.param(" to=functions.get_weather", ["missing channel"], id="on no channel"),
        pytest.param(
            "<|channel|>commentary to=functions.get_weather!!", ["recipient mended"], id="other characters in it"
        ),
        pytest.param('<|channel|>commentary to="functions.get_weather"', ["recipient mended"], id="quoted"),
        pytest.param('<|channel|>commentary to= "functions.get_weather"', ["recipient mended"], id="quoted and apart"),
        pytest.param("<|channel|>commentary TO=functions.get_weather", ["recipient mended"], id="TO="),
        pytest.param(
            "<|channel|>functions.get_weather <|constrain|>json",
            ["recipient mended", "missing channel"],
            id="in place of the channel",
        ),
        pytest.param(
            "<|channel|>commentary <|constrain|>functions.get_weather",
            ["recipient mended"],
            id="in place of the content type",
        ),
        pytest.param(
            "<|channel|>commentary to=get_weather to=functions.get_weather", ["recipient mended"], id="twice the same"
        ),
    ],
)
def test_a_recipient_is_found(gpt_oss: Tokenizer, header: str, codes: list[str]) -> None:
    events, diagnostics = read(gpt_oss, f"{header}<|message|>{ARGUMENTS}<|call|>")
    assert calls(events) == [CALL]
    assert messages(events) == [("commentary", *CALL[:2])]  # its header mended
    assert diagnostics == codes


@pytest.mark.parametrize(
    ("recipients", "called"),
    [
        ("to=functions.get_weather to=functions.now", "functions.get_weather"),
        ("to=functions.get_weather, to=functions.now", "functions.get_weather"),
        ("to=functions.unknown to=functions.now", "functions.now"),
        ("to=functions.now to=user", "functions.now"),
        ("to=user to=functions.now", "functions.now"),
    ],
)
@pytest.mark.parametrize("channel", ["commentary", "final"])
def test_a_call_of_several_is_not_carried_out(gpt_oss: Tokenizer, channel: str, recipients: str, called: str) -> None:
    events, diagnostics = read(gpt_oss, f"<|channel|>{channel} {recipients} json<|message|>{{}}<|call|>")
    assert calls(events) == [(called, "{}", "several recipients")]
    assert "several recipients" in diagnostics


def test_a_call_of_nobody_known_is_no_answer(gpt_oss: Tokenizer) -> None:
    turn = "<|channel|>commentary to=user to=functions.unknown json<|message|>{}<|call|>"
    assert calls(read(gpt_oss, turn)[0]) == [("functions.unknown", "{}", "not offered")]


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("to=functions.zipcode", id="names end in code"),
        pytest.param("to=zipcode", id="with or without their namespace"),
        pytest.param("to=functions.zipjson <|constrain|>json", id="the content type is elsewhere"),
        pytest.param("to=functions.zipjson code", id="also in plain words"),
        pytest.param("to=functions.zipjsonjson", id="and sticks to a name once"),
    ],
)
def test_a_longer_name_is_not_the_offered_one(gpt_oss: Tokenizer, header: str) -> None:
    offer = Offer(functions=(Tool(name="zip"),))
    events, diagnostics = read(gpt_oss, f"<|channel|>commentary {header}<|message|>{{}}<|call|>", offer)
    name = header.split()[0].removeprefix("to=")
    assert calls(events) == [(name, "{}", "not offered")]
    assert diagnostics == ["recipient not offered"]


@pytest.mark.parametrize(
    "leak", ["<|channel|>commentary", "<|constrain|>json", "<|channel|>commentary <|constrain|>json"]
)
def test_markup_that_leaked_into_a_recipient_as_characters_is_cut_off(gpt_oss: Tokenizer, leak: str) -> None:
    known = HarmonyVocabulary.of(gpt_oss)
    leaked = gpt_oss.encode(f"commentary to=functions.get_weather{leak}")
    ids = [known.channel, *leaked, known.message, *gpt_oss.encode(ARGUMENTS), known.call]
    events, diagnostics = read_ids(gpt_oss, ids)
    assert calls(events) == [CALL]
    assert diagnostics == ["recipient mended"]


@pytest.mark.parametrize(
    ("turn", "expected", "codes"),
    [
        pytest.param(
            "<|channel|>commentary to=functions.unknown<|message|>{}<|call|>",
            ("functions.unknown", "{}", "not offered"),
            ["recipient not offered"],
            id="a tool that was not offered is named as written",
        ),
        pytest.param(
            "<|channel|>commentary to=browser.search<|message|>{}<|call|>",
            ("browser.search", "{}", None),
            ["wrong channel for a call"],
            id="a built-in tool may be called on the wrong channel",
        ),
        pytest.param(
            "<|channel|>analysis to=functions.python code<|message|>1 + 1<|call|>",
            ("python", "1 + 1", None),
            ["recipient mended"],
            id="or as if it were a function",
        ),
        pytest.param(
            "<|channel|>analysis to=python code<|message|>1 + 1<|call|>",
            ("python", "1 + 1", None),
            [],
            id="python is sent code",
        ),
        pytest.param(
            '<|channel|>analysis to=python<|message|>{"code": "1 + 1\\n"}<|call|>',
            ("python", "1 + 1\n", None),
            ["json instead of code"],
            id="which is taken out of an object",
        ),
        pytest.param(
            '<|channel|>analysis to=python<|message|>{"a": 1}["a"]<|call|>',
            ("python", '{"a": 1}["a"]', None),
            [],
            id="but not out of what may be code",
        ),
        pytest.param(
            '<|channel|>analysis to=python<|message|>{"code": "1", "a": 2}<|call|>',
            ("python", '{"code": "1", "a": 2}', None),
            [],
            id="nor out of an object that holds more",
        ),
        pytest.param(
            "<|channel|>commentary to=functions.get_weather<|message|>{'city'}<|call|>",
            ("functions.get_weather", "{'city'}", "not json"),
            ["arguments not json"],
            id="arguments have to be JSON",
        ),
        pytest.param(
            "<|channel|>commentary to=functions.get_weather<|message|>[1]<|call|>",
            ("functions.get_weather", "[1]", "not an object"),
            ["arguments not json"],
            id="and an object",
        ),
        pytest.param(
            '<|channel|>commentary to=functions.get_weather<|message|>{"a": NaN}<|call|>',
            ("functions.get_weather", '{"a": NaN}', "not json"),
            ["arguments not json"],
            id="strictly",
        ),
        pytest.param(
            f"<|channel|>commentary to=functions.get_weather<|message|>{'[' * 100_000}<|call|>",
            ("functions.get_weather", "[" * 100_000, "not json"),
            ["arguments not json"],
            id="however deep",
        ),
        pytest.param(
            "<|channel|>commentary to=functions.now<|message|> <|call|>",
            ("functions.now", "{}", None),
            ["arguments not json"],
            id="a tool that takes none needs none",
        ),
        pytest.param(
            f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|end|>",
            CALL,
            ["wrong end of a call"],
            id="<|end|> ends a call as well",
        ),
        pytest.param(
            f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|return|>",
            CALL,
            ["wrong end of a call"],
            id="and <|return|>",
        ),
        pytest.param(
            f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|start|>assistant",
            CALL,
            ["missing end", "broken off"],
            id="and the next message",
        ),
        pytest.param(
            f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}",
            ("functions.get_weather", ARGUMENTS, "broken off"),
            ["broken off"],
            id="but not the end of the stream",
        ),
        pytest.param(
            f"<|channel|>commentary to=functions.get_weather<|message|>{ARGUMENTS}<|endoftext|>",
            ("functions.get_weather", ARGUMENTS, "broken off"),
            ["broken off"],
            id="nor of the text",
        ),
        pytest.param(
            f"<|channel|>commentary to=functions.get_weather <|constrain|>json{ARGUMENTS}<|call|>",
            CALL,
            ["missing message"],
            id="<|message|> may be missing",
        ),
    ],
)
def test_a_call_recovers(gpt_oss: Tokenizer, turn: str, expected: Any, codes: list[str]) -> None:
    events, diagnostics = read(gpt_oss, turn)
    assert calls(events) == [expected]
    assert diagnostics == codes


@pytest.mark.parametrize(
    ("written", "arguments", "codes"),
    [
        ("print(1)\n", json.dumps({"code": "print(1)\n"}), ["recipient mended", "code instead of json"]),
        ('{"code": "1"}', '{"code": "1"}', ["recipient mended"]),
    ],
)
def test_a_function_called_python_gets_bare_code_as_its_argument(
    gpt_oss: Tokenizer, written: str, arguments: str, codes: list[str]
) -> None:
    """The model knows python as a tool that takes code, whatever the schema says."""
    events, diagnostics = read(gpt_oss, f"<|channel|>commentary to=python<|message|>{written}<|call|>", PYTHON_FUNCTION)
    assert calls(events) == [("functions.python", arguments, None)]
    assert diagnostics == codes
    assert messages(events) == [("commentary", "functions.python", written)]  # history keeps what was written


# --- recovery: headers in plain text ------------------------------------------------------------------------


def plain(tokenizer: Tokenizer, turn: str) -> list[int]:
    """A turn whose control tokens, written as names between "|", are lost: the tokens around them stay apart."""
    return [id_ for piece in turn.split("|") for id_ in tokenizer.encode(piece)]


ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        pytest.param("Done.|assistant|final|Yes", [("analysis", None, "Done."), FINAL], id="assistantfinal"),
        pytest.param(
            "Done.|assistant|final|four", [("analysis", None, "Done."), ("final", None, "four")], id="any text"
        ),
        pytest.param(
            "Done.\n|assistant|final|\nYes", [("analysis", None, "Done.\n"), ("final", None, "\nYes")], id="lines"
        ),
        pytest.param(
            f"Done.|assistant|commentary to=functions.get_weather| json|{ARGUMENTS}",
            [("analysis", None, "Done."), ("commentary", "functions.get_weather", ARGUMENTS)],
            id="a call",
        ),
        pytest.param(
            "A.|assistant|analysis|B.|assistant|final|Yes",
            [("analysis", None, "A."), ("analysis", None, "B."), FINAL],
            id="twice",
        ),
        pytest.param(
            'The run "|assistant|final|" leaks.', [("analysis", None, 'The run "assistantfinal" leaks.')], id="quoted"
        ),
        pytest.param("So |assistant|final| is", [("analysis", None, "So assistantfinal is")], id="between spaces"),
        pytest.param("The |assistant| as", [("analysis", None, "The assistant as")], id="the word alone"),
        pytest.param("a as ass assist", [("analysis", None, "a as ass assist")], id="its beginnings"),
        pytest.param("Done.|assistant|final", [("analysis", None, "Done.assistantfinal")], id="with nothing behind"),
        pytest.param(" x.assistantfinally", [("analysis", None, " x.assistantfinally")], id="inside of other tokens"),
    ],
)
def test_a_header_that_leaked_into_reasoning_begins_a_message(gpt_oss: Tokenizer, turn: str, expected: Any) -> None:
    """Only behind a sentence, before text, and as the tokens that headers are made of; in doubt it is text.

    Calls among them are not to be carried out: what a tool or a user wrote may say the same, and be quoted.
    """
    ids = gpt_oss.encode_with_control
    events, diagnostics = read_ids(gpt_oss, [*ids(ANALYSIS), *plain(gpt_oss, turn), *ids("<|call|>")])
    assert messages(events) == expected
    assert ("leaked header" in diagnostics) == (len(expected) > 1)
    assert all(problem == "leaked" for _, _, problem in calls(events))


def test_a_call_that_got_back_to_its_control_tokens_is_one(gpt_oss: Tokenizer) -> None:
    ids = gpt_oss.encode_with_control
    leak = plain(gpt_oss, "Done.|assistant|commentary to=functions.get_weather")
    events, diagnostics = read_ids(gpt_oss, [*ids(ANALYSIS), *leak, *ids(f"<|message|>{ARGUMENTS}<|call|>")])
    assert calls(events) == [CALL]
    assert diagnostics == ["leaked header"] * 2  # the header itself, and <|channel|> missing in it


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("Hm. assistantfinal", FINAL),
        ("Hm.assistant", FINAL),
        ("Hm.|assistant|final", FINAL),
        ("Hm assistantfinal\n", FINAL),
        ("Hm.assistantanalysis", ("analysis", None, "Yes")),
        ("Hm.assistantcommentary", ("commentary", None, "Yes")),
    ],
)
@pytest.mark.parametrize("plain_headers", [True, False])
def test_message_behind_a_header_in_plain_words_begins_one(
    gpt_oss: Tokenizer, end: str, expected: Any, plain_headers: bool
) -> None:
    """The words were handed out as text by then; what follows is not for the same channel."""
    ids = gpt_oss.encode_with_control
    turn = [*ids(ANALYSIS), *plain(gpt_oss, end), *ids("<|message|>Yes<|return|>")]
    parser = HarmonyParser(gpt_oss, offer=OFFER, plain_headers=plain_headers)
    events = parsed(parser, turn)
    check(gpt_oss, turn, events)
    assert messages(events) == [("analysis", None, end.replace("|", "")), expected]
    codes = [diagnostic.code for diagnostic in parser.diagnostics]
    assert codes == ["missing end", "missing channel" if end == "Hm.assistant" else "leaked header"]


@pytest.mark.parametrize("leak", ["Done.|assistant|final|Yes", "Done.|assistant|commentary| to=functions.now json{}"])
def test_under_a_grammar_text_stays_text(gpt_oss: Tokenizer, leak: str) -> None:
    """A header in plain words would be an answer in no response format, or a call where there may be none."""
    ids = gpt_oss.encode_with_control
    turn = [*ids(ANALYSIS), *plain(gpt_oss, leak)]
    turn += ids("<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>")
    conversation = Conversation(messages=(text_message("user", "q"),))
    made = choose(gpt_oss, None, ()).turn(conversation, tool_choice="none", response_format=JsonObject())
    reader = made.new_reader()
    assert made.grammar is not None and isinstance(reader, HarmonyParser)
    constraint = made.grammar()
    for id_ in turn:
        constraint.accept(id_)  # raises where the grammar does not allow it
    events = parsed(reader, turn)
    assert messages(events) == [("analysis", None, leak.replace("|", "")), ("final", None, "{}")]
    assert reader.diagnostics == ()
    assert calls(events) == []


def test_answers_may_say_assistantfinal(gpt_oss: Tokenizer) -> None:
    ids = gpt_oss.encode_with_control
    turn = [*ids("<|channel|>final<|message|>"), *plain(gpt_oss, "Done.|assistant|final|Yes"), *ids("<|return|>")]
    assert messages(read_ids(gpt_oss, turn)[0]) == [("final", None, "Done.assistantfinalYes")]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        pytest.param("analysis|We add.|assistant|final|Yes", [("analysis", None, "We add."), FINAL], id="reasoning"),
        pytest.param("assistant|final|Yes", [FINAL], id="an answer"),
        pytest.param("final| answers are rare.", [("final", None, "final answers are rare.")], id="prose"),
        pytest.param("finally", [("final", None, "finally")], id="other words"),
        pytest.param(
            f" to=functions.get_weather| json|{ARGUMENTS}",
            [("commentary", "functions.get_weather", ARGUMENTS)],
            id="a call",
        ),
    ],
)
def test_a_turn_without_any_control_token(gpt_oss: Tokenizer, turn: str, expected: Any) -> None:
    """A channel's name counts as a header where what follows goes on like no sentence."""
    events, _ = read_ids(gpt_oss, plain(gpt_oss, turn))
    assert messages(events) == expected
    assert all(problem == "leaked" for _, _, problem in calls(events))


def test_leaks_wait_no_longer_than_they_must(gpt_oss: Tokenizer) -> None:
    parser = HarmonyParser(gpt_oss)
    ids = [*gpt_oss.encode_with_control(ANALYSIS), *plain(gpt_oss, "x|assistant|final|ly")]
    steps = [parser.feed(id_) for id_ in ids][-4:]
    assert steps[:3] == [[ReasoningDelta("x")], [], []]


# --- any stream at all --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def grown(default_folder: Path) -> Tokenizer:
    """The default model's vocabulary, which has Harmony's control tokens."""
    return Tokenizer.from_file(default_folder / "tokenizer.json")


def fuzzed(tokenizer: Tokenizer, random: Random, turns: list[list[int]]) -> list[int]:
    """A random stream, or a real turn that was damaged in a few places."""
    named = [tokenizer.control_id(name) for name in MARKUP]
    control = [*named * 5, *tokenizer.control_tokens.values(), tokenizer.vocab_size, tokenizer.vocab_size + 7, -1]
    words = [
        id_ for text in ("assistant", "final", "analysis", " to=", " json", "{}", "é") for id_ in tokenizer.encode(text)
    ]

    def any_token() -> int:
        match random.randrange(3):
            case 0:
                return random.choice(control)
            case 1:
                return random.choice(words)
        return random.randrange(tokenizer.vocab_size)

    if random.random() < 0.3:
        return [any_token() for _ in range(random.randrange(30))]
    ids = list(random.choice(turns))
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(ids) + 1)
        match random.randrange(6):
            case 0 if at < len(ids):  # a bit flips
                ids[at] ^= 1 << random.randrange(18)
            case 1:  # some are lost
                del ids[at : at + random.randrange(1, 4)]
            case 2:  # some come twice
                ids[at:at] = ids[max(0, at - random.randrange(1, 6)) : at]
            case 3:  # the end is missing
                del ids[at:]
            case 4:
                ids.insert(at, any_token())
            case _:  # two change places
                ids[at : at + 2] = reversed(ids[at : at + 2])
    return ids


def real_turns(tokenizer: Tokenizer) -> Iterator[list[int]]:
    turns = Turns(1)
    for _ in range(300):
        yield turns.turn(tokenizer)
    for turn in ("Done.|assistant|final|Yes", f"Done.|assistant|commentary to=functions.get_weather| json|{ARGUMENTS}"):
        yield [*tokenizer.encode_with_control(ANALYSIS), *plain(tokenizer, turn)]
    for header in (" to=functions.now", "<|channel|>analysis to=python code", "<|channel|>commentary to=now"):
        yield tokenizer.encode_with_control(f'{header}<|message|>{{"code": "1"}}<|call|>')


@pytest.mark.parametrize("vocabulary", ["gpt_oss", "grown"])
def test_no_stream_breaks_the_parser(request: pytest.FixtureRequest, vocabulary: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(vocabulary)
    turns, random = list(real_turns(tokenizer)), Random(os.environ.get("FREEHOLD_FUZZ_SEED", "2"))
    offers = (OFFER, Offer(), PYTHON_FUNCTION)
    roles: list[Role | None] = ["assistant"] * 5
    roles += [*ROLES, None]
    for _ in range(int(os.environ.get("FREEHOLD_FUZZ", "10000")) // 2):
        ids = fuzzed(tokenizer, random, turns)
        role = random.choice(roles)
        parser = HarmonyParser(tokenizer, offer=random.choice(offers), role=role)
        events = parsed(parser, ids)
        try:
            check(tokenizer, ids, events)
        except (AssertionError, KeyError):
            pytest.fail(f"{role} {ids}: {tokenizer.decode(ids, control='show')!r} became {events}")
        assert parser.flush() == []
