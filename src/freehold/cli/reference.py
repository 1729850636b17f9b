"""Writes docs/cli.md from the commands themselves: `python -m freehold.cli.reference > docs/cli.md`."""

import sys
from collections.abc import Iterator

from typer.testing import CliRunner

from freehold.cli.main import app


def render() -> str:
    """The whole page, in Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# The command line\n"
    yield "Generated from `--help` by `python -m freehold.cli.reference`. The answer goes to stdout, everything else to"
    yield "stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.\n"
    yield from _section()
    for command in app.registered_commands:
        assert command.name is not None
        yield from _section(command.name)
    for group in app.registered_groups:
        assert group.name is not None
        assert group.typer_instance is not None
        yield from _section(group.name)
        for command in group.typer_instance.registered_commands:
            assert command.name is not None
            yield from _section(group.name, command.name)


def _section(*command: str) -> Iterator[str]:
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="freehold", terminal_width=100)
    yield f"## {' '.join(('freehold', *command))}\n\n```text\n{shown.output.rstrip()}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(render())
