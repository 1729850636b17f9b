"""One automaton for a legal turn of the assistant: which channels, whom it may call, with what, how it answers.

    turn    = (reasoning | preamble)* (answer | call)
    reasoning, preamble: <|channel|>analysis<|message|>text<|end|><|start|>assistant, or the same on commentary
    answer  = <|channel|>final<|message|>text or the response format<|return|>
    call    = <|channel|>commentary to=functions.name <|constrain|>json<|message|>{…}<|call|>, or on the tool's channel

A turn begins after the prompt's `<|start|>assistant`. The recipient may stand before `<|channel|>` as well, and the
type of the content may be missing or written without `<|constrain|>`: gpt-oss writes all of these. What is sent text
is sent no JSON: it is of the type "code", or of none. Preambles exist where there is somebody to call. With parallel
calls, further calls follow in the same turn, and `<|return|>` ends it.

A `TurnGrammar` is what the engine's `Request.constraint` wants: each call makes the constraint of one sample. What it
refuses, and what making one costs, is told in `guidance.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from freehold.errors import RequestError, UsageError
from freehold.formats.forms import AnswerFormat, FreeText, check_answer_format
from freehold.formats.guidance import MatcherConstraint, Parts
from freehold.formats.harmony.offer import Callee, Offer
from freehold.formats.harmony.vocabulary import HarmonyVocabulary
from freehold.formats.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

_CHARACTER_TOKENS = 4
"""A character has at most so many bytes, and so tokens."""


# --- what is asked for --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The turn ends in a call to this one: the full recipient, such as `functions.get_weather`."""

    recipient: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedTools:
    """Of the offered tools only these may be called, by their full recipients; all stay described to the model. Where
    a call is not `required` the model may answer instead."""

    recipients: tuple[str, ...]
    required: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.recipients, tuple) or not self.recipients:
            raise UsageError(f"allowed tools are a tuple of one recipient at least, got {self.recipients!r:.80}")
        if not isinstance(self.required, bool):
            raise UsageError(f"required is True or False, got {self.required!r:.40}")


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOptions:
    """What a turn may be. Raises UsageError, naming the value, when made.

    `max_reasoning_tokens` counts the text of all reasoning in the turn. When it is spent the message is closed, and
    no other of its kind begins; a character that is not finished by then still is, within 3 tokens.
    """

    offer: Offer
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = False
    response_format: AnswerFormat | None = None
    reasoning: Literal["optional", "required"] = "optional"
    max_reasoning_tokens: int | None = None

    def __post_init__(self) -> None:
        choice, budget = self.tool_choice, self.max_reasoning_tokens
        if self.response_format is not None:
            check_answer_format(self.response_format)
        if isinstance(choice, NamedTool | AllowedTools):
            named = (choice.recipient,) if isinstance(choice, NamedTool) else choice.recipients
            for recipient in named:
                if recipient not in self.offer.callees:
                    raise UsageError(f"tool_choice names {recipient!r}, which is not among the offered tools")
        elif choice not in ("none", "auto", "required"):
            raise UsageError(f"tool_choice must be none, auto, required or offered tools, got {choice!r}")
        elif choice == "required" and not self.offer.callees:
            raise UsageError("tool_choice is required, but no tools are offered")
        if self.reasoning not in ("optional", "required"):
            raise UsageError(f"reasoning must be optional or required, got {self.reasoning!r}")
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
            raise UsageError(f"max_reasoning_tokens must be a whole number from 0 on, got {budget!r}")
        if budget == 0 and self.reasoning == "required":
            raise UsageError("reasoning is required, but max_reasoning_tokens is 0")

    @property
    def callees(self) -> Sequence[Callee]:
        """Who may be called."""
        match self.tool_choice:
            case "none":
                return ()
            case NamedTool(recipient=recipient):
                return (self.offer.callees[recipient],)
            case AllowedTools(recipients=recipients):
                return tuple(callee for callee in self.offer.callees.values() if callee.recipient in recipients)
        return tuple(self.offer.callees.values())

    @property
    def may_answer(self) -> bool:
        if isinstance(self.tool_choice, AllowedTools):
            return not self.tool_choice.required
        return self.tool_choice in ("none", "auto")


# --- the grammar --------------------------------------------------------------------------------------------


class TurnGrammar:
    """Compiled once; each call makes the constraint of one sample. Safe to share between threads.

    `stop_ids` are the tokens that end a turn: what the request is to stop on.
    """

    __slots__ = ("_cutters", "_opening", "_prototypes", "_reasoning_tokens", "_tokenizer", "stop_ids")

    stop_ids: frozenset[int]

    def __init__(self, tokenizer: Tokenizer, options: TurnOptions) -> None:
        """Raises SchemaError or UsageError for what cannot be enforced."""
        known = HarmonyVocabulary.of(tokenizer)
        self._tokenizer = tokenizer
        self._reasoning_tokens = options.max_reasoning_tokens
        # Here and not where a budget ends: the first time takes a tenth of a second.
        self._cutters = b"" if options.max_reasoning_tokens is None else _character_cutters(tokenizer)
        self._opening = (known.end, known.start, *tokenizer.encode("assistant"))
        self.stop_ids = frozenset({known.return_} if options.parallel_tool_calls else {known.return_, known.call})
        structure = _Structure(options)
        self._prototypes = structure.parts.compile(
            tokenizer,
            *(
                structure.lark(reasoning=reasoning)
                for reasoning, needed in (
                    (True, options.max_reasoning_tokens != 0),
                    (False, options.max_reasoning_tokens is not None),
                )
                if needed
            ),
        )

    def __call__(self) -> "TurnConstraint":
        first, *after_reasoning = self._prototypes
        return TurnConstraint(
            first.deep_copy(),
            after_reasoning=after_reasoning[0] if after_reasoning else None,
            reasoning_tokens=self._reasoning_tokens,
            tokenizer=self._tokenizer,
            opening=self._opening,
            cutters=self._cutters,
        )


class TurnConstraint(MatcherConstraint):
    """What one sample may say next, and that its reasoning keeps to its budget."""

    __slots__ = (
        "_after_reasoning",
        "_closing",
        "_cutters",
        "_header",
        "_known",
        "_left",
        "_opening",
        "_tail",
        "_tokenizer",
    )

    def __init__(
        self,
        matcher: "llguidance.LLMatcher",
        *,
        after_reasoning: "llguidance.LLMatcher | None",
        reasoning_tokens: int | None,
        tokenizer: Tokenizer,
        opening: tuple[int, ...],
        cutters: bytes,
    ) -> None:
        """Made by `TurnGrammar`. `after_reasoning` matches what follows `opening` once the reasoning is over; `cutters`
        are the tokens that must not be its last."""
        self._known = known = HarmonyVocabulary.of(tokenizer)
        super().__init__(matcher, ends=frozenset({known.return_, known.call}))
        self._after_reasoning = after_reasoning
        self._left = reasoning_tokens
        self._tokenizer = tokenizer
        self._opening = opening
        self._cutters = cutters
        self._closing: list[int] = []  # of the opening, what is still to come
        self._header: list[int] | None = []  # of the message, while it lasts
        self._tail: bytes | None = None  # of the reasoning, while it lasts: its last, unfinished character

    def forced(self) -> list[int]:
        return list(self._closing) if self._closing else super().forced()

    def accept(self, token: int) -> None:
        if self._closing:
            if token != self._closing[0]:
                raise RequestError(f"token {token} cannot come here: the reasoning is being closed")
            del self._closing[0]
            return
        super().accept(token)
        if self._left is not None:
            self._count(token)

    def is_finished(self) -> bool:
        return not self._closing and super().is_finished()

    def _mask(self) -> bytes:
        if self._closing:
            token = self._closing[0]
            return bytes(token // 8) + bytes((1 << token % 8,))
        mask = super()._mask()
        if self._left is not None and self._left <= 0 and self._tail:
            mask = _without(mask, self._cutters)
        return mask

    def _count(self, token: int) -> None:
        """Count the tokens of reasoning; close it when there are enough of them."""
        assert self._left is not None
        if token == self._known.start:
            self._header, self._tail = [], None
        elif token == self._known.message:
            reasons = self._tokenizer.decode(self._header or []).removeprefix("assistant") == "analysis"
            self._header, self._tail = None, b"" if reasons else None
        elif self._header is not None:
            self._header.append(token)
        elif self._tail is not None:
            if token == self._known.end:
                self._tail = None
            else:
                self._left -= 1
                self._tail = _unfinished(self._tail + self._tokenizer.token_bytes(token))
        if self._tail is None or self._left > 0:
            return
        if not self._tail or self._left <= 1 - _CHARACTER_TOKENS:
            self._close_reasoning()

    def _close_reasoning(self) -> None:
        assert self._after_reasoning is not None
        self._matcher = self._after_reasoning.deep_copy()
        self._closing = list(self._opening)
        self._left = None


def _without(mask: bytes, others: bytes) -> bytes:
    """A mask without the tokens of another one; as it is where that leaves none."""
    rest = int.from_bytes(mask, "little") & ~int.from_bytes(others, "little")
    return rest.to_bytes(len(mask), "little") if rest else mask


@lru_cache(maxsize=4)
def _character_cutters(tokenizer: Tokenizer) -> bytes:
    """A mask of the tokens that begin a character and do not finish it."""
    mask = bytearray(-(-tokenizer.vocab_size // 8))
    for token, data in enumerate(tokenizer.all_token_bytes()):
        if data and data[-1] >= 0x80 and _unfinished(data):
            mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end of some text that are the beginning of a character."""
    for length in range(1, min(_CHARACTER_TOKENS, len(data) + 1)):
        first = data[-length]
        if first >= 0xC0:
            return data[-length:] if length < 2 + (first >= 0xE0) + (first >= 0xF0) else b""
        if first < 0x80:
            break
    return b""


# --- writing it down ----------------------------------------------------------------------------------------


class _Structure:
    """A turn in Lark, and the parts that it names."""

    def __init__(self, options: TurnOptions) -> None:
        self.parts = Parts()
        self._options = options
        self._rules = list(self._write())

    def lark(self, *, reasoning: bool) -> str:
        """The whole. Without reasoning it describes what may follow the reasoning."""
        parts = ["preamble"] if self._options.callees else []
        before = " | ".join([*parts, "reasoning"] if reasoning else parts)
        start = f"({before})* last" if before else "last"
        if reasoning and self._options.reasoning == "required":
            start = f"reasoning {start}"
        return "\n".join([f"start: {start}", *self._rules])

    def _write(self) -> Iterator[str]:
        callees = self._options.callees
        yield "TEXT: /(?s:.*)/"
        yield 'next: <|end|> <|start|> "assistant"'
        yield 'reasoning: <|channel|> "analysis" <|message|> TEXT next'
        yield 'preamble: <|channel|> "commentary" <|message|> TEXT next'
        yield 'json: (" "? <|constrain|> "json" | " json")?'
        yield 'code: (" "? <|constrain|> "code" | " code")?'
        endings = ["answer"] if self._options.may_answer else []
        if callees:
            calls = 'call (<|start|> "assistant" call)* <|return|>'
            endings.append(calls if self._options.parallel_tool_calls else "call")
        yield f"last: {' | '.join(endings)}"
        if self._options.may_answer:
            form = self._options.response_format
            body = "TEXT" if form is None else self.parts.form("answer", form)
            yield f'answer: <|channel|> "final" <|message|> {body} <|return|>'
        if callees:
            yield f"call: ({' | '.join(f'call{index}' for index in range(len(callees)))}) <|call|>"
        for index, callee in enumerate(callees):
            recipient, channel = f" to={callee.recipient}", callee.channel
            body = self._arguments(index, callee)
            header = f'(<|channel|> "{channel}{recipient}" | "{recipient}" <|channel|> "{channel}")'
            kind = "code" if not callee.takes_json else "json" if callee.is_function else "(json | code)"
            yield f"call{index}: {header} {kind} <|message|> {body}"

    def _arguments(self, index: int, callee: Callee) -> str:
        tool = callee.tool
        if tool is None or isinstance(tool.text_format, FreeText):
            return "TEXT"
        if tool.text_format is not None:
            return self.parts.form(f"call{index}", tool.text_format, owner=f" of {callee.recipient}")
        if not tool.strict:
            return self.parts.any_object()
        schema = {"type": "object", "additionalProperties": False} if tool.parameters is None else tool.parameters
        return self.parts.arguments(f"call{index}", schema, f"the parameters of {callee.recipient}")
