"""Anthropic's Messages on the wire: what `/v1/messages` reads. Models only; messages.py does what they ask for.

Fields are those of the `anthropic` package, its beta included, with what older versions of it send.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag
from pydantic_core import CoreSchema, core_schema

from freehold.serve.generation import MOST_STOP_CHARACTERS
from freehold.serve.wire import Hint, Refused, Wire

_CACHED = Hint("prefixes of prompts are always kept, for as long as there is room")
_MOST_STOPS = 64
_TEXT_ONLY = "gpt-oss reads text only"


class CacheControl(Wire):
    type: Literal["ephemeral"]
    ttl: Annotated[Literal["5m", "1h"] | None, _CACHED] = None
    scope: Annotated[str | None, _CACHED] = None


Cached = Annotated[CacheControl | None, _CACHED]


# --- blocks -------------------------------------------------------------------------------------------------


class TextBlock(Wire):
    type: Literal["text"]
    text: str
    cache_control: Cached = None
    citations: Annotated[None, Refused("nothing here makes or reads citations", unless=(None, []))] = None


class ThinkingBlock(Wire):
    """Reasoning of an earlier turn. The model sees it again until it has given its answer, as Harmony has it."""

    type: Literal["thinking"]
    thinking: str = Field(description="The text; where it is empty, it is taken out of a signature of this server's.")
    signature: str = Field(
        description="As this server gave it: then the text must still be the one that it was given for. Those of "
        "others cannot be checked here, and say nothing."
    )


class RedactedThinkingBlock(Wire):
    """Another server's secret: it is left out, and the `x-freehold-warnings` header says so."""

    type: Literal["redacted_thinking"]
    data: Annotated[str, Hint("only the server that wrote it can read it")]


class DirectCaller(Wire):
    type: Literal["direct"]


class ToolUseBlock(Wire):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str
    input: dict[str, Any]
    cache_control: Cached = None
    caller: Annotated[DirectCaller | None, Hint("there are no other callers here")] = None
    toolset_name: Annotated[None, Refused("there are no toolsets here")] = None


def _kind_of(*known: str) -> Callable[[Any], str]:
    """What tells pydantic which of a union's branches to take. Their names stand in `<>`, so that an error's path can
    be told from them; what is not known goes to the last branch, `<other>`."""

    def kind(value: Any) -> str:
        name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"<{name}>" if name in known else "<other>"

    return kind


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[
        Any, Refused(f"a tool's result is text or a list of text blocks; {_TEXT_ONLY}", unless=()), Tag("<other>")
    ],
    Discriminator(_kind_of("text")),
]


@dataclass(frozen=True, slots=True)
class OrText:
    """An annotation: a string stands for a list of one text block."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def blocks(value: Any) -> Any:
            return [{"type": "text", "text": value}] if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(blocks, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


class ToolResultBlock(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[ResultBlock], OrText()] = Field(default=[], description="Blocks are joined by line ends.")
    is_error: bool = Field(default=False, description="The model is told by `Error: ` before the text.")
    cache_control: Cached = None
    toolset_name: Annotated[None, Refused("there are no toolsets here")] = None


UserBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[Any, Refused(f"a user's blocks are text and tool_result; {_TEXT_ONLY}", unless=()), Tag("<other>")],
    Discriminator(_kind_of("text", "tool_result")),
]

AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[
        Any,
        Refused("an assistant's blocks are text, thinking, redacted_thinking and tool_use", unless=()),
        Tag("<other>"),
    ],
    Discriminator(_kind_of("text", "thinking", "redacted_thinking", "tool_use")),
]

TextBlocks = Annotated[list[TextBlock], OrText()]


# --- messages -----------------------------------------------------------------------------------------------


class UserMessage(Wire):
    role: Literal["user"]
    content: Annotated[list[UserBlock], OrText()] = Field(description="Text blocks are joined by line ends.")


class AssistantMessage(Wire):
    role: Literal["assistant"]
    content: Annotated[list[AssistantBlock], OrText()] = Field(
        description="Text before a tool_use or more thinking is a preamble, the last text is the answer."
    )


class SystemMessage(Wire):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: TextBlocks = Field(description="Blocks are joined by empty lines.")


def _role_of(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"<{role}>" if role in ("user", "assistant", "system") else "<other>"


AnyMessage = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")]
    | Annotated[Any, Refused("a message's role is user, assistant or system", unless=()), Tag("<other>")],
    Discriminator(_role_of),
]


# --- tools --------------------------------------------------------------------------------------------------


class CustomTool(Wire):
    type: Literal["custom"] | None = None
    name: str
    input_schema: dict[str, Any] = Field(description="A JSON schema of an object.")
    description: str | None = None
    strict: bool | None = Field(default=None, description="Calls always match the schema.")
    input_examples: list[dict[str, Any]] = Field(default=[], description="Shown to the model with the description.")
    cache_control: Cached = None
    eager_input_streaming: Annotated[bool | None, Hint("arguments are always streamed as they are written")] = None
    defer_loading: Annotated[
        Literal[False] | None, Refused("there is no tool search that could load the tool later", unless=(None, False))
    ] = None
    allowed_callers: Annotated[None, Refused("only the model itself calls tools here", unless=(None, ["direct"]))] = (
        None
    )


class HostedTool(Wire):
    """A tool that Anthropic's servers run: it is left out, and the `x-freehold-warnings` header says so."""

    model_config = ConfigDict(extra="ignore")

    type: str


_HOSTED = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_", "mcp_toolset", "advisor_")
_NOT_SPELLED_OUT = (
    "the model was not trained on Anthropic's own tools; give it as a custom tool with a description and an "
    "input_schema"
)


def _kind_of_tool(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None or kind == "custom":
        return "<custom>"
    return "<hosted>" if isinstance(kind, str) and kind.startswith(_HOSTED) else "<other>"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("<custom>")]
    | Annotated[HostedTool, Tag("<hosted>")]
    | Annotated[Any, Refused(_NOT_SPELLED_OUT, unless=()), Tag("<other>")],
    Discriminator(_kind_of_tool),
]


class ToolChoice(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, description="The tool to call, where the type is `tool`.")
    disable_parallel_tool_use: bool | None = Field(
        default=None,
        description="false lets the model call several tools in a turn. Left out, or true, it calls one at a time, as "
        "gpt-oss was trained to.",
    )


# --- the rest -----------------------------------------------------------------------------------------------


class Thinking(Wire):
    type: Annotated[
        Literal["enabled", "adaptive", "disabled"],
        Field(
            description="`enabled` and `adaptive`: the model thinks as much as it likes, up to budget_tokens. "
            "`disabled`: it cannot think."
        ),
    ]
    budget_tokens: int | None = Field(
        default=None, ge=1, description="The most tokens of reasoning: the model answers when they are spent."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        default=None,
        description="`summarized`, or nothing: all of the reasoning, as it was written. `omitted`: only a signature, "
        "which holds it for the next request.",
    )


class JsonFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema", description="The answer always matches it.")


class OutputConfig(Wire):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None,
        description="How hard to think. `xhigh` and `max` are taken as `high`, this model's most, and "
        "`x-freehold-warnings` says so.",
    )
    format: JsonFormat | None = None
    task_budget: Annotated[None, Refused("there is no budget over several requests; use max_tokens")] = None


class ClearThinking(Wire):
    type: Literal["clear_thinking_20251015"]
    keep: Annotated[Any, Hint("Harmony decides it: the model sees the reasoning since its last answer")] = None


class ContextManagement(Wire):
    edits: list[ClearThinking] = Field(
        default=[], description="Only `clear_thinking_20251015`; for others the client has to shorten its messages."
    )


class Metadata(Wire):
    user_id: Annotated[str | None, Hint("nothing is reported to anybody")] = None


class CountTokens(Wire):
    """What a prompt is made of."""

    model: str
    messages: list[AnyMessage] = Field(min_length=1, description="Ends with a user's message: there is no prefill.")
    system: TextBlocks = Field(default=[], description="Blocks are joined by empty lines.")
    tools: list[AnyTool] = Field(
        default=[],
        description="Hosted ones such as web search are left out, and `x-freehold-warnings` names them.",
    )
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(
        default=None,
        description="Left out, the model thinks as usual, and its thinking is returned where there are tools, since "
        "it has to come back with their results.",
    )
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = Field(default=None, description="An older name of output_config.format.")
    context_management: ContextManagement | None = None
    cache_control: Cached = None
    speed: Annotated[None, Refused("there is one speed, this machine's", unless=(None, "standard"))] = None
    mcp_servers: Annotated[None, Refused("the server connects to no other servers", unless=(None, []))] = None
    compaction: Annotated[None, Refused("the client has to shorten its messages")] = None
    billing_policy: Annotated[None, Refused("nothing is billed")] = None


class CreateMessage(CountTokens):
    """A whole request."""

    max_tokens: int = Field(ge=1, description="Reasoning counts too.")
    stream: bool | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]] = Field(
        default=[], max_length=_MOST_STOPS, description="The answer, not the reasoning, ends before the first of them."
    )
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    metadata: Metadata | None = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, Hint("there is one tier")] = None
    container: Annotated[None, Refused("there are no containers here")] = None
    diagnostics: Annotated[None, Refused("it is not known why a prefix was not found")] = None
    inference_geo: Annotated[None, Refused("the model runs where this server does")] = None
    fallbacks: Annotated[None, Refused("there is one model here")] = None
    fallback_credit_token: Annotated[None, Refused("nothing is billed")] = None
    thread: Annotated[None, Refused("messages are not stored; send all of them")] = None
