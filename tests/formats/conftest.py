"""Small vocabularies for every test here, and openai-harmony as the oracle for gpt-oss's own."""

import gzip
import os
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from freehold.formats.byte_level import CHARACTERS
from freehold.formats.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def gpt_oss() -> Tokenizer:
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """openai-harmony's encoding, reading the same vocabulary from a folder."""
    import openai_harmony

    folder = tmp_path_factory.mktemp("tiktoken")
    packed = resources.files("freehold.formats").joinpath("data", "o200k_base.tiktoken.gz").read_bytes()
    Path(folder, "o200k_base.tiktoken").write_bytes(gzip.decompress(packed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TIKTOKEN_ENCODINGS_BASE", str(folder))
        name = openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS
        yield openai_harmony.load_harmony_encoding(name)


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
