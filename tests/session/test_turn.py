"""The agent loop, driven by a script: tools that fail, calls of nobody, limits, cancellations at every event."""

import asyncio
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.engine.request import Request
from freehold.errors import ClosedError, RequestError, UnsupportedError, UsageError
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import (
    DeveloperContent,
    Message,
    SystemContent,
    Tool,
    text_message,
)
from freehold.formats.harmony.grammar import AllowedTools, NamedTool
from freehold.formats.tokenizer import Tokenizer
from freehold.session import turn as turn_module
from freehold.session.generation import SampleDone
from freehold.session.history import ToolDone, ToolStart, TurnEvent, TurnHistory
from freehold.session.scripted import ScriptedTurn
from freehold.session.toolbox import Toolbox
from freehold.session.turn import TurnLimits
from freehold.tools.apply_patch import ApplyPatchTool
from freehold.tools.base import Citation, ToolResult
from freehold.tools.browser.browser import Browser
from freehold.tools.browser.documents import Documents
from freehold.tools.functions import FunctionToolset
from freehold.tools.python.tool import PythonTool
from tests.session.turns import (
    FUNCTIONS,
    ODD,
    USER,
    Lab,
    add,
    asking,
    be_late,
    calls,
    check_events,
    check_history,
    diagnostics,
    done,
    events_of,
    exit_,
    hang,
    lab,
    later,
    mumble,
    outline,
    raw,
    read,
    ready,
    run,
    says,
    serve,
    tear,
    told,
)

ADD = ("add", {"a": 1, "b": 2})
CLIENT = Tool(name="client", parameters={"type": "object", "properties": {}, "additionalProperties": False})
THEIRS = (Message(role="developer", parts=(DeveloperContent(tools=(CLIENT,)),)), USER)
CALL = "<|channel|>commentary to={} <|constrain|>json<|message|>{}"
NEXT = "<|start|>assistant"


def call_of(name: str, arguments: str = "{}", end: str = "<|call|>") -> str:
    return CALL.format(name, arguments) + end


async def yes(start: ToolStart) -> bool:
    return True


async def no(start: ToolStart) -> bool:
    return False


async def only_add(start: ToolStart) -> bool:
    return start.recipient == "functions.add"


# --- what a turn comes to ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A turn: what the model says, what must come of it, what the model is told (a part of it, call by call)."""

    script: Sequence[Any]
    comes: str
    told: Sequence[str] = ()
    grammar: bool = True
    tools: Callable[[], Sequence[Any]] = lambda: (FUNCTIONS, Lab(late=be_late, tear=tear, mumble=mumble, exit=exit_))
    limits: TurnLimits = field(default_factory=TurnLimits)
    choices: TurnChoices = field(default_factory=TurnChoices)
    messages: Sequence[Message] = (USER,)
    asks: dict[str, Any] = field(default_factory=dict)
    approve: Any = None
    waiting: Sequence[str] = ()


PARALLEL = TurnChoices(parallel_tool_calls=True)
SUM = call_of("functions.add", '{"a":1,"b":2}')
PAIR = raw(SUM + NEXT + call_of("functions.add", '{"a":3,"b":4}') + "<|return|>")
MIXED = raw(call_of("functions.client") + NEXT + SUM + "<|return|>")

ROWS: dict[str, Row] = {
    # Tools that work.
    "an answer without a call": Row(script=[says("Hi", "hm")], comes="thinks, says Hi, stop"),
    "a call and an answer": Row(
        script=[calls(ADD, think="sum"), says("3")],
        comes="thinks, calls add, start 0, done 0, says 3, stop",
        told=["3"],
    ),
    "four steps, with tools of both kinds": Row(
        script=[calls(ADD, think="a"), lab("work", think="b"), calls(("later", {"word": "hü"})), says("ok", "c")],
        comes="thinks, calls add, start 0, done 0, thinks, calls lab.work, start 1, done 1, calls later, start 2, "
        "done 2, thinks, says ok, stop",
        told=["3", "worked", "hü"],
    ),
    "a preamble before a call": Row(
        script=[raw(f"<|channel|>commentary<|message|>First.<|end|>{NEXT}{calls(ADD).completion}"), says("3")],
        comes="tells First., calls add, start 0, done 0, says 3, stop",
        told=["3"],
    ),
    "two calls at once": Row(
        script=[PAIR, says("3 and 7")],
        choices=PARALLEL,
        comes="calls add, calls add, start 0, done 0, start 1, done 1, says 3 and 7, stop",
        told=["3", "7"],
    ),
    "the recipient before the channel": Row(
        script=[raw(' to=functions.add<|channel|>commentary json<|message|>{"a":1,"b":2}<|call|>'), says("3")],
        comes="calls add, start 0, done 0, says 3, stop",
        told=["3"],
    ),
    # Tools that give odd things.
    "half a character": Row(
        script=[calls(("odd", {"kind": "surrogate"})), says("ok")],
        comes="calls odd, start 0, done 0, says ok, stop",
        told=["half ? of one"],
    ),
    "the words of control tokens": Row(
        script=[calls(("odd", {"kind": "control"})), says("ok")],
        comes="calls odd, start 0, done 0, says ok, stop",
        told=[ODD["control"]],
    ),
    "nothing, and an empty text": Row(
        script=[calls(("odd", {"kind": "nothing"})), calls(("odd", {"kind": "empty"})), says("ok")],
        comes="calls odd, start 0, done 0, calls odd, start 1, done 1, says ok, stop",
        told=["null", ""],
    ),
    "what JSON can say, and what it cannot": Row(
        script=[calls(("odd", {"kind": "nested"})), calls(("odd", {"kind": "object"})), says("ok")],
        comes="calls odd, start 0, done 0, calls odd, start 1, done 1: failed, says ok, stop",
        told=['{"a":[1,2.5,null],"ü":true}', "Error: odd returned a object, which cannot be written as JSON"],
    ),
    "more than the model is shown": Row(
        script=[calls(("odd", {"kind": "long"})), says("ok")],
        limits=TurnLimits(result_tokens=3),
        comes="calls odd, start 0, done 0, says ok, stop",
        told=["word word word\n[The rest was too long and is not shown.]"],
    ),
    # Tools that fail.
    "functions that raise, and a sum after that": Row(
        script=[calls(("boom", {"why": "no"})), calls(("boom_later", {"why": "not now"})), calls(ADD), says("3")],
        comes="calls boom, start 0, done 0: failed, calls boom_later, start 1, done 1: failed, calls add, start 2, "
        "done 2, says 3, stop",
        told=["Error: boom failed: ValueError: no", "Error: not now", "3"],
    ),
    "a function that would end the program": Row(
        script=[calls(("leave", {})), says("ok")],
        comes="calls leave, start 0, done 0: failed, says ok, stop",
        told=["Error: leave failed: SystemExit: 3"],
    ),
    "a tool that would end the program": Row(
        script=[lab("exit"), says("ok")],
        comes="calls lab.exit, start 0, done 0: failed, says ok, stop",
        told=["Error: the tool failed with SystemExit: 1"],
    ),
    "a tool that was too slow itself, and one that cancels itself": Row(
        script=[lab("late"), lab("tear"), lab("ping"), says("ok")],
        comes="calls lab.late, start 0, done 0: failed, calls lab.tear, start 1, done 1: failed, calls lab.ping, "
        "start 2, done 2, says ok, stop",
        told=["Error: the disk is slow", "Error: the call was cancelled from within", "pong"],
    ),
    "an error that cannot even be shown": Row(
        script=[lab("mumble"), says("ok")],
        comes="calls lab.mumble, start 0, done 0: failed, says ok, stop",
        told=["Error: the tool failed with MuteError: it cannot be shown: MuteError"],
    ),
    "arguments that do not fit": Row(
        script=[calls(("add", {"a": "one"})), calls(ADD), says("3")],
        grammar=False,
        comes="calls add, start 0, done 0: failed, calls add, start 1, done 1, says 3, stop",
        told=["Error: add was not called: a: Input should be a valid integer", "3"],
    ),
    # Calls that must not be carried out. Without a grammar, which would not let them be.
    "a tool that nobody offered": Row(
        script=[calls(("subtract", {})), calls(ADD), says("3")],
        grammar=False,
        comes="calls subtract: not offered, start 0, done 0: unknown, calls add, start 1, done 1, says 3, stop",
        told=["Error: There is no tool functions.subtract. Tools: lab.work, ", "3"],
    ),
    "a namespace that nobody offered": Row(
        script=[raw("<|channel|>analysis to=browser.search code<|message|>{}<|call|>"), says("ok")],
        grammar=False,
        comes="calls browser.search: not offered, start 0, done 0: unknown, says ok, stop",
        told=["Error: There is no tool browser.search. Tools: lab.work, lab.ping"],
    ),
    "no tools at all, and a call": Row(
        script=[calls(ADD), says("ok")],
        grammar=False,
        tools=lambda: (),
        comes="calls add: not offered, start 0, done 0: unknown, says ok, stop",
        told=["Error: There is no tool functions.add. There are no tools."],
    ),
    "arguments that are no JSON, and no object": Row(
        script=[raw(call_of("functions.add", "{a:")), raw(call_of("functions.add", "[1]")), calls(ADD), says("3")],
        grammar=False,
        comes="calls add: not json, start 0, done 0: malformed, calls add: not an object, start 1, done 1: malformed, "
        "calls add, start 2, done 2, says 3, stop",
        told=["Error: The arguments are not JSON.", "Error: The arguments are no JSON object.", "3"],
    ),
    "a call to two at once": Row(
        script=[raw(call_of("functions.add to=functions.boom")), says("ok")],
        grammar=False,
        comes="calls add: several recipients, start 0, done 0: malformed, says ok, stop",
        told=["Error: A call goes to one tool only."],
    ),
    "a header that leaked into the reasoning": Row(
        script=[raw("<|channel|>analysis<|message|>Well.\nassistantcommentary to=functions.add json{}<|call|>"),
                says("ok")],
        grammar=False,
        comes="thinks, calls add: leaked, start 0, done 0: malformed, says ok, stop",
        told=["Error: The call was written as plain text and was not carried out."],
    ),
    "a call that ends as messages do, and an answer that did not wait": Row(
        script=[raw(call_of("functions.add", '{"a":1,"b":2}', "<|end|>") + NEXT + says("4").completion), says("No, 3")],
        grammar=False,
        comes="calls add, says 4, start 0, done 0, says No, 3, stop",
        told=["3"],
    ),
    # Limits.
    "the last step has to be an answer": Row(
        script=[calls(ADD), says("3")],
        limits=TurnLimits(max_steps=2),
        comes="calls add, start 0, done 0, says 3, stop",
        told=["3"],
    ),
    "no step left for an answer, and nothing that asks for one": Row(
        script=[calls(ADD), calls(ADD)],
        grammar=False,
        limits=TurnLimits(max_steps=2),
        comes="calls add, start 0, done 0, calls add, start 1, done 1: limit, limit",
        told=["3", "Error: The turn ends here, after 2 steps."],
    ),
    "no calls left, and an answer": Row(
        script=[PAIR, says("3")],
        choices=PARALLEL,
        limits=TurnLimits(max_tool_calls=1),
        comes="calls add, calls add, start 0, done 0, start 1, done 1: limit, says 3, stop",
        told=["3", "Error: No more than 1 calls are made. Answer with what there is."],
    ),
    "no calls left, once told, once more": Row(
        script=[calls(ADD), calls(ADD), calls(ADD)],
        grammar=False,
        limits=TurnLimits(max_tool_calls=1),
        comes="calls add, start 0, done 0, calls add, start 1, done 1: limit, calls add, start 2, done 2: limit, limit",
        told=["3", "Error: No more than 1", "Error: No more than 1"],
    ),
    "no calls allowed, once told, and an answer": Row(
        script=[calls(ADD), says("I cannot")],
        grammar=False,
        limits=TurnLimits(max_tool_calls=0),
        comes="calls add, start 0, done 0: limit, says I cannot, stop",
        told=["Error: No more than 0"],
    ),
    "calls that were never carried out do not count": Row(
        script=[calls(("subtract", {})), raw(call_of("functions.add", "{")), calls(ADD), says("3")],
        grammar=False,
        limits=TurnLimits(max_tool_calls=1),
        comes="calls subtract: not offered, start 0, done 0: unknown, calls add: not json, start 1, "
        "done 1: malformed, calls add, start 2, done 2, says 3, stop",
        told=["Error: There is no tool", "Error: The arguments are not JSON", "3"],
    ),
    "a tool that hangs, and no time for another": Row(
        script=[lab("hang"), says("It hangs")],
        tools=lambda: (Lab(hang=hang),),
        limits=TurnLimits(tool_seconds=0.02),
        comes="calls lab.hang, start 0, done 0: timeout, says It hangs, stop",
        told=["Error: The call was ended: the time for tools is spent. Answer with what there is."],
    ),
    "two at once, of which the first takes all the time": Row(
        script=[raw(f"{lab('hang').completion}{NEXT}{calls(ADD).completion}<|return|>"), says("ok")],
        tools=lambda: (FUNCTIONS, Lab(hang=hang)),
        choices=PARALLEL,
        limits=TurnLimits(tool_seconds=0.02),
        comes="calls lab.hang, calls add, start 0, done 0: timeout, start 1, done 1: limit, says ok, stop",
        told=["Error: The call was ended", "Error: The time for tools is spent."],
    ),
    "tokens that end within the second step": Row(
        script=[calls(ADD), says("one two three four five six")],
        asks={"max_tokens": 29},
        comes="calls add, start 0, done 0, says one two, length",
        told=["3"],
    ),
    "tokens that end with the first step": Row(
        script=[calls(ADD)],
        asks={"max_tokens": 24},
        comes="calls add, start 0, done 0, length",
        told=["3"],
    ),
    "tokens that end within a call": Row(
        script=[calls(ADD, think="hm")],
        asks={"max_tokens": 28},
        comes="thinks, calls add: broken off, length",
    ),
    "tokens that end after one of two calls": Row(
        script=[PAIR],
        choices=PARALLEL,
        asks={"max_tokens": 38},
        comes="calls add, calls add: broken off, length",
    ),
    "a stop string in an answer": Row(
        script=[calls(ADD), says("It is 3, I think")],
        asks={"stop": (", I",)},
        comes="calls add, start 0, done 0, says It is 3, stop",
        told=["3"],
    ),
    # What the caller asks for.
    "a call is required once": Row(
        script=[calls(ADD), says("3")],
        choices=TurnChoices(tool_choice="required"),
        comes="calls add, start 0, done 0, says 3, stop",
        told=["3"],
    ),
    "a named tool once, then any": Row(
        script=[calls(ADD), lab("ping"), says("3")],
        choices=TurnChoices(tool_choice=NamedTool("functions.add")),
        comes="calls add, start 0, done 0, calls lab.ping, start 1, done 1, says 3, stop",
        told=["3", "pong"],
    ),
    "some tools are allowed, one of them once": Row(
        script=[calls(ADD), calls(ADD), says("3")],
        choices=TurnChoices(tool_choice=AllowedTools(recipients=("functions.add",), required=True)),
        comes="calls add, start 0, done 0, calls add, start 1, done 1, says 3, stop",
        told=["3", "3"],
    ),
    "reasoning is required once": Row(
        script=[calls(ADD, think="hm"), says("3")],
        choices=TurnChoices(reasoning="required"),
        comes="thinks, calls add, start 0, done 0, says 3, stop",
        told=["3"],
    ),
    # The caller's own functions.
    "one of the caller's": Row(
        script=[calls(("client", {}), think="ask")],
        messages=THEIRS,
        comes="thinks, calls client, calls",
        waiting=["functions.client"],
    ),
    "ours, then the caller's": Row(
        script=[calls(ADD), calls(("client", {}))],
        messages=THEIRS,
        comes="calls add, start 0, done 0, calls client, calls",
        told=["3"],
        waiting=["functions.client"],
    ),
    "both at once": Row(
        script=[MIXED],
        messages=THEIRS,
        choices=PARALLEL,
        comes="calls client, calls add, start 0, done 0, calls",
        told=["3"],
        waiting=["functions.client"],
    ),
    "no calls of ours left, but of the caller's": Row(
        script=[calls(ADD), calls(("client", {}))],
        messages=THEIRS,
        limits=TurnLimits(max_tool_calls=1),
        comes="calls add, start 0, done 0, calls client, calls",
        told=["3"],
        waiting=["functions.client"],
    ),
    "one of the caller's that makes no sense": Row(
        script=[raw(call_of("functions.client", "{")), calls(("client", {}))],
        messages=THEIRS,
        grammar=False,
        comes="calls client: not json, start 0, done 0: malformed, calls client, calls",
        told=["Error: The arguments are not JSON."],
        waiting=["functions.client"],
    ),
    # Leave.
    "every call is declined": Row(
        script=[calls(ADD), lab("ping"), says("ok")],
        approve=no,
        comes="calls add, start 0, done 0: declined, calls lab.ping, start 1, done 1: declined, says ok, stop",
        told=["Error: The user declined this call.", "Error: The user declined this call."],
    ),
    "one of two is declined": Row(
        script=[raw(f"{lab('ping').completion}{NEXT}{calls(ADD).completion}<|return|>"), says("ok")],
        choices=PARALLEL,
        approve=only_add,
        comes="calls lab.ping, calls add, start 0, done 0: declined, start 1, done 1, says ok, stop",
        told=["Error: The user declined this call.", "3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_turn_comes_to_what_it_should(name: str) -> None:
    row = ROWS[name]

    async def scenario() -> None:
        served = serve(*row.script, grammar=row.grammar)
        toolbox = await Toolbox.open(row.tools())
        ask = asking(*row.messages, choices=row.choices, **row.asks)
        turn = await ready(served, toolbox, ask, limits=row.limits, approve=row.approve)
        events = await read(turn, served)
        assert ", ".join(outline(events)) == row.comes
        assert not row.grammar or not set(diagnostics(events)) - {"broken off", "arguments not json"}
        assert len(told(events)) == len(row.told)
        for said, expected in zip(told(events), row.told, strict=True):
            assert said.startswith(expected)
        check_events(events)
        last, stats = done(events), served.runner.stats()
        check_history(last.messages, waiting=row.waiting)
        assert turn.cut() == last.messages
        assert (last.num_prompt_tokens, last.num_tokens) == (stats.prompt_tokens, stats.generated_tokens)
        assert (turn.num_prompt_tokens, turn.num_tokens) == (stats.prompt_tokens, stats.generated_tokens)
        assert stats.requests == len(row.script)
        assert stats.running == 0
        await toolbox.aclose()

    run(scenario())


def test_the_table_has_thirty_turns_of_several_steps() -> None:
    assert sum(len(row.script) > 1 for row in ROWS.values()) >= 30


# --- real tools -------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_and_cited(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "docs").mkdir()
        text = "# Zeppelins\n\nThey float.\n\nThe first one flew in 1900."
        (tmp_path / "docs" / "zeppelin.md").write_text(text)
        documents = Documents(tmp_path / "docs", tmp_path / "index")
        browser = Browser(sources=[documents], tokenizer=Tokenizer.o200k_harmony())

        def look(name: str, arguments: str) -> Any:
            return raw(f"<|channel|>analysis to=browser.{name} <|constrain|>json<|message|>{arguments}<|call|>")

        answer = "In 1900【1†L6】. Not 【7†L1】."
        script = [look("search", '{"query":"zeppelin"}'), look("open", '{"id":0}'), look("open", '{"id":99}')]
        events = await events_of(serve(*script, says(answer, "Found.")), [browser])
        assert outline(events) == [
            *("calls browser.search", "start 0", "done 0", "calls browser.open", "start 1", "done 1"),
            *("calls browser.open", "start 2", "done 2: failed", "thinks", "cites Zeppelins 5-5", f"says {answer}"),
            "stop",
        ]
        check_history(done(events).messages)
        browser.close()

    run(scenario())


def test_files_are_patched_computed_on_and_shown(tmp_path: Path) -> None:
    """apply_patch and python in one turn, with state that lasts from call to call and a patch that does not fit."""

    async def scenario() -> None:
        (tmp_path / "a.txt").write_text("one\ntwo\n")

        def patch(old: str, new: str) -> Any:
            body = f"*** Begin Patch\n*** Update File: a.txt\n@@\n-{old}\n+{new}\n*** End Patch\n"
            return raw(f"<|channel|>commentary to=functions.apply_patch<|message|>{body}<|call|>")

        def code(text: str) -> Any:
            return raw(f"<|channel|>analysis to=python code<|message|>{text}<|call|>")

        script = [patch("three", "3"), patch("two", "2"), code("x = 6 * 7"), code("open('/mnt/data/f','w').write('f')"),
                  code("print(x); 1/0"), says("42")]  # fmt: skip
        events = await events_of(serve(*script), [ApplyPatchTool(tmp_path), PythonTool()])
        ends = [event for event in events if isinstance(event, ToolDone)]
        assert [event.problem for event in ends] == ["failed", None, None, None, None]
        assert (tmp_path / "a.txt").read_text() == "one\n2\n"
        assert [[file.name for file in event.files] for event in ends] == [[], ["a.txt"], [], ["f"], []]
        assert told(events)[4].startswith("42\n") and "ZeroDivisionError" in told(events)[4]
        assert outline(events)[-2:] == ["says 42", "stop"]

    run(scenario())


# --- cancellation -----------------------------------------------------------------------------------------------


def long_script() -> list[ScriptedTurn]:
    """A turn with all that can be cancelled, and one that may come after it."""
    both = lab("work").completion.replace("<|call|>", "<|end|>") + NEXT + calls(("later", {"word": "x"})).completion
    return [
        calls(ADD, think="a"),
        raw(both),
        says("Ok.", "b"),
        ScriptedTurn(match=re.compile("AGAIN"), completion=lab("work").completion),
        ScriptedTurn(match=re.compile("worked afterwards"), completion=says("Again.").completion),
    ]


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_turn_that_is_ended_after_any_of_its_events_leaves_all_in_order(how: str) -> None:
    async def scenario() -> None:
        whole = await events_of(serve(*long_script(), grammar=False), [FUNCTIONS, Lab()])
        assert sum(isinstance(event, ToolDone) for event in whole) == 3
        for count in range(1, len(whole) + 1):
            await ended_after(count, how)

    run(scenario())


async def ended_after(count: int, how: str) -> None:
    """So many of its events."""
    afterwards = False

    async def work() -> ToolResult:
        for _ in range(0 if afterwards else 50):
            await asyncio.sleep(0)
        return ToolResult(text="worked afterwards" if afterwards else "worked")

    laboratory = Lab(work=work)
    toolbox = await Toolbox.open([FUNCTIONS, laboratory])
    served = serve(*long_script(), grammar=False)
    turn = await ready(served, toolbox)
    seen: list[TurnEvent] = []
    reached = asyncio.Event()
    reading = turn.events(served.runner)

    async def read_on() -> None:
        async for batch in reading:
            for event in batch:
                seen.append(event)
                if len(seen) == count:
                    reached.set()
                    if how == "close":
                        return

    task = asyncio.create_task(read_on())
    await reached.wait()
    at = seen[-1]
    if how == "cancel":
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or (isinstance(at, SampleDone) and task.done())
        is_running = isinstance(at, ToolStart) and at.recipient == "lab.work"
        assert laboratory.outcomes["cancelled"] == is_running
    else:
        await task
        await reading.aclose()
        assert laboratory.outcomes["cancelled"] == 0
    assert laboratory.outcomes["begun"] == laboratory.outcomes["cancelled"] + laboratory.outcomes["done"]
    assert served.runner.stats().running == 0
    with pytest.raises(StopAsyncIteration):
        await anext(reading)

    kept = turn.cut()
    check_history(kept)
    assert turn.cut() == kept
    history = TurnHistory()
    for event in seen:
        history.take(event)
    assert history.cut() == kept
    if isinstance(at, ToolStart):
        assert kept[-1].text.startswith("The user ended the turn")
    afterwards = True
    more = asking(USER, *kept, text_message("user", "AGAIN"))
    again = await read(await ready(served, toolbox, more), served)
    assert outline(again) == ["calls lab.work", "start 0", "done 0", "says Again.", "stop"]
    await toolbox.aclose()
    assert laboratory.outcomes["closed"] == 1


def test_a_call_that_waits_for_leave_is_not_begun_when_the_turn_ends() -> None:
    async def scenario() -> None:
        laboratory = Lab()
        toolbox, asked = await Toolbox.open([laboratory]), asyncio.Event()
        served = serve(lab("work"))

        async def wait(start: ToolStart) -> bool:
            asked.set()
            await asyncio.Event().wait()
            return True

        turn = await ready(served, toolbox, approve=wait)
        task = asyncio.create_task(read(turn, served))
        await asked.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert laboratory.outcomes["begun"] == 0
        check_history(turn.cut())

    run(scenario())


def test_a_turn_that_is_forgotten_ends_its_request_and_closes_nothing_of_the_conversation() -> None:
    async def scenario() -> None:
        laboratory = Lab()
        toolbox = await Toolbox.open([laboratory])
        served = serve(lab("work"), says("x " * 50))
        turn = await ready(served, toolbox)
        reading = turn.events(served.runner)
        while served.runner.stats().requests < 2:
            batch = await anext(reading)
        assert served.runner.stats().running == 1
        del reading, batch
        gc.collect()
        while served.runner.stats().running:  # the loop closes what was forgotten
            await asyncio.sleep(0)
        check_history(turn.cut())
        served = serve(says("x"))
        never_read = (await ready(served, toolbox)).events(served.runner)
        await never_read.aclose()
        assert served.runner.stats().running == 0
        assert laboratory.outcomes["closed"] == 0
        await toolbox.aclose()

    run(scenario())


def test_the_callers_calls_beside_ours_are_answered_when_the_turn_is_cut() -> None:
    async def scenario() -> None:
        toolbox = await Toolbox.open([FUNCTIONS])
        served = serve(MIXED)
        turn = await ready(served, toolbox, asking(*THEIRS, choices=PARALLEL))
        reading = turn.events(served.runner)
        async for batch in reading:
            if isinstance(batch[-1], ToolDone):
                break
        await reading.aclose()
        check_history(turn.cut())
        assert [message.name for message in turn.cut() if message.role == "tool"] == [
            "functions.add",
            "functions.client",
        ]

    run(scenario())


def test_a_model_that_fails_ends_the_turn_with_its_error_and_a_history() -> None:
    async def scenario() -> None:
        toolbox = await Toolbox.open([FUNCTIONS])
        served = serve(calls(ADD))  # and nothing after that
        turn = await ready(served, toolbox)
        with pytest.raises(RequestError, match="no turn left"):
            await read(turn, served)
        check_history(turn.cut())
        assert [message.role for message in turn.cut()] == ["assistant", "tool"]

        served = serve(calls(ADD), says("never"))

        async def drain(start: ToolStart) -> bool:
            await served.runner.drain(0)
            return True

        turn = await ready(served, toolbox, approve=drain)
        with pytest.raises(ClosedError):
            await read(turn, served)
        check_history(turn.cut())

    run(scenario())


# --- limits -----------------------------------------------------------------------------------------------------


class Clock:
    """In place of the module `time`; a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(turn_module, "time", made)
    yield made
    assert time.monotonic() != made.now


def test_time_of_tools_and_of_the_turn_is_counted_over_all_steps(clock: Clock) -> None:
    def spend(seconds: float) -> str:
        """Takes its time."""
        clock.now += seconds
        return "spent"

    tools = [FunctionToolset([spend])]
    each = calls(("spend", {"seconds": 4}))

    async def scenario() -> None:
        limits = TurnLimits(tool_seconds=10)
        events = await events_of(serve(each, each, each, says("ok")), tools, limits=limits)
        assert [event.seconds for event in events if isinstance(event, ToolDone)] == [4, 4, 4]
        with pytest.raises(RequestError, match="does not allow"):
            await events_of(serve(*[each] * 4, says("ok")), tools, limits=limits)
        events = await events_of(serve(*[each] * 4, says("ok"), grammar=False), tools, limits=limits)
        assert outline(events)[-3:] == ["done 3: limit", "says ok", "stop"]

        events = await events_of(serve(each, each, each, says("ok")), tools, asking(deadline=10.0))
        assert outline(events)[-2:] == ["done 2", "deadline"]
        check_history(done(events).messages)

        pair = raw(f"{each.completion}{NEXT}{each.completion}<|return|>")
        ask = asking(deadline=3.0, choices=PARALLEL)
        events = await events_of(serve(pair), tools, ask)
        assert outline(events)[-3:] == ["start 1", "done 1: limit", "deadline"]
        check_history(done(events).messages)

        async def hang_on() -> ToolResult:
            try:
                return await hang()
            finally:
                clock.now += 1

        laboratory = Lab(hang=hang_on)

        async def take(start: ToolStart) -> bool:
            clock.now += 9.99
            return True

        events = await events_of(serve(lab("hang")), [laboratory], asking(deadline=10.0), approve=take)
        assert outline(events)[-2:] == ["done 0: timeout", "deadline"]
        assert laboratory.outcomes["cancelled"] == 1

    run(scenario())


def test_nobody_waits_for_leave_for_longer_than_the_turn_has(clock: Clock) -> None:
    async def scenario() -> None:
        async def never(start: ToolStart) -> bool:
            clock.now += 0.02
            await asyncio.Event().wait()
            return True

        laboratory = Lab()
        served = serve(lab("work"))
        toolbox = await Toolbox.open([laboratory])
        turn = await ready(served, toolbox, asking(deadline=30.0), approve=never)
        clock.now = 0.0
        reading = turn.events(served.runner)
        events: list[TurnEvent] = []
        async for batch in reading:
            events += batch
            if isinstance(batch[-1], ToolStart):
                clock.now = 29.99
        assert outline(events)[-3:] == ["start 0", "done 0: declined", "deadline"]
        assert laboratory.outcomes["begun"] == 0

    run(scenario())


@pytest.mark.parametrize(
    ("limits", "script"),
    [
        (TurnLimits(max_steps=2), [calls(ADD), calls(ADD)]),
        (TurnLimits(max_tool_calls=1), [calls(ADD), calls(ADD)]),
        (TurnLimits(max_tool_calls=0), [calls(ADD)]),
        (TurnLimits(max_steps=1), [calls(ADD)]),
    ],
)
def test_the_grammar_lets_a_model_that_has_spent_its_calls_only_answer(limits: TurnLimits, script: list[Any]) -> None:
    async def scenario() -> None:
        with pytest.raises(RequestError, match="does not allow"):
            await events_of(serve(*script), [FUNCTIONS], limits=limits)

    run(scenario())


def test_a_choice_binds_only_the_first_step() -> None:
    async def scenario() -> None:
        for choice, first in (
            ("required", says("No.")),
            (NamedTool("functions.add"), calls(("later", {"word": "x"}))),
            (AllowedTools(recipients=("functions.add",), required=True), says("No.")),
            (AllowedTools(recipients=("functions.add",)), calls(("later", {"word": "x"}))),
        ):
            ask = asking(choices=TurnChoices(tool_choice=choice))  # type: ignore[typeddict-item]
            with pytest.raises(RequestError, match="does not allow"):
                await events_of(serve(first), [FUNCTIONS], ask)
        with pytest.raises(RequestError, match="does not allow"):  # the rest of an allowance stays
            await events_of(serve(calls(ADD), calls(("later", {"word": "x"}))), [FUNCTIONS], ask)

    run(scenario())


def test_a_call_that_is_asked_for_and_not_allowed_is_refused_before_anything_runs() -> None:
    async def scenario() -> None:
        for limits in (TurnLimits(max_steps=1), TurnLimits(max_tool_calls=0)):
            for choice in ("required", NamedTool("functions.add")):
                ask = asking(*THEIRS[1:], choices=TurnChoices(tool_choice=choice))
                with pytest.raises(UsageError, match="limits do not allow"):
                    await events_of(serve(says("x")), [FUNCTIONS], ask, limits=limits)
            ask = asking(*THEIRS, choices=TurnChoices(tool_choice="required"))
            events = await events_of(serve(calls(("client", {}))), [FUNCTIONS], ask, limits=limits)
            assert outline(events) == ["calls client", "calls"]

    run(scenario())


def test_a_reasoning_budget_is_that_of_all_steps_together() -> None:
    async def scenario() -> None:
        ask = asking(choices=TurnChoices(max_reasoning_tokens=6))
        three = "one two three"
        fits = await events_of(serve(calls(ADD, think=three), says("3", three)), [FUNCTIONS], ask)
        assert outline(fits)[-3:] == ["thinks", "says 3", "stop"]
        with pytest.raises(RequestError, match="does not allow"):
            await events_of(serve(calls(ADD, think=three), says("3", f"{three} four")), [FUNCTIONS], ask)
        with pytest.raises(RequestError, match="does not allow"):
            spent = calls(ADD, think=f"{three} {three}")
            await events_of(serve(spent, says("3", "more")), [FUNCTIONS], ask)

    run(scenario())


def test_results_share_the_room_that_the_context_has() -> None:
    """However many calls are made at once, there is room for what comes after them."""

    async def scenario() -> None:
        one = call_of("functions.odd", '{"kind":"long"}')
        served = serve(raw(NEXT.join([one] * 5) + "<|return|>"), says("Ok."), context=1500)
        events = await events_of(served, [FUNCTIONS], asking(choices=PARALLEL))
        assert outline(events)[-2:] == ["says Ok.", "stop"]
        sizes = [len(text) for text in told(events)]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[2]
        served = serve(calls(("odd", {"kind": "long"})), says("Ok. " * 400), context=600)
        events = await events_of(served, [FUNCTIONS])
        assert outline(events)[-1] == "length"

    run(scenario())


def test_a_turn_without_end_tokens_is_not_asked_for_what_only_a_grammar_can_keep() -> None:
    async def scenario() -> None:
        ask = asking(ignore_eos=True, max_tokens=30)
        events = await events_of(serve(says("x " * 60)), [FUNCTIONS], ask, limits=TurnLimits(max_steps=1))
        assert done(events).end == "length"

    run(scenario())


def test_limits_that_make_no_sense_are_refused() -> None:
    for wrong in ({"max_steps": 0}, {"max_tool_calls": -1}, {"tool_seconds": 0.0}, {"result_tokens": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            TurnLimits(**wrong)

    async def scenario() -> None:
        with pytest.raises(UsageError, match="one sample"):
            await events_of(serve(says("x")), [FUNCTIONS], asking(n=2))
        plain = serve(says("x"))
        plain = replace(plain, harmony=False, prompting=replace(plain.prompting, chat_template="{{ messages }}"))
        with pytest.raises(UnsupportedError, match="does not speak Harmony"):
            await events_of(plain, [FUNCTIONS])

    run(scenario())


# --- names and tools that come and go ---------------------------------------------------------------------------


def test_names_that_collide_are_refused_and_nothing_stays_open() -> None:
    async def scenario() -> None:
        first, second = Lab(), Lab()
        with pytest.raises(UsageError, match="two tools are called lab"):
            await Toolbox.open([first, second])
        assert first.outcomes["closed"] == second.outcomes["closed"] == 1
        laboratory = Lab()
        with pytest.raises(UsageError, match=r"two tools are called functions\.add"):
            await Toolbox.open([laboratory, FUNCTIONS, FunctionToolset([add])])
        assert laboratory.outcomes["closed"] == 1
        theirs = Message(role="developer", parts=(DeveloperContent(tools=(Tool(name="add"),)),))
        with pytest.raises(UsageError, match=r"two tools are called 'functions\.add'"):
            await events_of(serve(says("x")), [FUNCTIONS], asking(theirs, USER))
        for other in (
            asking(Message(role="system", parts=(SystemContent(tools=(laboratory.namespace,)),)), USER),
            asking(builtins=(laboratory.namespace,)),
        ):
            with pytest.raises(UsageError, match=r"lab"):
                await events_of(serve(says("x")), [Lab()], other)

    run(scenario())


def test_a_tool_that_cannot_be_opened_closes_those_before_it() -> None:
    class Broken(Lab):
        async def open(self) -> Lab:
            raise UsageError("no such folder")

    async def scenario() -> None:
        first = Lab()
        with pytest.raises(UsageError, match="no such folder"):
            await Toolbox.open([first, Broken()])
        assert first.outcomes["closed"] == 1

    run(scenario())


def test_a_function_that_goes_away_during_a_turn_is_missed_by_the_model_and_not_by_the_caller() -> None:
    class Changing(FunctionToolset):
        gone = False

        @property
        def functions(self) -> tuple[Tool, ...]:
            return () if self.gone else super().functions

    async def scenario() -> None:
        tools = Changing([add, later])

        async def leave(start: ToolStart) -> bool:
            tools.gone = True
            return True

        served = serve(PAIR, calls(ADD), says("ok"))
        events = await events_of(served, [tools], asking(choices=PARALLEL), approve=leave)
        assert outline(events)[-5:] == ["calls add", "start 2", "done 2: failed", "says ok", "stop"]
        assert set(told(events)) == {"Error: there is no tool functions.add any more"}

    run(scenario())


def test_citations_that_fail_do_not_take_the_answer_with_them() -> None:
    class Careless(Lab):
        def citations(self, answer: str) -> Sequence[Citation]:
            raise IndexError(answer)

    async def scenario() -> None:
        assert outline(await events_of(serve(says("Ok.")), [Careless()])) == ["says Ok.", "stop"]
        laboratory = Lab()
        laboratory.cited = (Citation(start=0, end=2, url="file:///a", title="a", first_line=1, last_line=2),)
        events = await events_of(serve(raw(says("Ok.", "hm").completion)), [laboratory])
        assert outline(events) == ["thinks", "cites a 1-2", "says Ok.", "stop"]

    run(scenario())


# --- prompts ----------------------------------------------------------------------------------------------------


def prompts_of(script: Sequence[ScriptedTurn], *, grammar: bool = True, **asks: Any) -> list[str]:
    """As the model sees them, step by step."""
    prompts: list[str] = []

    async def scenario() -> None:
        served = serve(*script, grammar=grammar)
        submit = served.runner.submit

        def note(request: Request) -> Any:
            prompts.append(served.prompting.the_tokenizer().decode(request.prompt, control="show"))
            ends = [served.prompting.the_tokenizer().decode([request.prompt[at - 1]], control="show")
                    for at in request.boundaries]  # fmt: skip
            assert set(ends) <= {"<|end|>", "<|call|>"} and len(ends) == prompts[-1].count("<|message|>")
            return submit(request)

        served.runner.submit = note  # type: ignore[method-assign]
        await events_of(served, [FUNCTIONS, Lab()], asking(**asks))

    run(scenario())
    return prompts


def test_a_step_goes_on_from_the_very_tokens_of_the_one_before() -> None:
    said = f"<|channel|>analysis<|message|>Add.<|end|>{NEXT}{SUM}"
    answer = f"<|start|>functions.add to=assistant<|channel|>commentary<|message|>3<|end|>{NEXT}"
    first, second, third = prompts_of([raw(said), PAIR, says("3")], choices=PARALLEL)
    assert second == first + said + answer
    assert third == second + PAIR.completion.removesuffix("<|return|>") + answer.removesuffix(NEXT) + answer.replace(
        ">3<", ">7<"
    )


def test_what_had_to_be_mended_is_shown_to_the_model_as_it_was_understood() -> None:
    said = SUM.replace("functions.add", "add")
    first, second = prompts_of([raw(said), says("3")], grammar=False)
    rendered = ' to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a":1,"b":2}<|call|>'
    assert second.startswith(first + rendered)
    gone_on = f"<|channel|>analysis<|message|>Hm.<|end|>{NEXT}<|channel|>final<|message|>So.<|end|>{NEXT}{SUM}"
    first, second = prompts_of([raw(gone_on), says("3")], grammar=False)
    assert "Hm." not in second and "So." in second


# --- any turn ---------------------------------------------------------------------------------------------------

PIECES = {
    "thought": "<|channel|>analysis<|message|>hm<|end|>",
    "preamble": "<|channel|>commentary<|message|>So.<|end|>",
    "answer": "<|channel|>final<|message|>Ok.<|end|>",
    "sum": call_of("functions.add", '{"a":1,"b":2}'),
    "open sum": call_of("functions.add", '{"a":1,"b":2}', "<|end|>"),
    "failure": call_of("functions.boom", '{"why":"no"}', "<|end|>"),
    "nobody": call_of("functions.nobody", "{}", "<|end|>"),
    "no json": call_of("functions.add", "{", "<|end|>"),
    "work": "<|channel|>analysis to=lab.ping code<|message|>{}<|end|>",
    "theirs": call_of("functions.client", "{}", "<|end|>"),
    "torn": "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{",
    "junk": "between",
    "result": "<|start|>functions.add to=assistant<|channel|>commentary<|message|>9<|end|>",
}
STEPS = st.lists(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    limits=st.builds(
        TurnLimits,
        max_steps=st.integers(1, 4),
        max_tool_calls=st.none() | st.integers(0, 3),
        tool_seconds=st.just(60.0),
    ),
    max_tokens=st.none() | st.integers(1, 90),
    leave=st.sampled_from([None, no, only_add]),
    until=st.integers(1, 60),
)
def test_any_turn_leaves_a_history_and_sums_that_hold(
    steps: list[list[str]], limits: TurnLimits, max_tokens: int | None, leave: Any, until: int
) -> None:
    async def scenario() -> None:
        script = [raw(NEXT.join(PIECES[piece] for piece in step)) for step in steps] + [says("End.")] * 4
        for stops in (False, True):
            served = serve(*script, grammar=False)
            toolbox = await Toolbox.open([FUNCTIONS, Lab()])
            turn = await ready(served, toolbox, asking(*THEIRS, max_tokens=max_tokens), limits=limits, approve=leave)
            seen: list[TurnEvent] = []
            history = TurnHistory()
            reading = turn.events(served.runner)
            async for batch in reading:
                seen += batch
                for event in batch:
                    history.take(event)
                if stops and len(seen) >= until:
                    break
            await reading.aclose()
            stats = served.runner.stats()
            assert stats.running == 0
            assert stats.requests <= limits.max_steps
            assert history.cut() == turn.cut()
            assert turn.num_tokens == stats.generated_tokens
            assert max_tokens is None or turn.num_tokens <= max_tokens
            if stops and not isinstance(seen[-1], SampleDone):
                check_history(turn.cut())
                continue
            check_events(seen)
            last = done(seen)
            waiting = [message.recipient for message in last.messages if message.recipient == "functions.client"]
            check_history(last.messages, waiting=[name for name in waiting if name] if last.end == "calls" else ())
            assert (last.num_tokens, last.num_prompt_tokens) == (stats.generated_tokens, stats.prompt_tokens)
            carried_out = [e for e in seen if isinstance(e, ToolDone) and e.problem in (None, "failed")]
            assert limits.max_tool_calls is None or len(carried_out) <= limits.max_tool_calls

    run(scenario())
