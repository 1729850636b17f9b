"""From the events of a turn to a Response object, and to the events of the Responses API that tell of its making.

`feed` takes what the turn says, one event after the other, and returns what a client is told; `response` is the object
as far as it is. The last event is asked for by `ended`, since the response has to be stored before anybody is told that
it is complete. Knows neither HTTP nor the store.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from freehold.formats.events import (
    ArgumentsDelta,
    CallDone,
    CallStart,
    MessageDone,
    MessageStart,
    ReasoningDelta,
    TextDelta,
)
from freehold.formats.tokenizer import Tokenizer
from freehold.serve.errors import ApiError
from freehold.serve.logprobs import token_logprobs
from freehold.serve.responses.items import NewId
from freehold.serve.responses.tools import ToolName
from freehold.session.generation import GenerationEvent, Said, SampleDone, ScoredToken

Event = dict[str, Any]
_PAD_TO = 32
_FUNCTIONS = "functions."
_ENDINGS = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",  # the API has no event for it
    "failed": "response.failed",
}


class ResponseStream:
    """`response` is the object without output, complete but for what the turn decides. `seal` makes the encrypted
    content of reasoning, where that was asked for; with a `tokenizer` text comes with its logprobs."""

    def __init__(
        self,
        response: Mapping[str, Any],
        *,
        new_id: NewId,
        names: Mapping[str, ToolName],
        num_prompt_tokens: int,
        seal: Callable[[str], str] | None = None,
        tokenizer: Tokenizer | None = None,
        obfuscate: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.response: dict[str, Any] = {**response, "output": []}
        self.new_id = new_id
        self._names = names
        self._num_prompt_tokens = num_prompt_tokens
        self._seal = seal
        self._tokenizer = tokenizer
        self._obfuscate = obfuscate
        self._clock = clock
        self._number = 0
        self._end: int | None = None
        self._parting: list[Event] = []  # of what was cut short
        self._item: _Item | None = None
        self._closing: _Item | None = None  # its message is over; how, the next event tells

    @property
    def is_ended(self) -> bool:
        return self.response["status"] in _ENDINGS

    # --- beginning and end --------------------------------------------------------------------------------------

    def created(self) -> list[Event]:
        """The first event, and that it waits where it does."""
        events = [self.event("response.created", response=self._snapshot())]
        if self.response["status"] == "queued":
            events.append(self.event("response.queued", response=self._snapshot()))
        return events

    def started(self) -> list[Event]:
        self.response["status"] = "in_progress"
        return [self.event("response.in_progress", response=self._snapshot())]

    def ended(self) -> list[Event]:
        """The last events: how it ended. Asked again, after it could not be stored, they replace those before."""
        if self._end is None:
            self._end = self._number
        self._number = self._end
        events = [*self._parting]
        if (error := self.response["error"]) is not None:
            events.append(self.event("error", code=error["code"], message=error["message"], param=None))
        return [*events, self.event(_ENDINGS[self.response["status"]], response=self._snapshot())]

    def fail(self, error: ApiError) -> None:
        """It ends here, by a fault."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._cut_short("failed", {"code": code, "message": error.message})

    def cancel(self) -> None:
        """It ends here, because somebody said so."""
        self._cut_short("cancelled", None)

    def _cut_short(self, status: str, error: dict[str, str] | None) -> None:
        if self.response["status"] == "failed" and status == "failed":
            return
        for item in (self._closing, self._item):
            self._closing = item
            self._parting += self._close("incomplete")
        self._item = None
        self.response |= {"status": status, "error": error, "completed_at": None, "incomplete_details": None}

    # --- while it is made ---------------------------------------------------------------------------------------

    def feed(self, event: GenerationEvent) -> list[Event]:
        """What an event of the turn comes to."""
        if isinstance(event, SampleDone):
            return self._finish(event)
        return self._said(event)

    def _said(self, said: Said) -> list[Event]:
        match said.event:
            case TextDelta(text=text) | ReasoningDelta(text=text) | ArgumentsDelta(text=text):
                return [] if self._item is None else [self._delta(self._item, text, said.scored)]
            case MessageStart(role="assistant", recipient=None, channel=channel):
                return [*self._close("completed"), *self._open(_Reasoning if channel == "analysis" else _Message, said)]
            case MessageStart():
                return self._close("completed")
            case CallStart(recipient=recipient):
                return self._open_call(recipient)
            case CallDone(arguments=arguments, problem=problem):
                if isinstance(self._item, _Call):
                    self._item.complete(arguments, is_whole=problem is None)
            case MessageDone(stop_id=stop_id):
                self._closing, self._item = self._item, None
                return [] if stop_id is None else self._close("completed")
        return []

    def _open(self, kind: "type[_Message] | type[_Reasoning]", said: Said) -> list[Event]:
        assert isinstance(said.event, MessageStart)
        return self._begin(kind(self, said.event.channel))

    def _open_call(self, recipient: str) -> list[Event]:
        name = recipient.removeprefix(_FUNCTIONS)
        known = self._names.get(name, ToolName("function", name, None, ""))
        return [*self._close("completed"), *self._begin(_Call(self, known))]

    def _begin(self, item: "_Item") -> list[Event]:
        self._item = item
        self.response["output"].append(item.wire)
        return [
            self.event("response.output_item.added", output_index=item.index, item=_copy(item.wire)),
            *item.opening(),
        ]

    def _close(self, status: str) -> list[Event]:
        item, self._closing = self._closing, None
        if item is None:
            return []
        closing = item.finish(status)
        return [
            *closing,
            self.event("response.output_item.done", output_index=item.index, item=_copy(item.wire)),
        ]

    def _delta(self, item: "_Item", text: str, scored: Sequence[ScoredToken]) -> Event:
        event = item.delta(text, scored)
        if self._obfuscate:
            size = len(text.encode("utf-8", "replace"))
            event["obfuscation"] = self.new_id("")[: -size % _PAD_TO]
        return event

    def _finish(self, done: SampleDone) -> list[Event]:
        is_cut = done.end == "length"
        if self._item is not None:
            self._closing, self._item = self._item, None
        events = self._close("incomplete" if is_cut else "completed")
        self.response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": None if is_cut else int(self._clock()),
            "usage": {
                "input_tokens": self._num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": done.num_cached_tokens, "cache_write_tokens": 0},
                "output_tokens": done.num_tokens,
                "output_tokens_details": {"reasoning_tokens": done.num_reasoning_tokens},
                "total_tokens": self._num_prompt_tokens + done.num_tokens,
            },
        }
        return events

    # --- for items ----------------------------------------------------------------------------------------------

    def new_item(self, kind: str) -> tuple[int, str]:
        """Place and id of an item that begins."""
        return len(self.response["output"]), self.new_id(kind)

    def sealed(self, text: str) -> dict[str, str]:
        return {} if self._seal is None else {"encrypted_content": self._seal(text)}

    def logprobs(self, scored: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        """As they stand in a text part, where `bytes` is never null."""
        if self._tokenizer is None:
            return []
        entries = token_logprobs(self._tokenizer, scored)
        for entry in entries:
            for token in (entry, *entry["top_logprobs"]):
                token["bytes"] = token["bytes"] or []
        return entries

    def event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, **fields, "sequence_number": self._number - 1}

    def _snapshot(self) -> dict[str, Any]:
        return {**self.response, "output": [_copy(item) for item in self.response["output"]]}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    content = item.get("content")
    return {**item} if content is None else {**item, "content": [{**part} for part in content]}


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


# --- items while they are made ----------------------------------------------------------------------------------


class _Item:
    """One output item. `wire` is what it is on the wire, `index` its place in the output."""

    wire: dict[str, Any]

    def __init__(self, stream: ResponseStream, kind: str) -> None:
        self.stream = stream
        self.index, self.id = stream.new_item(kind)
        self.place = {"item_id": self.id, "output_index": self.index}
        self.text: list[str] = []

    def opening(self) -> list[Event]:
        return []

    def delta(self, text: str, scored: Sequence[ScoredToken]) -> Event:
        raise NotImplementedError

    def finish(self, status: str) -> list[Event]:
        """Fill in `wire`; returns the events before `response.output_item.done`."""
        raise NotImplementedError


class _Message(_Item):
    def __init__(self, stream: ResponseStream, channel: str | None) -> None:
        super().__init__(stream, "msg")
        self.place |= {"content_index": 0}
        self.logprobs: list[dict[str, Any]] = []
        self.wire = {
            "type": "message",
            "id": self.id,
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
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.logprobs)}


class _Reasoning(_Item):
    def __init__(self, stream: ResponseStream, channel: str | None) -> None:
        super().__init__(stream, "rs")
        self.place |= {"content_index": 0}
        self.wire = {"type": "reasoning", "id": self.id, "summary": [], "content": [], "status": "in_progress"}

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


class _Call(_Item):
    def __init__(self, stream: ResponseStream, called: ToolName) -> None:
        self._is_json = called.kind == "function"
        super().__init__(stream, "fc" if self._is_json else "ctc")
        self._name = called.name
        self._field = "arguments" if self._is_json else "input"
        self._kind = "response.function_call_arguments" if self._is_json else "response.custom_tool_call_input"
        self._is_whole = False
        self.wire = {
            "type": "function_call" if self._is_json else "custom_tool_call",
            "id": self.id,
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
