"""How many more tokens a step may carry: of prompts, so that streams hardly notice, and guesses that may save steps.

A step that carries prompt tokens along takes longer, and every running stream waits for it. Their budget is what fits
into a multiple of a plain decode step's time, going by how long steps have taken so far on this machine. Where more
requests wait for their first token than are being written, they get the larger share of the time.
"""

MOST_GUESSED = 16
"""Guessed tokens of a step, of all streams together."""

_WEIGHT = 0.2  # of the newest observation
_FIRST_GUESS = 32  # prompt tokens, before anything was measured
_SAFETY = 0.75
_MOST_ROOM = 8.0
_LEAST_GAIN = 1.1
_TOGETHER = 16  # prompt tokens from which on an unforeseen delay is put down to each of them rather than to having any
_FADE = 0.98  # of what having any costs, with each step that has none: the next ones may be of a shorter prompt


class Pace:
    """`stretch` is how much longer a step with prompt tokens may take than one without.

    A step is taken to last what its streams last alone, something for having prompt tokens at all (a long prompt's keys
    and values are read through for one token as for eight), and something for each of them.
    """

    def __init__(self, stretch: float, chunk: int) -> None:
        self._room = stretch - 1
        self._chunk = chunk
        self._alone: dict[int, float] = {}  # seconds of a step, by the number of streams
        self._seen_alone: set[int] = set()  # the numbers of streams for which that is a measurement
        self._any = 0.0  # seconds more for any prompt tokens
        self._each: float | None = None  # and for each of them
        self._rests = False  # whether the last step had no prompt tokens so that this one can have more

    def budget(self, num_decoding: int, num_reading: int = 1) -> int:
        """Prompt tokens for the next step, in which so many streams are written and so many requests wait to be read.

        Where even one of them takes too long they come in every other step.
        """
        if not num_decoding:
            return self._chunk
        alone = self._nearest(num_decoding)
        if not alone or not self._each:
            return min(_FIRST_GUESS, self._chunk)
        room = alone * _SAFETY * max(self._room, min(num_reading / num_decoding, _MOST_ROOM))
        if self._any + self._each > room:
            self._rests = not self._rests
            if self._rests:
                return 0
            room *= 2
        return max(1, min(self._chunk, int((room - self._any) / self._each)))

    def worth_guessing(self, num_decoding: int, rate: float) -> int:
        """How many guessed tokens are worth reading along for one of so many streams, each right with this probability.

        0 where the time that they take is more than what they save.
        """
        alone = self._nearest(num_decoding)
        if not alone or not self._each:
            return 0
        best, longest, expected, chance = _LEAST_GAIN, 0, 1.0, 1.0
        for count in range(1, MOST_GUESSED + 1):
            chance *= rate
            expected += chance
            gain = expected / (1 + (self._any + count * self._each * num_decoding) / alone)
            if gain > best:
                best, longest = gain, count
        return longest

    def observe(self, num_decoding: int, num_prefill: int, seconds: float) -> None:
        """A step of so many streams and prompt tokens took so long."""
        if not num_prefill:
            known = self._alone.get(num_decoding) if num_decoding in self._seen_alone else None
            self._alone[num_decoding] = seconds if known is None else known + _WEIGHT * (seconds - known)
            self._seen_alone.add(num_decoding)
            self._any *= _FADE
            return
        if self._each is None:
            alone = (self._nearest(num_decoding) or 0.0) if num_decoding else 0.0
            self._each = max(seconds - alone, seconds * 0.05) / num_prefill
            return
        beside = self._any + num_prefill * self._each
        if num_decoding and num_decoding not in self._alone:
            self._alone[num_decoding] = max(seconds - beside, seconds * 0.1)
        unforeseen = _WEIGHT * (seconds - beside - self._alone.get(num_decoding, 0.0))
        if num_decoding and num_decoding not in self._seen_alone:
            # Under steady load no step is ever without prompt tokens: either part may be what was misjudged.
            unforeseen /= 2
            self._alone[num_decoding] = max(self._alone[num_decoding] + unforeseen, seconds * 0.1)
        share = _TOGETHER**2 / (_TOGETHER**2 + num_prefill**2)
        self._any = max(self._any + unforeseen * share, 0.0)
        self._each = max(self._each + unforeseen * (1 - share) / num_prefill, seconds * 1e-4)

    def _nearest(self, num_decoding: int) -> float | None:
        """Seconds of a step of so many streams alone: or of the nearest smaller number, or larger."""
        known = self._alone.get(num_decoding)
        if known is not None or not self._alone:
            return known
        smaller = [n for n in self._alone if n < num_decoding]
        return self._alone[max(smaller) if smaller else min(self._alone)]
