"""`/v1/messages`: Anthropic's Messages, and how many tokens one would have.

Stateless: the client sends everything each time. For a while the server remembers, in memory, how the model wrote its
calls, since a client sends their arguments back as an object: with the same spelling the prompt begins as the last one
ended, and nothing of it is computed again. Whether a call came from here is never asked.

Signatures of thinking tell whether its text is still the one that was given; they keep no secret and prove no origin,
as there is none to prove: who may send messages may send reasoning too.
"""

import asyncio
import base64
import hashlib
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request

from freehold.errors import UsageError
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Effort,
    Message,
    ResponseFormat,
    Text,
    Tool,
    is_name,
    text_message,
)
from freehold.formats.events import ArgumentsDelta, CallStart, Event, MessageDone, ReasoningDelta, TextDelta
from freehold.formats.forms import JsonSchema
from freehold.formats.harmony.grammar import NamedTool
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import Caller, caller_of
from freehold.serve.effort import thinking
from freehold.serve.errors import ApiError, api_error, warning_headers
from freehold.serve.messages_wire import (
    CountTokens,
    CreateMessage,
    CustomTool,
    HostedTool,
    JsonFormat,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from freehold.serve.server import Reading, Server, whole
from freehold.serve.sse import EventStream, dumps, encode
from freehold.session.generation import Ask, Generation, GenerationEvent, SampleDone
from freehold.session.served import Served

_VERSIONS = ("2023-06-01", "2026-10-21")
_PING = encode({"type": "ping"}, "ping")
_FUNCTIONS = "functions."
_MOST_CALLS = 4096
_MOST_CALL_CHARACTERS = 16 << 20


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/messages", tags=["Messages"])
    spellings = _Spellings()

    @routes.post("")
    async def create_message(body: CreateMessage, request: Request) -> Response:
        """The assistant's next message, whole or as a stream of events."""
        _check_version(request)
        caller = caller_of(request)
        served = await server.named(body.model, caller)
        asked = _read(served, body, caller, spellings)
        turn = await server.turn(caller, served, _ask(body, asked))
        reply = _Reply(body, asked, turn, caller, spellings)
        reading = server.read(caller, turn)
        if body.stream:
            return EventStream(
                _stream(reading, reply),
                fault=lambda error: encode(error.anthropic(), "error"),
                headers=asked.headers,
                keep_alive=_PING,
            )
        return JSONResponse(await whole(request, _answer(reading, reply)), headers=asked.headers)

    @routes.post("/count_tokens")
    async def count_tokens(body: CountTokens, request: Request) -> Response:
        """How many tokens the prompt has, tools and Harmony's own words included."""
        _check_version(request)
        caller = caller_of(request)
        served = await server.named(body.model, caller)
        asked = _read(served, body, caller, spellings)
        number = await asyncio.to_thread(_count, served, asked)
        return JSONResponse({"input_tokens": number}, headers=asked.headers)

    return routes


def _check_version(request: Request) -> None:
    """The versions differ in what they let a client send, and here all of it may be sent."""
    version = request.headers.get("anthropic-version", _VERSIONS[0])
    if version not in _VERSIONS:
        raise ApiError(400, f"anthropic-version {version!r:.40} is not known here; send {' or '.join(_VERSIONS)}")


# --- what is asked ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A body in the session's terms."""

    conversation: Conversation
    effort: Effort | None
    choices: TurnChoices
    thinking: Literal["shown", "omitted", "hidden"]
    warnings: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return warning_headers(self.warnings)


def _read(served: Served, body: CountTokens, caller: Caller, spellings: "_Spellings") -> _Asked:
    tools = [tool for tool in body.tools if isinstance(tool, CustomTool)]
    hosted = [tool.type for tool in body.tools if isinstance(tool, HostedTool)]
    warnings = [f"tool {_in_a_header(kind)} is not switched on here and was left out" for kind in hosted]
    form = _form(body)
    developer = DeveloperContent(
        tools=tuple(_tool(tool, at) for at, tool in enumerate(body.tools) if isinstance(tool, CustomTool)),
        response_formats=(
            (ResponseFormat(name="answer", schema=form.schema_),)
            if form is not None and served.speaks_harmony  # others are only held to it
            else ()
        ),
    )
    messages: list[Message] = []
    if body.system:
        messages.append(text_message("system", _joined(body.system, "\n\n")))
    if developer.tools or developer.response_formats:
        messages.append(Message(role="developer", parts=(developer,)))
    messages += _History(caller, spellings, warnings).read(body.messages)
    asked_effort = body.output_config.effort if body.output_config is not None else None
    effort = thinking(served, asked_effort, param="output_config.effort")
    warnings += effort.warnings
    return _Asked(
        conversation=Conversation(messages=tuple(messages)),
        effort=effort.effort,
        choices=_choices(served, body, form, tools),
        thinking=_display(body, has_tools=bool(tools)),
        warnings=warnings,
    )


def _form(body: CountTokens) -> JsonFormat | None:
    newer = body.output_config.format if body.output_config is not None else None
    if newer is not None and body.output_format is not None:
        raise ApiError(400, "output_config.format says it already", param="output_format")
    return newer or body.output_format


def _tool(tool: CustomTool, at: int) -> Tool:
    shown = "".join(f"\nExample input: {dumps(example)}" for example in tool.input_examples)
    description = f"{tool.description or ''}{shown}".removeprefix("\n")
    try:
        return Tool(name=tool.name, description=description, parameters=tool.input_schema, strict=bool(tool.strict))
    except UsageError as error:
        raise api_error(error, param=f"tools[{at}]") from None


def _choices(served: Served, body: CountTokens, form: JsonFormat | None, tools: Sequence[CustomTool]) -> TurnChoices:
    choices = TurnChoices()
    if form is not None:
        choices["response_format"] = JsonSchema(form.schema_)
    match body.tool_choice:
        case None:
            pass
        case choice if (choice.type == "tool") != (choice.name is not None):
            message = "goes with the type 'tool', and with no other"
            raise ApiError(400, message, param="tool_choice.name")
        case choice:
            if choice.type == "none" and tools:
                choices["tool_choice"] = "none"
            elif choice.type == "any":
                choices["tool_choice"] = "required"
            elif choice.name is not None:
                if choice.name not in (tool.name for tool in tools):
                    raise ApiError(400, f"{choice.name!r:.80} is not among the tools", param="tool_choice.name")
                choices["tool_choice"] = NamedTool(f"{_FUNCTIONS}{choice.name}")
            if choice.disable_parallel_tool_use is False:
                choices["parallel_tool_calls"] = True
    match body.thinking:
        case None:
            pass
        case asked if (asked.type == "enabled") != (asked.budget_tokens is not None):
            message = "goes with the type 'enabled', and with no other"
            raise ApiError(400, message, param="thinking.budget_tokens")
        case asked if asked.type == "disabled":
            if served.speaks_harmony:  # others do not think anyway
                choices["max_reasoning_tokens"] = 0
        case asked if asked.budget_tokens is not None:
            choices["max_reasoning_tokens"] = asked.budget_tokens
    return choices


def _display(body: CountTokens, *, has_tools: bool) -> Literal["shown", "omitted", "hidden"]:
    if body.thinking is None:
        return "shown" if has_tools else "hidden"  # who did not ask for it looks for text in the first block
    return "omitted" if body.thinking.display == "omitted" else "shown"


def _ask(body: CreateMessage, asked: _Asked) -> Ask:
    return Ask(
        conversation=asked.conversation,
        effort=asked.effort,
        choices=asked.choices,
        sampling={"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k},
        max_tokens=body.max_tokens,
        stop=tuple(body.stop_sequences),
    )


def _in_a_header(text: str) -> str:
    return re.sub(r"[^\w.\-]", "?", text[:80], flags=re.ASCII)


def _count(served: Served, asked: _Asked) -> int:
    served.prompting.check_length(asked.conversation)
    chat_format = served.prompting.chat_format(asked.effort, harmony=served.harmony)
    return len(chat_format.render(asked.conversation).ids)


class _History:
    """Reads messages in order: a result names only the id of the call that it answers."""

    def __init__(self, caller: Caller, spellings: "_Spellings", warnings: list[str]) -> None:
        self._caller = caller
        self._spellings = spellings
        self._warnings = warnings
        self._open: dict[str, Message] = {}  # calls that wait for their results

    def read(self, messages: Sequence[Any]) -> Iterator[Message]:
        """What the model said and was told. Messages of one role in a row are one."""
        role = ""
        for role, group in groupby(enumerate(messages), key=lambda numbered: numbered[1].role):
            blocks = [
                (f"messages[{i}].content[{j}]", block)
                for i, message in group
                for j, block in enumerate(message.content)
            ]
            match role:
                case "assistant":
                    yield from self._assistant(blocks)
                case "user":
                    yield from self._user(blocks)
                case _:
                    yield text_message("system", _joined((block for _, block in blocks), "\n\n"))
        if role == "assistant":
            message = "the last message is the assistant's, and answers cannot be continued here; end with a user's"
            raise ApiError(400, message, param="messages")

    def _user(self, blocks: Sequence[tuple[str, Any]]) -> Iterator[Message]:
        texts: list[TextBlock] = []
        for place, block in blocks:
            if isinstance(block, TextBlock):
                texts.append(block)
            elif texts:
                raise ApiError(400, "a tool_result comes before any text", param=place)
            else:
                yield self._result(place, block)
        self._check_answered()
        if texts or not blocks:
            yield text_message("user", _joined(texts, "\n"))

    def _check_answered(self) -> None:
        if self._open:
            missing = ", ".join(self._open)
            message = f"the next user message has no tool_result for {missing:.200}; give one for every tool_use"
            raise ApiError(400, message, param="messages")

    def _result(self, place: str, block: ToolResultBlock) -> Message:
        call = self._open.pop(block.tool_use_id, None)
        if call is None:
            message = f"{block.tool_use_id!r:.80} is the id of no tool_use in the message before, or was answered"
            raise ApiError(400, message, param=f"{place}.tool_use_id")
        text = _joined(block.content, "\n")
        return Message(
            role="tool",
            parts=(Text(text=f"Error: {text}" if block.is_error else text),),
            channel="commentary",
            recipient="assistant",
            name=call.recipient,
        )

    def _assistant(self, blocks: Sequence[tuple[str, Any]]) -> Iterator[Message]:
        self._check_answered()
        acts = [i for i, (_, block) in enumerate(blocks) if not isinstance(block, TextBlock)]
        last_act = acts[-1] if acts else -1
        at = 0
        for is_text, group in groupby(blocks, key=lambda placed: isinstance(placed[1], TextBlock)):
            run = list(group)
            if is_text:
                parts = tuple(Text(text=block.text) for _, block in run)
                yield Message(role="assistant", parts=parts, channel="commentary" if at < last_act else "final")
            else:
                for place, block in run:
                    yield from self._act(place, block)
            at += len(run)

    def _act(self, place: str, block: ThinkingBlock | RedactedThinkingBlock | ToolUseBlock) -> Iterator[Message]:
        match block:
            case ToolUseBlock():
                yield self._call(place, block)
            case ThinkingBlock():
                if text := self._thought(place, block):
                    yield text_message("assistant", text, channel="analysis")
            case RedactedThinkingBlock():
                self._warnings.append(f"{place}: redacted thinking of another server was left out")

    def _thought(self, place: str, block: ThinkingBlock) -> str:
        try:
            text = _signed_text(block.thinking, block.signature)
        except ValueError as error:
            raise ApiError(400, str(error), param=f"{place}.signature") from None
        if text is None:
            self._warnings.append(f"{place}: omitted thinking of another server was left out")
        return text or ""

    def _call(self, place: str, block: ToolUseBlock) -> Message:
        if block.id in self._open:
            raise ApiError(400, f"{block.id!r:.80} is the id of another tool_use as well", param=f"{place}.id")
        if not is_name(block.name):
            raise ApiError(400, f"{block.name!r:.80} is no tool's name", param=f"{place}.name")
        call = self._spellings.find(self._caller, block)
        if call is None:
            call = Message(
                role="assistant",
                parts=(Text(text=dumps(block.input)),),
                channel="commentary",
                recipient=f"{_FUNCTIONS}{block.name}",
                content_type="<|constrain|>json",
            )
        self._open[block.id] = call
        return call


def _joined(blocks: Iterable[TextBlock], separator: str) -> str:
    return separator.join(block.text for block in blocks)


# --- what the model wrote -----------------------------------------------------------------------------------


class _Spellings:
    """The latest calls as the model wrote them, by who saw them and their ids; the oldest are forgotten."""

    def __init__(self) -> None:
        self._calls: OrderedDict[tuple[str, str], Message] = OrderedDict()
        self._characters = 0

    def keep(self, caller: Caller, id_: str, call: Message) -> None:
        self._calls[caller.owner, id_] = call
        self._characters += len(call.text)
        while len(self._calls) > _MOST_CALLS or self._characters > _MOST_CALL_CHARACTERS:
            self._characters -= len(self._calls.popitem(last=False)[1].text)

    def find(self, caller: Caller, block: ToolUseBlock) -> Message | None:
        """How this call was written, if it was and says the same."""
        call = self._calls.get((caller.owner, block.id))
        if call is None or call.recipient != f"{_FUNCTIONS}{block.name}":
            return None
        return call if _canonical(json.loads(call.text)) == _canonical(block.input) else None


def _canonical(value: Any) -> str:
    """The same text for the same value: Python's own comparison takes true for 1."""
    return json.dumps(value, sort_keys=True)


_GIVEN = "freehold.given."
_HELD = "freehold.held."


def _signature(text: str, *, holds_text: bool) -> str:
    if holds_text:
        return _HELD + base64.urlsafe_b64encode(text.encode(errors="replace")).decode()
    return _GIVEN + hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


def _signed_text(text: str, signature: str) -> str | None:
    """The text of a thinking block, None where only another server knows it. Raises ValueError where the text is not
    the one that was signed."""
    if signature.startswith(_HELD) and not text:
        try:
            return base64.b64decode(signature.removeprefix(_HELD), altchars=b"-_", validate=True).decode()
        except ValueError:
            raise ValueError("this is not a signature that this server gave; send thinking back as it came") from None
    if signature.startswith((_GIVEN, _HELD)):
        if signature not in (_signature(text, holds_text=False), _signature(text, holds_text=True)):
            raise ValueError("the thinking is not what it was when it was given; send it back as it came")
        return text
    return text or None


def _new_id(kind: Literal["msg", "toolu"]) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


class _Reply:
    """One message of the assistant on its way out, as a stream of events or whole."""

    def __init__(
        self, body: CreateMessage, asked: _Asked, turn: Generation, caller: Caller, spellings: _Spellings
    ) -> None:
        self.turn = turn
        self.caller = caller
        self._body = body
        self._thinking = asked.thinking
        self._spellings = spellings
        self._id = _new_id("msg")
        self._num_blocks = 0  # that were begun
        self._open: Literal["", "text", "thinking", "tool_use"] = ""
        self._call_id = ""
        self._calls: list[tuple[str, Message]] = []
        self._delta_head = self._delta_tail = b""

    # whole

    def message(self, done: SampleDone) -> dict[str, Any]:
        """All of it. Raises a 500 for a call that is none, which a grammar does not let happen."""
        content = [block for said in done.messages if (block := self._block(said, done)) is not None]
        return self._message(content, self._usage(done)) | self._ending(done)

    def _block(self, said: Message, done: SampleDone) -> dict[str, Any] | None:
        text = said.text
        if said.role != "assistant":
            return None
        if said.recipient is not None:
            arguments = _arguments(said, done)
            if arguments is None:
                return None
            id_ = _new_id("toolu")
            self._spellings.keep(self.caller, id_, said)
            return _tool_use(id_, said.recipient, arguments)
        if not text:
            return None
        if said.channel == "analysis":
            match self._thinking:
                case "shown":
                    return {"type": "thinking", "thinking": text, "signature": _signature(text, holds_text=False)}
                case "omitted":
                    return {"type": "thinking", "thinking": "", "signature": _signature(text, holds_text=True)}
            return None
        return {"type": "text", "text": text, "citations": None}

    # as a stream

    def start(self) -> bytes:
        """Once the prompt has been read: only then is it known how much of it was cached."""
        cached = self.turn.num_cached_tokens
        usage = _usage(self.turn.num_prompt_tokens - cached, cached, 0, 0)
        message = self._message([], usage) | {"stop_reason": None, "stop_sequence": None}
        return _event("message_start", message=message) + _PING

    def event(self, event: Event) -> bytes:
        """What an event adds to the stream, often nothing."""
        match event:
            case TextDelta(text=text):
                return self._delta("text", text)
            case ReasoningDelta(text=text):
                return self._delta("thinking", text) if self._thinking == "shown" else b""
            case ArgumentsDelta(text=text):
                return self._delta("tool_use", text)
            case CallStart(recipient=recipient):
                self._call_id = _new_id("toolu")
                return self._begin("tool_use", _tool_use(self._call_id, recipient, {}))
            case MessageDone(message=message):
                return self._end_of(message)
        return b""

    def end(self, done: SampleDone) -> bytes:
        for id_, call in self._calls:
            if _arguments(call, done) is not None:
                self._spellings.keep(self.caller, id_, call)
        ending = self._ending(done)
        reasons = {key: ending[key] for key in ("container", "stop_details", "stop_reason", "stop_sequence")}
        usage = {key: value for key, value in self._usage(done).items() if key in _USAGE_OF_DELTA}
        more = {key: ending[key] for key in ("context_management",) if key in ending}
        return _event("message_delta", delta=reasons, usage=usage, **more) + _event("message_stop")

    def _delta(self, kind: Literal["text", "thinking", "tool_use"], text: str) -> bytes:
        begin = b""
        if self._open != kind:
            empty = {"type": kind, kind: ""} | ({"citations": None} if kind == "text" else {"signature": ""})
            begin = self._begin(kind, empty)
        return b"".join((begin, self._delta_head, dumps(text).encode(errors="replace"), b"}}\n\n"))

    def _begin(self, kind: Literal["text", "thinking", "tool_use"], block: dict[str, Any]) -> bytes:
        index = self._num_blocks
        self._num_blocks += 1
        self._open = kind
        delta, key = {
            "text": ("text_delta", "text"),
            "thinking": ("thinking_delta", "thinking"),
            "tool_use": ("input_json_delta", "partial_json"),
        }[kind]
        self._delta_head = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},'
            f'"delta":{{"type":"{delta}","{key}":'
        ).encode()
        return _event("content_block_start", index=index, content_block=block)

    def _end_of(self, message: Message) -> bytes:
        """Close the message's block, if it has one."""
        result = b""
        if message.channel == "analysis" and message.recipient is None and message.text:
            if self._thinking == "omitted":
                result = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            if self._open == "thinking":
                signature = _signature(message.text, holds_text=self._thinking == "omitted")
                delta = {"type": "signature_delta", "signature": signature}
                result += _event("content_block_delta", index=self._num_blocks - 1, delta=delta)
        elif self._open == "tool_use" and message.recipient is not None:
            self._calls.append((self._call_id, message))
        if self._open:
            result += _event("content_block_stop", index=self._num_blocks - 1)
            self._open = ""
        return result

    # both

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": content,
            "container": None,
            "diagnostics": None,
            "stop_details": None,
            "usage": usage,
        }

    def _ending(self, done: SampleDone) -> dict[str, Any]:
        ending: dict[str, Any] = {
            "container": None,
            "stop_details": None,
            "stop_reason": self._stop_reason(done),
            "stop_sequence": done.stop_string,
        }
        if self._body.context_management is not None:
            ending["context_management"] = {"applied_edits": []}
        return ending

    def _stop_reason(self, done: SampleDone) -> str:
        match done.end:
            case "calls":
                return "tool_use"
            case "length":
                fits = self.turn.max_tokens == self._body.max_tokens
                return "max_tokens" if fits else "model_context_window_exceeded"
        return "end_turn" if done.stop_string is None else "stop_sequence"

    def _usage(self, done: SampleDone) -> dict[str, Any]:
        cached = done.num_cached_tokens
        return _usage(self.turn.num_prompt_tokens - cached, cached, done.num_tokens, done.num_reasoning_tokens)


def _arguments(said: Message, done: SampleDone) -> dict[str, Any] | None:
    """Of a call; None where the turn's end broke it off."""
    try:
        arguments = json.loads(said.text)
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    if done.end == "length":
        return None
    raise ApiError(500, "the model wrote a call whose arguments are no JSON object; send the request again")


def _tool_use(id_: str, recipient: str, arguments: dict[str, Any]) -> dict[str, Any]:
    name = recipient.removeprefix(_FUNCTIONS)
    return {
        "type": "tool_use", "id": id_, "name": name, "input": arguments,
        "caller": {"type": "direct"}, "toolset_name": None,
    }  # fmt: skip


_USAGE_OF_DELTA = frozenset(
    (
        "input_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
        "output_tokens",
        "output_tokens_details",
        "server_tool_use",
    )
)


def _usage(uncached: int, cached: int, written: int, thinking: int) -> dict[str, Any]:
    return {
        "input_tokens": uncached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"thinking_tokens": thinking},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
        "speed": "standard",
    }


def _event(kind: str, **data: Any) -> bytes:
    return encode({"type": kind, **data}, kind)


async def _answer(reading: Reading[GenerationEvent], reply: _Reply) -> dict[str, Any]:
    try:
        async for batch in reading:
            for event in batch:
                if isinstance(event, SampleDone):
                    return reply.message(event)
    finally:
        await reading.aclose()
    raise AssertionError("a turn ends with its sample")


async def _stream(reading: Reading[GenerationEvent], reply: _Reply) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async for batch in reading:
            pieces = [] if begun else [reply.start()]
            begun = True
            pieces += [reply.end(said) if isinstance(said, SampleDone) else reply.event(said.event) for said in batch]
            if chunk := b"".join(pieces):
                yield chunk
    finally:
        await reading.aclose()
