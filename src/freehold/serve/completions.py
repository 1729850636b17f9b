"""`/v1/completions`: text that goes on, and what the model thinks of a text (`echo` with `logprobs`).

The prompt is raw: no chat format, nothing added. A prompt given as text holds no control tokens, whatever it says;
who wants them gives token ids. Several prompts run together.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from freehold.errors import FreeholdError
from freehold.formats.events import TextDelta
from freehold.formats.tokenizer import Detokenizer, Tokenizer
from freehold.sampling import MOST_LOGPROBS
from freehold.serve.bodies import StrictRoute
from freehold.serve.caller import Caller, caller_of
from freehold.serve.errors import ApiError
from freehold.serve.generation import FINGERPRINT, GenerationFields, blame, fault, usage
from freehold.serve.logprobs import LEAST
from freehold.serve.server import Reading, Server, whole
from freehold.serve.sse import DONE, EventStream, dumps
from freehold.serve.wire import Hint, Refused
from freehold.session.completion import TextAsk
from freehold.session.generation import Generation, GenerationEvent, Said, SampleDone, ScoredToken
from freehold.session.served import Served

_MOST_PROMPTS = 2048
_DEFAULT_MAX_TOKENS = 16


def _prompts(value: Any) -> Any:
    """One prompt or several, as a list of them."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_ids(value)):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("a prompt is text, a list of token ids, or a list of either; it is not empty")
    for index, prompt in enumerate(value):
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_ids(prompt))):
            raise ValueError(f"prompt {index} is neither text nor a list of token ids")
    return value


def _is_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


_Element = TypeVar("_Element")
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[int], Field(min_length=1)]
_Several = Annotated[list[_Element], Field(min_length=1, max_length=_MOST_PROMPTS)]


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Annotated[list[Any], Field(max_length=_MOST_PROMPTS)],
        BeforeValidator(_prompts, json_schema_input_type=_Text | _Ids | _Several[_Text] | _Several[_Ids]),
    ] = Field(description="Text, token ids, or a list of either. Control tokens' names in text stay text; give ids")
    max_tokens: int | None = Field(None, ge=0, description="16 where it is not given; 0 only with echo")
    echo: bool | None = Field(None, description="The prompt comes before its continuation, also in logprobs")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="So many of the likeliest in each place")
    stop_token_ids: list[int] | None = Field(None, description="vLLM's; these end the text as well")
    best_of: int | None = Field(None, description="Only the same as n: nothing is thrown away")
    suffix: Annotated[
        Any, Refused("gpt-oss writes what comes after a prompt, not before a suffix", unless=(None, ""))
    ] = None
    metadata: Annotated[Any, Refused("nothing is kept", unless=(None, {}))] = None
    response_format: Annotated[Any, Refused("use structured_outputs", unless=(None, {"type": "text"}))] = None
    prompt_cache_key: Annotated[str | None, Hint("prefixes are found by what they say, within one key")] = None
    prompt_embeds: Annotated[Any, Refused("give text or token ids")] = None


def router(server: Server) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, prefix="/v1/completions", tags=["Completions"])

    @routes.post("", response_model=None)
    async def create(request: Request, body: CompletionRequest) -> Response:
        """How a text goes on, as a whole or as a stream of chunks."""
        caller = caller_of(request)
        served = await server.named(body.model, caller)
        includes_usage = body.includes_usage
        reply = await _begin(server, caller, served, body)
        if body.stream:
            return EventStream(_stream(reply, includes_usage=includes_usage), fault=fault)
        return JSONResponse(await whole(request, _answer(reply)))

    return routes


async def _begin(server: Server, caller: Caller, served: Served, body: CompletionRequest) -> "_Reply":
    server.check_room(len(body.prompt) * body.num_samples, param="prompt" if len(body.prompt) > 1 else "n")
    turns = [await _prepared(server, caller, served, body, ask) for ask in _asks(server, body)]
    readings: list[Reading[GenerationEvent]] = []
    async with AsyncExitStack() as begun:  # all of them or none
        for turn in turns:
            readings.append(_read(server, caller, body, turn))
            begun.push_async_callback(readings[-1].aclose)
        begun.pop_all()
    return _Reply(server, body, turns, readings)


def _asks(server: Server, body: CompletionRequest) -> list[TextAsk]:
    if body.best_of not in (None, body.num_samples):
        message = (
            f"best_of is {body.best_of} and n {body.num_samples}: all that is made is returned; make them the same"
        )
        raise ApiError(400, message, param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens is 0, so there is nothing to return; set echo, or ask for more", param="max_tokens"
        )
    vocab_size = server.served.prompting.vocab_size
    if beyond := [token for token in body.stop_token_ids or () if not 0 <= token < vocab_size]:
        message = f"{beyond[0]} is no token id of this model, which has 0 to {vocab_size - 1}"
        raise ApiError(400, message, param="stop_token_ids")
    form = body.form()
    if form is not None and body.ignore_eos:
        raise ApiError(400, f"with ignore_eos a text has no end, so {form.param} cannot be kept to", param="ignore_eos")
    scores_prompt = body.echo and (body.logprobs is not None or body.max_tokens == 0)
    return [
        TextAsk(
            prompt=prompt,
            sampling=body.sampling(logprobs=body.logprobs, vocab_size=vocab_size),
            n=body.num_samples,
            max_tokens=_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            min_tokens=body.min_tokens or 0,
            ignore_eos=bool(body.ignore_eos),
            stop=tuple(body.stop or ()),
            stop_ids=frozenset(body.stop_token_ids or ()),
            form=None if form is None else form.form,
            prompt_logprobs=(body.logprobs or 0) if scores_prompt else None,
        )
        for prompt in body.prompt
    ]


async def _prepared(
    server: Server, caller: Caller, served: Served, body: CompletionRequest, ask: TextAsk
) -> Generation:
    try:
        return await server.text(caller, served, ask)
    except FreeholdError as error:
        raise _why_not(error, body) from error


def _read(server: Server, caller: Caller, body: CompletionRequest, turn: Generation) -> Reading[GenerationEvent]:
    try:
        return server.read(caller, turn)
    except FreeholdError as error:
        raise _why_not(error, body) from error


def _why_not(error: FreeholdError, body: CompletionRequest) -> ApiError:
    return blame(error, fields=type(body).model_fields, form=body.form(), prompt="prompt")


class _Reply:
    """The answers on their way, one prompt's after the other's: choice `prompt * n + sample`."""

    def __init__(
        self,
        server: Server,
        body: CompletionRequest,
        turns: Sequence[Generation],
        readings: list[Reading[GenerationEvent]],
    ):
        tokenizer = server.served.prompting.the_tokenizer()
        self.body = body
        self.turns = turns
        self.readings = readings
        self.ends: list[SampleDone] = []
        self.choices = [_Choice(body, turn, tokenizer) for turn in turns for _ in range(body.num_samples)]
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": FINGERPRINT,
        }

    async def events(self) -> AsyncGenerator[list[tuple[int, GenerationEvent]], None]:
        """The events of all prompts as they come, with the number of their choice."""
        n = self.body.num_samples
        async for place, batch in _merged(self.readings):
            for event in batch:
                if isinstance(event, SampleDone):
                    self.ends.append(event)
            yield [(place * n + event.index, event) for event in batch]

    def usage(self) -> dict[str, Any]:
        return usage(
            sum(turn.num_prompt_tokens for turn in self.turns),
            self.ends,
            num_cached_tokens=sum(turn.num_cached_tokens for turn in self.turns),
        )


async def _merged(
    readings: Sequence[Reading[GenerationEvent]],
) -> AsyncGenerator[tuple[int, Sequence[GenerationEvent]], None]:
    """What several readings give, whichever has something; all of them end with this."""
    if len(readings) == 1:
        try:
            async for batch in readings[0]:
                yield 0, batch
        finally:
            await readings[0].aclose()
        return
    waiting = {asyncio.ensure_future(anext(reading, None)): place for place, reading in enumerate(readings)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                if (events := task.result()) is not None:
                    waiting[asyncio.ensure_future(anext(readings[place], None))] = place
                    yield place, events
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for reading in readings:
            with suppress(Exception):  # the others are to be closed as well
                await reading.aclose()


class _Choice:
    """One text and the places of its tokens, as they come."""

    def __init__(self, body: CompletionRequest, turn: Generation, tokenizer: Tokenizer) -> None:
        self.finish: str | None = None
        self._turn = turn
        self._tokenizer = tokenizer
        self._scores = body.logprobs is not None
        self._echoes = bool(body.echo)
        self._places = Detokenizer(tokenizer)
        self._offset = 0

    def take(self, event: GenerationEvent) -> tuple[str, dict[str, list[Any]]]:
        """What an event adds to text and logprobs."""
        text, scored = "", [] if not self._echoes else self._prompt()
        if self._echoes:
            self._echoes = False
            text = self._tokenizer.decode(self._turn.prompt)
        match event:
            case Said(event=TextDelta(text=more), scored=tokens):
                text += more
                scored += tokens
            case SampleDone(end=end):
                self.finish = "length" if end == "length" else "stop"
        return text, self._logprobs(scored)

    def _prompt(self) -> list[ScoredToken | tuple[int, None]]:
        logprobs = self._turn.prompt_logprobs
        if not self._scores or logprobs is None:
            return []
        pairs = zip(self._turn.prompt, logprobs, strict=True)
        return [(token, None) if scored is None else ScoredToken(token, scored) for token, scored in pairs]

    def _logprobs(self, scored: Sequence[ScoredToken | tuple[int, None]]) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprobs in scored:
            name = self._name(token)
            result["tokens"].append(name)
            result["text_offset"].append(self._offset)
            self._offset += len(self._places.feed(token))
            if logprobs is None:  # the first token, which nothing comes before
                result["token_logprobs"].append(None)
                result["top_logprobs"].append(None)
                continue
            result["token_logprobs"].append(max(logprobs.logprob, LEAST))
            top = {self._name(other): max(logprob, LEAST) for other, logprob in logprobs.top}
            top.setdefault(name, max(logprobs.logprob, LEAST))
            result["top_logprobs"].append(top)
        return result

    def _name(self, token: int) -> str:
        """A token as text; one that is part of a character as OpenAI writes it, `bytes:\\xe2\\x80`."""
        if self._tokenizer.control_name(token) is None and self._tokenizer.token_text(token) is None:
            part = self._tokenizer.decode_bytes((token,))
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)
        return self._tokenizer.decode((token,), control="show")


async def _answer(reply: _Reply) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in reply.choices]
    logprobs: list[dict[str, list[Any]]] = [{} for _ in reply.choices]
    events = reply.events()
    try:
        async for batch in events:
            for number, event in batch:
                text, scored = reply.choices[number].take(event)
                texts[number].append(text)
                for key, values in scored.items():
                    logprobs[number].setdefault(key, []).extend(values)
    finally:
        await events.aclose()
    return {
        **reply.head,
        "choices": [
            {
                "index": number,
                "text": "".join(texts[number]),
                "logprobs": None if reply.body.logprobs is None else logprobs[number],
                "finish_reason": choice.finish,
            }
            for number, choice in enumerate(reply.choices)
        ],
        "usage": reply.usage(),
    }


async def _stream(reply: _Reply, *, includes_usage: bool) -> AsyncGenerator[bytes, None]:
    head = dumps(reply.head)[:-1]
    tail = ',"usage":null}\n\n' if includes_usage else "}\n\n"
    events = reply.events()
    try:
        async for batch in events:
            chunks = []
            for number, event in batch:
                choice = reply.choices[number]
                text, scored = choice.take(event)
                said = {
                    "index": number,
                    "text": text,
                    "logprobs": None if reply.body.logprobs is None else scored,
                    "finish_reason": choice.finish,
                }
                chunks.append(f'data: {head},"choices":[{dumps(said)}]{tail}')
            yield "".join(chunks).encode(errors="replace")
    finally:
        await events.aclose()
    last = f'data: {head},"choices":[],"usage":{dumps(reply.usage())}}}\n\n'.encode() if includes_usage else b""
    yield last + DONE
