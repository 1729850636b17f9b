"""The one door to chat formats: a conversation in, a turn out: token ids, how the reply may go, and who reads it.

`choose` picks Harmony or a Jinja template; callers above need to know neither. What a reply says comes as the events
of freehold.formats.events, whatever the format.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Literal, Protocol, TypedDict, Unpack

from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Message,
    SystemContent,
    ToolNamespace,
    text_message,
)
from freehold.formats.events import Event, MessageDone, MessageStart, TextDelta
from freehold.formats.forms import AnswerFormat
from freehold.formats.harmony.grammar import ToolChoice, TurnGrammar, TurnOptions
from freehold.formats.harmony.offer import Offer
from freehold.formats.harmony.parser import HarmonyParser
from freehold.formats.harmony.render import Rendered, render, render_reply
from freehold.formats.harmony.vocabulary import MESSAGE, START, HarmonyVocabulary, speaks_harmony
from freehold.formats.templates import ChatTemplate
from freehold.formats.text_grammar import TextGrammar
from freehold.formats.tokenizer import Detokenizer, Tokenizer


class ReplyReader(Protocol):
    """Reads one reply, token by token."""

    def feed(self, token_id: int) -> list[Event]:
        """What this token adds. Feed stop tokens as well: they say how a message ended."""

    def flush(self) -> list[Event]:
        """The rest: no more tokens will come."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The assistant's messages, to append to the conversation; complete after `flush`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn of the assistant about to be made: `grammar` is what a request takes as its constraint, None for none;
    each sample of it has a reader of its own."""

    prompt: Rendered
    stop_ids: frozenset[int]
    grammar: TurnGrammar | TextGrammar | None
    new_reader: Callable[[], ReplyReader]


class TurnChoices(TypedDict, total=False):
    """What a caller may ask of a turn; see freehold.formats.harmony.grammar.TurnOptions."""

    tool_choice: ToolChoice
    parallel_tool_calls: bool
    response_format: AnswerFormat | None
    reasoning: Literal["optional", "required"]
    max_reasoning_tokens: int | None


def _wishes(choices: TurnChoices) -> list[str]:
    """The choices that are not the default."""
    defaults = {field.name: field.default for field in fields(TurnOptions)}
    return [name for name, value in choices.items() if value != defaults[name]]


def _refuse_without_grammar(wishes: Sequence[str]) -> None:
    if wishes:
        raise UsageError(f"{', '.join(wishes)}: nothing keeps the model to it while the grammar is off")


class ChatFormat(Protocol):
    """How one model writes conversations."""

    def render(self, conversation: Conversation) -> Rendered:
        """The prompt for the assistant's next reply, and where its messages end: a later prompt may begin like that."""

    def turn(
        self,
        conversation: Conversation,
        *,
        grammar: bool = True,
        prompt: Rendered | None = None,
        **choices: Unpack[TurnChoices],
    ) -> Turn:
        """The assistant's next turn. Without a `grammar` it may say anything. A `prompt` stands in place of the
        conversation's own, which then is not rendered. Raises UsageError and UnsupportedError for choices that cannot
        be kept to."""

    def reply(
        self, conversation: Conversation, said: Sequence[Message], *, parallel_tool_calls: bool = False
    ) -> Rendered:
        """What the model writes after the conversation's prompt where it says these messages and ends its turn: what
        training teaches. The boundaries are where each message ends. Raises UsageError or UnsupportedError for what it
        cannot write."""


def choose(
    tokenizer: Tokenizer,
    template: str | None,
    stop_ids: Iterable[int],
    *,
    system: SystemContent | None = None,
    variables: Mapping[str, str] | None = None,
    harmony: bool | None = None,
) -> ChatFormat:
    """The format of a model with this tokeniser and chat template.

    `stop_ids` are those of its generation_config. `system` is Harmony's system message (today's date,
    effort); `variables` are for Jinja (`bos_token` and the like). `harmony` decides for or against Harmony where that
    is not to be left to the template. Raises CheckpointError where nothing says how to chat, or where it lacks what it
    takes, UsageError against Harmony where the template writes nothing else.
    """
    stops = frozenset(stop_ids)
    if harmony is None:
        harmony = speaks_of_harmony(template) if template is not None else speaks_harmony(tokenizer)
    if harmony:
        return HarmonyFormat(tokenizer, system=system or SystemContent(), more_stop_ids=stops)
    if template is None:
        raise CheckpointError(
            "this model has neither a chat template nor Harmony's control tokens; put a chat_template.jinja "
            "into its folder, or use it for plain completion"
        )
    if speaks_of_harmony(template):
        raise UsageError(
            "this model's own chat template writes Harmony, and there is no other; do not decide against it"
        )
    if not stops:
        raise CheckpointError(
            "nothing says which token ends this model's replies; name it as eos_token_id in its generation_config.json"
        )
    return TemplateFormat(tokenizer, ChatTemplate(template, variables=variables), stop_ids=stops)


def speaks_of_harmony(template: str) -> bool:
    """Whether a chat template writes Harmony."""
    return START in template and MESSAGE in template


# --- Harmony ------------------------------------------------------------------------------------------------


class HarmonyFormat:
    """gpt-oss's own format. Puts `system` before conversations that have no Harmony system message; those that have one
    are offered its tools."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        system: SystemContent,
        more_stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._system = system
        known = HarmonyVocabulary.of(tokenizer)
        # <|end|> closes a message, not the reply: the answer comes after the analysis.
        self._stop_ids = (more_stop_ids - {known.end}) | {known.return_, known.call}

    def render(self, conversation: Conversation) -> Rendered:
        """Chat messages of role "system" become developer instructions, assistant messages final ones."""
        return render(self._whole(conversation), self._tokenizer)

    def turn(
        self,
        conversation: Conversation,
        *,
        grammar: bool = True,
        prompt: Rendered | None = None,
        **choices: Unpack[TurnChoices],
    ) -> Turn:
        whole = self._whole(conversation)
        offer = Offer.of(whole)
        made = TurnGrammar(self._tokenizer, TurnOptions(offer=offer, **choices)) if grammar else None
        if made is None:
            _refuse_without_grammar(_wishes(choices))
        return Turn(
            prompt=prompt or render(whole, self._tokenizer),
            stop_ids=self._stop_ids if made is None else made.stop_ids,
            grammar=made,
            new_reader=lambda: HarmonyParser(self._tokenizer, offer=offer, plain_headers=made is None),
        )

    def reply(
        self, conversation: Conversation, said: Sequence[Message], *, parallel_tool_calls: bool = False
    ) -> Rendered:
        """The same after every conversation."""
        return render_reply([*map(_on_a_channel, said)], self._tokenizer, parallel_calls=parallel_tool_calls)

    def _whole(self, conversation: Conversation) -> Conversation:
        messages = _as_harmony(conversation.messages)
        place = next((i for i, message in enumerate(messages) if _has_system_content(message)), None)
        if place is None:
            messages.insert(0, Message(role="system", parts=(self._system,)))
        elif self._system.tools:
            messages[place] = _offering(messages[place], self._system.tools)
        return Conversation(messages=tuple(messages))


def _as_harmony(messages: Iterable[Message]) -> list[Message]:
    """Chat messages in Harmony's terms; system prompts in a row, and the tools among them, become one message."""
    result: list[Message] = []
    for is_developers, group in groupby(messages, _is_developers):
        if is_developers:
            result.append(_developer([part for message in group for part in _developer_parts(message)]))
        else:
            result += map(_on_a_channel, group)
    return result


def _has_system_content(message: Message) -> bool:
    return any(isinstance(part, SystemContent) for part in message.parts)


def _offering(message: Message, tools: tuple[ToolNamespace, ...]) -> Message:
    """A system message with more tools."""
    place = next(i for i, part in enumerate(message.parts) if isinstance(part, SystemContent))
    system = message.parts[place]
    assert isinstance(system, SystemContent)
    whole = replace(system, tools=(*system.tools, *tools))
    return replace(message, parts=(*message.parts[:place], whole, *message.parts[place + 1 :]))


def _is_developers(message: Message) -> bool:
    is_prompt = message.role == "system" and not _has_system_content(message)
    return is_prompt or message.role == "developer"


def _developer_parts(message: Message) -> list[DeveloperContent]:
    parts = [part for part in message.parts if isinstance(part, DeveloperContent)]
    return [*parts, DeveloperContent(instructions=message.text)] if message.text or not parts else parts


def _developer(parts: Sequence[DeveloperContent]) -> Message:
    instructions = [part.instructions for part in parts if part.instructions is not None]
    whole = DeveloperContent(
        instructions="\n\n".join(instructions) if instructions else None,
        tools=tuple(tool for part in parts for tool in part.tools),
        response_formats=tuple(form for part in parts for form in part.response_formats),
    )
    return Message(role="developer", parts=(whole,))


def _on_a_channel(message: Message) -> Message:
    is_answer = message.role == "assistant" and message.channel is None and message.recipient is None
    return replace(message, channel="final") if is_answer else message


# --- Jinja templates ----------------------------------------------------------------------------------------


class TemplateFormat:
    """Any other format: a Jinja template, and everything the model writes is the answer."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._stop_ids = stop_ids

    def render(self, conversation: Conversation) -> Rendered:
        """Drops what only Harmony has: its system message, and reasoning."""
        kept = tuple(message for message in conversation.messages if not _is_harmony_only(message))
        prompt = self._template.render(Conversation(messages=kept), self._tokenizer)
        return Rendered(prompt, _after(prompt, self._stop_ids))

    def turn(
        self,
        conversation: Conversation,
        *,
        grammar: bool = True,
        prompt: Rendered | None = None,
        **choices: Unpack[TurnChoices],
    ) -> Turn:
        """The structure is the template's own, and there is none to enforce: an answer's form is all to ask for."""
        wishes = _wishes(choices)
        if beyond := [wish for wish in wishes if wish != "response_format"]:
            raise UnsupportedError(f"{', '.join(beyond)}: that takes a model that speaks Harmony")
        if not grammar:
            _refuse_without_grammar(wishes)
        form = choices.get("response_format")
        return Turn(
            prompt=prompt or self.render(conversation),
            stop_ids=self._stop_ids,
            grammar=None if form is None else TextGrammar(self._tokenizer, form, self._stop_ids),
            new_reader=lambda: _PlainReader(self._tokenizer, self._stop_ids),
        )

    def reply(
        self, conversation: Conversation, said: Sequence[Message], *, parallel_tool_calls: bool = False
    ) -> Rendered:
        """What the template adds, up to the token that ends a reply. All of it is one message to a template."""
        if any(message.channel == "analysis" for message in said):
            raise UnsupportedError("this model's chat template has no place for reasoning; leave it out")
        kept = tuple(message for message in conversation.messages if not _is_harmony_only(message))
        prompt = self._template.render(Conversation(messages=kept), self._tokenizer)
        whole = self._template.render(
            Conversation(messages=(*kept, *said)), self._tokenizer, add_generation_prompt=False
        )
        written = self._beyond(prompt, whole)
        end = next((length for length, token in enumerate(written, start=1) if token in self._stop_ids), None)
        if end is None:
            raise UnsupportedError("this model's chat template ends a reply in none of its stop tokens")
        return Rendered(written[:end], [end] * len(said))

    def _beyond(self, prompt: list[int], whole: list[int]) -> list[int]:
        """What comes after the prompt, in the tokens that a model writes: a merge may reach over the prompt's end where
        both are rendered at once, and none does where one is written after the other."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        alike = next(i for i, token in enumerate([*prompt, -1]) if i == len(whole) or token != whole[i])
        names = self._tokenizer.control_name
        plain = next((i for i in range(alike, len(whole)) if names(whole[i]) is not None), len(whole))
        rest = self._tokenizer.decode_bytes(prompt[alike:], control="show")
        text = self._tokenizer.decode_bytes(whole[alike:plain])
        if not text.startswith(rest):
            raise UnsupportedError(
                "this model's chat template begins an assistant's message otherwise than its generation prompt does"
            )
        return [*self._tokenizer.encode(text[len(rest) :].decode(errors="replace")), *whole[plain:]]


def _after(prompt: Sequence[int], ends: Set[int]) -> list[int]:
    return [length for length, token in enumerate(prompt, start=1) if token in ends]


def _is_harmony_only(message: Message) -> bool:
    """The system message only where it offers no tools: those are not to be passed over in silence."""
    is_system = any(isinstance(part, SystemContent) and not part.tools for part in message.parts)
    return message.channel == "analysis" or is_system


class _PlainReader:
    """Everything is one message, an answer. Stop tokens add nothing to it, nor do other control tokens."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Set[int]) -> None:
        self._stop_ids = stop_ids
        self._stop_id: int | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._pieces: list[str] = []
        self._started = False

    @property
    def messages(self) -> tuple[Message, ...]:
        return (text_message("assistant", "".join(self._pieces)),)

    def feed(self, token_id: int) -> list[Event]:
        if token_id in self._stop_ids:
            self._stop_id = token_id
            return self._say("")
        return self._say(self._detokenizer.feed(token_id))

    def flush(self) -> list[Event]:
        return [*self._say(self._detokenizer.flush()), MessageDone(message=self.messages[0], stop_id=self._stop_id)]

    def _say(self, text: str) -> list[Event]:
        events: list[Event] = [] if self._started else [MessageStart(role="assistant")]
        self._started = True
        if text:
            self._pieces.append(text)
            events.append(TextDelta(text))
        return events
