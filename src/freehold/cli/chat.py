"""`freehold chat`: one answer, or a conversation in the terminal."""

import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freehold.cli import terminal
from freehold.cli.options import (
    ADAPTER,
    AdapterDir,
    Browse,
    Context,
    Dense,
    Device,
    Dtype,
    KvDtype,
    MaxTokens,
    McpConfig,
    McpServers,
    MinP,
    ModelOption,
    PrefixCacheDir,
    PythonLimit,
    ReasoningEffort,
    Search,
    Seed,
    Temperature,
    Threads,
    ToolFiles,
    TopK,
    TopP,
)
from freehold.errors import FreeholdError, UsageError
from freehold.log import Progress

if TYPE_CHECKING:
    from freehold.cli.talk import Talk
    from freehold.session.served import Served
    from freehold.tools.kit import ToolChoices

Run = Callable[[Coroutine[Any, Any, None]], None]
"""Runs something to its end; Ctrl-C stops it, and is raised as KeyboardInterrupt."""

_HELP = (
    "/reset forgets the conversation · /system TEXT sets the instructions · /output shows all of a call's result · "
    '/quit leaves (or Ctrl-D) · """ starts and ends a message of several lines, \\ at the end continues a line · '
    "Ctrl-C stops an answer"
)
_FENCE = '"""'


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask; text from a pipe goes in front. Without both: a conversation."),
    ] = None,
    model: ModelOption = "default",
    adapter: AdapterDir = None,
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
    tools: ToolFiles = None,
    browse: Browse = None,
    search: Search = None,
    python: Annotated[bool, typer.Option("--python", help="Python in a sandbox without network.")] = False,
    python_limit: PythonLimit = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="A file, or the files right in a folder, for Python's /mnt/data; what it makes comes back beside it. "
            "May be given again.",
        ),
    ] = None,
    patch: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder whose files the model may change, by patches.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --patch: change nothing, say what would be changed.")
    ] = False,
    mcp: McpServers = None,
    mcp_config: McpConfig = None,
    approve: Annotated[
        str,
        typer.Option(
            metavar="never|tools|always",
            help="Ask before calls: never, of tools that reach beyond a sandbox, always.",
        ),
    ] = "tools",
    max_steps: Annotated[
        int | None, typer.Option(help="Ask the model so often in one turn, calls in between. Default: 64.")
    ] = None,
    max_tool_calls: Annotated[int | None, typer.Option(help="Carry out so many calls in one turn.")] = None,
    tool_seconds: Annotated[
        float | None, typer.Option(help="Seconds that all calls of a turn may take. Default: 900.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write down all that happens, for `freehold replay`; what is there already is gone on from.",
        ),
    ] = None,
    script: Annotated[
        Path | None, typer.Option(help="No model: say what this JSONL file says, for who tries tools.")
    ] = None,
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
    """Ask a question, or hold a conversation, with tools where you name them.

    \b
    freehold chat "What is the capital of France?"
    freehold chat
    freehold chat --adapter runs/poet "Good morning."
    git diff | freehold chat --system "Explain this change."
    freehold chat --browse ~/notes --python --files data.csv
    """
    if harmony_grammar not in ("on", "off"):
        raise UsageError(f"--harmony-grammar is on or off, got {harmony_grammar!r}")
    if terminal.has_pipe() or (prompt is None and not sys.stdin.isatty()):
        piped = terminal.read_stdin()
        prompt = piped if prompt is None else "\n\n".join(filter(None, (piped, prompt)))
    if prompt is not None and not prompt.strip():
        raise UsageError("the question is empty; give it as an argument or through a pipe")
    if dry_run and patch is None:
        raise UsageError("--dry-run is for patches; give --patch DIR too")
    from freehold.tools.kit import ToolChoices

    choices = ToolChoices(
        browse=tuple(browse or ()),
        search=search,
        python=python or bool(files or python_limit),
        python_limits=tuple(python_limit or ()),
        functions=tuple(tools or ()),
        patch=patch,
        dry_run=dry_run,
        mcp=tuple(mcp or ()),
        mcp_config=tuple(mcp_config or ()),
    )
    if harmony is None and not choices.is_empty:
        harmony = True  # only Harmony has words for all tools

    def load(progress: Progress) -> "Served":
        speaks: dict[str, Any] = {"harmony": harmony, "grammar": harmony_grammar == "on"}
        if script is not None:
            if adapter is not None:
                raise UsageError(f"a --script is no model and takes no adapter; leave --adapter {adapter} out")
            return _scripted(script, **speaks)
        return _load(
            model,
            adapter,
            **speaks,
            device=device,
            dtype=dtype,
            dense=dense,
            kv_dtype=kv_dtype,
            context=context,
            threads=threads,
            prefix_cache_dir=prefix_cache_dir,
            progress=progress,
        )

    wishes = _Wishes(
        tools=choices,
        ask={"max_tokens": max_tokens, "effort": reasoning_effort},
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed},
        limits={"max_steps": max_steps, "max_tool_calls": max_tool_calls, "tool_seconds": tool_seconds},
        system=system,
        approve=approve,
        files=tuple(files or ()),
        record=record,
    )
    with _talk(load, wishes) as (talk, run):
        if prompt is None:
            _converse(talk, run)
        elif not _answered(talk, run, prompt):
            sys.exit(130)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wishes:
    """What the options say of a conversation; the dicts are checked where they are used, None is the default."""

    tools: "ToolChoices"
    ask: dict[str, Any]
    sampling: Any
    limits: dict[str, Any]
    system: str | None
    approve: str
    files: tuple[Path, ...]
    record: Path | None


@contextmanager
def _talk(load: "Callable[[Progress], Served]", wishes: _Wishes) -> "Iterator[tuple[Talk, Run]]":
    """A conversation with the model and the tools, and what runs it. What is wrong with options shows before the model
    is loaded, where it can be known then."""
    import asyncio

    from freehold.cli.approval import Approval
    from freehold.cli.exchange import Exchange
    from freehold.cli.screen import Screen
    from freehold.cli.talk import Talk
    from freehold.formats.conversation import Conversation
    from freehold.session.generation import Ask
    from freehold.session.record import Recorder, read_recording
    from freehold.session.turn import TurnLimits
    from freehold.tools.kit import local_tools, mcp_tools

    choices, record = wishes.tools, wishes.record
    screen = Screen(cites=bool(choices.browse or choices.search))
    approval = Approval(wishes.approve, screen)
    exchange = Exchange(wishes.files) if wishes.files else None
    ask = Ask(conversation=Conversation(messages=()), sampling=wishes.sampling, **wishes.ask)
    limits = TurnLimits(**{name: value for name, value in wishes.limits.items() if value is not None})
    with asyncio.Runner() as runner, ExitStack() as opened:
        recorder = None if record is None else opened.enter_context(Recorder(record))
        recorded = [] if record is None else read_recording(record)
        if recorded and wishes.system is not None:
            raise UsageError(f"the conversation in {record} has its instructions already; leave --system out")
        with terminal.progress_bars() as progress, terminal.only_answers_on_stdout():
            served = load(progress)
            opened.callback(lambda: runner.run(served.runner.drain(0)))
            tokenizer = served.prompting.the_tokenizer()
            local = local_tools(choices, tokenizer=tokenizer, progress=progress, approve_patch=approval.patch)
            tools = opened.enter_context(local)
        connected = mcp_tools(choices)
        tools = (*tools, *runner.run(connected.__aenter__()))
        opened.callback(lambda: runner.run(connected.__aexit__(None, None, None)))
        approval.check(tools)
        talk = Talk(
            served,
            ask,
            screen,
            system=wishes.system,
            tools=tools,
            limits=limits,
            approval=approval,
            exchange=exchange,
            recorder=recorder,
            recorded=recorded,
        )
        opened.callback(lambda: runner.run(talk.aclose()))
        if tools:
            runner.run(talk.open())
        yield talk, runner.run


def _load(model: str, adapter: Path | None, *, harmony: bool | None, grammar: bool, **options: Any) -> "Served":
    from freehold.session.model import load
    from freehold.session.served import serve_model

    loaded = load(model, adapters={} if adapter is None else {ADAPTER: adapter}, **options)
    served = serve_model(loaded, name=model, harmony=harmony, grammar=grammar)
    return served if adapter is None else served.with_adapter(ADAPTER)


def _scripted(script: Path, *, harmony: bool | None, grammar: bool) -> "Served":
    from freehold.session.scripted import read_script, serve_script

    return replace(serve_script(read_script(script)), harmony=harmony, grammar=grammar)


def _answered(talk: "Talk", run: "Run", question: str) -> bool:
    """Show the answer; False if Ctrl-C stopped it."""
    try:
        with terminal.only_answers_on_stdout():
            run(talk.answer(question))
    except KeyboardInterrupt:
        return False
    return True


def _converse(talk: "Talk", run: "Run") -> None:
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
            case ["/reset" | "/system", *_] if talk.is_recorded:
                terminal.say("this conversation is recorded as one: start another with another file")
            case ["/reset", *_]:
                run(talk.reset())
                terminal.say("the conversation starts anew")
            case ["/output", *_]:
                outputs = talk.screen.outputs
                terminal.say(terminal.harmless_aside(outputs[-1]) if outputs else "no tool was called yet")
            case ["/system", *text]:
                talk.system = text[0] if text else None
                run(talk.reset())
                terminal.say("instructions set; the conversation starts anew")
            case [word, *_] if word.startswith("/") and "\n" not in line:
                terminal.say(f"there is no command {word}; {_HELP}")
            case _:
                try:
                    _answered(talk, run, line)
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
