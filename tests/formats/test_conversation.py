"""Conversation values: what they refuse, and how OpenAI's dicts are read."""

from typing import Any

import pytest

from freehold.errors import UnsupportedError, UsageError
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Message,
    ResponseFormat,
    SystemContent,
    Text,
    Tool,
    ToolNamespace,
    text_message,
)
from freehold.formats.forms import Choice, FreeText, Lark, Regex


def test_openai_messages_are_read() -> None:
    conversation = Conversation.from_openai(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "Ann",
            },
            {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None, "annotations": []},
        ]
    )
    system, user, assistant = conversation.messages
    assert system == text_message("system", "Be brief.")
    assert (user.role, user.name, user.text, len(user.parts)) == ("user", "Ann", "ab", 2)
    assert assistant == Message(role="assistant", parts=(Text(text="c"),))
    assert conversation.plus(user).messages == (system, user, assistant, user)


TEXT = {"type": "text", "text": "x"}


def called(changes: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message with one call."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [call | changes]}


def test_calls_and_results_become_messages_of_their_own() -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "index": 1, "function": {"name": "g", "arguments": "{}"}},
    ]
    conversation = Conversation.from_openai(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "reasoning_content": "hm", "content": "Wait.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c2", "content": "two"},
            {"role": "tool", "tool_call_id": "c1", "content": [TEXT], "name": "f"},
            called({"id": "c1", "function": {"name": "h", "arguments": ""}}),
            {"role": "tool", "tool_call_id": "c1", "content": "three"},
            {"role": "assistant", "content": "a", "thinking": "hm", "reasoning": "hm"},
        ]
    )
    assert [(m.role, m.channel, m.recipient, m.name, m.text) for m in conversation.messages] == [
        ("user", None, None, None, "q"),
        ("assistant", "analysis", None, None, "hm"),
        ("assistant", "commentary", None, None, "Wait."),
        ("assistant", "commentary", "functions.f", None, '{"x": 1}'),
        ("assistant", "commentary", "functions.g", None, "{}"),
        ("tool", "commentary", "assistant", "functions.g", "two"),
        ("tool", "commentary", "assistant", "functions.f", "x"),
        ("assistant", "commentary", "functions.h", None, ""),
        ("tool", "commentary", "assistant", "functions.h", "three"),
        ("assistant", "analysis", None, None, "hm"),
        ("assistant", None, None, None, "a"),
    ]
    assert {m.content_type for m in conversation.messages if m.recipient == "functions.f"} == {"<|constrain|>json"}


def test_a_result_may_not_name_another_tool() -> None:
    with pytest.raises(UsageError, match="message 1: call 'c1' went to 'f', not to 'g'"):
        Conversation.from_openai([called({}), {"role": "tool", "tool_call_id": "c1", "content": "", "name": "g"}])


def test_openai_tools_are_offered_after_the_system_prompt() -> None:
    schema = {"type": "object", "properties": {}}
    nested = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}}
    flat = {"type": "function", "name": "g", "description": None, "parameters": None, "strict": None}
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    conversation = Conversation.from_openai(messages, tools=[nested, flat])
    assert [message.role for message in conversation.messages] == ["system", "developer", "user"]
    tools = (Tool(name="f", description="d", parameters=schema, strict=True), Tool(name="g"))
    assert conversation.messages[1].parts == (DeveloperContent(tools=tools),)
    assert Conversation.from_openai(messages, tools=[]) == Conversation.from_openai(messages)
    assert Conversation.from_openai([], tools=[flat]).messages[0].role == "developer"


def custom(grammar: dict[str, Any]) -> dict[str, Any]:
    return {"type": "custom", "name": "f", "format": {"type": "grammar", **grammar}}


def test_custom_tools_and_their_calls_are_text() -> None:
    grammar = {"syntax": "regex", "definition": "a+"}
    chats = {"type": "custom", "custom": {"name": "f", "format": {"type": "grammar", "grammar": grammar}}}
    described = {"type": "custom", "name": "g", "description": "d"}
    call = {"id": "c1", "type": "custom", "custom": {"name": "f", "input": "aa"}}
    conversation = Conversation.from_openai(
        [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "b"}],
        tools=[chats, described, custom({"syntax": "lark", "definition": "start: A"}) | {"name": "h"}],
    )
    offered, called, result = conversation.messages
    assert offered.parts == (
        DeveloperContent(
            tools=(
                Tool(name="f", text_format=Regex("a+")),
                Tool(name="g", description="d", text_format=FreeText()),
                Tool(name="h", text_format=Lark("start: A")),
            )
        ),
    )
    assert (called.recipient, called.content_type, called.text) == ("functions.f", None, "aa")
    assert (result.name, result.text) == ("functions.f", "b")


def test_what_client_libraries_send_back_is_read() -> None:
    """openai's `.parse()`, which keeps what it made of a message; litellm; OpenRouter's clients; cut-off replies."""
    parsed = {"name": "f", "arguments": '{"a":1}', "parsed_arguments": {"a": 1}}
    nothing: dict[str, Any] = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    details = [{"type": "reasoning.text", "text": text, "signature": None, "index": 0} for text in ("h", "m")]
    conversation = Conversation.from_openai(
        [
            {"role": "developer", "content": [TEXT | {"cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": '{"a":1}', "parsed": {"a": 1}, **nothing},
            {"role": "assistant", "content": None, **nothing},
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}]},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": parsed}]},
            {"role": "tool", "content": "x", "tool_call_id": "c", "name": "f"},
            {"role": "tool", "content": [TEXT, TEXT], "tool_call_id": "c"},
            {
                "role": "assistant",
                "content": "a",
                "reasoning": "hm",
                "reasoning_details": details,
                "provider_specific_fields": {"refusal": None, "reasoning_content": "hm"},
            },
        ]
    )
    assert [(m.role, m.channel or m.recipient, m.text) for m in conversation.messages] == [
        ("developer", None, "x"),
        ("assistant", None, '{"a":1}'),
        ("assistant", None, ""),
        ("assistant", None, "No."),
        ("assistant", None, "Never."),
        ("assistant", "commentary", '{"a":1}'),
        ("tool", "commentary", "x"),
        ("tool", "commentary", "xx"),
        ("assistant", "analysis", "hm"),
        ("assistant", None, "a"),
    ]


@pytest.mark.parametrize(
    ("kind", "said", "tool"),
    [
        (UnsupportedError, "tool 1: type 'web_search' is not supported", {"type": "web_search"}),
        (UnsupportedError, "tool 1: format 'json'", {"type": "custom", "name": "f", "format": {"type": "json"}}),
        (UsageError, "tool 1: unknown syntax 'ebnf'", custom({"syntax": "ebnf", "definition": ""})),
        (UsageError, "tool 1: definition must be a string", custom({"syntax": "lark"})),
        (UnsupportedError, "tool 1: field 'x'", custom({"syntax": "lark", "definition": "", "x": 1})),
        (UnsupportedError, "tool 1: field 'parameters'", custom({}) | {"parameters": {"type": "object"}}),
        (UnsupportedError, "tool 1: field 'x'", {"type": "function", "name": "f", "x": 1}),
        (UnsupportedError, "tool 1: field 'name'", {"type": "function", "name": "f", "function": {"name": "f"}}),
        (UsageError, "tool 1: function must be an object", {"type": "function", "function": "f"}),
        (UsageError, "tool 1: name must be a string", {"type": "function", "function": {}}),
        (UsageError, "tool 1: tool name 'a b'", {"type": "function", "name": "a b"}),
        (UsageError, "tool 1: description must be a string", {"name": "f", "description": 5}),
        (UsageError, "tool 1: tool 'f': parameters must be", {"name": "f", "parameters": "{}"}),
        (UsageError, "tool 1: strict is true or false", {"name": "f", "strict": "yes"}),
        (UsageError, "tool 1: expected an object", "f"),
    ],
)
def test_openai_tools_that_cannot_be_honoured_are_refused(kind: type[Exception], said: str, tool: Any) -> None:
    with pytest.raises(kind, match=said):
        Conversation.from_openai([], tools=[{"type": "function", "name": "first"}, tool])


def harmony(role: str, part: Any) -> dict[str, Any]:
    return {"role": role, "content": [part]}


SYSTEM = {"type": "system_content", "model_identity": "I"}
DEVELOPER = {"type": "developer_content"}


def test_openai_harmonys_dicts_are_read() -> None:
    """Valid ones by the hundred in test_harmony_render.py."""
    namespace = {"name": "functions", "description": None, "tools": [{"name": "f", "description": ""}]}
    conversation = Conversation.from_harmony(
        {
            "messages": [
                harmony("system", SYSTEM | {"reasoning_effort": "High"}),
                harmony("developer", DEVELOPER | {"tools": {"functions": namespace}}),
                {
                    "role": "tool",
                    "name": "functions.f",
                    "content": "x",
                    "channel": "commentary",
                    "recipient": "assistant",
                },
            ]
        }
    )
    nothing = SystemContent(identity="I", knowledge_cutoff=None, effort="high", channels=())
    assert [message.parts[0] for message in conversation.messages] == [
        nothing,
        DeveloperContent(tools=(Tool(name="f"),)),
        Text(text="x"),
    ]


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        (UsageError, "message 0: unknown role ''", {"content": "x"}),
        (UsageError, "message 0: parts must be a list", {"role": "user"}),
        (UsageError, "message 0: a tool message needs", {"role": "tool", "content": "x"}),
        (UsageError, "message 0: content type must be a string", {"role": "user", "content": "", "content_type": 5}),
        (UnsupportedError, "message 0: field 'x'", {"role": "user", "content": "", "x": 1}),
        (UnsupportedError, "message 0: part 0: type 'image'", harmony("user", {"type": "image"})),
        (UsageError, "message 0: system content belongs", harmony("user", SYSTEM)),
        (UnsupportedError, "message 0: part 0: field 'x'", harmony("system", SYSTEM | {"x": 1})),
        (UsageError, "message 0: part 0: unknown reasoning", harmony("system", SYSTEM | {"reasoning_effort": "Max"})),
        (UsageError, "message 0: part 0: unknown reasoning", harmony("system", SYSTEM | {"reasoning_effort": 5})),
        (UsageError, "message 0: part 0: valid_channels", harmony("system", SYSTEM | {"channel_config": {}})),
        (
            UnsupportedError,
            "message 0: part 0: channels that may be left out",
            harmony("system", SYSTEM | {"channel_config": {"valid_channels": ["final"], "channel_required": False}}),
        ),
        (
            UsageError,
            "message 0: part 0: tool namespace 0: tools must be a list",
            harmony("system", SYSTEM | {"tools": {"n": {"name": "n"}}}),
        ),
        (
            UnsupportedError,
            "message 0: part 0: namespace 'n': a developer offers",
            harmony("developer", DEVELOPER | {"tools": {"n": {"name": "n", "tools": []}}}),
        ),
        (UnsupportedError, "message 0: part 0: field 'x'", harmony("developer", DEVELOPER | {"x": 1})),
    ],
)
def test_openai_harmonys_dicts_that_cannot_be_honoured_are_refused(
    kind: type[Exception], said: str, message: Any
) -> None:
    with pytest.raises(kind, match=said):
        Conversation.from_harmony([message])
    with pytest.raises(UnsupportedError, match="field 'x'"):
        Conversation.from_harmony({"messages": [], "x": 1})


@pytest.mark.parametrize(
    ("kind", "said", "second"),
    [
        (UsageError, "message 1: unknown role 'robot'", {"role": "robot", "content": "x"}),
        (UsageError, "message 1: unknown role None", {"content": "x"}),
        (UsageError, "message 1: unknown role", {"role": ["user"], "content": "x"}),
        (UsageError, "message 1: content must be .* NoneType", {"role": "assistant"}),
        (UsageError, "message 1: content must be .* int", {"role": "user", "content": 5}),
        (UsageError, "message 1: part 0: expected an object", {"role": "user", "content": ["x"]}),
        (UsageError, "message 1: part 0: .* NoneType", {"role": "user", "content": [{"type": "text"}]}),
        (UsageError, "message 1: user name 'to=x y'", {"role": "user", "content": "x", "name": "to=x y"}),
        (UsageError, "message 1: expected an object", "hello"),
        (
            UnsupportedError,
            "message 1: part 0: .*'image_url'",
            {"role": "user", "content": [{"type": "image_url"}]},
        ),
        (UnsupportedError, "message 1: field 'tool_calls'", {"role": "user", "content": "", "tool_calls": [{}]}),
        (UnsupportedError, "message 1: field 'audio'", {"role": "assistant", "content": "", "audio": {"id": "1"}}),
        (UnsupportedError, "message 1: part 0: field 'x'", {"role": "user", "content": [TEXT | {"x": 1}]}),
        (
            UsageError,
            "message 1: tool_call_id '1' is that of no call",
            {"role": "tool", "content": "x", "tool_call_id": "1"},
        ),
        (UsageError, "message 1: tool_call_id must be a string", {"role": "tool", "content": "x"}),
        (UsageError, "message 1: the fields .* different", {"role": "assistant", "reasoning": "a", "thinking": "b"}),
        (UsageError, "message 1: .*a string, got int", {"role": "assistant", "content": "", "reasoning": 5}),
        (UsageError, "message 1: tool calls must be a list", {"role": "assistant", "tool_calls": "f"}),
        (UsageError, "message 1: tool call 0: expected an object", {"role": "assistant", "tool_calls": ["f"]}),
        (UsageError, "message 1: tool call 0: function must be", {"role": "assistant", "tool_calls": [{"id": "1"}]}),
        (UnsupportedError, "message 1: tool call 0: type 'mcp'", called({"type": "mcp"})),
        (UnsupportedError, "message 1: tool call 0: field 'function'", called({"type": "custom"})),
        (
            UsageError,
            "message 1: tool call 0: input must be",
            {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "f"}}]},
        ),
        (
            UsageError,
            "message 1: the fields .* different",
            {
                "role": "assistant",
                "reasoning": "a",
                "reasoning_details": [{"type": "reasoning.text", "text": "b"}],
            },
        ),
        (
            UnsupportedError,
            "message 1: reasoning detail 0: type 'reasoning.encrypted'",
            {"role": "assistant", "content": "", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        ),
        (UsageError, "message 1: parsed is there", {"role": "assistant", "content": None, "parsed": {"a": 1}}),
        (
            UnsupportedError,
            "message 1: provider_specific_fields: field 'citations'",
            {"role": "assistant", "content": "x", "provider_specific_fields": {"citations": ["y"]}},
        ),
        (
            UnsupportedError,
            "message 1: part 0: cache_control .*1h",
            {"role": "user", "content": [TEXT | {"cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
        ),
        (
            UnsupportedError,
            "message 1: part 0: type 'refusal'",
            {"role": "user", "content": [{"type": "refusal", "refusal": "no"}]},
        ),
        (UnsupportedError, "message 1: tool call 0: field 'x'", called({"x": 1})),
        (UsageError, "message 1: tool call 0: id must be a string", called({"id": 7})),
        (UsageError, "message 1: tool call 0: arguments must be", called({"function": {"name": "f", "arguments": {}}})),
        (UsageError, "message 1: tool call 0: recipient name", called({"function": {"name": "a b", "arguments": ""}})),
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
        ("must be a string, got int", Text, {"text": 5}),
        ("description must be a string", Tool, {"name": "f", "description": 5}),
        ("description must be a string", ToolNamespace, {"name": "n", "description": None}),
        ("description must be a string", ResponseFormat, {"name": "r", "schema": {}, "description": 5}),
        ("content type must be a string", Message, {"role": "user", "parts": (), "content_type": 5}),
        ("unknown reasoning effort 'max'", SystemContent, {"effort": "max"}),
        ("unknown channel 'secret'", SystemContent, {"channels": ("secret",)}),
        ("identity must be some text", SystemContent, {"identity": " "}),
        ("knowledge cutoff must be", SystemContent, {"knowledge_cutoff": ""}),
        ("date 'yesterday'", SystemContent, {"date": "yesterday"}),
        ("built-in tool name ''", ToolNamespace, {"name": ""}),
        ("tool name ''", Tool, {"name": ""}),
        ("must be a JSON schema", Tool, {"name": "f", "parameters": []}),
        ("text_format must be", Tool, {"name": "f", "text_format": "a+"}),
        ("takes plain text", Tool, {"name": "f", "text_format": FreeText(), "parameters": {}}),
        ("takes plain text", Tool, {"name": "f", "text_format": FreeText(), "strict": True}),
        ("a choice is a tuple", Choice, {"values": ()}),
        ("a choice is a tuple", Choice, {"values": ["a"]}),
        ("some text, got ''", Choice, {"values": ("a", "")}),
        ("tool 'f' is given 2 times", DeveloperContent, {"tools": (Tool(name="f"), Tool(name="f"))}),
        ("instructions must be a string", DeveloperContent, {"instructions": 5}),
        ("message 0 is a str", Conversation, {"messages": ("hello",)}),
    ],
)
def test_wrong_values_are_named(said: str, kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=said.replace("|", r"\|")):
        kind(**fields)
