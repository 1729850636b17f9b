"""The tools of one conversation, open: what the model is told of them, and who answers a call.

Whoever holds a conversation opens one for it, hands it to each of its turns (freehold.session.turn), and closes it with
the conversation. It runs nothing by itself.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack

from freehold.errors import UsageError
from freehold.formats.conversation import Tool, ToolNamespace
from freehold.formats.harmony.offer import FUNCTIONS
from freehold.tools import base
from freehold.tools.base import Citation, FunctionTools, ToolSession


class Toolbox:
    """Open sessions of some tools. For one event loop, and one turn at a time."""

    def __init__(
        self,
        builtins: Sequence[tuple[base.Tool, ToolSession]],
        functions: Sequence[tuple[FunctionTools, ToolSession]],
        opened: AsyncExitStack,
    ) -> None:
        """Made by `open`."""
        self._builtins = builtins
        self._functions = functions
        self._opened = opened

    @classmethod
    async def open(cls, tools: "Sequence[base.Tool | FunctionTools]") -> "Toolbox":
        """Raises UsageError where two have one name, and what a tool raises that cannot be opened; then none is."""
        builtins: list[tuple[base.Tool, ToolSession]] = []
        functions: list[tuple[FunctionTools, ToolSession]] = []
        async with AsyncExitStack() as opened:
            for tool in tools:
                session = await tool.open()
                opened.push_async_callback(session.aclose)
                if isinstance(tool, FunctionTools):
                    functions.append((tool, session))
                else:
                    builtins.append((tool, session))
            made = cls(builtins, functions, opened.pop_all())
        try:
            made._check_names()
        except BaseException:
            await made.aclose()
            raise
        return made

    def _check_names(self) -> None:
        names = [namespace.name for namespace in self.builtins]
        names += [f"{FUNCTIONS}.{function.name}" for function in self.functions]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"two tools are called {name}; give one of them another name")

    @property
    def builtins(self) -> tuple[ToolNamespace, ...]:
        """Tools with a namespace of their own."""
        return tuple(tool.namespace for tool, _ in self._builtins)

    @property
    def functions(self) -> tuple[Tool, ...]:
        """Tools among the functions, now; a server's may change between two turns."""
        return tuple(function for tools, _ in self._functions for function in tools.functions)

    def session(self, recipient: str) -> ToolSession | None:
        """Who answers a call to this recipient; None where that is nobody here."""
        space, _, name = recipient.partition(".")
        if space == FUNCTIONS:
            for tools, session in self._functions:
                if any(function.name == name for function in tools.functions):
                    return session
            return None
        return next((session for tool, session in self._builtins if tool.namespace.name == space), None)

    def citations(self, answer: str) -> tuple[Citation, ...]:
        """What of an answer refers to something that the tools have shown, in the order of the text."""
        sessions = (session for _, session in (*self._builtins, *self._functions))
        found = [citation for session in sessions for citation in session.citations(answer)]
        return tuple(sorted(found, key=lambda citation: citation.start))

    async def aclose(self) -> None:
        """Give back all that the tools hold for this conversation."""
        await self._opened.aclose()
