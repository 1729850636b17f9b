"""The `freehold` command. Each subcommand is a file beside this one and imports what is heavy only when it runs."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from freehold import __version__
from freehold.cli import (
    bench,
    cache,
    chat,
    convert,
    doctor,
    generate,
    harmony,
    inspect,
    keys,
    mcp,
    merge,
    pack,
    receipt,
    replay,
    serve,
    synth,
    terminal,
    tune,
)
from freehold.errors import FreeholdError, UsageError
from freehold.log import NOTICE

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="freehold",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, and so answers twice as fast
    context_settings=HELP_OPTIONS,
)
_COMMANDS = (
    chat, replay, serve, mcp, generate, tune, merge, inspect, bench, receipt, convert, synth, pack, doctor,
)  # fmt: skip
for module in _COMMANDS:
    app.command(module.__name__.rpartition(".")[2])(module.command)
app.add_typer(harmony.app, name="harmony", context_settings=HELP_OPTIONS)
app.add_typer(cache.app, name="cache", context_settings=HELP_OPTIONS)
app.add_typer(keys.app, name="keys", context_settings=HELP_OPTIONS)


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.write(f"freehold {__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say which kernels run, and how fast.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run, inspect, adapt and deploy gpt-oss on hardware you own.

    \b
    freehold chat "What is the capital of France?"
    freehold chat                      a conversation
    freehold serve                     the same for clients of OpenAI's API
    freehold tune chats.jsonl -o DIR   teach it by examples
    freehold inspect default           what the model is made of
    freehold doctor                    what runs on this machine
    """
    terminal.start_logging(logging.INFO if verbose else NOTICE)


def main() -> None:
    """Entry point: typed errors become one line on stderr, never a traceback."""
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 — open for as long as the process
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # a character that the terminal's encoding lacks is no reason to stop
            output.reconfigure(errors="replace")
    try:
        app()
    except OSError as error:
        terminal.say(f"error: {error.filename or 'the output'}: {error.strerror or error}")
        sys.exit(1)
    except FreeholdError as error:
        terminal.say(f"error: {error}")
        sys.exit(2 if isinstance(error, UsageError) else 1)
