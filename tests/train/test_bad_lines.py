"""Every kind of line that cannot be trained on, each with the reason that its author is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import TrainingDataError, UnsupportedError, UsageError
from freehold.formats.chat import HarmonyFormat
from freehold.formats.tokenizer import Tokenizer
from freehold.train import lines as lines_module
from freehold.train.chats import read_example
from freehold.train.data import MOST_TOLD, DataOptions, read_examples, read_preferences

WriteLines = Callable[..., Path]

COUNT = {"role": "system", "content": "Count."}
QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}
CUSTOM = {"type": "custom", "custom": {"name": "say"}}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def reply(**fields: Any) -> dict[str, Any]:
    return chat(QUESTION, {"role": "assistant", **fields})


def call(name: str = "add", arguments: Any = "{}", id: Any = "a", **more: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calls(*made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(made), **more}


def result(id: str = "a", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": "4", **more}


def pair(**changes: Any) -> dict[str, Any]:
    whole = {
        "input": {"messages": [QUESTION]},
        "preferred_output": [ANSWER],
        "non_preferred_output": [WRONG],
    }
    return {**whole, **changes}


BAD_CHATS: list[tuple[Any, str]] = [
    # --- no JSON object
    ("messages", "is no JSON: Expecting value at character 1"),
    ('{"messages": [', "is no JSON: Expecting value at character 16"),
    ("{'messages': []}", "is no JSON: Expecting property name enclosed in double quotes at character 2"),
    ('{"text": "a"} {"text": "b"}', "is no JSON: Extra data at character 15"),
    ('{"text": "a\tb"}', "is no JSON: Invalid control character at character 12"),
    (b'{"text": "caf\xe9"}', "is no UTF-8: byte 0xe9 at byte 14; save the file as UTF-8"),
    ("[]", "is a list; write each example as an object on a line of its own"),
    ("null", 'is no object but null; an example is {"messages": [...]}'),
    ('"hello"', 'is no object but "hello"; an example is {"messages": [...]}'),
    ('{"text": NaN}', "NaN is no JSON; use null or a number"),
    ('{"text": -Infinity}', "-Infinity is no JSON; use null or a number"),
    ('{"text": "a", "text": "b"}', "key 'text' is given twice in one object"),
    ('{"messages": ' + "[" * 200_000, "is nested too deeply; make it flatter"),
    ('{"text": ' + "9" * 5000 + "}", "holds a number of thousands of digits"),
    # --- plain text
    ({"text": 5}, "text must be a string, got a number"),
    ({"text": ""}, "text is empty"),
    ({"text": " \n"}, "text is empty"),
    ({"text": "a", "title": "b"}, "field 'title' is not supported; a line of plain text has text"),
    (
        r'{"text": "a\ud800"}',
        "the text holds the lone surrogate U+D800 at index 1, which is no character; remove it or decode the text "
        "properly",
    ),
    # --- the line as a whole
    ({}, "messages must be a list of objects, got nothing"),
    (pair(), "is a preference pair; those are for DPO (--method dpo)"),
    ({"prompt": "2 + 2?", "completion": "4"}, "field 'prompt' is not supported; use messages"),
    (chat(QUESTION, ANSWER, functions=[]), "field 'functions' is not supported; use tools"),
    (
        chat(QUESTION, ANSWER, model="gpt-oss-20b"),
        "field 'model' is not supported; a chat has messages, tools, parallel_tool_calls",
    ),
    ({"messages": {}}, "messages must be a list of objects, got an empty one"),
    ({"messages": "hello"}, "messages must be a list of objects, got a string"),
    ({"messages": []}, "messages is empty; give a question and an answer"),
    (chat(QUESTION), "messages have none of the assistant's; there is nothing to learn"),
    (chat(QUESTION, ANSWER, QUESTION), "the last message is of role 'user'; end with the assistant's"),
    (
        chat(QUESTION, calls(call()), result(), tools=TOOLS),
        "the last message is of role 'tool'; end with the assistant's",
    ),
    (
        chat(QUESTION, ANSWER, parallel_tool_calls="no"),
        "parallel_tool_calls is true or false, got 'no'",
    ),
    # --- messages
    (chat("hello", ANSWER), "message 0: expected an object, got 'hello'"),
    (
        chat({"content": "hello"}, ANSWER),
        "message 0: unknown role None; known are system, developer, user, assistant, tool",
    ),
    (
        chat({"role": "human", "content": "hello"}, ANSWER),
        "message 0: unknown role 'human'; known are system, developer, user, assistant, tool",
    ),
    (chat({"role": "user"}, ANSWER), "message 0: content must be a string or a list of parts, got NoneType"),
    (chat({"role": "user", "content": 5}, ANSWER), "message 0: content must be a string or a list of parts, got int"),
    (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER),
        "message 0: part 0: type 'image_url' is not supported; gpt-oss reads text only",
    ),
    (
        chat({"role": "user", "content": "a", "name": "a b"}, ANSWER),
        "message 0: user name 'a b' is not one; use letters, digits, '_', '-' and '.'",
    ),
    (chat({**QUESTION, "mood": "good"}, ANSWER), "message 0: field 'mood' is not supported; leave it out"),
    (
        chat({**QUESTION, "tool_calls": [call()]}, ANSWER),
        "message 0: field 'tool_calls' is not supported; leave it out",
    ),
    (reply(content=""), "message 1: the assistant says nothing; give content or tool_calls, or weight 0"),
    (reply(content=None), "message 1: the assistant says nothing; give content or tool_calls, or weight 0"),
    (reply(), "message 1: content must be a string or a list of parts, got NoneType"),
    (reply(thinking="Easy."), "message 1: the assistant reasons and then neither answers nor calls a tool"),
    (
        chat(QUESTION, {"role": "assistant", "thinking": "Easy."}, QUESTION, ANSWER),
        "message 1: the assistant reasons and then neither answers nor calls a tool",
    ),
    (
        reply(content="4", thinking="Easy.", reasoning_content="Hard."),
        "message 1: the fields reasoning_content, reasoning, thinking and reasoning_details say different things; give "
        "one of them",
    ),
    (reply(content="4", thinking=5), "message 1: a part's text must be a string, got int"),
    (reply(content="4", audio={"id": "a"}), "message 1: field 'audio' is not supported; leave it out"),
    (
        reply(content="4", function_call={"name": "add"}),
        "message 1: field 'function_call' is not supported; leave it out",
    ),
    # --- weights
    (reply(content="4", weight=0.5), "message 1: weight is 0 or 1, got 0.5"),
    (reply(content="4", weight=2), "message 1: weight is 0 or 1, got 2"),
    (reply(content="4", weight=True), "message 1: weight is 0 or 1, got true"),
    (reply(content="4", weight="1"), 'message 1: weight is 0 or 1, got "1"'),
    (chat({**QUESTION, "weight": 1}, ANSWER), "message 0: weight is for the assistant's messages only"),
    (reply(content="4", weight=0), "every message of the assistant has weight 0; there is nothing to learn"),
    # --- tools
    (chat(QUESTION, ANSWER, tools={}), "tools must be a list of objects, got an empty one"),
    (chat(QUESTION, ANSWER, tools=["add"]), "tool 0: expected an object, got 'add'"),
    (
        chat(QUESTION, ANSWER, tools=[{"type": "retrieval"}]),
        "tool 0: type 'retrieval' is not supported; functions and custom tools are",
    ),
    (
        chat(QUESTION, ANSWER, tools=[{"type": "function", "function": {}}]),
        "tool 0: name must be a string, got NoneType",
    ),
    (chat(QUESTION, ANSWER, tools=[*TOOLS, *TOOLS]), "tool 'add' is given 2 times; each needs its own name"),
    (
        chat(QUESTION, ANSWER, tools=[{"type": "function", "function": {"name": "add", "parameters": []}}]),
        "tool 0: tool 'add': parameters must be a JSON schema object, got []",
    ),
    (
        chat(
            QUESTION,
            ANSWER,
            tools=[{"type": "function", "function": {"name": "add", "parameters": DEEP}}],
        ),
        "tool 'add': the schema is nested more than 64 deep at #/items/items/items/items/items/items/it…tems/items/items/items/items/items/items; make it flatter",  # noqa: E501
    ),
    (chat(QUESTION, calls(call("sum")), tools=TOOLS), "message 1: calls 'sum', which is not among the tools"),
    (chat(QUESTION, calls(call())), "message 1: calls 'add', which is not among the tools"),
    (
        chat(QUESTION, calls(call(arguments="2, 2")), tools=TOOLS),
        "message 1: the arguments of 'add' are no JSON: '2, 2'",
    ),
    (
        chat(QUESTION, calls(call(arguments='{"a": NaN}')), tools=TOOLS),
        "message 1: the arguments of 'add' are no JSON: '{\"a\": NaN}'",
    ),
    (
        chat(QUESTION, calls(call(arguments="[2, 2]")), tools=TOOLS),
        "message 1: the arguments of 'add' are no JSON object: '[2, 2]'",
    ),
    (
        chat(QUESTION, calls(call(arguments={})), tools=TOOLS),
        "message 1: tool call 0: arguments must be a string, got dict",
    ),
    (
        chat(QUESTION, calls(call("")), tools=TOOLS),
        "message 1: tool call 0: field 'name' is empty; give the name of the tool that was called",
    ),
    (chat(QUESTION, calls(call("say")), tools=[CUSTOM]), "message 1: calls 'say' as a tool of another type than it is"),
    (
        chat(QUESTION, calls(call(id=None)), tools=TOOLS),
        "message 1: a tool call has no id; its result names it",
    ),
    (chat(QUESTION, calls(call(), call()), tools=TOOLS), "message 1: two calls have the id 'a'"),
    (
        chat(QUESTION, calls(call(), call(id="b")), tools=TOOLS, parallel_tool_calls=False),
        "a message has 2 tool calls, but parallel_tool_calls is false",
    ),
    (
        chat(QUESTION, calls(call()), QUESTION, ANSWER, tools=TOOLS),
        "message 2: call 'a' before it has no result",
    ),
    (
        chat(QUESTION, calls(call(), call(id="b")), result(), ANSWER, tools=TOOLS),
        "message 3: call 'b' before it has no result",
    ),
    (
        chat(QUESTION, calls(call()), result(), result(), ANSWER, tools=TOOLS),
        "message 3: call 'a' has its result already",
    ),
    (
        chat(QUESTION, calls(call()), result("b"), ANSWER, tools=TOOLS),
        "message 2: tool_call_id 'b' is that of no call before it",
    ),
    (
        chat(QUESTION, calls(call()), result(name="sum"), ANSWER, tools=TOOLS),
        "message 2: call 'a' went to 'add', not to 'sum'",
    ),
    (
        chat(QUESTION, calls(call()), {"role": "tool", "content": "4"}, ANSWER, tools=TOOLS),
        "message 2: tool_call_id must be a string, got NoneType",
    ),
]

BAD_PAIRS: list[tuple[Any, str]] = [
    (chat(QUESTION, ANSWER), "is no preference pair; give input, preferred_output and non_preferred_output"),
    ({"text": "a"}, "is no preference pair; give input, preferred_output and non_preferred_output"),
    ({}, "input must be an object with messages, got nothing"),
    (
        pair(reason="better"),
        "field 'reason' is not supported; a preference pair has input, preferred_output, non_preferred_output",
    ),
    (pair(input=[QUESTION]), "input must be an object with messages, got a list"),
    (
        pair(input={"messages": [QUESTION], "n": 2}),
        "field 'n' is not supported; an input has messages, tools, parallel_tool_calls",
    ),
    (pair(input={"messages": []}), "input: messages is empty; give a question and an answer"),
    (
        pair(input={"messages": [{"role": "user"}]}),
        "input: message 0: content must be a string or a list of parts, got NoneType",
    ),
    (
        pair(input={"messages": [QUESTION, ANSWER]}),
        "input ends with the assistant's message; end with what is to be answered",
    ),
    (
        pair(input={"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION]}),
        "input: weight is for chats; in a preference pair the outputs are what is learnt",
    ),
    (pair(preferred_output="4"), "preferred_output must be a list of the assistant's messages, got a string"),
    (
        pair(non_preferred_output=[]),
        "non_preferred_output must be a list of the assistant's messages, got an empty one",
    ),
    (
        pair(preferred_output=[QUESTION]),
        "preferred_output: message 0 is not the assistant's; outputs are one turn of it",
    ),
    (
        pair(preferred_output=[{**ANSWER, "weight": 1}]),
        "preferred_output: weight is for chats; in a preference pair the outputs are what is learnt",
    ),
    (
        pair(preferred_output=[{"role": "assistant", "content": "4", "mood": "good"}]),
        "preferred_output: message 0: field 'mood' is not supported; leave it out",
    ),
    (pair(preferred_output=[ANSWER, ANSWER]), "preferred_output is 2 turns of the assistant; give one"),
    (
        pair(preferred_output=[calls(call())]),
        "preferred_output: message 0: calls 'add', which is not among the tools",
    ),
    (pair(non_preferred_output=[ANSWER]), "preferred_output and non_preferred_output are the same"),
    (
        pair(non_preferred_output=[{"role": "assistant", "content": [{"type": "text", "text": "4"}]}]),
        "its two outputs read the same",
    ),
    # --- in TRL's shape
    ({"prompt": [QUESTION], "chosen": [ANSWER]}, "rejected must be a list of the assistant's messages, got nothing"),
    (
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        "chosen must be a list of the assistant's messages, got a string",
    ),
    ({"prompt": "2 + 2?", "chosen": [ANSWER], "rejected": [WRONG]}, "prompt must be a list of messages, got a string"),
    (
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": []},
        "rejected must be a list of the assistant's messages, got an empty one",
    ),
    (
        {"prompt": [QUESTION], "chosen": [QUESTION, ANSWER], "rejected": [WRONG]},
        "chosen: message 0 is not the assistant's; outputs are one turn of it",
    ),
    (
        {"prompt": [QUESTION, ANSWER], "chosen": [ANSWER], "rejected": [WRONG]},
        "prompt ends with the assistant's message; end with what is to be answered",
    ),
    ({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen and rejected are the same"),
    (
        {"chosen": [QUESTION, ANSWER], "rejected": [ANSWER]},
        "chosen and rejected do not begin with the same messages; give a prompt",
    ),
    (
        {"chosen": [COUNT, QUESTION, ANSWER], "rejected": [COUNT, WRONG]},
        "chosen: message 1 is not the assistant's; outputs are one turn of it",
    ),
    (
        {"chosen": [COUNT, QUESTION, calls(call())], "rejected": [COUNT, QUESTION, WRONG]},
        "chosen: message 2: calls 'add', which is not among the tools",
    ),
    (
        {"chosen": [COUNT, {"role": "user"}, ANSWER], "rejected": [COUNT, {"role": "user"}, WRONG]},
        "chosen: message 1: content must be a string or a list of parts, got NoneType",
    ),
    (
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION]},
        "rejected has no message after what both begin with; end it with the assistant's",
    ),
    ({"chosen": [None], "rejected": [None]}, "chosen and rejected are the same"),
    (
        {"prompt": [QUESTION], "chosen": {"role": "assistant"}, "rejected": []},
        "chosen must be a list of the assistant's messages, got an object",
    ),
    (
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{"role": "assistant", "thinking": "Hm."}]},
        "rejected: message 0: the assistant reasons and then neither answers nor calls a tool",
    ),
    (
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": ""}]},
        "rejected: message 0: the assistant says nothing; give content or tool_calls",
    ),
    (
        {"messages": [QUESTION, ANSWER], "chosen": [ANSWER], "rejected": [WRONG]},
        "field 'messages' is not supported; a preference pair has prompt, chosen, rejected, tools",
    ),
    (
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WRONG], "score_chosen": 5},
        "field 'score_chosen' is not supported; a preference pair has prompt, chosen, rejected, tools",
    ),
    (
        {"prompt": [{"role": "user", "content": 3}], "chosen": [ANSWER], "rejected": [WRONG]},
        "prompt: message 0: content must be a string or a list of parts, got int",
    ),
    (
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [calls(call())]},
        "rejected: message 0: calls 'add', which is not among the tools",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD_CHATS)
def test_a_bad_chat_is_refused_by_its_number_with_its_reason(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines, line: Any, reason: str
) -> None:
    path = write_lines(chat(QUESTION, ANSWER), "", line, {"text": "Something sound."})
    with pytest.raises(TrainingDataError) as error:
        read_examples([path], harmony, gpt_oss, DataOptions())
    assert error.value.problems == (f"chats.jsonl line 3: {reason}",)


@pytest.mark.parametrize(("line", "reason"), BAD_PAIRS)
def test_a_bad_preference_pair_is_refused_by_its_number_with_its_reason(
    harmony: HarmonyFormat, write_lines: WriteLines, line: Any, reason: str
) -> None:
    path = write_lines(pair(), line)
    with pytest.raises(TrainingDataError) as error:
        read_preferences([path], harmony, DataOptions())
    assert error.value.problems == (f"chats.jsonl line 2: {reason}",)


def test_there_are_at_least_sixty_kinds() -> None:
    assert len({reason for _, reason in (*BAD_CHATS, *BAD_PAIRS)}) >= 60


def test_all_bad_lines_of_all_files_are_told_at_once_up_to_a_bound(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    first = write_lines({"text": ""}, {"text": "sound"}, "x\x1b", name="first.jsonl")
    second = write_lines(*[{"text": ""}] * (MOST_TOLD + 5), name="second.jsonl")
    with pytest.raises(TrainingDataError) as error:
        read_examples([first, second], harmony, gpt_oss, DataOptions())
    assert error.value.num_problems == MOST_TOLD + 7
    assert len(error.value.problems) == MOST_TOLD
    head, *told, more = str(error.value).split("\n")
    assert head == "107 of 108 lines cannot be trained on; mend them, or take them out:"
    assert told[:3] == [
        "  first.jsonl line 1: text is empty",
        "  first.jsonl line 3: is no JSON: Expecting value at character 1",
        "  second.jsonl line 1: text is empty",
    ]
    assert len(told) == MOST_TOLD
    assert more == "... and 7 more"


def test_a_reason_obeys_no_control_characters(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    with pytest.raises(TrainingDataError) as error:
        read_examples([write_lines({"\x1b[2J\n": 1})], harmony, gpt_oss, DataOptions())
    assert "\x1b" not in str(error.value)
    assert len(str(error.value).split("\n")) == 2


def test_a_line_that_is_too_long_is_refused_and_the_next_one_read(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MOST_BYTES", 1 << 20)
    path = write_lines({"text": "a" * (3 << 20)}, {"text": ""})
    with pytest.raises(TrainingDataError) as error:
        read_examples([path], harmony, gpt_oss, DataOptions())
    assert error.value.problems == (
        "chats.jsonl line 1: is longer than 1 MiB; split it",
        "chats.jsonl line 2: text is empty",
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chats.json", b"{}", "training data are .jsonl or .txt files; convert it, or give it that ending"),
        ("chats.jsonl", "{}".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("missing.jsonl", None, "cannot be read (No such file or directory); check the path and its permissions"),
        ("empty.jsonl", b"\n\n", "there is nothing in empty.jsonl; give some examples"),
    ],
)
def test_a_file_that_is_no_training_data_is_refused(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_examples([tmp_path / name], harmony, gpt_oss, DataOptions())
    assert str(error.value).endswith(reason)


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistakes(
    harmony: HarmonyFormat, gpt_oss: Tokenizer, write_lines: WriteLines
) -> None:
    line = json.dumps(chat(QUESTION, ANSWER)).encode()
    windows = write_lines(b"\xef\xbb\xbf" + line + b"\r", line + b"\r", name="windows.jsonl")
    ours = write_lines(line, line)
    options = DataOptions()
    assert list(read_examples([windows], harmony, gpt_oss, options).training) == list(
        read_examples([ours], harmony, gpt_oss, options).training
    )


SYSTEM: dict[str, Any] = {
    "role": "system",
    "content": [
        {
            "type": "system_content",
            "tools": {"python": {"name": "python", "description": "Runs code.", "tools": []}},
        }
    ],
}
CODE = {"role": "assistant", "channel": "analysis", "recipient": "python", "content": "print(4)"}
OUTPUT = {"role": "tool", "name": "python", "recipient": "assistant", "channel": "analysis", "content": "4"}
THOUGHT = {"role": "assistant", "channel": "analysis", "content": "Easy."}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty; give a question and an answer"),
        ([SYSTEM, QUESTION], "the last message is of role 'user'; end with the assistant's"),
        ([QUESTION, CODE], "message 1: calls 'python', which is not among the tools"),
        ([SYSTEM, QUESTION, CODE, ANSWER], "message 3: call of 'python' before it has no result"),
        ([SYSTEM, QUESTION, OUTPUT, ANSWER], "message 2: is the result of no call before it"),
        ([SYSTEM, QUESTION, {**CODE, "channel": "commentary"}], "message 2: calls 'python' on channel 'commentary'"),
        ([SYSTEM, QUESTION, THOUGHT], "message 2: the assistant reasons and then neither answers nor calls a tool"),
        ([SYSTEM, THOUGHT, QUESTION, ANSWER], "message 1: the assistant reasons and then neither answers nor calls"),
        ([SYSTEM, QUESTION, {**ANSWER, "content": ""}], "message 2: the assistant says nothing; give content"),
        ([SYSTEM, QUESTION, {**ANSWER, "weight": 1}], "message 2: field 'weight' is not supported; leave it out"),
    ],
)
def test_a_harmony_conversation_that_no_model_could_have_had_is_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises((UsageError, UnsupportedError)) as caught:
        read_example({"harmony": {"messages": messages}})
    assert str(caught.value).startswith(reason)
