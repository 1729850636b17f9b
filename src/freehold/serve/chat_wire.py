"""What a request for a chat completion looks like, and what is asked of a turn by it.

Messages and tools are read by `Conversation.from_openai`, which takes what client libraries send back. Everything that
the caller says stays text: no control token can be written into a message.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from freehold.errors import FreeholdError, UsageError
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import Conversation, DeveloperContent, Message, ResponseFormat, Tool
from freehold.formats.forms import JsonObject, JsonSchema
from freehold.formats.harmony.grammar import AllowedTools, NamedTool, ToolChoice
from freehold.formats.harmony.offer import FUNCTIONS
from freehold.sampling import MOST_LOGPROBS
from freehold.serve.effort import ReasoningEffort, thinking
from freehold.serve.errors import ApiError, api_error
from freehold.serve.generation import Form, GenerationFields, blame
from freehold.serve.wire import Hint, Refused
from freehold.session.generation import Ask
from freehold.session.served import Served

_MOST_TOOLS = 1024


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(
        min_length=1,
        description="Roles system, developer, user, assistant, tool; text only. Reasoning comes back as reasoning or "
        "reasoning_content",
    )
    tools: list[dict[str, Any]] | None = Field(
        None, max_length=_MOST_TOOLS, description="Functions, and custom tools with text, regex or Lark formats"
    )
    tool_choice: Any = Field(
        None,
        description="none, auto, required, a function or custom tool, or allowed_tools; enforced",
        json_schema_extra={"type": ["string", "object", "null"]},
    )
    parallel_tool_calls: bool | None = Field(
        None, description="true lets a turn have several calls; otherwise it ends with the first, as gpt-oss's do"
    )
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object or json_schema; enforced, whatever strict says"
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="none leaves no room for reasoning; minimal is low; xhigh and max are high"
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="Reasoning included")
    max_tokens: int | None = Field(None, ge=1, description="The older word for max_completion_tokens")
    logprobs: bool | None = Field(None, description="Of the answer's tokens, not of reasoning and calls")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="Only with logprobs")
    include_reasoning: bool | None = Field(None, description="vLLM's; false leaves the reasoning out of the answer")
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = Field(None, description="Comes back with the answer; nothing is kept")

    safety_identifier: Annotated[str | None, Hint("keys tell users apart; nothing is kept about this one")] = None
    prompt_cache_key: Annotated[str | None, Hint("prefixes are found by what they say, within one key")] = None
    prompt_cache_retention: Annotated[
        Any, Refused("cached prefixes live in memory while there is room", unless=(None, "in_memory"))
    ] = None
    prompt_cache_options: Annotated[
        Any, Refused("prefixes are cached without being asked", unless=(None, {}, {"mode": "implicit"}))
    ] = None
    store: Annotated[Any, Refused("chat completions are not kept; /v1/responses are", unless=(None, False))] = None
    modalities: Annotated[Any, Refused("gpt-oss writes text only", unless=(None, ["text"]))] = None
    audio: Annotated[Any, Refused("gpt-oss writes text only")] = None
    moderation: Annotated[Any, Refused("there is no moderation model here")] = None
    prediction: Annotated[Any, Refused("predicted text is not used; leave it out, the answer is the same")] = None
    verbosity: Annotated[Any, Refused("say it in the instructions", unless=(None, "medium"))] = None
    web_search_options: Annotated[Any, Refused("search is a tool of /v1/responses")] = None
    functions: Annotated[Any, Refused("use tools")] = None
    function_call: Annotated[Any, Refused("use tool_choice")] = None

    add_generation_prompt: Annotated[Any, Refused("a turn of the assistant is made", unless=(None, True))] = None
    best_of: Annotated[Any, Refused("use n", unless=(None, 1))] = None
    chat_template: Annotated[Any, Refused("the model's own is used")] = None
    chat_template_kwargs: Annotated[Any, Refused("use reasoning_effort", unless=(None, {}))] = None
    continue_final_message: Annotated[
        Any, Refused("an answer is begun anew; use /v1/completions", unless=(None, False))
    ] = None
    documents: Annotated[Any, Refused("put them into a message", unless=(None, []))] = None
    echo: Annotated[Any, Refused("use /v1/completions", unless=(None, False))] = None
    mm_processor_kwargs: Annotated[Any, Refused("gpt-oss reads text only", unless=(None, {}))] = None
    stop_token_ids: Annotated[
        Any, Refused("a turn ends with its own tokens; use stop, or /v1/completions", unless=(None, []))
    ] = None


class Asked(NamedTuple):
    """A request as it was understood. `custom` are the tools that are sent text instead of JSON; `warnings` tell the
    client what was taken otherwise than written."""

    ask: Ask
    form: Form | None
    tools: dict[str, str]
    custom: frozenset[str]
    warnings: tuple[str, ...]


def understand(body: ChatRequest, served: Served) -> Asked:
    """Raises a 400 that names the field. Takes as long as the messages are: not for an event loop."""
    offered, places = read_tools(body.tools)
    conversation = read_conversation(body.messages, body.tools)
    described, *forms = _response_format(body.response_format)
    form = body.form(*forms)
    effort = thinking(served, body.reasoning_effort, param="reasoning_effort")
    if body.ignore_eos and effort.choices:
        message = "with ignore_eos nothing keeps the model from reasoning; leave one of them out"
        raise ApiError(400, message, param="reasoning_effort")
    choices = TurnChoices(**effort.choices)
    if form is not None:
        choices["response_format"] = form.form
    if described is not None and served.speaks_harmony:
        conversation = _describe(conversation, described)
    choice = _tool_choice(body.tool_choice, offered)
    if offered or choice == "required":
        choices["tool_choice"] = choice
    if offered and body.parallel_tool_calls:
        choices["parallel_tool_calls"] = True
    ask = Ask(
        conversation=conversation,
        effort=effort.effort,
        choices=choices,
        sampling=body.sampling(logprobs=_logprobs(body), vocab_size=served.prompting.vocab_size),
        n=body.num_samples,
        max_tokens=_max_tokens(body),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop=tuple(body.stop or ()),
    )
    custom = frozenset(name for name, tool in offered.items() if tool.text_format is not None)
    return Asked(ask, form, places, custom, effort.warnings)


def why_not(error: FreeholdError, body: ChatRequest, asked: Asked) -> ApiError:
    """What to say where the turn that was asked for cannot be."""
    fields = type(body).model_fields.keys() - {"messages", "model"}
    known = blame(error, fields=fields, form=asked.form, tools=asked.tools, prompt="messages")
    if known.param is None and "does not speak of tools" in known.message:
        known.param = "tools"
    return known


# --- messages and tools -------------------------------------------------------------------------------------

_PLACE = re.compile(r"(message|tool call|tool|part|reasoning detail) (\d+): ")
_NAMES = {
    "message": "messages",
    "tool": "tools",
    "tool call": "tool_calls",
    "part": "content",
    "reasoning detail": "reasoning_details",
}
_FIELD = re.compile(r"(?:field '(\w+)'|(\w+) (?:must be|'[^']*' is that))")


def read_conversation(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Conversation:
    """Raises a 400 whose param is the place: `messages[3].content[0]`."""
    try:
        return Conversation.from_openai(messages, tools=tools)
    except FreeholdError as error:
        raise api_error(error, param=_place(str(error)) or ("messages" if messages else "tools")) from None


def _place(text: str) -> str:
    """Where an error is, by how `Conversation.from_openai` begins its messages."""
    param, at = "", 0
    while found := _PLACE.match(text, at):
        param += f"{'.' if param else ''}{_NAMES[found[1]]}[{found[2]}]"
        at = found.end()
    field = _FIELD.match(text, at)
    name = field and (field[1] or field[2])
    return f"{param}.{name}" if param and name else param


def read_tools(tools: list[dict[str, Any]] | None) -> tuple[dict[str, Tool], dict[str, str]]:
    """The tools that are offered, by name, and where each one's parameters or format are. Raises a 400."""
    parts = [part for message in read_conversation([], tools).messages for part in message.parts]
    offered = [tool for part in parts if isinstance(part, DeveloperContent) for tool in part.tools]
    places = {}
    for index, tool in enumerate(offered):
        inside = "function.parameters" if tool.text_format is None else "custom.format"
        places[tool.name] = f"tools[{index}].{inside}"
    return {tool.name: tool for tool in offered}, places


def _tool_choice(raw: Any, offered: Mapping[str, Tool]) -> ToolChoice:
    match raw:
        case None:
            return "auto"
        case "required" if not offered:
            raise ApiError(400, "tool_choice is required, but there are no tools; give some", param="tool_choice")
        case "none" | "auto" | "required":
            return raw  # type: ignore[no-any-return]
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*tools], **inside}, **rest}:
            _refuse_unknown(rest, "tool_choice")
            _refuse_unknown(inside, "tool_choice.allowed_tools")
            if mode not in ("auto", "required"):
                raise ApiError(
                    400, f"mode is auto or required, got {mode!r:.40}", param="tool_choice.allowed_tools.mode"
                )
            if not tools:
                raise ApiError(400, "allowed_tools has no tools; give one", param="tool_choice.allowed_tools.tools")
            names = (
                _chosen(tool, offered, param=f"tool_choice.allowed_tools.tools[{index}]")
                for index, tool in enumerate(tools)
            )
            return AllowedTools(recipients=tuple(dict.fromkeys(names)), required=mode == "required")
    return NamedTool(_chosen(raw, offered, param="tool_choice"))


def _chosen(raw: Any, offered: Mapping[str, Tool], *, param: str) -> str:
    """The recipient that is meant."""
    match raw:
        case {"type": "function" as kind, "function": {"name": str(name), **inside}, **rest}:
            pass
        case {"type": "custom" as kind, "custom": {"name": str(name), **inside}, **rest}:
            pass
        case _:
            raise ApiError(
                400,
                "a tool is chosen as none, auto, required, {type: function, function: {name}}, {type: custom, custom: "
                f"{{name}}}} or {{type: allowed_tools, allowed_tools: {{mode, tools}}}}, got {raw!r:.80}",
                param=param,
            )
    _refuse_unknown(rest, param)
    _refuse_unknown(inside, f"{param}.{kind}")
    if name not in offered:
        raise ApiError(400, f"{name!r:.80} is not among the tools; offer it, or choose another one", param=param)
    if (kind == "custom") != (offered[name].text_format is not None):
        raise ApiError(400, f"{name!r:.80} is no tool of type {kind!r}", param=param)
    return f"{FUNCTIONS}.{name}"


# --- the answer ---------------------------------------------------------------------------------------------


def _response_format(raw: dict[str, Any] | None) -> tuple[ResponseFormat | None, *tuple[Form, ...]]:
    """What the model is told of the form, and what is enforced."""
    if raw is None:
        return (None,)
    kind = raw.get("type")
    known = ("type", "json_schema") if kind == "json_schema" else ("type",)
    _refuse_unknown([key for key in raw if key not in known], "response_format")
    match kind:
        case "text":
            return (None,)
        case "json_object":
            return None, Form("response_format", JsonObject())
        case "json_schema":
            return _json_schema(raw.get("json_schema"))
    raise ApiError(
        400, f"response_format is text, json_object or json_schema, got {kind!r:.40}", param="response_format.type"
    )


def _json_schema(raw: Any) -> tuple[ResponseFormat, Form]:
    param = "response_format.json_schema"
    if not isinstance(raw, dict):
        raise ApiError(400, f"{param} must be an object with a name and a schema", param=param)
    _refuse_unknown([key for key in raw if key not in ("name", "description", "schema", "strict")], param)
    if not isinstance(raw.get("strict"), bool | None):
        raise ApiError(400, f"strict is true or false, got {raw['strict']!r:.40}", param=f"{param}.strict")
    if not isinstance(raw.get("schema"), dict):
        raise ApiError(400, "the schema must be an object", param=f"{param}.schema")
    try:
        described = ResponseFormat(
            name=raw.get("name", ""), schema=raw["schema"], description=raw.get("description") or ""
        )
    except UsageError as error:
        field = "description" if "description" in str(error) else "name"
        raise api_error(error, param=f"{param}.{field}") from None
    return described, Form(f"{param}.schema", JsonSchema(raw["schema"]))


def _describe(conversation: Conversation, form: ResponseFormat) -> Conversation:
    """The model is told of the form behind its instructions."""
    messages = list(conversation.messages)
    place = next((i for i, said in enumerate(messages) if said.role not in ("system", "developer")), len(messages))
    messages.insert(place, Message(role="developer", parts=(DeveloperContent(response_formats=(form,)),)))
    return Conversation(messages=tuple(messages))


def _refuse_unknown(names: Iterable[object], where: str) -> None:
    for name in names:
        param = f"{where}.{name!s:.80}"
        raise ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise ApiError(400, "top_logprobs are only given where logprobs is true", param="top_logprobs")
    return None


def _max_tokens(body: ChatRequest) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if None not in (new, old) and new != old:
        message = f"max_completion_tokens is {new} and max_tokens, its older word, {old}; give one of them"
        raise ApiError(400, message, param="max_tokens")
    return old if new is None else new
