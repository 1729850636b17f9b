"""The Codex CLI over the Responses wire: the program itself, where it is here, and what it sends, always."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.documented import shown
from tests.clients.running import Serving, bare_environment
from tests.serve.event_order import EventOrder
from tests.serve.responding import events_of

CODEX = os.environ.get("FREEHOLD_TEST_CODEX")
AT_HOME = "check_for_update_on_startup = false\n[analytics]\nenabled = false\n"
GREET = 'def greet():\n    return "helo"\n'


def codex(folder: Path, server: Serving, *, model: str, task: str) -> tuple[list[dict[str, Any]], str]:
    """The events that it tells of, and the file afterwards."""
    if CODEX is None:
        pytest.skip("FREEHOLD_TEST_CODEX names no codex program")
    home, project = folder / "home", folder / "project"
    home.mkdir()
    project.mkdir()
    first, table = shown("Codex CLI", "toml", server.url).split("[", 1)
    (home / "config.toml").write_text(f"{first}{AT_HOME}[{table}")
    (project / "greet.py").write_text(GREET)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    done = subprocess.run(
        [CODEX, "exec", "--model", model, "--dangerously-bypass-approvals-and-sandbox", "--json", task],
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=bare_environment() | {"HOME": str(home), "CODEX_HOME": str(home)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return events, (project / "greet.py").read_text()


def completed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["item"] for event in events if event["type"] == "item.completed"]


def test_codex_edits_a_file_by_its_shell(scripted: Serving, tmp_path: Path) -> None:
    before = len(scripted.records())
    events, text = codex(tmp_path, scripted, model="default", task="Fix the typo in greet.py")
    assert text == GREET.replace("helo", "hello")
    done = [item for item in completed(events) if item["type"] != "error"]  # that it does not know the model
    assert [item["type"] for item in done] == ["command_execution", "file_change", "agent_message"]
    assert done[-1]["text"] == "The typo is fixed."
    assert events[-1]["type"] == "turn.completed" and events[-1]["usage"]["reasoning_output_tokens"] > 0
    asked = {record["path"] for record in scripted.records()[before:] if record["message"] == "request"}
    assert asked == {"/v1/responses"}


def test_codex_edits_a_file_by_its_own_tool(scripted: Serving, tmp_path: Path) -> None:
    """To models that it knows it offers `apply_patch`, a custom tool with a Lark grammar."""
    events, text = codex(tmp_path, scripted, model="gpt-5.5", task="Fix the typo by tool")
    assert text == GREET.replace("helo", "hello")
    assert [item["type"] for item in completed(events)] == ["file_change", "agent_message"]


def test_codex_understands_a_call_into_a_namespace(scripted: Serving, tmp_path: Path) -> None:
    """The tool gets as far as its own arguments; a name that Codex does not know is an "unsupported call" to it."""
    before = len(scripted.records())
    events, _ = codex(tmp_path, scripted, model="default", task="Close the agent nobody")
    assert completed(events)[-1]["text"] == "There is no such agent."
    assert len([record for record in scripted.records()[before:] if record["message"] == "request"]) == 2


# --- what it sends ------------------------------------------------------------------------------------------------

INSTRUCTIONS = "You are a coding agent. Be brief, and test what you change. " * 290
"""As long as Codex's own, which it sends with every request."""
WIRE = Path(__file__).parent / "data" / "codex.json"


@pytest.mark.parametrize("kind", ["shell", "tool", "namespace"])
def test_what_codex_sends_is_taken_turn_by_turn(scripted: Serving, kind: str) -> None:
    wire = json.loads(WIRE.read_text())
    request = {**wire["request"], **wire[kind]["request"]}
    request["tools"] = wire["tools"] + wire[kind]["tools"]
    history = list(request["input"])
    history[0]["content"][0]["text"] = INSTRUCTIONS
    for expected in wire[kind]["turns"]:
        answer = httpx.post(f"{scripted.url}/v1/responses", json={**request, "input": history})
        assert answer.status_code == 200, answer.text
        assert "web_search" in answer.headers["x-freehold-warnings"]
        events = events_of(answer.text)  # which ends in [DONE]
        assert EventOrder.of(events)["status"] == "completed"
        output = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert [(item["type"], item.get("name"), item.get("namespace")) for item in output] == [
            tuple(item) for item in expected["output"]
        ]
        # Sent back as Codex does: without what is null, reasoning with its content and sealed.
        for item in output:
            if item["type"] == "reasoning":
                assert item["content"] and item["encrypted_content"]
            history.append({name: value for name, value in item.items() if value is not None})
        if "result" in expected:
            result = expected["result"]
            history.append({**result, "id": f"{result['id']}{len(history)}", "call_id": output[-1]["call_id"]})
    assert output[-1]["content"][0]["text"] == wire[kind]["says"]
