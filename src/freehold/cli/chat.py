"""`freehold chat`: one answer, or a conversation in the terminal."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import terminal
from freehold.cli.options import (
    Context,
    Dense,
    Device,
    Dtype,
    KvDtype,
    MaxTokens,
    MinP,
    ModelOption,
    PrefixCacheDir,
    ReasoningEffort,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
)
from freehold.errors import FreeholdError, UsageError
from freehold.log import logger

if TYPE_CHECKING:
    from freehold.formats.events import Event
    from freehold.session.model import Model

_HELP = (
    '/reset forgets the conversation · /system TEXT sets the instructions · /quit leaves (or Ctrl-D) · """ starts and '
    "ends a message of several lines, \\ at the end continues a line · Ctrl-C stops an answer"
)
_FENCE = '"""'


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask; text from a pipe goes in front. Without both: a conversation."),
    ] = None,
    model: ModelOption = "default",
    system: Annotated[str | None, typer.Option("--system", "-s", help="Instructions for the model.")] = None,
    reasoning_effort: ReasoningEffort = None,
    harmony: Annotated[
        bool | None,
        typer.Option(help="Speak Harmony, or the model's template. Default: what the model was made for."),
    ] = None,
    harmony_grammar: Annotated[
        str,
        typer.Option(
            help="on: replies are always well-formed Harmony. off: the model may say anything.", metavar="on|off"
        ),
    ] = "on",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    dense: Dense = None,
    kv_dtype: KvDtype = None,
    context: Context = None,
    threads: Threads = None,
    prefix_cache_dir: PrefixCacheDir = None,
) -> None:
    """Ask a question, or hold a conversation.

    \b
    freehold chat "What is the capital of France?"
    freehold chat
    git diff | freehold chat --system "Explain this change."
    """
    if harmony_grammar not in ("on", "off"):
        raise UsageError(f"--harmony-grammar is on or off, got {harmony_grammar!r}")
    if terminal.has_pipe() or (prompt is None and not sys.stdin.isatty()):
        piped = terminal.read_stdin()
        prompt = piped if prompt is None else "\n\n".join(filter(None, (piped, prompt)))
    if prompt is not None and not prompt.strip():
        raise UsageError("the question is empty; give it as an argument or through a pipe")
    from freehold.session.model import load

    with terminal.progress_bars() as progress:
        loaded = load(
            model,
            device=device,
            dtype=dtype,
            dense=dense,
            kv_dtype=kv_dtype,
            context=context,
            threads=threads,
            prefix_cache_dir=prefix_cache_dir,
            progress=progress,
        )
    options = {
        "harmony": harmony,
        "grammar": harmony_grammar == "on",
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "reasoning_effort": reasoning_effort,
    }
    talk = _Talk(loaded, system, options)
    if prompt is None:
        _converse(talk)
    elif not talk.answer(prompt):
        sys.exit(130)


class _Talk:
    """A conversation and the model that answers in it."""

    def __init__(self, model: "Model", system: str | None, options: dict[str, Any]) -> None:
        self._model = model
        self._options = options
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the instructions."""
        from freehold.formats.conversation import Conversation, text_message

        instructions = (text_message("system", self.system),) if self.system else ()
        self._history: Conversation = Conversation(messages=instructions)

    def answer(self, question: str) -> bool:
        """Stream the answer to stdout; False if Ctrl-C stopped it. What was said by then stays in the history."""
        from freehold.formats.conversation import text_message

        asked = self._history.plus(text_message("user", question))
        start = time.monotonic()
        reply = self._model.stream_chat(asked, **self._options)
        finished = True
        try:
            _show(reply.events)
        except KeyboardInterrupt:
            finished = False
            terminal.say()
        finally:
            reply.events.close()
        said = [message for message in reply.messages if message.text]
        if finished or said:  # a question that was stopped before its answer began is taken back
            self._history = asked.plus(*said)
        seconds = time.monotonic() - start
        logger.info(
            "%d prompt tokens, %d new tokens in %.2f s (%.1f tokens/s)",
            reply.num_prompt_tokens, reply.num_tokens, seconds, reply.num_tokens / seconds,
        )  # fmt: skip
        return finished


def _show(events: "Iterator[Event]") -> None:
    """The answer goes to stdout; reasoning and calls, which are not for other programs, to stderr."""
    from freehold.formats.events import ArgumentsDelta, CallStart, Diagnostic, ReasoningDelta, TextDelta

    aside = False
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    try:
        for event in events:
            match event:
                case ReasoningDelta(text=text) | ArgumentsDelta(text=text):
                    if not aside:
                        sys.stderr.write(dim)
                        aside = True
                    terminal.write_aside(text)
                case CallStart(recipient=recipient):
                    sys.stderr.write("\n" if aside else dim)
                    terminal.write_aside(f"calls {recipient}: ")
                    aside = True
                case Diagnostic(code=code, detail=detail, position=position):
                    logger.info("token %d of the reply: %s: %s", position, code, detail)
                case TextDelta(text=text):
                    if aside:
                        terminal.say(plain)
                        aside = False
                    terminal.write(text)
    finally:
        if aside:
            terminal.say(plain)
    terminal.write("\n")


def _converse(talk: _Talk) -> None:
    terminal.say(_HELP)
    while True:
        try:
            line = _read_message()
        except EOFError:
            terminal.say()
            return
        except KeyboardInterrupt:
            terminal.say("\n/quit or Ctrl-D leaves")
            continue
        match line.split(maxsplit=1):
            case []:
                continue
            case ["/quit" | "/exit", *_]:
                return
            case ["/help", *_]:
                terminal.say(_HELP)
            case ["/reset", *_]:
                talk.reset()
                terminal.say("the conversation starts anew")
            case ["/system", *text]:
                talk.system = text[0] if text else None
                talk.reset()
                terminal.say("instructions set; the conversation starts anew")
            case [word, *_] if word.startswith("/") and "\n" not in line:
                terminal.say(f"there is no command {word}; {_HELP}")
            case _:
                try:
                    talk.answer(line)
                except FreeholdError as error:
                    terminal.say(f"error: {error}")


def _read_message() -> str:
    """One message: a line, lines joined by a trailing backslash, or everything between two lines of triple quotes."""
    line = _read_line("> ")
    if line.lstrip().startswith(_FENCE):
        return _read_fenced(line.lstrip().removeprefix(_FENCE))
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{_read_line('. ')}"
    return line


def _read_fenced(first: str) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(_FENCE):
        lines.append(_read_line(". "))
    lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    return "\n".join(lines).strip("\n")


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        import readline  # noqa: F401 - its import gives input() editing and history

        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()
