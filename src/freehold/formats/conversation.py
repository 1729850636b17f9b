"""What a chat is made of: roles, channels, messages and their parts, wide enough to hold Harmony fully.

Plain frozen values, checked when made (UsageError). They know neither tokens nor templates: `chat.py` turns
them into token ids, and replies back into messages. `Conversation.from_openai` reads the dicts of OpenAI's
chat API, `Conversation.from_harmony` those of the openai-harmony library; both refuse (UnsupportedError) what
Freehold does not do, rather than ignore it.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import chain
from typing import Any, Literal, TypeVar, get_args

from freehold.errors import UnsupportedError, UsageError
from freehold.formats.forms import FreeText, Lark, Regex, TextFormat

Role = Literal["system", "developer", "user", "assistant", "tool"]
Channel = Literal["analysis", "commentary", "final"]
Effort = Literal["low", "medium", "high"]
_T = TypeVar("_T")

ROLES: tuple[Role, ...] = get_args(Role)
CHANNELS: tuple[Channel, ...] = get_args(Channel)
EFFORTS: tuple[Effort, ...] = get_args(Effort)

# Names stand inside message headers: nothing that could pass for more header (spaces, `=`, `<|`) may be in one.
_NAME = re.compile(r"[\w.\-]+", re.ASCII)
_CONTENT_TYPE = re.compile(r"(<\|constrain\|> ?)?[\w.\-/+]+", re.ASCII)


# --- parts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Plain text; the only part that users, assistants and tools write."""

    text: str

    def __post_init__(self) -> None:
        _check_string("a part's text", self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema, None where it takes none.

    The arguments of a `strict` one always match its schema. One with a `text_format` is sent plain text of that form
    instead of JSON.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    text_format: TextFormat | None = None

    def __post_init__(self) -> None:
        _check_name("tool", self.name)
        _check_string(f"tool {self.name!r}: description", self.description)
        if self.parameters is not None and not isinstance(self.parameters, Mapping):
            raise UsageError(f"tool {self.name!r}: parameters must be a JSON schema object, got {self.parameters!r}")
        if not isinstance(self.text_format, TextFormat | None):
            raise UsageError(
                f"tool {self.name!r}: text_format must be FreeText(), Regex(...) or Lark(...), got "
                f"{self.text_format!r:.80}"
            )
        if self.text_format is not None and (self.parameters is not None or self.strict):
            raise UsageError(f"tool {self.name!r} takes plain text; parameters and strict are for JSON arguments")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolNamespace:
    """Built-in tools that the model was trained on: calls go to `name.tool`, or to `name` where it has none inside."""

    name: str
    description: str = ""
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        _check_name("built-in tool", self.name)
        _check_string(f"built-in tool {self.name!r}: description", self.description)
        _check_distinct("tool", [tool.name for tool in self.tools])


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """The form that the final answer is to have, as a JSON schema."""

    name: str
    schema: Mapping[str, Any]
    description: str = ""

    def __post_init__(self) -> None:
        _check_name("response format", self.name)
        _check_string(f"response format {self.name!r}: description", self.description)
        if not isinstance(self.schema, Mapping):
            raise UsageError(f"response format {self.name!r}: expected a JSON schema object, got {self.schema!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemContent:
    """Harmony's system message: who the model is, the day, how hard to think. None leaves a line out."""

    identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    date: str | None = None
    effort: Effort | None = "medium"
    channels: tuple[Channel, ...] = CHANNELS
    tools: tuple[ToolNamespace, ...] = ()

    def __post_init__(self) -> None:
        _check_filled("identity", self.identity)
        _check_filled("knowledge cutoff", self.knowledge_cutoff)
        if self.date is not None:
            _check_date(self.date)
        if self.effort is not None:
            _check_known("reasoning effort", self.effort, EFFORTS)
        for channel in self.channels:
            _check_known("channel", channel, CHANNELS)
        _check_distinct("built-in tool", [namespace.name for namespace in self.tools])

    @classmethod
    def today(cls, effort: Effort | None = None) -> "SystemContent":
        """That of a conversation that begins now, with the usual effort where none is given."""
        day = datetime.now().astimezone().date().isoformat()
        return cls(date=day) if effort is None else cls(date=day, effort=effort)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeveloperContent:
    """Harmony's developer message: instructions (elsewhere called the system prompt), function tools, answer forms."""

    instructions: str | None = None
    tools: tuple[Tool, ...] = ()
    response_formats: tuple[ResponseFormat, ...] = ()

    def __post_init__(self) -> None:
        if self.instructions is not None:
            _check_string("instructions", self.instructions)
        _check_distinct("tool", [tool.name for tool in self.tools])
        _check_distinct("response format", [form.name for form in self.response_formats])


Part = Text | SystemContent | DeveloperContent


# --- messages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message. `name` is the tool's where the role is "tool", else an optional name of the author."""

    role: Role
    parts: tuple[Part, ...]
    channel: Channel | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        _check_known("role", self.role, ROLES)
        if not isinstance(self.parts, tuple):
            raise UsageError(f"a message's parts are a tuple, got {type(self.parts).__name__}")
        for part in self.parts:
            self._check_part(part)
        if self.channel is not None:
            _check_known("channel", self.channel, CHANNELS)
        if self.recipient is not None:
            _check_name("recipient", self.recipient)
        if self.content_type is not None:
            _check_string("content type", self.content_type)
            if not _CONTENT_TYPE.fullmatch(self.content_type):
                raise UsageError(f"content type {self.content_type!r} is not one; give something like 'json'")
        if self.name is not None:
            _check_name(self.role, self.name)
        elif self.role == "tool":
            raise UsageError("a tool message needs the tool's name")

    def _check_part(self, part: Part) -> None:
        if not isinstance(part, Part):
            raise UsageError(f"a {self.role} message cannot hold {part!r}; give Text(text=...)")
        if isinstance(part, SystemContent) and self.role != "system":
            raise UsageError(f"system content belongs in a system message, not in one of role {self.role!r}")
        if isinstance(part, DeveloperContent) and self.role != "developer":
            raise UsageError(f"developer content belongs in a developer message, not in one of role {self.role!r}")

    @property
    def text(self) -> str:
        """All text parts in a row."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


def text_message(role: Role, text: str, *, channel: Channel | None = None) -> Message:
    """The usual message: one text part."""
    return Message(role=role, parts=(Text(text=text),), channel=channel)


def is_name(text: str) -> bool:
    """Whether `text` can stand as a name or recipient in a message's header."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in order."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        for index, message in enumerate(self.messages):
            if not isinstance(message, Message):
                raise UsageError(f"message {index} is a {type(message).__name__}, not a Message")

    @classmethod
    def from_openai(
        cls, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> "Conversation":
        """Read `messages` and `tools` of OpenAI's chat API; text only.

        Reasoning (`reasoning_content`, `reasoning`, `thinking`, the text of `reasoning_details`), content and each tool
        call become messages of their own. The tools, functions and custom ones, also in the Responses API's flat form,
        are offered after the leading system messages. Of several calls of one id the latest is the one that a result
        answers. What client libraries add to the messages that they send back is taken where it says nothing new.
        """
        result = chain.from_iterable(openai_messages(messages))
        return cls(messages=tuple(result)).offering(openai_tools(tools or ()))

    @classmethod
    def from_harmony(cls, conversation: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> "Conversation":
        """Read what openai-harmony's `Conversation.to_dict` writes, or the list of its messages."""
        if isinstance(conversation, Mapping):
            _check_fields(conversation, ("messages",))
            conversation = conversation.get("messages", ())
        return cls(messages=tuple(_each(conversation, "message", _harmony_message)))

    def offering(self, tools: tuple[Tool, ...]) -> "Conversation":
        """This conversation with more functions to call, described after its leading instructions."""
        if not tools:
            return self
        said = self.messages
        place = next((i for i, message in enumerate(said) if message.role not in ("system", "developer")), len(said))
        offer = Message(role="developer", parts=(DeveloperContent(tools=tools),))
        return Conversation(messages=(*said[:place], offer, *said[place:]))

    def plus(self, *messages: Message) -> "Conversation":
        """This conversation with more messages at its end."""
        return Conversation(messages=(*self.messages, *messages))


# --- OpenAI's chat dicts ------------------------------------------------------------------------------------


def openai_messages(messages: Sequence[Mapping[str, Any]]) -> list[list[Message]]:
    """What each of the chat API's messages becomes; `Conversation.from_openai` says how."""
    return _each(messages, "message", _OpenAIReader().messages)


def openai_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """The chat API's tools."""
    return tuple(_each(tools, "tool", _openai_tool))


_REASONING = ("reasoning_content", "reasoning", "thinking")
_OF_LIBRARIES = ("parsed", "provider_specific_fields", "reasoning_details")
"""What openai's `.parse()`, litellm and OpenRouter's clients leave in an assistant's message."""


class _OpenAIReader:
    """Reads messages in order: a tool's result names only the id of the call that it answers."""

    def __init__(self) -> None:
        self._callees: dict[str, str] = {}

    def messages(self, raw: Mapping[str, Any]) -> list[Message]:
        role: Any = raw.get("role")
        match role:
            case "assistant":
                return self._assistant(raw)
            case "tool":
                return [self._result(raw)]
        _check_known("role", role, ROLES)
        _check_fields(raw, ("role", "content", "name"))
        return [Message(role=role, parts=_text_parts(raw.get("content")), name=raw.get("name"))]

    def _assistant(self, raw: Mapping[str, Any]) -> list[Message]:
        _check_fields(raw, ("role", "content", "refusal", "name", "tool_calls", *_REASONING, *_OF_LIBRARIES))
        name, calls = raw.get("name"), raw.get("tool_calls") if raw.get("tool_calls") is not None else ()
        thoughts = [thought for field in _REASONING if (thought := raw.get(field))]
        if details := _reasoning_details(raw.get("reasoning_details") or ()):
            thoughts.append(details)
        if any(thought != thoughts[0] for thought in thoughts):
            raise UsageError(
                f"the fields {', '.join(_REASONING)} and reasoning_details say different things; give one of them"
            )
        _check_says_nothing_new(raw)
        content = _answer_parts(raw, may_be_missing=bool(calls or thoughts))
        said = []
        if thoughts:
            said.append(Message(role="assistant", parts=(Text(text=thoughts[0]),), channel="analysis", name=name))
        if any(part.text for part in content) or not (calls or thoughts):
            channel: Channel | None = "commentary" if calls else None  # text before calls is a preamble
            said.append(Message(role="assistant", parts=content, channel=channel, name=name))
        return said + _each(calls, "tool call", lambda call: self._call(call, author=name))

    def _call(self, raw: Mapping[str, Any], *, author: str | None) -> Message:
        kind = "custom" if raw.get("type") == "custom" else "function"
        _check_fields(raw, ("id", "type", kind, "index"))
        function, field = _function(raw, kind), "input" if kind == "custom" else "arguments"
        _check_fields(function, ("name", field) if kind == "custom" else ("name", field, "parsed_arguments"))
        callee, arguments = _string(function, "name"), _string(function, field)
        if not callee:
            raise UsageError("field 'name' is empty; give the name of the tool that was called")
        if raw.get("id") is not None:
            self._callees[_string(raw, "id")] = callee
        return Message(
            role="assistant",
            parts=(Text(text=arguments),),
            channel="commentary",
            recipient=f"functions.{callee}",
            content_type=None if kind == "custom" else "<|constrain|>json",
            name=author,
        )

    def _result(self, raw: Mapping[str, Any]) -> Message:
        _check_fields(raw, ("role", "content", "name", "tool_call_id"))
        id_ = _string(raw, "tool_call_id")
        if id_ not in self._callees:
            raise UsageError(f"tool_call_id {id_!r} is that of no call before it")
        callee = self._callees[id_]
        if raw.get("name") not in (None, callee):
            raise UsageError(f"call {id_!r} went to {callee!r}, not to {raw['name']!r}")
        return Message(
            role="tool",
            parts=_text_parts(raw.get("content")),
            channel="commentary",
            recipient="assistant",
            name=f"functions.{callee}",
        )


def _reasoning_details(raws: Any) -> str:
    """The reasoning in OpenRouter's words. What is encrypted, or a summary, is none that can be given to a model."""

    def text(raw: Mapping[str, Any]) -> str:
        if _string(raw, "type") != "reasoning.text":
            raise UnsupportedError(f"type {raw['type']!r} is not supported; reasoning.text is")
        _check_fields(raw, ("type", "text", "signature", "id", "format", "index"))
        return _string(raw, "text", missing="")

    return "".join(_each(raws, "reasoning detail", text))


def _check_says_nothing_new(raw: Mapping[str, Any]) -> None:
    """`parsed` is what a library made of the content, and need not be read; a copy of fields is to be one."""
    if raw.get("parsed") is not None and not raw.get("content"):
        raise UsageError("parsed is there, but not the content that it was made of; give that")
    if raw.get("provider_specific_fields") is not None:
        for key, value in _mapping(raw, "provider_specific_fields").items():
            if value not in (None, [], {}, *(raw.get(field) for field in (key, *_REASONING))):
                raise UnsupportedError(f"provider_specific_fields: field {key!r} is not supported; leave it out")


def _answer_parts(raw: Mapping[str, Any], *, may_be_missing: bool) -> tuple[Text, ...]:
    """What an assistant's message says to the user. An explicit null is an empty answer, as of a reply that was cut off
    while it was reasoning; a refusal is an answer as well."""
    refusal = () if raw.get("refusal") is None else (Text(text=_string(raw, "refusal")),)
    if raw.get("content") is None and (may_be_missing or refusal or "content" in raw):
        return refusal or (Text(text=""),)
    return (*_text_parts(raw.get("content"), read=_answer_part), *refusal)


def _text_parts(content: Any, *, read: Callable[[Mapping[str, Any]], Text] | None = None) -> tuple[Text, ...]:
    if isinstance(content, str):
        return (Text(text=content),)
    if not isinstance(content, list | tuple):
        raise UsageError(f"content must be a string or a list of parts, got {type(content).__name__}")
    return tuple(_each(content, "part", read or _text_part))


def _text_part(raw: Mapping[str, Any]) -> Text:
    if _string(raw, "type") != "text":
        raise UnsupportedError(f"type {raw['type']!r} is not supported; gpt-oss reads text only")
    _check_fields(raw, ("type", "text", "cache_control"))
    # It asks for what happens anyway: that a later prompt which begins alike is not computed anew.
    if raw.get("cache_control") not in (None, {"type": "ephemeral"}):
        raise UnsupportedError(f"cache_control {raw['cache_control']!r:.80} is not supported; leave it out")
    return Text(text=_string(raw, "text"))


def _answer_part(raw: Mapping[str, Any]) -> Text:
    if raw.get("type") != "refusal":
        return _text_part(raw)
    _check_fields(raw, ("type", "refusal"))
    return Text(text=_string(raw, "refusal"))


def _openai_tool(raw: Mapping[str, Any]) -> Tool:
    """In the form of the chat API, or of the Responses API, which has the function's fields beside its type."""
    kind = "custom" if raw.get("type") == "custom" else "function"
    if kind not in raw:
        raw = {"type": raw.get("type"), kind: {key: value for key, value in raw.items() if key != "type"}}
    _check_fields(raw, ("type", kind))
    return (_custom_tool if kind == "custom" else _tool)(_function(raw, kind))


def _function(raw: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    if raw.get("type") not in (None, kind):
        raise UnsupportedError(f"type {raw['type']!r} is not supported; functions and custom tools are")
    return _mapping(raw, kind)


def _custom_tool(raw: Mapping[str, Any]) -> Tool:
    _check_fields(raw, ("name", "description", "format"))
    return Tool(
        name=_string(raw, "name"),
        description=_string(raw, "description", missing=""),
        text_format=FreeText() if raw.get("format") is None else _text_format(_mapping(raw, "format")),
    )


def _text_format(raw: Mapping[str, Any]) -> TextFormat:
    match raw.get("type"):
        case "text":
            _check_fields(raw, ("type",))
            return FreeText()
        case "grammar":
            if "grammar" in raw:
                _check_fields(raw, ("type", "grammar"))
                raw = {"type": "grammar", **_mapping(raw, "grammar")}
            _check_fields(raw, ("type", "syntax", "definition"))
            _check_known("syntax", raw.get("syntax", ""), ("lark", "regex"))
            return (Lark if raw["syntax"] == "lark" else Regex)(_string(raw, "definition"))
    raise UnsupportedError(f"format {raw.get('type')!r:.40} is not supported; text and grammar are")


def _tool(raw: Mapping[str, Any]) -> Tool:
    _check_fields(raw, ("name", "description", "parameters", "strict"))
    if not isinstance(strict := raw.get("strict") or False, bool):
        raise UsageError(f"strict is true or false, got {strict!r:.40}")
    return Tool(
        name=_string(raw, "name"),
        description=_string(raw, "description", missing=""),
        parameters=raw.get("parameters"),
        strict=strict,
    )


# --- openai-harmony's dicts ---------------------------------------------------------------------------------


def _harmony_message(raw: Mapping[str, Any]) -> Message:
    _check_fields(raw, ("role", "name", "content", "channel", "recipient", "content_type"))
    content = raw.get("content")
    return Message(
        role=raw.get("role", ""),
        parts=_text_parts(content) if isinstance(content, str) else tuple(_each(content, "part", _harmony_part)),
        channel=raw.get("channel"),
        recipient=raw.get("recipient"),
        content_type=raw.get("content_type"),
        name=raw.get("name"),
    )


def _harmony_part(raw: Mapping[str, Any]) -> Part:
    match raw.get("type"):
        case "system_content":
            return _harmony_system(raw)
        case "developer_content":
            return _harmony_developer(raw)
    return _text_part(raw)


def _harmony_system(raw: Mapping[str, Any]) -> SystemContent:
    """What is missing is left out and has no default: that is how the library renders such a dict."""
    fields = ("type", "model_identity", "reasoning_effort", "tools", "conversation_start_date", "knowledge_cutoff")
    _check_fields(raw, (*fields, "channel_config"))
    effort: Any = raw.get("reasoning_effort")
    if isinstance(effort, str):
        effort = effort.lower()
    return SystemContent(
        identity=raw.get("model_identity"),
        knowledge_cutoff=raw.get("knowledge_cutoff"),
        date=raw.get("conversation_start_date"),
        effort=effort,
        channels=() if raw.get("channel_config") is None else _harmony_channels(_mapping(raw, "channel_config")),
        tools=_harmony_namespaces(raw),
    )


def _harmony_channels(config: Mapping[str, Any]) -> tuple[Channel, ...]:
    _check_fields(config, ("valid_channels", "channel_required"))
    if not isinstance(channels := config.get("valid_channels"), list | tuple):
        raise UsageError(f"valid_channels must be a list, got {type(channels).__name__}")
    if channels and config.get("channel_required") is not True:
        raise UnsupportedError("channels that may be left out are not supported; set channel_required to true")
    return tuple(channels)


def _harmony_developer(raw: Mapping[str, Any]) -> DeveloperContent:
    _check_fields(raw, ("type", "instructions", "tools"))
    tools: tuple[Tool, ...] = ()
    for namespace in _harmony_namespaces(raw):
        if namespace.name != "functions" or namespace.description:
            raise UnsupportedError(f"namespace {namespace.name!r}: a developer offers 'functions', undescribed, only")
        tools = namespace.tools
    return DeveloperContent(instructions=raw.get("instructions"), tools=tools)


def _harmony_namespaces(raw: Mapping[str, Any]) -> tuple[ToolNamespace, ...]:
    if raw.get("tools") is None:
        return ()
    return tuple(_each([*_mapping(raw, "tools").values()], "tool namespace", _harmony_namespace))


def _harmony_namespace(raw: Mapping[str, Any]) -> ToolNamespace:
    _check_fields(raw, ("name", "description", "tools"))
    return ToolNamespace(
        name=_string(raw, "name"),
        description=_string(raw, "description", missing=""),
        tools=tuple(_each(raw.get("tools"), "tool", _tool)),
    )


# --- reading foreign dicts ----------------------------------------------------------------------------------


def _each(raws: Any, what: str, read: Callable[[Mapping[str, Any]], _T]) -> list[_T]:
    """What `read` makes of each object in a list; its errors are told with the object's place."""
    if isinstance(raws, str | Mapping) or not isinstance(raws, Sequence):
        raise UsageError(f"{what}s must be a list of objects, got {type(raws).__name__}")
    results = []
    for index, raw in enumerate(raws):
        try:
            if not isinstance(raw, Mapping):
                raise UsageError(f"expected an object, got {raw!r:.80}")
            results.append(read(raw))
        except (UsageError, UnsupportedError) as error:
            raise type(error)(f"{what} {index}: {error}") from None
    return results


def _check_fields(raw: Mapping[str, Any], known: Sequence[str]) -> None:
    for key, value in raw.items():
        if key not in known and value not in (None, []):
            raise UnsupportedError(f"field {key!r} is not supported; leave it out")


def _string(raw: Mapping[str, Any], key: str, *, missing: str | None = None) -> str:
    value: Any = missing if raw.get(key) is None else raw[key]
    _check_string(key, value)
    return str(value)


def _mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if not isinstance(value, Mapping):
        raise UsageError(f"{key} must be an object, got {type(value).__name__}")
    return value


# --- checks -------------------------------------------------------------------------------------------------


def _check_string(kind: str, value: str) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{kind} must be a string, got {type(value).__name__}")


def _check_known(kind: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"unknown {kind} {value!r}; known are {', '.join(known)}")


def _check_name(kind: str, name: str) -> None:
    if not isinstance(name, str) or not is_name(name):
        raise UsageError(f"{kind} name {name!r} is not one; use letters, digits, '_', '-' and '.'")


def _check_distinct(kind: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"{kind} {name!r} is given {count} times; each needs its own name")


def _check_filled(kind: str, value: str | None) -> None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise UsageError(f"{kind} must be some text, or None to leave it out; got {value!r}")


def _check_date(value: str) -> None:
    try:
        date.fromisoformat(value)
    except (TypeError, ValueError):
        raise UsageError(f"date {value!r} is not of the form 2025-08-05") from None
