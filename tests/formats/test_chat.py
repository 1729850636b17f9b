"""The door to chat formats: which format a model gets, what it renders, how a reply is read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import CheckpointError, UnsupportedError
from freehold.formats.chat import ChatFormat, Turn, choose
from freehold.formats.conversation import Conversation, Message, SystemContent, Text, text_message
from freehold.formats.events import ArgumentsDelta, Event, ReasoningDelta, TextDelta
from freehold.formats.harmony.builtins import PYTHON
from freehold.formats.harmony.vocabulary import CONTROL_TOKENS
from freehold.formats.templates import CHATML
from freehold.formats.tokenizer import Tokenizer

HARMONY_TEMPLATE = "{{ '<|start|>system<|message|>' }}"


def prompt(chat: ChatFormat, tokenizer: Tokenizer, *messages: tuple[str, str]) -> str:
    openai = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.decode(chat.render(Conversation.from_openai(openai)).ids, control="show")


def read(chat: ChatFormat, ids: list[int]) -> tuple[list[Event], tuple[Message, ...]]:
    reader = turn_of(chat).new_reader()
    events = [event for id_ in ids for event in reader.feed(id_)] + reader.flush()
    return events, reader.messages


def turn_of(chat: ChatFormat) -> Turn:
    return chat.turn(Conversation(messages=(text_message("user", "hello"),)), grammar=False)


def joined(events: list[Event], kind: type[ReasoningDelta | TextDelta | ArgumentsDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


# --- choosing
# ---------------------------------------------------------------------------------------------------


def test_harmony_where_the_template_or_the_vocabulary_speaks_it(gpt_oss: Tokenizer, small: Tokenizer) -> None:
    for template in (None, HARMONY_TEMPLATE):
        chat = choose(gpt_oss, template, [199999])
        assert turn_of(chat).stop_ids == {199999, 200002, 200012}
        assert prompt(chat, gpt_oss, ("user", "hello")).startswith("<|start|>system<|message|>You are ChatGPT")
    with pytest.raises(CheckpointError, match="lacks Harmony's"):
        choose(small, HARMONY_TEMPLATE, [])


def test_the_template_otherwise_even_where_the_vocabulary_has_harmonys_tokens(small: Tokenizer) -> None:
    grown = small.with_control_tokens(CONTROL_TOKENS)
    chat = choose(grown, CHATML, [2, 0])
    assert turn_of(chat).stop_ids == {0, 2}
    assert prompt(chat, grown, ("user", "hello")) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_variables_reach_the_template(small: Tokenizer) -> None:
    chat = choose(small, "{{ bos_token }}{{ messages[0].content }}", [2], variables={"bos_token": "<|endoftext|>"})
    assert chat.render(Conversation(messages=(text_message("user", "hello"),))).ids == [0, *small.encode("hello")]


def test_a_template_without_any_end_is_refused(small: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id"):
        choose(small, CHATML, [])


def test_turns_of_others_are_no_part_of_the_reply(gpt_oss: Tokenizer) -> None:
    text = "<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>And now?<|end|>"
    events, messages = read(choose(gpt_oss, None, []), gpt_oss.encode_with_control(text))
    assert joined(events, TextDelta) == "Yes."
    assert [message.text for message in messages] == ["Yes."]


def test_nothing_to_go_by_is_an_error_with_a_remedy(small: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        choose(small, None, [2])


def test_the_end_of_a_message_does_not_end_a_harmony_reply(gpt_oss: Tokenizer) -> None:
    assert 200007 not in turn_of(choose(gpt_oss, None, [200007, 200002])).stop_ids


# --- Harmony
# ----------------------------------------------------------------------------------------------------


def test_a_chat_in_harmony(gpt_oss: Tokenizer) -> None:
    chat = choose(gpt_oss, None, [], system=SystemContent(date="2025-08-05", effort="high"))
    text = prompt(
        chat,
        gpt_oss,
        ("system", "Be brief."),
        ("developer", "Rhyme."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    )
    assert text == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-05\n\nReasoning: high\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\nRhyme.<|end|>"
        "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|end|>"
        "<|start|>user<|message|>c<|end|><|start|>assistant"
    )


def test_a_system_message_of_ones_own_replaces_the_default(gpt_oss: Tokenizer) -> None:
    own = Message(role="system", parts=(SystemContent(identity="You are Ann."),))
    text = gpt_oss.decode(choose(gpt_oss, None, []).render(Conversation(messages=(own,))).ids)
    assert text.startswith("systemYou are Ann.")
    assert "ChatGPT" not in text


def test_a_harmony_reply_is_read_and_goes_back_into_the_history(gpt_oss: Tokenizer) -> None:
    chat = choose(gpt_oss, None, [])
    reply = gpt_oss.encode_with_control(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Paris 😀<|return|>"
    )
    events, messages = read(chat, reply)
    assert joined(events, ReasoningDelta) == "Hm."
    assert joined(events, TextDelta) == "Wait.Paris 😀"
    assert [(message.channel, message.text) for message in messages] == [
        ("analysis", "Hm."),
        ("commentary", "Wait."),
        ("final", "Paris 😀"),
    ]
    conversation = Conversation(messages=(text_message("user", "q"),)).plus(*messages, text_message("user", "more"))
    text = gpt_oss.decode(chat.render(conversation).ids, control="show")
    assert text.endswith(
        "<|start|>user<|message|>q<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Paris 😀<|end|><|start|>user<|message|>more<|end|>"
        "<|start|>assistant"
    )


def test_what_is_meant_for_a_tool_is_no_answer(gpt_oss: Tokenizer) -> None:
    reply = gpt_oss.encode_with_control(" to=functions.f<|channel|>commentary<|message|>{}<|call|>")
    events, messages = read(choose(gpt_oss, None, []), reply)
    assert joined(events, TextDelta) == ""
    assert messages == (
        Message(role="assistant", channel="commentary", recipient="functions.f", parts=(Text(text="{}"),)),
    )


def test_made_up_headers_do_not_spoil_the_history(gpt_oss: Tokenizer) -> None:
    reply = gpt_oss.encode_with_control(" to=<a,b><|channel|>secret<|message|>x<|end|>")
    chat = choose(gpt_oss, None, [])
    _, messages = read(chat, reply)
    assert messages == (text_message("assistant", "x", channel="final"),)
    chat.render(Conversation(messages=messages))


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(199_998, 200_014), st.integers(0, 2000), st.just(17 + 2**18)), max_size=30))
def test_whatever_was_said_can_be_said_on(gpt_oss: Tokenizer, ids: list[int]) -> None:
    chat = choose(gpt_oss, None, [])
    events, messages = read(chat, ids)
    said = "".join(joined(events, kind) for kind in (ReasoningDelta, TextDelta, ArgumentsDelta))
    assert sorted(said) == sorted("".join(message.text for message in messages))
    chat.render(Conversation(messages=messages))


def test_system_prompts_and_tools_become_one_developer_message(gpt_oss: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    conversation = Conversation.from_openai(messages, tools=[{"type": "function", "name": "f"}])
    text = gpt_oss.decode(choose(gpt_oss, None, []).render(conversation).ids, control="show")
    assert "\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>" in text
    assert text.endswith(
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\n"
        "namespace functions {\n\ntype f = () => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>q<|end|><|start|>assistant"
    )
    bare = Conversation.from_openai(messages[1:], tools=[{"type": "function", "name": "f"}])
    assert "# Instructions" not in gpt_oss.decode(choose(gpt_oss, None, []).render(bare).ids)


def test_a_call_without_a_channel_is_no_answer(gpt_oss: Tokenizer) -> None:
    call = Message(role="assistant", recipient="functions.f", parts=(Text(text="{}"),))
    text = gpt_oss.decode(choose(gpt_oss, None, []).render(Conversation(messages=(call,))).ids, control="show")
    assert text.endswith("<|start|>assistant to=functions.f<|message|>{}<|call|><|start|>assistant")


# --- templates
# --------------------------------------------------------------------------------------------------


def test_a_templates_reply_is_all_answer(small: Tokenizer) -> None:
    chat = choose(small, CHATML, [2])
    events, messages = read(chat, [*small.encode("hello é<|im_end|>"), 2])
    assert joined(events, TextDelta) == "hello é<|im_end|>"
    assert messages == (text_message("assistant", "hello é<|im_end|>"),)


def test_templates_are_spared_what_only_harmony_has(small: Tokenizer) -> None:
    chat = choose(small, CHATML, [2])
    conversation = Conversation(
        messages=(
            Message(role="system", parts=(SystemContent(),)),
            text_message("user", "q"),
            text_message("assistant", "thinking", channel="analysis"),
            text_message("assistant", "a", channel="final"),
        )
    )
    text = small.decode(chat.render(conversation).ids, control="show")
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>assistant\n"


def test_built_in_tools_are_not_passed_over_by_templates(small: Tokenizer) -> None:
    message = Message(role="system", parts=(SystemContent(tools=(PYTHON,)),))
    with pytest.raises(UnsupportedError, match="text and tools only"):
        choose(small, CHATML, [2]).render(Conversation(messages=(message,)))
