"""How many more tokens a step may carry: of prompts, so that streams hardly notice, and guesses that may save steps.

A step that carries prompt tokens along takes longer, and every running stream waits for it. Their budget is what fits
into a multiple of a plain decode step's time, going by how long steps have taken so far on this machine. Where more
requests wait for their first token than are being written, they get the larger share of the time.
"""

MOST_GUESSED = 16
"""Guessed tokens of a step, of all streams together."""

_WEIGHT = 0.2  # of the newest observation
_FIRST_GUESS = 32  # prompt tokens, before anything was measured
_LEAST = 2
_SAFETY = 0.8
_MOST_ROOM = 8.0
_LEAST_GAIN = 1.1


class Pace:
    """`stretch` is how much longer a step with prompt tokens may take than one without."""

    def __init__(self, stretch: float, chunk: int) -> None:
        self._room = stretch - 1
        self._chunk = chunk
        self._decode_seconds: dict[int, float] = {}  # of a step, by the number of streams
        self._prefill_seconds: float | None = None  # for each prompt token more

    def budget(self, num_decoding: int, num_reading: int = 1) -> int:
        """Prompt tokens for a step in which so many streams are written, and so many requests wait to be read."""
        if not num_decoding:
            return self._chunk
        alone = self._alone(num_decoding)
        if not alone or not self._prefill_seconds:
            return min(_FIRST_GUESS, self._chunk)
        room = _SAFETY * max(self._room, min(num_reading / num_decoding, _MOST_ROOM))
        return max(_LEAST, min(self._chunk, int(alone * room / self._prefill_seconds)))

    def worth_guessing(self, num_decoding: int, rate: float) -> int:
        """How many guessed tokens are worth reading along for one of so many streams, each right with this probability.

        0 where the time that they take is more than what they save.
        """
        alone = self._alone(num_decoding)
        if not alone or not self._prefill_seconds:
            return 0
        best, longest, expected, chance = _LEAST_GAIN, 0, 1.0, 1.0
        for count in range(1, MOST_GUESSED + 1):
            chance *= rate
            expected += chance
            gain = expected / (1 + count * self._prefill_seconds * num_decoding / alone)
            if gain > best:
                best, longest = gain, count
        return longest

    def observe(self, num_decoding: int, num_prefill: int, seconds: float) -> None:
        """A step of so many streams and prompt tokens took so long."""
        if not num_prefill:
            known = self._decode_seconds.get(num_decoding)
            self._decode_seconds[num_decoding] = seconds if known is None else _blend(known, seconds)
            return
        if num_decoding and num_decoding not in self._decode_seconds and self._prefill_seconds:
            # Under steady load no step is ever without prompt tokens: what they do not explain is the streams' part.
            self._decode_seconds[num_decoding] = max(seconds - num_prefill * self._prefill_seconds, seconds * 0.1)
            return
        alone = self._alone(num_decoding) if num_decoding else 0.0
        if alone is not None:
            each = max(seconds - alone, seconds * 0.05) / num_prefill
            known = self._prefill_seconds
            self._prefill_seconds = each if known is None else _blend(known, each)

    def _alone(self, num_decoding: int) -> float | None:
        """A step of so many streams and nothing else: as measured, or as with the nearest smaller number, or larger."""
        known = self._decode_seconds.get(num_decoding)
        if known is not None or not self._decode_seconds:
            return known
        smaller = [n for n in self._decode_seconds if n < num_decoding]
        return self._decode_seconds[max(smaller)] if smaller else self._decode_seconds[min(self._decode_seconds)]


def _blend(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
