"""The agent loop: a model that calls tools is given what they say and goes on, until it answers.

    render -> generate -> parse -> run the calls -> append what they gave -> again

A turn ends with an answer, with calls of functions that are the caller's own, or at a limit. Whatever fails in a tool
is told to the model and not raised. Each step is an event: those of a generation, `ToolStart` and `ToolDone` around
each call, `Cited` before an answer that refers to what tools have shown, and in the end one `SampleDone` of it all.
Closing or forgetting what reads a turn ends it, a tool that is running included.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from freehold.errors import ContextError, FreeholdError, UnsupportedError, UsageError
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import Channel, Message, Text, is_name
from freehold.formats.events import CallDone, CallProblem, MessageDone
from freehold.formats.harmony.grammar import AllowedTools, NamedTool, ToolChoice
from freehold.formats.harmony.offer import FUNCTION_CHANNEL, FUNCTIONS, Offer
from freehold.log import logger
from freehold.session.generation import (
    Ask,
    Generation,
    GenerationEvent,
    GenerationEvents,
    Said,
    SampleDone,
    SampleEnd,
    prepare_generation,
)
from freehold.session.served import AsyncRunner, Served
from freehold.session.toolbox import Toolbox
from freehold.tools.base import Citation, ToolError, ToolFile, ToolResult

_ANSWER = "Answer with what there is."
_CUT_MARK = "\n[The rest was too long and is not shown.]"
_CHARACTERS_OF_A_TOKEN = 32
"""Text that has more than these is cut before it is tokenised."""
_UNNAMED = f"{FUNCTIONS}.unknown"  # who answers a call whose recipient can be nobody's name
_PROBLEMS: dict[CallProblem, str] = {
    "not offered": "There is no tool {recipient}.",
    "several recipients": "A call goes to one tool only.",
    "leaked": "The call was written as plain text and was not carried out. Call the tool in a message to it.",
    "not json": "The arguments are not JSON. Send one JSON object.",
    "not an object": "The arguments are no JSON object. Send one JSON object.",
    "broken off": "The call broke off before its end.",
}


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStart:
    """A call is about to be carried out. `number` counts those of a turn, from 0."""

    number: int
    recipient: str
    arguments: str


ToolProblem = Literal["failed", "unknown", "malformed", "declined", "timeout", "limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDone:
    """What became of it: `message` is what the model is told, `files` are for the user. With a `problem` the message
    tells of that."""

    number: int
    message: Message
    files: tuple[ToolFile, ...] = ()
    problem: ToolProblem | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Cited:
    """Comes before the MessageDone of an answer: what in its text refers to sources."""

    citations: tuple[Citation, ...]


TurnEvent = GenerationEvent | ToolStart | ToolDone | Cited


# --- what a turn may do -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """How often the model is asked (`max_steps`), how many calls are carried out, how long all of them take together,
    and how much of a result the model is shown.

    Where calls or time are spent, or before the last step, the model has to answer with what there is; a model without
    a grammar is told so. Tokens and time of the whole turn are the `Ask`'s.
    """

    max_steps: int = 64
    max_tool_calls: int | None = None
    tool_seconds: float = 900.0
    result_tokens: int = 16_384

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise UsageError(f"max_steps must be 1 or more, got {self.max_steps}")
        if self.max_tool_calls is not None and self.max_tool_calls < 0:
            raise UsageError(f"max_tool_calls must be 0 or more, got {self.max_tool_calls}")
        if not self.tool_seconds > 0:
            raise UsageError(f"tool_seconds must be more than 0, got {self.tool_seconds!r}")
        if self.result_tokens < 1:
            raise UsageError(f"result_tokens must be 1 or more, got {self.result_tokens}")


Approve = Callable[[ToolStart], Awaitable[bool]]
"""Asked before each call; False declines it."""


async def prepare(
    served: Served,
    ask: Ask,
    toolbox: Toolbox,
    *,
    limits: TurnLimits | None = None,
    approve: Approve | None = None,
) -> "Turn":
    """A turn that may use these tools. `ask` has the conversation without them; its functions are the caller's own.

    Raises what freehold.session.generation.prepare does, and UsageError for more than one sample, UnsupportedError for
    a model that does not speak Harmony.
    """
    if ask.n != 1:
        raise UsageError(f"a turn with tools has one sample, not {ask.n}")
    if not served.speaks_harmony:
        raise UnsupportedError(f"{served.name} does not speak Harmony and calls no tools")
    turn = Turn(served, ask, toolbox, limits or TurnLimits(), approve)
    await turn.prepare()
    return turn


class Turn:
    """A turn that is ready to run, and what became of it so far."""

    num_samples = 1

    def __init__(self, served: Served, ask: Ask, toolbox: Toolbox, limits: TurnLimits, approve: Approve | None) -> None:
        """Made by `prepare`."""
        self._served = served
        self._ask = ask
        self._toolbox = toolbox
        self._limits = limits
        self._approve = approve
        self._runner: AsyncRunner | None = None
        self._generation: Generation | None = None
        self._pending: list[_Call] = []  # calls of ours that nothing has been said to yet
        self._messages: list[Message] = []  # of the steps that are over
        self._num_steps = 0
        self._num_calls = 0
        self._tool_seconds = 0.0
        self._began: float | None = None
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_tokens = 0
        self._num_reasoning_tokens = 0
        self._length = 0  # of the last step's prompt and what was written then

    # --- what there is to know --------------------------------------------------------------------------------

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompts of all steps so far."""
        return self._num_prompt_tokens + (0 if self._generation is None else self._generation.num_prompt_tokens)

    @property
    def num_cached_tokens(self) -> int:
        """Of those, tokens that were not computed again."""
        return self._num_cached_tokens + (0 if self._generation is None else self._generation.num_cached_tokens)

    @property
    def num_tokens(self) -> int:
        """How many have been written so far."""
        return self._num_tokens + (0 if self._generation is None else self._generation.num_tokens)

    def events(self, runner: AsyncRunner) -> "TurnEvents":
        """Begin, at once, and read it. To be called once.

        Raises ClosedError where the engine takes no more; RequestError while it is read where the model fails.
        """
        assert self._generation is not None and self._began is None, "a turn is read once; prepare another one"
        self._began = time.monotonic()
        self._runner = runner
        return TurnEvents(self, self._generation.events(runner))

    def cut(self) -> tuple[Message, ...]:
        """Nothing more will come, wherever it is: what history keeps of it. Calls that nothing was said to are said to
        be cancelled."""
        if self._generation is not None:
            said = self._generation.cut()
            self._messages += [message for message in said if message.recipient is None]  # no calls without an answer
            self._close_step()
        self._messages += [call.answer("The user cancelled the call.") for call in self._pending]
        self._pending.clear()
        return tuple(self._messages)

    # --- steps ------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Make the next step ready. Raises as freehold.session.generation.prepare."""
        self._generation = await prepare_generation(self._served, self._next_ask())
        self._num_steps += 1

    def _next_ask(self) -> Ask:
        ask = self._ask
        return replace(
            ask,
            conversation=ask.conversation.offering(self._toolbox.functions).plus(*self._messages),
            builtins=(*ask.builtins, *self._toolbox.builtins),
            choices=self._choices(),
            max_tokens=None if ask.max_tokens is None else ask.max_tokens - self._num_tokens,
            min_tokens=ask.min_tokens if self._num_steps == 0 else 0,
            deadline=None if ask.deadline is None else max(ask.deadline - self._seconds, 0.001),
        )

    def _choices(self) -> TurnChoices:
        choices: TurnChoices = {**self._ask.choices}
        if self._num_steps:
            choice = choices.get("tool_choice", "auto")
            choices["tool_choice"] = _after_the_first(choice)
            choices["reasoning"] = "optional"
            if (budget := choices.get("max_reasoning_tokens")) is not None:
                choices["max_reasoning_tokens"] = max(budget - self._num_reasoning_tokens, 0)
        if self._is_spent and self._served.grammar:
            choices["tool_choice"] = self._without_ours(choices.get("tool_choice", "auto"))
        return choices

    @property
    def _is_spent(self) -> bool:
        """Whether no more calls of ours are carried out."""
        limits = self._limits
        return (
            self._num_steps + 1 >= limits.max_steps
            or (limits.max_tool_calls is not None and self._num_calls >= limits.max_tool_calls)
            or self._tool_seconds >= limits.tool_seconds
        )

    def _without_ours(self, choice: ToolChoice) -> ToolChoice:
        """The choice, with nothing left to call but the caller's own functions."""
        if choice == "none" or (isinstance(choice, NamedTool) and self._toolbox.session(choice.recipient) is None):
            return choice
        theirs = Offer.of(self._ask.conversation).callees
        if isinstance(choice, AllowedTools):
            theirs = {name: callee for name, callee in theirs.items() if name in choice.recipients}
        required = choice == "required" or (isinstance(choice, AllowedTools) and choice.required)
        return AllowedTools(recipients=tuple(theirs), required=required) if theirs else "none"

    @property
    def _seconds(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began

    def _close_step(self) -> None:
        """The step's numbers are added up, and it is forgotten."""
        generation, self._generation = self._generation, None
        assert generation is not None
        self._num_prompt_tokens += generation.num_prompt_tokens
        self._num_cached_tokens += generation.num_cached_tokens
        self._num_tokens += generation.num_tokens
        self._length = generation.num_prompt_tokens + generation.num_tokens

    # --- running ----------------------------------------------------------------------------------------------

    async def run(self, reading: GenerationEvents) -> AsyncGenerator[list[TurnEvent], None]:
        """For TurnEvents: all steps, one after the other."""
        while True:
            calls = _Calls()
            done: SampleDone | None = None
            async with aclosing(reading):
                async for batch in reading:
                    events: list[TurnEvent] = []
                    for event in batch:
                        match event:
                            case SampleDone():
                                done = event
                            case Said():
                                calls.take(event)
                                events += [*self._cited(event), event]
                    if events:
                        yield events
            assert done is not None, "a generation ends with its samples"
            self._messages += done.messages
            self._num_reasoning_tokens += done.num_reasoning_tokens
            self._close_step()
            if done.end != "calls":
                yield [self._done(done, done.end)]
                return
            self._pending = [call for call in calls.done if call.problem or self._toolbox.session(call.recipient)]
            waits_for_caller = len(self._pending) < len(calls.done)
            for call in tuple(self._pending):
                start = ToolStart(number=self._num_calls, recipient=call.recipient, arguments=call.arguments)
                yield [start]
                yield [await self._carry_out(call, start)]
            following = "calls" if waits_for_caller else await self._go_on()
            if isinstance(following, str):
                yield [self._done(done, following)]
                return
            reading = following

    async def _go_on(self) -> GenerationEvents | SampleEnd:
        """The next step, or why there is none."""
        ask = self._ask
        if self._num_steps >= self._limits.max_steps:
            return "limit"
        if ask.max_tokens is not None and self._num_tokens >= ask.max_tokens:
            return "length"
        if ask.deadline is not None and self._seconds >= ask.deadline:
            return "deadline"
        try:
            await self.prepare()
        except ContextError:
            return "length"
        assert self._generation is not None and self._runner is not None
        return self._generation.events(self._runner)

    def _done(self, last: SampleDone, end: SampleEnd) -> SampleDone:
        return replace(
            last,
            end=end,
            messages=tuple(self._messages),
            num_tokens=self._num_tokens,
            num_reasoning_tokens=self._num_reasoning_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
        )

    def _cited(self, said: Said) -> Sequence[Cited]:
        match said.event:
            case MessageDone(message=Message(role="assistant", channel="final", recipient=None) as message):
                citations = self._toolbox.citations(message.text)
                return [Cited(citations)] if citations else []
        return []

    # --- calls ------------------------------------------------------------------------------------------------

    async def _carry_out(self, call: "_Call", start: ToolStart) -> ToolDone:
        before = self._tool_seconds
        outcome = await self._outcome(call, start)
        self._num_calls += 1
        text = outcome.text if outcome.problem is None else f"Error: {outcome.text}"
        message = call.answer(await asyncio.to_thread(self._shortened, _clean(text)))
        self._messages.append(message)
        self._pending.remove(call)
        return ToolDone(
            number=start.number,
            message=message,
            files=outcome.files,
            problem=outcome.problem,
            seconds=self._tool_seconds - before,
        )

    async def _outcome(self, call: "_Call", start: ToolStart) -> "_Outcome":
        limits = self._limits
        if call.problem is not None:
            what = _PROBLEMS[call.problem].format(recipient=call.recipient)
            return _Outcome("unknown" if call.problem == "not offered" else "malformed", f"{what} {self._offered()}")
        if self._num_steps >= limits.max_steps:
            return _Outcome("limit", f"The turn ends here, after {limits.max_steps} steps.")
        if limits.max_tool_calls is not None and self._num_calls >= limits.max_tool_calls:
            return _Outcome("limit", f"No more than {limits.max_tool_calls} calls are made. {_ANSWER}")
        if self._tool_seconds >= limits.tool_seconds:
            return _Outcome("limit", f"The time for tools is spent. {_ANSWER}")
        if self._approve is not None and not await self._approve(start):
            return _Outcome("declined", "The user declined this call. Ask what they want, or answer without it.")
        try:
            result = await self._called(call)
        except TimeoutError:
            return _Outcome("timeout", f"The call was ended: the time for tools is spent. {_ANSWER}")
        except ToolError as error:
            return _Outcome("failed", str(error))
        return _Outcome(None, result.text, result.files)

    async def _called(self, call: "_Call") -> ToolResult:
        session = self._toolbox.session(call.recipient)
        if session is None:
            raise ToolError(f"there is no tool {call.recipient} any more. {self._offered()}")
        seconds = self._limits.tool_seconds - self._tool_seconds
        if self._ask.deadline is not None:
            seconds = min(seconds, self._ask.deadline - self._seconds)
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                try:
                    return await session.call(call.recipient, call.arguments)
                except TimeoutError as error:  # its own, and not that of the turn
                    raise ToolError(str(error) or "it took too long") from None
        except (ToolError, TimeoutError):
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ToolError("the call was cancelled from within") from None
        except FreeholdError as error:
            raise ToolError(str(error)) from None
        except Exception as error:  # noqa: BLE001 - whatever a tool does, the turn goes on
            logger.warning("the tool %s failed with %s", call.recipient, type(error).__name__)
            raise ToolError(f"the tool failed with {type(error).__name__}: {error}") from None
        finally:
            self._tool_seconds += time.monotonic() - began

    def _offered(self) -> str:
        names = [*Offer.of(self._ask.conversation.offering(self._toolbox.functions)).callees]
        for namespace in self._toolbox.builtins:
            names += [f"{namespace.name}.{tool.name}" for tool in namespace.tools] or [namespace.name]
        return f"Tools: {', '.join(names)}."

    def _shortened(self, text: str) -> str:
        """As much of a result as the model is shown: never more than half of the room that there is."""
        prompting = self._served.prompting
        room = prompting.context - self._length
        most = max(min(self._limits.result_tokens, room // 2), 1)
        if len(text) <= most // 4:  # a character has at most four bytes, and so tokens
            return text
        tokenizer = prompting.the_tokenizer()
        begin = text[: most * _CHARACTERS_OF_A_TOKEN]
        tokens = tokenizer.encode(begin)
        if len(tokens) <= most and len(begin) == len(text):
            return text
        return tokenizer.decode(tokens[:most]) + _CUT_MARK


class TurnEvents:
    """A turn that runs, for `async for`. No generator: closed before it was read, one would end nothing."""

    def __init__(self, turn: Turn, first: GenerationEvents) -> None:
        self._first = first
        self._events = turn.run(first)

    def __aiter__(self) -> "TurnEvents":
        return self

    async def __anext__(self) -> list[TurnEvent]:
        try:
            return await anext(self._events)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End it, wherever it is."""
        await self._events.aclose()
        await self._first.aclose()


class _Outcome(NamedTuple):
    """What came of a call."""

    problem: ToolProblem | None
    text: str
    files: tuple[ToolFile, ...] = ()


# --- calls while they are read ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    recipient: str
    arguments: str
    problem: CallProblem | None
    channel: Channel | None

    def answer(self, text: str) -> Message:
        """A tool's message to the model."""
        return Message(
            role="tool",
            parts=(Text(text=text),),
            channel=self.channel or FUNCTION_CHANNEL,
            recipient="assistant",
            name=self.recipient if is_name(self.recipient) else _UNNAMED,
        )


class _Calls:
    """Those of one step. A call is told by the event before the one that has its message."""

    def __init__(self) -> None:
        self.done: list[_Call] = []
        self._last: CallDone | None = None

    def take(self, said: Said) -> None:
        match said.event:
            case CallDone() as call:
                self._last = call
            case MessageDone(message=message) if self._last is not None:
                call, self._last = self._last, None
                self.done.append(
                    _Call(
                        recipient=call.recipient,
                        arguments=call.arguments,
                        problem=call.problem,
                        channel=message.channel,
                    )
                )


def _after_the_first(choice: ToolChoice) -> ToolChoice:
    """A call that was asked for was made."""
    match choice:
        case "required" | NamedTool():
            return "auto"
        case AllowedTools(recipients=recipients):
            return AllowedTools(recipients=recipients)
    return choice


def _clean(text: str) -> str:
    """Lone surrogates, which are no characters, become question marks: a foreign tool may give anything."""
    return text.encode(errors="replace").decode()
