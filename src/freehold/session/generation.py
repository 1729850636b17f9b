"""What a model says to a conversation, once: from the conversation to events, through rendering, engine and parser.

Everything that answers, for whichever client, goes through here: `prepare_generation` says what will run, and reading
the `Generation` runs it. What comes are the events of freehold.formats.events, each with the number of its sample, and
for each sample one `SampleDone`. It ends where the model calls a tool; who runs tools and goes on is
freehold.session.turn.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from freehold.engine.request import FinishReason, Request, RequestStats, Step, TokenLogprobs
from freehold.errors import RequestError
from freehold.formats.chat import ReplyReader, TurnChoices
from freehold.formats.conversation import Conversation, Effort, Message, Text, ToolNamespace
from freehold.formats.events import CallDone, Event, MessageDone, MessageStart, TextDelta
from freehold.formats.harmony.render import Rendered
from freehold.formats.stops import StopStrings
from freehold.sampling import SamplingOptions
from freehold.session.prompting import Prompting
from freehold.session.served import AsyncRunner, Served, Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is asked of a model. None leaves it to the model's defaults.

    `builtins` are tools of namespaces of their own, beside the conversation's functions. A sample ends before the first
    of the `stop` strings in its answer, not in its reasoning. With `ignore_eos` no
    token ends it, only `max_tokens` do. Nothing of a `volatile` one stays on disk. `deadline` is in seconds from when
    it begins.
    """

    conversation: Conversation
    builtins: tuple[ToolNamespace, ...] = ()
    effort: Effort | None = None
    choices: TurnChoices = field(default_factory=TurnChoices)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    cache_salt: str = ""
    volatile: bool = False
    deadline: float | None = None


class ScoredToken(NamedTuple):
    """A token of the answer, and how likely it was."""

    token: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Said:
    """An event of sample `index`. `scored` are the tokens that a TextDelta's text came from, where logprobs were asked
    for. In a row they decode to the text in a row: a token that only begins a character comes with the one that ends
    it, one that may be part of a stop string when that is clear. Of the last before a stop string the text may be cut.
    """

    index: int
    event: Event
    scored: tuple[ScoredToken, ...] = ()


SampleEnd = Literal["stop", "calls", "length", "deadline", "abort", "limit"]
"""As told in SampleDone; "limit" only ends a turn with tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDone:
    """A sample is complete. `messages` are what history keeps of it. "calls": it ended in calls that wait for their
    results; "stop": with an answer, and before `stop_string` if that is why. A turn with tools has one of these, of all
    that was generated in it; its `stats` are those of the last time."""

    index: int
    end: SampleEnd
    messages: tuple[Message, ...]
    num_tokens: int
    num_reasoning_tokens: int
    num_cached_tokens: int
    num_prompt_tokens: int
    stop_string: str | None = None
    stats: RequestStats | None = None


GenerationEvent = Said | SampleDone


async def prepare_generation(served: Served, ask: Ask, *, prompt: Rendered | None = None) -> "Generation":
    """Render and compile, on another thread: that takes milliseconds, and tokenising a book much longer. A `prompt`
    stands in place of the conversation's own.

    Raises UsageError (ContextError where the prompt is too long), UnsupportedError or SchemaError for what cannot be.
    """
    generation = await asyncio.to_thread(
        prepare_now,
        served.prompting,
        ask,
        harmony=served.harmony,
        grammar=served.grammar,
        adapter=served.adapter,
        prompt=prompt,
    )
    generation.hold = served.hold
    return generation


def prepare_now(
    prompting: Prompting,
    ask: Ask,
    *,
    harmony: bool | None = None,
    grammar: bool = True,
    adapter: str | None = None,
    prompt: Rendered | None = None,
) -> "Generation":
    """The same on this thread, for a model that nobody serves."""
    prompting.check_length(ask.conversation)
    chat_format = prompting.chat_format(ask.effort, harmony=harmony, builtins=ask.builtins)
    grammar = grammar and not ask.ignore_eos  # a grammar ends where its turn does
    turn = chat_format.turn(ask.conversation, grammar=grammar, prompt=prompt, **ask.choices)
    request = prompting.request(
        turn.prompt.ids,
        max_tokens=ask.max_tokens,
        min_tokens=ask.min_tokens,
        stop_ids=frozenset() if ask.ignore_eos else turn.stop_ids,
        n=ask.n,
        boundaries=turn.prompt.boundaries,
        constraint=turn.grammar,
        cache_salt=ask.cache_salt,
        volatile=ask.volatile,
        adapter=adapter,
        deadline=ask.deadline,
        **ask.sampling,
    )
    num_prompt_tokens = len(request.prompt)
    return Generation(
        request, [_Sample(index, turn.new_reader(), ask.stop, num_prompt_tokens) for index in range(ask.n)]
    )


class Sample(Protocol):
    """One sample while it is read."""

    done: bool

    def take(self, step: Step) -> list[GenerationEvent]:
        """What a step of this sample adds."""

    def cut(self) -> tuple[Message, ...]:
        """No more steps will come: what history keeps of it."""


class Generation:
    """Samples that are ready to be made. `prompt_logprobs` come with the first events, where they were asked for.
    `hold` is Served's."""

    hold: object | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None

    def __init__(self, request: Request, samples: Sequence[Sample]) -> None:
        self.prompt_logprobs = None
        self._request = request
        self._samples = samples
        self._num_cached_tokens = 0
        self._num_tokens = 0
        self._tokens: list[int] = []  # of the first sample
        self._begun = False

    @property
    def prompt(self) -> Sequence[int]:
        return self._request.prompt

    @property
    def boundaries(self) -> Sequence[int]:
        """Where messages of the prompt end."""
        return self._request.boundaries

    @property
    def tokens(self) -> Sequence[int]:
        """What the first sample has written so far."""
        return self._tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request.prompt)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, tokens that were not computed again: known once the first events have come."""
        return self._num_cached_tokens

    @property
    def num_tokens(self) -> int:
        """How many have been written so far, in all samples."""
        return self._num_tokens

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    @property
    def max_tokens(self) -> int:
        """The most that a sample may have: as asked, and no more than the context has room for."""
        return self._request.max_tokens

    def cut(self) -> tuple[Message, ...]:
        """No more steps will come, wherever it is: what history keeps of the first sample."""
        return self._samples[0].cut()

    def events(self, runner: AsyncRunner) -> "GenerationEvents":
        """Submit the request, at once, and read it: what each step adds. Closing or forgetting it ends the request.
        To be called once.

        Raises ClosedError where the engine takes no more; RequestError while it is read where the request fails.
        """
        return GenerationEvents(self, runner.submit(self._begin()))

    def events_now(self, stream: Callable[[Request], Iterator[Step]]) -> Iterator[GenerationEvent]:
        """The same on this thread, from an engine's `stream`."""
        return (event for step in stream(self._begin()) for event in self.take(step))

    def _begin(self) -> Request:
        assert not self._begun, "a generation is read once; prepare another one"
        self._begun = True
        return self._request

    def take(self, step: Step) -> list[GenerationEvent]:
        """What a step adds: nothing to a sample that has ended."""
        if step.index == 0:
            self._num_cached_tokens = step.num_cached_tokens
            self._tokens += step.tokens
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = step.prompt_logprobs
        self._num_tokens += len(step.tokens)
        sample = self._samples[step.index]
        return [] if sample.done else sample.take(step)

    @property
    def is_done(self) -> bool:
        return all(sample.done for sample in self._samples)


class GenerationEvents:
    """A generation that runs, for `async for`. No generator: closed before it was read, one would end nothing."""

    def __init__(self, generation: Generation, steps: Steps) -> None:
        self._generation = generation
        self._steps = steps

    def __aiter__(self) -> "GenerationEvents":
        return self

    async def __anext__(self) -> list[GenerationEvent]:
        try:
            while not self._generation.is_done:
                step = await anext(self._steps, None)
                if step is None:
                    raise RequestError("the answer ended before it was complete; send the request again")
                if events := self._generation.take(step):
                    return events
            raise StopAsyncIteration
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the request, wherever it is."""
        await self._steps.aclose()


class _Sample:
    """One sample while it is read."""

    def __init__(self, index: int, reader: ReplyReader, stop: Sequence[str], num_prompt_tokens: int) -> None:
        self.done = False
        self._index = index
        self._num_prompt_tokens = num_prompt_tokens
        self._reader = reader
        self._stops = StopStrings(stop) if stop else None
        self._num_tokens = 0
        self._num_reasoning_tokens = 0
        self._reasons = False  # inside a message that is reasoning
        self._called = False
        self._scored: list[ScoredToken] = []  # of text that has not come yet
        self._held: deque[tuple[str, tuple[ScoredToken, ...]]] = deque()  # until no stop string can begin in it
        self._num_clear = 0  # so many of the held characters surely come before any stop string
        self._text: list[str] = []  # of the message, as far as it was passed on
        self._messages: tuple[Message, ...] = ()  # when it is done

    def take(self, step: Step) -> list[GenerationEvent]:
        """What a step of this sample adds."""
        result: list[GenerationEvent] = []
        for i, token in enumerate(step.tokens):
            self._num_tokens += 1
            self._num_reasoning_tokens += self._reasons
            events = self._reader.feed(token)
            if step.logprobs is not None and not any(isinstance(event, MessageDone) for event in events):
                self._scored.append(ScoredToken(token, step.logprobs[i]))
            self._pass_on(events, result)
            if self._stopped:
                break
        if self._stopped or step.finish is not None:
            self.done = True
            self._end(step, result)
        return result

    def cut(self) -> tuple[Message, ...]:
        if not self.done:
            self.done = True
            self._reader.flush()
            self._messages = self._reader.messages
        return self._messages

    @property
    def _stopped(self) -> bool:
        return self._stops is not None and self._stops.stopped

    def _pass_on(self, events: Sequence[Event], result: list[GenerationEvent]) -> None:
        for event in events:
            match event:
                case TextDelta(text=text):
                    self._read(text, result)
                    if self._stopped:
                        return
                    continue
                case MessageStart(channel=channel, recipient=recipient, tokens=tokens):
                    self._reasons = channel == "analysis" and recipient is None
                    self._num_reasoning_tokens += len(tokens) if self._reasons else 0
                    self._text.clear()
                    if not tokens:  # no header, as with a template: what is scored begins the text
                        result.append(Said(self._index, event))
                        continue
                case MessageDone():
                    self._reasons = False
                    if self._stops is not None:
                        self._clear(self._stops.flush(), result)
                case CallDone():
                    self._called = True
            self._scored.clear()
            result.append(Said(self._index, event))

    def _read(self, text: str, result: list[GenerationEvent]) -> None:
        scored = tuple(self._scored)
        self._scored.clear()
        if self._stops is None:
            self._say(text, scored, result)
        else:
            if scored:
                self._held.append((text, scored))
            self._clear(self._stops.feed(text), result)

    def _clear(self, text: str, result: list[GenerationEvent]) -> None:
        """No stop string begins before the end of this: pass it on, tokens with logprobs as a whole."""
        if not self._held:
            self._say(text, (), result)
            return
        self._num_clear += len(text)
        while self._held and (self._num_clear >= len(self._held[0][0]) or self._stopped):
            whole, scored = self._held.popleft()
            self._say(whole[: self._num_clear], scored, result)
            self._num_clear = max(0, self._num_clear - len(whole))

    def _say(self, text: str, scored: tuple[ScoredToken, ...], result: list[GenerationEvent]) -> None:
        if text:
            self._text.append(text)
            result.append(Said(self._index, TextDelta(text), scored))

    def _end(self, step: Step, result: list[GenerationEvent]) -> None:
        rest = self._reader.flush()
        messages = self._reader.messages
        stop_string = None if self._stops is None else self._stops.found
        if stop_string is None:
            self._pass_on(rest, result)
        else:  # history keeps what was passed on, and nothing behind it
            cut = replace(messages[-1], parts=(Text(text="".join(self._text)),))
            messages = (*messages[:-1], cut)
            result.append(Said(self._index, MessageDone(message=cut, stop_id=None)))
        self._messages = messages
        result.append(
            SampleDone(
                index=self._index,
                end="stop" if stop_string is not None else self._kind_of_end(step.finish),
                messages=messages,
                num_tokens=self._num_tokens,
                num_reasoning_tokens=self._num_reasoning_tokens,
                num_cached_tokens=step.num_cached_tokens,
                num_prompt_tokens=self._num_prompt_tokens,
                stop_string=stop_string,
                stats=step.stats,
            )
        )

    def _kind_of_end(self, finish: FinishReason | None) -> SampleEnd:
        return "calls" if finish == "stop" and self._called else kind_of_end(finish)


def kind_of_end(finish: FinishReason | None) -> SampleEnd:
    match finish:
        case "stop" | "length" | "deadline" | "abort":
            return finish
    raise AssertionError(f"a sample cannot end with {finish!r}")
