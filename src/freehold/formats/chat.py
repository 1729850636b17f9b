"""The one door to chat formats: a conversation in, token ids out; reply tokens in, reasoning and answer out.

`choose` picks Harmony or a Jinja template; callers above need to know neither. A format renders, names the
tokens that end a reply, and makes a reader for each reply, which streams the text and in the end has the
messages that belong in the history.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, Protocol

from freehold.errors import CheckpointError
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Message,
    SystemContent,
    text_message,
)
from freehold.formats.harmony.events import ArgumentsDelta, Event, ReasoningDelta, TextDelta
from freehold.formats.harmony.parser import HarmonyParser
from freehold.formats.harmony.render import render
from freehold.formats.harmony.vocabulary import MESSAGE, START, HarmonyVocabulary, speaks_harmony
from freehold.formats.templates import ChatTemplate
from freehold.formats.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyDelta:
    """More of the reply: the model's reasoning, or the answer meant for the user. Never empty."""

    kind: Literal["reasoning", "answer"]
    text: str


class ReplyReader(Protocol):
    """Reads one reply, token by token."""

    def feed(self, token_id: int) -> list[ReplyDelta]:
        """What this token adds; stop tokens may be fed, and add nothing."""

    def flush(self) -> list[ReplyDelta]:
        """The rest, where the reply broke off."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The assistant's messages, to append to the conversation; complete after `flush`."""


class ChatFormat(Protocol):
    """How one model writes conversations."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""

    def render(self, conversation: Conversation) -> list[int]:
        """The prompt for the assistant's next reply."""

    def message_ends(self, prompt: Sequence[int]) -> list[int]:
        """Lengths of a rendered prompt's beginnings that end with a message: a later prompt may begin like that."""

    def reply_reader(self) -> ReplyReader:
        """A reader for the reply to a rendered prompt."""


def choose(
    tokenizer: Tokenizer,
    template: str | None,
    stop_ids: Iterable[int],
    *,
    system: SystemContent | None = None,
    variables: Mapping[str, str] | None = None,
) -> ChatFormat:
    """The format of a model with this tokeniser and chat template.

    `stop_ids` are those of its generation_config. `system` is Harmony's system message (today's date,
    effort); `variables` are for Jinja (`bos_token` and the like). Raises CheckpointError where nothing says
    how to chat.
    """
    stops = frozenset(stop_ids)
    harmonic = START in template and MESSAGE in template if template is not None else speaks_harmony(tokenizer)
    if harmonic:
        return HarmonyFormat(tokenizer, system=system or SystemContent(), more_stop_ids=stops)
    if template is None:
        raise CheckpointError(
            "this model has neither a chat template nor Harmony's control tokens; put a chat_template.jinja "
            "into its folder, or use it for plain completion"
        )
    if not stops:
        raise CheckpointError(
            "nothing says which token ends this model's replies; name it as eos_token_id in its generation_config.json"
        )
    return TemplateFormat(tokenizer, ChatTemplate(template, variables=variables), stop_ids=stops)


def _after(prompt: Sequence[int], ends: Set[int]) -> list[int]:
    return [length for length, token in enumerate(prompt, start=1) if token in ends]


# --- Harmony ------------------------------------------------------------------------------------------------


class HarmonyFormat:
    """gpt-oss's own format. Puts `system` before conversations that have no Harmony system message."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        system: SystemContent,
        more_stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._system = system
        known = HarmonyVocabulary.of(tokenizer)
        # <|end|> closes a message, not the reply: the answer comes after the analysis.
        self.stop_ids = (more_stop_ids - {known.end}) | {known.return_, known.call}
        self._end_ids = {known.end, known.return_, known.call}

    def render(self, conversation: Conversation) -> list[int]:
        """Chat messages of role "system" become developer instructions, assistant messages final ones."""
        messages = _as_harmony(conversation.messages)
        if not any(isinstance(part, SystemContent) for message in messages for part in message.parts):
            messages.insert(0, Message(role="system", parts=(self._system,)))
        return render(Conversation(messages=tuple(messages)), self._tokenizer).ids

    def message_ends(self, prompt: Sequence[int]) -> list[int]:
        return _after(prompt, self._end_ids)

    def reply_reader(self) -> ReplyReader:
        return _HarmonyReader(self._tokenizer)


def _as_harmony(messages: Iterable[Message]) -> list[Message]:
    """Chat messages in Harmony's terms; system prompts in a row, and the tools among them, become one message."""
    result: list[Message] = []
    for is_developers, group in groupby(messages, _is_developers):
        if is_developers:
            result.append(_developer([part for message in group for part in _developer_parts(message)]))
        else:
            result += map(_on_a_channel, group)
    return result


def _is_developers(message: Message) -> bool:
    is_prompt = message.role == "system" and not any(isinstance(part, SystemContent) for part in message.parts)
    return is_prompt or message.role == "developer"


def _developer_parts(message: Message) -> list[DeveloperContent]:
    parts = [part for part in message.parts if isinstance(part, DeveloperContent)]
    return [*parts, DeveloperContent(instructions=message.text)] if message.text or not parts else parts


def _developer(parts: Sequence[DeveloperContent]) -> Message:
    instructions = [part.instructions for part in parts if part.instructions is not None]
    whole = DeveloperContent(
        instructions="\n\n".join(instructions) if instructions else None,
        tools=tuple(tool for part in parts for tool in part.tools),
        response_formats=tuple(form for part in parts for form in part.response_formats),
    )
    return Message(role="developer", parts=(whole,))


def _on_a_channel(message: Message) -> Message:
    is_answer = message.role == "assistant" and message.channel is None and message.recipient is None
    return replace(message, channel="final") if is_answer else message


class _HarmonyReader:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._parser = HarmonyParser(tokenizer)

    @property
    def messages(self) -> tuple[Message, ...]:
        return self._parser.messages

    def feed(self, token_id: int) -> list[ReplyDelta]:
        return _reply_deltas(self._parser.feed(token_id))

    def flush(self) -> list[ReplyDelta]:
        return _reply_deltas(self._parser.flush())


def _reply_deltas(events: Iterable[Event]) -> list[ReplyDelta]:
    """A turn of somebody else, made up by the model, is no part of its reply."""
    deltas = []
    for event in events:
        match event:
            case TextDelta(text=text):
                deltas.append(ReplyDelta(kind="answer", text=text))
            case ReasoningDelta(text=text) | ArgumentsDelta(text=text):  # what a tool is sent is not for the user
                deltas.append(ReplyDelta(kind="reasoning", text=text))
    return deltas


# --- Jinja templates ----------------------------------------------------------------------------------------


class TemplateFormat:
    """Any other format: a Jinja template, and everything the model writes is the answer."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.stop_ids = stop_ids

    def render(self, conversation: Conversation) -> list[int]:
        """Drops what only Harmony has: its system message, and reasoning."""
        kept = tuple(message for message in conversation.messages if not _is_harmony_only(message))
        return self._template.render(Conversation(messages=kept), self._tokenizer)

    def message_ends(self, prompt: Sequence[int]) -> list[int]:
        return _after(prompt, self.stop_ids)

    def reply_reader(self) -> ReplyReader:
        return _PlainReader(self._tokenizer)


def _is_harmony_only(message: Message) -> bool:
    """The system message only where it offers no tools: those are not to be passed over in silence."""
    is_system = any(isinstance(part, SystemContent) and not part.tools for part in message.parts)
    return message.channel == "analysis" or is_system


class _PlainReader:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._text: list[str] = []

    @property
    def messages(self) -> tuple[Message, ...]:
        return (text_message("assistant", "".join(self._text)),)

    def feed(self, token_id: int) -> list[ReplyDelta]:
        return self._answer(self._detokenizer.feed(token_id))

    def flush(self) -> list[ReplyDelta]:
        return self._answer(self._detokenizer.flush())

    def _answer(self, text: str) -> list[ReplyDelta]:
        if not text:
            return []
        self._text.append(text)
        return [ReplyDelta(kind="answer", text=text)]
