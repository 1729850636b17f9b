"""`freehold mcp`: our tools for other programs that speak MCP, such as editors and desktop assistants."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from freehold.cli.options import Browse, PythonLimit, ToolFiles
from freehold.cli.terminal import say
from freehold.log import Progress


def command(
    browse: Browse = None,
    python: Annotated[bool, typer.Option("--python", help="Python in a sandbox without network.")] = False,
    python_limit: PythonLimit = None,
    tools: ToolFiles = None,
    patch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder whose files may be patched, without being asked.")
    ] = None,
) -> None:
    """Serve tools to other programs over MCP, on standard input and output.

    Folders are indexed before the first answer; a large one takes minutes the first time.

    \b
    freehold mcp --browse ~/notes --python
    freehold mcp --tools my_tools.py
    """
    import asyncio
    from contextlib import ExitStack, nullcontext

    from freehold.cli.terminal import only_answers_on_stdout, progress_bars
    from freehold.errors import UsageError
    from freehold.formats.tokenizer import Tokenizer
    from freehold.tools.kit import ToolChoices, local_tools
    from freehold.tools.mcp_server import serve_mcp

    choices = ToolChoices(
        browse=tuple(browse or ()),
        python=python or bool(python_limit),
        python_limits=tuple(python_limit or ()),
        functions=tuple(tools or ()),
        patch=patch,
    )
    if choices.is_empty:
        raise UsageError("there is nothing to serve; give --browse PATH, --python, --tools FILE or --patch DIR")
    # The model that will read pages is not known; its tokens are much like gpt-oss's.
    tokenizer = Tokenizer.o200k_harmony() if choices.browse else None
    with ExitStack() as opened:
        with progress_bars() if sys.stderr.isatty() else nullcontext(_lines()) as progress:
            kit = local_tools(choices, tokenizer=tokenizer, progress=progress, patch_form="json")
            with only_answers_on_stdout():  # files of functions are run, and may print
                offered = opened.enter_context(kit)
        asyncio.run(serve_mcp(offered))


def _lines() -> Progress:
    """A line for each tenth that is done: what clients keep as a log is no place for bars."""
    shown: dict[str, int] = {}

    def progress(label: str, done: int, total: int) -> None:
        tenths = 10 * done // max(total, 1)
        if shown.get(label) != tenths:
            shown[label] = tenths
            say(f"freehold: {label}: {10 * tenths} %")

    return progress
