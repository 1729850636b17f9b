"""Conversation values: what they refuse, and how OpenAI's dicts are read."""

from typing import Any

import pytest

from freehold.errors import UnsupportedError, UsageError
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Message,
    SystemContent,
    Text,
    Tool,
    ToolNamespace,
    text_message,
)


def test_openai_messages_are_read() -> None:
    conversation = Conversation.from_openai(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "Ann",
            },
            {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None},
        ]
    )
    system, user, assistant = conversation.messages
    assert system == text_message("system", "Be brief.")
    assert (user.role, user.name, user.text, len(user.parts)) == ("user", "Ann", "ab", 2)
    assert assistant == Message(role="assistant", parts=(Text(text="c"),))
    assert conversation.plus(user).messages == (system, user, assistant, user)


@pytest.mark.parametrize(
    ("kind", "said", "second"),
    [
        (UsageError, "message 1: unknown role 'robot'", {"role": "robot", "content": "x"}),
        (UsageError, "message 1: unknown role None", {"content": "x"}),
        (UsageError, "message 1: unknown role", {"role": ["user"], "content": "x"}),
        (UsageError, "message 1: content must be .* NoneType", {"role": "assistant"}),
        (UsageError, "message 1: content must be .* int", {"role": "user", "content": 5}),
        (UsageError, "message 1, part 0: expected an object", {"role": "user", "content": ["x"]}),
        (UsageError, "message 1, part 0: .* NoneType", {"role": "user", "content": [{"type": "text"}]}),
        (UsageError, "message 1: user name 'to=x y'", {"role": "user", "content": "x", "name": "to=x y"}),
        (UsageError, "message 1: expected an object", "hello"),
        (
            UnsupportedError,
            "message 1, part 0: .*'image_url'",
            {"role": "user", "content": [{"type": "image_url"}]},
        ),
        (
            UnsupportedError,
            "message 1: field 'tool_calls'",
            {"role": "assistant", "content": "", "tool_calls": []},
        ),
        (UnsupportedError, "message 1: tool results", {"role": "tool", "content": "x", "tool_call_id": "1"}),
    ],
)
def test_openai_messages_that_cannot_be_honoured_are_refused_by_index(
    kind: type[Exception], said: str, second: Any
) -> None:
    with pytest.raises(kind, match=said):
        Conversation.from_openai([{"role": "user", "content": "x"}, second])


@pytest.mark.parametrize("messages", ["hello", {"role": "user", "content": "x"}, 5, None])
def test_messages_must_be_a_list(messages: Any) -> None:
    with pytest.raises(UsageError, match="must be a list"):
        Conversation.from_openai(messages)


@pytest.mark.parametrize(
    ("said", "kind", "fields"),
    [
        ("unknown role 'robot'", Message, {"role": "robot", "parts": ()}),
        ("unknown channel 'secret'", Message, {"role": "assistant", "parts": (), "channel": "secret"}),
        ("recipient name ''", Message, {"role": "assistant", "parts": (), "recipient": ""}),
        ("recipient name 'a<|end|>'", Message, {"role": "assistant", "parts": (), "recipient": "a<|end|>"}),
        ("content type 'a b'", Message, {"role": "assistant", "parts": (), "content_type": "a b"}),
        ("needs the tool's name", Message, {"role": "tool", "parts": ()}),
        ("parts are a tuple", Message, {"role": "user", "parts": "text"}),
        ("cannot hold 'text'", Message, {"role": "user", "parts": ("text",)}),
        ("system content belongs", Message, {"role": "user", "parts": (SystemContent(),)}),
        ("developer content belongs", Message, {"role": "system", "parts": (DeveloperContent(),)}),
        ("holds a string, got int", Text, {"text": 5}),
        ("unknown reasoning effort 'max'", SystemContent, {"effort": "max"}),
        ("unknown channel 'secret'", SystemContent, {"channels": ("secret",)}),
        ("identity must be some text", SystemContent, {"identity": " "}),
        ("knowledge cutoff must be", SystemContent, {"knowledge_cutoff": ""}),
        ("date 'yesterday'", SystemContent, {"date": "yesterday"}),
        ("built-in tool name ''", ToolNamespace, {"name": ""}),
        ("tool name ''", Tool, {"name": ""}),
        ("must be a JSON schema", Tool, {"name": "f", "parameters": []}),
        ("tool 'f' is given 2 times", DeveloperContent, {"tools": (Tool(name="f"), Tool(name="f"))}),
        ("instructions must be a string", DeveloperContent, {"instructions": 5}),
        ("message 0 is a str", Conversation, {"messages": ("hello",)}),
    ],
)
def test_wrong_values_are_named(said: str, kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=said.replace("|", r"\|")):
        kind(**fields)
