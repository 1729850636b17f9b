"""Token sequences to train on: what the model sees, and at each place the token that it is to say next, if any.

A conversation is cut into turns of the assistant. Of each, the prompt is exactly what inference renders, and the rest
exactly what the model writes: its own control tokens included, `<|return|>` where history has `<|end|>`. Turns share a
sequence as long as the later prompt begins with all that the earlier turn saw; the token that ended the earlier turn is
only ever a target, so that it need not be what history has in its place. Where history drops what a turn said
(reasoning, after its answer), the later turn begins a sequence of its own. So every token of the assistant is taught
once, after the very tokens that precede it in inference. Called by `data.py`.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from freehold.errors import UsageError
from freehold.formats.chat import ChatFormat
from freehold.formats.tokenizer import Tokenizer
from freehold.train.chats import Chat, PlainText, Preference, Turn

NO_TARGET = -100
"""Where nothing is taught; what torch's cross entropy ignores."""

END_OF_TEXT = "<|endoftext|>"


class Example(NamedTuple):
    """Token i is followed by targets[i] where that is not NO_TARGET; else the loss leaves it out."""

    tokens: list[int]
    targets: list[int]

    @property
    def num_targets(self) -> int:
        return len(self.targets) - self.targets.count(NO_TARGET)


class Pair(NamedTuple):
    """Two answers to one prompt; their targets are the answers."""

    chosen: Example
    rejected: Example


class Cut(NamedTuple):
    """An example, None where nothing to be learnt is left of it, and what did not fit."""

    example: Example | None
    num_tokens_lost: int
    num_targets_lost: int


def chat_examples(chat: Chat, chat_format: ChatFormat) -> list[Example]:
    """One example of each stretch of turns that see one another as they were said."""
    examples: list[Example] = []
    for turn in chat.turns:
        if not any(turn.taught):
            continue
        prompt = chat_format.render(turn.before).ids
        seen = examples[-1].tokens if examples else []
        # A prompt that only repeats what the last turn saw would have two targets in one place.
        if not (examples and len(prompt) > len(seen) and prompt[: len(seen)] == seen):
            examples.append(Example([], []))
        _add(examples[-1], prompt, turn, chat_format, chat.parallel_calls)
    return examples


def preference_pair(preference: Preference, chat_format: ChatFormat) -> Pair:
    pair = Pair(Example([], []), Example([], []))
    for example, turn in zip(pair, (preference.chosen, preference.rejected), strict=True):
        _add(example, chat_format.render(turn.before).ids, turn, chat_format, preference.parallel_calls)
    if pair.chosen == pair.rejected:
        raise UsageError("its two outputs read the same")
    return pair


def text_examples(text: PlainText, tokenizer: Tokenizer, max_length: int, *, ends: bool = True) -> Iterator[Example]:
    """All of the text, in pieces of `max_length`, and where it `ends`. Every token but the first is taught once."""
    ids = tokenizer.encode(text.text)
    if ends and END_OF_TEXT in tokenizer.control_tokens:
        ids.append(tokenizer.control_tokens[END_OF_TEXT])
    if len(ids) < 2:
        raise UsageError("text is a single token; there is nothing to learn")
    for start in range(0, len(ids) - 1, max_length):
        piece = ids[start : start + max_length + 1]
        yield Example(piece[:-1], piece[1:])


def cut(example: Example, max_length: int) -> Cut:
    """The beginning of an example that is too long, as far as anything is taught in it."""
    if len(example.tokens) <= max_length:
        return Cut(example, 0, 0)
    targets = example.targets[:max_length]
    while targets and targets[-1] == NO_TARGET:
        targets.pop()
    kept = Example(example.tokens[: len(targets)], targets)
    return Cut(
        kept if targets else None,
        len(example.tokens) - len(targets),
        example.num_targets - kept.num_targets,
    )


def _add(example: Example, prompt: Sequence[int], turn: Turn, chat_format: ChatFormat, parallel_calls: bool) -> None:
    reply = chat_format.reply(turn.before, turn.said, parallel_tool_calls=parallel_calls)
    if not prompt:
        raise UsageError("the first message is the assistant's, and the chat template writes nothing before it")
    known = len(example.tokens)
    example.tokens.extend([*prompt[known:], *reply.ids[:-1]])
    example.targets.extend([NO_TARGET] * (len(prompt) - known - 1))
    start = 0
    for end, taught in zip(reply.boundaries, turn.taught, strict=True):
        example.targets.extend(reply.ids[start:end] if taught else [NO_TARGET] * (end - start))
        start = max(start, end)


# --- many of them -------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Examples:
    """Examples in a row, at 8 bytes a token; none is a Python object before it is asked for."""

    _tokens: "array[int]" = field(default_factory=lambda: array("i"))
    _targets: "array[int]" = field(default_factory=lambda: array("i"))
    _ends: "array[int]" = field(default_factory=lambda: array("q"))
    num_targets: int = 0

    def append(self, example: Example) -> None:
        self._tokens.extend(example.tokens)
        self._targets.extend(example.targets)
        self._ends.append(len(self._tokens))
        self.num_targets += example.num_targets

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self._ends):
            raise IndexError(index)
        here = slice(self._ends[index - 1] if index else 0, self._ends[index])
        return Example(self._tokens[here].tolist(), self._targets[here].tolist())

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def lengths(self) -> list[int]:
        """In tokens, of each."""
        return [end - start for start, end in zip([0, *self._ends], self._ends, strict=False)]


@dataclass(slots=True, eq=False)
class Pairs:
    """Preference pairs in a row, kept the same way."""

    chosen: Examples = field(default_factory=Examples)
    rejected: Examples = field(default_factory=Examples)

    def append(self, pair: Pair) -> None:
        self.chosen.append(pair.chosen)
        self.rejected.append(pair.rejected)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Pair:
        return Pair(self.chosen[index], self.rejected[index])

    @property
    def num_tokens(self) -> int:
        return self.chosen.num_tokens + self.rejected.num_tokens

    @property
    def num_targets(self) -> int:
        """Tokens of the answers."""
        return self.chosen.num_targets + self.rejected.num_targets

    @property
    def lengths(self) -> list[int]:
        """In tokens, of both answers with their prompts."""
        return [sum(pair) for pair in zip(self.chosen.lengths, self.rejected.lengths, strict=True)]
