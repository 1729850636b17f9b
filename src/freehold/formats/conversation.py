"""What a chat is made of: roles, channels, messages and their parts, wide enough to hold Harmony fully.

Plain frozen values, checked when made (UsageError). They know neither tokens nor templates: `chat.py` turns
them into token ids, and replies back into messages. `Conversation.from_openai` reads the dicts of OpenAI's
chat API and refuses (UnsupportedError) the parts of it that Freehold does not do, rather than ignore them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, get_args

from freehold.errors import UnsupportedError, UsageError

Role = Literal["system", "developer", "user", "assistant", "tool"]
Channel = Literal["analysis", "commentary", "final"]
Effort = Literal["low", "medium", "high"]

ROLES: tuple[Role, ...] = get_args(Role)
CHANNELS: tuple[Channel, ...] = get_args(Channel)
EFFORTS: tuple[Effort, ...] = get_args(Effort)

# Names stand inside message headers: nothing that could pass for more header (spaces, `=`, `<|`) may be in one.
_NAME = re.compile(r"[\w.\-]+")
_CONTENT_TYPE = re.compile(r"(<\|constrain\|> ?)?[\w.\-/+]+")


# --- parts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Plain text; the only part that users, assistants and tools write."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"a text part holds a string, got {type(self.text).__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema, None where it takes none.

    The arguments of a `strict` one always match its schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        _check_name("tool", self.name)
        if self.parameters is not None and not isinstance(self.parameters, Mapping):
            raise UsageError(f"tool {self.name!r}: parameters must be a JSON schema object, got {self.parameters!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolNamespace:
    """Built-in tools that the model was trained on: calls go to `name.tool`, or to `name` where it has none inside."""

    name: str
    description: str = ""
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        _check_name("built-in tool", self.name)
        _check_distinct("tool", [tool.name for tool in self.tools])


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """The form that the final answer is to have, as a JSON schema."""

    name: str
    schema: Mapping[str, Any]
    description: str = ""

    def __post_init__(self) -> None:
        _check_name("response format", self.name)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DeveloperContent:
    """Harmony's developer message: instructions (elsewhere called the system prompt), function tools, answer forms."""

    instructions: str | None = None
    tools: tuple[Tool, ...] = ()
    response_formats: tuple[ResponseFormat, ...] = ()

    def __post_init__(self) -> None:
        if self.instructions is not None and not isinstance(self.instructions, str):
            raise UsageError(f"instructions must be a string, got {type(self.instructions).__name__}")
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
        if self.content_type is not None and not _CONTENT_TYPE.fullmatch(str(self.content_type)):
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
    def from_openai(cls, messages: Sequence[Mapping[str, Any]]) -> "Conversation":
        """Read the `messages` of OpenAI's chat API: text only, as a string or a list of text parts."""
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise UsageError(f"messages must be a list of objects, got {type(messages).__name__}")
        return cls(messages=tuple(_message_from_openai(raw, f"message {i}") for i, raw in enumerate(messages)))

    def plus(self, *messages: Message) -> "Conversation":
        """This conversation with more messages at its end."""
        return Conversation(messages=(*self.messages, *messages))


# --- OpenAI's chat dicts ------------------------------------------------------------------------------------


def _message_from_openai(raw: Mapping[str, Any], where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise UsageError(f"{where}: expected an object with role and content, got {type(raw).__name__}")
    role = raw.get("role")
    if role not in ROLES:
        raise UsageError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    if role == "tool":
        raise UnsupportedError(f"{where}: tool results are not supported yet; leave tool messages out")
    for key, value in raw.items():
        if key not in ("role", "content", "name") and value is not None:
            raise UnsupportedError(f"{where}: field {key!r} is not supported; leave it out")
    parts = _parts_from_openai(raw.get("content"), where)
    try:
        return Message(role=role, parts=parts, name=raw.get("name"))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _parts_from_openai(content: Any, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Text(text=content),)
    if not isinstance(content, list | tuple):
        raise UsageError(f"{where}: content must be a string or a list of parts, got {type(content).__name__}")
    return tuple(_part_from_openai(raw, f"{where}, part {i}") for i, raw in enumerate(content))


def _part_from_openai(raw: Any, where: str) -> Text:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("type"), str):
        raise UsageError(f"{where}: expected an object with a type, got {raw!r:.80}")
    if raw["type"] != "text":
        raise UnsupportedError(f"{where}: type {raw['type']!r} is not supported; gpt-oss reads text only")
    if not isinstance(raw.get("text"), str):
        raise UsageError(f"{where}: a text part holds a string, got {type(raw.get('text')).__name__}")
    return Text(text=raw["text"])


# --- checks -------------------------------------------------------------------------------------------------


def _check_known(kind: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"unknown {kind} {value!r}; known are {', '.join(known)}")


def _check_name(kind: str, name: str) -> None:
    if not isinstance(name, str) or not is_name(name):
        raise UsageError(f"{kind} name {name!r} is not one; use letters, digits, '_', '-' and '.'")


def _check_distinct(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{kind} {name!r} is given {names.count(name)} times; each needs its own name")


def _check_filled(kind: str, value: str | None) -> None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise UsageError(f"{kind} must be some text, or None to leave it out; got {value!r}")


def _check_date(value: str) -> None:
    try:
        date.fromisoformat(value)
    except (TypeError, ValueError):
        raise UsageError(f"date {value!r} is not of the form 2025-08-05") from None
