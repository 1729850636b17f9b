"""Items of the Responses API: read from requests, held against one another, and made into messages.

An item is kept as the dict that goes on the wire. What a message of it is depends on the item alone, so that a later
prompt begins like the one that the item was said in. Ids of calls live here only: messages know the tools' names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from freehold.errors import UsageError
from freehold.formats.conversation import Channel, Message, Text, text_message
from freehold.serve.errors import ApiError
from freehold.serve.responses.wire import (
    CustomCallItem,
    FunctionCallItem,
    MessageItem,
    OutputItem,
    ReasoningItem,
    ReferenceItem,
    RefusalPart,
    TextPart,
)
from freehold.serve.wire import read

Item = dict[str, Any]
NewId = Callable[[str], str]
"""Makes an id that begins with this."""

Open = Callable[[str], str]
"""Opens encrypted content; see seal.py."""

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}
_CALLS = {"function_call": "function_call_output", "custom_tool_call": "custom_tool_call_output"}
_TEXT_ONLY = "gpt-oss reads text only"
_PARTS_REFUSED = ("input_image", "input_file", "input_audio", "image_url", "computer_screenshot")


def flat_name(namespace: str | None, name: str) -> str:
    """What the model calls a tool: one name, with that of its namespace in front."""
    return f"{namespace.rstrip('_')}__{name}" if namespace else name


# --- reading ----------------------------------------------------------------------------------------------------


def references(given: str | Sequence[Item] | None) -> dict[str, str]:
    """The ids of all items that are only referred to, each with the field that it stands in."""
    if given is None or isinstance(given, str):
        return {}
    return {
        read(ReferenceItem, item, f"input[{at}]").id: f"input[{at}].id"
        for at, item in enumerate(given)
        if _kind(item) == "item_reference"
    }


def read_items(
    given: str | Sequence[Item] | None,
    *,
    new_id: NewId,
    open_: Open,
    stored: Mapping[str, Item],
    param: str = "input",
) -> list[Item]:
    """Input as whole items: with ids, statuses and parts. `stored` are those that it may refer to.

    Raises ApiError, with the field, for whatever is not understood.
    """
    if given is None:
        return []
    if isinstance(given, str):
        return [_message(MessageItem(role="user", content=given), new_id, param)]
    return [_read(item, new_id, open_, stored, f"{param}[{at}]") for at, item in enumerate(given)]


def _kind(item: Item) -> Any:
    if item.get("type") is not None:
        return item["type"]
    return "message" if "role" in item else "item_reference"


def _read(raw: Item, new_id: NewId, open_: Open, stored: Mapping[str, Item], param: str) -> Item:
    match _kind(raw):
        case "message":
            return _message(read(MessageItem, raw, param), new_id, param)
        case "function_call":
            call = read(FunctionCallItem, raw, param)
            return {**_call(call, new_id), "arguments": call.arguments}
        case "custom_tool_call":
            custom = read(CustomCallItem, raw, param)
            return {**_call(custom, new_id), "input": custom.input}
        case "function_call_output" | "custom_tool_call_output":
            output = read(OutputItem, raw, param)
            item = {"type": output.type, "id": output.id or new_id(_PREFIXES[output.type])}
            parts = _parts(output.output, f"{param}.output")
            return {
                **item,
                "call_id": output.call_id,
                "output": output.output if isinstance(output.output, str) else parts,
                "status": output.status or "completed",
            }
        case "reasoning":
            return _reasoning(read(ReasoningItem, raw, param), new_id, open_, param)
        case "item_reference":
            return stored[read(ReferenceItem, raw, param).id]
    known = ", ".join((*_PREFIXES, "item_reference"))
    raise ApiError(
        400, f"'{param}.type' {raw['type']!r:.80} is not supported: known are {known}.", param=f"{param}.type"
    )


def _call(call: FunctionCallItem | CustomCallItem, new_id: NewId) -> Item:
    return {
        "type": call.type,
        "id": call.id or new_id(_PREFIXES[call.type]),
        "call_id": call.call_id,
        "name": call.name,
        **({} if call.namespace is None else {"namespace": call.namespace}),
        "status": call.status or "completed",
    }


def _message(message: MessageItem, new_id: NewId, param: str) -> Item:
    is_answer = message.role == "assistant"
    parts = _parts(message.content, f"{param}.content", is_answer=is_answer)
    return {
        "type": "message",
        "id": message.id or new_id("msg"),
        "role": message.role,
        "content": parts,
        "status": message.status or "completed",
        **({"phase": message.phase} if is_answer and message.phase else {}),
    }


def _parts(content: Any, param: str, *, is_answer: bool = False) -> list[Item]:
    if content is None:
        raise ApiError(400, f"Invalid value for '{param}': must be a text or a list of parts.", param=param)
    given = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    return [_part(part, f"{param}[{at}]", is_answer) for at, part in enumerate(given)]


def _part(raw: Item, param: str, is_answer: bool) -> Item:
    match raw.get("type"):
        case "refusal":
            return {"type": "refusal", "refusal": read(RefusalPart, raw, param).refusal}
        case kind if kind in _PARTS_REFUSED:
            raise ApiError(
                400, f"'{param}.type' {kind!r} is not supported: {_TEXT_ONLY}.",
                param=f"{param}.type", code="unsupported_parameter",
            )  # fmt: skip
    part = read(TextPart, raw, param)
    if not is_answer:
        return {"type": "input_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}


def _reasoning(item: ReasoningItem, new_id: NewId, open_: Open, param: str) -> Item:
    content = [{"type": "reasoning_text", "text": part.text} for part in item.content or ()]
    if item.encrypted_content is not None:
        try:
            text = open_(item.encrypted_content)
        except UsageError as error:
            where = f"{param}.encrypted_content"
            raise ApiError(400, str(error), param=where, code="invalid_encrypted_content") from None
        if content and "".join(part["text"] for part in content) != text:
            message = "it says something else than the encrypted content; leave one of them out"
            raise ApiError(400, f"Invalid value for '{param}.content': {message}.", param=f"{param}.content")
        content = [{"type": "reasoning_text", "text": text}]
    return {
        "type": "reasoning",
        "id": item.id or new_id("rs"),
        "summary": [{"type": "summary_text", "text": part.text} for part in item.summary or ()],
        "content": content,
        "status": item.status or "completed",
    }


# --- holding items against one another --------------------------------------------------------------------------


def check_items(history: Sequence[Item], own: Sequence[Item], *, whose: str) -> None:
    """Raise ApiError for ids that are there twice, calls that cannot be told apart, results of unknown calls, and calls
    without a result. `whose` is the field that the history comes from."""
    seen = {item["id"] for item in history}
    calls: dict[str, Item] = {}
    waiting: dict[str, str] = {}
    for at, item in enumerate((*history, *own), start=-len(history)):
        param = f"input[{at}]" if at >= 0 else whose
        if at >= 0 and item["id"] in seen:
            raise ApiError(400, f"The item {item['id']!r} is there already; send it once.", param=f"{param}.id")
        seen.add(item["id"])
        if item["type"] in _CALLS:
            if item["call_id"] in waiting:
                message = f"The call_id {item['call_id']!r} is that of another call, which has no output yet."
                raise ApiError(400, message, param=f"{param}.call_id")
            calls[item["call_id"]] = item
            if item["status"] == "completed":
                waiting[item["call_id"]] = param
        elif item["type"] in _CALLS.values():
            _check_result(item, calls, param)
            waiting.pop(item["call_id"], None)
    for call_id, param in waiting.items():
        raise ApiError(400, f"No tool output found for the call {call_id!r}; send it as an item.", param=param)


def _check_result(item: Item, calls: Mapping[str, Item], param: str) -> None:
    call = calls.get(item["call_id"])
    if call is None or _CALLS[call["type"]] != item["type"]:
        kind = "tool call" if call is None else item["type"].removesuffix("_output").replace("_", " ")
        raise ApiError(
            400, f"No {kind} found for the output with call_id {item['call_id']!r}; send the call before it.",
            param=f"{param}.call_id",
        )  # fmt: skip


def cuts(items: Sequence[Item]) -> list[int]:
    """Where a conversation may begin instead, so that it stays whole: no result loses its call, and the last message
    of the user stays."""
    users = [at for at, item in enumerate(items) if item["type"] == "message" and item["role"] == "user"]
    open_calls: set[str] = set()
    results = {item["call_id"]: at for at, item in enumerate(items) if item["type"] in _CALLS.values()}
    found = []
    for at, item in enumerate(items):
        if item["type"] in _CALLS and item["call_id"] in results:
            open_calls.add(item["call_id"])
        elif item["type"] in _CALLS.values() and results[item["call_id"]] == at:
            open_calls.discard(item["call_id"])
        if not open_calls and at < (users[-1] if users else len(items) - 1):
            found.append(at + 1)
    return found


def without_oldest(items: Sequence[Item], cut: int) -> list[Item]:
    """What is left from `cut` on, and the instructions among what is not."""
    return [item for at, item in enumerate(items) if at >= cut or _instructs(item)]


def _instructs(item: Item) -> bool:
    return item["type"] == "message" and item["role"] in ("system", "developer")


# --- messages ---------------------------------------------------------------------------------------------------


def to_messages(items: Sequence[Item]) -> list[Message]:
    """The items as the model sees them. A call that broke off and has no result is left out."""
    names: dict[str, str] = {}
    answered = {item["call_id"] for item in items if item["type"] in _CALLS.values()}
    messages = []
    for item in items:
        match item["type"]:
            case "message":
                messages.append(_to_message(item))
            case "reasoning":
                parts = item.get("content") or item["summary"]
                messages += [text_message("assistant", _joined(parts), channel="analysis")] if parts else []
            case "function_call" | "custom_tool_call":
                names[item["call_id"]] = name = f"functions.{flat_name(item.get('namespace'), item['name'])}"
                if item["status"] == "completed" or item["call_id"] in answered:
                    messages.append(_to_call(item, name))
            case _:
                output = item["output"]
                text = output if isinstance(output, str) else _joined(output)
                messages.append(_to_result(names[item["call_id"]], text))
    return messages


def _to_message(item: Item) -> Message:
    role: Literal["user", "assistant", "system", "developer"] = item["role"]
    channel: Channel | None = None
    if role == "assistant":
        channel = "commentary" if item.get("phase") == "commentary" else "final"
    return text_message(role, _joined(item["content"]), channel=channel)


def _to_call(item: Item, name: str) -> Message:
    is_json = item["type"] == "function_call"
    return Message(
        role="assistant",
        parts=(Text(text=item["arguments"] if is_json else item["input"]),),
        channel="commentary",
        recipient=name,
        content_type="<|constrain|>json" if is_json else None,
    )


def _to_result(name: str, text: str) -> Message:
    return Message(role="tool", parts=(Text(text=text),), channel="commentary", recipient="assistant", name=name)


def _joined(parts: Sequence[Item]) -> str:
    return "".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts)
