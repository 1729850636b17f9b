"""One automaton for a legal turn of the assistant: which channels, whom it may call, with what, how it answers.

    turn    = (reasoning | preamble)* (answer | call)
    reasoning, preamble: <|channel|>analysis<|message|>text<|end|><|start|>assistant, or the same on commentary
    answer  = <|channel|>final<|message|>text or the response format<|return|>
    call    = <|channel|>commentary to=functions.name <|constrain|>json<|message|>{…}<|call|>, or on the tool's channel

A turn begins after the prompt's `<|start|>assistant`. The recipient may stand before `<|channel|>` as well, and the
type of the content may be missing or written without `<|constrain|>`: gpt-oss writes all of these. Preambles exist
where there is somebody to call. With parallel calls, further calls follow in the same turn, and `<|return|>` ends it.

llguidance does the matching, on bytes: any tokens that spell a legal turn are legal, and what is forced is forced in
the tokens that the tokeniser would make of it. Whatever a client's schema, regex or grammar asks for that cannot be
enforced is refused (SchemaError, UsageError) when the `TurnGrammar` is made; none of them can let a control token in.

A `TurnGrammar` is what the engine's `Request.constraint` wants: each call makes the constraint of one sample. Making
one takes milliseconds without Python's lock, after `prepare` has read the vocabulary (1.4 s for gpt-oss's, once).
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from freehold.errors import RequestError, UsageError
from freehold.formats.harmony.offer import Callee, Offer
from freehold.formats.harmony.schema import Clean, enforceable, locate, object_schema
from freehold.formats.harmony.vocabulary import HarmonyVocabulary
from freehold.formats.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# Spaces and lines as models set JSON: one space, or a line and its indentation. More could go on for ever.
_STYLE = {"whitespace_pattern": r" |\n[ \t]{0,40}", "json_allow_general_unicode_escapes": True}
_ANY_OBJECT = {"type": "object", "x-guidance": _STYLE}

_MAX_FORM_CHARACTERS = 20_000

_CHARACTER_TOKENS = 4
"""A character has at most so many bytes, and so tokens."""


# --- what is asked for --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JsonObject:
    """The answer is any JSON object."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """The answer is JSON that matches this schema."""

    schema: Mapping[str, Any] | bool


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole answer matches this regular expression, in the syntax of Rust's `regex`, without look-around."""

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UsageError(f"a regex must be a string, got {self.pattern!r:.80}")


@dataclass(frozen=True, slots=True)
class Lark:
    """The answer follows this grammar, in llguidance's variant of Lark, from its rule `start`.

    Without what reaches beyond text: references to tokens or other grammars, `~`, `%json`, `%llguidance`.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UsageError(f"a Lark grammar must be a string, got {self.text!r:.80}")


AnswerFormat = JsonObject | JsonSchema | Regex | Lark


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The turn ends in a call to this one: the full recipient, such as `functions.get_weather`."""

    recipient: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOptions:
    """What a turn may be. Raises UsageError, naming the value, when made.

    `max_reasoning_tokens` counts the text of all reasoning in the turn. When it is spent the message is closed, and
    no other of its kind begins; a character that is not finished by then still is, within 3 tokens.
    """

    offer: Offer
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = False
    response_format: AnswerFormat | None = None
    reasoning: Literal["optional", "required"] = "optional"
    max_reasoning_tokens: int | None = None

    def __post_init__(self) -> None:
        choice, budget = self.tool_choice, self.max_reasoning_tokens
        if not isinstance(self.response_format, AnswerFormat | None):
            raise UsageError(
                "response_format must be JsonObject(), JsonSchema(...), Regex(...) or Lark(...), got "
                f"{self.response_format!r:.80}"
            )
        if isinstance(choice, NamedTool):
            if choice.recipient not in self.offer.callees:
                raise UsageError(f"tool_choice names {choice.recipient!r}, which is not among the offered tools")
        elif choice not in ("none", "auto", "required"):
            raise UsageError(f"tool_choice must be none, auto, required or one offered tool, got {choice!r}")
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
        return tuple(self.offer.callees.values())

    @property
    def may_answer(self) -> bool:
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
        vocabulary = prepare(tokenizer)
        parts = _Parts(options)
        try:
            self._prototypes = [
                _compile(vocabulary, parts.grammar(reasoning=reasoning))
                for reasoning, needed in (
                    (True, options.max_reasoning_tokens != 0),
                    (False, options.max_reasoning_tokens is not None),
                )
                if needed
            ]
        except UsageError:
            parts.blame(vocabulary)
            raise
        parts.rehearse(vocabulary)

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


class TurnConstraint:
    """What one sample may say next; the engine's `TokenConstraint`. Raises RequestError where the grammar gives up."""

    __slots__ = (
        "_after_reasoning",
        "_closing",
        "_cutters",
        "_header",
        "_known",
        "_left",
        "_matcher",
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
        self._matcher = matcher
        self._after_reasoning = after_reasoning
        self._left = reasoning_tokens
        self._tokenizer = tokenizer
        self._known = HarmonyVocabulary.of(tokenizer)
        self._opening = opening
        self._cutters = cutters
        self._closing: list[int] = []  # of the opening, what is still to come
        self._header: list[int] | None = []  # of the message, while it lasts
        self._tail: bytes | None = None  # of the reasoning, while it lasts: its last, unfinished character

    def fill_mask(self, row: Any) -> None:
        """`row` is any writable buffer of 32-bit words; a bit for each token that may come next."""
        if self._closing:
            mask = (1 << self._closing[0]).to_bytes(len(memoryview(row).cast("B")), "little")
        else:
            mask = self._matcher.compute_bitmask()
            self._check("compute what may come next")
            if self._left is not None and self._left <= 0 and self._tail:
                mask = _without(mask, self._cutters)
        words = memoryview(row).cast("B")
        words[: len(mask)] = mask[: len(words)]
        words[len(mask) :] = bytes(max(0, len(words) - len(mask)))

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokeniser would write them."""
        if self._closing:
            return list(self._closing)
        if self._matcher.is_stopped():
            return []
        forced = self._matcher.compute_ff_tokens()
        self._check("compute what must come next")
        return forced

    def accept(self, token: int) -> None:
        if self._closing:
            if token != self._closing[0]:
                raise RequestError(f"token {token} cannot come here: the reasoning is being closed")
            del self._closing[0]
            return
        if not self._matcher.consume_token(token):
            raise RequestError(f"token {token} cannot come here: {_first_line(self._matcher.get_error())}")
        if self._matcher.is_stopped() and token not in (self._known.return_, self._known.call):
            raise RequestError("the grammar given for the answer leads nowhere from here")
        if self._left is not None:
            self._count(token)

    def is_finished(self) -> bool:
        return not self._closing and self._matcher.is_stopped()

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

    def _check(self, purpose: str) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot {purpose}: {_first_line(self._matcher.get_error())}")


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


class _Parts:
    """The grammars that a turn is put together from: its structure in Lark, JSON and answers by name."""

    def __init__(self, options: TurnOptions) -> None:
        self._options = options
        self._named: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, tuple[str, Any]] = {}
        self._rules = list(self._write())

    def grammar(self, *, reasoning: bool) -> str:
        """The whole, for llguidance. Without reasoning it describes what may follow the reasoning."""
        parts = ["preamble"] if self._options.callees else []
        before = " | ".join([*parts, "reasoning"] if reasoning else parts)
        start = f"({before})* last" if before else "last"
        if reasoning and self._options.reasoning == "required":
            start = f"reasoning {start}"
        lark = "\n".join([f"start: {start}", *self._rules])
        named = [{"name": name, **part} for name, part in self._named.items()]
        return json.dumps({"grammars": [{"lark_grammar": lark}, *named]})

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
            yield from self._answer()
        if callees:
            yield f"call: ({' | '.join(f'call{index}' for index in range(len(callees)))}) <|call|>"
        for index, callee in enumerate(callees):
            recipient, channel = f" to={callee.recipient}", callee.channel
            body = self._arguments(index, callee)
            header = f'(<|channel|> "{channel}{recipient}" | "{recipient}" <|channel|> "{channel}")'
            kind = "json" if callee.is_function else "code" if callee.tool is None else "(json | code)"
            yield f"call{index}: {header} {kind} <|message|> {body}"

    def _arguments(self, index: int, callee: Callee) -> str:
        tool = callee.tool
        if tool is None:
            return "TEXT"
        if not tool.strict:
            self._named["any_object"] = {"json_schema": _ANY_OBJECT}
            return "@any_object"
        what = f"the parameters of {callee.recipient}"
        schema = {"type": "object", "additionalProperties": False} if tool.parameters is None else tool.parameters
        return self._part(f"call{index}", _json(object_schema(schema, what)), what, schema)

    def _answer(self) -> Iterator[str]:
        body = "TEXT"
        match self._options.response_format:
            case JsonObject():
                body = self._part("answer", {"json_schema": _ANY_OBJECT}, "the response format")
            case JsonSchema(schema=schema):
                what = "the response format"
                body = self._part("answer", _json(enforceable(schema, what)), what, schema)
            case Regex(pattern=pattern):
                _check_length("the regex", pattern)
                lark = f"start: ANSWER\nANSWER: /{_in_lark(pattern)}/"
                body = self._part("answer", {"lark_grammar": lark}, f"the regex {pattern!r:.80}")
            case Lark(text=text):
                _check_length("the Lark grammar", text)
                _check_lark(text)
                body = self._part("answer", {"lark_grammar": text}, "the Lark grammar")
        yield f'answer: <|channel|> "final" <|message|> {body} <|return|>'

    def _part(self, name: str, grammar: dict[str, Any], what: str, schema: Any = None) -> str:
        self._named[name], self._sources[name] = grammar, (what, schema)
        return f"@{name}"

    def blame(self, vocabulary: "llguidance.LLTokenizer") -> None:
        """Raise SchemaError or UsageError for the part that llguidance does not take, if it is a client's."""
        for name, (what, schema) in self._sources.items():
            if not (complaint := _complaint(vocabulary, self._named[name])):
                continue
            if schema is not None:
                raise locate(schema, what, lambda part: _complaint(vocabulary, _json(part)))
            raise UsageError(f"{what} cannot be enforced: {complaint}")

    def rehearse(self, vocabulary: "llguidance.LLTokenizer") -> None:
        """Raise UsageError for a regex or a Lark grammar that gives up, or leads nowhere, at the very beginning."""
        for name, (what, _) in self._sources.items():
            if "lark_grammar" not in self._named[name]:
                continue
            matcher = _compile(vocabulary, json.dumps({"grammars": [self._named[name]]}))
            matcher.compute_bitmask()
            if matcher.is_error():
                reason = _first_line(matcher.get_error()).replace("NoExtensionBias", "no text matches it")
                raise UsageError(f"{what} cannot be enforced: {reason}")


def _json(clean: Clean) -> dict[str, Any]:
    return {"json_schema": {**_as_dict(clean), "x-guidance": _STYLE}}


def _as_dict(clean: Clean) -> dict[str, Any]:
    if isinstance(clean, dict):
        return clean
    return {} if clean else {"allOf": [False]}


def _check_length(what: str, text: str) -> None:
    if len(text) > _MAX_FORM_CHARACTERS:
        raise UsageError(
            f"{what} has {len(text):,} characters; {_MAX_FORM_CHARACTERS:,} are the most that can be followed"
        )


def _in_lark(pattern: str) -> str:
    """A regex as it can stand between two slashes."""
    pieces = re.findall(r"\\.|[^\\]", pattern, re.DOTALL)
    if len("".join(pieces)) != len(pattern):
        raise UsageError(f"the regex {pattern!r:.80} ends in a backslash")
    # A pattern of nothing would be a comment.
    return "".join({"/": r"\/", "\n": r"\n"}.get(piece, piece) for piece in pieces) or "(?:)"


_LARK_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\])+/')
_BEYOND_TEXT = re.compile(r"<[^>]*>?|@|~|%(?!ignore\b|import\b|regex\b)\S*|\b(?:stop|max_tokens|temperature)\b\s*=")


def _check_lark(text: str) -> None:
    """Raises UsageError for what could let a control token in, or end the answer otherwise than by its end."""
    if found := _BEYOND_TEXT.search(_LARK_TEXT.sub('""', text)):
        raise UsageError(
            f"the Lark grammar uses {found[0]!r:.40}, which reaches beyond the text of an answer; describe it with "
            "strings, regexes and rules"
        )


# --- llguidance ---------------------------------------------------------------------------------------------

_preparing = threading.Lock()


def prepare(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    """The vocabulary as llguidance wants it; made once, which takes a second or two for a large one."""
    with _preparing:
        return _prepare(tokenizer)


@lru_cache(maxsize=4)
def _prepare(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    import llguidance

    return llguidance.LLTokenizer(_Vocabulary(tokenizer))  # type: ignore[arg-type]


class _Vocabulary:
    """What llguidance asks of a tokeniser; it knows it by the attribute's name."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        control = tokenizer.control_tokens
        self.tokens = tokenizer.all_token_bytes()
        for name, token in control.items():
            self.tokens[token] = name.encode()
        self.special_token_ids = sorted(control.values())
        # llguidance lets one token follow where a grammar is at its end. Ours end with tokens of their own, so this is
        # one that no model has.
        self.eos_token_id = len(self.tokens)
        self.tokens.append(b"")
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _compile(vocabulary: "llguidance.LLTokenizer", grammar: str) -> "llguidance.LLMatcher":
    """Raises UsageError. Takes no Python lock while it works."""
    import llguidance

    limits = llguidance.LLParserLimits(
        max_items_in_row=5_000,  # optional properties take 4 each
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_lexer_states=50_000,  # of 2 kB
        verbose_errors=False,  # they would quote the grammar and what the model said
    )
    try:
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
            raise
        raise UsageError(f"llguidance gave up on the grammar: {_first_line(str(error))}") from None
    complaints = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
    if complaints:
        raise UsageError(f"the grammar cannot be enforced: {_first_line(complaints[0])}")
    return matcher


def _complaint(vocabulary: "llguidance.LLTokenizer", grammar: dict[str, Any]) -> str:
    """What llguidance has against a grammar, "" for nothing."""
    try:
        _compile(vocabulary, json.dumps({"grammars": [grammar]}))
    except UsageError as error:
        return str(error).partition(": ")[2]
    return ""


def _first_line(text: str) -> str:
    """Of an error of several lines the one that says what is wrong."""
    lines = text.strip().splitlines() or [""]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
