"""Examples side by side in rows of one length, none of them split, and where each begins, for attention to keep apart.

First-fit decreasing: the longest first, each into the first row that has room; at most 11/9 of the fewest rows that
there can be, and one. A seed decides the order among equals, and of rows and what is in them; the same seed gives the
same rows everywhere. Knows lengths and tokens, no tensors. Called by the training loop.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from freehold.errors import UsageError
from freehold.train.examples import NO_TARGET, Examples


class PackedRow(NamedTuple):
    """Tokens of several examples in a row, and the targets at them. `counts` are how many each has: a batch with these
    counts, and lengths that are no longer, attends within each example alone and numbers its positions from 0."""

    tokens: list[int]
    targets: list[int]
    counts: list[int]

    @property
    def num_targets(self) -> int:
        return len(self.targets) - self.targets.count(NO_TARGET)


def pack(lengths: Sequence[int], row_length: int, *, seed: int) -> list[list[int]]:
    """Which examples each row holds, by their numbers. Raises UsageError for one that fits no row."""
    if row_length < 1:
        raise UsageError(f"rows need a length of at least 1, got {row_length}")
    if (longest := max(lengths, default=0)) > row_length:
        raise UsageError(
            f"an example of {longest} tokens does not fit rows of {row_length}; cut it, or allow longer ones"
        )
    random = Random(seed)
    order = list(range(len(lengths)))
    random.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    room = _Room(len(lengths), row_length)
    for index in order:
        row = room.take(lengths[index])
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
    for row_of in rows:
        random.shuffle(row_of)
    random.shuffle(rows)
    return rows


def packed_row(examples: Examples, row: Sequence[int]) -> PackedRow:
    """The examples of a row, put together."""
    result = PackedRow([], [], [])
    for index in row:
        example = examples[index]
        result.tokens.extend(example.tokens)
        result.targets.extend(example.targets)
        result.counts.append(len(example.tokens))
    return result


class _Room:
    """How much room each of so many rows has; finds the first with enough in the logarithm of their number. A tree:
    node i has the most of nodes 2i and 2i + 1, and rows are its leaves."""

    def __init__(self, num_rows: int, row_length: int) -> None:
        self._num_leaves = 1 << max(0, num_rows - 1).bit_length()
        self._most = [row_length] * (2 * self._num_leaves)

    def take(self, length: int) -> int:
        """Of the first row with so much room; the row."""
        node = 1
        while node < self._num_leaves:
            node *= 2
            if self._most[node] < length:
                node += 1
        row = node - self._num_leaves
        self._most[node] -= length
        while node := node // 2:
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return row
