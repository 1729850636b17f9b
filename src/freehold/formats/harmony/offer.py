"""What a turn offers the model: whom it may call, and on which channel. Shared by renderer, parser and grammar."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from freehold.errors import UsageError
from freehold.formats.conversation import Channel, Conversation, DeveloperContent, SystemContent, Tool, ToolNamespace

FUNCTIONS = "functions"
"""The namespace of the caller's own tools."""

FUNCTION_CHANNEL: Channel = "commentary"
BUILTIN_CHANNEL: Channel = "analysis"


@dataclass(frozen=True, slots=True, kw_only=True)
class Callee:
    """Somebody to be called, under the full name that stands after `to=`. `tool` is None for a built-in tool that has
    none inside, and is sent code."""

    recipient: str
    channel: Channel
    tool: Tool | None

    @property
    def is_function(self) -> bool:
        return self.recipient.startswith(f"{FUNCTIONS}.")

    @property
    def takes_json(self) -> bool:
        """Whether JSON arguments are sent, and not code or plain text."""
        return self.tool is not None and self.tool.text_format is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """All callees of a turn, by recipient; in the order in which they are described to the model."""

    functions: tuple[Tool, ...] = ()
    builtins: tuple[ToolNamespace, ...] = ()
    callees: Mapping[str, Callee] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        callees: dict[str, Callee] = {}
        for callee in self._list():
            if callee.recipient in callees:
                raise UsageError(f"two tools are called {callee.recipient!r}; each needs its own name")
            callees[callee.recipient] = callee
        object.__setattr__(self, "callees", callees)

    def _list(self) -> Iterable[Callee]:
        for namespace in self.builtins:
            if namespace.name == FUNCTIONS:
                raise UsageError(f"a built-in tool cannot be called {FUNCTIONS!r}; that is where functions are")
            if not namespace.tools:
                yield Callee(recipient=namespace.name, channel=BUILTIN_CHANNEL, tool=None)
            for tool in namespace.tools:
                yield Callee(recipient=f"{namespace.name}.{tool.name}", channel=BUILTIN_CHANNEL, tool=tool)
        for tool in self.functions:
            yield Callee(recipient=f"{FUNCTIONS}.{tool.name}", channel=FUNCTION_CHANNEL, tool=tool)

    @classmethod
    def of(cls, conversation: Conversation) -> "Offer":
        """What a conversation's system and developer messages offer. Raises UsageError where names collide."""
        parts = [part for message in conversation.messages for part in message.parts]
        return cls(
            functions=tuple(tool for part in parts if isinstance(part, DeveloperContent) for tool in part.tools),
            builtins=tuple(space for part in parts if isinstance(part, SystemContent) for space in part.tools),
        )

    def meant(self, written: str, *, is_typed: bool = True) -> Callee | None:
        """Whom a recipient names that models write with small mistakes: with a namespace too few or too many, or with
        its content type, "json", stuck to it. None where that is nobody.

        Where the header `is_typed`, that type is not missing, and "json" belongs to the name. "code" always does: too
        many names end in it ("zipcode") for a call of "zip" to be told from one of somebody who was not offered.
        """
        bare = written.removeprefix(f"{FUNCTIONS}.")
        names = [written, f"{FUNCTIONS}.{written}", bare]
        if not is_typed:
            names += [name.removesuffix("json") for name in names]
        return next((self.callees[name] for name in names if name in self.callees), None)
