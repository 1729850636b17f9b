"""The items of calls that the server carries out, while they are made: searches, programs, tools of MCP servers.

A call is written by the model, waits until those before it have been carried out, and is carried out. `said` is what
later prompts need of it and the wire does not show; see items.py.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from freehold.formats.conversation import Message
from freehold.serve.responses.hosted import Hosting
from freehold.serve.responses.items import PRIVATE, mcp_error, on_wire
from freehold.serve.responses.output import Event, OutputItem
from freehold.session.generation import ScoredToken
from freehold.session.turn import ToolDone

if TYPE_CHECKING:
    from freehold.serve.responses.stream import ResponseStream


class HostedCall(OutputItem):
    """One call. `recipient` is whom the model called."""

    def __init__(self, stream: "ResponseStream", recipient: str, hosting: Hosting) -> None:
        super().__init__(stream)
        self.recipient = recipient
        self.hosting = hosting
        self.content_type: str | None = None
        self.message_text = ""

    @property
    def is_open(self) -> bool:
        """Whether the client has been told of it."""
        return self.index >= 0

    def complete(self, arguments: str, *, is_whole: bool) -> None:
        """What is called with; whether that can be is found out when it is carried out."""
        self.text = [arguments]

    def written(self, message: Message) -> list[Event]:
        """The model has written it."""
        self.message_text, self.content_type = message.text, message.content_type
        return []

    def look(self, arguments: str) -> None:
        """It is about to be carried out, and all before it have been."""

    def start(self) -> list[Event]:
        """It is being carried out."""
        return []

    @abstractmethod
    def done(self, done: ToolDone) -> list[Event]:
        """It was. Fills in `wire`."""

    def said(self, done: ToolDone) -> dict[str, Any] | None:
        """What stands under PRIVATE in the item as it is stored; None where the wire shows all that there is."""
        return {
            "recipient": self.recipient,
            "content_type": self.content_type,
            "text": self.message_text,
            "result": done.message.text,
            "container": self.hosting.container_id,
        }

    def include(self, said: Mapping[str, Any] | None) -> None:
        """Fill in what of this was asked for."""
        self.wire |= on_wire({**self.wire, PRIVATE: said}, self.stream.include)


class WebSearchCall(HostedCall):
    """The client is told of it when it is carried out: only then is it known what it does."""

    prefix = "ws"

    def __init__(self, stream: "ResponseStream", recipient: str, hosting: Hosting) -> None:
        super().__init__(stream, recipient, hosting)
        self.wire = {"type": "web_search_call", "id": "", "status": "in_progress", "action": {"type": "search"}}

    def opening(self) -> list[Event]:
        return [
            self.stream.event("response.web_search_call.in_progress", **self.place),
            self.stream.event("response.web_search_call.searching", **self.place),
        ]

    def delta(self, text: str, scored: Sequence[ScoredToken]) -> None:
        return None

    def look(self, arguments: str) -> None:
        self.wire["action"] = self._action(arguments)

    def done(self, done: ToolDone) -> list[Event]:
        self.wire["status"] = "completed" if done.problem is None else "failed"
        self.include(self.said(done))
        return [] if done.problem else [self.stream.event("response.web_search_call.completed", **self.place)]

    def finish(self, status: str) -> list[Event]:
        self.wire["status"] = "incomplete"
        return []

    def said(self, done: ToolDone) -> dict[str, Any] | None:
        is_search = self.wire["action"]["type"] == "search" and done.problem is None
        return {**(super().said(done) or {}), "sources": self.hosting.links() if is_search else []}

    def _action(self, arguments: str) -> dict[str, Any]:
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError):
            given = {}
        given = given if isinstance(given, dict) else {}
        function = self.recipient.rpartition(".")[2]
        if function == "search":
            query = given.get("query")
            return {"type": "search", **({"query": query, "queries": [query]} if isinstance(query, str) else {})}
        address = self.hosting.address(self.recipient, arguments)
        if function == "open":
            return {"type": "open_page", "url": address or None}
        pattern = given.get("pattern")
        return {"type": "find_in_page", "pattern": pattern if isinstance(pattern, str) else "", "url": address}


class CodeInterpreterCall(HostedCall):
    prefix = "ci"
    _KIND = "response.code_interpreter_call"

    def __init__(self, stream: "ResponseStream", recipient: str, hosting: Hosting) -> None:
        super().__init__(stream, recipient, hosting)
        self.wire = {
            "type": "code_interpreter_call",
            "id": "",
            "status": "in_progress",
            "code": "",
            "container_id": hosting.container_id,
            "outputs": None,
        }

    def opening(self) -> list[Event]:
        return [self.stream.event(f"{self._KIND}.in_progress", **self.place)]

    def delta(self, text: str, scored: Sequence[ScoredToken]) -> Event:
        self.text.append(text)
        return self.stream.event(f"{self._KIND}_code.delta", **self.place, delta=text)

    def written(self, message: Message) -> list[Event]:
        super().written(message)
        self.wire["code"] = code = "".join(self.text)
        return [self.stream.event(f"{self._KIND}_code.done", **self.place, code=code)]

    def start(self) -> list[Event]:
        return [self.stream.event(f"{self._KIND}.interpreting", **self.place)]

    def done(self, done: ToolDone) -> list[Event]:
        self.wire["status"] = "completed" if done.problem is None else "failed"
        self.include(self.said(done))
        return [] if done.problem else [self.stream.event(f"{self._KIND}.completed", **self.place)]

    def finish(self, status: str) -> list[Event]:
        self.wire |= {"status": "incomplete", "code": "".join(self.text)}
        return []


class McpCall(HostedCall):
    prefix = "mcp"

    def __init__(self, stream: "ResponseStream", recipient: str, hosting: Hosting) -> None:
        super().__init__(stream, recipient, hosting)
        called = hosting.names[recipient]
        self.wire = {
            "type": "mcp_call",
            "id": "",
            "status": "in_progress",
            "server_label": called.label,
            "name": called.name,
            "arguments": "",
            "output": None,
            "error": None,
            "approval_request_id": None,
        }

    def opening(self) -> list[Event]:
        return [self.stream.event("response.mcp_call.in_progress", **self.place)]

    def delta(self, text: str, scored: Sequence[ScoredToken]) -> Event:
        self.text.append(text)
        return self.stream.event("response.mcp_call_arguments.delta", **self.place, delta=text)

    def written(self, message: Message) -> list[Event]:
        super().written(message)
        self.wire["arguments"] = arguments = "".join(self.text)
        return [self.stream.event("response.mcp_call_arguments.done", **self.place, arguments=arguments)]

    def done(self, done: ToolDone) -> list[Event]:
        text, is_failed = done.message.text, done.problem is not None
        outcome = (
            {"status": "failed", "error": mcp_error(text)} if is_failed else {"status": "completed", "output": text}
        )
        self.wire |= outcome
        return [self.stream.event(f"response.mcp_call.{outcome['status']}", **self.place)]

    def said(self, done: ToolDone) -> None:
        return None

    def finish(self, status: str) -> list[Event]:
        self.wire |= {"status": "incomplete", "arguments": "".join(self.text)}
        return []
