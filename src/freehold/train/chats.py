"""What a line of training data says: chats and preference pairs in OpenAI's shapes, the latter in TRL's too.

    {"messages": [...], "tools": [...], "parallel_tool_calls": false}
    {"input": {"messages": [...], "tools": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
    {"prompt": [...], "chosen": [...], "rejected": [...], "tools": [...]}
    {"text": "..."}
    {"harmony": {"messages": [...]}}

All are read strictly. The last is what openai-harmony's `Conversation.to_dict` writes: for effort, date and built-in
tools, which OpenAI's shape has no place for. The messages of the others are read by `Conversation.from_openai`'s rules;
beyond these, whatever a model could not have said is refused (UsageError, UnsupportedError): calls of functions that
were not offered, arguments that are no JSON, calls without results, a turn without an answer. Knows no tokens. Called
by `data.py`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from freehold.errors import UnsupportedError, UsageError
from freehold.formats.conversation import Conversation, Message, openai_messages, openai_tools
from freehold.formats.harmony.offer import FUNCTIONS, Offer

_CHAT = ("messages", "tools", "parallel_tool_calls")
_PAIR = ("input", "preferred_output", "non_preferred_output")
_TRL_PAIR = ("prompt", "chosen", "rejected", "tools")
_OLD = {"functions": "tools", "function_call": "tool_calls", "prompt": "messages", "completion": "messages"}


class Turn(NamedTuple):
    """What the assistant says in one go after `before`; `taught` tells of each message whether training is on it."""

    before: Conversation
    said: tuple[Message, ...]
    taught: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation to be learnt. `parallel_calls`: a turn may have several calls."""

    turns: tuple[Turn, ...]
    parallel_calls: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two turns after one conversation."""

    chosen: Turn
    rejected: Turn
    parallel_calls: bool = False


@dataclass(frozen=True, slots=True)
class PlainText:
    text: str


def read_example(raw: Mapping[str, Any]) -> Chat | PlainText:
    """A line for supervised training."""
    if any(key in raw for key in (*_PAIR, "chosen", "rejected")):
        raise UsageError("is a preference pair; those are for DPO (--method dpo)")
    if "harmony" in raw:
        _check_keys(raw, ("harmony",), "a Harmony conversation")
        return _read_harmony(raw["harmony"])
    if "text" in raw:
        _check_keys(raw, ("text",), "a line of plain text")
        if not isinstance(raw["text"], str):
            raise UsageError(f"text must be a string, got {_kind(raw['text'])}")
        if not raw["text"].strip():
            raise UsageError("text is empty")
        return PlainText(raw["text"])
    _check_keys(raw, _CHAT, "a chat")
    said = _Said(raw)
    turns = tuple(said.turns())
    if not turns:
        raise UsageError("messages have none of the assistant's; there is nothing to learn")
    if said.roles[-1] != "assistant":
        raise UsageError(f"the last message is of role {said.roles[-1]!r}; end with the assistant's")
    if not any(taught for turn in turns for taught in turn.taught):
        raise UsageError("every message of the assistant has weight 0; there is nothing to learn")
    return Chat(turns=turns, parallel_calls=said.parallel_calls)


def read_preference(raw: Mapping[str, Any]) -> Preference:
    """A line for DPO."""
    if "chosen" in raw or "rejected" in raw:
        pair = _trl_pair(raw)
    elif "messages" in raw or "text" in raw:
        raise UsageError("is no preference pair; give input, preferred_output and non_preferred_output")
    else:
        pair = _openai_pair(raw)
    for name, output in pair.outputs.items():
        if not output:
            raise UsageError(f"{name} has no message after what both begin with; end it with the assistant's")
        for index, message in enumerate(output, start=pair.num_shared):
            if not isinstance(message, dict) or message.get("role") != "assistant":
                raise UsageError(f"{name}: message {index} is not the assistant's; outputs are one turn of it")
    said = _input(pair)
    if said.roles[-1] == "assistant":
        raise UsageError(f"{pair.name} ends with the assistant's message; end with what is to be answered")
    wholes = []
    for name in pair.outputs:
        whole, all_turns = _within(pair, name)
        turns = [turn for turn in all_turns if len(turn.before.messages) >= len(said.conversation.messages)]
        if len(turns) != 1:
            raise UsageError(f"{name} is {len(turns)} turns of the assistant; give one")
        wholes.append((turns[0], whole.parallel_calls))
    (chosen, one), (rejected, other) = wholes
    return Preference(chosen=chosen, rejected=rejected, parallel_calls=one or other)


class _Pair(NamedTuple):
    """A preference pair of either shape: what is answered, by OpenAI's fields, and two outputs. What is wrong with them
    is told by the names and places that they have in their own: `num_shared` messages stand before each output there.
    """

    name: str
    input: Mapping[str, Any]
    outputs: Mapping[str, list[Any]]
    num_shared: int = 0


def _openai_pair(raw: Mapping[str, Any]) -> _Pair:
    _check_keys(raw, _PAIR, "a preference pair")
    if not isinstance(raw.get("input"), dict):
        raise UsageError(f"input must be an object with messages, got {_kind(raw.get('input'))}")
    _check_keys(raw["input"], _CHAT, "an input")
    return _Pair("input", raw["input"], _outputs(raw, *_PAIR[1:]))


def _trl_pair(raw: Mapping[str, Any]) -> _Pair:
    """With its prompt, or with two conversations that are the same up to the assistant's last turn. Of texts it is not
    known where a template would have them."""
    _check_keys(raw, _TRL_PAIR, "a preference pair")
    outputs = _outputs(raw, "chosen", "rejected")
    prompt = raw.get("prompt")
    if prompt is not None:
        if not isinstance(prompt, list):
            raise UsageError(f"prompt must be a list of messages, got {_kind(prompt)}")
        return _Pair("prompt", {"messages": prompt, "tools": raw.get("tools")}, outputs)
    number = _num_common(*outputs.values())
    if not number:
        raise UsageError("chosen and rejected do not begin with the same messages; give a prompt")
    before = {"messages": outputs["chosen"][:number], "tools": raw.get("tools")}
    return _Pair("chosen", before, {name: messages[number:] for name, messages in outputs.items()}, number)


def _outputs(raw: Mapping[str, Any], good: str, bad: str) -> dict[str, list[Any]]:
    outputs: dict[str, list[Any]] = {}
    for name in (good, bad):
        output = raw.get(name)
        if not isinstance(output, list) or not output:
            raise UsageError(f"{name} must be a list of the assistant's messages, got {_kind(output)}")
        outputs[name] = output
    if outputs[good] == outputs[bad]:
        raise UsageError(f"{good} and {bad} are the same")
    return outputs


def _num_common(chosen: list[Any], rejected: list[Any]) -> int:
    """Messages that both begin with, up to where the assistant is to answer."""
    number = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        number += 1
    while number and isinstance(chosen[number - 1], dict) and chosen[number - 1].get("role") == "assistant":
        number -= 1
    return number


def _input(pair: _Pair) -> "_Said":
    with _told_of(pair.name):
        said = _Said(pair.input, has_weights=False)
        _check_no_weight(pair.input["messages"])
        return said


def _within(pair: _Pair, name: str) -> "tuple[_Said, list[Turn]]":
    """An output as the end of its conversation."""
    before, output = pair.input["messages"], pair.outputs[name]
    with _told_of(name):
        _check_no_weight(output)
        if not pair.num_shared:
            openai_messages(output)  # whose own mistakes it tells by their place in the output
        first = 0 if pair.num_shared else len(before)
        said = _Said({**pair.input, "messages": [*before, *output]}, first=first, has_weights=False)
        return said, list(said.turns())


def _check_no_weight(messages: Sequence[Mapping[str, Any]]) -> None:
    if any(message.get("weight") is not None for message in messages):
        raise UsageError("weight is for chats; in a preference pair the outputs are what is learnt")


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    try:
        yield
    except (UsageError, UnsupportedError) as error:
        raise type(error)(f"{name}: {error}") from None


# --- chats --------------------------------------------------------------------------------------------------


class _Said:
    """The messages of a chat, checked. Places are told as `message 3`, from 0 on, counted from `first`."""

    def __init__(self, raw: Mapping[str, Any], *, first: int = 0, has_weights: bool = True) -> None:
        self._first, self._has_weights = first, has_weights
        messages = _list(raw, "messages")
        if not messages:
            raise UsageError("messages is empty; give a question and an answer")
        tools = _list(raw, "tools") if raw.get("tools") is not None else []
        parallel = raw.get("parallel_tool_calls")
        if not isinstance(parallel, bool | None):
            raise UsageError(f"parallel_tool_calls is true or false, got {parallel!r:.40}")
        self._weights = [self._weight(index, message) for index, message in enumerate(messages)]
        self._groups = openai_messages(
            [
                {key: value for key, value in message.items() if key != "weight"}
                if isinstance(message, dict)
                else message
                for message in messages
            ]
        )
        self._offered = openai_tools(tools)
        self.roles = [str(message["role"]) for message in messages]
        self.conversation = Conversation(messages=tuple(said for group in self._groups for said in group))
        most = max(sum(said.recipient is not None for said in group) for group in self._assistants())
        if parallel is False and most > 1:
            raise UsageError(f"a message has {most} tool calls, but parallel_tool_calls is false")
        # What OpenAI's files leave out is allowed. A turn that may go on after a call ends otherwise, so that it is
        # taught where it is needed only.
        self.parallel_calls = parallel if parallel is not None else most > 1
        self._check(messages)

    def _assistants(self) -> list[list[Message]]:
        groups = [group for group, role in zip(self._groups, self.roles, strict=True) if role == "assistant"]
        return groups or [[]]

    def _weight(self, index: int, message: Any) -> bool:
        weight = message.get("weight") if isinstance(message, dict) else None
        if weight is None:
            return True
        if isinstance(weight, bool) or weight not in (0, 1):
            raise UsageError(f"{self._place(index)}: weight is 0 or 1, got {json.dumps(weight):.40}")
        if message.get("role") != "assistant":
            raise UsageError(f"{self._place(index)}: weight is for the assistant's messages only")
        return bool(weight)

    def _place(self, index: int) -> str:
        return f"message {index - self._first if index >= self._first else index}"

    def _check(self, messages: Sequence[Mapping[str, Any]]) -> None:
        offer = Offer.of(self.conversation.offering(self._offered))
        open_calls: list[str] = []
        for index, (raw, group) in enumerate(zip(messages, self._groups, strict=True)):
            place = self._place(index)
            if raw["role"] == "tool":
                if raw["tool_call_id"] not in open_calls:
                    raise UsageError(f"{place}: call {raw['tool_call_id']!r:.80} has its result already")
                open_calls.remove(raw["tool_call_id"])
                continue
            if open_calls:
                raise UsageError(f"{place}: call {open_calls[0]!r:.80} before it has no result")
            if raw["role"] == "assistant":
                self._check_reply(place, group, offer, self._weights[index])
                open_calls = self._call_ids(place, raw)

    def _call_ids(self, place: str, raw: Mapping[str, Any]) -> list[str]:
        ids: list[str] = []
        for call in raw.get("tool_calls") or ():
            id_ = call.get("id")
            if not id_:
                raise UsageError(f"{place}: a tool call has no id; its result names it")
            if id_ in ids:
                raise UsageError(f"{place}: two calls have the id {id_!r:.80}")
            ids.append(id_)
        return ids

    def _check_reply(self, place: str, group: Sequence[Message], offer: Offer, is_taught: bool) -> None:
        if is_taught and not any(said.text for said in group):
            otherwise = ", or weight 0" if self._has_weights else ""
            raise UsageError(f"{place}: the assistant says nothing; give content or tool_calls{otherwise}")
        for said in group:
            if said.recipient is None:
                continue
            name = said.recipient.removeprefix(f"{FUNCTIONS}.")
            callee = offer.callees.get(said.recipient)
            if callee is None:
                raise UsageError(f"{place}: calls {name!r:.80}, which is not among the tools")
            if callee.takes_json != (said.content_type is not None):
                raise UsageError(f"{place}: calls {name!r:.80} as a tool of another type than it is")
            if callee.takes_json:
                _check_arguments(f"{place}: the arguments of {name!r:.80}", said.text)

    def turns(self) -> Iterator[Turn]:
        """The assistant's turns: each goes on until an answer, or a call and those that follow it at once."""
        before: list[Message] = []
        said: list[Message] = []
        taught: list[bool] = []
        for index, (role, group) in enumerate(zip(self.roles, self._groups, strict=True)):
            if role != "assistant":
                if said:
                    raise self._unfinished(index - 1)
                before += group
                continue
            said += group
            taught += [self._weights[index]] * len(group)
            if group[-1].channel == "analysis":  # the answer is a message of its own
                continue
            yield Turn(Conversation(messages=tuple(before)).offering(self._offered), tuple(said), tuple(taught))
            before += said
            said, taught = [], []
        if said:
            raise self._unfinished(len(self.roles) - 1)

    def _unfinished(self, index: int) -> UsageError:
        return UsageError(f"{self._place(index)}: the assistant reasons and then neither answers nor calls a tool")


# --- Harmony conversations ----------------------------------------------------------------------------------


def _read_harmony(raw: Any) -> Chat:
    """All that the assistant says in it is learnt."""
    if not isinstance(raw, dict):
        raise UsageError(f"harmony must be an object with messages, got {_kind(raw)}")
    conversation = Conversation.from_harmony(raw)
    messages = conversation.messages
    if not messages:
        raise UsageError("messages is empty; give a question and an answer")
    if messages[-1].role != "assistant":
        raise UsageError(f"the last message is of role {messages[-1].role!r}; end with the assistant's")
    offer = Offer.of(conversation)
    turns: list[Turn] = []
    start: int | None = None  # of the turn that is being said
    for index, message in enumerate(messages):
        called = messages[index - 1].recipient if index and messages[index - 1].role == "assistant" else None
        if message.role == "tool" and message.name != called:
            raise UsageError(f"message {index}: is the result of no call before it")
        if message.role != "tool" and called is not None:
            raise UsageError(f"message {index}: call of {called!r:.80} before it has no result")
        if message.role != "assistant":
            if start is not None:
                raise UsageError(
                    f"message {index - 1}: the assistant reasons and then neither answers nor calls a tool"
                )
            continue
        _check_said(index, message, offer)
        start = index if start is None else start
        if message.recipient is not None or message.channel in (None, "final"):
            said = messages[start : index + 1]
            turns.append(Turn(Conversation(messages=messages[:start]), said, (True,) * len(said)))
            start = None
    if start is not None:
        place = len(messages) - 1
        raise UsageError(f"message {place}: the assistant reasons and then neither answers nor calls a tool")
    return Chat(turns=tuple(turns))


def _check_said(index: int, message: Message, offer: Offer) -> None:
    if message.recipient is None:
        if not message.text:
            raise UsageError(f"message {index}: the assistant says nothing; give content")
        return
    callee = offer.callees.get(message.recipient)
    if callee is None:
        raise UsageError(f"message {index}: calls {message.recipient!r:.80}, which is not among the tools")
    if message.channel != callee.channel:
        raise UsageError(
            f"message {index}: calls {message.recipient!r:.80} on channel {message.channel!r}; use {callee.channel}"
        )
    if callee.takes_json:
        _check_arguments(f"message {index}: the arguments of {message.recipient!r:.80}", message.text)


def _check_arguments(what: str, text: str) -> None:
    try:
        arguments = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise UsageError(f"{what} are no JSON: {text!r:.60}") from None
    if not isinstance(arguments, dict):
        raise UsageError(f"{what} are no JSON object: {text!r:.60}")


def _no_number(name: str) -> Any:
    raise ValueError(name)  # NaN and the like, which Python's reader would let pass


# --- checks -------------------------------------------------------------------------------------------------


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key, value in raw.items():
        if key in known or (value is None and key not in _OLD):
            continue
        if key in _OLD:
            raise UnsupportedError(f"field {key!r} is not supported; use {_OLD[key]}")
        raise UnsupportedError(f"field {key!r:.80} is not supported; {what} has {', '.join(known)}")


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list):
        raise UsageError(f"{key} must be a list of objects, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case list() | dict() if not value:
            return "an empty one"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "a list"
    return "an object"
