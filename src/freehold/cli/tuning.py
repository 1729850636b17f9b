"""What `freehold tune` shows: what would be learnt, and training as it goes on.

What is learnt is coloured where colours are wanted, and stands between ⟦ and ⟧ where they are not. Progress goes to
stderr: a bar on a terminal, else a line every few seconds.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from freehold.cli import terminal
from freehold.errors import OutOfMemoryError
from freehold.formats.tokenizer import Tokenizer
from freehold.session.memory import free_memory
from freehold.train.card import adapter_of
from freehold.train.examples import NO_TARGET, Example, Pair
from freehold.train.run import Prepared

_EXAMPLES_SHOWN = 3
_MOST_SHOWN = 500  # tokens of an example
_TRUNCATIONS_SHOWN = 5
_SECONDS_BETWEEN_LINES = 10.0


# --- before -----------------------------------------------------------------------------------------------------


def print_dry_run(prepared: Prepared) -> None:
    """To stdout. Raises OutOfMemoryError, in the end, where training would."""
    for name, text in _facts(prepared):
        _print(f"{name:<11}{text}\n")
    examples = prepared.data.training
    for index in range(min(_EXAMPLES_SHOWN, len(examples))):
        for name, example in _examples(examples[index]):
            _print(f"\n{name} {index + 1} of {len(examples):,}: {_learnt(len(example.tokens), example.num_targets)}\n")
            _print(shown_example(example, prepared.tokenizer, colours=_wants_colours()) + "\n")
    prepared.plan()


def _examples(shown: Example | Pair) -> list[tuple[str, Example]]:
    if isinstance(shown, Pair):
        return [("better answer", shown.chosen), ("worse answer", shown.rejected)]
    return [("example", shown)]


def _facts(prepared: Prepared) -> Iterator[tuple[str, str]]:
    data, loop = prepared.data, prepared.request.loop
    kind = "pair" if prepared.request.method == "dpo" else "example"
    yield "model", f"{prepared.request.model}: {prepared.facts['how']}"
    yield (
        "data",
        f"{_count(data.num_lines, 'line')}: {_count(len(data.training), kind)}, "
        f"{_learnt(data.training.num_tokens, data.training.num_targets)}",
    )
    if len(data.validation):
        yield (
            "validation",
            f"{_count(len(data.validation), kind)}, {_learnt(data.validation.num_tokens, data.validation.num_targets)}",
        )
    yield from _truncations(prepared)
    rows = f"{prepared.rows_per_epoch:,} of a pair each"
    if prepared.request.method != "dpo":
        room = prepared.rows_per_epoch * loop.max_length
        rows = f"{prepared.rows_per_epoch:,} of {loop.max_length:,} tokens, {data.training.num_tokens / room:.0%} full"
    yield "rows", f"{rows}; {loop.batch_size} a step: {_count(prepared.num_steps, 'step')}"
    targets = adapter_of(prepared.facts)["targets"]
    learns = ", ".join(f"{kind} (rank {rank}, alpha {alpha:g})" for kind, rank, alpha in targets)
    if prepared.request.adapter is not None:
        learns = f"begins with {prepared.request.adapter}: {learns}"
    if prepared.spec is None:
        learns = ", ".join(prepared.request.full.train)
    yield (
        "adapter" if prepared.spec else "trained",
        f"{learns}: {prepared.num_parameters:,} parameters, {terminal.gib(4 * prepared.num_parameters)}",
    )
    try:
        plan = prepared.plan()
        yield "memory", f"{plan.describe()} of {terminal.gib(free_memory(prepared.policy))} free"
    except OutOfMemoryError:
        yield "memory", "does not fit: see below"


def _truncations(prepared: Prepared) -> Iterator[tuple[str, str]]:
    cut = prepared.data.truncations
    if not cut.count:
        yield "truncated", f"none: no example is longer than {prepared.request.loop.max_length:,} tokens"
        return
    yield "truncated", cut.describe(prepared.request.loop.max_length)
    for each in cut.told[:_TRUNCATIONS_SHOWN]:
        left_out = ", left out" if each.is_dropped else ""
        yield (
            "",
            f"{terminal.harmless(each.path.name)} line {each.line}: {each.num_tokens_lost:,} tokens, "
            f"{each.num_targets_lost:,} to be learnt{left_out}",
        )
    if cut.count > _TRUNCATIONS_SHOWN:
        yield "", f"and {cut.count - _TRUNCATIONS_SHOWN:,} more"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _learnt(num_tokens: int, num_targets: int) -> str:
    return f"{num_tokens:,} tokens, {num_targets:,} of them learnt ({num_targets / max(1, num_tokens):.0%})"


class _Token(NamedTuple):
    id: int
    is_learnt: bool


def shown_example(example: Example, tokenizer: Tokenizer, *, colours: bool) -> str:
    """All that the model sees and all that it is taught, control tokens by their names."""
    tokens: list[_Token] = [_Token(example.tokens[0], is_learnt=False)]
    for target, following in zip(example.targets, [*example.tokens[1:], None], strict=True):
        if target != NO_TARGET:
            tokens.append(_Token(target, is_learnt=True))
        if following is not None and following != target:  # history has something else here than what was said
            tokens.append(_Token(following, is_learnt=False))
    half = _MOST_SHOWN // 2
    if len(tokens) <= _MOST_SHOWN:
        return _painted(tokens, tokenizer, colours)
    left_out = f"\n… {len(tokens) - 2 * half:,} tokens …\n"
    return _painted(tokens[:half], tokenizer, colours) + left_out + _painted(tokens[-half:], tokenizer, colours)


def _painted(tokens: Sequence[_Token], tokenizer: Tokenizer, colours: bool) -> str:
    pieces = []
    for is_learnt, group in groupby(tokens, key=lambda token: token.is_learnt):
        text = tokenizer.decode([token.id for token in group], control="show")
        text = terminal.harmless(text, for_terminal=colours or None)
        if colours:
            pieces.append(f"\x1b[32m{text}\x1b[0m" if is_learnt else f"\x1b[2m{text}\x1b[0m")
        else:
            pieces.append(f"⟦{text}⟧" if is_learnt else text)
    return "".join(pieces)


def _wants_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print(text: str) -> None:
    """To stdout, with our own colours."""
    sys.stdout.write(text)
    sys.stdout.flush()


# --- meanwhile --------------------------------------------------------------------------------------------------


class TuningScreen(Protocol):
    """Takes the lines of metrics.jsonl, and progress within a step."""

    def report(self, line: Mapping[str, Any], /) -> None: ...

    def progress(self, label: str, done: int, total: int, /) -> None: ...


@contextmanager
def tuning_screen(prepared: Prepared) -> Iterator[TuningScreen]:
    """For a run of so many steps, on stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bars:
        yield _Bars(bars, prepared.num_steps, prepared.request.loop.batch_size)


class _Lines:
    def __init__(self) -> None:
        self._last = -_SECONDS_BETWEEN_LINES

    def report(self, line: Mapping[str, Any]) -> None:
        now = time.monotonic()
        is_due = now - self._last >= _SECONDS_BETWEEN_LINES or line.get("step") == line.get("steps")
        if "event" in line:
            if said := _event(line):
                terminal.say(said)
        elif is_due or "validation_loss" in line:
            self._last = now
            terminal.say(_status(line))

    def progress(self, label: str, done: int, total: int) -> None:
        pass


class _Bars:
    def __init__(self, bars: Any, num_steps: int, batch_size: int) -> None:
        self._bars = bars
        self._batch_size = batch_size
        self._total = num_steps * batch_size
        self._step = 0
        self._main: Any = None
        self._others: dict[str, Any] = {}

    def report(self, line: Mapping[str, Any]) -> None:
        self._step = line["step"]
        if self._main is None:  # the first line says where the run begins: what comes after it is measured
            self._main = self._bars.add_task("training", total=self._total, completed=self._step * self._batch_size)
        if "event" in line:
            if said := _event(line):
                self._bars.console.print(said, markup=False, highlight=False)
            return
        self._bars.update(self._main, description=_status(line), completed=self._step * self._batch_size)
        if "validation_loss" in line:
            self._bars.console.print(_status(line), markup=False, highlight=False)

    def progress(self, label: str, done: int, total: int) -> None:
        if label == "step" and self._main is not None:
            self._bars.update(self._main, completed=self._step * self._batch_size + done)
            return
        if label not in self._others:
            self._others[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._others[label], completed=done, total=total, visible=done < total)


def _status(line: Mapping[str, Any]) -> str:
    parts = [f"step {line['step']}/{line['steps']}"]
    parts += [f"loss {line['loss']:.4f}"] if "loss" in line else []
    parts += [f"validation {line['validation_loss']:.4f}"] if "validation_loss" in line else []
    parts += [f"{line['tokens_per_second']:.0f} tokens/s"] if "tokens_per_second" in line else []
    return " · ".join(parts)


def _event(line: Mapping[str, Any]) -> str:
    match line["event"]:
        case "started" if line["step"]:
            return f"goes on after step {line['step']}"
        case "early_stop":
            return f"stops early: {line['message']}"
        case "notice":
            return str(line["message"])
        case _:
            return ""
