"""Any MCP server's tools as functions of ours.

    tools = await McpTools.connect([parse_server("uvx mcp-server-git"), *read_config(path)])
    ...
    await tools.aclose()

Each tool is offered as `SERVER__TOOL`, with the schema that its server gives. Where our grammar cannot hold a model to
that schema it is not strict, and the server checks. A connection serves all conversations, as clients of MCP do; it
belongs to the event loop that it was opened on. It is made anew, once for a call, where it is broken, or where a
server that did not answer a call in time answers nothing else either. A call during which the server died is repeated
only where the server says that repeating it does no harm.

A server started here gets PATH, HOME and a few more variables and what its config names, nothing else of this
environment: no keys and tokens. It is a program of the user's choice and runs with all of the user's rights. What
servers say is text for the model and never a control token, but it may lie to the model, as any text can. Servers are
not given what they may ask clients for: no sampling, no questions to the user, no folders.
"""

import asyncio
import json
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from freehold import __version__
from freehold.errors import BackendError, UsageError
from freehold.formats.conversation import Tool
from freehold.formats.harmony.typescript import typescript
from freehold.formats.schema import is_enforceable
from freehold.log import logger
from freehold.tools.base import KeepsNothing, ToolError, ToolResult, ToolSession, shortened
from freehold.tools.mcp_config import HttpServer, McpServer, StdioServer, function_name

if TYPE_CHECKING:
    import mcp
    import mcp_types

_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ")
_KEPT_COMPLAINTS = 2_000  # bytes of what a server last wrote to its standard error
_PLAIN = frozenset({"type", "properties", "required", "additionalProperties", "title", "description", "$schema"})
_PATIENCE = 10.0  # seconds for a server that did not answer a call to show that it lives
_HALF = re.compile("[\ud800-\udfff]")
_MAX_PAGES = 100
_MAX_TOOLS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class McpLimits:
    """Seconds that a server may take to start (the first time it may download itself), and over a call; characters of a
    result that the model is shown."""

    start_seconds: float = 60.0
    call_seconds: float = 120.0
    result_characters: int = 100_000

    def __post_init__(self) -> None:
        for name in ("start_seconds", "call_seconds", "result_characters"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be more than 0, got {getattr(self, name)!r}")


class McpTools:
    """The tools of some servers, as `tools.base.FunctionTools`."""

    def __init__(self, servers: "Sequence[_Server]") -> None:
        """Made by `connect`."""
        self._servers = servers

    @classmethod
    async def connect(cls, servers: Sequence[McpServer], limits: McpLimits | None = None) -> "McpTools":
        """Start or reach all servers and list their tools. Raises BackendError for the first that cannot be used, with
        what it said, and UsageError where two have one name; then none is left running."""
        _require_mcp()
        names = [server.name for server in servers]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two MCP servers are called {name!r}; give one another name with NAME=…")
        made = [_Server(server, limits or McpLimits()) for server in servers]
        try:
            outcomes = await asyncio.gather(*(server.start() for server in made), return_exceptions=True)
            if failed := next(filter(None, outcomes), None):
                raise failed
        except BaseException:
            await asyncio.gather(*(server.aclose() for server in made))
            raise
        return cls(made)

    @property
    def functions(self) -> tuple[Tool, ...]:
        return tuple(offered.tool for offered in self._offered().values())

    @property
    def offers(self) -> "tuple[McpOffer, ...]":
        """The same as the servers have them."""
        return tuple(
            McpOffer(
                name=offered.theirs.name,
                tool=offered.tool,
                schema=offered.theirs.input_schema,
                read_only=bool(offered.theirs.annotations and offered.theirs.annotations.read_only_hint),
            )
            for offered in self._offered().values()
        )

    async def open(self) -> ToolSession:
        return _Session(self)

    async def aclose(self) -> None:
        """End the connections, and the servers that were started."""
        await asyncio.gather(*(server.aclose() for server in self._servers))

    async def call(self, name: str, arguments: str) -> ToolResult:
        """For sessions: see `tools.base.ToolSession`."""
        found = self._offered().get(name.removeprefix("functions."))
        if found is None:
            raise ToolError(f"there is no tool {name}")
        try:
            values = json.loads(arguments.strip() or "{}")
        except (ValueError, RecursionError) as error:
            raise ToolError(f"the arguments of {name} are no JSON: {error}") from None
        if not isinstance(values, dict):
            raise ToolError(f"the arguments of {name} are a JSON object, got {arguments!r:.80}")
        if _HALF.search(json.dumps(values, ensure_ascii=False)):
            raise ToolError(f"the arguments of {name} have half a character in them, as \\ud800 is one")
        return await found.server.call(found.theirs, values)

    def _offered(self) -> "dict[str, _Offered]":
        offered: dict[str, _Offered] = {}
        for server in self._servers:
            for theirs, tool in server.tools:
                name, number = tool.name, 2
                while name in offered:
                    name, number = f"{tool.name}_{number}", number + 1
                offered[name] = _Offered(server, theirs, replace(tool, name=name))
        return offered


@dataclass(frozen=True, slots=True, kw_only=True)
class McpOffer:
    """A server's tool: its `name` there, the `schema` as the server has it, and whether the server says that it changes
    nothing; `tool` is how the model is told of it."""

    name: str
    tool: Tool
    schema: Mapping[str, Any]
    read_only: bool


@dataclass(frozen=True, slots=True)
class _Offered:
    server: "_Server"
    theirs: "mcp_types.Tool"
    tool: Tool


class _Session(KeepsNothing):
    """Connections are everybody's."""

    def __init__(self, tools: McpTools) -> None:
        self._tools = tools

    async def call(self, name: str, arguments: str) -> ToolResult:
        return await self._tools.call(name, arguments)


def _require_mcp() -> None:
    try:
        import mcp  # noqa: F401
    except ImportError:
        raise BackendError("MCP needs the package mcp; install it with: pip install 'freehold[mcp]'") from None
    log = logging.getLogger("mcp")
    if log.level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)  # a traceback for each line of a server that is none of the protocol's


# --- a server -----------------------------------------------------------------------------------------------


class _Server:
    """One server, over all its connections."""

    def __init__(self, server: McpServer, limits: McpLimits) -> None:
        self._server = server
        self._limits = limits
        self._link: _Link | None = None
        self._tools: tuple[tuple[mcp_types.Tool, Tool], ...] = ()
        self._connecting = asyncio.Lock()

    @property
    def tools(self) -> "tuple[tuple[mcp_types.Tool, Tool], ...]":
        """As the server calls them, and as we do. Between two connections, those of the last one."""
        if self._link is not None and not self._link.is_dead:
            self._tools = self._link.tools
        return self._tools

    async def start(self) -> None:
        await self._living(None)

    async def aclose(self) -> None:
        async with self._connecting:
            if self._link is not None:
                await self._link.aclose()

    async def call(self, theirs: "mcp_types.Tool", values: dict[str, Any]) -> ToolResult:
        hints = theirs.annotations
        is_repeatable = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)
        name = self._server.name
        try:
            link = await self._living(None)
            try:
                return await link.call(theirs.name, values)
            except _Died:
                link = await self._living(link)
                if not is_repeatable:
                    raise ToolError(
                        f"MCP server {name} died during this call and was started anew. Whether the call was carried "
                        "out is unknown: look before you repeat it."
                    ) from None
                return await link.call(theirs.name, values)
        except _Died:
            raise ToolError(f"MCP server {name} died during this call, and again when it was repeated") from None
        except BackendError as error:
            raise ToolError(str(error)) from None

    async def _living(self, dead: "_Link | None") -> "_Link":
        """The connection, made anew where there is none, where it is over, or where it is this `dead` one."""
        async with self._connecting:
            if self._link is not None:
                await self._link.settled()
            if self._link is None or self._link is dead or self._link.is_dead:
                if self._link is not None:
                    _ = self.tools  # keep what it offered, until the next one says
                    await self._link.aclose()
                self._link = _Link(self._server, self._limits)
                await self._link.open()
            return self._link


class _Died(Exception):  # noqa: N818 — no error of anybody's yet
    """The connection ended while an answer was awaited."""


class _Link:
    """One connection. A task of its own opens, holds and closes it, as the library's scopes want."""

    tools: "tuple[tuple[mcp_types.Tool, Tool], ...]"

    def __init__(self, server: McpServer, limits: McpLimits) -> None:
        self.tools = ()
        self._server = server
        self._limits = limits
        self._wake = asyncio.Event()
        self._is_closing = False
        self._is_dead = False
        self._settled = asyncio.Event()
        self._complaints = _Complaints(self._suspect) if isinstance(server, StdioServer) else None
        self._client: mcp.Client | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_dead(self) -> bool:
        return self._is_dead

    async def settled(self) -> None:
        """Until it is known whether it lives, where there was a doubt."""
        await self._settled.wait()

    async def open(self) -> None:
        """Raises BackendError, with what the server wrote to its standard error."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(opened), name=f"mcp {self._server.name}")
        try:
            async with asyncio.timeout(self._limits.start_seconds):
                await asyncio.shield(opened)
        except TimeoutError:
            await self._end()
            raise self._unusable(f"it did not answer within {self._limits.start_seconds:g} s") from None
        except BaseException as error:
            await self._end()
            if isinstance(error, Exception):
                raise self._unusable(_reason(error)) from None
            raise

    async def call(self, name: str, values: dict[str, Any]) -> ToolResult:
        """Raises ToolError, and _Died where the connection is over."""
        import anyio
        import mcp
        from mcp_types import REQUEST_TIMEOUT

        if self._client is None or self._is_dead:
            raise _Died
        try:
            result = await self._client.call_tool(name, values, read_timeout_seconds=self._limits.call_seconds)
        except mcp.MCPError as error:
            if error.code == REQUEST_TIMEOUT:
                self._suspect()  # whether it is only this call, or all of it
                raise ToolError(f"{name} did not answer within {self._limits.call_seconds:g} s") from None
            if _is_over(error):
                self._died()
                raise _Died from None
            raise ToolError(f"{name} failed: {error.message}") from None
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, ConnectionError):
            self._died()
            raise _Died from None
        except Exception as error:  # noqa: BLE001 — whatever a foreign server brings about, the model is told
            raise ToolError(f"{name} failed: {_reason(error)}") from None
        text = shortened(_text(result), self._limits.result_characters)
        if result.is_error:
            raise ToolError(text or f"{name} failed, and does not say why")
        return ToolResult(text=text)

    async def aclose(self) -> None:
        self._is_closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=10)
        await self._end()

    async def _end(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._complaints is not None:
            self._complaints.file.close()

    def _died(self) -> None:
        self._is_dead = True
        self._settled.set()
        self._wake.set()

    def _suspect(self) -> None:
        if not self._is_dead:
            self._settled.clear()
            self._wake.set()

    def _unusable(self, reason: str) -> BackendError:
        said = self._complaints.text() if self._complaints is not None else ""
        said = f"; it said: {said}" if said else ""
        return BackendError(f"MCP server {self._server.name} cannot be used: {reason}{said}")

    async def _hold(self, opened: "asyncio.Future[None]") -> None:
        try:
            async with self._connected() as client, _listening(client, self._wake.set):
                self._client = client
                await self._list(client)
                self._settled.set()
                opened.set_result(None)
                while True:
                    await self._wake.wait()
                    self._wake.clear()
                    if self._is_closing or self._is_dead:
                        break
                    await self._list_again(client)
        except Exception as error:  # noqa: BLE001 — told where it is awaited
            if not opened.done():
                opened.set_exception(error)
        finally:
            self._client = None
            self._died()
            if not opened.done():
                opened.cancel()

    @asynccontextmanager
    async def _connected(self) -> "AsyncIterator[mcp.Client]":
        import mcp
        from mcp_types import Implementation, ToolListChangedNotification

        async def changed(message: Any) -> None:
            if isinstance(message, ToolListChangedNotification):
                self._wake.set()

        async with (
            _transport(self._server, self._complaints) as transport,
            mcp.Client(
                transport,
                message_handler=changed,
                client_info=Implementation(name="freehold", version=__version__),
                read_timeout_seconds=self._limits.start_seconds,
                cache=None,
            ) as client,
        ):
            if self._complaints is not None:
                self._complaints.file.close()  # the server has its end; ours would keep the pipe open
            yield client

    async def _list_again(self, client: "mcp.Client") -> None:
        """Since its tools have changed, or to see whether it still answers."""
        import mcp

        try:
            async with asyncio.timeout(min(_PATIENCE, self._limits.start_seconds)):
                await self._list(client)
        except Exception as error:  # noqa: BLE001 — what it offered before is still there
            logger.info("MCP server %s does not list its tools: %s", self._server.name, _reason(error))
            if not isinstance(error, mcp.MCPError) or _is_over(error):
                self._died()
        self._settled.set()

    async def _list(self, client: "mcp.Client") -> None:
        found: list[mcp_types.Tool] = []
        cursor = None
        for _ in range(_MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None or len(found) > _MAX_TOOLS:
                break
        self.tools = tuple(_described(self._server.name, found[:_MAX_TOOLS]))


@asynccontextmanager
async def _transport(server: McpServer, complaints: "_Complaints | None") -> AsyncIterator[Any]:
    """What the library's client takes for a way to reach the server."""
    if isinstance(server, HttpServer):
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        timeout = httpx2.Timeout(30.0, read=None)  # calls have a limit of their own
        async with httpx2.AsyncClient(headers=dict(server.headers), timeout=timeout) as http:
            yield streamable_http_client(server.url, http_client=http)
        return
    assert complaints is not None
    yield _stdio(server, complaints)


def _stdio(server: StdioServer, complaints: "_Complaints") -> AbstractAsyncContextManager[Any]:
    from mcp.client.stdio import StdioServerParameters, stdio_client

    parameters = StdioServerParameters(
        command=server.command, args=list(server.args), env=environment(server.env), cwd=server.cwd
    )
    return stdio_client(parameters, errlog=complaints.file)


def environment(added: Mapping[str, str]) -> dict[str, str]:
    """What a server that is started here sees of the environment."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | dict(added)


@asynccontextmanager
async def _listening(client: "mcp.Client", changed: Callable[[], None]) -> AsyncIterator[None]:
    """While it is open, `changed` is called when the server's tools change. Older servers say so unasked."""
    tools = client.server_capabilities.tools
    if tools is None or not tools.list_changed:
        yield
        return

    async def listen() -> None:
        from mcp.client.subscriptions import ListenNotSupportedError

        with suppress(ListenNotSupportedError):
            async with client.listen(tools_list_changed=True) as events:
                async for _ in events:
                    changed()

    listening = asyncio.create_task(listen())
    try:
        yield
    finally:
        listening.cancel()
        await asyncio.wait({listening})
        if not listening.cancelled() and (error := listening.exception()) is not None:
            logger.info("changes of an MCP server's tools are not followed: %s", _reason(error))


class _Complaints:
    """The end of what a server writes to its standard error. `ended` is called where that is closed, which most likely
    is where the server has ended."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._kept = b""
        self._reader, writer = os.pipe()
        self.file = os.fdopen(writer, "w")
        self._thread = threading.Thread(target=self._read, name="mcp stderr", daemon=True)
        self._thread.start()

    def text(self) -> str:
        """What it said last, once it has ended."""
        self.file.close()
        self._thread.join(1.0)
        return self._kept.decode("utf-8", "replace").strip()

    def _read(self) -> None:
        with os.fdopen(self._reader, "rb", buffering=0) as file:
            while data := file.read(4096):
                self._kept = (self._kept + data)[-_KEPT_COMPLAINTS:]
        with suppress(RuntimeError):  # the loop has ended too
            self._loop.call_soon_threadsafe(self._ended)


# --- what is said -------------------------------------------------------------------------------------------


def _is_over(error: "mcp.MCPError") -> bool:
    """Whether the library says that the connection has ended. Servers use the same code for errors of their own."""
    from mcp_types import CONNECTION_CLOSED

    closed = error.code == CONNECTION_CLOSED and error.message == "Connection closed"
    return closed or "Session terminated" in error.message


def _described(server: str, tools: "Sequence[mcp_types.Tool]") -> "Iterator[tuple[mcp_types.Tool, Tool]]":
    for theirs in tools:
        schema = theirs.input_schema
        name = function_name(server, theirs.name)
        takes_nothing = (
            not schema.get("properties") and not schema.get("additionalProperties") and _PLAIN.issuperset(schema)
        )
        try:
            typescript(schema)
        except UsageError as error:  # nobody could be told what it takes
            logger.warning("MCP server %s: tool %s is left out: %s", server, theirs.name, error)
            continue
        yield (
            theirs,
            Tool(
                name=name,
                description=theirs.description or theirs.title or "",
                parameters=None if takes_nothing else schema,
                strict=is_enforceable(schema),
            ),
        )


def _text(result: "mcp_types.CallToolResult") -> str:
    """What the model is shown of a result."""
    parts = [_block(block) for block in result.content]
    if result.structured_content is not None and not any(block.type == "text" for block in result.content):
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _block(block: "mcp_types.ContentBlock") -> str:
    match block.type:
        case "text":
            return block.text
        case "image" | "audio":
            return f"[{block.type} of type {block.mime_type}, {len(block.data) * 3 // 4:,} bytes, not shown]"
        case "resource_link":
            return f"[resource {block.name}: {block.uri}]"
    resource = block.resource
    text = getattr(resource, "text", None)
    if text is not None:
        return f"[resource {resource.uri}]\n{text}"
    return f"[resource {resource.uri} of type {resource.mime_type or 'unknown'}, not shown]"


def _reason(error: BaseException) -> str:
    """The first real cause, in a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no {error.filename}"
    return str(getattr(error, "message", "") or error).strip() or type(error).__name__
