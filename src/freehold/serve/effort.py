"""How hard to think: OpenAI's words for it, in every API, and what a model can do of that.

gpt-oss knows low, medium and high. "none" is kept to as well: the grammar then leaves no room for reasoning. What lies
between or beyond is the nearest that there is: minimal is low, xhigh and max are high. A model that does not speak
Harmony has no such setting; it takes "none", which is what it does anyway, and refuses the rest.
"""

from typing import Literal, NamedTuple, get_args

from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import Effort
from freehold.serve.errors import ApiError
from freehold.session.served import Served

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
REASONING_EFFORTS: tuple[ReasoningEffort, ...] = get_args(ReasoningEffort)

_NEAREST: dict[ReasoningEffort, Effort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


class Thinking(NamedTuple):
    """What a turn is asked for: effort and choices go into an `Ask`, warnings to the client."""

    effort: Effort | None = None
    choices: TurnChoices = TurnChoices()
    warnings: tuple[str, ...] = ()


def thinking(served: Served, effort: ReasoningEffort | None, *, param: str) -> Thinking:
    """What this effort is for this model. Raises a 400 that names `param` where it has none."""
    if effort is None:
        return Thinking()
    if not served.speaks_harmony:
        if effort == "none":
            return Thinking()
        raise ApiError(
            400,
            f"this model does not speak Harmony and has no reasoning effort, so {effort!r} cannot be kept to; leave it "
            "out",
            param=param,
            code="unsupported_value",
        )
    nearest = _NEAREST[effort]
    if effort == "none":
        return Thinking(nearest, TurnChoices(max_reasoning_tokens=0))
    return Thinking(nearest, warnings=() if effort == nearest else (f"{param} {effort} was taken as {nearest}",))
