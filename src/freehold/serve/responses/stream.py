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
from freehold.serve.responses.hosted import Hosting
from freehold.serve.responses.hosted_output import CodeInterpreterCall, HostedCall, McpCall, WebSearchCall
from freehold.serve.responses.items import PRIVATE, Item, NewId
from freehold.serve.responses.output import Call, Event, Message, OutputItem, Reasoning
from freehold.serve.responses.tools import ToolName
from freehold.session.generation import Said, SampleDone, ScoredToken
from freehold.session.turn import Cited, ToolDone, ToolStart, TurnEvent

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
    content of reasoning, where that was asked for; with a `tokenizer` text comes with its logprobs. `hosting` are the
    tools that the turn runs itself, `lists` the items that say first what MCP servers offer, and `include` what is to
    be shown of calls."""

    def __init__(
        self,
        response: Mapping[str, Any],
        *,
        new_id: NewId,
        names: Mapping[str, ToolName],
        hosting: Hosting | None = None,
        lists: Sequence[Item] = (),
        include: Sequence[str] = (),
        seal: Callable[[str], str] | None = None,
        tokenizer: Tokenizer | None = None,
        obfuscate: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.response: dict[str, Any] = {**response, "output": []}
        self.new_id = new_id
        self._names = names
        self.hosting = hosting
        self.include = include
        self._lists = [*lists]
        self._private: dict[str, dict[str, Any]] = {}  # of items, by id
        self._seal = seal
        self._tokenizer = tokenizer
        self._obfuscate = obfuscate
        self._clock = clock
        self._number = 0
        self._end: int | None = None
        self._parting: list[Event] = []  # of what was cut short
        self._item: OutputItem | None = None
        self._closing: OutputItem | None = None  # its message is over; how, the next event tells
        self._waiting: list[HostedCall] = []  # written, and not carried out yet
        self._running: HostedCall | None = None

    @property
    def stored(self) -> dict[str, Any]:
        """The response as the store has it, with what the items of calls do not show."""
        output = [
            {**item, PRIVATE: self._private[item["id"]]} if item["id"] in self._private else item
            for item in self.response["output"]
        ]
        return {**self.response, "output": output}

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
        self._parting += self._give_up()
        self.response |= {"status": status, "error": error, "completed_at": None, "incomplete_details": None}

    # --- while it is made ---------------------------------------------------------------------------------------

    def feed(self, event: TurnEvent) -> list[Event]:
        """What an event of the turn comes to."""
        if not self._lists:
            return self._told(event)
        first = [told for item in self._lists for told in self._list(item)]
        self._lists.clear()
        return [*first, *self._told(event)]

    def _told(self, event: TurnEvent) -> list[Event]:
        match event:
            case Said():  # one a token
                return self._said(event)
            case SampleDone():
                return self._finish(event)
            case ToolStart():
                return [*self._close("completed"), *self._start(event)]
            case ToolDone():
                return self._called(event)
            case Cited(citations=citations):
                answer = self._item
                return [answer.cite(each) for each in citations] if isinstance(answer, Message) else []

    def _said(self, said: Said) -> list[Event]:
        match said.event:
            case TextDelta(text=text) | ReasoningDelta(text=text) | ArgumentsDelta(text=text):
                return [] if self._item is None else self._delta(self._item, text, said.scored)
            case MessageStart(role="assistant", recipient=None, channel=channel):
                return [*self._close("completed"), *self._open(Reasoning if channel == "analysis" else Message, said)]
            case MessageStart():
                return self._close("completed")
            case CallStart(recipient=recipient):
                return self._open_call(recipient)
            case CallDone(arguments=arguments, problem=problem):
                if isinstance(self._item, Call | HostedCall):
                    self._item.complete(arguments, is_whole=problem is None)
            case MessageDone(message=message, stop_id=stop_id):
                self._closing, self._item = self._item, None
                if isinstance(self._closing, HostedCall):
                    call, self._closing = self._closing, None
                    self._waiting.append(call)
                    return call.written(message)
                return [] if stop_id is None else self._close("completed")
        return []

    def _open(self, kind: type[Message] | type[Reasoning], said: Said) -> list[Event]:
        assert isinstance(said.event, MessageStart)
        return self._begin(kind(self, said.event.channel))

    def _open_call(self, recipient: str) -> list[Event]:
        hosted = None if self.hosting is None else self.hosting.names.get(recipient)
        if self.hosting is None or hosted is None:
            name = recipient.removeprefix(_FUNCTIONS)
            known = self._names.get(name, ToolName("function", name, None, ""))
            return [*self._close("completed"), *self._begin(Call(self, known))]
        match hosted.kind:
            case "web_search":
                self._item = WebSearchCall(self, recipient, self.hosting)
                return self._close("completed")  # it is told of when it is known what is searched for
            case "code_interpreter":
                return [*self._close("completed"), *self._begin(CodeInterpreterCall(self, recipient, self.hosting))]
        return [*self._close("completed"), *self._begin(McpCall(self, recipient, self.hosting))]

    # --- hosted tools -------------------------------------------------------------------------------------------

    def _list(self, listed: Item) -> list[Event]:
        index, name = self.new_item("mcpl")
        item = {**listed, "id": name}
        self.response["output"].append(item)
        place = {"item_id": name, "output_index": index}
        return [
            self.event("response.output_item.added", output_index=index, item={**item, "tools": []}),
            self.event("response.mcp_list_tools.in_progress", **place),
            self.event("response.mcp_list_tools.completed", **place),
            self.event("response.output_item.done", output_index=index, item={**item}),
        ]

    def _start(self, start: ToolStart) -> list[Event]:
        """The first of the calls to this recipient that wait; a call of the client's that is answered here, since it
        cannot be made, has an item of its own already."""
        found = next((call for call in self._waiting if call.recipient == start.recipient), None)
        if found is None:
            return []
        self._waiting.remove(found)
        self._running = found
        found.look(start.arguments)
        events = [] if found.is_open else self._begin(found)
        return [*events, *found.start()]

    def _called(self, done: ToolDone) -> list[Event]:
        call, self._running = self._running, None
        if call is None:
            return []
        if (said := call.said(done)) is not None:
            self._private[call.id] = said
            call.hosting.remember(call.id, said)
        return [*call.done(done), self._done(call)]

    def _give_up(self) -> list[Event]:
        """No more calls are carried out."""
        left = [*([] if self._running is None else [self._running]), *self._waiting]
        self._running = None
        self._waiting.clear()
        return [event for call in left if call.is_open for event in (*call.finish("incomplete"), self._done(call))]

    def _begin(self, item: OutputItem) -> list[Event]:
        if item is not self._running:
            self._item = item
        item.place_in(*self.new_item(item.prefix))
        self.response["output"].append(item.wire)
        return [
            self.event("response.output_item.added", output_index=item.index, item=_copy(item.wire)),
            *item.opening(),
        ]

    def _close(self, status: str) -> list[Event]:
        item, self._closing = self._closing, None
        if item is None:
            return []
        return [*item.finish(status), self._done(item)]

    def _done(self, item: OutputItem) -> Event:
        return self.event("response.output_item.done", output_index=item.index, item=_copy(item.wire))

    def _delta(self, item: OutputItem, text: str, scored: Sequence[ScoredToken]) -> list[Event]:
        event = item.delta(text, scored)
        if event is None:
            return []
        if self._obfuscate:
            size = len(text.encode("utf-8", "replace"))
            event["obfuscation"] = self.new_id("")[: -size % _PAD_TO]
        return [event]

    def _finish(self, done: SampleDone) -> list[Event]:
        is_cut = done.end in ("length", "limit")
        if self._item is not None:
            self._closing, self._item = self._item, None
        events = [*self._close("incomplete" if is_cut else "completed"), *self._give_up()]
        reason = "max_output_tokens" if done.end == "length" else None  # for "limit" the API has no word
        self.response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": reason} if is_cut else None,
            "completed_at": None if is_cut else int(self._clock()),
            "usage": {
                "input_tokens": done.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": done.num_cached_tokens, "cache_write_tokens": 0},
                "output_tokens": done.num_tokens,
                "output_tokens_details": {"reasoning_tokens": done.num_reasoning_tokens},
                "total_tokens": done.num_prompt_tokens + done.num_tokens,
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
