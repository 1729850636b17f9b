"""A built-in tool that says what it was called with; in a module of its own, so that a server imports no test."""

from collections.abc import Sequence
from pathlib import Path

from freehold.formats.conversation import ToolNamespace
from freehold.tools.base import Citation, ToolError, ToolFile, ToolResult, ToolSession


class Echo:
    """A built-in tool of the kind that takes code, and one with tools inside."""

    def __init__(self, namespace: ToolNamespace, picture: Path) -> None:
        self.namespace = namespace
        self.picture = picture
        self.closed = 0

    async def open(self) -> ToolSession:
        return self

    async def call(self, name: str, arguments: str) -> ToolResult:
        if arguments == "fail":
            raise ToolError("first line\nsecond line")
        files = (ToolFile(name="p.png", path=self.picture, media_type="image/png"),)
        return ToolResult(text=f"{name}({arguments})", files=files)

    def citations(self, answer: str) -> Sequence[Citation]:
        return ()

    async def aclose(self) -> None:
        self.closed += 1
