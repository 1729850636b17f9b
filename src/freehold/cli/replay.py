"""`freehold replay`: a recorded conversation again, as it was."""

from pathlib import Path
from typing import Annotated

import typer

from freehold.cli import terminal


def command(
    recording: Annotated[Path, typer.Argument(metavar="FILE", help="What `freehold chat --record` has written.")],
) -> None:
    """Show a recorded conversation again: questions, reasoning, calls, what they gave, answers. Nothing is run.

    \b
    freehold chat --record roof.jsonl --browse ~/notes "What did we decide about the roof?"
    freehold replay roof.jsonl
    """
    from freehold.cli.screen import Screen
    from freehold.session.record import read_recording
    from freehold.session.turn import ToolDone

    screen = Screen(cites=True)
    for turn in read_recording(recording):
        for message in turn.asked:
            prefix = "> " if message.role == "user" else f"{message.role}: "
            terminal.say(terminal.harmless_aside(prefix + message.text))
        for event in turn.events:
            screen.show(event)
            for file in event.files if isinstance(event, ToolDone) else ():
                screen.note(f"file: {terminal.harmless_aside(file.name)}")
        screen.close(finished=turn.is_complete)
        if not turn.is_complete:
            terminal.say("(stopped here)")
