"""The making of a Response object from the events of a turn, by itself."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest

from freehold.formats.events import ArgumentsDelta, ReasoningDelta, TextDelta
from freehold.serve.caller import Caller
from freehold.serve.errors import ApiError
from freehold.serve.responses.plan import plan
from freehold.serve.responses.stream import ResponseStream
from freehold.serve.responses.wire import ResponseCreate
from freehold.session.generation import Said
from freehold.session.turn import TurnEvent
from tests.serve.event_order import EventOrder
from tests.serve.responding import WEATHER, Responding

pytestmark = pytest.mark.anyio

TURN = {
    "completion": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
    "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Zürich 🏔"}<|call|><|start|>assistant<|channel|>final<|message|>Done 😀.<|return|>'
}


async def events_and_stream(there: Responding) -> tuple[list[TurnEvent], Any]:
    """What the turn says, and what makes new streams for it."""
    made = await plan(there.server, Caller(), ResponseCreate(input="Weather?", tools=[WEATHER]))
    events = [event async for batch in made.turn.events(there.server.served.runner) for event in batch]

    def stream() -> ResponseStream:
        numbers = count()
        return ResponseStream(
            made.response,
            new_id=lambda kind: f"{kind}_{next(numbers)}",
            names=made.tools.by_name,
            clock=lambda: 1.0,
        )

    return events, stream


def told(stream: ResponseStream, events: Sequence[TurnEvent]) -> dict[str, Any]:
    said = [*stream.created(), *stream.started()]
    said += [event for given in events for event in stream.feed(given)]
    return EventOrder.of([*said, *stream.ended()])


def split(event: TurnEvent, size: int) -> list[TurnEvent]:
    if not isinstance(event, Said) or not isinstance(event.event, TextDelta | ReasoningDelta | ArgumentsDelta):
        return [event]
    kind, text = type(event.event), event.event.text
    return [Said(event.index, kind(text[at : at + size])) for at in range(0, len(text), size)]


async def test_the_response_is_the_same_however_its_text_was_split() -> None:
    turn = {"completion": TURN["completion"].replace("<|start|>assistant<|channel|>final<|message|>Done 😀.", "")}
    async with Responding(turn) as there:
        events, stream = await events_and_stream(there)
    whole = told(stream(), events)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    for size in (1, 2, 3, 7):
        assert told(stream(), [part for event in events for part in split(event, size)]) == whole


async def test_wherever_it_ends_the_stream_ends_in_order() -> None:
    turn = {"completion": TURN["completion"].replace("<|start|>assistant<|channel|>final<|message|>Done 😀.", "")}
    async with Responding(turn) as there:
        events, stream = await events_and_stream(there)
    for length in range(len(events)):
        for status in ("failed", "cancelled"):
            one = stream()
            said = [*one.created(), *one.started()]
            said += [event for given in events[:length] for event in one.feed(given)]
            one.fail(ApiError(500, "a fault")) if status == "failed" else one.cancel()
            final = EventOrder.of([*said, *one.ended()])
            assert final["status"] == status
            assert all(item["status"] != "in_progress" for item in final["output"])
            assert one.ended() == one.ended()  # where the store failed they are told anew
