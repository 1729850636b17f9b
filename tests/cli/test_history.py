"""What a conversation at the terminal sends to the model: history, instructions, and what is forgotten."""

import asyncio
import re
import signal
import sys
from dataclasses import replace
from typing import Any

import pytest

from freehold.cli import chat
from freehold.cli.screen import Screen
from freehold.cli.talk import Talk
from freehold.engine.request import Request, Step
from freehold.formats.conversation import Conversation
from freehold.session.generation import Ask
from freehold.session.scripted import ScriptedTurn, serve_script
from freehold.session.served import Steps

_MESSAGE = re.compile(r"<\|start\|>(user|assistant|developer)(?:<\|channel\|>final)?<\|message\|>(.*?)<\|end\|>", re.S)
_HEADER = 3  # <|channel|>final<|message|>


class ScriptedModel:
    """Says "re: it", and remembers what it was asked; so many steps in, the person presses Ctrl-C."""

    def __init__(self) -> None:
        self.heard: list[list[tuple[str, str]]] = []
        self.stop_after: int | None = None
        script = serve_script([ScriptedTurn.from_json({"match": "", "answer": "re: it"})])
        self._runner: Any = script.runner
        self._tokenizer = script.prompting.the_tokenizer()
        self.served = replace(script, runner=self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def submit(self, request: Request) -> "_Interrupted":
        prompt = self._tokenizer.decode(request.prompt, control="show")
        self.heard.append([(role, text.removeprefix("# Instructions\n\n")) for role, text in _MESSAGE.findall(prompt)])
        return _Interrupted(self._runner.submit(request), self.stop_after)


class _Interrupted:
    """Steps of a request, until Ctrl-C."""

    def __init__(self, steps: Steps, stop_after: int | None) -> None:
        self._steps = steps
        self._left = stop_after

    def __aiter__(self) -> "_Interrupted":
        return self

    async def __anext__(self) -> Step:
        if self._left is not None:
            if not self._left:
                signal.raise_signal(signal.SIGINT)
            self._left -= 1
        return await anext(self._steps)

    async def aclose(self) -> None:
        await self._steps.aclose()


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


def _converse(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    typed = iter(lines)

    def type_line() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    talk = Talk(model.served, Ask(conversation=Conversation(messages=())), Screen())
    with asyncio.Runner() as runner:
        chat._converse(talk, runner.run)


def test_the_model_hears_what_was_said_before(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _converse(model, monkeypatch, "one", "two")
    assert model.heard[1] == [("user", "one"), ("assistant", "re: it"), ("user", "two")]


def test_reset_forgets_and_keeps_the_instructions(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _converse(model, monkeypatch, "/system be brief", "one", "/reset", "two", "/system", "three")
    assert model.heard == [
        [("developer", "be brief"), ("user", "one")],
        [("developer", "be brief"), ("user", "two")],
        [("user", "three")],
    ]


def test_messages_of_several_lines(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _converse(model, monkeypatch, '"""a', "  b", 'c"""', "d\\", "e", "", "/quit", "never")
    assert [heard[-1] for heard in model.heard] == [("user", "a\n  b\nc"), ("user", "d\ne")]


def test_a_stopped_answer_stays_as_far_as_it_came(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.stop_after = _HEADER + 2
    _converse(model, monkeypatch, "one", "two")
    assert model.heard[1] == [("user", "one"), ("assistant", "re:"), ("user", "two")]


def test_a_question_stopped_before_its_answer_is_taken_back(
    model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.stop_after = 0
    _converse(model, monkeypatch, "one", "two")
    assert model.heard[1] == [("user", "two")]
