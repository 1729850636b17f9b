"""The door to chat formats: which format a model gets, what it renders, how a reply is read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.formats.chat import ChatFormat, Turn, choose
from freehold.formats.conversation import (
    Channel,
    Conversation,
    DeveloperContent,
    Message,
    SystemContent,
    Text,
    Tool,
    text_message,
)
from freehold.formats.events import ArgumentsDelta, Event, MessageDone, ReasoningDelta, TextDelta
from freehold.formats.forms import Choice, FreeText, JsonObject, Lark, Regex
from freehold.formats.harmony.builtins import PYTHON
from freehold.formats.harmony.grammar import AllowedTools
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


def test_tools_that_are_sent_text_are_described_as_such(gpt_oss: Tokenizer) -> None:
    tools = (
        Tool(name="note", description="Keeps a note.", text_format=FreeText()),
        Tool(name="code", text_format=Regex("[A-Z]{2}")),
        Tool(name="patch", text_format=Lark('start: a\na: "x"\n')),
    )
    conversation = Conversation(messages=(Message(role="developer", parts=(DeveloperContent(tools=tools),)),))
    assert gpt_oss.decode(choose(gpt_oss, None, []).render(conversation).ids).endswith(
        "namespace functions {\n\n"
        "// Keeps a note.\n// Send plain text, not JSON.\ntype note = (_: string) => any;\n\n"
        "// Send plain text, not JSON. All of it matches this regular expression:\n// [A-Z]{2}\n"
        "type code = (_: string) => any;\n\n"
        '// Send plain text, not JSON. It follows this Lark grammar:\n// start: a\n// a: "x"\n'
        "type patch = (_: string) => any;\n\n} // namespace functionsassistant"
    )


def test_the_tools_that_may_be_called_change_no_prompt(gpt_oss: Tokenizer) -> None:
    chat = choose(gpt_oss, None, [])
    conversation = Conversation.from_openai(
        [{"role": "user", "content": "q"}], tools=[{"type": "function", "name": name} for name in "fg"]
    )
    one = chat.turn(conversation, tool_choice=AllowedTools(recipients=("functions.g",), required=True))
    assert one.prompt == chat.turn(conversation).prompt
    assert one.grammar is not None
    constraint = one.grammar()
    for token in gpt_oss.encode_with_control("<|channel|>commentary to=functions"):
        constraint.accept(token)
    assert gpt_oss.decode(constraint.forced()) == ".g"


def test_a_history_of_calls_and_their_results_in_any_order(gpt_oss: Tokenizer) -> None:
    """Two calls in a row, answered the other way round; a built-in tool's, on its channel; results of several parts."""

    def result(name: str, channel: Channel, *texts: str) -> Message:
        parts = tuple(Text(text=text) for text in texts)
        return Message(role="tool", name=name, channel=channel, recipient="assistant", parts=parts)

    def call(recipient: str, channel: Channel, text: str) -> Message:
        return Message(role="assistant", recipient=recipient, channel=channel, parts=(Text(text=text),))

    conversation = Conversation(
        messages=(
            text_message("user", "q"),
            call("functions.f", "commentary", "{}"),
            call("functions.g", "commentary", "{}"),
            result("functions.g", "commentary", "one", " two"),
            result("functions.f", "commentary", "three"),
            call("python", "analysis", "1"),
            result("python", "analysis", "1"),
        )
    )
    text = gpt_oss.decode(choose(gpt_oss, None, []).render(conversation).ids, control="show")
    assert text.endswith(
        "<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>"
        "<|start|>assistant to=functions.g<|channel|>commentary<|message|>{}<|call|>"
        "<|start|>functions.g to=assistant<|channel|>commentary<|message|>one two<|end|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>three<|end|>"
        "<|start|>assistant to=python<|channel|>analysis<|message|>1<|call|>"
        "<|start|>python to=assistant<|channel|>analysis<|message|>1<|end|><|start|>assistant"
    )


# --- templates
# --------------------------------------------------------------------------------------------------


def test_a_templates_reply_is_all_answer(small: Tokenizer) -> None:
    chat = choose(small, CHATML, [2])
    events, messages = read(chat, [*small.encode("hello é<|im_end|>"), 2])
    assert joined(events, TextDelta) == "hello é<|im_end|>"
    assert messages == (text_message("assistant", "hello é<|im_end|>"),)


def test_a_templates_reply_ends_in_the_token_that_it_was_stopped_by(small: Tokenizer) -> None:
    for stop_id in (0, 2):
        events, _ = read(choose(small, CHATML, [0, 2]), [*small.encode("hello"), stop_id])
        assert events[-1] == MessageDone(message=text_message("assistant", "hello"), stop_id=stop_id)
    events, _ = read(choose(small, CHATML, [2]), [*small.encode("hello"), 0])
    assert events[-1] == MessageDone(message=text_message("assistant", "hello"), stop_id=None)
    events, _ = read(choose(small, CHATML, small.encode("!")), small.encode("hello!"))
    assert joined(events, TextDelta) == "hello"


def test_a_templates_answer_has_the_form_that_was_asked_for(small: Tokenizer) -> None:
    chat, asked = choose(small, CHATML, [2]), Conversation(messages=(text_message("user", "hello"),))
    turn = chat.turn(asked, response_format=Choice(("yes",)))
    assert turn.grammar is not None and turn.grammar.stop_ids == turn.stop_ids == {2}
    constraint = turn.grammar()
    for token in [*small.encode("yes"), 2]:
        assert constraint.forced()[:1] == [token]
        constraint.accept(token)
    assert constraint.is_finished()
    assert chat.turn(asked).grammar is None
    with pytest.raises(UsageError, match="response_format: nothing keeps the model to it"):
        chat.turn(asked, grammar=False, response_format=JsonObject())
    for choices in ({"tool_choice": "none"}, {"reasoning": "required"}, {"max_reasoning_tokens": 0}):
        with pytest.raises(UnsupportedError, match=f"{next(iter(choices))}: that takes a model that speaks Harmony"):
            chat.turn(asked, response_format=JsonObject(), **choices)


def test_templates_know_no_tools_that_are_sent_text(small: Tokenizer) -> None:
    template = CHATML + "{% if tools %}{{ tools }}{% endif %}{# tool_calls #}"
    tool = Tool(name="f", text_format=FreeText())
    conversation = Conversation(messages=(Message(role="developer", parts=(DeveloperContent(tools=(tool,)),)),))
    with pytest.raises(UnsupportedError, match="tool 'f' takes text"):
        choose(small, template, [2]).render(conversation)


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
