"""Jinja chat templates, rendered straight to token ids, with user text that cannot become a control token.

A template writes control tokens by name into one long text, where a user's own `<|im_end|>` would look just
like the template's. So every character in which a control token's name begins or ends is fenced, wherever it
stands in the conversation's text, with a marker that occurs nowhere else. What then still reads as a control
token was written by the template. The marker goes after control tokens were found. Slices and `trim` in a
template cannot undo the fence, since each single `<` and `>` has its own.

A template that compares or counts such characters in a message sees the marker beside them.

Set up as transformers sets up jinja2, in the immutable sandbox: a template is foreign code. It may still take
long and much memory (loops, repeated strings), and one that builds a name around user text
(`'<|' + content + '|>'`) gets the token that it asks for; roles, the only thing templates do this with, are
checked by `Conversation`. Function tools, calls and results go to templates that speak of them; others refuse
them. Called by `chat.py`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.formats.conversation import Conversation, DeveloperContent, Message, Text, Tool
from freehold.formats.harmony.offer import FUNCTIONS
from freehold.formats.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatTemplate:
    """One template, compiled. `variables` are its other inputs, such as `bos_token`; they are trusted."""

    def __init__(self, source: str, *, variables: Mapping[str, str] | None = None) -> None:
        """Raises CheckpointError for a template that is no Jinja."""
        self._source = source
        self._variables = dict(variables or {})
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, ArithmeticError, RecursionError, ValueError) as error:
            raise CheckpointError(f"the chat template cannot be read: {error}; use another one") from None
        self._knows_calls = "tool_calls" in source

    def render(
        self, conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The conversation as token ids, ready for the assistant's turn.

        Raises UsageError where the template itself refuses the conversation, CheckpointError where it fails.
        """
        self._check_speaks_of_tools(conversation)
        said: list[str] = []
        try:
            _inputs(conversation, _noting(said))
        except RecursionError:
            raise UsageError("a tool's schema or arguments are nested too deeply; make them flatter") from None
        marker = _unused_character(said, self._source, *tokenizer.control_tokens, *self._variables.values())
        text = self._run(
            **_inputs(conversation, _fence(tokenizer.control_tokens, marker)),
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return tokenizer.encode_with_control(text, marker=marker)

    def _check_speaks_of_tools(self, conversation: Conversation) -> None:
        messages = conversation.messages
        if not self._knows_tools and any(_tools(message) for message in messages):
            raise UnsupportedError("this model's chat template does not speak of tools; leave them out")
        if not self._knows_calls and any(message.role == "tool" or message.recipient for message in messages):
            raise UnsupportedError("this model's chat template does not speak of tool calls; leave them out")

    def _run(self, **inputs: Any) -> str:
        try:
            return self._template.render(**inputs)
        except _RefusedError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from None
        except Exception as error:  # foreign code may raise anything
            kind = type(error).__name__
            raise CheckpointError(f"the chat template fails: {kind}: {error}; use another one") from error


# --- conversations as templates know them -------------------------------------------------------------------

Say = Callable[[str], str]
"""What is done to each string of a conversation on its way into a template."""


def _inputs(conversation: Conversation, say: Say) -> dict[str, Any]:
    """`messages`, each with one text and an assistant's calls beside it; `tools`, None where there are none."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message.role == "assistant" and message.recipient is not None:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(_function(_call(message, say)))
        elif (texts := _texts(message)) or message.role != "developer":
            # Roles are one of five words, and templates compare them.
            plain = {"role": "system" if message.role == "developer" else message.role, "content": say("".join(texts))}
            name = {} if message.name is None else {"name": say(message.name.removeprefix(f"{FUNCTIONS}."))}
            messages.append(plain | name)
    tools = [_function(_tool(tool, say)) for message in conversation.messages for tool in _tools(message)]
    return {"messages": messages, "tools": tools or None}


def _texts(message: Message) -> list[str]:
    texts = []
    for part in message.parts:
        match part:
            case Text(text=text):
                texts.append(text)
            case DeveloperContent(response_formats=(), instructions=instructions):
                texts += [] if instructions is None else [instructions]
            case _:
                raise UnsupportedError("chat templates know text and tools only; leave out all else that Harmony has")
    return texts


def _tools(message: Message) -> list[Tool]:
    return [tool for part in message.parts if isinstance(part, DeveloperContent) for tool in part.tools]


def _function(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


def _tool(tool: Tool, say: Say) -> dict[str, Any]:
    if tool.text_format is not None:
        raise UnsupportedError(f"chat templates know functions of JSON arguments only; tool {tool.name!r} takes text")
    parameters = {"type": "object", "properties": {}} if tool.parameters is None else _said(tool.parameters, say)
    return {"name": say(tool.name), "description": say(tool.description), "parameters": parameters}


def _call(message: Message, say: Say) -> dict[str, Any]:
    """Arguments are given as the object that they are JSON of, as templates expect; as text where they are none."""
    assert message.recipient is not None
    if not message.recipient.startswith(f"{FUNCTIONS}."):
        raise UnsupportedError(f"chat templates know calls of functions only, not of {message.recipient!r}")
    arguments: Any = message.text
    with suppress(ValueError):
        arguments = json.loads(message.text)
    name = message.recipient.removeprefix(f"{FUNCTIONS}.")
    return {"name": say(name), "arguments": _said(arguments if isinstance(arguments, dict) else message.text, say)}


def _said(value: Any, say: Say) -> Any:
    match value:
        case str():
            return say(value)
        case Mapping():
            return {say(str(key)): _said(item, say) for key, item in value.items()}
        case list() | tuple():
            return [_said(item, say) for item in value]
    return value


# --- the fence ----------------------------------------------------------------------------------------------


def _noting(texts: list[str]) -> Say:
    def note(text: str) -> str:
        texts.append(text)
        return text

    return note


def _unused_character(strings: Iterable[str], *trusted: str) -> str:
    used = set().union(*strings, *trusted)
    return next(mark for mark in map(chr, range(0xE000, 0x11_0000)) if mark not in used)  # private use first


def _fence(control_tokens: Iterable[str], marker: str) -> Say:
    """A function that fences each character that begins or ends a control token's name, in either case."""
    ends = {end for name in control_tokens for end in (name[0], name[-1])}
    either_case = {variant for end in ends for variant in (end, end.lower(), end.upper()) if len(variant) == 1}
    fences = {ord(end): f"{marker}{end}{marker}" for end in either_case}
    return lambda text: text.translate(fences)


# --- jinja2 as transformers sets it up ----------------------------------------------------------------------


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; for rendering it is just its body."""

    tags = {"generation"}  # noqa: RUF012 — jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    # jinja2's own escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise _RefusedError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
