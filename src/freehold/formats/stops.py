"""Stop strings: where text ends, whichever tokens it came in."""

from collections.abc import Iterable

from freehold.errors import UsageError


class StopStrings:
    """Passes text on up to the first of some strings. What may be the beginning of one is held back until it is clear.

    Raises UsageError for an empty string, which would stop everything.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if any(not isinstance(stop, str) or not stop for stop in self._stops):
            raise UsageError(f"stop strings must not be empty, got {list(self._stops)}")
        self._held = ""
        self.found: str | None = None
        """The one that has come: nothing is passed on any more."""

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def feed(self, text: str) -> str:
        """The text that surely comes before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first, as if the text came one character at a time
            _, at, self.found = min(found)
            self._held = ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The rest, where the text has ended."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text could begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
