"""The order of a Responses stream as a state machine: feed it every event, and ask it at the end."""

from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent

from tests.serve.sdk import check

_EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}
_LAST = {
    "response.completed": {"completed"},
    "response.incomplete": {"incomplete", "cancelled"},
    "response.failed": {"failed"},
}
_TEXTS = {
    "response.output_text": "text",
    "response.reasoning_text": "text",
    "response.function_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
    "response.code_interpreter_call_code": "code",
    "response.mcp_call_arguments": "arguments",
}
_BY_ITEM = {
    "message": ("response.output_text", True),
    "reasoning": ("response.reasoning_text", True),
    "function_call": ("response.function_call_arguments", False),
    "custom_tool_call": ("response.custom_tool_call_input", False),
}
# What comes between `added` and `done` of a call that the server makes, where it comes to its end; `*` any number.
_HOSTED = {
    "web_search_call": ("web_search_call.in_progress", "web_search_call.searching", "web_search_call.completed"),
    "code_interpreter_call": (
        *("code_interpreter_call.in_progress", "code_interpreter_call_code.delta*", "code_interpreter_call_code.done"),
        *("code_interpreter_call.interpreting", "code_interpreter_call.completed"),
    ),
    "mcp_call": (
        *("mcp_call.in_progress", "mcp_call_arguments.delta*", "mcp_call_arguments.done"),
        "mcp_call.completed",
    ),
    "mcp_list_tools": ("mcp_list_tools.in_progress", "mcp_list_tools.completed"),
}


class EventOrder:
    """Raises AssertionError for an event that cannot come here, or is not of the SDK's type.

    Calls that the server makes may wait for those before them, while the model goes on; everything else comes one after
    the other.
    """

    def __init__(self) -> None:
        self.response: dict[str, Any] | None = None
        self._number = -1
        self._state = "new"
        self._item: dict[str, Any] | None = None
        self._step = ""  # within the item: "added", "part", "text", "part done"
        self._text = ""
        self._at = -1
        self._num_annotations = 0
        self._hosted: dict[int, _HostedCall] = {}  # that are not done, by their places
        self._done: dict[int, dict[str, Any]] = {}
        self._id = ""

    @classmethod
    def of(cls, events: list[dict[str, Any]]) -> dict[str, Any]:
        """The final Response of a whole stream."""
        order = cls()
        for event in events:
            order.feed(event)
        return order.end()

    def feed(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        check(_EVENTS[kind], event)
        assert event["sequence_number"] == self._number + 1, event
        self._number += 1
        assert self.response is None, f"{kind} after the end"
        if kind == "error":
            assert self._state not in ("new", "error")
            self._state = "error"
        elif "response" in event:
            self._whole(kind, event["response"])
        else:
            assert self._state == "in_progress", (kind, self._state)
            self._of_item(kind, event)

    def end(self) -> dict[str, Any]:
        assert self.response is not None, "the stream has no end"
        return self.response

    def _whole(self, kind: str, response: dict[str, Any]) -> None:
        check(Response, response)
        self._id = self._id or response["id"]
        assert response["id"] == self._id
        match kind:
            case "response.created":
                assert self._state == "new" and response["status"] in ("queued", "in_progress")
                assert response["output"] == []
                self._state = "created"
            case "response.queued":
                assert self._state == "created" and response["status"] == "queued"
                self._state = "queued"
            case "response.in_progress":
                assert self._state in ("created", "queued") and response["status"] == "in_progress"
                self._state = "in_progress"
            case _:
                assert response["status"] in _LAST[kind], (kind, response["status"])
                cut = response["status"] in ("failed", "cancelled")
                assert cut or (self._state == "in_progress" and self._item is None and not self._hosted)
                assert cut or response["output"] == [self._done[at] for at in range(len(self._done))]
                assert self._state != "error" or kind == "response.failed"
                self.response = response

    def _of_item(self, kind: str, event: dict[str, Any]) -> None:
        at = event["output_index"]
        if kind == "response.output_item.added":
            assert at == len(self._done) + len(self._hosted) + (self._item is not None)
            item = event["item"]
            assert item.get("status", "in_progress") == "in_progress"
            if item["type"] in _HOSTED:
                self._hosted[at] = _HostedCall(item)
                return
            assert self._item is None
            self._item, self._at, self._step, self._text, self._num_annotations = item, at, "added", "", 0
            return
        if at in self._hosted:
            if kind == "response.output_item.done":
                self._done[at] = self._hosted.pop(at).finish(event["item"])
            else:
                self._hosted[at].feed(kind.removeprefix("response."), event)
            return
        assert self._item is not None, kind
        assert at == self._at
        prefix, has_parts = _BY_ITEM[self._item["type"]]
        if kind == "response.output_item.done":
            assert self._step == ("part done" if has_parts else "text"), self._step
            self._finish(event["item"], has_parts)
            return
        assert event["item_id"] == self._item["id"]
        assert not has_parts or event["content_index"] == 0
        match kind:
            case "response.content_part.added":
                assert has_parts and self._step == "added" and event["part"]["text"] == ""
                self._step = "part"
            case "response.output_text.annotation.added":
                assert self._step == "part" and event["annotation_index"] == self._num_annotations
                assert 0 <= event["annotation"]["start_index"] < event["annotation"]["end_index"] <= len(self._text)
                self._num_annotations += 1
            case "response.content_part.done":
                assert self._step == "text" and event["part"]["text"] == self._text
                self._step = "part done"
            case _ if kind == f"{prefix}.delta":
                assert self._step == ("part" if has_parts else "added") and event["delta"]
                self._text += event["delta"]
                assert prefix != "response.output_text" or "logprobs" in event
            case _ if kind == f"{prefix}.done":
                assert self._step == ("part" if has_parts else "added")
                assert event[_TEXTS[prefix]] == self._text
                assert prefix != "response.function_call_arguments" or event["name"] == self._item["name"]
                self._step = "text"
            case _:
                raise AssertionError(f"{kind} in an item of type {self._item['type']}")

    def _finish(self, item: dict[str, Any], has_parts: bool) -> None:
        assert self._item is not None
        assert item["status"] in ("completed", "incomplete")
        assert {key: item[key] for key in ("id", "type")} == {key: self._item[key] for key in ("id", "type")}
        prefix = _BY_ITEM[item["type"]][0]
        said = item["content"][0]["text"] if has_parts else item[_TEXTS[prefix]]
        assert said == self._text
        if item["type"] == "message":
            assert len(item["content"][0]["annotations"]) == self._num_annotations
        self._done[self._at] = item
        self._item = None


class _HostedCall:
    """One call that the server makes."""

    def __init__(self, item: dict[str, Any]) -> None:
        self._item = item
        self._to_come = [*_HOSTED[item["type"]]]
        self._text = ""

    def feed(self, kind: str, event: dict[str, Any]) -> None:
        assert event["item_id"] == self._item["id"]
        if kind == "mcp_call.failed":
            kind = "mcp_call.completed"
            self._item = {**self._item, "status": "failed"}
        while self._to_come[0].endswith("*") and kind != self._to_come[0][:-1]:
            self._to_come.pop(0)
        if self._to_come[0].endswith("*"):
            assert event["delta"]
            self._text += event["delta"]
            return
        assert kind == self._to_come.pop(0), kind
        if (field := _TEXTS.get(f"response.{kind.removesuffix('.done')}")) is not None:
            assert event[field] == self._text

    def finish(self, item: dict[str, Any]) -> dict[str, Any]:
        assert (item["id"], item["type"]) == (self._item["id"], self._item["type"])
        if self._item.get("status") == "failed":
            assert item["status"] == "failed"
        elif "status" not in item or item["status"] == "completed":
            assert not self._to_come, self._to_come
        else:  # nothing says of a search or a program that it has failed, but the item
            assert item["status"] in ("failed", "incomplete") and self._to_come
        for field in ("code", "arguments"):
            assert item.get(field, self._text) == self._text
        return item
