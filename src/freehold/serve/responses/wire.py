"""Requests of the Responses API and of conversations, field by field.

Items and tools have models of their own, picked by their `type`; what is not picked here is checked where it is read
(items.py, tools.py), so that an error names the field as the client wrote it: `input[2].content[0].text`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from freehold.errors import UsageError
from freehold.serve.effort import ReasoningEffort
from freehold.serve.wire import Hint, Refused, Wire
from freehold.session.store.records import check_id

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
]
INCLUDABLE: tuple[Include, ...] = get_args(Include)
Summary = Literal["auto", "concise", "detailed"]
Status = Literal["in_progress", "completed", "incomplete"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


def _storable(value: str) -> str:
    try:
        check_id("item", value)
    except UsageError:
        raise PydanticCustomError("too_long", "has too many characters beyond ASCII to be stored") from None
    return value


Id = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_storable)]

_METADATA_PAIRS, _METADATA_KEY, _METADATA_VALUE = 16, 64, 512


def _metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    given = value or {}
    if len(given) > _METADATA_PAIRS:
        raise PydanticCustomError("metadata", f"there are {len(given)} pairs and at most {_METADATA_PAIRS} are kept")
    for key, text in given.items():
        if len(key) > _METADATA_KEY or len(text) > _METADATA_VALUE:
            raise PydanticCustomError(
                "metadata", f"keys have at most {_METADATA_KEY} characters and values at most {_METADATA_VALUE}"
            )
    return value


Metadata = Annotated[dict[str, str] | None, AfterValidator(_metadata)]


def _text_or(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, str | kind):
        raise PydanticCustomError("shape", f"must be a text or {what}")
    return value


def _text_or_items(value: Any) -> Any:
    if value is not None and isinstance(_text_or(value, list, "a list of items"), list):
        for number, item in enumerate(value):
            if not isinstance(item, dict):
                raise PydanticCustomError("shape", f"item {number} is not an object")
    return value


_ITEMS = {"type": "array", "items": {"type": "object"}}
Input = Annotated[
    Any, AfterValidator(_text_or_items), WithJsonSchema({"anyOf": [{"type": "string"}, _ITEMS, {"type": "null"}]})
]
ToolChoice = Annotated[
    Any,
    AfterValidator(lambda value: value if value is None else _text_or(value, dict, "an object")),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]}),
]


def _conversation(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"id"} and isinstance(value["id"], str):
        return value["id"]
    if value is None or isinstance(value, str):
        return value
    raise PydanticCustomError("shape", "must be an id or an object that has one")


Conversation = Annotated[
    Any,
    AfterValidator(_conversation),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
                {"type": "null"},
            ]
        }
    ),
]

_NO_MODERATION = "nothing here judges texts"


class Reasoning(Wire):
    """How the model thinks."""

    effort: ReasoningEffort | None = Field(
        default=None,
        description="`none` leaves reasoning out; `minimal` is taken as `low`, `xhigh` and `max` as `high`, the words "
        "that gpt-oss knows, and `x-freehold-warnings` says so. Models without Harmony take `none` only.",
    )
    summary: Annotated[Summary | None, Hint("reasoning is shown as it is, so there are no summaries")] = None
    generate_summary: Annotated[Summary | None, Hint("reasoning is shown as it is, so there are no summaries")] = None
    context: Annotated[
        Literal["auto", "current_turn", "all_turns"] | None,
        Hint(
            "Harmony shows the model its reasoning until it has answered, and no longer; `all_turns` is taken as "
            "`current_turn`, with a warning"
        ),
    ] = None
    mode: Annotated[str | None, Refused("there is one mode", unless=(None, "standard"))] = None


class PlainFormat(Wire):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Wire):
    """JSON that matches a schema; where `strict` is false the schema is shown to the model and not enforced."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Wire):
    """What the answer is to look like."""

    format: Annotated[PlainFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[
        Literal["low", "medium", "high"] | None,
        Hint("gpt-oss was not trained to follow it; say it in instructions. `x-freehold-warnings` says so"),
    ] = None


class StreamOptions(Wire):
    """How events are sent."""

    include_obfuscation: bool | None = Field(
        None, description="Pads deltas, so that their sizes tell less to who watches the wire. Default: false."
    )


class InputTokens(Wire):
    """What a response's input consists of; also the body of `/v1/responses/input_tokens`."""

    model: str | None = Field(default=None, description="Default: the model that is loaded.")
    input: Input = None
    instructions: str | None = Field(
        default=None, description="For this response only, also with `previous_response_id`."
    )
    previous_response_id: str | None = None
    conversation: Conversation = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(
        default=None,
        description="true lets a turn have several calls; otherwise it ends with the first, as gpt-oss's do",
    )
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    personality: Annotated[str | None, Refused("describe it in instructions")] = None


class ResponseCreate(InputTokens):
    """The body of `POST /v1/responses`."""

    background: bool | None = None
    background_options: Annotated[
        Any, Refused("there is one queue", unless=(None, {}, {"completion_window": "soonest"}))
    ] = None
    client_metadata: Annotated[dict[str, str] | None, Hint("nothing is done with it")] = None
    context_management: Annotated[Any, Refused("conversations are not compacted", unless=(None, []))] = None
    include: list[Include] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Of tools that the server runs, all together; after these the model answers with what there is",
    )
    metadata: Metadata = None
    prompt: Annotated[Any, Refused("prompts are not kept here; send their text")] = None
    prompt_cache_key: Annotated[str | None, Hint("prompts that begin the same way are found without it")] = None
    prompt_cache_options: Annotated[
        dict[str, Any] | None, Hint("prefixes are cached by what they are, as long as there is room")
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory", "24h"] | None,
        Hint("prefixes are cached as long as there is room; `24h` is taken as `in_memory`, with a warning"),
    ] = None
    safety_identifier: Annotated[str | None, Hint("it is given back, and nothing is done with it")] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None,
        Hint("there is one tier, `default`; the answer and `x-freehold-warnings` say so"),
    ] = None
    store: bool | None = Field(default=None, description="Default: true, where the server has a store.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Annotated[str | None, Hint("it is given back, and nothing is done with it")] = None
    access_programs: Annotated[Any, Refused("there are none")] = None
    image: Annotated[Any, Refused("gpt-oss reads text only")] = None
    moderation: Annotated[Any, Refused(_NO_MODERATION)] = None


# --- tools ------------------------------------------------------------------------------------------------------

_DIRECT = Refused("tools are called by the model itself", unless=(None, ["direct"]))
_AT_ONCE = Refused("all tools are described to the model at once", unless=(None, False))
_IN_TURN = Refused("the model waits for what it calls", unless=(None, False))


class FunctionTool(Wire):
    """A function of the client's. Without `strict` its schema is shown to the model and not enforced."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Annotated[Any, _DIRECT] = None
    defer_loading: Annotated[Any, _AT_ONCE] = None
    async_: Annotated[Any, _IN_TURN] = Field(default=None, alias="async")
    output_schema: Annotated[dict[str, Any] | None, Hint("the model reads results as they are")] = None


class TextInput(Wire):
    """Any text."""

    type: Literal["text"]


class GrammarInput(Wire):
    """Text that follows a grammar."""

    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: str


class CustomTool(Wire):
    """A tool of the client's that is sent text instead of JSON."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: Annotated[TextInput | GrammarInput, Field(discriminator="type")] | None = None
    allowed_callers: Annotated[Any, _DIRECT] = None
    defer_loading: Annotated[Any, _AT_ONCE] = None
    async_: Annotated[Any, _IN_TURN] = Field(default=None, alias="async")


class NamespaceTool(Wire):
    """Tools that belong together; the model sees each as `namespace__name`."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: list[dict[str, Any]]


_PLACES = Hint("the sources here know no places")


class UserLocation(Wire):
    """Where the user is."""

    type: Annotated[Literal["approximate"] | None, _PLACES] = None
    city: Annotated[str | None, _PLACES] = None
    country: Annotated[str | None, _PLACES] = None
    region: Annotated[str | None, _PLACES] = None
    timezone: Annotated[str | None, _PLACES] = None


class SearchFilters(Wire):
    """Which sites are searched."""

    allowed_domains: Annotated[
        Any, Refused("the sources are searched as a whole; name the sites in instructions", unless=(None, []))
    ] = None


class WebSearchTool(Wire):
    """The server's browser, over the sources that its operator named: folders, ZIM files, the web."""

    type: Literal["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"]
    external_web_access: bool | None = Field(default=None, description="false leaves the web out of the sources")
    filters: SearchFilters | None = None
    search_content_types: Annotated[Any, Refused("gpt-oss reads text only", unless=(None, ["text"]))] = None
    search_context_size: Annotated[
        Literal["low", "medium", "high"] | None, Hint("the model says how many results and lines it wants to see")
    ] = None
    user_location: UserLocation | None = None
    allowed_callers: Annotated[Any, _DIRECT] = None


class NewContainer(Wire):
    """The conversation's own container, or a new one where it has none, or that one is in use."""

    type: Literal["auto"]
    file_ids: Annotated[Any, Refused("there are no uploaded files here", unless=(None, []))] = None
    memory_limit: Annotated[Any, Refused("the operator of this server says how much memory there is")] = None
    network_policy: Annotated[Any, Refused("there is no network", unless=(None, {"type": "disabled"}))] = None


class CodeInterpreterTool(Wire):
    """Python in a sandbox of the server's, with a kernel that lives on between responses. A container is closed when it
    has not been used for a while."""

    type: Literal["code_interpreter"]
    container: Annotated[
        Any,
        AfterValidator(lambda value: _text_or(value, dict, "an object")),
        Field(description="An id from an earlier call; or a [NewContainer](#responses-newcontainer)"),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
    ]
    allowed_callers: Annotated[Any, _DIRECT] = None


_OPERATORS = "the operator of this server says how its MCP servers are reached"


class McpFilter(Wire):
    """Some of a server's tools."""

    tool_names: list[str] | None = None
    read_only: bool | None = Field(default=None, description="Those of which the server says so")


class McpTool(Wire):
    """Tools of an MCP server, or of a file of functions, that the operator of this server has set up."""

    type: Literal["mcp"]
    server_label: str = Field(description="The name that the operator gave it")
    allowed_tools: list[str] | McpFilter | None = None
    require_approval: Annotated[
        Any, Refused("calls are made without asking; say 'never' if that is all right", unless=("never",))
    ]
    server_url: str | None = Field(
        default=None, description="Refused unless it is the operator's own: nobody makes this server connect elsewhere"
    )
    server_description: Annotated[str | None, Hint("the model reads what the tools say of themselves")] = None
    allowed_callers: Annotated[Any, _DIRECT] = None
    authorization: Annotated[Any, Refused(_OPERATORS)] = None
    connector_id: Annotated[Any, Refused(_OPERATORS)] = None
    defer_loading: Annotated[Any, _AT_ONCE] = None
    headers: Annotated[Any, Refused(_OPERATORS, unless=(None, {}))] = None
    tunnel_id: Annotated[Any, Refused(_OPERATORS)] = None


class McpChoice(Wire):
    """A tool of an MCP server's, or any of them."""

    type: Literal["mcp"]
    server_label: str
    name: str | None = None


class HostedChoice(Wire):
    """A tool that the server runs."""

    type: str


class NamedChoice(Wire):
    """One tool of the client's."""

    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class AllowedChoice(Wire):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[dict[str, Any]], Field(min_length=1)]


# --- items ------------------------------------------------------------------------------------------------------

_CALLER = Refused("calls come from the model itself", unless=(None, {"type": "direct"}))
_FROM_CLIENTS = Hint("clients send it back, and it says nothing to the model")


class _Item(Wire):
    id: Id | None = None
    status: Annotated[Status | None, _FROM_CLIENTS] = None
    created_by: Annotated[str | None, _FROM_CLIENTS] = None
    internal_chat_message_metadata_passthrough: Annotated[dict[str, Any] | None, _FROM_CLIENTS] = None


class MessageItem(_Item):
    """A message, of any role but a tool's."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Any, AfterValidator(_text_or_items), WithJsonSchema({"anyOf": [{"type": "string"}, _ITEMS]})]
    phase: Literal["commentary", "final_answer"] | None = None
    end_turn: Annotated[bool | None, _FROM_CLIENTS] = None


class TextPart(Wire):
    """Text."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any] | None, _FROM_CLIENTS] = None
    logprobs: Annotated[list[Any] | None, _FROM_CLIENTS] = None
    parsed: Annotated[Any, _FROM_CLIENTS] = None
    prompt_cache_breakpoint: Annotated[Any, Hint("prompts that begin the same way are found without it")] = None


class RefusalPart(Wire):
    """What the model will not do."""

    type: Literal["refusal"]
    refusal: str


class FunctionCallItem(_Item):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: Id
    name: Name
    namespace: Name | None = None
    arguments: str
    parsed_arguments: Annotated[Any, _FROM_CLIENTS] = None
    caller: Annotated[Any, _CALLER] = None
    async_: Annotated[Any, _IN_TURN] = Field(default=None, alias="async")


class CustomCallItem(_Item):
    """A call of a custom tool."""

    type: Literal["custom_tool_call"]
    call_id: Id
    name: Name
    namespace: Name | None = None
    input: str
    caller: Annotated[Any, _CALLER] = None
    async_: Annotated[Any, _IN_TURN] = Field(default=None, alias="async")


class OutputItem(_Item):
    """What a call came to."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Id
    output: Annotated[Any, AfterValidator(_text_or_items), WithJsonSchema({"anyOf": [{"type": "string"}, _ITEMS]})]
    name: Annotated[str | None, _FROM_CLIENTS] = None
    namespace: Annotated[str | None, _FROM_CLIENTS] = None
    caller: Annotated[Any, _CALLER] = None


class ReasoningText(Wire):
    """Reasoning as the model wrote it."""

    type: Literal["reasoning_text", "text"]
    text: str


class SummaryText(Wire):
    """A summary of reasoning; what is shown to the model where there is nothing better."""

    type: Literal["summary_text"]
    text: str


class ReasoningItem(_Item):
    """Reasoning of the turn that is going on; Harmony leaves out that of earlier ones."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class SearchAction(Wire):
    """What was searched for."""

    type: Literal["search"]
    query: str | None = None
    queries: list[str] | None = None
    sources: Annotated[list[Any] | None, _FROM_CLIENTS] = None


class OpenAction(Wire):
    """Which page was opened."""

    type: Literal["open_page"]
    url: str | None = None


class FindAction(Wire):
    """What was looked for in a page."""

    type: Literal["find_in_page"]
    pattern: str
    url: str


class _HostedItem(Wire):
    id: Id | None = None
    status: (
        Literal["in_progress", "searching", "interpreting", "calling", "completed", "incomplete", "failed"] | None
    ) = Field(default=None, description="What did not come to its end is not shown to the model")


class WebSearchCallItem(_HostedItem):
    """A call of the browser. What it said is known here as long as its container is."""

    type: Literal["web_search_call"]
    action: Annotated[SearchAction | OpenAction | FindAction, Field(discriminator="type")]
    results: Annotated[list[Any] | None, _FROM_CLIENTS] = None


class LogsOutput(Wire):
    """What a program said."""

    type: Literal["logs"]
    logs: str


class CodeInterpreterCallItem(_HostedItem):
    """A call of Python. What it said is in `outputs`, or known here as long as its container is."""

    type: Literal["code_interpreter_call"]
    code: str | None = None
    container_id: str
    outputs: list[LogsOutput] | None = None


class McpCallItem(_HostedItem):
    """A call of an MCP server's tool, with what came of it."""

    type: Literal["mcp_call"]
    server_label: Name
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    output: str | None = None
    error: Annotated[
        Any, AfterValidator(lambda value: value if value is None else _text_or(value, dict, "an object"))
    ] = None
    approval_request_id: Annotated[Any, Refused("calls are made without asking")] = None


class McpListToolsItem(_Item):
    """What an MCP server offers. The model is told of what it offers now."""

    type: Literal["mcp_list_tools"]
    server_label: str
    tools: Annotated[list[Any], _FROM_CLIENTS]
    error: Annotated[Any, _FROM_CLIENTS] = None


class ReferenceItem(Wire):
    """An item that is in the store."""

    type: Literal["item_reference"] | None = None
    id: Id


# --- conversations ----------------------------------------------------------------------------------------------

MOST_ITEMS = 20


def _few(value: Sequence[Any] | None) -> Sequence[Any] | None:
    if value is not None and len(value) > MOST_ITEMS:
        raise PydanticCustomError("too_many", f"there are {len(value)} items; send at most {MOST_ITEMS} at once")
    return value


class ConversationCreate(Wire):
    """The body of `POST /v1/conversations`."""

    items: Annotated[list[dict[str, Any]] | None, AfterValidator(_few)] = None
    metadata: Metadata = None


class ConversationUpdate(Wire):
    """The body of `POST /v1/conversations/{id}`."""

    metadata: Metadata


class ItemsCreate(Wire):
    """The body of `POST /v1/conversations/{id}/items`."""

    items: Annotated[list[dict[str, Any]], Field(min_length=1), AfterValidator(_few)]
