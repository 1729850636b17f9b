"""What a conversation at the terminal sends to the model: history, instructions, and what is forgotten."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from freehold.cli import chat
from freehold.formats.conversation import Conversation, text_message
from freehold.formats.events import Event, TextDelta


class ScriptedReply:
    """Says "re: QUESTION" in pieces; `stop_after` pieces in, the person presses Ctrl-C."""

    num_tokens = num_prompt_tokens = 1

    def __init__(self, question: str, stop_after: int | None) -> None:
        self._stop_after = stop_after
        self._said: list[str] = []
        self.events = self._speak(["re: ", question])

    @property
    def messages(self) -> tuple[Any, ...]:
        return (text_message("assistant", "".join(self._said)),)

    def _speak(self, pieces: list[str]) -> Iterator[Event]:
        for number, piece in enumerate(pieces):
            if number == self._stop_after:
                raise KeyboardInterrupt
            self._said.append(piece)
            yield TextDelta(piece)


class ScriptedModel:
    """Remembers every conversation it was given."""

    def __init__(self) -> None:
        self.heard: list[list[tuple[str, str]]] = []
        self.stop_after: int | None = None

    def stream_chat(self, conversation: Conversation, **sampling: Any) -> ScriptedReply:
        self.heard.append([(message.role, message.text) for message in conversation.messages])
        return ScriptedReply(conversation.messages[-1].text, self.stop_after)


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
    chat._converse(chat._Talk(model, None, {}))  # type: ignore[arg-type]


def test_the_model_hears_what_was_said_before(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _converse(model, monkeypatch, "one", "two")
    assert model.heard[1] == [("user", "one"), ("assistant", "re: one"), ("user", "two")]


def test_reset_forgets_and_keeps_the_instructions(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _converse(model, monkeypatch, "/system be brief", "one", "/reset", "two", "/system", "three")
    assert model.heard == [
        [("system", "be brief"), ("user", "one")],
        [("system", "be brief"), ("user", "two")],
        [("user", "three")],
    ]


def test_messages_of_several_lines(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _converse(model, monkeypatch, '"""a', "  b", 'c"""', "d\\", "e", "", "/quit", "never")
    assert [heard[-1] for heard in model.heard] == [("user", "a\n  b\nc"), ("user", "d\ne")]


def test_a_stopped_answer_stays_as_far_as_it_came(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.stop_after = 1
    _converse(model, monkeypatch, "one", "two")
    assert model.heard[1] == [("user", "one"), ("assistant", "re: "), ("user", "two")]


def test_a_question_stopped_before_its_answer_is_taken_back(
    model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.stop_after = 0
    _converse(model, monkeypatch, "one", "two")
    assert model.heard[1] == [("user", "two")]
