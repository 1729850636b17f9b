"""openai-harmony as the oracle: conversations as its own values, and conversations made up at random."""

from random import Random
from typing import Any

from freehold.formats.conversation import (
    CHANNELS,
    EFFORTS,
    Channel,
    Conversation,
    DeveloperContent,
    Message,
    Part,
    Role,
    SystemContent,
    Text,
    Tool,
    ToolNamespace,
)
from freehold.formats.harmony.builtins import BROWSER, PYTHON
from freehold.formats.harmony.vocabulary import CONTROL_TOKENS


def theirs(conversation: Conversation) -> Any:
    """The same conversation as openai-harmony's own values."""
    import openai_harmony as oh

    def namespace(name: str, description: str, tools: tuple[Tool, ...]) -> Any:
        described = [
            oh.ToolDescription(name=tool.name, description=tool.description, parameters=tool.parameters)
            for tool in tools
        ]
        return oh.ToolNamespaceConfig(name=name, description=description or None, tools=described)

    def content(part: Part) -> Any:
        match part:
            case Text(text=text):
                return oh.TextContent(text=text)
            case SystemContent():
                return oh.SystemContent(
                    model_identity=part.identity,
                    knowledge_cutoff=part.knowledge_cutoff,
                    conversation_start_date=part.date,
                    reasoning_effort=oh.ReasoningEffort(part.effort.capitalize()) if part.effort else None,
                    channel_config=oh.ChannelConfig.require_channels(list(part.channels)) if part.channels else None,
                    tools={space.name: namespace(space.name, space.description, space.tools) for space in part.tools}
                    or None,
                )
            case DeveloperContent():
                return oh.DeveloperContent(
                    instructions=part.instructions,
                    tools={"functions": namespace("functions", "", part.tools)} if part.tools else None,
                )

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


# --- made up at random --------------------------------------------------------------------------------------

_PIECES = (
    *("the", " weather", " in Rome", " null", "é", "😀", " ", "  ", "\n", "\n\n", "\r\n", "\t", '"', "\\", "// ", "0"),
    *("}", "{", "<|", "|>", " to=", "assistant", "\u2028", "\x0b", "\r", "\ufffd", "名", "' s", "DON'T", "12345"),
    *CONTROL_TOKENS,
    "<|endoftext|>",
)
_NAMES = ("get_weather", "f", "a.b", "x-1", "Ann", "_", "browser.search", "functions.f", "python", "all", "assistant")
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -7,
    2**53,
    0.5,
    -1e-05,
    1e16,
    2.5e-7,
    "text",
    "",
    [],
    {},
    [1, {"a": ["é\n"]}],
    {"b": None},
)


def random_text(rng: Random) -> str:
    return "".join(rng.choices(_PIECES, k=rng.randrange(6)))


def random_schema(rng: Random, depth: int = 3) -> Any:
    """A schema in the terms that openai-harmony knows, among keywords that it passes over."""
    schema: dict[str, Any] = {}
    kinds = ["string", "enum", "number", "integer", "boolean", "several", "any", "foreign"]
    match rng.choice(kinds + (["object"] * 4 + ["array", "oneOf"] * 2 if depth else [])):
        case "object":
            schema["type"] = "object"
            names = rng.sample(["city", "when?", "a b", "<|call|>", "$ref", "名", "x", "type"], k=rng.randrange(4))
            if names or maybe(rng):
                schema["properties"] = {name: random_schema(rng, depth - 1) for name in names}
            if maybe(rng):
                schema["required"] = [name for name in names if maybe(rng)]
            if maybe(rng):
                schema["additionalProperties"] = rng.choice([True, False, {}])
        case "array":
            schema["type"] = "array"
            if maybe(rng):
                schema["items"] = random_schema(rng, depth - 1)
        case "oneOf":
            schema["oneOf"] = [random_schema(rng, depth - 1) for _ in range(rng.randrange(4))]
        case "enum":
            schema |= {"type": "string", "enum": rng.choice([["a"], ["a", "b b"], ["x", 1, None], [1], []])}
        case "several":
            schema["type"] = rng.sample(["string", "integer", "null", "object", "array"], k=rng.randrange(4))
        case "foreign":
            schema["type"] = rng.choice(["file", "String", ""])
        case "any":
            return schema if maybe(rng) else True
        case kind:
            schema["type"] = kind
    for key in ("title", "description"):
        if maybe(rng):
            schema[key] = rng.choice(["the", "One\ntwo", "or null", "", random_text(rng)])
    if maybe(rng):
        schema["default"] = "a" if "enum" in schema else rng.choice(_VALUES)
    if maybe(rng):
        schema["nullable"] = rng.choice([True, False, "yes"])
    if maybe(rng) and depth < 3:
        schema["examples"] = rng.choice([["hello", "two words"], [1, "x"], [2], [], "x"])
    if maybe(rng):
        schema |= {"minimum": 1, "format": "date", "$defs": {"x": {"type": "null"}}, "pattern": "^x$"}
    keys = list(schema)
    rng.shuffle(keys)
    return {key: schema[key] for key in keys}


def random_tool(rng: Random, name: str) -> Tool:
    schema = random_schema(rng) if rng.random() < 0.8 else None
    return Tool(name=name, description=random_text(rng), parameters=schema if isinstance(schema, dict) else None)


def random_system(rng: Random) -> SystemContent:
    other = ToolNamespace(name="a.tool", description=random_text(rng), tools=(random_tool(rng, "f"),))
    bare = ToolNamespace(name="shell", description=random_text(rng))
    return SystemContent(
        identity=rng.choice([None, "You are Ann.", " \n<|end|>", SystemContent().identity]),
        knowledge_cutoff=rng.choice([None, "2024-06", "<|start|>"]),
        date=rng.choice([None, "2025-08-05"]),
        effort=rng.choice([None, *EFFORTS]),
        channels=rng.choice([CHANNELS, CHANNELS, ("final",), ()]),
        tools=tuple(rng.sample((BROWSER, PYTHON, other, bare), k=rng.choice([0, 0, 1, 2]))),
    )


def random_conversation(rng: Random) -> Conversation:
    """Mostly like real ones: system, developer, turns of reasoning, calls and answers; some messages at random."""
    messages: list[Message] = []
    if rng.random() < 0.6:
        messages.append(Message(role="system", parts=(random_system(rng),)))
    if rng.random() < 0.6:
        tools = tuple(random_tool(rng, name) for name in _NAMES if rng.random() < 0.15)
        instructions = random_text(rng) if maybe(rng) else None
        messages.append(Message(role="developer", parts=(DeveloperContent(instructions=instructions, tools=tools),)))
    for _ in range(rng.randrange(4)):
        messages += _random_turn(rng)
    if rng.random() < 0.2:
        messages.insert(rng.randrange(len(messages) + 1), _random_message(rng))
    return Conversation(messages=tuple(messages))


def _random_turn(rng: Random) -> list[Message]:
    turn = [Message(role="user", parts=_body(rng), name=rng.choice([None, None, "Ann"]))]
    for _ in range(rng.randrange(3)):
        if maybe(rng):
            turn.append(Message(role="assistant", parts=_body(rng), channel="analysis"))
        if rng.random() < 0.2:
            turn.append(Message(role="assistant", parts=_body(rng), channel="commentary"))
        channel: Channel = rng.choice(["commentary", "analysis"])
        content_type = rng.choice(["<|constrain|>json", "code", None])
        name = rng.choice(_NAMES)
        turn.append(
            Message(role="assistant", parts=_body(rng), channel=channel, recipient=name, content_type=content_type)
        )
        turn.append(Message(role="tool", name=name, parts=_body(rng), channel=channel, recipient="assistant"))
    if maybe(rng):
        turn.append(Message(role="assistant", parts=_body(rng), channel="analysis"))
    if rng.random() < 0.7:
        turn.append(Message(role="assistant", parts=_body(rng), channel="final"))
    return turn


def _random_message(rng: Random) -> Message:
    role: Role = rng.choice(["system", "developer", "user", "assistant", "tool"])
    return Message(
        role=role,
        parts=_body(rng) * rng.randrange(3),
        channel=rng.choice([None, "analysis", "commentary", "final" if role == "assistant" else None]),
        recipient=rng.choice([None, *_NAMES]),
        content_type=rng.choice([None, "json", "<|constrain|>json", "<|constrain|> json", "text/plain"]),
        name=rng.choice(_NAMES) if role == "tool" or maybe(rng) else None,
    )


def _body(rng: Random) -> tuple[Part, ...]:
    return (Text(text=random_text(rng)),)


def maybe(rng: Random) -> bool:
    return rng.random() < 0.5
