"""Packing: no example split or lost, rows as the slow first-fit decreasing has them, and no attention across."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.errors import UsageError
from freehold.kernels.kv import PagedSequences
from freehold.train.examples import Example, Examples
from freehold.train.packing import pack, packed_row


def slowly_packed(lengths: list[int], row_length: int) -> list[list[int]]:
    """The lengths in each row: every row is tried for every example, in order."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= row_length]
        if fitting:
            fitting[0].append(length)
        else:
            rows.append([length])
    return rows


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), row_length=st.integers(50, 120), seed=st.integers(0, 9))
def test_rows_are_those_of_first_fit_decreasing_and_hold_every_example_once(
    lengths: list[int], row_length: int, seed: int
) -> None:
    rows = pack(lengths, row_length, seed=seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    found = sorted(sorted(lengths[index] for index in row) for row in rows)
    assert found == sorted(sorted(row) for row in slowly_packed(lengths, row_length))
    assert rows == pack(lengths, row_length, seed=seed)


def test_another_seed_gives_another_order() -> None:
    lengths = [Random(0).randrange(1, 100) for _ in range(100)]
    assert pack(lengths, 128, seed=1) != pack(lengths, 128, seed=2)


def test_an_example_that_fits_no_row_is_refused() -> None:
    with pytest.raises(UsageError, match="an example of 11 tokens does not fit rows of 10"):
        pack([3, 11], 10, seed=0)
    with pytest.raises(UsageError, match="at least 1"):
        pack([], 0, seed=0)


def test_a_row_keeps_where_its_examples_begin_and_positions_begin_anew_there() -> None:
    examples = Examples()
    for example in (Example([1, 2, 3], [-100, 3, 4]), Example([5], [6]), Example([7, 8], [8, 9])):
        examples.append(example)
    row = packed_row(examples, [2, 0])
    assert row.tokens == [7, 8, 1, 2, 3]
    assert row.targets == [8, 9, -100, 3, 4]
    assert row.counts == [2, 3]
    sequences = PagedSequences(row.counts, row.counts, torch.zeros((2, 1), dtype=torch.int32))
    assert sequences.positions() == [0, 1, 0, 1, 2]
    assert (examples.num_tokens, examples.num_targets, examples.lengths) == (6, 5, [3, 1, 2])
