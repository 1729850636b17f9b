"""Harmony token ids, as a model makes them, into events: a message starts, its text comes, it ends.

Takes any ids in any order and raises nothing: a model may write whatever it likes. Text outside of any
message, or a header that never ends in `<|message|>`, is handed on as a message's text, so that nothing the
model said gets lost; control tokens where they mean nothing are skipped. Called by `chat.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from freehold.formats.conversation import ROLES, Role
from freehold.formats.harmony.vocabulary import CONSTRAIN, HarmonyVocabulary
from freehold.formats.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageStart:
    """A message's header as the model wrote it: channel and recipient may be any word. `name` is a tool's."""

    role: Role
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the current message's text; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """The current message is over. `stop_id` is the token that closed it, None where the model broke off."""

    stop_id: int | None


Event = MessageStart | TextDelta | MessageEnd


class HarmonyParser:
    """Feed it what comes after the prompt; `role` is the one that the prompt's last header names."""

    def __init__(self, tokenizer: Tokenizer, *, role: Role | None = "assistant") -> None:
        self._tokenizer = tokenizer
        self._vocabulary = HarmonyVocabulary.of(tokenizer)
        self._stops = {self._vocabulary.end, self._vocabulary.return_, self._vocabulary.call}
        self._role = role
        self._header: list[int] | None = [] if role is not None else None
        self._body: Detokenizer | None = None

    def feed(self, token_id: int) -> list[Event]:
        """The events that this token completes."""
        return list(self._feed(token_id))

    def flush(self) -> list[Event]:
        """Close whatever is open: no more tokens will come."""
        return list(self._end(None))

    def _feed(self, token_id: int) -> Iterator[Event]:
        known = self._vocabulary
        if token_id in self._stops:
            yield from self._end(token_id)
        elif token_id == known.start:
            yield from self._end(None)
            self._header = []
        elif self._body is not None:
            yield from _delta(self._body.feed(token_id))
        elif token_id == known.message:
            yield from self._begin(_read_header(self._tokenizer, known, self._header or [], self._role))
        elif self._header is not None:
            self._header.append(token_id)
        elif token_id == known.channel:  # a header that forgot its start
            self._header = [token_id]
        elif self._tokenizer.control_name(token_id) is None:
            yield from self._begin(MessageStart(role="assistant"))
            yield from self._feed(token_id)

    def _begin(self, start: MessageStart) -> Iterator[Event]:
        self._header, self._role = None, None
        self._body = Detokenizer(self._tokenizer)
        yield start

    def _end(self, stop_id: int | None) -> Iterator[Event]:
        if self._header:  # it never came to its message: take the words for the text
            header, role = self._header, self._role
            yield from self._begin(MessageStart(role=role or "assistant"))
            yield from _delta(self._tokenizer.decode(header))
        if self._body is not None:
            yield from _delta(self._body.flush())
            yield MessageEnd(stop_id)
        self._header, self._role, self._body = None, None, None


def _delta(text: str) -> Iterator[Event]:
    if text:
        yield TextDelta(text)


def _read_header(tokenizer: Tokenizer, known: HarmonyVocabulary, header: list[int], role: Role | None) -> MessageStart:
    """`role[:name] [to=recipient] [<|channel|>channel [to=recipient]] [[<|constrain|>]content type]`."""
    before, channel, constraint = _sections(header, known)
    words = tokenizer.decode(before).split()
    name = None
    if role is None:
        role, name = _author(words.pop(0) if words else "")
    channel_words = tokenizer.decode(channel).split()
    words += channel_words[1:]
    recipients = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    types = [word for word in words if not word.startswith("to=")]
    if constrained := tokenizer.decode(constraint).strip():
        types.append(CONSTRAIN + constrained)
    return MessageStart(
        role=role,
        channel=channel_words[0] if channel_words else None,
        recipient=recipients[-1] if recipients else None,
        content_type=types[-1] if types else None,
        name=name,
    )


def _sections(header: list[int], known: HarmonyVocabulary) -> tuple[list[int], list[int], list[int]]:
    before: list[int] = []
    channel: list[int] = []
    constraint: list[int] = []
    current = before
    for token_id in header:
        if token_id == known.channel:
            current = channel
        elif token_id == known.constrain:
            current = constraint
        else:
            current.append(token_id)
    return before, channel, constraint


def _author(word: str) -> tuple[Role, str | None]:
    written, _, name = word.partition(":")
    for role in ROLES:
        if written == role:
            return role, name or None
    return ("tool", word) if word else ("assistant", None)  # a tool's message is headed by the tool's name
