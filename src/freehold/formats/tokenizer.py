"""Text to token ids and back, for byte-level BPE vocabularies, on the `tokenizers` library.

Control tokens (`<|start|>` and the like) live apart from the vocabulary that text is encoded with: not in its
merges, not among its added tokens, not even in its table of words. So `encode` cannot produce one, whatever
the text says. Only `encode_with_control`, for text that the program itself wrote, knows their names.

Refuses other kinds of tokenisers (SentencePiece, WordPiece) and normalisers, which would change the text.
Adds no begin-of-text token of its own accord: chat formats say what a prompt begins with.
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models

from freehold.disk import write_text
from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.formats import byte_level, o200k

# What a file does not mark special but is plainly no prose: <|im_start|>, </tool_call>, [INST]. Typed by a
# user, it has to stay text just the same.
_CONTROL_LIKE = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
# What no merge makes: control tokens that careless converters to GGUF call normal.
_CONTROL_SHAPE = re.compile(r"<\|[^<>|\s]+\|>")

_REPLACEMENT = "\ufffd"

Control = Literal["omit", "show"]
_T = TypeVar("_T")


class GgufVocabulary(NamedTuple):
    """A vocabulary as GGUF files hold it: what `Tokenizer.from_gguf` takes."""

    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    pre: str


class Tokenizer:
    """One vocabulary. Immutable, and safe to share between threads."""

    __slots__ = (
        "_backend",
        "_control_names",
        "_control_pattern",
        "_seen_parts",
        "_text_tokens",
        "_unwritable",
        "control_tokens",
        "seen_texts",
        "vocab_size",
    )

    control_tokens: Mapping[str, int]
    vocab_size: int
    seen_texts: dict[int, str]
    """The text of every token met so far that is whole characters; "" for control tokens. `token_text` fills it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        control: Mapping[str, int],
        text_tokens: Mapping[int, AddedToken],
        vocab_size: int,
    ) -> None:
        """Use `from_file`, `from_gguf` or `o200k_harmony`; `backend` holds all but the control tokens."""
        self._backend = backend
        self._text_tokens = text_tokens
        self._control_names = {id_: name for name, id_ in control.items()}
        longest_first = sorted(control, key=len, reverse=True)
        self._control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._unwritable = _unwritable_bytes(backend)
        self.control_tokens = MappingProxyType(dict(control))
        self.vocab_size = vocab_size
        self.seen_texts = {}
        self._seen_parts: dict[int, bytes] = {}  # the same of tokens that are parts of characters

    # --- making one ---

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises CheckpointError or UnsupportedError, naming the file."""
        return _from_json(_read_json(Path(path)), str(path))

    @classmethod
    def from_gguf(
        cls, tokens: Sequence[str], token_types: Sequence[int], merges: Sequence[str], pre: str
    ) -> "Tokenizer":
        """From a GGUF's `tokenizer.ggml.tokens`, `.token_type`, `.merges`, `.pre`; its `.model` is "gpt2"."""
        if len(tokens) != len(token_types):
            raise CheckpointError(f"the GGUF names {len(tokens)} tokens, but {len(token_types)} token types")
        vocab: dict[str, int] = {}
        control: dict[str, int] = {}
        text_tokens: dict[int, AddedToken] = {}
        for id_, (token, kind) in enumerate(zip(tokens, token_types, strict=True)):
            match kind:
                case 1 | 4 if (_CONTROL_LIKE if kind == 4 else _CONTROL_SHAPE).fullmatch(token):
                    control[token] = id_
                case 1:
                    vocab[token] = id_
                case 4:  # "user defined": raw text that is always one token
                    vocab[token] = id_
                    text_tokens[id_] = AddedToken(token, normalized=False)
                case 2 | 3 | 5:  # unknown, control, unused
                    control[token] = id_
                case _:
                    raise UnsupportedError(f"GGUF token {id_} has type {kind}; byte-level BPE has types 1 to 5 only")
        if len({*vocab, *control}) != len(tokens):
            raise CheckpointError("the GGUF's vocabulary names a token twice; fetch the file again")
        return _assemble(
            "the GGUF",
            vocab=vocab,
            merges=[_pair(merge, "the GGUF") for merge in merges],
            words=byte_level.named_in_gguf(pre),
            control=control,
            text_tokens=text_tokens,
        )

    @classmethod
    def o200k_harmony(cls) -> "Tokenizer":
        """gpt-oss's vocabulary, from data inside this package. Made once per process (0.6 s)."""
        return _o200k_harmony()

    def with_control_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """The same vocabulary with new control tokens at its end; names it has already keep their ids."""
        control = dict(self.control_tokens)
        next_id = self.vocab_size
        for name in names:
            if not name or self._backend.token_to_id(name) is not None:
                raise UsageError(f"{name!r} cannot be a control token: it is {'a token of text' if name else 'empty'}")
            if name not in control:
                control[name] = next_id
                next_id += 1
        return Tokenizer(self._backend, control=control, text_tokens=self._text_tokens, vocab_size=next_id)

    # --- encoding ---

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; never a control token.

        A character that the vocabulary has no bytes for (SmolLM2's lacks a few) is encoded as U+FFFD. Raises
        UsageError for a lone surrogate, which is no character.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at index {error.start}, "
                "which is no character; remove it or decode the text properly"
            ) from None
        if self._unwritable and len(data.translate(None, self._unwritable)) != len(data):
            text = "".join(_REPLACEMENT if set(c.encode()) & set(self._unwritable) else c for c in text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_control(self, text: str, *, marker: str = "") -> list[int]:
        """Like `encode`, but names of control tokens become those tokens: not for text a user had a hand in.

        `marker` is taken out of the text after control tokens were found (see `templates.py`).
        """
        ids: list[int] = []
        for index, piece in enumerate(self._control_pattern.split(text)):
            if index % 2:
                ids.append(self.control_tokens[piece])
            elif plain := piece.replace(marker, "") if marker else piece:
                ids.extend(self.encode(plain))
        return ids

    # --- decoding ---

    def decode(self, ids: Iterable[int], *, control: Control = "omit") -> str:
        """The text of token ids; bytes that are no UTF-8, and ids that are no tokens, become U+FFFD."""
        return self.decode_bytes(ids, control=control).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, control: Control = "omit") -> bytes:
        """What `decode` decodes; may begin or end inside a character."""
        return b"".join(self._bytes(id_, control) for id_ in ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text: none for a control token. Raises UsageError for an unknown id."""
        if token_id in self._control_names:
            return b""
        if token_id in self._text_tokens:
            return str(self._text_tokens[token_id].content).encode()
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            raise UsageError(f"no token has the id {token_id}; this vocabulary has {self.vocab_size}")
        return byte_level.to_bytes(token)

    def token_text(self, token_id: int) -> str | None:
        """The text of a token: "" for a control token, None for parts of characters and for no token at all."""
        text = self.seen_texts.get(token_id)
        if text is not None or token_id in self._seen_parts:
            return text
        try:
            written = self.token_bytes(token_id)
        except UsageError:
            return None
        try:
            text = self.seen_texts[token_id] = written.decode()
        except UnicodeDecodeError:
            self._seen_parts[token_id] = written
        return text

    def is_token(self, token_id: int) -> bool:
        """Whether the vocabulary has a token of this id; models may have more rows than that."""
        return self.token_text(token_id) is not None or token_id in self._seen_parts

    def all_token_bytes(self) -> list[bytes]:
        """`token_bytes` of every id below `vocab_size`, b"" for ids that are no tokens."""
        found = [b""] * self.vocab_size
        for token, id_ in self._backend.get_vocab(with_added_tokens=False).items():
            found[id_] = byte_level.to_bytes(token)
        for id_, added in self._text_tokens.items():
            found[id_] = str(added.content).encode()
        return found

    def control_id(self, name: str) -> int:
        """The id of a control token. Raises UsageError where the vocabulary has none of this name."""
        if name not in self.control_tokens:
            raise UsageError(f"this vocabulary has no control token {name!r}")
        return self.control_tokens[name]

    def control_name(self, token_id: int) -> str | None:
        """The name of a control token, None for all other ids."""
        return self._control_names.get(token_id)

    def _bytes(self, token_id: int, control: Control) -> bytes:
        if part := self._seen_parts.get(token_id):
            return part
        if name := self._control_names.get(token_id):
            return name.encode() if control == "show" else b""
        try:
            return self.token_bytes(token_id)
        except UsageError:  # models may have more rows than the vocabulary has tokens
            return _REPLACEMENT.encode()

    # --- keeping it ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` that transformers and `from_file` read as this same vocabulary."""
        raw = json.loads(self._backend.to_str())
        vocab: dict[str, int] = raw["model"]["vocab"]
        # Readers number added tokens onwards from the vocabulary's length, so only an unbroken tail of
        # control tokens may stay outside of it, as in published files.
        tail = self.vocab_size
        while tail - 1 in self._control_names:
            tail -= 1
        inside = {name: id_ for name, id_ in self.control_tokens.items() if id_ < tail}
        vocab.update(inside if len(vocab) + len(inside) == tail else self.control_tokens)
        raw["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
        added = [
            *raw["added_tokens"],
            *(_control_entry(name, id_) for name, id_ in self.control_tokens.items()),
        ]
        raw["added_tokens"] = sorted(added, key=lambda token: int(token["id"]))
        write_text(Path(path), json.dumps(raw, ensure_ascii=False))

    def to_gguf(self, *, num_tokens: int) -> GgufVocabulary:
        """As llama.cpp reads it, with unused tokens up to `num_tokens`, the rows of the model's embedding.

        Raises UnsupportedError where llama.cpp would encode text otherwise.
        """
        model = json.loads(self._backend.to_str())["model"]
        tokens, types = [f"[PAD{id_}]" for id_ in range(num_tokens)], [5] * num_tokens
        for token, id_ in model["vocab"].items():
            tokens[id_], types[id_] = token, 1
        for id_, added in self._text_tokens.items():
            if added.single_word or added.lstrip or added.rstrip:
                raise UnsupportedError(
                    f"GGUF cannot say that token {added.content!r} looks at the text around it (single_word, lstrip, "
                    "rstrip); take these flags out of tokenizer.json"
                )
            tokens[id_], types[id_] = str(added.content), 4
        for name, id_ in self.control_tokens.items():
            tokens[id_], types[id_] = name, 3
        pre = byte_level.name_in_gguf(self._backend.pre_tokenizer)
        if model["ignore_merges"] is not byte_level.named_in_gguf(pre).ignores_merges:
            self._check_merges_reach_every_token(model, pre)
        # Space is no byte's character: a merge that has one is never applied, and would be read as another.
        merges = [f"{left} {right}" for left, right in model["merges"] if " " not in left + right]
        return GgufVocabulary(tokens, types, merges, pre)

    def _check_merges_reach_every_token(self, model: Mapping[str, Any], pre: str) -> None:
        """Then it makes no difference whether words that are tokens are looked up before merging."""
        merging = models.BPE(vocab=model["vocab"], merges=[(left, right) for left, right in model["merges"]])
        for token, id_ in model["vocab"].items():
            if id_ not in self._text_tokens and len(merging.tokenize(token)) != 1:
                raise UnsupportedError(
                    f"ignore_merges is {model['ignore_merges']} in this tokeniser and not so in llama.cpp's {pre!r}: "
                    f"{token!r} would become other tokens there; run the model with Freehold"
                )


class Detokenizer:
    """Token ids to text as they come: only whole characters come out, a character split over tokens waits.

    All that `feed` and `flush` return, in a row, is what `decode` makes of the same ids. Control tokens give
    no text.
    """

    __slots__ = ("_decoder", "_tokenizer", "is_waiting")

    is_waiting: bool
    """Whether a character is unfinished."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_waiting = False

    def feed(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        if not self.is_waiting and (text := self._tokenizer.token_text(token_id)) is not None:
            return text
        text = self._decoder.decode(self._tokenizer.decode_bytes((token_id,)))
        self.is_waiting = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What the unfinished rest reads as (U+FFFD or nothing); then ready for another text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self.is_waiting = False
        return rest


@cache
def _o200k_harmony() -> Tokenizer:
    data = o200k.load()
    # tiktoken looks a whole word up before it merges anything; the lookup saves time and changes no result.
    words = byte_level.WordSplit(byte_level.by_pattern(byte_level.O200K), ignores_merges=True)
    backend = _backend(data.vocab, data.merges, words, ())
    return Tokenizer(backend, control=data.control_tokens, text_tokens={}, vocab_size=o200k.VOCAB_SIZE)


# --- tokenizer.json -----------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model folder needs its tokenizer.json") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error}); fetch the file again") from None


def _from_json(raw: Any, source: str) -> Tokenizer:
    model = _field(raw, "model", dict, source)
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedError(f"{source}: the tokeniser is of type {kind!r}; Freehold reads byte-level BPE only")
    for name in ("dropout", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedError(f"{source}: {name} is {model[name]!r}; Freehold reads byte-level BPE without it")
    if raw.get("normalizer") is not None:
        raise UnsupportedError(f"{source}: the normaliser {raw['normalizer']!r:.80} would change the text")
    vocab = dict(_field(model, "vocab", dict, source))
    control, text_tokens = _added_tokens(raw, vocab, source)
    for name in control:
        vocab.pop(name, None)
    vocab.update((str(token.content), id_) for id_, token in text_tokens.items())
    return _assemble(
        source,
        vocab=vocab,
        merges=[_pair(merge, source) for merge in _field(model, "merges", list, source)],
        words=byte_level.WordSplit(
            byte_level.from_json(raw.get("pre_tokenizer"), source),
            ignores_merges=bool(model.get("ignore_merges", False)),
        ),
        control=control,
        text_tokens=text_tokens,
    )


def _added_tokens(
    raw: Mapping[str, Any], vocab: Mapping[str, int], source: str
) -> tuple[dict[str, int], dict[int, AddedToken]]:
    control: dict[str, int] = {}
    text_tokens: dict[int, AddedToken] = {}
    for entry in _field(raw, "added_tokens", list, source):
        name, id_ = _field(entry, "content", str, source), _field(entry, "id", int, source)
        if vocab.get(name, id_) != id_:
            raise CheckpointError(f"{source}: token {name!r} has the ids {vocab[name]} and {id_}; the file is damaged")
        flags = {flag: bool(entry.get(flag)) for flag in ("single_word", "lstrip", "rstrip")}
        if not entry.get("special") and not _CONTROL_LIKE.fullmatch(name):
            text_tokens[id_] = AddedToken(name, normalized=bool(entry.get("normalized")), **flags)
        elif any(flags.values()):
            raise UnsupportedError(f"{source}: control token {name!r} takes the text around it along (lstrip, rstrip)")
        else:
            control[name] = id_
    return control, text_tokens


def _field(raw: Any, name: str, kind: type[_T], source: str) -> _T:
    value = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(value, kind):
        raise CheckpointError(f"{source}: {name!r} is missing or damaged; fetch the file again")
    return value


def _pair(merge: Any, source: str) -> tuple[str, str]:
    match merge.split(" ") if isinstance(merge, str) else merge:
        case [str(left), str(right)]:
            return left, right
    raise CheckpointError(f"{source}: {merge!r} is no merge of two tokens; fetch the file again")


def _control_entry(name: str, id_: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": name, **flags, "special": True}


# --- both ---------------------------------------------------------------------------------------------------


def _assemble(
    source: str,
    *,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    words: byte_level.WordSplit,
    control: Mapping[str, int],
    text_tokens: Mapping[int, AddedToken],
) -> Tokenizer:
    """Check a foreign vocabulary and build the tokeniser; `vocab` holds no control tokens any more."""
    ids = [*vocab.values(), *control.values()]
    if not all(isinstance(id_, int) and id_ >= 0 for id_ in ids) or len(set(ids)) != len(ids):
        raise CheckpointError(f"{source}: token ids are not all different whole numbers; the file is damaged")
    written = (token for token, id_ in vocab.items() if id_ not in text_tokens)
    if foreign := byte_level.foreign_characters(written):
        raise UnsupportedError(f"{source}: not a byte-level vocabulary, it writes {min(foreign)!r} in its tokens")
    kept = []
    for left, right in merges:
        if left in vocab and right in vocab and left + right in vocab:
            kept.append((left, right))
        elif not {left, right, left + right} & control.keys():
            raise CheckpointError(f"{source}: merge {left!r} + {right!r} names an unknown token; the file is damaged")
    backend = _backend(vocab, kept, words, list(text_tokens.values()))
    return Tokenizer(backend, control=control, text_tokens=text_tokens, vocab_size=max(ids, default=-1) + 1)


def _backend(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    words: byte_level.WordSplit,
    text_tokens: Sequence[AddedToken],
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words.ignores_merges))
    backend.pre_tokenizer = words.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(text_tokens))
    return backend


def _unwritable_bytes(backend: tokenizers.Tokenizer) -> bytes:
    """Bytes of UTF-8 that the vocabulary has no token for."""
    in_utf_8 = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
    missing = bytes(byte for byte in in_utf_8 if backend.token_to_id(byte_level.CHARACTERS[byte]) is None)
    if set(missing) & set(_REPLACEMENT.encode()):
        raise UnsupportedError(f"the vocabulary lacks {len(missing)} of the bytes that text is made of")
    return missing
