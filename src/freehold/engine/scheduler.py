"""Who computes what in the next step. Pure bookkeeping: no tensors, no clock, no threads.

Streams that are being written come first, one token each. Beside them run as many prompt tokens as `Pace` allows, of
those already admitted and then of those that wait, in order of priority and arrival; nobody overtakes. A waiting
request is admitted when there is a place for it and its prompt finds pages, from the prefix cache as far as that goes,
at the cost of cached prefixes if need be. When one that runs finds no page, the last in order gives all of its pages
back and will compute them again later; what it has written so far is kept.
"""

import bisect
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from freehold.engine.pace import MOST_GUESSED, Pace
from freehold.engine.pages import Holding, PageCopy, Pages
from freehold.engine.prefix import Prefix, PrefixCache
from freehold.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of a sequence from `start` on, and then guesses at what follows them.

    What reaches the sequence's last token draws the next one, and one more after each guess that turns out right.
    """

    sequence: Sequence
    start: int
    count: int
    guesses: tuple[int, ...] = ()

    @property
    def draws(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens) and self.sequence.request.max_tokens > 0

    @property
    def scored(self) -> range:
        """Positions in the prompt whose logits say how likely the next of its tokens was, where that is wanted still.

        A sequence that was pushed out knows some of them already.
        """
        if self.sequence.prompt_logprobs is None:
            return range(0)
        first = max(self.start, len(self.sequence.prompt_logprobs) - 1)
        return range(first, min(self.start + self.count, len(self.sequence.request.prompt) - 1))

    @property
    def tokens(self) -> list[int]:
        """Everything that the model reads."""
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.guesses]

    @property
    def num_rows(self) -> int:
        """Logits that are wanted: after each of its last tokens."""
        return 1 + len(self.guesses) if self.draws else 0


@dataclass(slots=True)
class Plan:
    """One step's work. The copies come before it."""

    works: list[Work] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    num_decoding: int = 0

    @property
    def num_prefill(self) -> int:
        """Tokens beyond those of streams that are being written."""
        return sum(work.count + len(work.guesses) for work in self.works) - self.num_decoding


class Scheduler:
    def __init__(self, pages: Pages, prefixes: PrefixCache, pace: Pace, *, max_num_seqs: int) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._pages = pages
        self._prefixes = prefixes
        self._pace = pace
        self._max_num_seqs = max_num_seqs

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget it, wherever it is, and free its pages."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        self._release(sequence)

    def schedule(self) -> Plan:
        """The next step; it has no work where nobody can go on."""
        plan = Plan()
        decoding = [sequence for sequence in self.running if sequence.pending == 1]
        num_reading = len(self.running) - len(decoding) + len(self.waiting)
        budget, guesses_left = self._pace.budget(len(decoding), num_reading), MOST_GUESSED
        for sequence in decoding:
            if sequence.holding is None:  # pushed out by another one just now
                continue
            guesses = self._guesses(sequence, len(decoding), guesses_left)
            if self._go_on(sequence, 1, plan, guesses):
                plan.num_decoding += 1
                guesses_left -= len(plan.works[-1].guesses)
        if not plan.works:  # all of them were pushed out
            budget = max(budget, 1)
        for sequence in list(self.running):
            if budget > 0 and sequence.holding is not None and sequence.pending > 1:
                count = min(sequence.pending, budget)
                if self._go_on(sequence, count, plan):
                    budget -= count
        while budget > 0 and self.waiting and len(self.running) < self._max_num_seqs:
            count = self._admit(self.waiting[0], budget, plan)
            if not count:
                break
            budget -= count
        return plan

    def commit(self, work: Work, *, right_guesses: int = 0) -> None:
        """The work is done: its keys and values are written, and those of so many guesses are good."""
        sequence, length = work.sequence, work.start + work.count + right_guesses
        assert sequence.holding is not None
        while sequence.boundaries and sequence.boundaries[0] <= length:
            self._keep(sequence, sequence.boundaries.pop(0))
        self._pages.advance(sequence.holding, length)

    def finish(self, sequence: Sequence) -> None:
        """It has all its tokens: what was computed is kept for whoever goes on from here, as long as there is room."""
        if sequence.request.cache and sequence.computed:
            self._keep(sequence, sequence.computed)
        self.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages away. It will be computed again, from the nearest cached prefix."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.add(sequence)

    def holdings(self) -> Iterator[Holding]:
        return (holding for sequence in self.running if (holding := sequence.holding) is not None)

    def _admit(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        """The number of tokens planned; 0 where it has to wait."""
        sequence.plan_snapshots()
        cached = self._prefixes.find(sequence.tokens, sequence.most_cached, sequence.salt)
        holding = self._pages.new_holding() if cached is None else self._pages.restore(cached.snapshot)
        count = min(len(sequence.tokens) - holding.length, budget)
        stop = holding.length + count
        # Later chunks shall find their pages too, or it would soon be pushed out again. Alone it needs no such promise.
        later = len(sequence.tokens) if self.running else 0
        while not self._pages.can_extend(holding, stop, later=later):
            vain = not self._pages.could_extend(holding, stop, self.holdings(), later=later)
            if vain or not self._prefixes.evict():
                self._pages.release(holding)
                return 0
        self.waiting.pop(0)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        sequence.holding = holding
        if not sequence.num_preemptions:
            sequence.num_cached = holding.length
        if cached is not None and cached.maker != sequence.request_id:
            cached.uses += 1
            cached.is_volatile &= sequence.request.volatile
        sequence.boundaries = [length for length in sequence.boundaries if length > holding.length]
        self._plan(sequence, count, plan)
        return count

    def _guesses(self, sequence: Sequence, num_decoding: int, left: int) -> list[int]:
        if sequence.lookup is None:
            return []
        wanted = sequence.request.max_tokens - sequence.num_generated - 1
        most = min(left, wanted, self._pace.worth_guessing(num_decoding, sequence.lookup.rate))
        return sequence.lookup.guess(sequence.tokens, most)

    def _go_on(self, sequence: Sequence, count: int, plan: Plan, guesses: Tokens[int] = ()) -> bool:
        """Plan more of a running sequence, if need be at the cost of who comes after all others."""
        planned = {work.sequence.order for work in plan.works}
        while True:
            assert sequence.holding is not None
            if guesses and self._pages.can_extend(sequence.holding, sequence.computed + count + len(guesses)):
                self._plan(sequence, count, plan, guesses)
                return True
            if self._pages.can_extend(sequence.holding, sequence.computed + count):
                self._plan(sequence, count, plan)
                return True
            if self._prefixes.evict():
                continue
            assert len(self.running) > 1, "one sequence alone does not fit; its request should have been refused"
            victim = next(other for other in reversed(self.running) if other.order not in planned)
            if victim is sequence:  # those in front of it go on, and may yet want its pages
                return False
            self.preempt(victim)

    def _plan(self, sequence: Sequence, count: int, plan: Plan, guesses: Tokens[int] = ()) -> None:
        assert sequence.holding is not None
        start = sequence.computed
        plan.copies += self._pages.extend(sequence.holding, start + count + len(guesses))
        plan.works.append(Work(sequence, start, count, tuple(guesses)))

    def _keep(self, sequence: Sequence, length: int) -> None:
        assert sequence.holding is not None
        key = sequence.digest.of(sequence.tokens, length)
        if key in self._prefixes:
            self._prefixes.touch(key, volatile=sequence.request.volatile)
        else:
            snapshot = self._pages.snapshot(sequence.holding, length)
            is_root = length == min(sequence.request.boundaries, default=None)
            is_private = not sequence.request.cache
            maker = sequence.request_id
            self._prefixes.put(
                Prefix(
                    key,
                    snapshot,
                    is_root=is_root,
                    is_private=is_private,
                    is_volatile=sequence.request.volatile,
                    maker=maker,
                )
            )

    def _release(self, sequence: Sequence) -> None:
        if sequence.holding is not None:
            self._pages.release(sequence.holding)
            sequence.holding = None
