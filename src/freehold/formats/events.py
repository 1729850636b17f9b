"""What a Harmony turn is made of while it is written: the events that APIs, terminal and web page consume.

A turn is messages one after another: `MessageStart`, deltas, `MessageDone`. A message that calls a tool has
`CallStart`, `ArgumentsDelta`s and `CallDone` between the two instead of text. `Diagnostic`s stand wherever something
was not as it should be; no event ever carries a control token as text.
"""

from dataclasses import dataclass, field
from typing import Literal

from freehold.formats.conversation import Message, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageStart:
    """A message's header, mended where that was needed. `channel` is any word that the model wrote, None where it
    wrote none; `name` is a tool's or another author's. `tokens` are the whole header as written, from `position` on."""

    role: Role
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None
    position: int = field(default=0, compare=False)
    tokens: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the model's reasoning; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text that is meant for the user: of the final answer, or of a preamble; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class OtherDelta:
    """More of a message that is not the assistant's, and so no part of the reply; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The model calls a tool: the full recipient, as offered where that could be made out."""

    recipient: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments, or of its code; never empty. All of them in a row are `CallDone.arguments`."""

    text: str


CallProblem = Literal["not offered", "several recipients", "leaked", "not json", "not an object", "broken off"]
"""Why a call must not be carried out. "leaked": its header was plain text, which may as well be a quotation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDone:
    """A whole call. One with a `problem` is to be reported to the model, not to be carried out."""

    recipient: str
    arguments: str
    problem: CallProblem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageDone:
    """The message as history keeps it: its text as the model wrote it, its header mended. `stop_id` is the token that
    closed it, None where none did."""

    message: Message
    stop_id: int | None


@dataclass(frozen=True, slots=True)
class TurnDone:
    """`<|return|>` after calls that may be several: there are no more. A turn that ends otherwise has no such event."""

    stop_id: int


DiagnosticCode = Literal[
    "junk in header",
    "leaked header",
    "unknown role",
    "role not the assistant's",
    "unknown channel",
    "missing channel",
    "missing start",
    "missing message",
    "missing end",
    "misplaced control token",
    "unknown token",
    "text between messages",
    "recipient mended",
    "recipient not offered",
    "several recipients",
    "content type mended",
    "wrong channel for a call",
    "wrong end of a call",
    "wrong end of a message",
    "code instead of json",
    "json instead of code",
    "arguments not json",
    "broken off",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """Something was not as it should be, and what was made of it. `position` counts the turn's tokens from 0; `tokens`
    are those from there on that this diagnostic alone accounts for: they are part of no header, no text and no ending.
    """

    code: DiagnosticCode
    detail: str
    position: int
    tokens: tuple[int, ...] = ()


Event = (
    MessageStart
    | ReasoningDelta
    | TextDelta
    | OtherDelta
    | CallStart
    | ArgumentsDelta
    | CallDone
    | MessageDone
    | TurnDone
    | Diagnostic
)
