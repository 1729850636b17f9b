"""A small vocabulary, for the grammars of tools."""

import pytest

from freehold.formats.byte_level import CHARACTERS
from freehold.formats.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """Of all bytes and ChatML's tokens; 2 ends a text."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*control, *CHARACTERS, "**", "***"]
    types = [3 if token in control else 1 for token in tokens]
    return Tokenizer.from_gguf(tokens=tokens, token_types=types, merges=["* *", "** *"], pre="smollm")
