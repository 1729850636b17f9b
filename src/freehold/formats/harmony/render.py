"""Conversations as Harmony token ids: control ids, and between them plainly encoded text.

Token for token what openai-harmony renders, with one rule taken from the written specification where that
library is coarser: of everything before the last final answer, no analysis is shown to the model again (the
library looks at the first final answer only). Refuses (UnsupportedError) what is not built yet: the
description of tools. Called by `chat.py`.
"""

from collections.abc import Sequence

from freehold.errors import UnsupportedError
from freehold.formats.conversation import Conversation, DeveloperContent, Message, Part, SystemContent, Text
from freehold.formats.harmony.vocabulary import CONSTRAIN, HarmonyVocabulary
from freehold.formats.tokenizer import Tokenizer


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The conversation, and the opening of the assistant's next message."""
    vocabulary = HarmonyVocabulary.of(tokenizer)
    return [*render_conversation(conversation, tokenizer), vocabulary.start, *tokenizer.encode("assistant")]


def render_conversation(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """All messages that the model sees again, each closed by `<|end|>`, even where that was `<|return|>`."""
    vocabulary = HarmonyVocabulary.of(tokenizer)
    ids: list[int] = []
    for message in _without_past_analysis(conversation.messages):
        ids += _message(message, tokenizer, vocabulary)
    return ids


def _without_past_analysis(messages: Sequence[Message]) -> list[Message]:
    last_final = max((i for i, message in enumerate(messages) if message.channel == "final"), default=-1)
    return [message for i, message in enumerate(messages) if i > last_final or message.channel != "analysis"]


def _message(message: Message, tokenizer: Tokenizer, vocabulary: HarmonyVocabulary) -> list[int]:
    ids = [vocabulary.start]
    if message.role == "tool":  # a tool's message is headed by its name alone
        ids += tokenizer.encode(message.name or "")
    else:
        ids += tokenizer.encode(message.role)
        if message.name is not None:
            ids += tokenizer.encode(f":{message.name}")
    if message.recipient not in (None, "all"):
        ids += tokenizer.encode(f" to={message.recipient}")
    if message.channel is not None:
        ids += [vocabulary.channel, *tokenizer.encode(message.channel)]
    if message.content_type is not None:
        ids += _content_type(message.content_type, tokenizer, vocabulary)
    ids.append(vocabulary.message)
    for part in message.parts:
        ids += tokenizer.encode(_part_text(part))
    calls_tool = message.role == "assistant" and message.recipient is not None
    return [*ids, vocabulary.call if calls_tool else vocabulary.end]


def _content_type(content_type: str, tokenizer: Tokenizer, vocabulary: HarmonyVocabulary) -> list[int]:
    if not content_type.startswith(CONSTRAIN):
        return tokenizer.encode(f" {content_type}")
    return [
        *tokenizer.encode(" "),
        vocabulary.constrain,
        *tokenizer.encode(content_type.removeprefix(CONSTRAIN)),
    ]


def _part_text(part: Part) -> str:
    match part:
        case Text(text=text):
            return text
        case SystemContent():
            return _system_text(part)
        case DeveloperContent(tools=()):
            return "" if part.instructions is None else f"# Instructions\n\n{part.instructions}"
    raise UnsupportedError("function tools are not rendered yet; leave them out of the developer message")


def _system_text(system: SystemContent) -> str:
    if system.tools:
        raise UnsupportedError("built-in tools are not rendered yet; leave them out")
    about = []
    if system.identity is not None:
        about.append(system.identity)
    if system.knowledge_cutoff is not None:
        about.append(f"Knowledge cutoff: {system.knowledge_cutoff}")
    if system.date is not None:
        about.append(f"Current date: {system.date}")
    sections = ["\n".join(about)] if about else []
    if system.effort is not None:
        sections.append(f"Reasoning: {system.effort}")
    if system.channels:
        channels = ", ".join(system.channels)
        sections.append(f"# Valid channels: {channels}. Channel must be included for every message.")
    return "\n\n".join(sections)
