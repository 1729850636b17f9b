"""Our tools for other programs: an MCP server over standard input and output.

Each tool has one session for the one client that stdio has, opened at its first call, and does one call at a time; a
call that the client cancels is cancelled. Built-in tools go by their own names (`browser_search`, `python`), code for
them as an argument `code`, plain text for functions as `input`. Files that a call made are links to where they lie;
small images are sent. It asks nobody before a call: that is the client's part.
"""

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from freehold import __version__
from freehold.errors import BackendError, FreeholdError, UsageError
from freehold.formats import conversation
from freehold.tools.base import FunctionTools, Tool, ToolError, ToolFile, ToolResult, ToolSession

if TYPE_CHECKING:
    import mcp_types

_MAX_IMAGE_BYTES = 4 * 2**20
_SECONDS_TO_CLOSE = 10


@dataclass(slots=True)
class _Source:
    """A tool and its session, once it has one."""

    tool: Tool | FunctionTools
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    session: ToolSession | None = None

    async def call(self, recipient: str, text: str) -> ToolResult:
        async with self.turn:
            if self.session is None:
                self.session = await self.tool.open()
            return await self.session.call(recipient, text)

    async def aclose(self) -> None:
        if self.session is not None:
            await self.session.aclose()


@dataclass(frozen=True, slots=True)
class _Entry:
    """Something to be called. `argument` is the one whose text is sent as it is; None where all go as JSON."""

    source: _Source
    recipient: str
    tool: conversation.Tool
    argument: str | None


async def serve_mcp(tools: Sequence[Tool | FunctionTools], *, name: str = "freehold") -> None:
    """Serve these tools on this process's standard input and output until the client goes away. Whatever they print
    goes to standard error. SIGINT and SIGTERM close the sessions and end the process.

    Raises BackendError without the package mcp, UsageError where two tools have one name.
    """
    try:
        from mcp.server.lowlevel import Server
        from mcp.server.stdio import stdio_server
    except ImportError:
        raise BackendError("MCP needs the package mcp; install it with: pip install 'freehold[mcp]'") from None
    import mcp_types

    sources = [_Source(tool) for tool in tools]
    _entries(sources)

    async def list_tools(context: Any, parameters: Any) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=[_listed(name, entry) for name, entry in _entries(sources).items()])

    async def call_tool(context: Any, parameters: mcp_types.CallToolRequestParams) -> mcp_types.CallToolResult:
        return await _called(_entries(sources).get(parameters.name), parameters)

    about = "\n\n".join(
        tool.namespace.description for tool in tools if not isinstance(tool, FunctionTools) and tool.namespace.tools
    )
    server = Server(
        name, version=__version__, instructions=about or None, on_list_tools=list_tools, on_call_tool=call_tool
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _leave, sources, number)
    async with AsyncExitStack() as stack:
        for source in sources:
            stack.push_async_callback(source.aclose)
        read, write = await stack.enter_async_context(stdio_server())
        stack.enter_context(redirect_stdout(sys.stderr))  # what is still in its buffer at the end is not for the client
        await server.run(read, write, server.create_initialization_options())


_leaving: set[asyncio.Task[None]] = set()


def _leave(sources: Sequence[_Source], number: int) -> None:
    """End at once: a thread of the library's waits for standard input, and nothing can wake it."""

    async def leave() -> None:
        with suppress(Exception):
            async with asyncio.timeout(_SECONDS_TO_CLOSE):
                await asyncio.gather(*(source.aclose() for source in sources), return_exceptions=True)
        os._exit(128 + number)

    _leaving.add(asyncio.get_running_loop().create_task(leave()))


def _entries(sources: Sequence[_Source]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for source in sources:
        for name, entry in _entries_of(source):
            if name in entries:
                raise UsageError(f"two tools are called {name!r}; serve them apart")
            entries[name] = entry
    return entries


def _entries_of(source: _Source) -> list[tuple[str, _Entry]]:
    tool = source.tool
    if isinstance(tool, FunctionTools):
        return [
            (f.name, _Entry(source, f"functions.{f.name}", f, None if f.text_format is None else "input"))
            for f in tool.functions
        ]
    space = tool.namespace
    if not space.tools:
        alone = conversation.Tool(name=space.name, description=space.description)
        return [(space.name, _Entry(source, space.name, alone, "code"))]
    return [(f"{space.name}_{t.name}", _Entry(source, f"{space.name}.{t.name}", t, None)) for t in space.tools]


def _listed(name: str, entry: _Entry) -> "mcp_types.Tool":
    import mcp_types

    schema: dict[str, Any]
    if entry.argument is not None:
        schema = {"type": "object", "properties": {entry.argument: {"type": "string"}}, "required": [entry.argument]}
    else:
        schema = {"type": "object", **(entry.tool.parameters or {"properties": {}})}
    return mcp_types.Tool(name=name, description=entry.tool.description, input_schema=schema)


async def _called(entry: _Entry | None, parameters: "mcp_types.CallToolRequestParams") -> "mcp_types.CallToolResult":
    import mcp_types

    try:
        if entry is None:
            raise ToolError(f"there is no tool {parameters.name}")
        values = parameters.arguments or {}
        text: Any = json.dumps(values, ensure_ascii=False)
        if entry.argument is not None:
            text = values.get(entry.argument)
            if not isinstance(text, str) or len(values) > 1:
                raise ToolError(f"{parameters.name} takes one argument, {entry.argument}, a text")
        result = await entry.source.call(entry.recipient, text)
        content: list[Any] = [mcp_types.TextContent(text=result.text), *map(_file, result.files)]
        return mcp_types.CallToolResult(content=content)
    except FreeholdError as error:
        return mcp_types.CallToolResult(content=[mcp_types.TextContent(text=str(error))], is_error=True)


def _file(file: ToolFile) -> "mcp_types.ContentBlock":
    import mcp_types

    with suppress(OSError):  # gone by now: then a link says where it was
        if file.media_type.startswith("image/") and file.path.stat().st_size <= _MAX_IMAGE_BYTES:
            data = base64.b64encode(file.path.read_bytes()).decode("ascii")
            return mcp_types.ImageContent(data=data, mime_type=file.media_type)
    return mcp_types.ResourceLink(name=file.name, uri=file.path.absolute().as_uri(), mime_type=file.media_type)
