"""Items of the Responses API: read from requests, held against one another, and made into messages.

An item is kept as the dict that goes on the wire. What a message of it is depends on the item alone, so that a later
prompt begins like the one that the item was said in. Ids of calls live here only: messages know the tools' names.

Calls of hosted tools are one item each, with what came of them. Harmony shows the model a browser's and Python's until
it has answered, but the wire has no place for what a page said: such items have a field more, `PRIVATE`, which is
stored with them and taken off by `on_wire`. Clients that keep their items themselves send them without; what is missing
is then asked of `recall`, which knows it as long as the call's container is there. After that the model is told that it
is gone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from freehold.errors import UsageError
from freehold.formats.conversation import Channel, Message, Text, text_message
from freehold.formats.harmony.offer import BUILTIN_CHANNEL, FUNCTION_CHANNEL
from freehold.formats.harmony.typescript import compact_json
from freehold.serve.errors import ApiError
from freehold.serve.responses.wire import (
    CodeInterpreterCallItem,
    CustomCallItem,
    FindAction,
    FunctionCallItem,
    McpCallItem,
    McpListToolsItem,
    MessageItem,
    OpenAction,
    OutputItem,
    ReasoningItem,
    ReferenceItem,
    RefusalPart,
    SearchAction,
    TextPart,
    WebSearchCallItem,
)
from freehold.serve.wire import read
from freehold.tools.mcp_config import function_name

Item = dict[str, Any]
NewId = Callable[[str], str]
"""Makes an id that begins with this."""

Open = Callable[[str], str]
"""Opens encrypted content; see seal.py."""

Recall = Callable[[str], Mapping[str, Any] | None]
"""What the call with an item's id said, as it stands under `PRIVATE`; None where nobody knows."""

PRIVATE = "_call"
"""Of a stored item: `recipient`, `content_type` and `text` of the call as the model wrote it, `result` as the model
read it, `container`, and the `sources` of a search. Never on the wire."""

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
    "web_search_call": "ws",
    "code_interpreter_call": "ci",
    "mcp_call": "mcp",
    "mcp_list_tools": "mcpl",
}
_CALLS = {"function_call": "function_call_output", "custom_tool_call": "custom_tool_call_output"}
_JSON = "<|constrain|>json"
_OVER = ("completed", "failed")
_GONE = "[What this call said is no longer kept here. Make it again if it matters.]"
_TEXT_ONLY = "gpt-oss reads text only"
_PARTS_REFUSED = ("input_image", "input_file", "input_audio", "image_url", "computer_screenshot")


def on_wire(item: Item, include: Sequence[str] = ()) -> Item:
    """As clients see it, with more of it where that is to be included."""
    if PRIVATE not in item:
        return item
    shown = {key: value for key, value in item.items() if key != PRIVATE}
    said = item[PRIVATE]
    if item["type"] == "code_interpreter_call" and "code_interpreter_call.outputs" in include:
        shown["outputs"] = [{"type": "logs", "logs": said["result"]}]
    if item["type"] == "web_search_call" and "web_search_call.action.sources" in include:
        action = shown["action"]
        if action["type"] == "search":
            sources = [{"type": "url", "url": url} for url in said["sources"]]
            shown["action"] = {**action, "sources": sources}
    return shown


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
    recall: Recall,
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
    return [_read(item, new_id, open_, recall, stored, f"{param}[{at}]") for at, item in enumerate(given)]


def _kind(item: Item) -> Any:
    if item.get("type") is not None:
        return item["type"]
    return "message" if "role" in item else "item_reference"


def _read(raw: Item, new_id: NewId, open_: Open, recall: Recall, stored: Mapping[str, Item], param: str) -> Item:
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
        case "web_search_call":
            return _web_search(read(WebSearchCallItem, raw, param), new_id, recall)
        case "code_interpreter_call":
            return _code_interpreter(read(CodeInterpreterCallItem, raw, param), new_id, recall)
        case "mcp_call":
            return _mcp_call(read(McpCallItem, raw, param), new_id)
        case "mcp_list_tools":
            listed = read(McpListToolsItem, raw, param)
            item = {"type": listed.type, "id": listed.id or new_id("mcpl"), "server_label": listed.server_label}
            return {**item, "tools": [tool.model_dump() for tool in listed.tools], "error": listed.error}
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


def _web_search(call: WebSearchCallItem, new_id: NewId, recall: Recall) -> Item:
    item = {
        "type": "web_search_call",
        "id": call.id or new_id("ws"),
        "action": call.action.model_dump(exclude_none=True),
        "status": call.status or "completed",
    }
    if call.id is not None and (said := recall(call.id)) is not None and "sources" in said:  # of a search's own id
        return {**item, PRIVATE: said}
    match call.action:
        case SearchAction(query=query, queries=queries):
            name, arguments = "search", {"query": query or ", ".join(queries or ())}
        case OpenAction(url=url):
            name, arguments = "open", {"id": url or ""}
        case FindAction(pattern=pattern):
            name, arguments = "find", {"pattern": pattern}
    text = compact_json(arguments)
    return {**item, PRIVATE: _said(f"browser.{name}", _JSON, text, _GONE, sources=[])}


def _code_interpreter(call: CodeInterpreterCallItem, new_id: NewId, recall: Recall) -> Item:
    outputs = call.outputs
    item = {
        "type": "code_interpreter_call",
        "id": call.id or new_id("ci"),
        "code": call.code or "",
        "container_id": call.container_id,
        "outputs": None if outputs is None else [output.model_dump() for output in outputs],
        "status": call.status or "completed",
    }
    said = None if call.id is None else recall(call.id)
    if said is not None and said["recipient"] != "python":
        said = None
    if outputs is not None:
        result = "".join(output.logs for output in outputs)
    else:
        result = _GONE if said is None else said["result"]
    content_type = "code" if said is None else said["content_type"]
    return {**item, PRIVATE: _said("python", content_type, call.code or "", result, container=call.container_id)}


def _said(recipient: str, content_type: str | None, text: str, result: str, **more: Any) -> dict[str, Any]:
    return {"recipient": recipient, "content_type": content_type, "text": text, "result": result, **more}


def _mcp_call(call: McpCallItem, new_id: NewId) -> Item:
    return {
        "type": "mcp_call",
        "id": call.id or new_id("mcp"),
        "server_label": call.server_label,
        "name": call.name,
        "arguments": call.arguments,
        "output": call.output,
        "error": None if call.error is None else mcp_error(_error_text(call.error)),
        "approval_request_id": None,
        "status": call.status or "completed",
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
            case "web_search_call" | "code_interpreter_call":
                messages += _to_builtin_call(item)
            case "mcp_call":
                messages += _to_mcp_call(item)
            case "mcp_list_tools":
                pass  # the prompt describes what there is now
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
    return _call_message(
        name, item["arguments"] if is_json else item["input"], FUNCTION_CHANNEL, _JSON if is_json else None
    )


def _to_builtin_call(item: Item) -> list[Message]:
    said = item.get(PRIVATE)
    if said is None or item["status"] not in _OVER:
        return []
    name = said["recipient"]
    call = _call_message(name, said["text"], BUILTIN_CHANNEL, said["content_type"])
    return [call, _to_result(name, said["result"], BUILTIN_CHANNEL)]


def _to_mcp_call(item: Item) -> list[Message]:
    if item["status"] not in _OVER:
        return []
    name = f"functions.{function_name(item['server_label'], item['name'])}"
    text = item["output"] or ""
    if item["error"] is not None:
        text = _error_text(item["error"])
    return [_call_message(name, item["arguments"], FUNCTION_CHANNEL, _JSON), _to_result(name, text)]


def _call_message(name: str, text: str, channel: Channel, content_type: str | None) -> Message:
    return Message(
        role="assistant", parts=(Text(text=text),), channel=channel, recipient=name, content_type=content_type
    )


def mcp_error(text: str) -> dict[str, Any]:
    """What went wrong in a call of an MCP server's tool, as the wire has it; `text` is what the model was told."""
    return {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": text}]}


def _error_text(error: Any) -> str:
    """What the model was told."""
    if isinstance(error, str):
        return error
    if isinstance(content := error.get("content"), list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    message = error.get("message")
    return message if isinstance(message, str) else "Error"


def _to_result(name: str, text: str, channel: Channel = FUNCTION_CHANNEL) -> Message:
    return Message(role="tool", parts=(Text(text=text),), channel=channel, recipient="assistant", name=name)


def _joined(parts: Sequence[Item]) -> str:
    return "".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts)
