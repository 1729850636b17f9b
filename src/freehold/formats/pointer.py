"""JSON pointers (RFC 6901): places in a schema as text, and back."""

from collections.abc import Iterable


def pointer_to(steps: Iterable[str | int]) -> str:
    """Empty for no steps: the whole document."""
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)


def steps_of(pointer: str) -> list[str]:
    """The names and numbers that a pointer goes through, as text."""
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
