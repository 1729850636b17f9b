"""Log-probabilities as OpenAI writes them in chats and responses; completions have a form of their own."""

from collections.abc import Sequence
from typing import Any

from freehold.formats.tokenizer import Tokenizer
from freehold.session.generation import ScoredToken

LEAST = -9999.0
"""What stands for a token that cannot come: JSON has no minus infinity."""


def token_logprobs(tokenizer: Tokenizer, scored: Sequence[ScoredToken]) -> list[dict[str, Any]]:
    """The entries of `logprobs.content`. `bytes` is null for control tokens, which have no text."""
    return [
        {
            **_entry(tokenizer, token, logprobs.logprob),
            "top_logprobs": [_entry(tokenizer, other, logprob) for other, logprob in logprobs.top],
        }
        for token, logprobs in scored
    ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    has_bytes = tokenizer.control_name(token) is None and tokenizer.is_token(token)
    return {
        "token": tokenizer.decode((token,), control="show"),
        "logprob": max(logprob, LEAST),
        "bytes": list(tokenizer.token_bytes(token)) if has_bytes else None,
    }
