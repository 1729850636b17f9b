"""The body of one message while it comes: tokens in, deltas out, and in the end the message and what a call is worth.

Knows nothing of headers and endings, which are `parser.py`'s.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from freehold.formats.conversation import CHANNELS, Channel, Message, Text
from freehold.formats.events import (
    ArgumentsDelta,
    CallDone,
    CallProblem,
    CallStart,
    DiagnosticCode,
    Event,
    MessageStart,
    OtherDelta,
    ReasoningDelta,
    TextDelta,
)
from freehold.formats.harmony.header import LEAK_BEGINNINGS, NOT_TOOLS
from freehold.formats.harmony.offer import FUNCTION_CHANNEL, Callee, Offer
from freehold.formats.tokenizer import Detokenizer, Tokenizer

_PYTHON = "python"
_NONE: frozenset[str] = frozenset()


class Report(NamedTuple):
    """What a diagnostic is to say."""

    code: DiagnosticCode
    detail: str


class Arguments(NamedTuple):
    """A call's arguments after mending, and what there is to say about them."""

    text: str
    problem: CallProblem | None = None
    report: Report | None = None


class Body:
    """What follows `start`, which must have been mended; `problem` is the one that makes a call of it none to obey."""

    __slots__ = ("_callee", "_detokenizer", "_doubt", "_problem", "_start", "beginnings", "delta", "is_call", "text")

    def __init__(self, tokenizer: Tokenizer, start: MessageStart, offer: Offer, problem: CallProblem | None) -> None:
        self._start = start
        self._problem = problem
        self._detokenizer = Detokenizer(tokenizer)
        self._callee = offer.callees.get(start.recipient or "") if start.role == "assistant" else None
        self.is_call = self._callee is not None or (
            start.role == "assistant"
            and start.recipient not in (None, *NOT_TOOLS)
            and start.channel != "final"  # an answer to nobody known is still the answer
        )
        self.delta = self._kind_of_delta()
        self.text: list[str] = []
        """All text so far, in pieces."""
        self.beginnings = LEAK_BEGINNINGS if self.may_leak else _NONE
        """Texts of tokens that are not plainly text here."""
        # Arguments that may have to be mended are held back until their first character settles it.
        self._doubt: Literal["none", "undecided", "held"] = "undecided" if self._may_be_mended() else "none"

    def _kind_of_delta(self) -> Callable[[str], Event]:
        if self._start.role != "assistant":
            return OtherDelta
        if self.is_call:
            return ArgumentsDelta
        return ReasoningDelta if self._start.channel == "analysis" else TextDelta

    @property
    def may_leak(self) -> bool:
        """Whether a header in plain words can be expected here: after reasoning or a preamble more is to come."""
        is_text = self._start.role == "assistant" and not self.is_call
        return is_text and self._start.channel in ("analysis", "commentary")

    @property
    def calls_nobody(self) -> bool:
        """Whether the assistant speaks to nobody in particular."""
        return self._start.role == "assistant" and self._start.recipient is None

    @property
    def is_plain(self) -> bool:
        """Whether a token's text may be added to `text` and handed on as `delta`, with no further thought."""
        return self._doubt == "none" and not self._detokenizer.is_waiting

    def open(self) -> Iterator[Event | Report]:
        """What there is to say before any text."""
        start, callee = self._start, self._callee
        if start.role == "assistant":
            if start.channel is None:
                yield Report("missing channel", f"the message was taken for {self._channel()!r}")
            elif start.channel not in CHANNELS:
                yield Report("unknown channel", f"{start.channel!r} was taken for {self._channel()!r}")
            elif callee is not None and callee.channel != start.channel:
                detail = f"{callee.recipient} is called on {callee.channel!r}, not on {start.channel!r}"
                yield Report("wrong channel for a call", detail)
        if self.is_call:
            yield CallStart(start.recipient or "")

    def feed(self, token_id: int) -> Iterator[Event]:
        """The events of a token of plain text."""
        yield from self._add(self._detokenizer.feed(token_id))

    def _add(self, text: str) -> Iterator[Event]:
        if not text:
            return
        self.text.append(text)
        if self._doubt == "undecided" and (first := text.lstrip()[:1]):
            self._doubt = "held" if self._must_be_mended(first) else "none"
            text = "".join(self.text)
        if self._doubt == "none":
            yield self.delta(text)

    def close(self, *, is_broken_off: bool) -> Iterator[Event | Report]:
        """The last events but `MessageDone`."""
        yield from self._add(self._detokenizer.flush())
        if not self.is_call:
            return
        arguments = self._arguments()
        if self._doubt != "none" and arguments.text:
            yield ArgumentsDelta(arguments.text)
        if arguments.report is not None:
            yield arguments.report
        problem = arguments.problem
        if self._callee is None:
            problem = "not offered"
        elif self._problem is not None:
            problem = self._problem
        elif is_broken_off:
            problem = "broken off"
        yield CallDone(recipient=self._start.recipient or "", arguments=arguments.text, problem=problem)

    def message(self) -> Message:
        """The message as history keeps it."""
        start = self._start
        is_addressed = self.is_call or start.role != "assistant"  # a reply is the user's, whatever its header says
        return Message(
            role=start.role,
            parts=(Text(text="".join(self.text)),),
            channel=self._channel(),
            recipient=start.recipient if is_addressed else None,
            content_type=start.content_type,
            name=start.name,
        )

    def _channel(self) -> Channel | None:
        if self._callee is not None:
            return self._callee.channel
        for known in CHANNELS:
            if known == self._start.channel:
                return known
        if self._start.role != "assistant":
            return None
        return FUNCTION_CHANNEL if self.is_call else "final"

    # --- a call's arguments ---

    def _may_be_mended(self) -> bool:
        callee = self._callee
        if callee is None or _takes_any_text(callee):
            return False
        return callee.tool is None or not callee.tool.parameters or _code_field(callee) != ""

    def _must_be_mended(self, first: str) -> bool:
        """By the first character of the arguments."""
        if self._callee is None or self._callee.tool is None:
            return first == "{"
        return first != "{" and _code_field(self._callee) != ""

    def _arguments(self) -> Arguments:
        text, callee = "".join(self.text), self._callee
        if callee is None or _takes_any_text(callee):
            return Arguments(text)
        if callee.tool is None:
            return _code(text) if self._doubt == "held" else Arguments(text)
        if self._doubt == "undecided" and not callee.tool.parameters:
            return Arguments("{}", report=Report("arguments not json", "none at all were read as {}"))
        if self._doubt == "held":
            mended = json.dumps({_code_field(callee): text}, ensure_ascii=False)
            return Arguments(mended, report=Report("code instead of json", f"it became {_code_field(callee)!r}"))
        return _checked(text)


def _takes_any_text(callee: Callee) -> bool:
    """Whether what is sent is its own affair. (Code has no tool; JSON for it is a mistake that can be mended.)"""
    return callee.tool is not None and not callee.takes_json


def _code_field(callee: Callee) -> str:
    """The field for code of a function called "python", whose name makes the model send bare code; "" of all others."""
    if callee.tool is None or callee.tool.name != _PYTHON or not callee.tool.parameters:
        return ""
    properties = callee.tool.parameters.get("properties")
    if not isinstance(properties, Mapping) or len(properties) != 1:
        return ""
    ((name, schema),) = properties.items()
    return str(name) if isinstance(schema, Mapping) and schema.get("type") == "string" else ""


def _code(text: str) -> Arguments:
    """`{"code": "1 + 1"}` is what models send that know python as a function; as a program it would do nothing."""
    try:
        value = _read_json(text)
    except (ValueError, RecursionError):
        return Arguments(text)
    if isinstance(value, dict) and value.keys() == {"code"} and isinstance(value["code"], str):
        return Arguments(value["code"], report=Report("json instead of code", "the code was taken out of its object"))
    return Arguments(text)


def _checked(text: str) -> Arguments:
    try:
        value = _read_json(text)
    except (ValueError, RecursionError) as error:
        return Arguments(text, "not json", Report("arguments not json", str(error)))
    if not isinstance(value, dict):
        detail = f"arguments are an object, not a {type(value).__name__}"
        return Arguments(text, "not an object", Report("arguments not json", detail))
    return Arguments(text)


def _read_json(text: str) -> Any:
    """Raises ValueError or RecursionError."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
