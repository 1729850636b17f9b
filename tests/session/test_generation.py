"""Turns as their readers see them: texts, stops, counts, logprobs and ends. A script stands in for the model."""

import asyncio
import gc
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from freehold.engine.metrics import EngineMetrics
from freehold.engine.request import Request, RequestStats, Step, TokenLogprobs
from freehold.errors import ClosedError, ContextError, RequestError, UsageError
from freehold.formats.conversation import Conversation, DeveloperContent, Message, Tool, text_message
from freehold.formats.events import MessageDone, ReasoningDelta, TextDelta
from freehold.formats.templates import CHATML
from freehold.sampling import SamplingOptions
from freehold.session.generation import Ask, GenerationEvent, GenerationEvents, Said, SampleDone, prepare_generation
from freehold.session.scripted import ScriptedTurn, serve_script
from freehold.session.served import Served

TEXT = "Grüße aus 東京! 🌋🗻 It is sunny, sunny, and warm."
ASK = Ask(conversation=Conversation(messages=(text_message("user", "Hello"),)))


def _script(**turn: Any) -> Served:
    return serve_script([ScriptedTurn.from_json(turn)] * 3)


def _run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def _events(served: Served, ask: Ask = ASK) -> list[GenerationEvent]:
    turn = await prepare_generation(served, ask)
    return [event async for batch in turn.events(served.runner) for event in batch]


def _asking(**changes: Any) -> Ask:
    return Ask(conversation=ASK.conversation, **changes)


def _texts(events: Sequence[GenerationEvent], index: int = 0) -> list[str]:
    return [
        event.event.text
        for event in events
        if isinstance(event, Said) and event.index == index and isinstance(event.event, TextDelta)
    ]


def _done(events: Sequence[GenerationEvent]) -> SampleDone:
    (done,) = [event for event in events if isinstance(event, SampleDone)]
    assert events[-1] is done
    return done


# --- a runner whose steps are what a test says -----------------------------------------------------------------


@dataclass
class _Steps:
    """Hands out some steps, and notes that it was closed."""

    steps: list[Step]
    closed: list[bool] = field(default_factory=list)

    def __aiter__(self) -> "_Steps":
        return self

    async def __anext__(self) -> Step:
        if not self.steps:
            raise StopAsyncIteration
        return self.steps.pop(0)

    async def aclose(self) -> None:
        self.closed.append(True)


class _Runner:
    def __init__(self, served: Served, steps: list[Step]) -> None:
        self.steps = _Steps(steps)
        self.metrics: EngineMetrics = served.runner.metrics
        self.stats, self.drain = served.runner.stats, served.runner.drain

    def submit(self, request: Request) -> _Steps:
        return self.steps


def _in_steps(
    completion: str, sizes: Sequence[int], *, logprobs: bool = False, template: str | None = None
) -> tuple[Served, _Steps]:
    """A model that says this completion in steps of so many tokens, the last size over and over; in Harmony where it
    has no template of its own."""
    served = _script(completion=completion)
    tokens = served.prompting.the_tokenizer().encode_with_control(completion)
    steps, at, number = [], 0, 0
    while at < len(tokens):
        size = sizes[min(number, len(sizes) - 1)]
        part = tuple(tokens[at : at + size])
        at, number = at + size, number + 1
        ended = at >= len(tokens)
        stats = RequestStats(
            num_prompt_tokens=9,
            num_cached_tokens=5,
            num_tokens=len(tokens),
            num_preemptions=0,
            queue_seconds=0.0,
            first_token_seconds=0.0,
            total_seconds=0.0,
        )
        scored = tuple(TokenLogprobs(-float(token), ()) for token in part) if logprobs else None
        steps.append(
            Step(
                index=0,
                tokens=part,
                logprobs=scored,
                num_cached_tokens=5,
                finish="stop" if ended else None,
                stats=stats if ended else None,
            )
        )
    runner = _Runner(served, steps)
    prompting = replace(served.prompting, chat_template=template)
    harmony = None if template is None else False
    return Served(name="steps", prompting=prompting, runner=runner, harmony=harmony), runner.steps


def _said(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


# --- texts and their tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), ("never",), ("sun",), ("sunny, and", "!?"), ("🗻",), ("\N{MOUNT FUJI} It is ",)])
@pytest.mark.parametrize("sizes", [[1], [2], [3, 1, 4], [100]])
@pytest.mark.parametrize("template", [None, CHATML], ids=["harmony", "template"])
def test_the_tokens_of_the_text_so_far_decode_to_it_wherever_steps_and_stop_strings_end(
    stop: tuple[str, ...], sizes: list[int], template: str | None
) -> None:
    async def scenario() -> None:
        completion = _said(TEXT) if template is None else f"{TEXT}<|return|>"
        served, _ = _in_steps(completion, sizes, logprobs=True, template=template)
        events = await _events(served, _asking(stop=stop, sampling=SamplingOptions(logprobs=0)))
        tokenizer = served.prompting.the_tokenizer()
        deltas = [event for event in events if isinstance(event, Said) and isinstance(event.event, TextDelta)]
        cut = min((TEXT.index(word) for word in stop if word in TEXT), default=len(TEXT))
        assert "".join(_texts(events)) == TEXT[:cut]
        scored: list[int] = []
        text = ""
        for delta in deltas:
            assert isinstance(delta.event, TextDelta)
            scored += [token.token for token in delta.scored]
            text += delta.event.text
            decoded = tokenizer.decode(scored).rstrip("\ufffd")  # of a character that is not whole yet
            is_cut = delta is deltas[-1] and cut < len(TEXT)
            assert decoded.startswith(text) if is_cut else decoded == text
            assert all(token.logprobs.logprob == -token.token for token in delta.scored)

    _run(scenario())


def test_a_template_s_answer_has_the_tokens_of_a_character_that_it_begins_with() -> None:
    async def scenario() -> None:
        served, _ = _in_steps("🌋 It<|return|>", [1], logprobs=True, template=CHATML)
        events = await _events(served, _asking(sampling=SamplingOptions(logprobs=0)))
        deltas = [event for event in events if isinstance(event, Said) and isinstance(event.event, TextDelta)]
        tokenizer = served.prompting.the_tokenizer()
        assert len(tokenizer.encode("🌋")) > 1
        assert [tokenizer.decode([scored.token for scored in event.scored]) for event in deltas] == ["🌋", " It"]

    _run(scenario())


def test_a_character_that_never_ends_has_its_own_tokens_and_not_the_stop_token() -> None:
    async def scenario() -> None:
        served = _script(completion=_said("x"))
        tokenizer = served.prompting.the_tokenizer()
        half = tokenizer.encode("🌋")[:1]
        tokens = [*tokenizer.encode_with_control("<|channel|>final<|message|>x"), *half]
        tokens += tokenizer.encode_with_control("<|return|>")
        scored = tuple(TokenLogprobs(-1.0, ()) for _ in tokens)
        runner = _Runner(served, [Step(index=0, tokens=tuple(tokens), logprobs=scored, finish="stop")])
        events = await _events(
            Served(name="x", prompting=served.prompting, runner=runner), _asking(sampling=SamplingOptions(logprobs=0))
        )
        deltas = [event for event in events if isinstance(event, Said) and isinstance(event.event, TextDelta)]
        assert [event.event for event in deltas] == [TextDelta("x"), TextDelta("\ufffd")]
        assert [[scored.token for scored in event.scored] for event in deltas] == [tokenizer.encode("x"), half]

    _run(scenario())


@pytest.mark.parametrize("sizes", [[1], [2], [5], [100]])
def test_a_stop_string_ends_the_answer_and_the_request_and_history_is_cut_there(sizes: list[int]) -> None:
    async def scenario() -> None:
        served, steps = _in_steps(f"<|channel|>analysis<|message|>sunny?<|end|><|start|>assistant{_said(TEXT)}", sizes)
        events = await _events(served, _asking(stop=("sunny, and", "it rains")))
        done = _done(events)
        cut = TEXT[: TEXT.index("sunny, and")]
        assert "".join(_texts(events)) == cut
        assert (done.end, done.stop_string, done.num_cached_tokens) == ("stop", "sunny, and", 5)
        assert [message.text for message in done.messages] == ["sunny?", cut]
        said = [event.event for event in events if isinstance(event, Said)]
        assert said[-1] == MessageDone(message=done.messages[-1], stop_id=None)
        assert steps.closed

    _run(scenario())


def test_what_could_have_been_a_stop_string_comes_when_the_message_ends() -> None:
    async def scenario() -> None:
        served, _ = _in_steps(_said("Yes and no"), [1])
        events = await _events(served, _asking(stop=("no, never",)))
        assert "".join(_texts(events)) == "Yes and no"
        assert _done(events).stop_string is None

    _run(scenario())


# --- counts and ends -------------------------------------------------------------------------------------------


def test_reasoning_is_counted_with_its_header_and_its_end() -> None:
    async def scenario() -> None:
        reasoning = "<|channel|>analysis<|message|>One two three.<|end|>"
        served, _ = _in_steps(f"{reasoning}<|start|>assistant{_said('Four.')}", [1])
        done = _done(await _events(served))
        tokenizer = served.prompting.the_tokenizer()
        assert done.num_reasoning_tokens == len(tokenizer.encode_with_control(reasoning))
        assert done.num_tokens == len(tokenizer.encode_with_control(f"{reasoning}<|start|>assistant{_said('Four.')}"))
        assert done.num_cached_tokens == 5

    _run(scenario())


def test_a_turn_that_ends_in_a_call_says_so() -> None:
    tools = DeveloperContent(tools=(Tool(name="look", parameters={"type": "object"}),))
    conversation = Conversation(messages=(Message(role="developer", parts=(tools,)), text_message("user", "Look.")))

    async def scenario() -> None:
        served = _script(reasoning="I look.", calls=[{"name": "look", "arguments": {}}])
        done = _done(await _events(served, Ask(conversation=conversation)))
        assert done.end == "calls"
        assert [(message.channel, message.recipient, message.text) for message in done.messages] == [
            ("analysis", None, "I look."),
            ("commentary", "functions.look", "{}"),
        ]

    _run(scenario())


def test_samples_are_read_side_by_side_and_each_to_its_own_end() -> None:
    async def scenario() -> None:
        events = await _events(_script(reasoning="Hm.", answer=TEXT), _asking(n=3))
        for index in range(3):
            assert "".join(_texts(events, index)) == TEXT
        ends = [event for event in events if isinstance(event, SampleDone)]
        assert [done.index for done in ends] == [0, 1, 2]
        order = [event.index for event in events if isinstance(event, Said) and isinstance(event.event, ReasoningDelta)]
        assert order[:3] == [0, 1, 2]

    _run(scenario())


def test_a_message_that_the_limit_cuts_is_kept_as_far_as_it_came() -> None:
    async def scenario() -> None:
        done = _done(await _events(_script(answer=TEXT), _asking(max_tokens=6)))
        assert done.end == "length"
        assert done.messages[0].text
        assert TEXT.startswith(done.messages[0].text)

    _run(scenario())


# --- what goes wrong, and who leaves ---------------------------------------------------------------------------


def test_a_fault_comes_after_what_was_said_and_frees_the_request() -> None:
    async def scenario() -> None:
        served = _script(answer="One two", fault="out of luck")
        heard: list[GenerationEvent] = []
        turn = await prepare_generation(served, ASK)
        with pytest.raises(RequestError, match="out of luck"):
            async for batch in turn.events(served.runner):
                heard += batch
        assert "".join(_texts(heard)) == "One two"
        assert served.runner.stats().running == 0

    _run(scenario())


def test_steps_that_just_stop_are_an_error() -> None:
    async def scenario() -> None:
        served, steps = _in_steps(_said("One two three"), [1])
        steps.steps.pop()
        with pytest.raises(RequestError, match="before it was complete"):
            await _events(served)
        assert steps.closed

    _run(scenario())


async def _first(events: GenerationEvents) -> None:
    assert await anext(events)


def test_who_leaves_in_the_middle_frees_everything() -> None:
    async def closed(events: GenerationEvents) -> None:
        await _first(events)
        await events.aclose()

    async def unread(events: GenerationEvents) -> None:
        pass

    async def cancelled(events: GenerationEvents) -> None:
        async def read() -> None:
            async for _ in events:
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])

    async def scenario() -> None:
        served = _script(answer=TEXT)
        gc.disable()  # forgetting is enough
        try:
            for leave in (closed, unread, cancelled):
                turn = await prepare_generation(served, ASK)
                events = turn.events(served.runner)
                assert served.runner.stats().running == 1
                await leave(events)
                del events
                assert served.runner.stats().running == 0, leave.__name__
        finally:
            gc.enable()

    _run(scenario())


def test_a_turn_that_is_prepared_and_not_read_asks_nothing_of_the_engine() -> None:
    async def scenario() -> None:
        served = _script(answer=TEXT)
        turn = await prepare_generation(served, ASK)
        assert (served.runner.stats().running, served.runner.stats().requests) == (0, 0)
        assert turn.num_prompt_tokens > 0

    _run(scenario())


def test_what_cannot_run_is_known_before_it_runs() -> None:
    async def scenario() -> None:
        served = _script(answer=TEXT)
        await served.runner.drain()
        turn = await prepare_generation(served, ASK)
        with pytest.raises(ClosedError):
            turn.events(served.runner)
        with pytest.raises(UsageError, match="stop strings"):
            await prepare_generation(served, _asking(stop=("",)))
        long = Conversation(messages=(text_message("user", "a " * 140_000),))
        with pytest.raises(ContextError, match="131072"):
            await prepare_generation(served, Ask(conversation=long))

    _run(scenario())
