"""The control tokens of Harmony, by name, and their ids in whatever vocabulary has them.

gpt-oss's own ids are not written down here: any tokeniser that was given these tokens can speak Harmony.
"""

from dataclasses import dataclass

from freehold.errors import CheckpointError
from freehold.formats.tokenizer import Tokenizer

START = "<|start|>"
END = "<|end|>"
MESSAGE = "<|message|>"
CHANNEL = "<|channel|>"
CONSTRAIN = "<|constrain|>"
RETURN = "<|return|>"
CALL = "<|call|>"

CONTROL_TOKENS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL)
"""What a vocabulary needs to speak Harmony; see `Tokenizer.with_control_tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonyVocabulary:
    """Ids of the control tokens. `end` closes a message, `return_` a reply, `call` a tool call."""

    start: int
    end: int
    message: int
    channel: int
    constrain: int
    return_: int
    call: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "HarmonyVocabulary":
        """Look the ids up. Raises CheckpointError where some of the tokens are missing."""
        known = tokenizer.control_tokens
        if missing := [name for name in CONTROL_TOKENS if name not in known]:
            raise CheckpointError(f"the tokeniser lacks Harmony's {', '.join(missing)}; use one made for gpt-oss")
        return cls(
            start=known[START],
            end=known[END],
            message=known[MESSAGE],
            channel=known[CHANNEL],
            constrain=known[CONSTRAIN],
            return_=known[RETURN],
            call=known[CALL],
        )


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has all of Harmony's control tokens."""
    return all(name in tokenizer.control_tokens for name in CONTROL_TOKENS)
