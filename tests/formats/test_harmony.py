"""Harmony against openai-harmony: rendering."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import CheckpointError, UnsupportedError
from freehold.formats.conversation import (
    CHANNELS,
    EFFORTS,
    Conversation,
    DeveloperContent,
    Message,
    SystemContent,
    Text,
    Tool,
    ToolNamespace,
    text_message,
)
from freehold.formats.harmony.render import render_conversation, render_prompt
from freehold.formats.harmony.vocabulary import CONTROL_TOKENS, HarmonyVocabulary, speaks_harmony
from freehold.formats.tokenizer import Tokenizer

texts = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(["<|start|>", "<|end|>", "<|channel|>final", " to=x", "\n\n", "é", "word "])).map("".join),
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-]{0,8}", fullmatch=True)
systems = st.builds(
    SystemContent,
    identity=st.one_of(st.none(), st.text(min_size=1, max_size=20).filter(str.strip)),
    knowledge_cutoff=st.sampled_from([None, "2024-06", "never"]),
    date=st.sampled_from([None, "2025-08-05"]),
    effort=st.sampled_from([None, *EFFORTS]),
    channels=st.sampled_from([CHANNELS, ("final",), ()]),
)
bodies = texts.map(lambda text: (Text(text=text),))
messages = st.one_of(
    st.builds(Message, role=st.just("system"), parts=systems.map(lambda system: (system,))),
    st.builds(
        Message,
        role=st.just("developer"),
        parts=st.builds(DeveloperContent, instructions=st.one_of(st.none(), texts)).map(lambda part: (part,)),
    ),
    st.builds(Message, role=st.just("user"), parts=bodies, name=st.one_of(st.none(), names)),
    st.builds(
        Message,
        role=st.just("assistant"),
        parts=bodies,
        channel=st.sampled_from([None, *CHANNELS]),
        recipient=st.one_of(st.none(), names),
        content_type=st.sampled_from([None, "json", "<|constrain|>json", "<|constrain|> json"]),
    ),
    st.builds(
        Message,
        role=st.just("tool"),
        name=names,
        parts=bodies,
        channel=st.sampled_from([None, "commentary"]),
        recipient=st.just("assistant"),
    ),
)


def theirs(conversation: Conversation) -> Any:
    """The same conversation as openai-harmony's own values."""
    import openai_harmony as oh

    def content(part: Any) -> Any:
        match part:
            case Text(text=text):
                return oh.TextContent(text=text)
            case SystemContent():
                required = oh.ChannelConfig.require_channels(list(part.channels))
                return oh.SystemContent(
                    model_identity=part.identity,
                    knowledge_cutoff=part.knowledge_cutoff,
                    conversation_start_date=part.date,
                    reasoning_effort=oh.ReasoningEffort(part.effort.capitalize()) if part.effort else None,
                    channel_config=required,
                )
        return oh.DeveloperContent(instructions=part.instructions)

    return oh.Conversation.from_messages(
        [
            oh.Message(
                author=oh.Author(role=oh.Role(message.role), name=message.name),
                content=[content(part) for part in message.parts],
                channel=message.channel,
                recipient=message.recipient,
                content_type=message.content_type,
            )
            for message in conversation.messages
        ]
    )


def rendered_by(oracle: Any, conversation: Conversation) -> list[int]:
    import openai_harmony as oh

    config = oh.RenderConversationConfig(auto_drop_analysis=False)
    ids: list[int] = oracle.render_conversation_for_completion(theirs(conversation), oh.Role.ASSISTANT, config=config)
    return ids


def without_past_analysis(conversation: Conversation) -> Conversation:
    """The rule of the written specification, said backwards: keep analysis until a final answer is met."""
    kept: list[Message] = []
    for message in reversed(conversation.messages):
        if message.channel == "analysis" and any(later.channel == "final" for later in kept):
            continue
        kept.append(message)
    return Conversation(messages=tuple(reversed(kept)))


# --- rendering
# --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(conversation=st.builds(Conversation, messages=st.lists(messages, max_size=6).map(tuple)))
def test_any_conversation_renders_as_openai_renders_it(
    gpt_oss: Tokenizer, oracle: Any, conversation: Conversation
) -> None:
    assert render_prompt(conversation, gpt_oss) == rendered_by(oracle, without_past_analysis(conversation))


def test_the_default_system_message_is_openais(gpt_oss: Tokenizer, oracle: Any) -> None:
    import openai_harmony as oh

    message = oh.Message.from_role_and_content(oh.Role.SYSTEM, oh.SystemContent.new())
    ours = Conversation(messages=(Message(role="system", parts=(SystemContent(),)),))
    assert render_conversation(ours, gpt_oss) == oracle.render(message)
    dated = Conversation(messages=(Message(role="system", parts=(SystemContent(date="2025-08-05"),)),))
    assert gpt_oss.decode(render_prompt(dated, gpt_oss), control="show") == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-05\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>assistant"
    )


def turn(question: str, thought: str, answer: str) -> tuple[Message, ...]:
    return (
        text_message("user", question),
        text_message("assistant", thought, channel="analysis"),
        text_message("assistant", answer, channel="final"),
    )


def test_one_finished_turn_renders_as_openais_own_default_does(gpt_oss: Tokenizer, oracle: Any) -> None:
    import openai_harmony as oh

    conversation = Conversation(messages=(*turn("q", "hm", "a"), text_message("user", "more")))
    expected = oracle.render_conversation_for_completion(theirs(conversation), oh.Role.ASSISTANT)
    assert render_prompt(conversation, gpt_oss) == expected


def test_analysis_is_kept_until_a_final_answer_follows(gpt_oss: Tokenizer) -> None:
    call = Message(
        role="assistant",
        parts=(Text(text="{}"),),
        channel="commentary",
        recipient="functions.f",
        content_type="json",
    )
    working = (text_message("user", "q3"), text_message("assistant", "keep", channel="analysis"), call)
    conversation = Conversation(messages=(*turn("q1", "drop", "a1"), *turn("q2", "drop", "a2"), *working))
    text = gpt_oss.decode(render_prompt(conversation, gpt_oss), control="show")
    assert "drop" not in text
    assert "<|start|>assistant<|channel|>analysis<|message|>keep<|end|>" in text
    assert text.endswith("to=functions.f<|channel|>commentary json<|message|>{}<|call|><|start|>assistant")


@pytest.mark.parametrize(
    "message",
    [
        Message(role="developer", parts=(DeveloperContent(tools=(Tool(name="f"),)),)),
        Message(role="system", parts=(SystemContent(tools=(ToolNamespace(name="python"),)),)),
    ],
)
def test_tools_are_refused(gpt_oss: Tokenizer, message: Message) -> None:
    with pytest.raises(UnsupportedError, match="tools are not rendered yet"):
        render_prompt(Conversation(messages=(message,)), gpt_oss)


def test_any_vocabulary_with_the_tokens_speaks_harmony(small: Tokenizer) -> None:
    assert not speaks_harmony(small)
    with pytest.raises(CheckpointError, match=r"lacks Harmony's <\|start\|>, <\|end\|>"):
        HarmonyVocabulary.of(small)
    grown = small.with_control_tokens(CONTROL_TOKENS)
    assert speaks_harmony(grown)
    ids = render_prompt(Conversation(messages=(text_message("user", "hello<|end|>"),)), grown)
    known = HarmonyVocabulary.of(grown)
    plain = [known.start, *grown.encode("user"), known.message, *grown.encode("hello<|end|>"), known.end]
    assert ids == [*plain, known.start, *grown.encode("assistant")]
