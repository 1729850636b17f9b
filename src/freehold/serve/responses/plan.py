"""From a request to a turn that is ready to run, and to the Response object that it begins with.

Everything that can be wrong with a request shows here, before anybody is told that a response was created: unknown ids,
items that do not fit together, tools and schemas that cannot be kept to, prompts that are too long.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from freehold.errors import ContextError, FreeholdError, NotFoundError, SchemaError, UsageError
from freehold.formats.chat import ChatFormat, TurnChoices
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Message,
    ResponseFormat,
    text_message,
)
from freehold.formats.forms import AnswerFormat, JsonObject, JsonSchema
from freehold.formats.harmony.typescript import compact_json
from freehold.sampling import SamplingOptions
from freehold.serve.caller import Caller
from freehold.serve.effort import thinking
from freehold.serve.errors import ApiError, api_error, warning_headers
from freehold.serve.responses.hosted import Hosting
from freehold.serve.responses.items import (
    Item,
    check_items,
    cuts,
    read_items,
    references,
    to_messages,
    without_oldest,
)
from freehold.serve.responses.stream import ResponseStream
from freehold.serve.responses.tools import Toolset, read_tools
from freehold.serve.responses.wire import (
    InputTokens,
    JsonObjectFormat,
    JsonSchemaFormat,
    PlainFormat,
    ResponseCreate,
    TextConfig,
)
from freehold.serve.server import Server
from freehold.session.generation import Ask, Generation
from freehold.session.served import Served
from freehold.session.store.records import ResponseRecord
from freehold.session.turn import Turn, TurnLimits

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
_RESULTS = "web_search_call.results"
_SOURCES = "web_search_call.action.sources"
_JSON_HINT = "Answer with a JSON object."


def new_id(kind: str) -> str:
    """One that nobody guesses; `kind` says what it is of."""
    random = secrets.token_hex(24)
    return f"{kind}_{random}" if kind else random


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a response is made from: items of earlier turns, and its own."""

    history: tuple[Item, ...]
    own: tuple[Item, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A response that is about to be made, with the tools that it runs. `keeps` says whether it will be stored."""

    caller: Caller
    turn: Generation | Turn
    hosting: Hosting | None
    lists: tuple[Item, ...]
    include: tuple[str, ...]
    response: dict[str, Any]
    own: tuple[Item, ...]
    tools: Toolset
    keeps: bool
    logprobs: bool
    encrypted: bool
    obfuscate: bool
    warnings: tuple[str, ...]

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def headers(self) -> dict[str, str]:
        return warning_headers(self.warnings)

    def release(self) -> None:
        """The turn is over, or was never begun."""
        if self.hosting is not None:
            self.hosting.release()

    def stream(self, server: Server) -> ResponseStream:
        """What makes the Response object of the turn's events."""
        owner = self.caller.owner
        return ResponseStream(
            self.response,
            new_id=new_id,
            names=self.tools.by_name,
            hosting=self.hosting,
            lists=self.lists,
            include=self.include,
            seal=(lambda text: server.sealer.seal(owner, text)) if self.encrypted else None,
            tokenizer=server.served.prompting.the_tokenizer() if self.logprobs else None,
            obfuscate=self.obfuscate,
        )

    def record(self, response: dict[str, Any]) -> ResponseRecord:
        """As the store keeps it; `response` with what is not for the wire."""
        conversation = response["conversation"]
        return ResponseRecord(
            id=self.id,
            owner=self.caller.owner,
            created_at=float(response["created_at"]),
            status=response["status"],
            background=response["background"],
            previous_response_id=response["previous_response_id"],
            conversation_id=None if conversation is None else conversation["id"],
            response=response,
            input=self.own,
        )


async def plan(server: Server, caller: Caller, body: ResponseCreate) -> Plan:
    """Raises ApiError for what cannot be."""
    served = await server.named(body.model or server.model_names[0], caller)
    _check_state(server, body)
    tools = read_tools(body.tools, server.hosted(served))
    context = await read_context(server, caller, body)
    hosting = await _hosting(tools, caller, context)
    try:
        asking = _Asking(server, served, body, tools, hosting)
        turn = await asking.turn(caller, context)
    except BaseException:
        if hosting is not None:
            hosting.release()
        raise
    return Plan(
        caller=caller,
        turn=turn,
        hosting=hosting,
        lists=tuple(tools.hosted.lists((*context.history, *context.own))),
        include=tuple(body.include or ()),
        response=_response(server, body, tools, asking),
        own=context.own,
        tools=tools,
        keeps=body.store is not False and server.store is not None,
        logprobs=asking.top_logprobs is not None,
        encrypted=_ENCRYPTED in (body.include or ()),
        obfuscate=bool(body.stream_options and body.stream_options.include_obfuscation),
        warnings=(*tools.warnings, *_taken_otherwise(body), *asking.warnings),
    )


async def _hosting(tools: Toolset, caller: Caller, context: Context) -> Hosting | None:
    """Whoever asks for it releases it."""
    if not tools.hosted:
        return None
    return await Hosting.open(tools.hosted, caller.owner, (*context.history, *context.own))


class Count(NamedTuple):
    """How many tokens an input has, and what was taken otherwise than written."""

    num_tokens: int
    warnings: tuple[str, ...]


async def count_input(server: Server, caller: Caller, body: InputTokens) -> Count:
    """How many tokens the input of such a response has."""
    served = await server.named(body.model or server.model_names[0], caller)
    tools = read_tools(body.tools, server.hosted(served))
    context = await read_context(server, caller, body)
    hosting = await _hosting(tools, caller, context)
    try:
        asking = _Asking(server, served, body, tools, hosting)
        turn = await asking.turn(caller, context)
    finally:
        if hosting is not None:
            hosting.release()
    return Count(turn.num_prompt_tokens, (*tools.warnings, *_taken_otherwise(body), *asking.warnings))


def _taken_otherwise(body: InputTokens) -> list[str]:
    """Of the hints, those that ask for something that is not done."""
    taken = []
    if isinstance(body, ResponseCreate):
        if body.service_tier not in (None, "auto", "default"):
            taken.append(f"service_tier {body.service_tier} was taken as default")
        if _RESULTS in (body.include or ()):
            taken.append(f"include: {_RESULTS} adds nothing; {_SOURCES} says what was found")
        if body.prompt_cache_retention == "24h":
            taken.append("prompt_cache_retention 24h was taken as in_memory")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        taken.append(f"text.verbosity {body.text.verbosity} was taken as medium")
    if body.reasoning is not None and body.reasoning.context == "all_turns":
        taken.append("reasoning.context all_turns was taken as current_turn")
    return taken


def _check_state(server: Server, body: ResponseCreate) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' is for streams; send 'stream': true as well.", param="stream_options")
    if server.store is None:
        for name in ("store", "background"):
            if getattr(body, name):
                raise ApiError(400, f"'{name}' takes a store, and this server has none.", param=name)
    elif body.background and body.store is False:
        message = "A response in the background is stored until it is fetched; leave 'store' out."
        raise ApiError(400, message, param="background")
    if body.store is False and body.conversation is not None:
        message = "A response in a conversation is stored there; leave 'store' out, or send the items as input."
        raise ApiError(400, message, param="store")


# --- what there is already --------------------------------------------------------------------------------------


async def read_context(server: Server, caller: Caller, body: InputTokens) -> Context:
    """The items of a request, with those before it. Raises ApiError for ids that lead to nothing."""
    if body.previous_response_id is not None and body.conversation is not None:
        message = "'previous_response_id' and 'conversation' both say what came before; send one of them."
        raise ApiError(400, message, param="previous_response_id")
    if body.input is None and body.previous_response_id is None and body.conversation is None:
        raise ApiError(400, "Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
    history: list[Item] = []
    if body.conversation is not None or body.previous_response_id is not None:
        history = await server.store_threads.run(_history, server, caller.owner, body)
    stored: dict[str, Item] = {}
    if referred := references(body.input):
        stored = await server.store_threads.run(
            lambda: {name: _found(server, caller.owner, name, param) for name, param in referred.items()}
        )
    own = await asyncio.to_thread(
        lambda: read_items(
            body.input,
            new_id=new_id,
            open_=lambda sealed: server.sealer.open(caller.owner, sealed),
            recall=lambda name: server.recall(caller, name),
            stored=stored,
        )
    )
    check_items(history, own, whose="previous_response_id" if body.conversation is None else "conversation")
    if not (history or own):
        raise ApiError(400, "'input' is empty; send a text or at least one item.", param="input")
    return Context(history=tuple(history), own=tuple(own))


def _history(server: Server, owner: str, body: InputTokens) -> list[Item]:
    if body.conversation is not None:
        return list(_kept(server, "conversation", body.conversation, lambda store: store.conversation_history, owner))
    assert body.previous_response_id is not None
    name = body.previous_response_id
    records: list[ResponseRecord] = _kept(server, "previous_response_id", name, lambda store: store.history, owner)
    if records[-1].status not in ("completed", "incomplete"):
        message = (
            f"The response {name!r:.80} is {records[-1].status.replace('_', ' ')}; there is nothing to go on from."
        )
        raise ApiError(400, message, param="previous_response_id")
    return [item for record in records for item in (*record.input, *record.output)]


def _found(server: Server, owner: str, name: str, param: str) -> Item:
    item: Item = _kept(server, param, name, lambda store: store.item, owner)
    return item


def _kept(server: Server, param: str, name: str, method: Callable[[Any], Callable[[str, str], Any]], owner: str) -> Any:
    try:
        if server.store is None:
            raise NotFoundError(f"there is nothing called {name[:64]!r}: this server has no store")
        return method(server.store)(name, owner)
    except (NotFoundError, UsageError) as error:
        raise api_error(error, param=param) from None


# --- what is asked ----------------------------------------------------------------------------------------------


class _Asking:
    """A request in terms of a turn, with all that had to be decided on the way."""

    def __init__(
        self, server: Server, served: Served, body: InputTokens, tools: Toolset, hosting: Hosting | None
    ) -> None:
        self._server = server
        self._served = served
        self._hosting = hosting
        self._body = body
        self._tools = tools
        self.warnings: list[str] = []
        self._is_harmony = served.speaks_harmony
        self.tool_choice = tools.choice(body.tool_choice)
        self.parallel = bool(body.parallel_tool_calls)
        asked = None if body.reasoning is None else body.reasoning.effort
        self._thinking = thinking(served, asked, param="reasoning.effort")
        self.warnings += self._thinking.warnings
        self.text = body.text or TextConfig()
        self.top_logprobs: int | None = None
        self._sampling: SamplingOptions = {}
        self._max_tokens: int | None = None
        if isinstance(body, ResponseCreate):
            self._max_tokens = body.max_output_tokens
            if body.top_logprobs or _LOGPROBS in (body.include or ()):
                self.top_logprobs = body.top_logprobs or 0
            self._sampling = {
                "temperature": body.temperature,
                "top_p": body.top_p,
                "logprobs": self.top_logprobs,
            }

    async def turn(self, caller: Caller, context: Context) -> Generation | Turn:
        """Raises ApiError."""
        try:
            return await self._prepared(caller, [*context.history, *context.own])
        except ContextError as error:
            if self._body.truncation != "auto":
                raise api_error(error, param="input") from None
            return await self._shorter_turn(caller, context, error)
        except FreeholdError as error:
            raise self._blamed(error) from None

    async def _prepared(self, caller: Caller, items: Sequence[Item]) -> Generation | Turn:
        if self._hosting is None:
            return await self._server.turn(caller, self._served, self._ask(items))
        body = self._body
        most = body.max_tool_calls if isinstance(body, ResponseCreate) else None
        limits = TurnLimits(max_tool_calls=most)
        return await self._server.turn_with_tools(caller, self._served, self._ask(items), self._hosting.toolbox, limits)

    async def _shorter_turn(self, caller: Caller, context: Context, error: ContextError) -> Generation | Turn:
        items = [*context.history, *context.own]
        cut = await asyncio.to_thread(self._cut, items)
        if cut is None:
            raise api_error(error, param="input")
        self.warnings.append(f"the input was too long and lost its oldest {cut} items")
        try:
            return await self._prepared(caller, without_oldest(items, cut))
        except FreeholdError as left:
            raise self._blamed(left) from None

    def _cut(self, items: Sequence[Item]) -> int | None:
        """Where to begin so that prompt and answer fit; the latest place where they never will, None for no place."""
        served = self._served
        builtins = () if self._hosting is None else self._hosting.toolbox.builtins
        chat_format = served.prompting.chat_format(self._thinking.effort, harmony=served.harmony, builtins=builtins)
        context = served.prompting.context
        room = min(self._max_tokens or context // 8, context // 2)
        places = cuts(items)
        low, high = 0, len(places)
        while low < high:
            middle = (low + high) // 2
            if self._num_tokens(chat_format, without_oldest(items, places[middle])) + room <= context:
                high = middle
            else:
                low = middle + 1
        return places[min(low, len(places) - 1)] if places else None

    def _num_tokens(self, chat_format: ChatFormat, items: Sequence[Item]) -> int:
        conversation = self._ask(items).conversation
        if self._hosting is not None:
            conversation = conversation.offering(self._hosting.toolbox.functions)
        try:
            self._served.prompting.check_length(conversation)
        except ContextError as error:
            return error.num_tokens
        return len(chat_format.render(conversation).ids)

    @property
    def effort(self) -> str | None:
        """As the response tells it: None where the model has no such setting."""
        if "max_reasoning_tokens" in self._thinking.choices:
            return "none"
        return self._thinking.effort or ("medium" if self._is_harmony else None)

    def _ask(self, items: Sequence[Item]) -> Ask:
        return Ask(
            conversation=Conversation(messages=(*self._opening(), *to_messages(items))),
            effort=self._thinking.effort,
            choices=self._choices(),
            sampling=self._sampling,
            max_tokens=self._max_tokens,
            volatile=isinstance(self._body, ResponseCreate) and self._body.store is False,
        )

    def _opening(self) -> list[Message]:
        messages = []
        if self._body.instructions:
            messages.append(text_message("system", self._body.instructions))
        forms = self._shown_form()
        if not self._is_harmony:
            messages += [text_message("system", _in_words(form)) for form in forms]
            forms = ()
        if self._tools.offered or forms:
            content = DeveloperContent(tools=self._tools.offered, response_formats=forms)
            messages.append(Message(role="developer", parts=(content,)))
        if isinstance(self.text.format, JsonObjectFormat):
            messages.append(text_message("system", _JSON_HINT))
        return messages

    def _shown_form(self) -> tuple[ResponseFormat, ...]:
        form = self.text.format
        if not isinstance(form, JsonSchemaFormat):
            return ()
        return (ResponseFormat(name=form.name, schema=form.schema_, description=form.description or ""),)

    def _choices(self) -> TurnChoices:
        choices: TurnChoices = {**self._thinking.choices}
        if self.tool_choice != "auto":
            choices["tool_choice"] = self.tool_choice
        if (self._tools.offered or self._tools.hosted) and self.parallel:
            choices["parallel_tool_calls"] = True
        if (form := self._enforced_form()) is not None:
            choices["response_format"] = form
        return choices

    def _enforced_form(self) -> AnswerFormat | None:
        match self.text.format:
            case JsonObjectFormat():
                return JsonObject()
            case JsonSchemaFormat(strict=strict, schema_=schema) if strict is not False:
                return JsonSchema(schema)
        return None

    def _blamed(self, error: FreeholdError) -> ApiError:
        """With the field that it came from, as far as that can be told."""
        text = str(error)
        for name, tool in self._tools.by_name.items():
            if f"functions.{name}" in text or f"tool {name!r}" in text:
                return api_error(error, param=tool.param + (error.pointer if isinstance(error, SchemaError) else ""))
        if isinstance(error, SchemaError):
            return api_error(error, param="text.format.schema" + error.pointer)
        return api_error(error, param="input" if isinstance(error, ContextError) else None)


def _in_words(form: ResponseFormat) -> str:
    return f"Answer in JSON that matches this schema: {compact_json(form.schema)}"


# --- the object -------------------------------------------------------------------------------------------------


def _response(server: Server, body: ResponseCreate, tools: Toolset, asking: _Asking) -> dict[str, Any]:
    """Every field that the object has, as it is before anything was said."""
    defaults = server.served.prompting.defaults.sampling
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "completed_at": None,
        "conversation": None if body.conversation is None else {"id": body.conversation},
        "error": None,
        "frequency_penalty": defaults.frequency_penalty,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model or server.model_names[0],
        "moderation": None,
        "output": [],
        "parallel_tool_calls": asking.parallel,
        "presence_penalty": defaults.presence_penalty,
        "previous_response_id": body.previous_response_id,
        "prompt": None,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": None if body.prompt_cache_retention is None else "in_memory",
        "reasoning": {"effort": asking.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False and server.store is not None,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": _format_on_wire(asking.text), "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": list(tools.on_wire),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _format_on_wire(text: TextConfig) -> dict[str, Any]:
    match text.format:
        case JsonSchemaFormat() as form:
            return {
                "type": "json_schema",
                "name": form.name,
                "description": form.description,
                "schema": form.schema_,
                "strict": form.strict is not False,
            }
        case PlainFormat() | JsonObjectFormat() as plain:
            return {"type": plain.type}
    return {"type": "text"}
