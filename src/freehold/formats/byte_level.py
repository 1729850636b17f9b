"""Byte-level BPE's alphabet and its ways of cutting text into words before merging.

Byte-level vocabularies (GPT-2 and all after it) write each of the 256 bytes as one printable character, so
that a token is a plain string. Pre-tokenisers come from a GGUF's `tokenizer.ggml.pre` name or from a
`tokenizer.json`; whatever would change or drop text is refused (UnsupportedError). Called by `tokenizer.py`
and `o200k.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tokenizers import Regex, pre_tokenizers

from freehold.errors import CheckpointError, UnsupportedError


def _characters() -> str:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


CHARACTERS = _characters()
"""The character of each byte, at the byte's own index."""

_BYTE_OF = {character: byte for byte, character in enumerate(CHARACTERS)}


def to_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    return bytes(map(_BYTE_OF.__getitem__, token))


def foreign_characters(tokens: Iterable[str]) -> set[str]:
    """Characters that no byte is written as; a byte-level vocabulary has none."""
    return set().union(*tokens) - _BYTE_OF.keys()


class WordSplit(NamedTuple):
    """A pre-tokeniser, and whether a whole word that is a token is taken as it is, without merging."""

    pre_tokenizer: pre_tokenizers.PreTokenizer
    ignores_merges: bool


def by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Words are the matches of `pattern` (and what lies between them)."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# https://github.com/openai/tiktoken, tiktoken_ext/openai_public.py
O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Llama 3's tokenizer.json
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def named_in_gguf(pre: str) -> WordSplit:
    """What llama.cpp does for a `tokenizer.ggml.pre`. Raises UnsupportedError for a name not known here."""
    gpt_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match pre:
        case "gpt-2" | "default":  # files from before the name was written say nothing, or "default"
            return WordSplit(gpt_2, ignores_merges=False)
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return WordSplit(pre_tokenizers.Sequence([digits, gpt_2]), ignores_merges=False)
        case "gpt-4o":
            return WordSplit(by_pattern(O200K), ignores_merges=False)
        case "llama-bpe":
            return WordSplit(by_pattern(_LLAMA_3), ignores_merges=True)
    raise UnsupportedError(
        f"the GGUF's pre-tokeniser is {pre!r}; Freehold knows smollm, gpt-2, default, gpt-4o and llama-bpe"
    )


_WRITTEN_TO_GGUF = ("smollm", "gpt-2", "gpt-4o", "llama-bpe")


def name_in_gguf(pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """The `tokenizer.ggml.pre` under which llama.cpp cuts words so. Raises UnsupportedError where it has none."""
    for name in _WRITTEN_TO_GGUF:
        if named_in_gguf(name).pre_tokenizer.__getstate__() == pre_tokenizer.__getstate__():
            return name
    raise UnsupportedError(
        f"llama.cpp cuts text into words as {', '.join(_WRITTEN_TO_GGUF)} do, and this tokeniser in another way: "
        f"{pre_tokenizer.__getstate__().decode():.120}; run the model with Freehold"
    )


def from_json(raw: Any, source: str) -> pre_tokenizers.PreTokenizer:
    """The `pre_tokenizer` of a tokenizer.json; it must end in ByteLevel and must not change or drop text."""
    kinds = raw.get("pretokenizers") if isinstance(raw, Mapping) and raw.get("type") == "Sequence" else [raw]
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, Mapping) for kind in kinds):
        raise UnsupportedError(f"{source}: pre_tokenizer is {raw!r:.80}; Freehold reads byte-level BPE only")
    names = [kind.get("type") for kind in kinds]
    if names[-1] != "ByteLevel" or names.count("ByteLevel") > 1:
        raise UnsupportedError(f"{source}: pre_tokenizer is {names}; Freehold reads what ends in one ByteLevel")
    try:
        steps = [_step_from_json(kind, source) for kind in kinds]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: pre_tokenizer is damaged ({error!r}); fetch the file again") from None
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _step_from_json(raw: Mapping[str, Any], source: str) -> pre_tokenizers.PreTokenizer:
    match raw:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=raw.get("use_regex", True))
        case {"type": "Digits"}:
            return pre_tokenizers.Digits(individual_digits=raw["individual_digits"])
        case {"type": "Split", "behavior": behaviour, "pattern": pattern} if behaviour != "Removed":
            text = pattern["String"] if "String" in pattern else _regex(pattern["Regex"], source)
            return pre_tokenizers.Split(text, _SNAKE_CASE[behaviour], invert=raw.get("invert", False))
    raise UnsupportedError(f"{source}: Freehold does not do the pre-tokeniser {dict(raw)!r:.120}")


_SNAKE_CASE = {
    "Isolated": "isolated",
    "MergedWithPrevious": "merged_with_previous",
    "MergedWithNext": "merged_with_next",
    "Contiguous": "contiguous",
}


def _regex(pattern: str, source: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{source}: pre_tokenizer's pattern {pattern!r:.80} is no regex: {error}") from error
