"""The tools that this server runs for its clients, where its operator switched them on: a browser, Python, MCP servers.

`prepare` makes them before anybody is served: sources are indexed, a sandbox is tried, files of functions are read.
`HostedTools.connect` reaches the MCP servers, on the event loop that serves. A client chooses among what is here and
adds nothing: no folder, no address, no server.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freehold.errors import UsageError
from freehold.formats.conversation import Tool as Function
from freehold.formats.tokenizer import Tokenizer
from freehold.log import Progress, no_progress
from freehold.serve.containers import Calls, Containers, Stoppable
from freehold.tools.base import FunctionTools, Tool
from freehold.tools.kit import ToolChoices, python_tool, sources_of
from freehold.tools.mcp_config import HttpServer, McpServer

if TYPE_CHECKING:
    from freehold.tools.browser.browser import Browser
    from freehold.tools.browser.content import Source
    from freehold.tools.mcp import McpTools

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class HostedServer:
    """Functions that clients ask for by a label, as they do for an MCP server's."""

    def __init__(self, label: str, tools: FunctionTools, *, url: str | None = None) -> None:
        """`url` is where the server is, if it is not on this machine."""
        self.label, self.url = label, url
        self._tools = tools

    @property
    def functions(self) -> "tuple[HostedFunction, ...]":
        """All of them, now."""
        return tuple(
            HostedFunction(
                name=tool.name,
                tool=replace(tool, name=self._prefix + tool.name),
                schema=tool.parameters or _NO_PARAMETERS,
            )
            for tool in self._tools.functions
        )

    @property
    def _prefix(self) -> str:
        return f"{self.label}__"

    def chosen(self, functions: "Sequence[HostedFunction]", calls: Calls) -> FunctionTools:
        """Those functions as tools of one turn."""
        return Stoppable(calls, tuple(function.tool for function in functions), self._tools, self._prefix)


class McpHostedServer(HostedServer):
    """An MCP server's functions, which have its name in front already."""

    def __init__(self, server: McpServer, tools: "McpTools") -> None:
        super().__init__(server.name, tools, url=server.url if isinstance(server, HttpServer) else None)
        self._mcp = tools

    @property
    def functions(self) -> "tuple[HostedFunction, ...]":
        return tuple(
            HostedFunction(name=offer.name, tool=offer.tool, schema=offer.schema, read_only=offer.read_only)
            for offer in self._mcp.offers
        )

    @property
    def _prefix(self) -> str:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedFunction:
    """One function: its `name` and `schema` for clients, the `tool` for the model. `read_only` is what its server says:
    that it changes nothing."""

    name: str
    tool: Function
    schema: Mapping[str, Any]
    read_only: bool = False


class HostedTools:
    """All that is switched on. `offline_browser` has those of the browser's sources that send nothing anywhere."""

    def __init__(
        self,
        *,
        browser: "Browser | None" = None,
        offline_browser: "Browser | None" = None,
        python: Tool | None = None,
        mcp: Sequence[McpServer] = (),
        files: Sequence[HostedServer] = (),
        containers: Containers | None = None,
    ) -> None:
        self.browser, self.offline_browser, self.python = browser, offline_browser, python
        self.containers = Containers() if containers is None else containers  # an empty one is false
        self.servers: dict[str, HostedServer] = {server.label: server for server in files}
        self._mcp = tuple(mcp)
        self._connected: list[McpTools] = []

    async def connect(self) -> None:
        """Start or reach the MCP servers. Raises BackendError for the first that cannot be used; then none runs on."""
        if not self._mcp:
            return
        from freehold.tools.mcp import McpTools

        try:
            for server in self._mcp:
                tools = await McpTools.connect([server])
                self._connected.append(tools)
                self.servers[server.name] = McpHostedServer(server, tools)
        except BaseException:
            await self._disconnect()
            raise

    async def stop(self) -> None:
        """End all calls that run, and whatever is kept between them."""
        await self.containers.aclose()

    async def aclose(self) -> None:
        """Give back all that is held, on the loop of `connect`."""
        await self.stop()
        await self._disconnect()
        for browser in (self.browser, self.offline_browser):
            if browser is not None:
                browser.close()

    async def _disconnect(self) -> None:
        while self._connected:
            await self._connected.pop().aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTools:
    """All that can be made ready before there is a model."""

    sources: "tuple[Source, ...]" = ()
    python: Tool | None = None
    mcp: tuple[McpServer, ...] = ()
    files: tuple[HostedServer, ...] = ()

    def hosted(self, tokenizer: Tokenizer, containers: Containers | None = None) -> HostedTools:
        """For a model with this tokenizer. Raises UsageError for sources that cannot be told apart."""
        browser = _browser(self.sources, tokenizer)
        local = [source for source in self.sources if source.local]
        return HostedTools(
            browser=browser,
            offline_browser=browser if len(local) == len(self.sources) else _browser(local, tokenizer),
            python=self.python,
            mcp=self.mcp,
            files=self.files,
            containers=containers,
        )


def prepare(
    choices: ToolChoices, *, no_network: bool = False, progress: Progress = no_progress
) -> PreparedTools | None:
    """What was chosen, None where that is nothing. Indexes folders, which takes time the first time.

    Raises UsageError for choices that lead to nothing or need a network that there is not, UnsupportedError for what
    cannot run here, DiskError where a folder cannot be indexed.
    """
    if choices.is_empty:
        return None
    servers = choices.servers
    if no_network:
        _check_offline(choices, servers)
    _check_labels([server.name for server in servers] + [_label(path) for path in choices.functions])
    files = tuple(_functions(path) for path in choices.functions)
    python = python_tool(choices) if choices.python else None
    return PreparedTools(sources=sources_of(choices, progress), python=python, mcp=servers, files=files)


def _check_offline(choices: ToolChoices, servers: Sequence[McpServer]) -> None:
    if choices.search is not None:
        raise UsageError("--search reaches the web, and --airgap closes the network; leave one of them out")
    for server in servers:
        if isinstance(server, HttpServer):
            raise UsageError(
                f"the MCP server {server.name!r} is at a URL, and --airgap closes the network; leave one of them out"
            )


def _check_labels(labels: Sequence[str]) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"two of --mcp and --tools go by the name {label!r}; give an MCP server another one with NAME=…, or "
                "rename the file"
            )


def _browser(sources: "Sequence[Source]", tokenizer: Tokenizer) -> "Browser | None":
    if not sources:
        return None
    from freehold.tools.browser.browser import Browser

    return Browser(sources=sources, tokenizer=tokenizer)


def _functions(path: Path) -> HostedServer:
    from freehold.tools.functions import load_tools

    return HostedServer(_label(path), load_tools(path))


def _label(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", path.stem)
