"""Who is asking: found out once, at the door, and handed on with the request."""

from dataclasses import dataclass, field

from starlette.requests import Request

from freehold.serve.rates import Meter


@dataclass(slots=True)
class Tally:
    """What one request has used so far."""

    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """`owner` is whose responses and conversations are seen, "" where no keys are used. Requests share cached prefixes
    only with those of the same `salt`, which is made from the hash of the key's secret: nobody can guess it, it tells
    nothing of the secret, and it is the same after a restart. `meter` counts for a key that has limits,
    `tally` for this one request and its line in the log."""

    owner: str = ""
    salt: str = ""
    meter: Meter | None = None
    tally: Tally = field(default_factory=Tally)

    def charge(self, num_tokens: int) -> None:
        """So many tokens were read and written for this caller."""
        self.tally.tokens += num_tokens
        if self.meter is not None:
            self.meter.charge(num_tokens)


def caller_of(request: Request) -> Caller:
    """As the door has it."""
    found = request.scope.get("state", {}).get("caller") or Caller()
    assert isinstance(found, Caller)
    return found
