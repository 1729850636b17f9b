"""llguidance, as everything here uses it: the vocabulary, grammars put together from parts, masks out of a matcher.

llguidance matches bytes: any tokens that spell a legal text are legal, and what is forced is forced in the tokens that
the tokeniser would make of it. Whatever a client's schema, regex or grammar asks for that cannot be enforced is refused
(SchemaError, UsageError) when it is compiled; none of them can let a control token in.

Called by `harmony/grammar.py` and `text_grammar.py`, which write the structure around a client's forms. Compiling takes
milliseconds without Python's lock, after `prepare` has read the vocabulary (1.4 s for gpt-oss's, once).
"""

import json
import re
import threading
from collections.abc import Set
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from freehold.errors import RequestError, UsageError
from freehold.formats.forms import AnswerFormat, Choice, JsonObject, JsonSchema, Lark, Regex
from freehold.formats.schema import Clean, enforceable, locate, object_schema
from freehold.formats.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# Spaces and lines as models set JSON: one space, or a line and its indentation. More could go on for ever.
_STYLE = {"whitespace_pattern": r" |\n[ \t]{0,40}", "json_allow_general_unicode_escapes": True}
_ANY_OBJECT = {"type": "object", "x-guidance": _STYLE}

_MAX_FORM_CHARACTERS = 20_000


# --- what may come next -------------------------------------------------------------------------------------


class MatcherConstraint:
    """What one sample may say next; the engine's `TokenConstraint`. Raises RequestError where the grammar gives up."""

    __slots__ = ("_ends", "_matcher")

    def __init__(self, matcher: "llguidance.LLMatcher", *, ends: Set[int]) -> None:
        """`ends` are the tokens that the grammar's texts end with; it has led nowhere where it stops otherwise."""
        self._matcher = matcher
        self._ends = ends

    def fill_mask(self, row: Any) -> None:
        """`row` is any writable buffer of 32-bit words; a bit for each token that may come next."""
        mask = self._mask()
        words = memoryview(row).cast("B")
        words[: len(mask)] = mask[: len(words)]
        words[len(mask) :] = bytes(max(0, len(words) - len(mask)))

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokeniser would write them."""
        if self._matcher.is_stopped():
            return []
        forced = self._matcher.compute_ff_tokens()
        self._check("compute what must come next")
        return forced

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise RequestError(f"token {token} cannot come here: {_first_line(self._matcher.get_error())}")
        if self._matcher.is_stopped() and token not in self._ends:
            raise RequestError("the grammar leads nowhere from here")

    def is_finished(self) -> bool:
        return self._matcher.is_stopped()

    def _mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        self._check("compute what may come next")
        return mask

    def _check(self, purpose: str) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot {purpose}: {_first_line(self._matcher.get_error())}")


# --- what a grammar is put together from --------------------------------------------------------------------


class Parts:
    """The forms in a grammar, by name: each method adds one and returns what stands for it in the structure's Lark."""

    def __init__(self) -> None:
        self._named: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, tuple[str, Any]] = {}

    def any_object(self) -> str:
        self._named["any_object"] = {"json_schema": _ANY_OBJECT}
        return "@any_object"

    def arguments(self, name: str, schema: Any, what: str) -> str:
        """A JSON object that matches the schema; `what` it is that errors are about."""
        return self._add(name, _json(object_schema(schema, what)), what, schema)

    def form(self, name: str, form: AnswerFormat, *, owner: str = "") -> str:
        """Text of this form, `owner` being whose it is where it is not the answer's: " of functions.f"."""
        match form:
            case JsonObject():
                return self.any_object()
            case JsonSchema(schema=schema):
                what = "the response format"
                return self._add(name, _json(enforceable(schema, what)), what, schema)
            case Regex(pattern=pattern):
                _check_length(f"the regex{owner}", len(pattern))
                lark = f"start: TEXT\nTEXT: /{_in_lark(pattern)}/"
                return self._add(name, {"lark_grammar": lark}, f"the regex {pattern!r:.80}{owner}")
            case Lark(text=text):
                what = f"the Lark grammar{owner}"
                _check_length(what, len(text))
                _check_lark(text, what)
                return self._add(name, {"lark_grammar": text}, what)
            case Choice(values=values):
                _check_length("the choice", sum(map(len, values)))
                # One terminal: alternatives of which some begin others are then told apart as a regex does.
                lark = f"start: TEXT\nTEXT: {' | '.join(map(json.dumps, dict.fromkeys(values)))}"
                return self._add(name, {"lark_grammar": lark}, "the choice")

    def _add(self, name: str, grammar: dict[str, Any], what: str, schema: Any = None) -> str:
        self._named[name], self._sources[name] = grammar, (what, schema)
        return f"@{name}"

    def compile(self, tokenizer: Tokenizer, *structures: str) -> "list[llguidance.LLMatcher]":
        """A matcher for each structure in Lark around these parts. Raises SchemaError or UsageError for a part that
        llguidance does not take, or that gives up or leads nowhere at its very beginning."""
        vocabulary = prepare(tokenizer)
        named = [{"name": name, **part} for name, part in self._named.items()]
        try:
            matchers = [
                _compile(vocabulary, json.dumps({"grammars": [{"lark_grammar": structure}, *named]}))
                for structure in structures
            ]
        except UsageError:
            self._blame(vocabulary)
            raise
        self._rehearse(vocabulary)
        return matchers

    def _blame(self, vocabulary: "llguidance.LLTokenizer") -> None:
        """Raise SchemaError or UsageError for the part that llguidance does not take, if it is a client's."""
        for name, (what, schema) in self._sources.items():
            if not (complaint := _complaint(vocabulary, self._named[name])):
                continue
            if schema is not None:
                raise locate(schema, what, lambda part: _complaint(vocabulary, _json(part)))
            raise UsageError(f"{what} cannot be enforced: {complaint}")

    def _rehearse(self, vocabulary: "llguidance.LLTokenizer") -> None:
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


def _check_length(what: str, length: int) -> None:
    if length > _MAX_FORM_CHARACTERS:
        raise UsageError(
            f"{what} has {length:,} characters; {_MAX_FORM_CHARACTERS:,} are the most that can be followed"
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


def _check_lark(text: str, what: str) -> None:
    """Raises UsageError for what could let a control token in, or end the text otherwise than by its end."""
    if found := _BEYOND_TEXT.search(_LARK_TEXT.sub('""', text)):
        raise UsageError(
            f"{what} uses {found[0]!r:.40}, which reaches beyond the text itself; describe it with strings, regexes "
            "and rules"
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
