"""One sample of a request while it is made: its tokens, its pages, and what drawing the next token needs to know."""

import random
import secrets
from collections import Counter
from dataclasses import dataclass, field

from freehold.engine.lookup import Lookup
from freehold.engine.pages import Holding
from freehold.engine.prefix import PrefixDigest
from freehold.engine.request import FinishReason, Request, RequestStats, TokenConstraint, TokenLogprobs


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """`tokens` are the prompt and what follows; `holding` has the pages of those computed, None while it waits."""

    request_id: int
    request: Request
    index: int
    arrival: int
    submitted: float
    salt: str
    tokens: list[int]
    random: random.Random
    adapter: object | None = None  # what the request's stood for when it was submitted; the runner knows it
    holding: Holding | None = None
    digest: PrefixDigest
    boundaries: list[int] = field(default_factory=list)  # lengths that a snapshot is still to be taken at, rising
    constraint: TokenConstraint | None = None
    lookup: Lookup | None = None  # where guessing is allowed
    siblings: list["Sequence"] = field(default_factory=list)  # wait for this one's prompt
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # those known so far, until the caller has them
    counts: Counter[int] = field(default_factory=Counter)  # of tokens generated
    num_sent: int = 0  # generated tokens that the caller has
    unsent_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the others, where they are wanted
    num_cached: int = 0
    seen: set[int] | None = None  # every token of prompt and answer, from when somebody first asks
    num_preemptions: int = 0
    started: float | None = None
    first_token: float | None = None
    finish: FinishReason | None = None

    @property
    def computed(self) -> int:
        return 0 if self.holding is None else self.holding.length

    @property
    def pending(self) -> int:
        """Tokens that the model has not read yet."""
        return len(self.tokens) - self.computed

    @property
    def most_cached(self) -> int:
        """How much may come from a cached prefix: what is wanted of the logits in between is not cached."""
        return len(self.tokens) - 1 if self.prompt_logprobs is None else len(self.prompt_logprobs) - 1

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: the lower."""
        return self.request.priority, self.arrival, self.index

    def append(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """One more token, drawn or forced. Sets `finish` where it is the last one. Raises what the constraint does."""
        if self.constraint is not None:
            self.constraint.accept(token)
        self.tokens.append(token)
        if logprobs is not None:
            self.unsent_logprobs.append(logprobs)
        self.counts[token] += 1
        if self.seen is not None:
            self.seen.add(token)
        if token in self.request.stop_ids or (self.constraint is not None and self.constraint.is_finished()):
            self.finish = "stop"
        elif self.num_generated >= self.request.max_tokens:
            self.finish = "length"

    def plan_snapshots(self) -> None:
        """Of a prompt from its beginning: at the caller's boundaries, and where the same prompt would go on."""
        self.digest = PrefixDigest(self.salt)
        self.boundaries = []
        if self.request.cache or self.request.n > 1:
            ends = {*self.request.boundaries, len(self.request.prompt) - 1} if self.request.cache else set()
            ends |= {len(self.request.prompt) - 1} if self.request.n > 1 else set()
            self.boundaries = sorted(ends - {0})

    def stats(self, now: float) -> RequestStats:
        return RequestStats(
            num_prompt_tokens=len(self.request.prompt),
            num_cached_tokens=self.num_cached,
            num_tokens=self.num_generated,
            num_preemptions=self.num_preemptions,
            queue_seconds=None if self.started is None else self.started - self.submitted,
            first_token_seconds=None if self.first_token is None else self.first_token - self.submitted,
            total_seconds=now - self.submitted,
        )


def shared_salt(cache_salt: str, adapter_digest: str = "") -> str:
    """Of the prefixes that all requests with this salt and this adapter share."""
    return f"adapter {adapter_digest} shared {cache_salt}" if adapter_digest else f"shared {cache_salt}"


def new_sequences(request: Request, request_id: int, now: float, adapter_digest: str = "") -> list[Sequence]:
    """The request's samples. Those after the first wait for its prompt as its siblings. `adapter_digest` tells what
    its adapter computes from what every other does."""
    seed = request.sampling.seed
    if seed is None:
        seed = secrets.randbits(63)
    salt = shared_salt(request.cache_salt, adapter_digest) if request.cache else f"request {request_id}"
    sequences = [
        Sequence(
            request_id=request_id,
            request=request,
            index=index,
            arrival=request_id,
            submitted=now,
            salt=salt,
            tokens=list(request.prompt),
            random=random.Random(seed if index == 0 else f"{seed} {index}"),
            digest=PrefixDigest(salt),
        )
        for index in range(request.n)
    ]
    sequences[0].siblings = sequences[1:]
    sequences[0].prompt_logprobs = None if request.prompt_logprobs is None else [None]
    return sequences
