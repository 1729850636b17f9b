"""Conversations as Harmony token ids: control ids, and between them plainly encoded text.

Token for token what openai-harmony renders, but for what the tests name as deliberate differences. The largest: of
everything before the last final answer, no analysis is shown to the model again, as the written specification has
it; that library looks at the first final answer only, and not at all while a tool is being called.

Whatever text a conversation holds, and wherever, it cannot become a control token. Called by `chat.py`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from freehold.errors import UsageError
from freehold.formats.conversation import (
    Conversation,
    DeveloperContent,
    Message,
    Part,
    ResponseFormat,
    Role,
    SystemContent,
    Text,
    Tool,
    ToolNamespace,
)
from freehold.formats.forms import FreeText, Lark, Regex
from freehold.formats.harmony.offer import FUNCTION_CHANNEL, FUNCTIONS, Offer
from freehold.formats.harmony.typescript import compact_json, typescript
from freehold.formats.harmony.vocabulary import CONSTRAIN, HarmonyVocabulary
from freehold.formats.tokenizer import Tokenizer


class Rendered(NamedTuple):
    """Token ids, and the lengths of all their beginnings that end with a whole message."""

    ids: list[int]
    boundaries: list[int]


def render(conversation: Conversation, tokenizer: Tokenizer, *, upto: Role | None = "assistant") -> Rendered:
    """The messages that the model sees again, then the opening of `upto`'s next one.

    Every message but a call is closed by `<|end|>`, even where the model wrote `<|return|>`. Raises UsageError for
    tools whose names collide, and for schemas that cannot be written out.
    """
    vocabulary = HarmonyVocabulary.of(tokenizer)
    has_functions = bool(Offer.of(conversation).functions)
    ids: list[int] = []
    boundaries: list[int] = []
    for message in _without_past_analysis(conversation.messages):
        ids += _message(message, has_functions, tokenizer, vocabulary)
        boundaries.append(len(ids))
    if upto is not None:
        ids += [vocabulary.start, *tokenizer.encode(upto)]
    return Rendered(ids, boundaries)


def render_reply(messages: Sequence[Message], tokenizer: Tokenizer, *, parallel_calls: bool = False) -> Rendered:
    """What the model writes after its `<|start|>assistant` where these messages are its whole turn, reasoning included.

    The turn ends as the grammar has it: an answer in `<|return|>`, a call in `<|call|>`, and in `<|return|>` behind it
    where there may be parallel ones. Raises UsageError for a turn that ends in neither.
    """
    vocabulary = HarmonyVocabulary.of(tokenizer)
    opening = [vocabulary.start, *tokenizer.encode("assistant")]
    ids: list[int] = []
    boundaries: list[int] = []
    for message in messages:
        ids += _message(message, False, tokenizer, vocabulary)
        boundaries.append(len(ids))
    last = messages[-1] if messages else None
    if last is None or not (_is_answer(last) or last.recipient is not None):
        raise UsageError("the assistant's turn ends in neither an answer nor a call")
    assert ids[: len(opening)] == opening, "only the speaker's own messages are its turn"
    if _is_answer(last):
        ids[-1] = vocabulary.return_
    elif parallel_calls:
        ids.append(vocabulary.return_)
        boundaries[-1] += 1
    return Rendered(ids[len(opening) :], [boundary - len(opening) for boundary in boundaries])


def _message(message: Message, has_functions: bool, tokenizer: Tokenizer, vocabulary: HarmonyVocabulary) -> list[int]:
    ids = [vocabulary.start, *_header(message, tokenizer, vocabulary), vocabulary.message]
    for part in message.parts:
        ids += tokenizer.encode(_part_text(part, has_functions))
    calls_tool = message.role == "assistant" and message.recipient is not None
    return [*ids, vocabulary.call if calls_tool else vocabulary.end]


def _without_past_analysis(messages: Sequence[Message]) -> Iterator[Message]:
    """A final answer closes all reasoning before it; what comes after the last one belongs to an open turn.

    What was said to built-in tools, and what they said, is part of the reasoning. A call is no answer on any channel.
    """
    last_answer = max((i for i, message in enumerate(messages) if _is_answer(message)), default=-1)
    return (message for i, message in enumerate(messages) if i > last_answer or message.channel != "analysis")


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and message.channel == "final" and message.recipient is None


# --- headers ------------------------------------------------------------------------------------------------


def _header(message: Message, tokenizer: Tokenizer, vocabulary: HarmonyVocabulary) -> list[int]:
    if message.role == "tool":  # a tool's message is headed by its name alone
        ids = tokenizer.encode(message.name or "")
    else:
        ids = tokenizer.encode(message.role)
        if message.name is not None:
            ids += tokenizer.encode(f":{message.name}")
    if message.recipient not in (None, "all"):
        ids += tokenizer.encode(f" to={message.recipient}")
    if message.channel is not None:
        ids += [vocabulary.channel, *tokenizer.encode(message.channel)]
    if message.content_type is not None:
        ids += _content_type(message.content_type, tokenizer, vocabulary)
    return ids


def _content_type(content_type: str, tokenizer: Tokenizer, vocabulary: HarmonyVocabulary) -> list[int]:
    if not content_type.startswith(CONSTRAIN):
        return tokenizer.encode(f" {content_type}")
    return [*tokenizer.encode(" "), vocabulary.constrain, *tokenizer.encode(content_type.removeprefix(CONSTRAIN))]


# --- bodies -------------------------------------------------------------------------------------------------


def _part_text(part: Part, has_functions: bool) -> str:
    match part:
        case Text(text=text):
            return text
        case SystemContent():
            return "\n\n".join(_system_sections(part, has_functions))
        case DeveloperContent():
            return "\n\n".join(_developer_sections(part))


def _system_sections(system: SystemContent, has_functions: bool) -> Iterator[str]:
    about = []
    if system.identity is not None:
        about.append(system.identity)
    if system.knowledge_cutoff is not None:
        about.append(f"Knowledge cutoff: {system.knowledge_cutoff}")
    if system.date is not None:
        about.append(f"Current date: {system.date}")
    if about:
        yield "\n".join(about)
    if system.effort is not None:
        yield f"Reasoning: {system.effort}"
    if system.tools:
        yield "# Tools"
        for namespace in sorted(system.tools, key=lambda namespace: namespace.name):
            yield _namespace(namespace)
    if system.channels:
        rule = f"# Valid channels: {', '.join(system.channels)}. Channel must be included for every message."
        if has_functions:
            rule += f"\nCalls to these tools must go to the {FUNCTION_CHANNEL} channel: '{FUNCTIONS}'."
        yield rule


def _developer_sections(developer: DeveloperContent) -> Iterator[str]:
    if developer.instructions is not None:
        yield f"# Instructions\n\n{developer.instructions}"
    if developer.tools:
        yield "# Tools"
        yield _namespace(ToolNamespace(name=FUNCTIONS, tools=developer.tools))
    if developer.response_formats:
        yield "# Response Formats"
        yield from map(_response_format, developer.response_formats)


def _namespace(namespace: ToolNamespace) -> str:
    heading = f"## {namespace.name}\n"
    if not namespace.tools:
        return "\n".join([heading, *_lines(namespace.description)])
    opening = f"namespace {namespace.name} {{\n"
    closing = f"}} // namespace {namespace.name}"
    return "\n".join([heading, *_commented(namespace.description), opening, *map(_function, namespace.tools), closing])


def _function(tool: Tool) -> str:
    try:
        argument = "" if tool.parameters is None else f"_: {typescript(tool.parameters)}"
        if tool.text_format is not None:
            argument = "_: string"
    except UsageError as error:
        raise UsageError(f"tool {tool.name!r}: {error}") from None
    comments = [*_commented(tool.description), *_commented(_text_format(tool))]
    return "\n".join([*comments, f"type {tool.name} = ({argument}) => any;\n"])


def _text_format(tool: Tool) -> str:
    """What there is to say about plain text that is sent instead of JSON arguments."""
    match tool.text_format:
        case FreeText():
            return "Send plain text, not JSON."
        case Regex(pattern=pattern):
            return f"Send plain text, not JSON. All of it matches this regular expression:\n{pattern}"
        case Lark(text=text):
            return f"Send plain text, not JSON. It follows this Lark grammar:\n{text}"
    return ""


def _response_format(form: ResponseFormat) -> str:
    try:
        schema = compact_json(form.schema)
    except UsageError as error:
        raise UsageError(f"response format {form.name!r}: {error}") from None
    return "\n".join([f"## {form.name}\n", *_commented(form.description), schema])


def _commented(text: str) -> list[str]:
    return [f"// {line}" for line in _lines(text)]


def _lines(text: str) -> list[str]:
    """Lines as Rust's `str::lines` has them: they end in LF or CR LF and nothing else, the last one maybe not."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
