"""The scripted model: its files, which turn comes when, at what pace, how it ends. No test waits for time to pass."""

import asyncio
import json
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from freehold.engine.request import Completion, Request, Step
from freehold.errors import ClosedError, RequestError, UsageError
from freehold.formats.conversation import Conversation, Message, Text, text_message
from freehold.formats.harmony.grammar import TurnGrammar, TurnOptions
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.render import render
from freehold.formats.tokenizer import Tokenizer
from freehold.sampling import Sampling
from freehold.session.scripted import ScriptedSteps, ScriptedTurn, read_script, serve_script
from freehold.session.served import Served

TOKENIZER = Tokenizer.o200k_harmony()


def _run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def _turns(*turns: dict[str, Any]) -> list[ScriptedTurn]:
    return [ScriptedTurn.from_json(turn) for turn in turns]


def _prompt(text: str) -> list[int]:
    return render(Conversation(messages=(text_message("user", text),)), TOKENIZER).ids


def _request(text: str = "Hello", **changes: Any) -> Request:
    known = TOKENIZER.control_tokens
    stop_ids = frozenset({known["<|return|>"], known["<|call|>"]})
    return Request(**{"prompt": _prompt(text), "max_tokens": 1000, "stop_ids": stop_ids, **changes})


async def _samples(served: Served, request: Request) -> list[Completion]:
    samples = [Completion() for _ in range(request.n)]
    async for step in served.runner.submit(request):
        samples[step.index].add(step)
    return samples


async def _says(served: Served, text: str) -> str:
    (sample,) = await _samples(served, _request(text))
    return TOKENIZER.decode(sample.tokens, control="show").partition("<|message|>")[2].removesuffix("<|return|>")


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "Expecting"),
        ("[]", "a turn is an object"),
        ('{"says": "x"}', "no field 'says'"),
        ('{"match": "x"}', "either a completion"),
        ('{"completion": "x", "answer": "y"}', "either a completion"),
        ('{"completion": ""}', "at least one token"),
        ('{"completion": null}', "either a completion"),
        ('{"answer": 3}', "answer is text"),
        ('{"answer": "x", "match": "("}', "no regular expression"),
        ('{"calls": {"name": "f"}}', "calls are a list"),
        ('{"calls": [{"name": "f"}]}', "a name and arguments"),
        ('{"calls": [{"name": "f<|", "arguments": {}}]}', "a name and arguments"),
        ("[" * 5000, "line 3"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_its_number(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "turns.jsonl"
    path.write_text(f'{{"answer": "first"}}\n\n{line}\n')
    with pytest.raises(UsageError) as caught:
        read_script(path)
    assert "line 3" in str(caught.value)
    assert told in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    with pytest.raises(UsageError, match="cannot be read"):
        read_script(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="cannot be read"):
        read_script(path)
    path.write_text("\n\n")
    with pytest.raises(UsageError, match="has no turns"):
        read_script(path)


def test_what_unicode_calls_a_line_end_is_text_here(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"answer": "one\u2028two\x85three"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (turn,) = read_script(path)
    assert "one\u2028two\x85three" in turn.completion


def test_the_short_way_to_write_a_turn_is_the_long_one() -> None:
    turns = _turns(
        {"reasoning": "Hm.", "answer": "Yes."},
        {"reasoning": None, "answer": "Yes."},
        {"answer": "Wait.", "calls": [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "{}"}]},
    )
    assert [turn.completion for turn in turns] == [
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        "<|channel|>final<|message|>Yes.<|return|>",
        "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|><|start|>assistant'
        "<|channel|>commentary to=functions.g <|constrain|>json<|message|>{}<|call|>",
    ]


# --- which turn comes ------------------------------------------------------------------------------------------


def test_turns_that_match_come_as_often_as_they_do_and_others_once_each_in_order() -> None:
    async def scenario() -> None:
        served = serve_script(
            _turns({"answer": "first"}, {"match": "(?i)rain|sun", "answer": "weather"}, {"answer": "second"})
        )
        asked = ["Will it RAIN?", "Hello", "And the sun?", "Hello", "The sun again?"]
        assert [await _says(served, text) for text in asked] == ["weather", "first", "weather", "second", "weather"]
        with pytest.raises(RequestError, match="no turn left") as caught:
            await _says(served, "a secret")
        assert "secret" not in str(caught.value)

    _run(scenario())


def test_only_the_last_message_is_matched() -> None:
    messages = (
        text_message("user", "sun"),
        Message(role="assistant", parts=(Text(text="{}"),), channel="commentary", recipient="functions.f"),
        Message(role="tool", parts=(Text(text="rain"),), name="functions.f", channel="commentary"),
    )

    async def scenario() -> None:
        served = serve_script(_turns({"match": "^sun$", "answer": "no"}, {"match": "^rain$", "answer": "yes"}))
        prompt = render(Conversation(messages=messages), TOKENIZER).ids
        (sample,) = await _samples(served, _request(prompt=prompt))
        assert "yes" in TOKENIZER.decode(sample.tokens)
        (plain,) = await _samples(served, _request(prompt=TOKENIZER.encode("sun")))
        assert "no" in TOKENIZER.decode(plain.tokens)

    _run(scenario())


def test_the_grammar_objects_where_it_objects() -> None:
    async def scenario() -> None:
        served = serve_script(_turns({"calls": [{"name": "look", "arguments": {}}]}))
        grammar = TurnGrammar(TOKENIZER, TurnOptions(offer=Offer.of(Conversation(messages=()))))
        heard: list[Step] = []
        with pytest.raises(RequestError, match=r"'comment' as token 1 of its turn, after '<\|channel\|>'"):
            async for step in served.runner.submit(_request(constraint=grammar)):
                heard.append(step)  # noqa: PERF401 - what came before the error counts
        assert [step.tokens for step in heard] == [(TOKENIZER.control_tokens["<|channel|>"],)]
        assert served.runner.stats().running == 0

    _run(scenario())


# --- how it ends -----------------------------------------------------------------------------------------------


def test_length_logprobs_and_samples() -> None:
    async def scenario() -> None:
        served = serve_script(_turns({"answer": "one two three"}))
        first, second = await _samples(served, _request(n=2, max_tokens=5, sampling=Sampling(logprobs=3)))
        assert first.tokens == second.tokens
        assert (first.finish, len(first.tokens)) == ("length", 5)
        assert first.logprobs == [(0.0, ((token, 0.0),)) for token in first.tokens]
        assert first.stats is not None
        assert first.stats.num_tokens == 5
        assert served.runner.stats().generated_tokens == 10

    _run(scenario())


def test_a_fault_comes_when_all_has_been_said_and_no_sample_ends_before() -> None:
    async def scenario() -> None:
        served = serve_script(_turns({"answer": "one", "fault": "out of luck"}))
        samples = [Completion(), Completion()]
        with pytest.raises(RequestError, match=r"^out of luck$"):
            async for step in served.runner.submit(_request(n=2)):
                samples[step.index].add(step)
        assert [sample.finish for sample in samples] == [None, None]
        assert TOKENIZER.decode(samples[1].tokens, control="show").endswith("one<|return|>")

    _run(scenario())


# --- the pace --------------------------------------------------------------------------------------------------


class _Clock:
    """Time passes only where somebody waits for it, or a test says so."""

    def __init__(self) -> None:
        self.time = 100.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


def _paced(clock: _Clock, *, speed: float = 4.0) -> Served:
    return serve_script(_turns(*[{"answer": "one two three"}] * 3), tokens_per_second=speed, clock=clock)


def test_tokens_come_at_the_pace_that_was_asked_for_however_slow_the_reader_is() -> None:
    async def scenario() -> None:
        clock = _Clock()
        times = []
        async for _ in _paced(clock).runner.submit(_request()):
            times.append(clock.time - 100.0)
            clock.time += 0.1  # the reader's own
        assert times == pytest.approx([0.25 * number for number in range(1, len(times) + 1)])

    _run(scenario())


def test_without_a_pace_nothing_waits() -> None:
    async def scenario() -> None:
        clock = _Clock()
        await _samples(serve_script(_turns({"answer": "one"}), clock=clock), _request())
        assert clock.slept == []

    _run(scenario())


def test_a_deadline_ends_a_sample_also_between_two_tokens() -> None:
    async def scenario() -> None:
        clock = _Clock()
        (sample,) = await _samples(_paced(clock), _request(deadline=0.6))
        assert (sample.finish, len(sample.tokens)) == ("deadline", 2)
        assert clock.time == pytest.approx(100.6)
        assert sample.stats is not None
        assert sample.stats.total_seconds == pytest.approx(0.6)
        assert sample.stats.first_token_seconds == pytest.approx(0.25)

    _run(scenario())


async def _rest(steps: ScriptedSteps) -> Sequence[Step]:
    return [step async for step in steps]


def test_draining_waits_for_what_runs_and_takes_nothing_more() -> None:
    async def scenario() -> None:
        served = serve_script(_turns({"answer": "one"}, {"answer": "two"}))
        steps = served.runner.submit(_request())
        draining = asyncio.ensure_future(served.runner.drain())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            served.runner.submit(_request())
        assert not draining.done()
        assert [step.finish async for step in steps][-1] == "stop"
        await draining
        await served.runner.drain()  # again, with nothing to wait for

    _run(scenario())


def test_draining_aborts_after_its_time_also_who_waits_for_a_slow_token() -> None:
    class OnlyDraining(_Clock):
        async def sleep(self, seconds: float) -> None:
            self.slept.append(seconds)
            if seconds != 5:
                await asyncio.Event().wait()  # the next token takes for ever

    async def scenario() -> None:
        clock = OnlyDraining()
        served = _paced(clock)
        steps = served.runner.submit(_request())
        assert isinstance(steps, ScriptedSteps)
        reading = asyncio.ensure_future(_rest(steps))
        while not clock.slept:
            await asyncio.sleep(0)
        await served.runner.drain(5)
        (last,) = await reading
        assert (last.finish, last.tokens) == ("abort", ())

    _run(scenario())


def test_speeds_that_are_none() -> None:
    for speed in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="tokens per second"):
            serve_script(_turns({"answer": "x"}), tokens_per_second=speed)
