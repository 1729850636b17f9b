"""What callers ask of the engine, and what they get back. Token ids only: it knows no text, no chat format, no HTTP."""

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from freehold.errors import FreeholdError, UsageError
from freehold.sampling import DEFAULT_SAMPLING, MOST_LOGPROBS, Sampling

FinishReason = Literal["stop", "length", "deadline", "abort", "error"]


class TokenConstraint(Protocol):
    """What one sample may say next: a grammar, a schema, a list of answers.

    The engine asks `forced` first, and `fill_mask` where nothing is forced; it tells `accept` each token that it took.
    An exception out of any of these ends this request with an error, and no other.
    """

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Set bit `token % 32` of word `token // 32` for every token that may come next, and clear the others.

        Called on another thread, while the model computes the logits that the mask is for.
        """

    def accept(self, token: int) -> None:
        """The next token is this one."""

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, in this order; empty where there is a choice. Does not accept them."""

    def is_finished(self) -> bool:
        """Whether nothing may follow. The sample then ends as if by a stop token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A prompt and how to go on from it. Raises UsageError, naming the value, when made.

    A sample ends with one of `stop_ids`, which is part of it, or with `max_tokens` tokens. No stop id is drawn before
    it has `min_tokens`, unless its constraint leaves nothing else. `boundaries` are lengths of prefixes of the prompt
    that a later prompt may begin with: the ends of its messages. `cache` lets this request use what others left, and
    leave what it computed; only requests of the same `cache_salt` share. What only `volatile` requests have said is
    never kept on disk. `adapter` is the name of one of the engine's adapters; None is the model as it is. Of waiting
    requests that with the lowest `priority` goes first, then who came first. `deadline` is in seconds from submission.
    `constraint` is called once for each of the `n` samples, which are one answer: where one of them fails, all end with
    its error.

    `prompt_logprobs` asks for the logprob of each token of the prompt, by the model's own logits, and for so many of
    the likeliest in its place. All of the prompt is computed for that, whatever is cached of it. Nothing need be
    generated then: `max_tokens` may be 0.
    """

    prompt: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = DEFAULT_SAMPLING
    prompt_logprobs: int | None = None
    n: int = 1
    boundaries: Sequence[int] = ()
    cache: bool = True
    cache_salt: str = ""
    volatile: bool = False
    adapter: str | None = None
    priority: int = 0
    deadline: float | None = None
    constraint: Callable[[], TokenConstraint] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "boundaries"):
            try:  # what the caller does with its lists from now on changes nothing here
                object.__setattr__(self, name, tuple(map(operator.index, getattr(self, name))))
            except TypeError as error:
                raise UsageError(f"{name} must be whole numbers: {error}") from None
        if not len(self.prompt):
            raise UsageError("the prompt is empty; give at least one token")
        asked = self.prompt_logprobs
        if asked is not None and not (type(asked) is int and 0 <= asked <= MOST_LOGPROBS):
            raise UsageError(f"prompt_logprobs must be between 0 and {MOST_LOGPROBS}, got {asked!r}")
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1 if asked is None else 0),
            ("min_tokens", self.min_tokens, 0),
            ("n", self.n, 1),
            ("priority", self.priority, None),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
                wanted = "an integer" if least is None else f"an integer of at least {least}"
                raise UsageError(f"{name} must be {wanted}, got {value!r}")
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if any(not 0 < boundary <= len(self.prompt) for boundary in self.boundaries):
            raise UsageError(
                f"boundaries must be between 1 and the prompt's {len(self.prompt)} tokens, got {list(self.boundaries)}"
            )
        if self.deadline is not None and not self.deadline > 0:
            raise UsageError(f"the deadline must be more than 0 seconds away, got {self.deadline!r}")


def check_adapter(name: str | None, known: Collection[str]) -> None:
    """Raise UsageError for an adapter that was not loaded."""
    if name is not None and name not in known:
        there = f"there are {', '.join(known)}" if known else "none was loaded"
        raise UsageError(f"there is no adapter {name!r:.80}; {there}")


class TokenLogprobs(NamedTuple):
    """Of one token, natural logarithms; `top` are the likeliest ones and theirs, in falling order."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """Of one sample. Seconds; None for what did not come to pass."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    num_preemptions: int
    queue_seconds: float | None
    first_token_seconds: float | None
    total_seconds: float

    @property
    def seconds_per_token(self) -> float | None:
        """After the first one."""
        if self.first_token_seconds is None or self.num_tokens < 2:
            return None
        return (self.total_seconds - self.first_token_seconds) / (self.num_tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """After the first one."""
        return 1 / self.seconds_per_token if self.seconds_per_token else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """More of a request's sample `index`: usually one token, several where they were forced or guessed right.

    The last one of a sample says why it ended and has its statistics; where the reason is "error" it has that too, and
    no tokens: those came before. Where they were asked for, `prompt_logprobs` come once, with the first step of sample
    0: one entry per token of the prompt, None for the first, which nothing comes before. They are missing only where
    that sample ended before its prompt had been read. `num_cached_tokens` of the prompt were not computed for it.
    """

    index: int
    tokens: tuple[int, ...]
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: FinishReason | None = None
    stats: RequestStats | None = None
    error: FreeholdError | None = None


@dataclass(slots=True, kw_only=True)
class Completion:
    """One sample as a whole."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: FinishReason | None = None
    stats: RequestStats | None = None
    error: FreeholdError | None = None

    def add(self, step: Step) -> None:
        self.tokens += step.tokens
        if step.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += step.logprobs
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = step.prompt_logprobs
        self.finish, self.stats, self.error = step.finish, step.stats, step.error
