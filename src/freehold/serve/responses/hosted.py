"""The hosted tools of a request: which of the server's own it asks for, and what they are while a turn uses them.

What is asked for is held against what the operator has switched on; what is not there is left out of the prompt, as
clients such as Codex always send `web_search`. A `Hosting` has the tools open for one turn: it goes on with the
container of the conversation, and gives it back when it is released.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from freehold.errors import NotFoundError
from freehold.formats.harmony.grammar import AllowedTools, NamedTool
from freehold.serve.containers import Lease
from freehold.serve.errors import ApiError, api_error
from freehold.serve.hosted import HostedFunction, HostedServer, HostedTools
from freehold.serve.responses.items import PRIVATE, Item
from freehold.serve.responses.wire import (
    CodeInterpreterTool,
    HostedChoice,
    McpChoice,
    McpFilter,
    McpTool,
    NewContainer,
    WebSearchTool,
)
from freehold.serve.wire import read
from freehold.session.toolbox import Toolbox
from freehold.tools import base
from freehold.tools.base import FunctionTools

SEARCHES = ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11")
HOSTED = (
    *SEARCHES,
    "code_interpreter",
    "file_search",
    "image_generation",
    "computer",
    "computer_use",
    "computer_use_preview",
    "mcp",
    "local_shell",
    "shell",
    "apply_patch",
    "tool_search",
    "programmatic_tool_calling",
)
_PYTHON = "python"
_SEARCHES_OF_ONE = ("search", "open", "find")


class HostedName(NamedTuple):
    """Whose call it is, on the wire; `label` and `name` are an MCP server's."""

    kind: Literal["web_search", "code_interpreter", "mcp"]
    label: str = ""
    name: str = ""


class ChosenServer(NamedTuple):
    """Those of a server's functions that a request may use."""

    server: HostedServer
    functions: tuple[HostedFunction, ...]


@dataclass(slots=True, kw_only=True)
class ChosenTools:
    """What a request asks for, of what there is. `left_out` says what is not, in words for the client."""

    available: HostedTools | None
    browser: base.Tool | None = None
    python: base.Tool | None = None
    container: str | None = None
    container_param: str = ""
    servers: list[ChosenServer] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.browser is not None or self.python is not None or bool(self.servers)

    # --- reading ------------------------------------------------------------------------------------------------

    def read(self, raw: Mapping[str, Any], param: str) -> Item | None:
        """One of the tools in HOSTED as it stands in the Response object; None where it is left out. Raises ApiError
        for options that cannot be kept to."""
        kind, there = raw["type"], self.available
        if there is not None:
            if kind in SEARCHES and there.browser is not None:
                return self._search(read(WebSearchTool, raw, param), there)
            if kind == "code_interpreter" and there.python is not None:
                return self._code_interpreter(read(CodeInterpreterTool, raw, param), there, param)
            if kind == "mcp" and there.servers:
                return self._mcp(read(McpTool, raw, param), there, param)
        self.left_out.append(kind)
        return None

    def _search(self, tool: WebSearchTool, there: HostedTools) -> Item | None:
        browser = there.offline_browser if tool.external_web_access is False else there.browser
        if browser is None:
            self.warnings.append(f"{tool.type} has only the web to search here, and was left out")
            return None
        if self.browser is None or tool.external_web_access is False:
            self.browser = browser
        if tool.user_location is not None:
            self.warnings.append(f"{tool.type}: the sources here know no places, so user_location changed nothing")
        location = None if tool.user_location is None else {**tool.user_location.model_dump(), "type": "approximate"}
        size = tool.search_context_size or "medium"
        shown: Item = {"type": tool.type, "search_context_size": size, "user_location": location}
        if tool.type in SEARCHES[:2]:
            shown["filters"] = None
        return shown

    def _code_interpreter(self, tool: CodeInterpreterTool, there: HostedTools, param: str) -> Item:
        shown: Any = tool.container
        if isinstance(tool.container, str):
            if self.container not in (None, tool.container):
                raise ApiError(400, "Python runs in one container; name one.", param=f"{param}.container")
            self.container, self.container_param = tool.container, f"{param}.container"
        else:
            read(NewContainer, tool.container, f"{param}.container")
            shown = {"type": "auto", "file_ids": []}
        self.python = there.python
        return {"type": tool.type, "container": shown}

    def _mcp(self, tool: McpTool, there: HostedTools, param: str) -> Item:
        server = there.servers.get(tool.server_label)
        if server is None:
            known = ", ".join(there.servers)
            message = f"There is no MCP server {tool.server_label!r:.80} here; this server has {known}."
            raise ApiError(400, message, param=f"{param}.server_label")
        if tool.server_url is not None and tool.server_url != server.url:
            message = (
                f"The MCP server {server.label!r} is another one here than at this address, and no other is connected "
                "to; leave 'server_url' out."
            )
            raise ApiError(400, message, param=f"{param}.server_url", code="unsupported_parameter")
        if any(chosen.server is server for chosen in self.servers):
            raise ApiError(400, f"{server.label!r} is there twice; name it once.", param=f"{param}.server_label")
        functions = _allowed(server, tool, param)
        self.servers.append(ChosenServer(server, functions))
        allowed = tool.allowed_tools
        return {
            "type": "mcp",
            "server_label": server.label,
            "server_description": tool.server_description,
            "allowed_tools": allowed.model_dump() if isinstance(allowed, McpFilter) else allowed,
            "require_approval": "never",
            **({} if tool.server_url is None else {"server_url": tool.server_url}),
        }

    # --- choosing -----------------------------------------------------------------------------------------------

    def choice(self, given: Mapping[str, Any], param: str) -> NamedTool | AllowedTools | None:
        """Whom a choice of one of these tools means; None where it was not asked for."""
        recipients = self.recipients(given, param)
        if not recipients:
            return None
        if given["type"] == "mcp" and "name" not in given:
            return AllowedTools(recipients=recipients, required=True)
        return NamedTool(recipients[0])

    def recipients(self, given: Mapping[str, Any], param: str) -> tuple[str, ...]:
        """All that may be called where one of these tools may be; none where it was not asked for."""
        kind = given["type"]
        if kind == "mcp":
            return self._of_server(read(McpChoice, given, param), param)
        read(HostedChoice, given, param)
        if kind in SEARCHES and self.browser is not None:
            return tuple(f"{self.browser.namespace.name}.{name}" for name in _SEARCHES_OF_ONE)
        return (_PYTHON,) if kind == "code_interpreter" and self.python is not None else ()

    def _of_server(self, choice: McpChoice, param: str) -> tuple[str, ...]:
        server = next((each for each in self.servers if each.server.label == choice.server_label), None)
        if server is None:
            return ()
        found = tuple(
            f"functions.{function.tool.name}" for function in server.functions if choice.name in (None, function.name)
        )
        if not found:
            message = f"{choice.server_label!r} offers no tool {choice.name or ''!r:.80} to this request."
            raise ApiError(400, message, param=f"{param}.name")
        return found

    @property
    def names(self) -> dict[str, HostedName]:
        """What calls are on the wire, by their recipients."""
        names: dict[str, HostedName] = {}
        if self.browser is not None:
            space = self.browser.namespace.name
            names |= {f"{space}.{name}": HostedName("web_search") for name in _SEARCHES_OF_ONE}
        if self.python is not None:
            names[_PYTHON] = HostedName("code_interpreter")
        for server, functions in self.servers:
            names |= {
                f"functions.{function.tool.name}": HostedName("mcp", server.label, function.name)
                for function in functions
            }
        return names

    def lists(self, history: Sequence[Item]) -> list[Item]:
        """Of each server that the conversation has no list of yet, what it offers: items without ids."""
        known = {item["server_label"] for item in history if item["type"] == "mcp_list_tools"}
        return [
            {
                "type": "mcp_list_tools",
                "server_label": server.label,
                "tools": [_listed(function) for function in functions],
                "error": None,
            }
            for server, functions in self.servers
            if server.label not in known
        ]


def _allowed(server: HostedServer, tool: McpTool, param: str) -> tuple[HostedFunction, ...]:
    given = tool.allowed_tools
    functions = server.functions
    names = given.tool_names if isinstance(given, McpFilter) else given
    where = f"{param}.allowed_tools" + (".tool_names" if isinstance(given, McpFilter) else "")
    for at, name in enumerate(names or ()):
        if not any(function.name == name for function in functions):
            message = f"The MCP server {server.label!r} has no tool {name!r:.80}."
            raise ApiError(400, message, param=f"{where}[{at}]")
    if names is not None:
        functions = tuple(function for function in functions if function.name in names)
    if isinstance(given, McpFilter) and given.read_only is not None:
        functions = tuple(function for function in functions if function.read_only == given.read_only)
    return functions


def _listed(function: HostedFunction) -> dict[str, Any]:
    return {
        "name": function.name,
        "description": function.tool.description,
        "input_schema": dict(function.schema),
        "annotations": {"read_only": function.read_only},
    }


class Hosting:
    """The hosted tools of one turn, open. `toolbox` is for the turn."""

    def __init__(self, toolbox: Toolbox, lease: Lease | None, names: Mapping[str, HostedName], browser: str) -> None:
        """Made by `open`; `browser` is what the container knows it as."""
        self.toolbox, self.names = toolbox, names
        self._lease, self._browser = lease, browser

    @classmethod
    async def open(cls, chosen: ChosenTools, owner: str, items: Sequence[Item]) -> "Hosting":
        """For a turn that goes on from these items. Raises ApiError for a container that is not there."""
        there = chosen.available
        assert there is not None
        lease: Lease | None = None
        browser = "browser" if chosen.browser is there.browser else "offline browser"
        tools: list[base.Tool | FunctionTools] = []
        if chosen.browser is not None or chosen.python is not None:
            try:
                lease = there.containers.lease(owner, exact=chosen.container, wanted=_last_container(items))
            except NotFoundError as error:
                raise api_error(error, param=chosen.container_param) from None
        try:
            if lease is not None and chosen.browser is not None:
                tools.append(lease.tool(browser, chosen.browser))
            if lease is not None and chosen.python is not None:
                tools.append(lease.tool("python", chosen.python))
            tools += [server.chosen(functions, there.containers.calls) for server, functions in chosen.servers]
            return cls(await Toolbox.open(tools), lease, chosen.names, browser)
        except BaseException:
            if lease is not None:
                lease.release()
            raise

    @property
    def container_id(self) -> str:
        return "" if self._lease is None else self._lease.id

    def address(self, recipient: str, arguments: str) -> str:
        """Of the page that a call of the browser is about; "" where that is not known before the call."""
        session = self._browsing()
        return "" if session is None else str(session.address(recipient, arguments))

    def links(self) -> list[str]:
        """Of the page that the browser showed last."""
        session = self._browsing()
        return [] if session is None else [*dict.fromkeys(session.links())]

    def _browsing(self) -> Any:
        return None if self._lease is None else self._lease.container.sessions.get(self._browser)

    def remember(self, name: str, said: Mapping[str, Any]) -> None:
        """What the call with this item's id said, for a client who sends the item back without it."""
        if self._lease is not None:
            self._lease.container.remember(name, said)

    def release(self) -> None:
        """The turn is over."""
        if self._lease is not None:
            self._lease.release()


def _last_container(items: Sequence[Item]) -> str | None:
    for item in reversed(items):
        found = item.get("container_id") or item.get(PRIVATE, {}).get("container")
        if found:
            return str(found)
    return None
