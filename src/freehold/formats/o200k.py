"""The vocabulary of gpt-oss, o200k_harmony, from the package's own data: no download, no cache directory.

tiktoken publishes tokens and ranks only. Its encoder joins the pair of neighbours that makes the
lowest-ranked token; a byte-pair merge list does the same with one merge per token, that token's own last
split: two neighbours x and y lie in a stretch that no merge has crossed, so inside it everything went as it
goes for the token x+y alone, which ends in that very split. The splits take seconds to compute, so they are
shipped beside the tokens. Called by `tokenizer.py` only.
"""

import gzip
import hashlib
import zlib
from binascii import a2b_base64
from importlib import resources
from typing import NamedTuple

from freehold.errors import CheckpointError
from freehold.formats.byte_level import CHARACTERS

VOCAB_SIZE = 201_088
_NUM_TEXT_TOKENS = 199_998
_NAMED_CONTROL_TOKENS = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}
_SHA256 = {
    "o200k_base.tiktoken.gz": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "o200k_base.splits.gz": "aa5451e90227571c6358d137371d0f2353f07824d0549d480e921b86ac700bef",
}


class O200k(NamedTuple):
    """Tokens in byte-level characters, in the form that the `tokenizers` library takes."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    control_tokens: dict[str, int]


def load() -> O200k:
    """Unpack and check the shipped vocabulary (0.3 s). Raises CheckpointError where the data is damaged."""
    encoded = _read("o200k_base.tiktoken.gz").split()[::2]  # `base64 rank` lines, in the order of their ranks
    tokens = _byte_level([a2b_base64(line) for line in encoded])
    splits = _read("o200k_base.splits.gz")
    merges = [(token[:split], token[split:]) for token, split in zip(tokens, splits, strict=True) if split]
    return O200k(dict(zip(tokens, range(_NUM_TEXT_TOKENS), strict=True)), merges, control_tokens())


def control_tokens() -> dict[str, int]:
    """All control tokens by name; ids without a published name are `<|reserved_ID|>`."""
    ids = range(_NUM_TEXT_TOKENS, VOCAB_SIZE)
    return {_NAMED_CONTROL_TOKENS.get(id_, f"<|reserved_{id_}|>"): id_ for id_ in ids}


def _byte_level(tokens: list[bytes]) -> list[str]:
    # One translation of everything is far faster than 200,000 small ones; "\uffff" is no byte's character.
    joined = "\uffff".join(token.decode("latin-1") for token in tokens)
    return joined.translate(dict(enumerate(CHARACTERS))).split("\uffff")


def _read(name: str) -> bytes:
    try:
        data = gzip.decompress(resources.files("freehold.formats").joinpath("data", name).read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise CheckpointError(f"{name}: cannot be read ({error}); reinstall freehold") from None
    found = hashlib.sha256(data).hexdigest()
    if found != _SHA256[name]:
        raise CheckpointError(f"{name}: sha256 is {found}, not {_SHA256[name]}; reinstall freehold")
    return data
