"""Whose page is whose. Names and counts only: what lies in the pages is kv_store's business.

Layers with the same window form a group: a page of a group is one name for the same rows in all of its layers. Pages
are shared between sequences and snapshots by counting references. Positions are only ever appended, so a page may be
read by many up to where each of them knows it, and written on by one: the writer that took it. Whoever else would
write there takes a copy. Windowed groups let go of pages that have fallen out of sight.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

HOLE = -1
"""In a table: the page of positions that have fallen out of sight."""


class PageCopy(NamedTuple):
    """What a page holds has to be copied before anything else is written."""

    group: int
    source: int
    target: int


class PagePool:
    """The pages 0 … count − 1 of one group, with their reference counts."""

    __slots__ = ("_free", "_references", "_writers", "count")

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))  # low names first, so that few pages are ever touched
        self._references = [0] * count
        self._writers: list[object] = [None] * count

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, writer: object) -> int:
        page = self._free.pop()
        self._references[page] = 1
        self._writers[page] = writer
        return page

    def share(self, page: int) -> None:
        assert self._references[page] > 0, f"page {page} is free and cannot be shared"
        self._references[page] += 1

    def release(self, page: int, holder: object = None) -> None:
        self._references[page] -= 1
        assert self._references[page] >= 0, f"page {page} was released twice"
        if self._writers[page] is holder:
            self._writers[page] = None
        if not self._references[page]:
            self._free.append(page)

    def may_write(self, page: int, writer: object) -> bool:
        return self._writers[page] is writer or self._references[page] == 1

    def claim(self, page: int, writer: object) -> None:
        self._writers[page] = writer

    def check(self, held: Counter[int]) -> None:
        """Raise AssertionError unless exactly these references exist, and every other page is free."""
        assert sorted(self._free) == [p for p, n in enumerate(self._references) if n == 0], (
            "free list and counts differ"
        )
        counted = Counter({page: n for page, n in enumerate(self._references) if n})
        assert counted == held, f"references {counted - held} too many, {held - counted} too few"


@dataclass(slots=True, eq=False)
class Holding:
    """The pages of one sequence's first `length` positions, a table per group. Whoever has one releases it in the end.

    `version` changes with the tables' contents, for those who keep something made from them.
    """

    length: int
    tables: list[list[int]]
    firsts: list[int]  # per group: the first table entry that is no hole
    version: int = 0


@dataclass(slots=True)
class _Group:
    window: int | None
    pool: PagePool

    def first_in_sight(self, position: int, page_size: int) -> int:
        """The table entry of the first position that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // page_size


@dataclass(slots=True)
class Pages:
    """All groups. `windows` are their windows, None for layers that see everything."""

    windows: Sequence[int | None]
    counts: Sequence[int]
    page_size: int
    groups: list[_Group] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = [_Group(window, PagePool(count)) for window, count in zip(self.windows, self.counts, strict=True)]

    def new_holding(self) -> Holding:
        return Holding(0, [[] for _ in self.groups], [0] * len(self.groups))

    def needed(self, holding: Holding, stop: int) -> list[int]:
        """Pages that `extend` would take, per group."""
        first = holding.length // self.page_size
        counts = []
        for group, table in zip(self.groups, holding.tables, strict=True):
            count = max(0, self._num_pages(stop) - len(table))
            if holding.length % self.page_size and stop > holding.length:
                count += not group.pool.may_write(table[first], holding)
            counts.append(count)
        return counts

    def can_extend(self, holding: Holding, stop: int, *, later: int = 0) -> bool:
        """Whether there are pages up to `stop`, and also up to `later` in the groups that let go of none."""
        soon, all_in_all = self.needed(holding, stop), self.needed(holding, max(stop, later))
        return all(
            group.pool.num_free >= (in_all if group.window is None else now)
            for group, now, in_all in zip(self.groups, soon, all_in_all, strict=True)
        )

    def extend(self, holding: Holding, stop: int) -> list[PageCopy]:
        """Make the positions up to `stop` writable; `can_extend` has said that they can be."""
        copies = []
        first = holding.length // self.page_size
        for i, (group, table) in enumerate(zip(self.groups, holding.tables, strict=True)):
            if holding.length % self.page_size and stop > holding.length:
                page = table[first]
                if group.pool.may_write(page, holding):
                    group.pool.claim(page, holding)
                else:
                    table[first] = group.pool.take(holding)
                    copies.append(PageCopy(i, page, table[first]))
                    group.pool.release(page)
                    holding.version += 1
            while len(table) < self._num_pages(stop):
                table.append(group.pool.take(holding))
                holding.version += 1
        return copies

    def advance(self, holding: Holding, length: int) -> None:
        """The positions up to `length` are written; let go of what no later query sees."""
        holding.length = length
        for i, (group, table) in enumerate(zip(self.groups, holding.tables, strict=True)):
            first = group.first_in_sight(length, self.page_size)
            for entry in range(holding.firsts[i], min(first, len(table))):
                group.pool.release(table[entry], holding)
                table[entry] = HOLE
            holding.firsts[i] = max(holding.firsts[i], min(first, len(table)))

    def snapshot(self, holding: Holding, length: int) -> Holding:
        """What a sequence needs to go on after the first `length` positions: written, and none of it let go yet."""
        tables, firsts = [], []
        for group, table, first in zip(self.groups, holding.tables, holding.firsts, strict=True):
            start = group.first_in_sight(length, self.page_size)
            assert first <= start, "a page that is in sight has been let go"
            tables.append([HOLE] * start + table[start : self._num_pages(length)])
            firsts.append(start)
        copy = Holding(length, tables, firsts)
        self._share(copy)
        return copy

    def restore(self, snapshot: Holding) -> Holding:
        """A sequence's own beginning, from a snapshot that remains."""
        copy = Holding(snapshot.length, [list(table) for table in snapshot.tables], list(snapshot.firsts))
        self._share(copy)
        return copy

    def place(self, length: int) -> Holding | None:
        """Pages for a snapshot of `length` positions that comes from elsewhere; None where too few are free."""
        firsts = [group.first_in_sight(length, self.page_size) for group in self.groups]
        counts = [max(0, self._num_pages(length) - first) for first in firsts]
        if any(group.pool.num_free < count for group, count in zip(self.groups, counts, strict=True)):
            return None
        holding = Holding(length, [[HOLE] * first for first in firsts], firsts)
        for group, table, count in zip(self.groups, holding.tables, counts, strict=True):
            table += [group.pool.take(None) for _ in range(count)]
        return holding

    def could_extend(self, holding: Holding, stop: int, others: Iterable[Holding], *, later: int = 0) -> bool:
        """What `can_extend` would say if only this one and these others held pages."""
        soon, all_in_all = self.needed(holding, stop), self.needed(holding, max(stop, later))
        needed = [b if g.window is None else a for g, a, b in zip(self.groups, soon, all_in_all, strict=True)]
        return self._leave(needed, [holding, *others])

    def could_place(self, length: int, others: Iterable[Holding]) -> bool:
        """Whether `place` would do if only these others held pages."""
        firsts = [group.first_in_sight(length, self.page_size) for group in self.groups]
        return self._leave([max(0, self._num_pages(length) - first) for first in firsts], others)

    def num_held(self, holdings: Iterable[Holding]) -> list[int]:
        """Pages of these holdings, per group, each counted once."""
        held: list[set[int]] = [set() for _ in self.groups]
        for holding in holdings:
            for pages, table, first in zip(held, holding.tables, holding.firsts, strict=True):
                pages.update(table[first:])
        return [len(pages - {HOLE}) for pages in held]

    def _leave(self, needed: Sequence[int], holdings: Iterable[Holding]) -> bool:
        held = self.num_held(holdings)
        return all(g.pool.count - h >= n for g, h, n in zip(self.groups, held, needed, strict=True))

    def release(self, holding: Holding) -> None:
        for group, table, first in zip(self.groups, holding.tables, holding.firsts, strict=True):
            for page in table[first:]:
                group.pool.release(page, holding)
            table.clear()
        holding.length, holding.firsts = 0, [0] * len(self.groups)

    def check(self, holdings: Iterable[Holding]) -> None:
        """Raise AssertionError unless these holdings account for every reference."""
        held: list[Counter[int]] = [Counter() for _ in self.groups]
        for holding in holdings:
            for counter, table, first in zip(held, holding.tables, holding.firsts, strict=True):
                assert all(page == HOLE for page in table[:first]), "a page out of sight is still named"
                assert HOLE not in table[first:], "a page in sight is missing"
                counter.update(table[first:])
        for group, counter in zip(self.groups, held, strict=True):
            group.pool.check(counter)

    def _share(self, holding: Holding) -> None:
        for group, table, first in zip(self.groups, holding.tables, holding.firsts, strict=True):
            for page in table[first:]:
                group.pool.share(page)

    def _num_pages(self, positions: int) -> int:
        return -(-positions // self.page_size)
