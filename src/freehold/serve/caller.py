"""Who is asking: found out once, at the door, and handed on with the request."""

from dataclasses import dataclass

from starlette.requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """`owner` is whose responses and conversations are seen, "" where no keys are used. Requests share cached prefixes
    only with those of the same `salt`."""

    owner: str = ""
    salt: str = ""

    def charge(self, num_tokens: int) -> None:
        """So many tokens were read and written for this caller."""


ANYONE = Caller()


def caller_of(request: Request) -> Caller:
    """As the door has it."""
    found = request.scope.get("state", {}).get("caller", ANYONE)
    assert isinstance(found, Caller)
    return found
