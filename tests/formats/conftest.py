"""Small vocabularies for every test here."""

from collections.abc import Callable
from typing import Any

import pytest

from freehold.formats.byte_level import CHARACTERS
from freehold.formats.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def gpt_oss() -> Tokenizer:
    return Tokenizer.o200k_harmony()


SmallGguf = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def small_gguf() -> SmallGguf:
    """Makes the arguments of `Tokenizer.from_gguf`: a vocabulary of bytes, a few words, ChatML's tokens."""

    def make(**changes: Any) -> dict[str, Any]:
        merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "< |", "s t", "st a", "sta r", "star t"]
        control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = [*control, *CHARACTERS, *(merge.replace(" ", "") for merge in merges)]
        types = [3 if token in control else 1 for token in tokens]
        return {"tokens": tokens, "token_types": types, "merges": merges, "pre": "smollm", **changes}

    return make


@pytest.fixture(scope="session")
def small(small_gguf: SmallGguf) -> Tokenizer:
    return Tokenizer.from_gguf(**small_gguf())
