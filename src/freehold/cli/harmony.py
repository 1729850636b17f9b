"""`freehold harmony`: what gpt-oss reads and writes, token by token, so that people can see what it really said."""

import json
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import terminal
from freehold.cli.options import ReasoningEffort
from freehold.errors import UsageError

if TYPE_CHECKING:
    from freehold.formats.conversation import Conversation, Message
    from freehold.formats.events import Diagnostic, Event
    from freehold.formats.harmony.offer import Offer
    from freehold.formats.harmony.render import Rendered
    from freehold.formats.tokenizer import Tokenizer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

File = Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for a pipe.")]
ModelVocabulary = Annotated[
    str | None, typer.Option("--model", "-m", help="Use this model's vocabulary; default: gpt-oss's own.")
]
Ids = Annotated[bool, typer.Option("--ids", help="Token ids, as a JSON list.")]
Tools = Annotated[
    str | None,
    typer.Option("--tools", metavar="FILE", help="A conversation, or a list of tools, that says what is offered."),
]


@app.callback()
def _about() -> None:
    """Show Harmony: what a conversation becomes for the model, and what a model's tokens mean.

    A conversation is JSON: messages of OpenAI's chat API, or {"messages": ..., "tools": ...}, or what openai-harmony
    writes. A completion is the model's raw text with its control tokens spelled out, or a JSON list of token ids; it
    begins after <|start|>assistant.

    \b
    freehold harmony render chat.json
    freehold harmony parse completion.txt --tools chat.json
    freehold harmony explain completion.txt
    """


@app.command("render")
def render_command(
    file: File, model: ModelVocabulary = None, ids: Ids = False, reasoning_effort: ReasoningEffort = None
) -> None:
    """Write a conversation as the model reads it, up to the opening of its reply.

    As in a chat, a system message with today's date comes first where the conversation brings none of Harmony's own.

    \b
    freehold harmony render chat.json
    freehold harmony render chat.json --ids
    """
    tokenizer = _tokenizer(model)
    rendered = _rendered(_conversation(_json(_read(file), file), file), tokenizer, reasoning_effort)
    if ids:
        terminal.write(json.dumps(rendered.ids) + "\n")
    else:
        _print(_coloured(tokenizer, rendered.ids) + "\n")
    terminal.say(f"{len(rendered.ids)} tokens; messages end at {', '.join(map(str, rendered.boundaries)) or 'none'}")


@app.command("parse")
def parse_command(file: File, model: ModelVocabulary = None, tools: Tools = None) -> None:
    """Read a completion; write its messages, calls and diagnostics as JSON.

    \b
    freehold harmony parse completion.txt
    freehold harmony parse ids.json --tools chat.json
    """
    tokenizer = _tokenizer(model)
    ids = _completion(_read(file), tokenizer)
    reading = _Reading.of(ids, tokenizer, _offer(tools, beside=file))
    terminal.write(json.dumps(reading.facts(), indent=2, ensure_ascii=False) + "\n")


@app.command("explain")
def explain_command(file: File, model: ModelVocabulary = None, tools: Tools = None) -> None:
    """Show a conversation or a completion message by message: header, text, token ids, and what is wrong.

    \b
    freehold harmony explain chat.json
    freehold harmony explain completion.txt --tools chat.json
    """
    text, tokenizer = _read(file), _tokenizer(model)
    conversation = _if_conversation(text, file)
    if conversation is None:
        reading = _Reading.of(_completion(text, tokenizer), tokenizer, _offer(tools, beside=file))
    else:
        from freehold.formats.harmony.offer import Offer

        rendered = _rendered(conversation, tokenizer)
        ids = rendered.ids[: rendered.boundaries[-1]]  # without the opening of the reply
        reading = _Reading.of(ids, tokenizer, Offer.of(conversation), is_reply=False)
    _print("\n".join(reading.explain(tokenizer)) + "\n")


# --- reading what is given ----------------------------------------------------------------------------------


def _read(file: str, *, beside: str | None = None) -> str:
    """The text of a file; `beside` is one that was read already."""
    if file == "-":
        if beside == "-":
            raise UsageError("only one of the two can come through the pipe; give the other one's name")
        return terminal.read_stdin()
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _json(text: str, file: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from None


def _conversation(raw: Any, file: str) -> "Conversation":
    from freehold.formats.conversation import Conversation

    messages = raw.get("messages") if isinstance(raw, dict) else raw
    if not isinstance(messages, list):
        raise UsageError(f"{file} holds no conversation: expected a list of messages, or an object with one")
    parts = [
        part for m in messages if isinstance(m, dict) and isinstance(m.get("content"), list) for part in m["content"]
    ]
    kinds = {part.get("type") for part in parts if isinstance(part, dict)}
    fields = {key for m in messages if isinstance(m, dict) for key in m}
    if kinds & {"system_content", "developer_content"} or fields & {"channel", "recipient", "content_type"}:
        return Conversation.from_harmony(raw)
    unknown = set(raw) - {"messages", "tools", "model"} if isinstance(raw, dict) else set()
    if unknown:
        raise UsageError(f"{file}: {', '.join(sorted(unknown))} would not be rendered; leave it out")
    return Conversation.from_openai(messages, tools=raw.get("tools") if isinstance(raw, dict) else None)


def _rendered(conversation: "Conversation", tokenizer: "Tokenizer", effort: Any = None) -> "Rendered":
    from freehold.formats.chat import HarmonyFormat
    from freehold.formats.conversation import SystemContent

    return HarmonyFormat(tokenizer, system=SystemContent.today(effort)).render(conversation)


def _if_conversation(text: str, file: str) -> "Conversation | None":
    """A conversation, if that is what the text is; a completion may be JSON as well."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return None
    messages = raw.get("messages") if isinstance(raw, dict) else raw
    if not isinstance(messages, list) or not messages:
        return None
    return _conversation(raw, file) if all(isinstance(m, dict) and "role" in m for m in messages) else None


def _completion(text: str, tokenizer: "Tokenizer") -> list[int]:
    if text.lstrip().startswith("["):
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raw = None
        if isinstance(raw, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in raw):
            return raw
    # An editor's line end at the end of the file was not written by the model.
    return tokenizer.encode_with_control(text.removesuffix("\n") if text.endswith(">\n") else text)


def _offer(file: str | None, *, beside: str) -> "Offer":
    from freehold.formats.conversation import Conversation
    from freehold.formats.harmony.offer import Offer

    if file is None:
        return Offer()
    raw = _json(_read(file, beside=beside), file)
    is_tools = isinstance(raw, list) and all(isinstance(item, dict) and "role" not in item for item in raw)
    return Offer.of(Conversation.from_openai([], tools=raw) if is_tools else _conversation(raw, file))


def _tokenizer(model: str | None) -> "Tokenizer":
    from freehold.formats.harmony.vocabulary import HarmonyVocabulary
    from freehold.formats.tokenizer import Tokenizer

    if model is None:
        return Tokenizer.o200k_harmony()
    from freehold.hub.find import find_model
    from freehold.hub.folder import open_folder

    with terminal.progress_bars() as progress:
        tokenizer = open_folder(find_model(model, progress)).tokenizer
    if tokenizer is None:
        raise UsageError(f"{model} has no tokenizer.json; leave --model out to use gpt-oss's vocabulary")
    HarmonyVocabulary.of(tokenizer)  # says what is missing
    return tokenizer


# --- what the parser made of it -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Passage:
    """A message's tokens and what follows before the next one begins; `message` is None where there is none yet."""

    start: int
    stop: int
    message: "Message | None"
    diagnostics: "Sequence[Diagnostic]"


@dataclass(frozen=True, slots=True)
class _Reading:
    ids: Sequence[int]
    events: "Sequence[Event]"
    passages: Sequence[_Passage]

    @classmethod
    def of(cls, ids: Sequence[int], tokenizer: "Tokenizer", offer: "Offer", *, is_reply: bool = True) -> "_Reading":
        from freehold.formats.events import Diagnostic, MessageDone, MessageStart
        from freehold.formats.harmony.parser import HarmonyParser

        parser = HarmonyParser(tokenizer, offer=offer, role="assistant" if is_reply else None)
        events = [event for id_ in ids for event in parser.feed(id_)] + parser.flush()
        starts = [event.position for event in events if isinstance(event, MessageStart)]
        messages: list[Message | None] = [event.message for event in events if isinstance(event, MessageDone)]
        if not starts or starts[0] > 0:
            starts, messages = [0, *starts], [None, *messages]
        diagnostics: list[list[Diagnostic]] = [[] for _ in starts]
        for event in events:
            if isinstance(event, Diagnostic):
                diagnostics[bisect_right(starts, event.position) - 1].append(event)
        parts = zip(starts, [*starts[1:], len(ids)], messages, diagnostics, strict=True)
        return cls(ids, events, [_Passage(*part) for part in parts])

    def facts(self) -> dict[str, Any]:
        from freehold.formats.events import CallDone, Diagnostic

        return {
            "messages": [_message_facts(passage.message) for passage in self.passages if passage.message is not None],
            "calls": [
                {"recipient": event.recipient, "arguments": event.arguments, "problem": event.problem}
                for event in self.events
                if isinstance(event, CallDone)
            ],
            "diagnostics": [
                {"code": event.code, "detail": event.detail, "position": event.position, "tokens": [*event.tokens]}
                for event in self.events
                if isinstance(event, Diagnostic)
            ],
            "num_tokens": len(self.ids),
        }

    def explain(self, tokenizer: "Tokenizer") -> Iterator[str]:
        for number, passage in enumerate(self.passages, 1):
            message = passage.message
            said = "no message" if message is None else " · ".join(_message_title(message))
            yield _bold(f"{number}. {said}") + _dim(f"  tokens {passage.start} to {passage.stop - 1}")
            ids = self.ids[passage.start : passage.stop]
            yield _coloured(tokenizer, ids)
            yield _dim(" ".join(map(str, ids)))
            for diagnostic in passage.diagnostics:
                yield _red(f"! {diagnostic.code}, at token {diagnostic.position}: {diagnostic.detail}")
            yield ""
        wrong = sum(len(passage.diagnostics) for passage in self.passages)
        messages = sum(passage.message is not None for passage in self.passages)
        yield f"{len(self.ids)} tokens, {messages} messages, {wrong} diagnostics"


def _message_facts(message: "Message") -> dict[str, Any]:
    facts = {
        "role": message.role,
        "name": message.name,
        "channel": message.channel,
        "recipient": message.recipient,
        "content_type": message.content_type,
        "text": message.text,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _message_title(message: "Message") -> Iterator[str]:
    yield message.role if message.name is None else f"{message.role} {message.name}"
    if message.channel is not None:
        yield message.channel
    if message.recipient is not None:
        yield f"to {message.recipient}"
    if message.content_type is not None:
        yield message.content_type


# --- colours ------------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    """To stdout, with our own colours only: what a model or a file says cannot steer the terminal."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _paint(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text


def _bold(text: str) -> str:
    return _paint("1", text)


def _dim(text: str) -> str:
    return _paint("2", text)


def _red(text: str) -> str:
    return _paint("31", text)


def _coloured(tokenizer: "Tokenizer", ids: Sequence[int]) -> str:
    """The text, control tokens in colour; plain text that looks like one stays plain."""
    pieces: list[str] = []
    plain: list[int] = []
    for id_ in ids:
        if (name := tokenizer.control_name(id_)) is None:
            plain.append(id_)
            continue
        pieces += [terminal.harmless(tokenizer.decode(plain)), _paint("36", name)]
        plain = []
    return "".join([*pieces, terminal.harmless(tokenizer.decode(plain))])
