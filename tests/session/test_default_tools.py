"""The default model uses tools, whole and for real: weights, grammar, loop, a folder of documents, a kernel.

Nothing helps it: it is asked as `freehold chat` asks, and what it calls, and what comes of it, is its own doing.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import freehold
from freehold.formats.conversation import Conversation, Message, SystemContent, text_message
from freehold.sampling import SamplingOptions
from freehold.session.generation import Ask, SampleDone
from freehold.session.served import serve_model
from freehold.session.toolbox import Toolbox
from freehold.session.turn import ToolDone, ToolStart, TurnEvent, TurnLimits, prepare
from freehold.tools.base import FunctionTools, Tool
from freehold.tools.kit import ToolChoices, local_tools

_SYSTEM = Message(role="system", parts=(SystemContent(date="2026-01-01"),))  # its words depend on the day


async def _turn(model: freehold.Model, tools: Sequence[Tool | FunctionTools], question: str) -> list[TurnEvent]:
    conversation = Conversation(messages=(_SYSTEM, text_message("user", question)))
    ask = Ask(conversation=conversation, sampling=SamplingOptions(temperature=0), max_tokens=160)
    served = serve_model(model, name="default")
    toolbox = await Toolbox.open(tools)
    try:
        turn = await prepare(served, ask, toolbox, limits=TurnLimits(max_tool_calls=4))
        return [event async for batch in turn.events(served.runner) for event in batch]
    finally:
        await toolbox.aclose()
        await served.runner.drain(0)


def _answer(events: Sequence[TurnEvent]) -> str:
    (end,) = [event for event in events if isinstance(event, SampleDone)]
    assert end.end == "stop"
    assert end.messages[-1].channel == "final"
    return end.messages[-1].text


def test_a_question_about_a_folder_of_documents(default_folder: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "guide.md").write_text(
        "# The guide\n\n## Opening hours\n\nThe museum opens at nine and closes at six.\nOn Mondays it is closed.\n"
    )
    (docs / "shop.md").write_text("# The shop\n\nPostcards cost two crowns.\n")
    model = freehold.load(default_folder, device="cpu", context=2048)
    with local_tools(ToolChoices(browse=(docs,)), tokenizer=model.prompting.the_tokenizer()) as tools:
        events = asyncio.run(_turn(model, tools, "When does the museum open?"))
    starts = [event for event in events if isinstance(event, ToolStart)]
    assert starts[0].recipient == "browser.search"
    assert "museum" in json.loads(starts[0].arguments)["query"]
    assert all(event.problem is None for event in events if isinstance(event, ToolDone))
    assert "nine" in _answer(events)


def test_a_calculation(default_folder: Path) -> None:
    model = freehold.load(default_folder, device="cpu", context=2048)
    with local_tools(ToolChoices(python=True), tokenizer=model.prompting.the_tokenizer()) as tools:
        events = asyncio.run(_turn(model, tools, "What is 1234 * 5678?"))
    (start,) = [event for event in events if isinstance(event, ToolStart)]
    assert start.arguments.strip() == "print(1234 * 5678)"
    (done,) = [event for event in events if isinstance(event, ToolDone)]
    assert done.message.text.strip() == str(1234 * 5678)
    assert str(1234 * 5678) in _answer(events)
