"""`freehold harmony` as a person meets it who asks what a model really said."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from freehold.cli.main import app
from freehold.errors import UsageError
from freehold.formats.conversation import Conversation
from freehold.formats.tokenizer import Tokenizer
from tests.harmony import theirs

CALL = (
    "<|channel|>analysis<|message|>Hm.<|end|>"
    '<|start|>assistant<|channel|>commentary to=weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>'
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CHAT = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather? <|end|>"}],
    "tools": [TOOL],
}


def harmony(*arguments: str | Path, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, ["harmony", *map(str, arguments)], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_render_shows_what_the_model_reads(write: Any) -> None:
    chat = write("chat.json", CHAT)
    text = harmony("render", chat, "--reasoning-effort", "high")
    assert text.startswith("<|start|>system<|message|>You are ChatGPT")
    assert "Reasoning: high" in text
    assert "# Instructions\n\nBe brief.\n\n# Tools\n\n## functions" in text
    assert text.endswith("<|start|>assistant\n")
    ids = json.loads(harmony("render", chat, "--ids"))
    assert Tokenizer.o200k_harmony().decode(ids, control="show").endswith("Weather? <|end|><|end|><|start|>assistant")
    assert ids.count(Tokenizer.o200k_harmony().control_id("<|end|>")) == 3  # the user's own is none


def test_render_reads_openai_harmonys_own_json(write: Any, oracle: Any) -> None:
    import openai_harmony as oh

    conversation = theirs(Conversation.from_openai([{"role": "user", "content": "q"}]))
    conversation.messages.insert(0, oh.Message.from_role_and_content(oh.Role.SYSTEM, oh.SystemContent.new()))
    expected = oracle.render_conversation_for_completion(conversation, oh.Role.ASSISTANT)
    assert json.loads(harmony("render", write("chat.json", conversation.to_json()), "--ids")) == expected


def test_parse_says_what_was_mended(write: Any) -> None:
    completion, chat = write("completion.txt", CALL + "\n"), write("chat.json", CHAT)
    read = json.loads(harmony("parse", completion, "--tools", chat))
    assert [message["text"] for message in read["messages"]] == ["Hm.", '{"city": "Rome"}']
    assert read["calls"] == [{"recipient": "functions.weather", "arguments": '{"city": "Rome"}', "problem": None}]
    assert [found["code"] for found in read["diagnostics"]] == ["recipient mended"]
    assert json.loads(harmony("parse", completion))["calls"][0]["problem"] == "not offered"
    ids = Tokenizer.o200k_harmony().encode_with_control(CALL)
    assert json.loads(harmony("parse", write("ids.json", ids), "--tools", write("tools.json", [TOOL]))) == read


def test_explain_shows_every_token(write: Any) -> None:
    ids = Tokenizer.o200k_harmony().encode_with_control(CALL)
    shown = harmony("explain", write("completion.txt", CALL))
    assert [int(word) for word in shown.split() if word.isdigit() and len(word) > 1 and int(word) in ids]
    lines = [[*map(int, line.split())] for line in shown.splitlines() if line and line.replace(" ", "").isdigit()]
    assert [id_ for line in lines for id_ in line] == ids
    assert "2. assistant · commentary · to weather" in shown
    assert "! recipient not offered, at token 6" in shown
    conversation = harmony("explain", write("chat.json", CHAT))
    assert conversation.splitlines()[-1].endswith("3 messages, 0 diagnostics")


def test_explain_ends_a_message_where_the_next_one_begins(write: Any) -> None:
    for middle in ("<|start|>", "", "<|end|><|start|>"):  # where the end is missing, all but the channel, nothing
        text = f"<|channel|>analysis<|message|>Hm{middle}<|channel|>final<|message|>Yes<|call|>".replace(
            "<|start|>", "<|start|>assistant"
        )
        shown = harmony("explain", write("completion.txt", text))
        blocks = [block for block in shown.split("\n\n") if block[0].isdigit()]
        first, second = blocks[0].splitlines(), blocks[1].splitlines()
        assert first[1].startswith("<|channel|>analysis<|message|>Hm")
        assert second[1].removeprefix("<|start|>assistant") == "<|channel|>final<|message|>Yes<|call|>"
        assert second[-1].startswith("! wrong end of a message")


def test_explain_takes_json_that_is_a_completion(write: Any) -> None:
    for text in ('{"answer": 42}', '[{"x": 1}]', '"x"'):
        assert "1. assistant · final" in harmony("explain", write("completion.txt", text))


def test_two_files_cannot_come_through_one_pipe() -> None:
    with pytest.raises(UsageError, match="only one of the two"):
        harmony("parse", "-", "--tools", "-", stdin="x")


def test_explain_takes_anything(write: Any) -> None:
    for text in ("", "\n", "[]", "[1, -1, 999999999]", "<|call|>" * 9, "<|start|>", "[" * 5000, "{"):
        assert "diagnostics" in harmony("explain", "-", stdin=text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x", "is not JSON"),
        ("3", "holds no conversation"),
        ({"input": []}, "holds no conversation"),
        ({"messages": [], "temperature": 1}, "temperature would not be rendered"),
        ([{"role": "user"}], "message 0: content must be"),
    ],
)
def test_render_says_what_is_wrong_with_a_file(write: Any, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        harmony("render", write("chat.json", content))
