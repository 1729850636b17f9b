"""The tools that this server runs for its clients, where its operator switched them on: a browser, Python, MCP servers.

`prepare` makes them before anybody is served: sources are indexed, a sandbox is tried, files of functions are read.
`HostedTools.connect` reaches the MCP servers, on the event loop that serves. A client chooses among what is here and
adds nothing: no folder, no address, no server.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from freehold.errors import UsageError
from freehold.formats.conversation import Tool as Function
from freehold.formats.tokenizer import Tokenizer
from freehold.log import Progress, no_progress
from freehold.serve.containers import Calls, Containers, Stoppable
from freehold.tools.base import FunctionTools, Tool
from freehold.tools.mcp_config import HttpServer, McpServer

SearchService = Literal["exa", "you"]
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """What is switched on: folders and ZIM files to `browse`, a SearXNG server or a service to search the web by,
    Python, MCP servers, files of functions. Raises UsageError for what does not fit together."""

    browse: tuple[Path, ...] = ()
    search_url: str | None = None
    search: SearchService | None = None
    python: bool = False
    mcp: tuple[McpServer, ...] = ()
    functions: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.search_url is not None and self.search is not None:
            raise UsageError("--search-url and --search are two ways to search the web; give one of them")
        labels = [server.name for server in self.mcp] + [_label(path) for path in self.functions]
        for label in labels:
            if labels.count(label) > 1:
                raise UsageError(
                    f"two of --mcp and --tools go by the name {label!r}; give an MCP server another one with NAME=…, "
                    "or rename the file"
                )

    def check_offline(self) -> None:
        """Raises UsageError for what an air gap leaves nothing of."""
        if self.search_url is not None or self.search is not None:
            option = "--search-url" if self.search is None else "--search"
            raise UsageError(f"{option} searches the web, and --airgap closes the network; leave one of them out")
        for server in self.mcp:
            if isinstance(server, HttpServer):
                raise UsageError(
                    f"the MCP server {server.name!r} is at a URL, and --airgap closes the network; leave one out"
                )


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
            HostedFunction(name=tool.name, tool=_renamed(tool, self._prefix), schema=tool.parameters or _NO_PARAMETERS)
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

    def __init__(self, server: McpServer, tools: "Any") -> None:
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
        browser: Tool | None = None,
        offline_browser: Tool | None = None,
        python: Tool | None = None,
        mcp: Sequence[McpServer] = (),
        files: Sequence[HostedServer] = (),
        containers: Containers | None = None,
    ) -> None:
        self.browser, self.offline_browser, self.python = browser, offline_browser, python
        self.containers = containers or Containers()
        self.servers: dict[str, HostedServer] = {server.label: server for server in files}
        self._mcp = tuple(mcp)
        self._to_close: list[Any] = [each for each in (browser, offline_browser) if each is not None]
        self._connected: list[Any] = []

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
        for tool in {id(tool): tool for tool in self._to_close}.values():
            tool.close()
        self._to_close.clear()

    async def _disconnect(self) -> None:
        while self._connected:
            await self._connected.pop().aclose()


def prepare(
    options: ToolOptions,
    tokenizer: Tokenizer,
    *,
    containers: Containers | None = None,
    progress: Progress = no_progress,
) -> HostedTools | None:
    """What the options say, None where that is nothing. Indexes folders, which takes time the first time.

    Raises UsageError, UnsupportedError, BackendError and DiskError for what cannot be had.
    """
    if options == ToolOptions():
        return None
    python: Tool | None = None
    if options.python:
        from freehold.tools.python.tool import PythonTool

        python = PythonTool()
    browser, offline = _browsers(options, tokenizer, progress)
    return HostedTools(
        browser=browser,
        offline_browser=offline,
        python=python,
        mcp=options.mcp,
        files=[_functions(path) for path in options.functions],
        containers=containers,
    )


def _browsers(options: ToolOptions, tokenizer: Tokenizer, progress: Progress) -> "tuple[Any, Any]":
    """The browser, and the one that reaches nothing outside."""
    web = _web(options)
    if not options.browse and web is None:
        return None, None
    from freehold.tools.browser.browser import Browser
    from freehold.tools.browser.documents import Documents
    from freehold.tools.browser.zim import Zim

    sources: list[Any] = []
    for path in options.browse:
        if path.suffix == ".zim":
            sources.append(Zim(path))
        else:
            documents = Documents(path)
            documents.refresh(progress=progress)
            sources.append(documents)
    offline = Browser(sources=sources, tokenizer=tokenizer) if sources else None
    if web is None:
        return offline, offline
    return Browser(sources=[*sources, web], tokenizer=tokenizer), offline


def _web(options: ToolOptions) -> Any:
    if options.search_url is None and options.search is None:
        return None
    from freehold.tools.browser.engines import Exa, SearchEngine, Searxng, YouCom
    from freehold.tools.browser.web import Web

    engine: SearchEngine
    if options.search_url is not None:
        engine = Searxng(options.search_url)
    else:
        engine = Exa() if options.search == "exa" else YouCom()
    return Web(engine=engine)


def _functions(path: Path) -> HostedServer:
    from freehold.tools.functions import load_tools

    return HostedServer(_label(path), load_tools(path))


def _label(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", path.stem)


def _renamed(tool: Function, prefix: str) -> Function:
    return Function(
        name=prefix + tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
