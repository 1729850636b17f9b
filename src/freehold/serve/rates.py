"""How much one key may ask for: requests and tokens per minute, as token buckets with a clock that is passed in.

Requests are counted when they come, tokens when they are known, so that the last one let in may leave a debt.
"""

from collections.abc import Callable

from freehold.serve.errors import ApiError
from freehold.serve.refusal import retry_after


class Bucket:
    """So much a minute, all of which may be used at once. Taking more than is there leaves a debt."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level, self._at = float(per_minute), now

    def level(self, now: float) -> float:
        self._level = min(self.per_minute, self._level + max(0.0, now - self._at) * self.per_minute / 60)
        self._at = max(now, self._at)
        return self._level

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def seconds_until(self, level: float, now: float) -> float:
        return max(0.0, (level - self.level(now)) * 60 / self.per_minute)


class Meter:
    """One key's use. It outlives the requests that hold it, and changed limits start it anew."""

    def __init__(self, requests: int | None, tokens: int | None, clock: Callable[[], float]) -> None:
        self.limits = (requests, tokens)
        self._clock = clock
        self._requests = Bucket(requests, clock()) if requests else None
        self._tokens = Bucket(tokens, clock()) if tokens else None

    def admit(self) -> None:
        """Count a request. Raises ApiError with 429 where the key has used up its minute."""
        now = self._clock()
        for bucket, kind in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None and bucket.level(now) < 1:
                seconds = bucket.seconds_until(1, now)
                raise ApiError(
                    429,
                    f"this key's {bucket.per_minute} {kind} per minute are used up: try again in {seconds:.1f} seconds",
                    code="rate_limit_exceeded",
                    headers=retry_after(seconds),
                )
        if self._requests is not None:
            self._requests.take(1, now)

    def charge(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens, self._clock())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is left, under OpenAI's names."""
        now, made = self._clock(), []
        for bucket, kind in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket is not None:
                left, seconds = max(0, int(bucket.level(now))), bucket.seconds_until(bucket.per_minute, now)
                made += [
                    (f"x-ratelimit-limit-{kind}", str(bucket.per_minute)),
                    (f"x-ratelimit-remaining-{kind}", str(left)),
                    (f"x-ratelimit-reset-{kind}", f"{seconds:.3f}s"),
                ]
        return [(name.encode(), value.encode()) for name, value in made]
