"""Tools in the terminal: what is shown, what is asked, what is stopped. A script stands in for the model."""

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from freehold.cli import approval
from freehold.cli.footnotes import Footnotes
from freehold.cli.main import app
from freehold.cli.screen import Screen
from freehold.errors import FreeholdError, UnsupportedError, UsageError
from freehold.session.record import read_recording
from freehold.session.turn import ToolStart
from freehold.tools.base import Citation
from freehold.tools.functions import FunctionToolset
from freehold.tools.python import PythonTool
from tests.cli.terminal import FREEHOLD, Terminal

TOOLS = '''
import time
import freehold


@freehold.tool
def weather(city: str) -> str:
    """The weather of a city."""
    return "\\n".join(f"line {number} of {city} \\x1b[31m" for number in range(20))


@freehold.tool
def loud() -> str:
    """Prints, and has others print."""
    import os
    print("a function prints")
    os.system("echo a program prints")
    return "done"


@freehold.tool
async def wait() -> str:
    """Never ends."""
    import asyncio
    open("waiting", "w").close()
    await asyncio.Event().wait()
    return ""
'''
PRINTED = "print('a file prints')\n"
PATCH = "*** Begin Patch\n*** Update File: notes.txt\n@@\n-old\n+new\n*** End Patch\n"


def _builtin(recipient: str, text: str, reasoning: str | None = None) -> dict[str, str]:
    before = "" if reasoning is None else f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant"
    return {"completion": f"{before}<|channel|>analysis to={recipient} code<|message|>{text}<|call|>"}


def _function(name: str, **arguments: Any) -> dict[str, Any]:
    return {"calls": [{"name": name, "arguments": arguments}]}


def _patch(text: str) -> dict[str, str]:
    return {"completion": f"<|channel|>commentary to=functions.apply_patch<|message|>{text}<|call|>"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tools.py").write_text(TOOLS)
    return tmp_path


def _script(place: Path, *turns: dict[str, Any]) -> Path:
    path = place / "script.jsonl"
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return path


def _chat(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FREEHOLD, "chat", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_is_recorded_is_shown_again_and_gone_on_from(place: Path) -> None:
    script = _script(
        place, _function("weather", city="Oslo"), {"reasoning": "Hm.", "answer": "Rain."}, {"answer": "No."}
    )
    shown = ""
    for question in ("Rain?", "Sure?"):
        options = ["--record", "talk.jsonl", "--tools", "my_tools.py", "--approve", "never", "--script", str(script)]
        result = CliRunner().invoke(app, ["chat", *options, question])
        assert result.exit_code == 0, result.output
        shown += f"> {question}\n{result.stderr}"
        script.write_text(script.read_text().splitlines()[-1])
    again = CliRunner().invoke(app, ["replay", "talk.jsonl"])
    assert again.exit_code == 0
    assert again.stdout == "Rain.\nNo.\n"
    assert again.stderr == shown
    history = [message for turn in read_recording(place / "talk.jsonl") for message in turn.history()]
    assert [(message.role, message.text[:8]) for message in history if message.channel != "analysis"] == [
        ("user", "Rain?"),
        ("assistant", '{"city":'),
        ("tool", "line 0 o"),
        ("assistant", "Rain."),
        ("user", "Sure?"),
        ("assistant", "No."),
    ]
    (place / "other.txt").write_text("something else\n")
    for arguments in (["replay", "other.txt"], ["chat", "--record", "other.txt", "Hi"]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, UsageError)
        assert "no recording" in str(result.exception)


def test_a_dry_run_says_what_would_be_changed(place: Path) -> None:
    (place / "notes.txt").write_text("old\n")
    script = _script(place, _patch(PATCH), {"answer": "So it would be."})
    options = ["--patch", ".", "--dry-run", "--approve", "never", "--script", str(script)]
    result = CliRunner().invoke(app, ["chat", *options, "?"])
    assert result.stdout == "So it would be.\n"
    assert "nothing was written" in result.stderr and "M notes.txt" in result.stderr
    assert (place / "notes.txt").read_text() == "old\n"


def test_after_so_many_calls_there_is_an_answer(place: Path) -> None:
    script = _script(place, _function("weather", city="Oslo"), {"answer": "Enough."})
    options = ["--tools", "my_tools.py", "--approve", "never", "--max-tool-calls", "1", "--script", str(script)]
    assert CliRunner().invoke(app, ["chat", *options, "?"]).stdout == "Enough.\n"
    _script(place, _function("weather", city="Oslo"), _function("weather", city="Rome"))
    result = CliRunner().invoke(app, ["chat", *options, "?"])
    assert "does not allow it" in str(result.exception)  # the model could not have said this


def _has_sandbox() -> bool:
    try:
        PythonTool()
    except UnsupportedError:  # tests/tools/test_python.py tells, where it should be there
        return False
    return True


needs_sandbox = pytest.mark.skipif(not _has_sandbox(), reason="no sandbox can be made inside this one")


@needs_sandbox
def test_the_answer_and_its_footnotes_are_on_stdout_and_all_else_on_stderr(place: Path) -> None:
    (place / "docs").mkdir()
    (place / "docs" / "guide.md").write_text("# Hours\n\nIt opens at nine.\nNever on Mondays.\n")
    (place / "data.csv").write_text("a,b\n1,2\n")
    code = (
        "open('/mnt/data/.profile', 'w').write('rm'); "
        "text = open('/mnt/data/data.csv').read()\n"
        "open('/mnt/data/data.csv', 'a').write('3,4\\n'); open('/mnt/data/new.txt', 'w').write('x')\n"
        "print(text)"
    )
    script = _script(
        place,
        _builtin("browser.open", '{"id": "guide.md"}', "I look."),
        _builtin("python", code),
        _function("weather", city="Rome"),
        {"answer": "At nine【0†L4】, not on Mondays【0†L5】. Twice【0†L4】 and【7†L1】."},
    )
    tools = ("--browse", "docs", "--files", "data.csv", "--tools", "my_tools.py", "--approve", "never")
    done = _chat("--script", script, *tools, "?")
    assert done.returncode == 0, done.stderr
    guide = place / "docs" / "guide.md"
    assert done.stdout == (
        f"At nine[1], not on Mondays[2]. Twice[1] and[3].\n\n[1] {guide}:3\n[2] {guide}:4\n"
        "[3] leads to nothing that was shown\n"
    )
    assert re.search(
        r'^I look\.\nbrowser\.open: \{"id": "guide\.md"\}\n  \[0\] .*  L4: It opens at nine\.\n'
        r".*python: open.*\n  a,b\n  1,2\n.*file: .*/profile\nfile: .*/data-2\.csv\nfile: .*/new\.txt\n"
        r".*weather: .*\n  line 0 of Rome \S+\n.*  line 7 of Rome \S+\n  … 12 more lines; /output shows them\n",
        done.stderr,
        re.DOTALL,
    ), done.stderr
    assert (place / "data.csv").read_text() == "a,b\n1,2\n"
    assert (place / "data-2.csv").read_text() == "a,b\n1,2\n3,4\n"
    assert (place / "new.txt").read_text() == "x"
    assert not (place / ".profile").exists()  # which a shell would obey, in the folder that is its home


def test_only_answers_reach_stdout_whatever_functions_print(place: Path) -> None:
    (place / "loud.py").write_text(PRINTED + TOOLS)
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    done = _chat(
        "--script",
        _script(place, _function("loud"), {"completion": said}),
        "--tools",
        "loud.py",
        "--approve=never",
        "?",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "I look.\nYes.\n"
    assert done.stderr == "a file prints\nloud: {}\na function prints\na program prints\n  done\n\n"

    serving = [*FREEHOLD, "mcp", "--tools", "loud.py"]  # where stdout is the wire
    served = subprocess.run(serving, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert (served.returncode, served.stdout, served.stderr) == (0, "", "a file prints\n")


def test_a_function_is_asked_about_also_where_it_is_called_apply_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_patch(path: str) -> str:
        """Mine."""
        return path

    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "n\n"

    monkeypatch.setattr(approval, "_has_terminal", lambda: True)
    monkeypatch.setattr(approval, "_answer", answer)
    asking = approval.Approval("tools", Screen())
    asking.check([FunctionToolset([apply_patch])])
    start = ToolStart(number=0, recipient="functions.apply_patch", arguments='{"path": "\x1b[2J"}')
    assert not asyncio.run(asking.call(start))
    # stderr is no terminal here, and so the terminal is told what it is about.
    assert asked == ['apply_patch: {"path": "\ufffd[2J"}\nRun apply_patch? [y]es, [n]o, [a]lways: ']


def test_calls_are_asked_about_shown_and_stopped(place: Path) -> None:
    (place / "notes.txt").write_text("old\n")
    answer = {"answer": "So be it."}
    script = _script(
        place,
        *(_function("weather", city="Oslo"), answer),  # declined
        *(_function("weather", city="Rome"), _function("weather", city="Bern"), answer),  # always
        *(_patch(PATCH), answer),  # declined
        *(_patch(PATCH), answer),
        _function("wait"),  # stopped
        *(_function("weather", city="Kyiv"), answer),
    )
    terminal = Terminal("chat", "--script", script, "--tools", "my_tools.py", "--patch", ".")
    terminal.wait_for(r"/quit.*> $")

    terminal.type("one\ny\n")  # what was typed before a question answers none
    assert "Oslo" in terminal.wait_for(r"\r\S*Run weather\? .*: $")
    terminal.type("n\n")
    assert "declined" in terminal.wait_for(r"So be it\.\s+> $")
    terminal.type("/output\n")
    terminal.wait_for(r"The user declined this call.*> $")

    terminal.type("two\n")
    terminal.wait_for(r"Run weather\? .*: $")
    terminal.type("nonsense\n")
    terminal.wait_for(r"Run weather\? .*: $")
    terminal.type("a\n")
    shown = terminal.wait_for(r"So be it\.\s+> $")
    assert "line 7 of Rome" in shown
    assert "line 7 of Bern" in shown  # and nobody was asked
    assert "line 8 of" not in shown
    assert "\x1b[31m" not in shown
    terminal.type("/output\n")
    assert "line 19 of Bern" in terminal.wait_for(r"line 19.*> $")

    terminal.type("three\n")
    shown = terminal.wait_for(r"Change these files in .*: $")
    assert re.search(r"-old.*\+new", shown, re.DOTALL)
    terminal.type("n\n")
    terminal.wait_for(r"does not want this change.*So be it\.\s+> $")
    assert (place / "notes.txt").read_text() == "old\n"
    terminal.type("four\n")
    terminal.wait_for(r"Change these files in .*: $")
    terminal.type("y\n")
    terminal.wait_for(r"M notes\.txt.*So be it\.\s+> $")
    assert (place / "notes.txt").read_text() == "new\n"

    terminal.type("five\n")
    terminal.wait_for(r"Run wait\? .*: $")
    terminal.interrupt()
    terminal.wait_for(r"\s> $")  # Ctrl-C at the question stops the turn
    terminal.type("six\n")
    assert "line 7 of Kyiv" in terminal.wait_for(r"So be it\.\s+> $")
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_a_tool_that_runs_and_not_the_conversation(place: Path) -> None:
    script = _script(place, _function("wait"), {"answer": "Fine."})
    terminal = Terminal("chat", "--script", script, "--tools", "my_tools.py", "--approve", "never")
    terminal.wait_for(r"/quit.*> $")
    terminal.type("one\n")
    terminal.wait_for(r"wait: \{\}.*…")
    while not (place / "waiting").exists():
        pass
    terminal.interrupt()
    terminal.wait_for(r"\s> $")
    terminal.type("two\n")
    terminal.wait_for(r"Fine\.\s+> $")
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tools", "my_tools.py"], "no terminal to ask in before calls of weather; give --approve never"),
        pytest.param(
            ["--python", "--approve", "always"], "no terminal to ask in before calls of python", marks=needs_sandbox
        ),
        (["--approve", "sometimes"], "--approve is never, tools, always, got 'sometimes'"),
        (["--files", "nothing.csv"], "there is no nothing.csv"),
        (["--browse", "nothing"], "nothing is no folder"),
        (["--tools", "nothing.py"], r"nothing\.py"),
        (["--patch", "my_tools.py"], r"my_tools\.py"),
        (["--search", "google"], "searched by exa, you, or the URL of a SearXNG server, got 'google'"),
        (["--dry-run"], "--dry-run is for patches; give --patch DIR too"),
        (["--max-steps", "0"], "max_steps must be 1 or more, got 0"),
        (["--tool-seconds", "0"], "tool_seconds must be more than 0, got 0"),
        (["--tools", "my_tools.py", "--tools", "my_tools.py", "--approve", "never"], "two tools are called functions"),
        (["--python-limit", "minutes=3"], "no limit 'minutes'; it has seconds, memory_bytes"),
        (["--python-limit", "memory_bytes=plenty"], "'memory_bytes=plenty': give a number"),
        (["--python-limit", "memory_bytes=1MiB"], "memory_bytes cannot be 1048576: give 134217728 or more"),
        (["--mcp", "nothing-of-the-kind"], "nothing-of-the-kind"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setattr(approval, "_TERMINAL", place / "nothing")
    script = _script(place, {"match": "", "answer": "never said"})
    result = CliRunner().invoke(app, ["chat", "--script", str(script), *options, "?"])
    assert result.stdout == ""
    assert isinstance(result.exception, FreeholdError)
    assert re.search(words, str(result.exception))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_footnotes_come_out_alike_wherever_the_text_is_split(size: int) -> None:
    text = "A【0†L1】b【no citation】【【12†L3-L9】】 c【0†L1】 and 【3† in the end【"
    first, second = text.index("【0"), text.index("【12")
    notes = Footnotes()
    shown = "".join(notes.feed(text[at : at + size]) for at in range(0, len(text), size)) + notes.flush()
    assert shown == "A[1]b【no citation】【[2]】 c[1] and 【3† in the end【"
    notes.take(
        [
            Citation(start=first, end=first + 6, url="file:///a%20b.md", title="A", first_line=4, last_line=4),
            Citation(start=second, end=second + 10, url="https://x.org/", title="X", first_line=1, last_line=3),
        ]
    )
    assert notes.notes() == ["[1] /a b.md:4", "[2] https://x.org/ (lines 1-3): X"]
    assert notes.notes() == []
