"""A model that says what a script says: for people who write clients, and for our own tests.

A script is a JSONL file, one turn a line. `completion` is the turn as the model would write it, in Harmony, control
tokens by name; `reasoning`, `calls` and `answer` are a shorter way to say the same. `match` is a regular expression:
such a turn is given, as often as it fits, where it is found in the last message of the prompt. Turns without one are
given in order, once each. `fault` makes the request fail after what the turn says. Where a request asks for several
samples, each says the same, a token each in turn.

    {"match": "weather", "reasoning": "Look it up.", "calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}]}
    {"completion": "<|channel|>final<|message|>It is sunny.<|return|>"}

Only the weights are missing: tokeniser, grammar, parser and everything above are the real ones, and a turn that the
request's grammar does not allow is an error that says where. There is no sampling, so temperature and the like change
nothing, and every logprob is 0.
"""

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from freehold.engine.metrics import EngineMetrics, EngineStats
from freehold.engine.request import FinishReason, Request, RequestStats, Step, TokenConstraint, TokenLogprobs
from freehold.errors import ClosedError, RequestError, UsageError
from freehold.formats.conversation import is_name
from freehold.formats.harmony.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from freehold.formats.tokenizer import Tokenizer
from freehold.sampling import GenerationDefaults
from freehold.session.prompting import Prompting
from freehold.session.served import Served

_CONTEXT = 131_072
_FIELDS = ("match", "completion", "reasoning", "calls", "answer", "fault")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedTurn:
    """One line of a script. Raises UsageError where it cannot be used."""

    completion: str
    match: re.Pattern[str] | None = None
    fault: str | None = None

    @classmethod
    def from_json(cls, raw: Any) -> "ScriptedTurn":
        if not isinstance(raw, dict):
            raise UsageError(f"a turn is an object, got {raw!r:.80}")
        if unknown := [key for key in raw if key not in _FIELDS]:
            raise UsageError(f"a turn has no field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
        raw = {key: value for key, value in raw.items() if value is not None}
        for key in ("match", "completion", "reasoning", "answer", "fault"):
            if not isinstance(raw.get(key, ""), str):
                raise UsageError(f"{key} is text, got {raw[key]!r:.80}")
        if ("completion" in raw) == any(key in raw for key in ("reasoning", "calls", "answer")):
            raise UsageError("a turn has either a completion, or reasoning, calls and answer")
        try:
            match = re.compile(raw["match"]) if "match" in raw else None
        except re.error as error:
            raise UsageError(f"match {raw['match']!r} is no regular expression: {error}") from None
        completion = raw["completion"] if "completion" in raw else _spelled_out(raw)
        if not completion:
            raise UsageError("the completion is empty; a turn says at least one token")
        return cls(completion=completion, match=match, fault=raw.get("fault"))


def read_script(path: Path) -> list[ScriptedTurn]:
    """Raises UsageError, naming the line, for a script that cannot be used."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # only these end a line of JSONL
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    turns = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            turns.append(ScriptedTurn.from_json(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
    if not turns:
        raise UsageError(f"{path} has no turns; give one JSON object a line")
    return turns


def _spelled_out(raw: dict[str, Any]) -> str:
    messages = [f"{CHANNEL}analysis{MESSAGE}{raw['reasoning']}{END}"] if "reasoning" in raw else []
    calls = raw.get("calls", [])
    if not isinstance(calls, list):
        raise UsageError(f"calls are a list, got {calls!r:.80}")
    if calls and "answer" in raw:
        messages.append(f"{CHANNEL}commentary{MESSAGE}{raw['answer']}{END}")
    for call in calls:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not _is_a_name(call["name"]):
            raise UsageError(f"a call has a name and arguments, got {call!r:.80}")
        arguments = call["arguments"] if isinstance(call["arguments"], str) else json.dumps(call["arguments"])
        messages.append(f"{CHANNEL}commentary to=functions.{call['name']} {CONSTRAIN}json{MESSAGE}{arguments}{CALL}")
    if not calls:
        messages.append(f"{CHANNEL}final{MESSAGE}{raw.get('answer', '')}{RETURN}")
    return f"{START}assistant".join(messages)


def _is_a_name(value: Any) -> bool:
    return isinstance(value, str) and is_name(value)


class Clock(Protocol):
    """What tells a script the time, in seconds from any moment on."""

    def now(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


class _RealClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


_REAL_CLOCK = _RealClock()


def serve_script(
    turns: Sequence[ScriptedTurn], *, tokens_per_second: float | None = None, clock: Clock = _REAL_CLOCK
) -> Served:
    """A served model with gpt-oss's own tokeniser that says these turns, as fast as it can where no speed is given."""
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise UsageError(f"tokens per second must be above 0, got {tokens_per_second!r}")
    tokenizer = Tokenizer.o200k_harmony()
    prompting = Prompting(
        source="the script",
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        context=_CONTEXT,
        longest=_CONTEXT,
        defaults=GenerationDefaults(stop_ids=frozenset({tokenizer.control_tokens[RETURN]})),
    )
    runner = ScriptedRunner(turns, tokenizer, tokens_per_second, clock)
    return Served(name="scripted", prompting=prompting, runner=runner)


class ScriptedRunner:
    """Runs requests by a script; see served.AsyncRunner."""

    def __init__(
        self,
        turns: Sequence[ScriptedTurn],
        tokenizer: Tokenizer,
        tokens_per_second: float | None = None,
        clock: Clock = _REAL_CLOCK,
    ) -> None:
        self._tokenizer = tokenizer
        self._by_match = [turn for turn in turns if turn.match is not None]
        self._in_order = [turn for turn in turns if turn.match is None]
        self._next = 0
        self._pause = 0.0 if tokens_per_second is None else 1 / tokens_per_second
        self._clock = clock
        self._running: set[_Run] = set()
        self._idle = asyncio.Event()  # what draining waits for
        self._closing = False
        self._num_requests = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self.metrics = EngineMetrics(self.stats)

    def submit(self, request: Request) -> "ScriptedSteps":
        if self._closing:
            raise ClosedError("the engine is closing down and takes no more requests")
        turn = self._turn(request.prompt)
        self._num_requests += 1
        self._num_prompt_tokens += len(request.prompt)
        run = _Run(request=request, turn=turn, began=self._clock.now())
        self._running.add(run)
        return ScriptedSteps(self._play(run), lambda: self._left(run))

    def _left(self, run: "_Run") -> None:
        self._running.discard(run)
        if not self._running:
            self._idle.set()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=0,
            cached_prefixes=0,
            pages_in_use=(),
            pages_held=(),
            pages=(),
            kv_bytes=0,
            requests=self._num_requests,
            prompt_tokens=self._num_prompt_tokens,
            cached_tokens=0,
            generated_tokens=self._num_generated_tokens,
            guessed_tokens=0,
            right_guesses=0,
            preemptions=0,
            steps=self._num_generated_tokens,
            busy_seconds=0.0,
        )

    async def drain(self, timeout: float | None = None) -> None:
        self._closing = True
        self._idle = asyncio.Event()
        if self._running:
            await _first(self._idle.wait(), *(() if timeout is None else (self._clock.sleep(timeout),)))
        for run in self._running:
            run.aborted.set()

    def _turn(self, prompt: Sequence[int]) -> ScriptedTurn:
        last = self._last_message(prompt)
        for turn in self._by_match:
            if turn.match is not None and turn.match.search(last):
                return turn
        if self._next == len(self._in_order):
            raise RequestError(
                f"the script has no turn left: {len(self._in_order)} were given in order, and of {len(self._by_match)} "
                "with a match none fits the last message; add one"
            )
        self._next += 1
        return self._in_order[self._next - 1]

    def _last_message(self, prompt: Sequence[int]) -> str:
        """The text of the last whole Harmony message; all of a prompt that has none."""
        known = self._tokenizer.control_tokens
        ids = list(prompt)
        ends = [at for at, id_ in enumerate(ids) if id_ in (known[END], known[CALL], known[RETURN])]
        if ends:
            ids = ids[: ends[-1]]
            ids = ids[len(ids) - ids[::-1].index(known[MESSAGE]) :] if known[MESSAGE] in ids else ids
        return self._tokenizer.decode(ids)

    async def _play(self, run: "_Run") -> AsyncGenerator[Step]:
        request = run.request
        samples = range(request.n)
        constraints = [None if request.constraint is None else request.constraint() for _ in samples]
        row = np.zeros(-(-self._tokenizer.vocab_size // 32), np.int32)
        script = self._tokenizer.encode_with_control(run.turn.completion)
        if not request.max_tokens:
            for index in samples:
                yield self._step(run, index, (), "length", 0)
        for number, token in enumerate(script[: request.max_tokens], start=1):
            if (ending := await self._pace(run, number)) is not None:
                for index in samples:
                    yield self._step(run, index, (), ending, number - 1)
                return
            finish = self._finish(request, token, number, len(script))
            for index, constraint in enumerate(constraints):
                if constraint is not None:
                    self._check(script[:number], constraint, row)
                    finish = "stop" if constraint.is_finished() else finish
                self._num_generated_tokens += 1
                yield self._step(run, index, (token,), None if run.turn.fault else finish, number)
            if finish is not None:
                break
        if run.turn.fault is not None:
            raise RequestError(run.turn.fault)

    async def _pace(self, run: "_Run", number: int) -> FinishReason | None:
        """Wait until this token is due; why it does not come, if it does not."""
        due = run.began + number * self._pause
        deadline = math.inf if run.request.deadline is None else run.began + run.request.deadline
        if (wait := min(due, deadline) - self._clock.now()) > 0:
            await _first(self._clock.sleep(wait), run.aborted.wait())
        else:
            await asyncio.sleep(0)  # others have their turn
        if run.aborted.is_set():
            return "abort"
        return "deadline" if self._clock.now() >= deadline else None

    def _finish(self, request: Request, token: int, number: int, length: int) -> FinishReason | None:
        if token in request.stop_ids or number == length:
            return "stop"
        return "length" if number == request.max_tokens else None

    def _check(self, said: Sequence[int], constraint: TokenConstraint, row: npt.NDArray[np.int32]) -> None:
        """Hold the last token against what the request allows."""
        *before, token = said
        constraint.fill_mask(row)
        if not row[token // 32] >> (token % 32) & 1:
            what = self._tokenizer.decode([token], control="show")
            where = self._tokenizer.decode(before[-12:], control="show")
            raise RequestError(
                f"the script says {what!r} as token {len(before)} of its turn, after {where!r}, where the request does "
                "not allow it; look at its tools, tool_choice and response format"
            )
        constraint.accept(token)

    def _step(
        self, run: "_Run", index: int, tokens: tuple[int, ...], finish: FinishReason | None, num_tokens: int
    ) -> Step:
        request, now = run.request, self._clock.now()
        if num_tokens == 1 and run.first_token_seconds is None:
            run.first_token_seconds = now - run.began
        stats = None
        if finish is not None:
            stats = RequestStats(
                num_prompt_tokens=len(request.prompt),
                num_cached_tokens=0,
                num_tokens=num_tokens,
                num_preemptions=0,
                queue_seconds=0.0,
                first_token_seconds=run.first_token_seconds,
                total_seconds=now - run.began,
            )
        of_prompt = None
        if request.prompt_logprobs is not None and index == 0 and num_tokens == len(tokens):  # its first step
            of_prompt = (None, *_certain(request.prompt[1:], request.prompt_logprobs))
        step = Step(
            index=index,
            tokens=tokens,
            logprobs=None if request.sampling.logprobs is None else _certain(tokens, request.sampling.logprobs),
            prompt_logprobs=of_prompt,
            finish=finish,
            stats=stats,
        )
        self.metrics.observe(step)
        return step


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One request on its way."""

    request: Request
    turn: ScriptedTurn
    began: float
    first_token_seconds: float | None = None
    aborted: asyncio.Event = field(default_factory=asyncio.Event)


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait for one of them, and for no other."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _certain(tokens: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Nothing else could have come."""
    return tuple(TokenLogprobs(0.0, ((token, 0.0),) if top else ()) for token in tokens)


class ScriptedSteps:
    """What a script makes of one request. When it is closed, cancelled or forgotten, so is the request."""

    def __init__(self, steps: AsyncGenerator[Step], ended: Callable[[], None]) -> None:
        self._steps = steps
        self._ended = ended

    def __aiter__(self) -> "ScriptedSteps":
        return self

    async def __anext__(self) -> Step:
        try:
            return await anext(self._steps)
        except BaseException:  # its end, a fault, or that of who reads it
            self._ended()
            raise

    async def aclose(self) -> None:
        """End the request; nothing more comes."""
        self._ended()
        await self._steps.aclose()

    def __del__(self) -> None:
        self._ended()
