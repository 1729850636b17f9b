"""Guesses at what comes next, without a second model: as it went on the last time, after the same few tokens.

Quoting, editing and repetition are full of that. A guess is read in one step together with the token before it, and
each of its tokens is kept only if it is what would have been drawn anyway: the text is the same, it only comes sooner.
(Prompt lookup decoding, Saxena 2023; sampling from the model and comparing is rejection sampling for such guesses.)
"""

from collections.abc import Sequence

_NGRAM = 3
_LONGEST = 16_384  # tokens that are looked through when it begins: an index of more would take megabytes
_PRIOR = 0.5  # of a guessed token to be right, before anything is known
_WEIGHT = 0.15  # of each guessed token in what is known
_FORGET = 0.02  # by which a text that guessing failed for comes back to the prior with each token


class Lookup:
    """Of one sequence. `rate` is how likely a guessed token is right, going by those so far."""

    __slots__ = ("_ends", "_indexed", "rate")

    def __init__(self) -> None:
        self.rate = _PRIOR
        self._ends: dict[tuple[int, ...], int] = {}  # where a run of tokens last ended
        self._indexed = _NGRAM - 1

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most so many tokens to follow these; only ever called with the same tokens and more."""
        self.rate += _FORGET * (_PRIOR - self.rate)
        if most < 1:
            return []
        for end in range(max(self._indexed + 1, len(tokens) - _LONGEST), len(tokens)):
            self._ends[tuple(tokens[end - _NGRAM : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        start = self._ends.get(tuple(tokens[-_NGRAM:])) if len(tokens) >= _NGRAM else None
        return [] if start is None else list(tokens[start : start + most])

    def judge(self, guessed: int, right: int) -> None:
        """So many tokens had been guessed, and the first of them were right."""
        for i in range(min(guessed, right + 1)):  # what follows a wrong one says nothing
            self.rate += _WEIGHT * ((i < right) - self.rate)
