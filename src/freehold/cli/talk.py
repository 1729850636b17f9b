"""A conversation at the terminal: its history, its tools, and the model that answers in it."""

import time
from collections.abc import Sequence
from dataclasses import replace

from freehold.cli.approval import Approval
from freehold.cli.exchange import Exchange
from freehold.cli.screen import Screen
from freehold.errors import FreeholdError
from freehold.formats.conversation import Conversation, Message, text_message
from freehold.log import logger
from freehold.session.generation import Ask, Generation, prepare_generation
from freehold.session.record import RecordedTurn, Recorder
from freehold.session.served import Served
from freehold.session.toolbox import Toolbox
from freehold.session.turn import ToolDone, Turn, TurnEvent, TurnLimits, prepare
from freehold.tools.base import FunctionTools, Tool
from freehold.tools.python import PythonSession


class Talk:
    """For one event loop. `ask` is how the model is asked, whatever it is asked."""

    def __init__(
        self,
        served: Served,
        ask: Ask,
        screen: Screen,
        *,
        system: str | None = None,
        tools: Sequence[Tool | FunctionTools] = (),
        limits: TurnLimits | None = None,
        approval: Approval | None = None,
        exchange: Exchange | None = None,
        recorder: Recorder | None = None,
        recorded: Sequence[RecordedTurn] = (),
    ) -> None:
        """Goes on from what was `recorded`. With a `recorder` a conversation cannot be begun anew."""
        self._served = served
        self._ask = ask
        self._tools = tools
        self._limits = limits
        self._toolbox: Toolbox | None = None
        self._approval = approval
        self._exchange = exchange
        self._recorder = recorder
        self.screen = screen
        self.system = system
        self._history = _gone_on_from(recorded) if recorded else self._beginning()
        self._is_new = not recorded

    @property
    def is_recorded(self) -> bool:
        return self._recorder is not None

    def _beginning(self) -> Conversation:
        return Conversation(messages=(text_message("system", self.system),) if self.system else ())

    async def reset(self) -> None:
        """Forget everything but the instructions; tools begin anew."""
        self._history = self._beginning()
        await self.aclose()

    async def aclose(self) -> None:
        """Give back what the tools hold."""
        toolbox, self._toolbox = self._toolbox, None
        if toolbox is not None:
            await toolbox.aclose()

    async def answer(self, question: str) -> None:
        """Show the answer as it is made. What was said stays in the history, also where it was stopped half-way; a
        question that was stopped before its answer began is taken back."""
        question_message = text_message("user", question)
        asked = self._history.plus(question_message)
        start = time.monotonic()
        reply = await self._prepare(replace(self._ask, conversation=asked))
        if self._recorder is not None:
            self._recorder.begin(asked.messages if self._is_new else (question_message,))
            self._is_new = False
        reading = reply.events(self._served.runner)
        finished = False
        try:
            async for batch in reading:
                for event in batch:
                    self._show(event)
            finished = True
        finally:
            await reading.aclose()
            self.screen.close(finished=finished)
            said = [message for message in reply.cut() if _is_said(message)]
            if finished or said:
                self._history = asked.plus(*said)
        seconds = time.monotonic() - start
        logger.info(
            "%d prompt tokens, %d new tokens in %.2f s (%.1f tokens/s)",
            reply.num_prompt_tokens, reply.num_tokens, seconds, reply.num_tokens / seconds,
        )  # fmt: skip

    async def _prepare(self, ask: Ask) -> Generation | Turn:
        if not self._tools:
            return await prepare_generation(self._served, ask)
        approve = None if self._approval is None else self._approval.call
        return await prepare(self._served, ask, await self.open(), limits=self._limits, approve=approve)

    async def open(self) -> Toolbox:
        """The conversation's tools; what is wrong with them shows when they are opened first. Raises UsageError."""
        if self._toolbox is None:
            toolbox = await Toolbox.open(self._tools)
            try:
                session = toolbox.session("python")
                if self._exchange is not None and isinstance(session, PythonSession):
                    await self._exchange.put(session)
            except BaseException:
                await toolbox.aclose()
                raise
            self._toolbox = toolbox
        return self._toolbox

    def _show(self, event: TurnEvent) -> None:
        if self._recorder is not None:
            self._recorder.take(event)
        self.screen.show(event)
        if isinstance(event, ToolDone):
            for file in event.files:
                try:
                    place = file.path if self._exchange is None else self._exchange.keep(file)
                except FreeholdError as error:
                    self.screen.note(f"{file.name} cannot be kept: {error}")
                else:
                    self.screen.note(f"file: {place}")


def _gone_on_from(turns: Sequence[RecordedTurn]) -> Conversation:
    """What is kept of a recording: as in `answer`, no question that was stopped before its answer began."""
    messages: list[Message] = []
    for turn in turns:
        kept = [message for message in turn.history()[len(turn.asked) :] if _is_said(message)]
        messages += [message for message in turn.asked if kept or turn.is_complete or message.role != "user"]
        messages += kept
    return Conversation(messages=tuple(messages))


def _is_said(message: Message) -> bool:
    """Whether it is to be kept: an empty answer is none, but a call and what it gave may well be empty."""
    return bool(message.text) or message.role == "tool" or message.recipient is not None
