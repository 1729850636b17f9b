"""`apply_patch`: the model edits files, in the patch format that it was trained on.

    ApplyPatchTool(Path("project"), approve=ask_the_user)

A function of plain text; a model under a grammar can write nothing but a patch. Where a chat template knows only JSON
arguments, `form="json"`. What a patch would do is worked out and shown to `approve` as a diff before anything is
written; without one it is written at once. It is confined to its folder, and is carried out wholly or not at all
(`patch_files` says how, and what is refused). It does not read files for the model, nor run anything.
"""

import asyncio
import mimetypes
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from freehold.formats.conversation import Tool
from freehold.formats.forms import FreeText, Lark
from freehold.tools.base import KeepsNothing, ToolError, ToolFile, ToolResult, ToolSession
from freehold.tools.patch_files import PatchDirectory
from freehold.tools.patch_format import LARK, parse
from freehold.tools.patch_plan import Change, unified_diff

NAME = "apply_patch"
_DESCRIPTION = """\
Edits files with a patch: `*** Begin Patch`, then a section for each file, then `*** End Patch`. Paths are relative.
`*** Add File: PATH` and the new file's lines, each after a `+`.
`*** Delete File: PATH` and nothing.
`*** Update File: PATH`, where it is to be renamed `*** Move to: PATH`, then hunks.
A hunk begins with `@@`, or with `@@ ` and a line that stands above it, such as the head of a function or class. Then \
come lines after ` ` (as they are, about three before and after), `-` (to be removed) and `+` (to be inserted). Hunks \
follow the order of the file. `*** End of File` after a hunk says that the file ends there.
Either all of a patch is carried out or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposedPatch:
    """What the model would change in `directory`, and that as a unified diff."""

    directory: Path
    changes: tuple[Change, ...]
    diff: str


Approve = Callable[[ProposedPatch], Awaitable[bool]]


class ApplyPatchTool:
    """Patches for the files in one folder. Sessions share nothing but the folder."""

    def __init__(
        self,
        directory: Path,
        *,
        approve: Approve | None = None,
        dry_run: bool = False,
        form: Literal["grammar", "text", "json"] = "grammar",
    ) -> None:
        """With `dry_run` nothing is ever written, and the model is told what would have been. Raises UsageError where
        there is no such folder."""
        self._directory = PatchDirectory(directory)
        self._approve = approve
        self._dry_run = dry_run
        if form == "json":
            self._tool = Tool(
                name=NAME,
                description=f"{_DESCRIPTION}\n`input` is the whole patch.",
                parameters={"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]},
            )
        else:
            text_format = Lark(LARK) if form == "grammar" else FreeText()
            self._tool = Tool(name=NAME, description=_DESCRIPTION, text_format=text_format)

    @property
    def functions(self) -> tuple[Tool, ...]:
        return (self._tool,)

    async def open(self) -> ToolSession:
        """Undoes first what a killed process left half-done, unless nothing may be written. Raises ToolError where that
        cannot be."""
        if not self._dry_run:
            await _finished(self._directory.recover)
        return _Session(self._directory, self._approve, self._dry_run)


class _Session(KeepsNothing):
    def __init__(self, directory: PatchDirectory, approve: Approve | None, dry_run: bool) -> None:
        self._directory = directory
        self._approve = approve
        self._dry_run = dry_run

    async def call(self, name: str, arguments: str) -> ToolResult:
        if name.removeprefix("functions.") != NAME:
            raise ToolError(f"there is no tool {name}; call functions.{NAME}")
        proposed = await asyncio.to_thread(self._propose, arguments)
        if not proposed.changes:
            return ToolResult(text="The files are like that already; nothing was changed.")
        if self._dry_run:
            return ToolResult(text=f"Dry run: nothing was written. This would change:\n{_summary(proposed.changes)}")
        if self._approve is not None and not await self._approve(proposed):
            raise ToolError("The user does not want this change; nothing was changed. Ask what they want instead.")
        await _finished(lambda: self._directory.apply(proposed.changes))
        return ToolResult(
            text=f"Done. Changed files:\n{_summary(proposed.changes)}",
            files=tuple(
                ToolFile(
                    name=change.path,
                    path=self._directory.root / change.path,
                    media_type=mimetypes.guess_type(change.path)[0] or "text/plain",
                )
                for change in proposed.changes
                if change.after is not None
            ),
        )

    def _propose(self, text: str) -> ProposedPatch:
        changes = self._directory.plan(parse(text))
        return ProposedPatch(directory=self._directory.root, changes=changes, diff=unified_diff(changes))


async def _finished(work: Callable[[], object]) -> None:
    """Run it on a thread to its end: who is cancelled meanwhile waits for it, since files are being written."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({running})
        running.exception()
        raise


def _summary(changes: Sequence[Change]) -> str:
    moved = {change.moved_from for change in changes}
    return "\n".join(
        f"R {change.moved_from} -> {change.path}" if change.moved_from else f"{change.verb} {change.path}"
        for change in changes
        if change.after is not None or change.path not in moved
    )
