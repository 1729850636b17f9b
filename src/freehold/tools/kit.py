"""The tools that a command's options switch on: for the terminal, the server and MCP alike.

    with local_tools(choices, tokenizer=tokenizer) as tools:
        async with mcp_tools(choices) as more: ...

What cannot be had (a folder that is not there, a sandbox that this machine does not allow, an MCP server that does not
start, a missing key) is an error before anything runs. Nothing is on that was not asked for.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from freehold.formats.tokenizer import Tokenizer
from freehold.log import Progress, no_progress
from freehold.tools.base import FunctionTools, Tool
from freehold.tools.mcp_config import HttpServer, McpServer, parse_server, read_config

if TYPE_CHECKING:
    from freehold.tools.apply_patch import Approve
    from freehold.tools.python import PythonTool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoices:
    """`browse` are folders and ZIM files, `search` who searches the web: exa, you, or the URL of a SearXNG.
    `python_limits` are texts such as `seconds=300`, `functions` Python files, `patch` is the folder whose files may be
    changed, or with `dry_run` are only said to be. `mcp` are commands and URLs, `mcp_config` are files of them."""

    browse: tuple[Path, ...] = ()
    search: str | None = None
    python: bool = False
    python_limits: tuple[str, ...] = ()
    functions: tuple[Path, ...] = ()
    patch: Path | None = None
    dry_run: bool = False
    mcp: tuple[str, ...] = ()
    mcp_config: tuple[Path, ...] = ()

    @property
    def is_empty(self) -> bool:
        return self == ToolChoices()

    @property
    def needs_network(self) -> bool:
        """Whether a tool of ours connects to anybody. What MCP servers do that are started here is their own affair."""
        return self.search is not None or any(isinstance(server, HttpServer) for server in self.servers)

    @property
    def servers(self) -> tuple[McpServer, ...]:
        """The MCP servers. Raises UsageError and UnsupportedError for what is none, or a file that cannot be read."""
        given = [parse_server(text) for text in self.mcp]
        return (*given, *(server for path in self.mcp_config for server in read_config(path)))


def python_tool(choices: ToolChoices) -> "PythonTool":
    """As it was chosen. Raises UsageError for limits that are none, UnsupportedError where there can be no sandbox."""
    from freehold.tools.python import PythonTool, read_limits

    return PythonTool(**read_limits(choices.python_limits))  # type: ignore[arg-type] # they are of the fields' types


@contextmanager
def local_tools(
    choices: ToolChoices,
    *,
    tokenizer: Tokenizer | None,
    progress: Progress = no_progress,
    approve_patch: "Approve | None" = None,
    patch_form: Literal["grammar", "text", "json"] = "grammar",
) -> Iterator[tuple[Tool | FunctionTools, ...]]:
    """All but MCP's, until the end of the block; folders are indexed first, on this thread. `tokenizer` is that of the
    model which reads pages, None where nothing is browsed; `approve_patch` is asked before files are changed.

    Raises UsageError for choices that lead to nothing, UnsupportedError for what cannot run here, DiskError where a
    folder cannot be indexed.
    """
    tools: list[Tool | FunctionTools] = []
    with ExitStack() as opened:
        if choices.python:
            tools.append(python_tool(choices))
        if choices.functions:
            from freehold.tools.functions import load_tools

            tools += [load_tools(path) for path in choices.functions]
        if choices.patch is not None:
            from freehold.tools.apply_patch import ApplyPatchTool

            patches = ApplyPatchTool(choices.patch, approve=approve_patch, dry_run=choices.dry_run, form=patch_form)
            tools.append(patches)
        if choices.browse or choices.search is not None:
            from freehold.tools.browser.browser import Browser
            from freehold.tools.browser.sources import open_sources

            assert tokenizer is not None
            sources = open_sources(choices.browse, web=choices.search, progress=progress)
            browser = Browser(sources=sources, tokenizer=tokenizer)
            opened.callback(browser.close)
            tools.append(browser)
        yield tuple(tools)


@asynccontextmanager
async def mcp_tools(choices: ToolChoices) -> AsyncIterator[tuple[FunctionTools, ...]]:
    """Those of MCP servers, connected until the end of the block.

    Raises UsageError and UnsupportedError for what is no server, BackendError for one that cannot be used.
    """
    if not (choices.mcp or choices.mcp_config):
        yield ()
        return
    from freehold.tools.mcp import McpTools

    connected = await McpTools.connect(choices.servers)
    try:
        yield (connected,)
    finally:
        await connected.aclose()
