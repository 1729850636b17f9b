"""`freehold mcp`: our tools for other programs that speak MCP, such as editors and desktop assistants."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from freehold.tools.base import FunctionTools, Tool


def command(
    browse: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder to search and read. May be given again.")
    ] = None,
    python: Annotated[bool, typer.Option("--python", help="Python in a sandbox without network.")] = False,
    tools: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A Python file of functions. May be given again.")
    ] = None,
    patch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder whose files may be patched, without being asked.")
    ] = None,
) -> None:
    """Serve tools to other programs over MCP, on standard input and output.

    \b
    freehold mcp --browse ~/notes --python
    freehold mcp --tools my_tools.py
    """
    import asyncio

    from freehold.errors import UsageError
    from freehold.tools.mcp_server import serve_mcp

    offered = _tools(browse or [], python=python, functions=tools or [], patch=patch)
    if not offered:
        raise UsageError("there is nothing to serve; give --browse DIR, --python, --tools FILE or --patch DIR")
    asyncio.run(serve_mcp(offered))


def _tools(
    browse: list[Path], *, python: bool, functions: list[Path], patch: Path | None
) -> "list[Tool | FunctionTools]":
    from freehold.errors import UnsupportedError
    from freehold.tools.apply_patch import ApplyPatchTool
    from freehold.tools.functions import load_tools

    offered: list[Tool | FunctionTools] = []
    if browse or python:
        raise UnsupportedError("--browse and --python are not in this build; leave them out")
    offered += [load_tools(path) for path in functions]
    if patch is not None:
        offered.append(ApplyPatchTool(patch, form="json"))
    return offered
