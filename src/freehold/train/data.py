"""Files to train on, read as a whole before anything trains: examples, what was cut off, or every line that is wrong.

A line goes to training or to validation by a hash of what it says and a seed: the same line always to the same side,
whatever else is in the files, so that a line that stands there twice is never on both. Memory holds one line at a time,
and the token ids of all (examples.py). Lines that cannot be used are not left out: the whole is refused, with the
number and reason of each. Called by the training loop and `freehold tune`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from freehold.errors import TrainingDataError, UnsupportedError, UsageError
from freehold.formats.chat import ChatFormat
from freehold.formats.tokenizer import Tokenizer
from freehold.log import Progress, no_progress
from freehold.train.chats import PlainText, read_example, read_preference
from freehold.train.examples import (
    Example,
    Examples,
    Pair,
    Pairs,
    chat_examples,
    cut,
    preference_pair,
    text_examples,
)
from freehold.train.lines import Line, read_lines

MOST_TOLD = 100
"""Problems, and truncations, that are told one by one; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """How files become examples. Examples longer than `max_length` tokens are cut; plain text goes on in the next."""

    max_length: int = 4096
    validation_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 2:
            raise UsageError(f"max_length must be a whole number from 2 on, got {self.max_length!r}")
        if not 0 <= self.validation_share < 1:
            raise UsageError(f"--validation-share must be from 0 up to less than 1, got {self.validation_share!r}")


class Truncation(NamedTuple):
    """What a line lost to `max_length`. `is_dropped`: an example of it had nothing left to be learnt."""

    path: Path
    line: int
    num_tokens_lost: int
    num_targets_lost: int
    is_dropped: bool


@dataclass(slots=True, kw_only=True)
class Truncations:
    """Of a whole data set. `told` are the first of `count`."""

    told: list[Truncation] = field(default_factory=list)
    count: int = 0
    num_dropped: int = 0
    num_tokens_lost: int = 0
    num_targets_lost: int = 0

    def add(self, truncation: Truncation) -> None:
        self.count += 1
        self.num_dropped += truncation.is_dropped
        self.num_tokens_lost += truncation.num_tokens_lost
        self.num_targets_lost += truncation.num_targets_lost
        if len(self.told) < MOST_TOLD:
            self.told.append(truncation)

    def extend(self, others: "Truncations") -> None:
        self.count += others.count
        self.num_dropped += others.num_dropped
        self.num_tokens_lost += others.num_tokens_lost
        self.num_targets_lost += others.num_targets_lost
        self.told += others.told[: MOST_TOLD - len(self.told)]

    def describe(self, max_length: int) -> str:
        return (
            f"{_num_lines(self.count)} to {max_length:,} tokens: {self.num_tokens_lost:,} tokens are lost, "
            f"{self.num_targets_lost:,} of them to be learnt; {_num_lines(self.num_dropped)} left out"
        )


def _num_lines(number: int) -> str:
    return f"{number:,} line{'' if number == 1 else 's'}"


@dataclass(slots=True, kw_only=True)
class _Data:
    num_lines: int = 0
    num_chats: int = 0
    truncations: Truncations = field(default_factory=Truncations)


@dataclass(slots=True, kw_only=True)
class TrainingData(_Data):
    """What supervised training learns from, and what it is measured on meanwhile."""

    training: Examples = field(default_factory=Examples)
    validation: Examples = field(default_factory=Examples)


@dataclass(slots=True, kw_only=True)
class PreferenceData(_Data):
    """The same for DPO."""

    training: Pairs = field(default_factory=Pairs)
    validation: Pairs = field(default_factory=Pairs)


def read_examples(
    paths: Sequence[Path],
    chat_format: ChatFormat | None,
    tokenizer: Tokenizer,
    options: DataOptions,
    progress: Progress = no_progress,
) -> TrainingData:
    """Chats and plain text. `chat_format` is None for a model that has none: then chats are refused.

    Raises TrainingDataError, which tells all lines that cannot be used; UsageError for files that are none, and where
    nothing is left to train on.
    """
    data = TrainingData()

    def take(line: Line, raw: Mapping[str, Any]) -> None:
        said = read_example(raw)
        side = data.validation if _is_for_validation(raw, options) else data.training
        if isinstance(said, PlainText):
            for piece in text_examples(said, tokenizer, options.max_length, ends=not line.goes_on):
                side.append(piece)
            return
        if chat_format is None:
            raise UnsupportedError("this model has no chat format; give plain text")
        data.num_chats += 1
        for example in chat_examples(said, chat_format):
            if (kept := _cut(line, (example,), options, data.truncations)) is not None:
                side.append(*kept)

    _read(paths, take, data, progress)
    _check_some(paths, data, len(data.training), options)
    return data


def read_preferences(
    paths: Sequence[Path], chat_format: ChatFormat, options: DataOptions, progress: Progress = no_progress
) -> PreferenceData:
    """Preference pairs. Raises what `read_examples` raises."""
    data = PreferenceData()

    def take(line: Line, raw: Mapping[str, Any]) -> None:
        pair = preference_pair(read_preference(raw), chat_format)
        data.num_chats += 1
        kept = _cut(line, pair, options, data.truncations)
        if kept is not None:
            (data.validation if _is_for_validation(raw, options) else data.training).append(Pair(*kept))

    _read(paths, take, data, progress)
    _check_some(paths, data, len(data.training), options)
    return data


def _read(
    paths: Sequence[Path], take: Callable[[Line, Mapping[str, Any]], None], data: _Data, progress: Progress
) -> None:
    problems: list[str] = []
    num_problems = 0
    for line in _lines(paths, progress):
        data.num_lines += 1
        problem = line.problem
        if line.value is not None:
            try:
                take(line, line.value)
            except (UsageError, UnsupportedError) as error:
                problem = str(error)
            except RecursionError:
                problem = "is nested too deeply; make it flatter"
        if problem:
            num_problems += 1
            if len(problems) < MOST_TOLD:
                problems.append(f"{line.path.name} line {line.number}: {problem}")
    if num_problems:
        raise TrainingDataError(
            f"{num_problems} of {data.num_lines} lines cannot be trained on; mend them, or take them out:",
            problems=problems,
            num_problems=num_problems,
        )


def _lines(paths: Sequence[Path], progress: Progress) -> Iterator[Line]:
    for path in paths:
        label, size = f"reading {path.name}", 0
        for line in read_lines(path):
            size = size or path.stat().st_size
            progress(label, line.end, size)
            yield line
        progress(label, size, size)


def _is_for_validation(raw: Mapping[str, Any], options: DataOptions) -> bool:
    if not options.validation_share:
        return False
    said = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(f"{options.seed}\n{said}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < options.validation_share * (1 << 64)


def _cut(
    line: Line, examples: Sequence[Example], options: DataOptions, truncations: Truncations
) -> list[Example] | None:
    """The examples that belong together; None where not all of them keep something that is of use."""
    cuts = [cut(example, options.max_length) for example in examples]
    kept = [result.example for result in cuts if result.example is not None]
    is_dropped = len(kept) < len(cuts) or any(one == other for one, other in pairwise(kept))
    lost = [result.num_tokens_lost for result in cuts]
    if any(lost):
        targets_lost = sum(result.num_targets_lost for result in cuts)
        if is_dropped:
            lost = [len(example.tokens) for example in examples]
            targets_lost = sum(example.num_targets for example in examples)
        truncations.add(Truncation(line.path, line.number, sum(lost), targets_lost, is_dropped))
    return None if is_dropped else kept


def _check_some(paths: Sequence[Path], data: _Data, num_examples: int, options: DataOptions) -> None:
    if num_examples:
        return
    names = ", ".join(path.name for path in paths)
    if not data.num_lines:
        raise UsageError(f"there is nothing in {names}; give some examples")
    if data.truncations.num_dropped:
        raise UsageError(f"no prompt in {names} leaves room for an answer in {options.max_length} tokens; allow more")
    raise UsageError(
        f"all {data.num_lines} lines fell to validation with a share of {options.validation_share} and seed "
        f"{options.seed}; give more lines, or a smaller share"
    )
