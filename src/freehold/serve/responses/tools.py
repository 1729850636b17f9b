"""The tools of a request: what the model is told of them, whom it may call, what their calls are called on the wire.

Tools that OpenAI runs itself are run by the server here, where its operator has switched them on: hosted.py knows
which. Those that are not are left out of the prompt, with a warning, since clients send them always; a choice of one is
refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from freehold.errors import UsageError
from freehold.formats.conversation import Tool
from freehold.formats.forms import FreeText, Lark, Regex, TextFormat
from freehold.formats.harmony.grammar import AllowedTools, NamedTool, ToolChoice
from freehold.serve.errors import ApiError
from freehold.serve.hosted import HostedTools
from freehold.serve.responses.hosted import HOSTED, ChosenTools
from freehold.serve.responses.items import flat_name
from freehold.serve.responses.wire import (
    AllowedChoice,
    CustomTool,
    FunctionTool,
    GrammarInput,
    NamedChoice,
    NamespaceTool,
)
from freehold.serve.wire import read

MOST_TOOLS = 512


class ToolName(NamedTuple):
    """A tool as clients know it. `param` is where its schema stands in the request."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolset:
    """`offered` go into the prompt, `on_wire` into the Response object; `by_name` has them by what the model says.
    `hosted` are those that the server runs."""

    offered: tuple[Tool, ...]
    on_wire: tuple[dict[str, Any], ...]
    by_name: Mapping[str, ToolName]
    hosted: ChosenTools

    @property
    def warnings(self) -> tuple[str, ...]:
        left_out = tuple_of(self.hosted.left_out)
        return (*(f"{name} is not switched on here and was left out" for name in left_out), *self.hosted.warnings)

    def choice(self, given: str | Mapping[str, Any] | None, param: str = "tool_choice") -> ToolChoice:
        """Whom the model may call. Raises ApiError for tools that are not offered."""
        if given is None or isinstance(given, str):
            return self._mode(given or "auto", param)
        match given.get("type"):
            case "allowed_tools":
                allowed = read(AllowedChoice, given, param)
                return self._allowed(allowed, param)
            case "function" | "custom":
                return NamedTool(self._named(given, param))
            case kind if kind in HOSTED and (chosen := self.hosted.choice(given, param)) is not None:
                return chosen
        raise self._not_here(given.get("type"), f"{param}.type")

    def _mode(self, mode: str, param: str) -> ToolChoice:
        match mode:
            case "none" | "auto":
                return "none" if mode == "none" else "auto"
            case "required" if self.offered or self.hosted:
                return "required"
            case "required":
                raise ApiError(400, f"'{param}' is 'required', but no tools are offered.", param=param)
        raise ApiError(
            400, f"Invalid value for '{param}': {mode!r:.80} is none of none, auto and required.", param=param
        )

    def _allowed(self, allowed: AllowedChoice, param: str) -> ToolChoice:
        named: list[str] = []
        for at, tool in enumerate(allowed.tools):
            where = f"{param}.tools[{at}]"
            if tool.get("type") in HOSTED:
                hosted = self.hosted.recipients(tool, where)
                named += hosted
                if hosted or allowed.mode == "auto":
                    continue  # it is left out as it is from the tools
            named.append(self._named(tool, where))
        if not named:
            return "none"
        return AllowedTools(recipients=tuple_of(named), required=allowed.mode == "required")

    def _named(self, given: Mapping[str, Any], param: str) -> str:
        if given.get("type") not in ("function", "custom"):
            raise self._not_here(given.get("type"), f"{param}.type")
        chosen = read(NamedChoice, given, param)
        name = flat_name(chosen.namespace, chosen.name)
        inside = [known for known, tool in self.by_name.items() if tool.name == chosen.name]
        if chosen.namespace is None and name not in self.by_name and len(inside) == 1:
            name = inside[0]  # the SDK's choices have no field for its namespace
        if name not in self.by_name or self.by_name[name].kind != chosen.type:
            raise ApiError(400, f"The {chosen.type} {chosen.name!r} is not among the tools.", param=f"{param}.name")
        return f"functions.{name}"

    def _not_here(self, kind: Any, param: str) -> ApiError:
        if kind in HOSTED:
            return ApiError(
                400, f"The tool {kind!r} is not switched on here, so it cannot be chosen.", param=param,
                code="unsupported_parameter",
            )  # fmt: skip
        known = "function, custom and allowed_tools"
        return ApiError(400, f"Invalid value for '{param}': {kind!r:.80} is none of {known}.", param=param)


def tuple_of(names: Sequence[str]) -> tuple[str, ...]:
    """Each once, in order."""
    return tuple(dict.fromkeys(names))


def read_tools(given: Sequence[dict[str, Any]] | None, hosted: HostedTools | None = None) -> Toolset:
    """`hosted` are the tools that this server runs.

    Raises ApiError, with the field, for tools that are not understood or cannot be told apart.
    """
    if given and len(given) > MOST_TOOLS:
        raise ApiError(400, f"There are {len(given)} tools; send at most {MOST_TOOLS}.", param="tools")
    reader = _Reader(hosted)
    for at, raw in enumerate(given or ()):
        reader.read(raw, f"tools[{at}]")
    return Toolset(
        offered=tuple(reader.offered),
        on_wire=tuple(reader.on_wire),
        by_name=reader.by_name,
        hosted=reader.hosted,
    )


class _Reader:
    def __init__(self, hosted: HostedTools | None) -> None:
        self.offered: list[Tool] = []
        self.on_wire: list[dict[str, Any]] = []
        self.by_name: dict[str, ToolName] = {}
        self.hosted = ChosenTools(available=hosted)

    def read(self, raw: dict[str, Any], param: str) -> None:
        match raw.get("type"):
            case "namespace":
                space = read(NamespaceTool, raw, param)
                inside = [
                    self._tool(tool, f"{param}.tools[{at}]", space.name)
                    for at, tool in enumerate(space.tools)
                    if not self._is_left_out(tool)
                ]
                described = {"name": space.name, "description": space.description or "", "tools": inside}
                self.on_wire.append({"type": "namespace", **described})
            case kind if kind in HOSTED:
                if (shown := self.hosted.read(raw, param)) is not None:
                    self.on_wire.append(shown)
            case _:
                self.on_wire.append(self._tool(raw, param, None))

    def _is_left_out(self, raw: dict[str, Any]) -> bool:
        """Whether it is a hosted tool inside a namespace, where nobody offers any; remembered for the warning."""
        kind = raw.get("type")
        if kind not in HOSTED:
            return False
        if self.hosted.available is None:
            self.hosted.left_out.append(kind)
        else:
            self.hosted.warnings.append(f"{kind} stands inside a namespace, and was left out")
        return True

    def _tool(self, raw: dict[str, Any], param: str, namespace: str | None) -> dict[str, Any]:
        match raw.get("type"):
            case "function":
                return self._function(read(FunctionTool, raw, param), param, namespace)
            case "custom":
                return self._custom(read(CustomTool, raw, param), param, namespace)
            case None:
                raise ApiError(
                    400, f"Missing required parameter: '{param}.type'.", param=f"{param}.type",
                    code="missing_required_parameter",
                )  # fmt: skip
        known = ", ".join(("function", "custom", *(("namespace",) if namespace is None else ()), *HOSTED))
        message = f"Invalid value for '{param}.type': {raw['type']!r:.80} is none of {known}."
        raise ApiError(400, message, param=f"{param}.type")

    def _function(self, tool: FunctionTool, param: str, namespace: str | None) -> dict[str, Any]:
        strict = bool(tool.strict)
        self._offer("function", tool, param, namespace, parameters=tool.parameters, strict=strict)
        return {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": strict,
        }

    def _custom(self, tool: CustomTool, param: str, namespace: str | None) -> dict[str, Any]:
        self._offer("custom", tool, param, namespace, text_format=_text_format(tool))
        form = {"type": "text"} if tool.format is None else tool.format.model_dump()
        return {"type": "custom", "name": tool.name, "description": tool.description, "format": form}

    def _offer(
        self,
        kind: Literal["function", "custom"],
        tool: FunctionTool | CustomTool,
        param: str,
        namespace: str | None,
        **how: Any,
    ) -> None:
        name = flat_name(namespace, tool.name)
        if name in self.by_name:
            raise ApiError(400, f"Two tools are called {name!r}; each needs its own name.", param=f"{param}.name")
        schema = f"{param}.parameters" if kind == "function" else f"{param}.format"
        self.by_name[name] = ToolName(kind, tool.name, namespace, schema)
        try:
            self.offered.append(Tool(name=name, description=tool.description or "", **how))
        except UsageError as error:
            raise ApiError(400, str(error), param=param) from None


def _text_format(tool: CustomTool) -> TextFormat:
    if not isinstance(tool.format, GrammarInput):
        return FreeText()
    return Lark(tool.format.definition) if tool.format.syntax == "lark" else Regex(tool.format.definition)
