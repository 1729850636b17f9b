"""`/v1/chat/completions`: OpenAI's chat, with the reasoning of gpt-oss in `reasoning_content` and in `reasoning`.

A stream and a whole answer are made of the same pieces, so that joining the first gives the second. Preambles, which
the model writes before it calls a tool, are content; where a response format is asked for, content is the answer alone
and they go with the reasoning. What is several messages to the model is joined by an empty line.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from json.encoder import encode_basestring as quoted
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from freehold.errors import FreeholdError
from freehold.formats.conversation import Channel
from freehold.formats.events import ArgumentsDelta, CallStart, MessageStart, ReasoningDelta, TextDelta
from freehold.formats.harmony.offer import FUNCTIONS
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import Caller, caller_of
from freehold.serve.chat_wire import Asked, ChatRequest, understand, why_not
from freehold.serve.errors import warning_headers
from freehold.serve.generation import FINGERPRINT, fault, usage
from freehold.serve.logprobs import token_logprobs
from freehold.serve.server import Reading, Server, whole
from freehold.serve.sse import DONE, EventStream, dumps
from freehold.session.generation import Generation, GenerationEvent, SampleDone, ScoredToken
from freehold.session.served import Served

_BETWEEN_MESSAGES = "\n\n"


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/chat/completions", tags=["Chat Completions"])

    @routes.post("", response_model=None)
    async def create(request: Request, body: ChatRequest) -> Response:
        """An answer to a conversation, as a whole or as a stream of chunks."""
        caller = caller_of(request)
        served = await server.named(body.model, caller)
        includes_usage = body.includes_usage
        reply = await _begin(server, caller, served, body)
        if body.stream:
            chunks = _stream(reply, includes_usage=includes_usage)
            return EventStream(chunks, fault=fault, headers=reply.headers)
        return JSONResponse(await whole(request, _answer(reply)), headers=reply.headers)

    return routes


class _Reply:
    """One answer on its way: its events, and what every chunk of it says."""

    def __init__(
        self, server: Server, body: ChatRequest, asked: Asked, turn: Generation, reading: Reading[GenerationEvent]
    ):
        self.body = body
        self.reading = reading
        self.turn = turn
        self.tokenizer = server.served.prompting.the_tokenizer()
        self.samples = [
            _Sample(asked, shows_reasoning=body.include_reasoning is not False) for _ in range(body.num_samples)
        ]
        self.ends: list[SampleDone] = []
        self.headers = warning_headers(asked.warnings)
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            "service_tier": "default",
            "system_fingerprint": FINGERPRINT,
        }

    def usage(self) -> dict[str, Any]:
        return usage(self.turn.num_prompt_tokens, self.ends, num_cached_tokens=self.turn.num_cached_tokens)

    def logprobs(self, scored: tuple[ScoredToken, ...]) -> list[dict[str, Any]]:
        return token_logprobs(self.tokenizer, scored)


async def _begin(server: Server, caller: Caller, served: Served, body: ChatRequest) -> _Reply:
    server.check_room(body.num_samples, param="n")
    asked = await asyncio.to_thread(understand, body, served)
    try:
        turn = await server.turn(caller, served, asked.ask)
        reading = server.read(caller, turn)
    except FreeholdError as error:
        raise why_not(error, body, asked) from error
    return _Reply(server, body, asked, turn, reading)


# --- from the turn's events to pieces of an answer ----------------------------------------------------------


class _Content(NamedTuple):
    text: str
    scored: tuple[ScoredToken, ...] = ()


class _Reasoning(NamedTuple):
    text: str


class _CallBegins(NamedTuple):
    number: int
    id: str
    name: str
    kind: Literal["function", "custom"]


class _CallGoesOn(NamedTuple):
    number: int
    kind: Literal["function", "custom"]
    text: str


class _Ends(NamedTuple):
    finish: Literal["stop", "length", "tool_calls"]


_Piece = _Content | _Reasoning | _CallBegins | _CallGoesOn | _Ends


class _Sample:
    """What of a sample's events an answer shows. Its last piece is the end; one without text and calls says ""."""

    def __init__(self, asked: Asked, *, shows_reasoning: bool) -> None:
        self._custom = asked.custom
        self._answer_alone = asked.form is not None
        self._shows_reasoning = shows_reasoning
        self._channel: Channel | str | None = None
        self._num_calls = 0
        self._kind: Literal["function", "custom"] = "function"
        self._said: set[type] = set()
        self._between = ""  # what comes before the next text of this message, if there is any

    def take(self, event: GenerationEvent) -> Iterator[_Piece]:
        if isinstance(event, SampleDone):
            if not self._num_calls and _Content not in self._said:
                yield _Content("")
            yield _Ends("tool_calls" if event.end == "calls" else "length" if event.end == "length" else "stop")
            return
        match event.event:
            case TextDelta(text=text):
                if self._answer_alone and self._channel == "commentary":
                    yield from self._think(text)
                else:
                    yield _Content(self._joined(_Content, text), event.scored)
            case ReasoningDelta(text=text):
                yield from self._think(text)
            case MessageStart(channel=channel):
                self._channel = channel
                self._between = _BETWEEN_MESSAGES
            case CallStart(recipient=recipient):
                name = recipient.removeprefix(f"{FUNCTIONS}.")
                self._kind = "custom" if name in self._custom else "function"
                self._num_calls += 1
                yield _CallBegins(self._num_calls - 1, f"call_{secrets.token_hex(12)}", name, self._kind)
            case ArgumentsDelta(text=text):
                yield _CallGoesOn(self._num_calls - 1, self._kind, text)

    def _think(self, text: str) -> Iterator[_Piece]:
        if self._shows_reasoning:
            yield _Reasoning(self._joined(_Reasoning, text))

    def _joined(self, kind: type, text: str) -> str:
        between, self._between = self._between if kind in self._said else "", ""
        self._said.add(kind)
        return between + text


# --- a whole answer -----------------------------------------------------------------------------------------


async def _answer(reply: _Reply) -> dict[str, Any]:
    whole = [_Whole() for _ in reply.samples]
    try:
        async for batch in reply.reading:
            for event in batch:
                for piece in reply.samples[event.index].take(event):
                    whole[event.index].add(piece)
                if isinstance(event, SampleDone):
                    reply.ends.append(event)
    finally:
        await reply.reading.aclose()
    return {
        **reply.head,
        "choices": [
            {
                "index": index,
                "message": sample.message(),
                "logprobs": (
                    {"content": reply.logprobs(tuple(sample.scored)), "refusal": None} if reply.body.logprobs else None
                ),
                "finish_reason": sample.finish,
            }
            for index, sample in enumerate(whole)
        ],
        "usage": reply.usage(),
        **({} if reply.body.metadata is None else {"metadata": reply.body.metadata}),
    }


class _Whole:
    """One choice, put together."""

    def __init__(self) -> None:
        self.scored: list[ScoredToken] = []
        self.finish = "stop"
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[_CallBegins, list[str]]] = []

    def add(self, piece: _Piece) -> None:
        match piece:
            case _Content(text, scored):
                self._content.append(text)
                self.scored += scored
            case _Reasoning(text):
                self._reasoning.append(text)
            case _CallBegins():
                self._calls.append((piece, []))
            case _CallGoesOn(number, _, text):
                self._calls[number][1].append(text)
            case _Ends(finish):
                self.finish = finish

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self._content) if self._content else None,
            "refusal": None,
            "annotations": [],
        }
        if self._reasoning:
            message["reasoning_content"] = message["reasoning"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [_call(begin, "".join(pieces)) for begin, pieces in self._calls]
        return message


def _call(begin: _CallBegins, text: str) -> dict[str, Any]:
    said = {"name": begin.name, "input" if begin.kind == "custom" else "arguments": text}
    return {"id": begin.id, "type": begin.kind, begin.kind: said}


# --- a stream -----------------------------------------------------------------------------------------------


async def _stream(reply: _Reply, *, includes_usage: bool) -> AsyncGenerator[bytes, None]:
    """The chunks of each step as one piece of bytes. Written by hand: there is one for each token."""
    head = dumps(reply.head)[:-1]
    tail = ',"usage":null}\n\n' if includes_usage else "}\n\n"
    writers = [
        _Writer(reply, f'data: {head},"choices":[{{"index":{index},"delta":', tail)
        for index in range(len(reply.samples))
    ]
    try:
        async for batch in reply.reading:
            chunks: list[str] = []
            for event in batch:
                write = writers[event.index].write
                chunks += [write(piece) for piece in reply.samples[event.index].take(event)]
                if isinstance(event, SampleDone):
                    reply.ends.append(event)
            if chunks:
                yield "".join(chunks).encode(errors="replace")
    finally:
        await reply.reading.aclose()
    last = f'data: {head},"choices":[],"usage":{dumps(reply.usage())}}}\n\n'.encode() if includes_usage else b""
    yield last + DONE


class _Writer:
    """Pieces of one sample to chunks; the first of them has the role."""

    def __init__(self, reply: _Reply, head: str, tail: str) -> None:
        self._reply = reply
        self._head = head
        self._tail = f',"logprobs":null,"finish_reason":null}}]{tail}'
        self._bare_tail = tail
        self._role = '"role":"assistant",'

    def write(self, piece: _Piece) -> str:
        role, self._role = self._role, ""
        match piece:
            case _Content(text, scored):
                delta = f'{{{role}"content":{quoted(text)}}}'
                if self._reply.body.logprobs:
                    logprobs = dumps({"content": self._reply.logprobs(scored), "refusal": None})
                    return f'{self._head}{delta},"logprobs":{logprobs},"finish_reason":null}}]{self._bare_tail}'
            case _Reasoning(text):
                text = quoted(text)
                delta = f'{{{role}"reasoning_content":{text},"reasoning":{text}}}'
            case _CallBegins(number):
                delta = f'{{{role}"tool_calls":[{dumps({"index": number, **_call(piece, "")})}]}}'
            case _CallGoesOn(number, kind, text):
                field = "input" if kind == "custom" else "arguments"
                delta = f'{{{role}"tool_calls":[{{"index":{number},"{kind}":{{"{field}":{quoted(text)}}}}}]}}'
            case _Ends(finish):
                return f'{self._head}{{}},"logprobs":null,"finish_reason":"{finish}"}}]{self._bare_tail}'
        return f"{self._head}{delta}{self._tail}"
