"""The items of a response while they are made: messages, reasoning, calls of the client's functions.

Each fills in what it is on the wire, and tells the events of its own between `response.output_item.added` and `.done`,
which are the stream's. Those of hosted tools are in hosted_output.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from freehold.serve.responses.tools import ToolName
from freehold.session.generation import ScoredToken
from freehold.tools.base import Citation

if TYPE_CHECKING:
    from freehold.serve.responses.stream import ResponseStream

Event = dict[str, Any]


class OutputItem(ABC):
    """One output item. `wire` is what it is on the wire, `index` its place in the output."""

    wire: dict[str, Any]
    prefix: str
    """Of its id."""

    def __init__(self, stream: "ResponseStream") -> None:
        self.stream = stream
        self.index, self.id = -1, ""
        self.place: dict[str, Any] = {}
        self.text: list[str] = []

    def place_in(self, index: int, name: str) -> None:
        """It begins, in this place and with this id."""
        self.index, self.id = index, name
        self.place |= {"item_id": name, "output_index": index}
        self.wire["id"] = name

    def opening(self) -> list[Event]:
        return []

    @abstractmethod
    def delta(self, text: str, scored: Sequence[ScoredToken]) -> Event | None:
        """More of it; None where clients are not told."""

    @abstractmethod
    def finish(self, status: str) -> list[Event]:
        """Fill in `wire`; returns the events before `response.output_item.done`."""


class Message(OutputItem):
    prefix = "msg"

    def __init__(self, stream: "ResponseStream", channel: str | None) -> None:
        super().__init__(stream)
        self.place |= {"content_index": 0}
        self.logprobs: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.wire = {
            "type": "message",
            "id": "",
            "role": "assistant",
            "status": "in_progress",
            "phase": "commentary" if channel == "commentary" else "final_answer",
            "content": [],
        }

    def opening(self) -> list[Event]:
        return [self.stream.event("response.content_part.added", **self.place, part=self._part())]

    def delta(self, text: str, scored: Sequence[ScoredToken]) -> Event:
        self.text.append(text)
        logprobs = self.stream.logprobs(scored) if scored else []
        self.logprobs += logprobs
        return self.stream.event("response.output_text.delta", **self.place, delta=text, logprobs=_bare(logprobs))

    def finish(self, status: str) -> list[Event]:
        part = self._part()
        self.wire |= {"status": status, "content": [part]}
        text, logprobs = part["text"], _bare(self.logprobs)
        return [
            self.stream.event("response.output_text.done", **self.place, text=text, logprobs=logprobs),
            self.stream.event("response.content_part.done", **self.place, part={**part}),
        ]

    def _part(self) -> dict[str, Any]:
        text = "".join(self.text)
        annotations = [{**annotation} for annotation in self.annotations]
        return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": list(self.logprobs)}

    def cite(self, citation: Citation) -> Event:
        """Part of its text stands for lines of a source."""
        annotation = {
            "type": "url_citation",
            "start_index": citation.start,
            "end_index": citation.end,
            "url": _with_lines(citation),
            "title": citation.title,
        }
        self.annotations.append(annotation)
        place = {**self.place, "annotation_index": len(self.annotations) - 1}
        return self.stream.event("response.output_text.annotation.added", **place, annotation={**annotation})


class Reasoning(OutputItem):
    prefix = "rs"

    def __init__(self, stream: "ResponseStream", channel: str | None) -> None:
        super().__init__(stream)
        self.place |= {"content_index": 0}
        self.wire = {"type": "reasoning", "id": "", "summary": [], "content": [], "status": "in_progress"}

    def opening(self) -> list[Event]:
        part = {"type": "reasoning_text", "text": ""}
        return [self.stream.event("response.content_part.added", **self.place, part=part)]

    def delta(self, text: str, scored: Sequence[ScoredToken]) -> Event:
        self.text.append(text)
        return self.stream.event("response.reasoning_text.delta", **self.place, delta=text)

    def finish(self, status: str) -> list[Event]:
        text = "".join(self.text)
        part = {"type": "reasoning_text", "text": text}
        self.wire |= {"status": status, "content": [part], **self.stream.sealed(text)}
        return [
            self.stream.event("response.reasoning_text.done", **self.place, text=text),
            self.stream.event("response.content_part.done", **self.place, part={**part}),
        ]


class Call(OutputItem):
    def __init__(self, stream: "ResponseStream", called: ToolName) -> None:
        self._is_json = called.kind == "function"
        super().__init__(stream)
        self.prefix = "fc" if self._is_json else "ctc"
        self._name = called.name
        self._field = "arguments" if self._is_json else "input"
        self._kind = "response.function_call_arguments" if self._is_json else "response.custom_tool_call_input"
        self._is_whole = False
        self.wire = {
            "type": "function_call" if self._is_json else "custom_tool_call",
            "id": "",
            "call_id": stream.new_id("call"),
            "name": called.name,
            **({} if called.namespace is None else {"namespace": called.namespace}),
            self._field: "",
            "status": "in_progress",
        }

    def delta(self, text: str, scored: Sequence[ScoredToken]) -> Event:
        self.text.append(text)
        return self.stream.event(f"{self._kind}.delta", **self.place, delta=text)

    def complete(self, arguments: str, *, is_whole: bool) -> None:
        self.text = [arguments]
        self._is_whole = is_whole

    def finish(self, status: str) -> list[Event]:
        said = "".join(self.text)
        self.wire |= {self._field: said, "status": status if self._is_whole else "incomplete"}
        name = {"name": self._name} if self._is_json else {}
        return [self.stream.event(f"{self._kind}.done", **self.place, **name, **{self._field: said})]


def _bare(logprobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they stand in events: without bytes."""
    return [
        {
            "token": token["token"],
            "logprob": token["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in token["top_logprobs"]],
        }
        for token in logprobs
    ]


def _with_lines(citation: Citation) -> str:
    """The address, with the lines where it is a file's: those of a page of the web are ours alone."""
    if not citation.url.startswith("file:"):
        return citation.url
    last = "" if citation.last_line == citation.first_line else f"-L{citation.last_line}"
    return f"{citation.url}#L{citation.first_line}{last}"
