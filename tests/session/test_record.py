"""Recordings: what is read is what was written, whatever it was, and however suddenly the writing ended."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.engine.request import RequestStats, TokenLogprobs
from freehold.errors import DiskError, UsageError
from freehold.formats import conversation, events, forms
from freehold.formats.conversation import Message, ResponseFormat, Text, Tool, ToolNamespace, text_message
from freehold.session.generation import Said, SampleDone, SampleEnd, ScoredToken
from freehold.session.history import Cited, ToolDone, ToolProblem, ToolStart, TurnEvent
from freehold.session.record import RecordedTurn, Recorder, read_recording
from freehold.session.toolbox import Toolbox
from freehold.tools.base import Citation, ToolFile
from tests.session.turns import FUNCTIONS, USER, Lab, calls, check_history, lab, raw, ready, run, says, serve

# --- all that can be recorded -----------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z_.\-]{1,8}", fullmatch=True)
TEXTS = st.text(max_size=12)
SHORT = st.none() | NAMES
TOKENS = st.lists(st.integers(0, 201_087), max_size=3).map(tuple)
COUNTS = st.integers(0, 1 << 40)
FLOATS = st.floats(allow_nan=False)
ROLES = st.sampled_from(conversation.ROLES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS.filter(lambda x: abs(x) < 1e300) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
SCHEMAS = st.dictionaries(TEXTS, JSON, max_size=3)
FORMS = st.builds(forms.FreeText) | st.builds(forms.Regex, TEXTS) | st.builds(forms.Lark, TEXTS)
TOOLS = st.one_of(
    st.builds(Tool, name=NAMES, description=TEXTS, parameters=st.none() | SCHEMAS, strict=st.booleans()),
    st.builds(Tool, name=NAMES, text_format=FORMS),
)
PROBLEMS = st.sampled_from([None, *get_args(events.CallProblem)])


def few(one: st.SearchStrategy[Any], key: Any = lambda value: value.name) -> st.SearchStrategy[Any]:
    return st.lists(one, max_size=2, unique_by=key).map(tuple)


PARTS = st.builds(Text, text=TEXTS)
MESSAGES = st.one_of(
    st.builds(
        Message,
        role=st.sampled_from(["user", "assistant", "tool"]),
        parts=st.lists(PARTS, max_size=2).map(tuple),
        channel=st.none() | st.sampled_from(conversation.CHANNELS),
        recipient=SHORT,
        content_type=st.sampled_from([None, "json", "<|constrain|>json", "code"]),
        name=NAMES,
    ),
    st.builds(
        Message,
        role=st.just("system"),
        parts=st.builds(
            conversation.SystemContent,
            identity=st.sampled_from([None, "I am."]),
            date=st.sampled_from([None, "2026-02-03"]),
            effort=st.none() | st.sampled_from(conversation.EFFORTS),
            channels=st.sampled_from([(), conversation.CHANNELS]),
            tools=few(st.builds(ToolNamespace, name=NAMES, description=TEXTS, tools=few(TOOLS))),
        ).map(lambda part: (part,)),
    ),
    st.builds(
        Message,
        role=st.just("developer"),
        parts=st.builds(
            conversation.DeveloperContent,
            instructions=st.none() | TEXTS,
            tools=few(TOOLS),
            response_formats=few(st.builds(ResponseFormat, name=NAMES, schema=SCHEMAS, description=TEXTS)),
        ).map(lambda part: (part,)),
    ),
)
WORDS = st.text(min_size=1, max_size=12)
EVENTS: dict[type, st.SearchStrategy[Any]] = {
    events.MessageStart: st.builds(
        events.MessageStart, role=ROLES, channel=SHORT | TEXTS, recipient=SHORT, content_type=SHORT, name=SHORT,
        position=COUNTS, tokens=TOKENS,
    ),
    events.ReasoningDelta: st.builds(events.ReasoningDelta, WORDS),
    events.TextDelta: st.builds(events.TextDelta, WORDS),
    events.OtherDelta: st.builds(events.OtherDelta, WORDS),
    events.CallStart: st.builds(events.CallStart, TEXTS),
    events.ArgumentsDelta: st.builds(events.ArgumentsDelta, WORDS),
    events.CallDone: st.builds(events.CallDone, recipient=TEXTS, arguments=TEXTS, problem=PROBLEMS),
    events.MessageDone: st.builds(events.MessageDone, message=MESSAGES, stop_id=st.none() | COUNTS),
    events.TurnDone: st.builds(events.TurnDone, COUNTS),
    events.Diagnostic: st.builds(
        events.Diagnostic, code=st.sampled_from(get_args(events.DiagnosticCode)), detail=TEXTS, position=COUNTS,
        tokens=TOKENS,
    ),
}  # fmt: skip
LOGPROBS = st.builds(
    TokenLogprobs, st.floats(max_value=0, allow_nan=False), st.lists(st.tuples(COUNTS, FLOATS), max_size=2).map(tuple)
)
STATS = st.builds(
    RequestStats, num_prompt_tokens=COUNTS, num_cached_tokens=COUNTS, num_tokens=COUNTS, num_preemptions=COUNTS,
    queue_seconds=st.none() | FLOATS, first_token_seconds=st.none() | FLOATS, total_seconds=FLOATS,
)  # fmt: skip
# Names of files are bytes, some of which are no characters.
PATHS = st.binary(min_size=1, max_size=8).filter(lambda name: b"\0" not in name).map(os.fsdecode)
TURN_EVENTS: dict[type, st.SearchStrategy[Any]] = {
    Said: st.builds(
        Said,
        st.integers(0, 2),
        st.one_of(*EVENTS.values()),
        st.lists(st.builds(ScoredToken, COUNTS, LOGPROBS), max_size=2).map(tuple),
    ),
    SampleDone: st.builds(
        SampleDone, index=st.integers(0, 2), end=st.sampled_from(get_args(SampleEnd)),
        messages=st.lists(MESSAGES, max_size=2).map(tuple), num_tokens=COUNTS, num_reasoning_tokens=COUNTS,
        num_cached_tokens=COUNTS, num_prompt_tokens=COUNTS, stop_string=st.none() | TEXTS, stats=st.none() | STATS,
    ),
    ToolStart: st.builds(ToolStart, number=COUNTS, recipient=TEXTS, arguments=TEXTS),
    ToolDone: st.builds(
        ToolDone, number=COUNTS, message=MESSAGES, problem=st.sampled_from([None, *get_args(ToolProblem)]),
        files=few(st.builds(ToolFile, name=PATHS, path=PATHS.map(Path), media_type=TEXTS)), seconds=FLOATS,
    ),
    Cited: st.builds(
        Cited,
        st.lists(
            st.builds(Citation, start=COUNTS, end=COUNTS, url=TEXTS, title=TEXTS, first_line=COUNTS, last_line=COUNTS),
            max_size=2,
        ).map(tuple),
    ),
}  # fmt: skip


def everything(value: Any) -> Any:
    """A value with its type and all fields, those that `==` does not look at as well."""
    if is_dataclass(value):
        return type(value), [everything(getattr(value, field.name)) for field in fields(value)]
    return (type(value), [everything(part) for part in value]) if isinstance(value, tuple) else value


def test_each_kind_of_event_is_among_those_tried() -> None:
    assert set(EVENTS) == set(get_args(events.Event))
    assert set(TURN_EVENTS) == set(get_args(TurnEvent))


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(MESSAGES, max_size=2),
    came=st.lists(st.one_of(*TURN_EVENTS.values(), *(st.builds(Said, st.just(0), e) for e in EVENTS.values()))),
)
def test_what_is_read_is_what_was_written(tmp_path_factory: Any, asked: list[Message], came: list[TurnEvent]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.unlink(missing_ok=True)
    with Recorder(path) as recorder:
        recorder.begin(asked)
        for event in came:
            recorder.take(event)
    (turn,) = read_recording(path)
    assert (turn.asked, turn.events) == (tuple(asked), tuple(came))
    assert everything(turn.events) == everything(tuple(came))
    assert everything(turn.asked) == everything(tuple(asked))


# --- turns ------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Path]:
    """A recording of two turns with calls, made while they ran."""
    path = tmp_path / "chat.jsonl"

    async def scenario() -> None:
        toolbox = await Toolbox.open([FUNCTIONS, Lab()])
        both = raw(lab("work").completion.replace("<|call|>", "<|end|><|start|>assistant") + lab("ping").completion)
        script = [calls(("add", {"a": 1, "b": 2}), think="hü"), both, says("3", "so"), calls(("boom", {"why": "x"}))]
        served = serve(*script, says("No."), grammar=False)
        with Recorder(path) as recorder:
            for _ in range(2):
                turn = await ready(served, toolbox)
                recorder.begin([USER])
                async for batch in turn.events(served.runner):
                    for event in batch:
                        recorder.take(event)
                        assert read_recording(path)[-1].history() == (USER, *turn.cut()) or event is not batch[-1]

    run(scenario())
    yield path


def test_a_recording_goes_on_where_its_turns_ended_wherever_it_was_cut(whole: Path) -> None:
    data = whole.read_bytes()
    lines = data.splitlines(keepends=True)
    turns = read_recording(whole)
    assert [turn.is_complete for turn in turns] == [True, True]
    assert [turn.history()[-1].text for turn in turns] == ["3", "No."]
    num_whole = 0
    for number in range(1, len(lines) + 1):
        for torn in (b"", lines[number][: len(lines[number]) // 2] if number < len(lines) else b'{"eve'):
            whole.write_bytes(b"".join(lines[:number]) + torn)
            cut = read_recording(whole)
            assert sum(len(turn.events) + 1 for turn in cut) == number - 1
            for turn in cut:
                check_history(turn.history()[1:])
                assert turn.history()[0] == USER
                num_whole += turn.is_complete
        with Recorder(whole) as recorder:  # what was torn goes, and the rest stays
            recorder.begin([text_message("user", "Again")])
        assert whole.read_bytes().startswith(b"".join(lines[:number]) + b'{"asked"')
        assert read_recording(whole)[:-1] == cut
    assert num_whole


def test_a_recording_is_for_its_user_and_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    with Recorder(path) as recorder:
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UsageError, match="being recorded to already"):
            Recorder(path)
        recorder.begin([USER])
        before = path.read_bytes()
        with pytest.raises(UsageError, match="cannot be recorded"):
            recorder.begin([Message(role="developer", parts=(conversation.DeveloperContent(
                tools=(Tool(name="a", parameters={"a": object()}),)),))])  # fmt: skip
        assert path.read_bytes() == before
    assert read_recording(path) == [RecordedTurn(asked=(USER,), events=())]
    with pytest.raises(DiskError, match="cannot be written"):
        Recorder(tmp_path)
    with pytest.raises(DiskError, match="cannot be written"):
        Recorder(tmp_path / "missing" / "chat.jsonl")


def test_a_full_disk_leaves_no_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.jsonl"
    with Recorder(path) as recorder:
        recorder.begin([USER])
        write = os.write

        def full(file: int, data: Any) -> int:
            if len(data) > 20:
                return write(file, data[:20])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DiskError, match="No space left"):
            recorder.take(ToolStart(number=0, recipient="x", arguments="y" * 40))
        monkeypatch.undo()
        recorder.take(ToolStart(number=0, recipient="x", arguments="y"))
    (turn,) = read_recording(path)
    assert turn.events == (ToolStart(number=0, recipient="x", arguments="y"),)


HEAD = '{"freehold":"recording","version":1}'
ASKED = '{"asked":[{"role":"user","parts":[{"kind":"text part","text":"Go."}]}]}'
START = '{"kind":"tool start","number":0,"recipient":"a","arguments":"b"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "no recording"),
        (["[]"], "no recording"),
        (["\xff"], "no recording"),
        (['{"a":1}', ASKED], "no recording"),
        (['{"freehold":"recording","version":2}'], "line 1: version 2 of recordings is not known"),
        ([HEAD, ASKED, ""], "line 3: Expecting value"),
        ([HEAD, ASKED, "nothing"], "line 3: Expecting value"),
        ([HEAD, ASKED, "[" * 100_000], "line 3: "),
        ([HEAD, ASKED, '{"event":' + "9" * 5000 + "}"], "line 3: "),
        ([HEAD, '{"event":' + START + "}"], "line 2: an event comes before any turn"),
        ([HEAD, "{}"], "line 2: a line has either"),
        ([HEAD, '{"said":1}'], "line 2: a line has either"),
        ([HEAD, '{"asked":{}}'], "line 2: {} is no"),
        ([HEAD, '{"asked":[{"role":"robot","parts":[]}]}'], "line 2: 'robot' is none of system"),
        ([HEAD, '{"asked":[{"role":"tool","parts":[]}]}'], "line 2: a tool message needs the tool's name"),
        ([HEAD, ASKED, '{"event":{"kind":"os.system"}}'], "line 3: 'os.system' is none of said, sample done"),
        ([HEAD, ASKED, '{"event":{"kind":"text part","text":""}}'], "line 3: 'text part' is none of said"),
        ([HEAD, ASKED, '{"event":{"kind":["said"]}}'], "is none of said"),
        ([HEAD, ASKED, '{"event":{"kind":"tool start"}}'], "line 3: ToolStart lacks number"),
        ([HEAD, ASKED, '{"event":' + START.replace("0", "true") + "}"], "line 3: True is no int"),
        ([HEAD, ASKED, '{"event":' + START.replace("0", "0.0") + "}"], "line 3: 0.0 is no int"),
        ([HEAD, ASKED, '{"event":' + START.replace("0", "0,\"more\":1") + "}"], "ToolStart has no field 'more'"),
        ([HEAD, ASKED, '{"event":' + START.replace("0", "NaN") + "}"], "NaN is no JSON"),
        ([HEAD, ASKED, '{"event":{"kind":"said","index":0,"event":null}}'], "line 3: None is no"),
        ([HEAD, ASKED, '{"event":{"kind":"said","index":0,"event":{"kind":"text","text":"a"},"scored":[[1]]}}'],
         "2 values belong here"),
    ],
)  # fmt: skip
def test_what_no_recorder_writes_is_refused_by_file_and_line(
    tmp_path: Path, lines: Sequence[str], message: str
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes("\n".join([*lines, ""]).encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        read_recording(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    if lines[0] != HEAD:
        before = path.read_bytes()
        with pytest.raises(UsageError, match=r"no recording|version 2"):
            Recorder(path)
        assert path.read_bytes() == before


def test_a_file_that_was_torn_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    for length in (0, 1, len(HEAD)):
        path.write_text(HEAD[:length])
        with pytest.raises(UsageError, match="no recording"):
            read_recording(path)
        Recorder(path).close()
        assert json.loads(path.read_text()) == json.loads(HEAD)
        assert read_recording(path) == []
    with pytest.raises(UsageError, match="cannot be read"):
        read_recording(tmp_path / "missing")
    path.write_text("My diary")
    with pytest.raises(UsageError, match="no recording"):
        Recorder(path)
    assert path.read_text() == "My diary"
