"""How the next token is drawn, as a caller asks for it. A value only: kernels.ops and the engine do the drawing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypedDict

from freehold.errors import UsageError

MOST_LOGPROBS = 20
_LARGEST_SEED = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Checked when made: raises UsageError naming the value.

    Penalties and bias change the logits first, then temperature, top-k, top-p and min-p apply, each on what the last
    left. Temperature 0 takes the largest logit. `repetition_penalty` divides (negative logits: multiplies) those of
    every token seen so far, prompt included; presence and frequency penalties are subtracted for what was generated,
    once and per occurrence. `logit_bias` is added. The same seed gives the same tokens; None draws a new one.
    `logprobs` is how many likeliest tokens to report beside each drawn one, by the model's own logits; None reports
    nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_filters(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            raise UsageError(f"repetition_penalty must be above 0, got {self.repetition_penalty!r}")
        for name, penalty in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            if not (_is_number(penalty) and math.isfinite(penalty)):
                raise UsageError(f"{name}_penalty must be a finite number, got {penalty!r}")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0 or not (_is_number(bias) and math.isfinite(bias)):
                raise UsageError(f"logit_bias maps token ids to finite numbers, got {token!r}: {bias!r}")
        if self.seed is not None and not (_is_integer(self.seed) and -_LARGEST_SEED <= self.seed < _LARGEST_SEED):
            raise UsageError(f"seed must be an integer of 64 bits, got {self.seed!r}")
        if self.logprobs is not None and not (_is_integer(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            raise UsageError(f"logprobs must be between 0 and {MOST_LOGPROBS}, got {self.logprobs!r}")

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or bias apply."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class SamplingOptions(TypedDict, total=False):
    """The same by name, for keyword arguments; None means that the caller does not say."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None


def check_filters(*, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise UsageError, naming the value, unless all four are in range."""
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        raise UsageError(f"temperature must be 0 or more, got {temperature!r}")
    if not (_is_integer(top_k) and top_k >= 0):
        raise UsageError(f"top_k must be an integer, 0 (all tokens) or more, got {top_k!r}")
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise UsageError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    if not (_is_number(min_p) and 0 <= min_p <= 1):
        raise UsageError(f"min_p must be between 0 and 1, got {min_p!r}")


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model's folder asks for where the caller does not say.

    Stop ids come from generation_config.json, else config.json, else the tokeniser's own end tokens.
    """

    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = DEFAULT_SAMPLING
    max_tokens: int | None = None
