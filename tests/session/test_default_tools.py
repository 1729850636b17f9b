"""The default model uses tools, whole and for real: weights, grammar, loop, a folder of documents, a kernel.

It was not tuned on Harmony, so it is shown how: calls of an open turn are examples that it follows. It is also nudged
to end its messages, whose closing tokens it has never seen. What it calls, and what comes of it, is its own doing.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import freehold
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import Conversation, Message, SystemContent, Text, text_message
from freehold.formats.forms import Regex
from freehold.formats.harmony.grammar import NamedTool
from freehold.formats.harmony.vocabulary import CALL, RETURN
from freehold.sampling import SamplingOptions
from freehold.session.generation import Ask, SampleDone
from freehold.session.served import serve_model
from freehold.session.toolbox import Toolbox
from freehold.session.turn import ToolDone, ToolStart, TurnEvent, TurnLimits, prepare
from freehold.tools.base import FunctionTools, Tool
from freehold.tools.kit import ToolChoices, local_tools

_NUDGE = 6.0
_SYSTEM = Message(role="system", parts=(SystemContent(date="2026-01-01"),))  # its words depend on the day


def _example(question: str, tool: str, call: str, result: str) -> tuple[Message, ...]:
    return (
        text_message("user", question),
        Message(role="assistant", parts=(Text(text=call),), channel="analysis", recipient=tool, content_type="code"),
        Message(role="tool", parts=(Text(text=result),), channel="analysis", recipient="assistant", name=tool),
    )


async def _turn(
    model: freehold.Model,
    tools: Sequence[Tool | FunctionTools],
    said: Sequence[Message],
    *,
    first: str,
    answer: Regex,
) -> list[TurnEvent]:
    control = model.prompting.the_tokenizer().control_tokens
    ask = Ask(
        conversation=Conversation(messages=(_SYSTEM, *said)),
        choices=TurnChoices(tool_choice=NamedTool(first), max_reasoning_tokens=0, response_format=answer),
        sampling=SamplingOptions(temperature=0, logit_bias={control[CALL]: _NUDGE, control[RETURN]: _NUDGE}),
        max_tokens=120,
    )
    served = serve_model(model, name="default", harmony=True)
    toolbox = await Toolbox.open(tools)
    try:
        turn = await prepare(served, ask, toolbox, limits=TurnLimits(max_tool_calls=1))
        return [event async for batch in turn.events(served.runner) for event in batch]
    finally:
        await toolbox.aclose()
        await served.runner.drain(0)


def _facts(events: Sequence[TurnEvent]) -> tuple[ToolStart, ToolDone, SampleDone]:
    (start,) = [event for event in events if isinstance(event, ToolStart)]
    (done,) = [event for event in events if isinstance(event, ToolDone)]
    (end,) = [event for event in events if isinstance(event, SampleDone)]
    assert done.problem is None
    assert end.end == "stop"
    return start, done, end


def test_a_question_about_a_folder_of_documents(default_folder: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "guide.md").write_text(
        "# The guide\n\n## Opening hours\n\nThe museum opens at nine and closes at six.\nOn Mondays it is closed.\n"
    )
    (docs / "shop.md").write_text("# The shop\n\nPostcards cost two crowns.\n")
    model = freehold.load(default_folder, device="cpu", context=2048)
    examples = [
        message
        for question, query in (
            ("Where is the library?", "library"),
            ("Who wrote the report?", "report author"),
            ("What does a ticket cost?", "ticket price"),
        )
        for message in _example(question, "browser.search", json.dumps({"query": query}), "Nothing was found.")
    ]
    said = [*examples, text_message("user", "When does the museum open?")]
    with local_tools(ToolChoices(browse=(docs,)), tokenizer=model.prompting.the_tokenizer()) as tools:
        answer = Regex(r"The museum opens at (six|seven|eight|nine|ten|noon)\.")
        start, done, end = _facts(asyncio.run(_turn(model, tools, said, first="browser.search", answer=answer)))
    assert "museum" in json.loads(start.arguments)["query"]
    assert "The museum opens at nine" in done.message.text
    assert end.messages[-1].text == "The museum opens at nine."


def test_a_calculation(default_folder: Path) -> None:
    model = freehold.load(default_folder, device="cpu", context=2048)
    examples = [
        message
        for a, b in ((12, 5), (7, 30), (250, 4))
        for message in _example(f"What is {a} * {b}?", "python", f"print({a} * {b})", str(a * b))
    ]
    said = [*examples, text_message("user", "What is 1234 * 5678?")]
    with local_tools(ToolChoices(python=True), tokenizer=model.prompting.the_tokenizer()) as tools:
        answer = Regex(r"[0-9]{1,9}")
        start, done, end = _facts(asyncio.run(_turn(model, tools, said, first="python", answer=answer)))
    assert start.arguments.strip() == "print(1234 * 5678)"
    assert done.message.text == str(1234 * 5678)
    assert end.messages[-1].text.isdigit()  # a model this small does not copy long numbers well
