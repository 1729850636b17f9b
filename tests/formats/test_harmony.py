"""Parsing Harmony: as openai-harmony does, and streams that make no sense."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.formats.conversation import CHANNELS, Channel, Conversation, Message, Text, text_message
from freehold.formats.harmony.parser import Event, HarmonyParser, MessageEnd, MessageStart, TextDelta
from freehold.formats.harmony.render import render
from freehold.formats.tokenizer import Tokenizer
from tests.harmony import theirs

texts = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(["<|start|>", "<|end|>", "<|channel|>final", " to=x", "\n\n", "é", "word "])).map("".join),
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
bodies = texts.map(lambda text: (Text(text=text),))

# --- parsing
# ----------------------------------------------------------------------------------------------------


def parsed(parser: HarmonyParser, ids: Sequence[int]) -> list[Event]:
    return [event for id_ in ids for event in parser.feed(id_)] + parser.flush()


def as_messages(events: list[Event]) -> list[tuple[MessageStart, str]]:
    """Starts with their texts; checks on the way that events come in order."""
    result: list[tuple[MessageStart, str]] = []
    is_open = False
    for event in events:
        match event:
            case MessageStart():
                assert not is_open
                result.append((event, ""))
            case TextDelta(text=text):
                assert is_open
                assert text
                result[-1] = (result[-1][0], result[-1][1] + text)
            case MessageEnd():
                assert is_open
        is_open = not isinstance(event, MessageEnd)
    assert not is_open
    return result


replies = st.lists(
    st.builds(
        Message,
        role=st.just("assistant"),
        parts=bodies,
        channel=st.sampled_from(CHANNELS),
        recipient=st.one_of(st.none(), names),
        content_type=st.sampled_from([None, "<|constrain|>json"]),
    ).filter(lambda message: message.recipient is not None or message.content_type is None),
    min_size=1,
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(reply=replies)
def test_well_formed_replies_parse_as_openai_parses_them(gpt_oss: Tokenizer, oracle: Any, reply: list[Message]) -> None:
    import openai_harmony as oh

    ids: list[int] = oracle.render_conversation(
        theirs(Conversation(messages=tuple(reply))),
        config=oh.RenderConversationConfig(auto_drop_analysis=False),
    )[2:]  # the prompt ends in <|start|>assistant
    expected = oracle.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT)
    ours = as_messages(parsed(HarmonyParser(gpt_oss), ids))
    assert [(start.role, start.channel, start.recipient, start.content_type, text) for start, text in ours] == [
        (
            message.author.role.value,
            message.channel,
            message.recipient,
            message.content_type,
            message.content[0].text,
        )
        for message in expected
    ]


def test_whole_conversations_parse_back(gpt_oss: Tokenizer) -> None:
    original = (
        text_message("user", "q"),
        replace(text_message("assistant", "é😀", channel="commentary"), recipient="functions.f"),
        Message(
            role="tool",
            name="functions.f",
            recipient="assistant",
            channel="commentary",
            parts=(Text(text="42"),),
        ),
        replace(text_message("user", "thanks"), name="Ann"),
    )
    ids = render(Conversation(messages=original), gpt_oss, upto=None).ids
    read = as_messages(parsed(HarmonyParser(gpt_oss, role=None), ids))
    assert [
        Message(
            role=start.role,
            parts=(Text(text=text),),
            channel=known_channel(start.channel),
            recipient=start.recipient,
            name=start.name,
        )
        for start, text in read
    ] == list(original)


def known_channel(name: str | None) -> Channel | None:
    return next((channel for channel in CHANNELS if channel == name), None)


Ids = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def ids(gpt_oss: Tokenizer) -> Ids:
    return gpt_oss.encode_with_control


def test_events_come_as_soon_as_they_can(gpt_oss: Tokenizer, ids: Ids) -> None:
    parser = HarmonyParser(gpt_oss)
    steps = [parser.feed(id_) for id_ in ids("<|channel|>final<|message|>One two<|return|>")]
    assert steps == [
        [],
        [],
        [MessageStart(role="assistant", channel="final")],
        [TextDelta("One")],
        [TextDelta(" two")],
        [MessageEnd(gpt_oss.control_id("<|return|>"))],
    ]
    assert parser.flush() == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Hello there<|return|>", [(None, None, "Hello there")]),
        ("Hello there", [(None, None, "Hello there")]),
        ("<|channel|>final<|message|>cut", [("final", None, "cut")]),
        ("<|channel|>final<|message|>", [("final", None, "")]),
        ("<|message|>x<|end|>", [(None, None, "x")]),
        ("<|channel|>final<|message|>a<|end|>stray", [("final", None, "a"), (None, None, "stray")]),
        (
            "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b",
            [("analysis", None, "a"), ("final", None, "b")],
        ),
        (
            "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b",
            [("analysis", None, "a"), ("final", None, "b")],
        ),
        ("<|channel|>final<|message|>a<|channel|>b<|message|>c<|end|>", [("final", None, "abc")]),
        (" to=f<|channel|>commentary<|constrain|>json<|message|>{}", [("commentary", "f", "{}")]),
        ("<|channel|>commentary to=f <|constrain|>json<|message|>{}", [("commentary", "f", "{}")]),
        ("<|end|><|end|><|return|><|call|>", []),
        ("<|end|><|start|><|message|>x", [(None, None, "x")]),
        ("", []),
    ],
)
def test_malformed_replies_lose_no_text(gpt_oss: Tokenizer, ids: Ids, written: str, expected: list[Any]) -> None:
    read = as_messages(parsed(HarmonyParser(gpt_oss), ids(written)))
    assert [(start.channel, start.recipient, text) for start, text in read] == expected


def test_an_unfinished_character_ends_with_its_message(gpt_oss: Tokenizer, ids: Ids) -> None:
    first_byte = gpt_oss.encode("\U0010ffff")[0]
    reply = [*ids("<|message|>a"), first_byte, *ids("<|end|><|start|>user<|message|>b")]
    read = as_messages(parsed(HarmonyParser(gpt_oss), reply))
    assert [text for _, text in read] == ["a\ufffd", "b"]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(199_998, 200_020), st.integers(0, 300), st.integers(-5, 300_000)), max_size=40),
    role=st.sampled_from(["assistant", "user", None]),
)
def test_no_stream_breaks_the_parser(gpt_oss: Tokenizer, ids: list[int], role: Any) -> None:
    parser = HarmonyParser(gpt_oss, role=role)
    as_messages(parsed(parser, ids))
    assert parser.flush() == []
