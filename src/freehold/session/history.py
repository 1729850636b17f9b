"""What history keeps of a turn with tools, told from its events alone.

The turn that runs (freehold.session.turn) and the recorded one (freehold.session.record) keep the same, because both
ask here. Whenever it is asked, each call that it keeps is followed by its answer, or waits for the caller at the end of
a turn that is complete. It runs nothing and writes nothing.
"""

from dataclasses import dataclass
from typing import Literal

from freehold.formats.conversation import CHANNELS, Channel, Message, Text, is_name
from freehold.formats.events import (
    CallDone,
    CallProblem,
    CallStart,
    Event,
    MessageDone,
    MessageStart,
    ReasoningDelta,
    TextDelta,
)
from freehold.formats.harmony.offer import FUNCTION_CHANNEL, FUNCTIONS
from freehold.session.generation import Said, SampleDone
from freehold.tools.base import Citation, ToolFile

_UNNAMED = f"{FUNCTIONS}.unknown"  # who answers a call whose recipient can be nobody's name
_NOT_BEGUN = "The user ended the turn before this call was carried out."
_BEGUN = "The user ended the turn during this call. It may have been carried out, wholly or in part."


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStart:
    """A call is about to be carried out. `number` counts those of a turn, from 0."""

    number: int
    recipient: str
    arguments: str


ToolProblem = Literal["failed", "unknown", "malformed", "declined", "timeout", "limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDone:
    """What became of it: `message` is what the model is told, `files` are for the user. With a `problem` the message
    tells of that."""

    number: int
    message: Message
    files: tuple[ToolFile, ...] = ()
    problem: ToolProblem | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Cited:
    """Comes before the MessageDone of an answer: what in its text refers to sources."""

    citations: tuple[Citation, ...]


TurnEvent = Said | SampleDone | ToolStart | ToolDone | Cited


# --- calls --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that the model has made."""

    recipient: str
    arguments: str
    problem: CallProblem | None
    channel: Channel | None

    def answer(self, text: str) -> Message:
        """A tool's message to the model."""
        return Message(
            role="tool",
            parts=(Text(text=text),),
            channel=self.channel or FUNCTION_CHANNEL,
            recipient="assistant",
            name=self.recipient if is_name(self.recipient) else _UNNAMED,
        )


class TurnHistory:
    """Feed it a turn's events, as they come."""

    def __init__(self) -> None:
        self._over: list[Message] = []  # of the steps that are over, and what their calls gave
        self._waiting: list[Call] = []  # calls of those that have no answer yet
        self._begun: Call | None = None  # the one of them that is being carried out
        self._said: list[Message] = []  # of the step that is being said
        self._calls: list[Call] = []  # in it
        self._call: CallDone | None = None  # told by the event before the one that has its message
        self._open: MessageStart | None = None  # the message that is being said
        self._text: list[str] = []  # of it
        self._whole: tuple[Message, ...] | None = None  # when the turn is complete

    @property
    def messages(self) -> tuple[Message, ...]:
        """Of all steps that are over."""
        return tuple(self._over)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Of the step that is being said, those that are whole."""
        return tuple(self._calls)

    def take(self, event: TurnEvent) -> None:
        match event:
            case Said(index=0):
                self._take(event.event)
            case ToolStart():
                self.end_step()
                self._begun = next((call for call in self._waiting if _is_of(call, event)), None)
            case ToolDone(message=message):
                self._over.append(message)
                if self._begun is not None:
                    self._waiting.remove(self._begun)
                    self._begun = None
            case SampleDone(index=0):
                self._whole = event.messages

    def _take(self, event: Event) -> None:
        match event:
            case MessageStart():
                self._open = event if event.role == "assistant" else None
                self._text.clear()
            case ReasoningDelta(text=text) | TextDelta(text=text):
                self._text.append(text)
            case CallStart():
                self._open = None
            case CallDone():
                self._call = event
            case MessageDone(message=message):
                self._open = None
                if message.role == "assistant":
                    self._said.append(message)
                if (call := self._call) is not None:
                    self._calls.append(
                        Call(
                            recipient=call.recipient,
                            arguments=call.arguments,
                            problem=call.problem,
                            channel=message.channel,
                        )
                    )
                    self._call = None

    def end_step(self, *, keep_calls: bool = True) -> None:
        """What is being said is complete. Calls come last, and so before their answers: a model that nothing keeps from
        it may have gone on after one."""
        self._over += [message for message in self._said if message.recipient is None]
        if keep_calls:
            self._over += [message for message in self._said if message.recipient is not None]
            self._waiting += self._calls
        self._said.clear()
        self._calls.clear()

    def cut(self) -> tuple[Message, ...]:
        """Nothing more will come, wherever it is. What was said so far stays, but for calls that nobody looked at; of
        the others each is answered. Of a turn that is complete, all of it."""
        if self._whole is not None:
            return self._whole
        said = [message for message in (*self._said, *self._broken_off()) if message.recipient is None and message.text]
        ends = [call.answer(_BEGUN if call is self._begun else _NOT_BEGUN) for call in self._waiting]
        return (*self._over, *ends, *said)

    def _broken_off(self) -> tuple[Message, ...]:
        start = self._open
        if start is None:
            return ()
        channel: Channel = next((known for known in CHANNELS if known == start.channel), "final")
        text = Text(text="".join(self._text))
        return (Message(role="assistant", parts=(text,), channel=channel, name=start.name),)


def _is_of(call: Call, start: ToolStart) -> bool:
    return (call.recipient, call.arguments) == (start.recipient, start.arguments)
