"""Text that goes on: a prompt and its continuation, with no conversation around them.

What comes are `Said` events of a `TextDelta` each, with every token that was drawn where logprobs were asked for, the
one that ended the text among them: such a delta's text may be empty. The rest is that of freehold.session.generation.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from freehold.engine.request import Step
from freehold.formats.conversation import Message
from freehold.formats.events import TextDelta
from freehold.formats.forms import AnswerFormat
from freehold.formats.stops import StopStrings
from freehold.formats.text_grammar import TextGrammar
from freehold.formats.tokenizer import Detokenizer, Tokenizer
from freehold.sampling import SamplingOptions
from freehold.session.generation import Generation, GenerationEvent, Said, SampleDone, ScoredToken, kind_of_end
from freehold.session.served import Served


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAsk:
    """What is asked of a text; None leaves it to the model's defaults.

    A prompt given as text holds no control tokens, whatever it says. The text ends before the first of the `stop`
    strings or `stop_ids`, and with a token that ends the model's texts unless `ignore_eos`. With a `form` it is of that
    form. `prompt_logprobs` is how many of the likeliest tokens to report for each place in the prompt.
    """

    prompt: str | Sequence[int]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    form: AnswerFormat | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    deadline: float | None = None


async def prepare_text(served: Served, ask: TextAsk) -> Generation:
    """Tokenise and compile, on another thread. Raises UsageError (ContextError where the prompt is too long) or
    SchemaError for what cannot be."""
    generation = await asyncio.to_thread(_prepare, served, ask)
    generation.hold = served.hold
    return generation


def _prepare(served: Served, ask: TextAsk) -> Generation:
    tokenizer = served.prompting.the_tokenizer()
    if isinstance(ask.prompt, str):
        served.prompting.check_length(ask.prompt)
    ends = frozenset() if ask.ignore_eos else served.prompting.defaults.stop_ids
    grammar = None if ask.form is None or ask.ignore_eos else TextGrammar(tokenizer, ask.form, ends)
    request = served.prompting.request(
        tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt,
        max_tokens=ask.max_tokens,
        min_tokens=ask.min_tokens,
        stop_ids=ends | ask.stop_ids,
        n=ask.n,
        constraint=grammar,
        cache_salt=ask.cache_salt,
        adapter=served.adapter,
        deadline=ask.deadline,
        prompt_logprobs=ask.prompt_logprobs,
        **ask.sampling,
    )
    return Generation(
        request,
        [_Text(index, tokenizer, ask.stop, request.stop_ids, len(request.prompt)) for index in range(ask.n)],
    )


class _Text:
    """One text while it is read."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        stop_ids: frozenset[int],
        num_prompt_tokens: int,
    ) -> None:
        self.done = False
        self._index = index
        self._num_prompt_tokens = num_prompt_tokens
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stop)
        self._stop_ids = stop_ids
        self._num_tokens = 0
        self._scored: list[ScoredToken] = []  # of text that has not come yet
        self._begins: list[int] = []  # where the text of each of them does
        self._length = 0
        self._passed_on = 0

    def cut(self) -> tuple[Message, ...]:
        return ()  # there is no conversation

    def take(self, step: Step) -> list[GenerationEvent]:
        """What a step adds: at most one piece of text, and the end."""
        pieces: list[str] = []
        for i, token in enumerate(step.tokens):
            self._num_tokens += 1
            if step.logprobs is not None:
                self._scored.append(ScoredToken(token, step.logprobs[i]))
                self._begins.append(self._length)
            if token not in self._stop_ids:
                text = self._detokenizer.feed(token)
                self._length += len(text)
                pieces.append(self._stops.feed(text))
            if self._stops.stopped:
                break
        self.done = self._stops.stopped or step.finish is not None
        if self.done and not self._stops.stopped:
            pieces += [self._stops.feed(self._detokenizer.flush()), self._stops.flush()]
        events: list[GenerationEvent] = []
        text = "".join(pieces)
        self._passed_on += len(text)
        if self._stops.stopped:  # a stop string's own tokens are no part of the text
            self._scored = self._scored[: bisect_left(self._begins, self._passed_on)]
        if text or (self.done and self._scored):
            events.append(Said(self._index, TextDelta(text), tuple(self._scored)))
            self._scored.clear()
            self._begins.clear()
        if self.done:
            events.append(self._end(step))
        return events

    def _end(self, step: Step) -> SampleDone:
        return SampleDone(
            index=self._index,
            end="stop" if self._stops.stopped else kind_of_end(step.finish),
            messages=(),
            num_tokens=self._num_tokens,
            num_reasoning_tokens=0,
            num_cached_tokens=step.num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            stop_string=self._stops.found,
            stats=step.stats,
        )
