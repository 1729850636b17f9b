"""The agent loop: a model that calls tools is given what they say and goes on, until it answers.

    render -> generate -> parse -> run the calls -> append what they gave -> again

A turn ends with an answer, with calls of functions that are the caller's own, or at a limit. Whatever fails in a tool
is told to the model and not raised. Each step is an event: those of a generation, `ToolStart` and `ToolDone` around
each call, `Cited` before an answer that refers to what tools have shown, and in the end one `SampleDone` of it all.
Closing or forgetting what reads a turn ends it, a tool that is running included.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from freehold.errors import ContextError, FreeholdError, UnsupportedError, UsageError
from freehold.formats.chat import TurnChoices
from freehold.formats.conversation import Conversation, Message
from freehold.formats.events import CallProblem, Diagnostic, MessageDone
from freehold.formats.harmony.grammar import AllowedTools, NamedTool, ToolChoice
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.render import Rendered, render
from freehold.formats.harmony.vocabulary import HarmonyVocabulary
from freehold.log import logger
from freehold.session.generation import (
    Ask,
    Generation,
    GenerationEvents,
    Said,
    SampleDone,
    SampleEnd,
    prepare_generation,
)
from freehold.session.history import Call, Cited, ToolDone, ToolProblem, ToolStart, TurnEvent, TurnHistory
from freehold.session.served import AsyncRunner, Served
from freehold.session.toolbox import Toolbox
from freehold.tools.base import ToolError, ToolFile, ToolResult

__all__ = [
    "Approve",
    "Cited",
    "ToolDone",
    "ToolProblem",
    "ToolStart",
    "Turn",
    "TurnEvent",
    "TurnEvents",
    "TurnLimits",
    "prepare",
]

_ANSWER = "Answer with what there is."
_HEADER_TOKENS = 24  # of a tool's message, but for a very long name
_CUT_MARK = "\n[The rest was too long and is not shown.]"
_CHARACTERS_OF_A_TOKEN = 32
"""Text that has more than these is cut before it is tokenised."""
_PROBLEMS: dict[CallProblem, str] = {
    "not offered": "There is no tool {recipient}.",
    "several recipients": "A call goes to one tool only.",
    "leaked": "The call was written as plain text and was not carried out. Call the tool in a message to it.",
    "not json": "The arguments are not JSON. Send one JSON object.",
    "not an object": "The arguments are no JSON object. Send one JSON object.",
    "broken off": "The call broke off before its end.",
}


# --- what a turn may do -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """How often the model is asked (`max_steps`), how many calls are carried out, how long all of them take together,
    and how much of a result the model is shown.

    Where calls or time are spent, or before the last step, the model has to answer with what there is. A model without
    a grammar is told so when it calls all the same; where it does that again, the turn ends. Tokens and time of the
    whole turn are the `Ask`'s.
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

    Raises what prepare_generation does; UsageError for more than one sample, for two tools of one
    name, and where a call is required that the limits do not allow; UnsupportedError for a model that does not speak
    Harmony.
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
        self._functions = toolbox.functions  # a server's may change meanwhile; what is offered does not
        theirs = Offer.of(ask.conversation)
        builtins = (*theirs.builtins, *ask.builtins)
        self._theirs = Offer(functions=theirs.functions, builtins=builtins).callees
        self._callees = Offer(
            functions=(*theirs.functions, *self._functions), builtins=(*builtins, *toolbox.builtins)
        ).callees
        self._has_grammar = served.grammar and not ask.ignore_eos
        self._runner: AsyncRunner | None = None
        self._generation: Generation | None = None
        self._history = TurnHistory()
        self._written: Rendered | None = None  # the last prompt and what was written then, where that needed no mending
        self._answers: list[Message] = []  # to the calls in it
        self._num_steps = 0
        self._num_calls = 0
        self._num_carried_out = 0
        self._is_told = False  # that no more calls are carried out
        self._is_mended = False  # in the last step, something that was not as it should be
        self._is_last_chance = False  # of the model, to answer
        self._tool_seconds = 0.0
        self._began: float | None = None
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_tokens = 0
        self._num_reasoning_tokens = 0
        self._spent_reasoning_tokens = 0  # of its budget, which counts no headers and ends
        self._length = 0  # in tokens, of all that there is by now: what the next prompt will have, roughly

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
        """Nothing more will come, wherever it is: what history keeps of it. Calls without an answer are said to
        have been cut off."""
        return self._history.cut()

    # --- steps ------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Make the next step ready. Raises as prepare_generation does."""
        prompt = await asyncio.to_thread(self._next_prompt)
        self._generation = await prepare_generation(self._served, self._next_ask(), prompt=prompt)
        self._answers.clear()
        self._num_steps += 1
        self._is_last_chance = self._is_told or self._num_steps >= self._limits.max_steps

    def _next_prompt(self) -> Rendered | None:
        """The last prompt, what the model wrote, to the token, and what its calls gave. Rendered anew, its headers
        would not be the ones that it wrote, and all that it wrote, its reasoning included, be computed again. None
        where a whole conversation has to be rendered."""
        written = self._written
        if written is None:
            return None
        answers = render(Conversation(messages=tuple(self._answers)), self._served.prompting.the_tokenizer())
        length = len(written.ids)
        return Rendered(
            [*written.ids, *answers.ids], [*written.boundaries, *(length + boundary for boundary in answers.boundaries)]
        )

    def _next_ask(self) -> Ask:
        ask = self._ask
        return replace(
            ask,
            conversation=ask.conversation.offering(self._functions).plus(*self._history.messages),
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
                choices["max_reasoning_tokens"] = max(budget - self._spent_reasoning_tokens, 0)
        if self._is_spent and self._has_grammar:
            choices["tool_choice"] = self._without_ours(choices.get("tool_choice", "auto"))
        return choices

    @property
    def _is_spent(self) -> bool:
        """Whether no more calls of ours are carried out."""
        limits = self._limits
        return (
            self._num_steps + 1 >= limits.max_steps
            or (limits.max_tool_calls is not None and self._num_carried_out >= limits.max_tool_calls)
            or self._tool_seconds >= limits.tool_seconds
        )

    def _without_ours(self, choice: ToolChoice) -> ToolChoice:
        """The choice, with nothing left to call but the caller's own functions."""
        if choice == "none" or (isinstance(choice, NamedTool) and choice.recipient in self._theirs):
            return choice
        left = tuple(self._theirs)
        if isinstance(choice, AllowedTools):
            left = tuple(name for name in left if name in choice.recipients)
        is_named = isinstance(choice, NamedTool)
        required = is_named or choice == "required" or (isinstance(choice, AllowedTools) and choice.required)
        if required and (is_named or not left):
            raise UsageError("tool_choice asks for a call that the turn's limits do not allow; raise them")
        return AllowedTools(recipients=left, required=required) if left else "none"

    @property
    def _seconds(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def _seconds_left(self) -> float:
        """Until the deadline."""
        return math.inf if self._ask.deadline is None else self._ask.deadline - self._seconds

    def _close_step(self) -> None:
        """The step's numbers are added up, and it is forgotten."""
        generation, self._generation = self._generation, None
        assert generation is not None
        self._num_prompt_tokens += generation.num_prompt_tokens
        self._num_cached_tokens += generation.num_cached_tokens
        self._num_tokens += generation.num_tokens
        self._length = generation.num_prompt_tokens + generation.num_tokens
        self._written = self._as_written(generation)

    def _as_written(self, generation: Generation) -> Rendered | None:
        known = HarmonyVocabulary.of(self._served.prompting.the_tokenizer())
        tokens = list(generation.tokens)
        if tokens[-1:] == [known.return_]:  # after several calls; no prompt has it
            del tokens[-1]
        if self._is_mended or tokens[-1:] != [known.call]:
            return None
        ends = [
            at for at, token in enumerate(tokens, generation.num_prompt_tokens + 1) if token in (known.end, known.call)
        ]
        return Rendered([*generation.prompt, *tokens], [*generation.boundaries, *ends])

    # --- running ----------------------------------------------------------------------------------------------

    async def run(self, reading: GenerationEvents) -> AsyncGenerator[list[TurnEvent], None]:
        """For TurnEvents: all steps, one after the other."""
        while True:
            done: SampleDone | None = None
            self._is_mended = False
            async with aclosing(reading):
                async for batch in reading:
                    events: list[TurnEvent] = []
                    for event in batch:
                        match event:
                            case SampleDone():
                                done = event
                            case Said(event=said):
                                # After an answer, reasoning before it is shown no more.
                                is_answer = isinstance(said, MessageDone) and said.message.channel == "final"
                                self._is_mended |= is_answer or isinstance(said, Diagnostic)
                                events += [*self._cited(event), event]
                    if events:
                        yield self._noted(events)
            assert done is not None, "a generation ends with its samples"
            self._num_reasoning_tokens += done.num_reasoning_tokens
            self._spent_reasoning_tokens += self._num_text_tokens(done)
            self._close_step()
            if done.end != "calls":
                self._history.end_step(keep_calls=False)  # one may be whole, and is not carried out any more
                yield self._noted([self._done(done, done.end)])
                return
            calls = self._history.calls
            ours = [call for call in calls if call.problem or call.recipient not in self._theirs]
            for call in ours:
                start = ToolStart(number=self._num_calls, recipient=call.recipient, arguments=call.arguments)
                self._num_calls += 1
                yield self._noted([start])
                finish = await self._carry_out(call, start)
                self._answers.append(finish.message)
                yield self._noted([finish])
            if not ours:
                self._history.end_step()
            following = "calls" if len(ours) < len(calls) else await self._go_on()
            if isinstance(following, str):
                yield self._noted([self._done(done, following)])
                return
            reading = following

    def _num_text_tokens(self, done: SampleDone) -> int:
        """Of the reasoning, where that has a budget."""
        if self._ask.choices.get("max_reasoning_tokens") is None:
            return 0
        encode = self._served.prompting.the_tokenizer().encode
        thoughts = (said for said in done.messages if said.channel == "analysis" and said.recipient is None)
        return sum(len(encode(thought.text)) for thought in thoughts)

    def _noted(self, events: list[TurnEvent]) -> list[TurnEvent]:
        for event in events:
            self._history.take(event)
        return events

    async def _go_on(self) -> GenerationEvents | SampleEnd:
        """The next step, or why there is none."""
        ask = self._ask
        if self._is_last_chance:
            return "limit"
        if ask.max_tokens is not None and self._num_tokens >= ask.max_tokens:
            return "length"
        if self._seconds_left <= 0:
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
            messages=self._history.messages,
            num_tokens=self._num_tokens,
            num_reasoning_tokens=self._num_reasoning_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
        )

    def _cited(self, said: Said) -> Sequence[Cited]:
        match said.event:
            case MessageDone(message=Message(role="assistant", channel="final", recipient=None) as message):
                try:
                    citations = self._toolbox.citations(message.text)
                except Exception as error:  # noqa: BLE001 - an answer without them is better than none
                    logger.warning("the citations of an answer failed with %s", type(error).__name__)
                    citations = ()
                return [Cited(citations)] if citations else []
        return []

    # --- calls ------------------------------------------------------------------------------------------------

    async def _carry_out(self, call: Call, start: ToolStart) -> ToolDone:
        before = self._tool_seconds
        outcome = await self._outcome(call, start)
        self._is_told = self._is_told or outcome.problem == "limit"
        text = outcome.text if outcome.problem is None else f"Error: {outcome.text}"
        shown = await asyncio.to_thread(self._shortened, _clean(text))
        self._length += shown.num_tokens + _HEADER_TOKENS
        return ToolDone(
            number=start.number,
            message=call.answer(shown.text),
            files=outcome.files,
            problem=outcome.problem,
            seconds=self._tool_seconds - before,
        )

    async def _outcome(self, call: Call, start: ToolStart) -> "_Outcome":
        limits = self._limits
        if call.problem is not None:
            what = _PROBLEMS[call.problem].format(recipient=call.recipient)
            return _Outcome("unknown" if call.problem == "not offered" else "malformed", f"{what} {self._offered()}")
        if self._num_steps >= limits.max_steps:
            return _Outcome("limit", f"The turn ends here, after {limits.max_steps} steps.")
        if limits.max_tool_calls is not None and self._num_carried_out >= limits.max_tool_calls:
            return _Outcome("limit", f"No more than {limits.max_tool_calls} calls are made. {_ANSWER}")
        if self._tool_seconds >= limits.tool_seconds:
            return _Outcome("limit", f"The time for tools is spent. {_ANSWER}")
        if self._seconds_left <= 0:
            return _Outcome("limit", "The time for the whole turn is spent.")
        match await self._decision(start):
            case "no":
                return _Outcome("declined", "The user declined this call. Ask what they want, or answer without it.")
            case "none":
                return _Outcome("declined", "The user has not allowed this call before the turn's time was spent.")
        self._num_carried_out += 1
        try:
            result = await self._called(call)
        except TimeoutError:
            return _Outcome("timeout", f"The call was ended: the time for tools is spent. {_ANSWER}")
        except ToolError as error:
            return _Outcome("failed", str(error))
        return _Outcome(None, result.text, result.files)

    async def _decision(self, start: ToolStart) -> Literal["yes", "no", "none"]:
        """What the user says to a call; "none" where the turn's time is over first."""
        if self._approve is None:
            return "yes"
        try:
            async with asyncio.timeout(None if self._ask.deadline is None else self._seconds_left) as time_left:
                return "yes" if await self._approve(start) else "no"
        except TimeoutError:
            if not time_left.expired():
                raise
            return "none"

    async def _called(self, call: Call) -> ToolResult:
        session = self._toolbox.session(call.recipient)
        if session is None:
            raise ToolError(f"there is no tool {call.recipient} any more")
        task = asyncio.current_task()
        assert task is not None
        num_cancels = task.cancelling()
        began = time.monotonic()
        seconds = min(self._limits.tool_seconds - self._tool_seconds, self._seconds_left)
        try:
            async with asyncio.timeout(seconds if math.isfinite(seconds) else None):
                try:
                    return await session.call(call.recipient, call.arguments)
                except TimeoutError as error:  # its own, and not that of the turn
                    raise ToolError(_told(error) or "it took too long") from None
        except TimeoutError:
            raise
        except asyncio.CancelledError:
            if task.cancelling() > num_cancels:
                raise
            raise ToolError("the call was cancelled from within") from None
        except FreeholdError as error:
            raise ToolError(_told(error)) from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a tool does, the turn goes on
            logger.warning("the tool %s failed with %s", call.recipient, type(error).__name__)
            raise ToolError(f"the tool failed with {type(error).__name__}: {_told(error)}") from None
        finally:
            self._tool_seconds += time.monotonic() - began

    def _offered(self) -> str:
        return f"Tools: {', '.join(self._callees)}." if self._callees else "There are no tools."

    def _shortened(self, text: str) -> "_Shown":
        """As much of a result as the model is shown: never more than half of the room that there is."""
        prompting = self._served.prompting
        room = prompting.context - self._length
        most = max(min(self._limits.result_tokens, room // 2), 1)
        tokenizer = prompting.the_tokenizer()
        begin = text[: most * _CHARACTERS_OF_A_TOKEN]
        tokens = tokenizer.encode(begin)
        if len(tokens) <= most and len(begin) == len(text):
            return _Shown(text, len(tokens))
        return _Shown(tokenizer.decode(tokens[:most]) + _CUT_MARK, most + _HEADER_TOKENS)


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


class _Shown(NamedTuple):
    """What the model is shown of a result, in about so many tokens."""

    text: str
    num_tokens: int


class _Outcome(NamedTuple):
    """What came of a call."""

    problem: ToolProblem | None
    text: str
    files: tuple[ToolFile, ...] = ()


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


def _told(error: BaseException) -> str:
    """What an error says. One of a foreign tool may fail even at that."""
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001
        return f"it cannot be shown: {type(second).__name__}"
