"""One conversation of the training set, written message by message, as a line of `{"harmony": ...}`.

The shape is what openai-harmony's `Conversation.to_dict` writes; freehold.train.chats reads it. It holds what OpenAI's
chat shape has no place for: effort, date, and calls of built-in tools.
"""

import json
import random
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any, Literal

from freehold.formats.conversation import CHANNELS, SystemContent, ToolNamespace

Effort = Literal["low", "medium", "high"]


def some_effort(rng: random.Random) -> Effort:
    efforts: Sequence[Effort] = ("low", "medium", "high")
    return rng.choices(efforts, weights=(15, 75, 10))[0]


def some_day(rng: random.Random) -> str:
    return (date(2025, 1, 1) + timedelta(days=rng.randrange(4 * 365))).isoformat()


class Dialogue:
    """A conversation that begins with Harmony's system message, as inference writes it."""

    def __init__(
        self,
        rng: random.Random,
        *,
        functions: Sequence[Mapping[str, Any]] = (),
        builtins: Sequence[ToolNamespace] = (),
        effort: Effort | None = None,
        instructions: str | None = None,
    ) -> None:
        self.effort = effort or some_effort(rng)
        self.date = some_day(rng)
        self._messages: list[dict[str, Any]] = [self._system(builtins)]
        if functions or instructions:
            developer: dict[str, Any] = {"type": "developer_content"}
            if instructions:
                developer["instructions"] = instructions
            if functions:
                tools = [tool["function"] for tool in functions]
                developer["tools"] = {"functions": {"name": "functions", "tools": tools}}
            self._messages.append({"role": "developer", "content": [developer]})

    def _system(self, builtins: Sequence[ToolNamespace]) -> dict[str, Any]:
        usual = SystemContent()
        system: dict[str, Any] = {
            "type": "system_content",
            "model_identity": usual.identity,
            "knowledge_cutoff": usual.knowledge_cutoff,
            "conversation_start_date": self.date,
            "reasoning_effort": self.effort,
            "channel_config": {"valid_channels": [*CHANNELS], "channel_required": True},
        }
        if builtins:
            system["tools"] = {namespace.name: _namespace(namespace) for namespace in builtins}
        return {"role": "system", "content": [system]}

    def user(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})

    def think(self, text: str) -> None:
        """Reasoning, which low effort leaves out."""
        if self.effort != "low":
            self._messages.append({"role": "assistant", "channel": "analysis", "content": text})

    def call(self, name: str, arguments: Mapping[str, Any]) -> None:
        """A call of a function, in the JSON that is shortest."""
        self._messages.append(
            {
                "role": "assistant",
                "channel": "commentary",
                "recipient": f"functions.{name}",
                "content_type": "<|constrain|>json",
                "content": compact(arguments),
            }
        )

    def use(self, recipient: str, content: str) -> None:
        """A call of a built-in tool: code for python, JSON for the others."""
        self._messages.append(
            {
                "role": "assistant",
                "channel": "analysis",
                "recipient": recipient,
                "content_type": "code",
                "content": content,
            }
        )

    def result(self, content: str) -> None:
        """What the call before it gave."""
        call = self._messages[-1]
        self._messages.append(
            {
                "role": "tool",
                "name": call["recipient"],
                "recipient": "assistant",
                "channel": call["channel"],
                "content": content,
            }
        )

    def answer(self, text: str) -> None:
        self._messages.append({"role": "assistant", "channel": "final", "content": text})

    def line(self) -> dict[str, Any]:
        return {"harmony": {"messages": self._messages}}


def compact(value: Any) -> str:
    """JSON without spaces, as gpt-oss writes calls."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _namespace(namespace: ToolNamespace) -> dict[str, Any]:
    return {
        "name": namespace.name,
        "description": namespace.description,
        "tools": [
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
            for tool in namespace.tools
        ],
    }
