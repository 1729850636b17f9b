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
checked by `Conversation`. Function tools are not passed on yet. Called by `chat.py`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from freehold.errors import CheckpointError, UnsupportedError, UsageError
from freehold.formats.conversation import Conversation, DeveloperContent, Message, Text
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
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, ArithmeticError, RecursionError, ValueError) as error:
            raise CheckpointError(f"the chat template cannot be read: {error}; use another one") from None

    def render(
        self, conversation: Conversation, tokenizer: Tokenizer, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The conversation as token ids, ready for the assistant's turn.

        Raises UsageError where the template itself refuses the conversation, CheckpointError where it fails.
        """
        messages = [_plain(message) for message in conversation.messages]
        strings = [text for message in messages for text in message.values()]
        marker = _unused_character(strings, self._source, *tokenizer.control_tokens, *self._variables.values())
        fence = _fence(tokenizer.control_tokens, marker)
        text = self._run(
            messages=[
                # Roles are one of five words, and templates compare them.
                {key: value if key == "role" else fence(value) for key, value in message.items()}
                for message in messages
            ],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return tokenizer.encode_with_control(text, marker=marker)

    def _run(self, **inputs: Any) -> str:
        try:
            return self._template.render(**inputs)
        except _RefusedError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from None
        except Exception as error:  # foreign code may raise anything
            kind = type(error).__name__
            raise CheckpointError(f"the chat template fails: {kind}: {error}; use another one") from error


def _plain(message: Message) -> dict[str, str]:
    """A message as templates know it: system prompt, user and assistant, each with one text."""
    if message.role == "tool" or message.recipient is not None:
        raise UnsupportedError("tool calls and their results are not rendered by chat templates yet; leave them out")
    texts = []
    for part in message.parts:
        match part:
            case Text(text=text):
                texts.append(text)
            case DeveloperContent(instructions=instructions, tools=()):
                texts.append(instructions or "")
            case _:
                raise UnsupportedError(f"chat templates do not know {type(part).__name__}; give plain text")
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": "".join(texts)}
    return plain if message.name is None else {**plain, "name": message.name}


# --- the fence ----------------------------------------------------------------------------------------------


def _unused_character(strings: Iterable[str], *trusted: str) -> str:
    used = set().union(*strings, *trusted)
    return next(mark for mark in map(chr, range(0xE000, 0x11_0000)) if mark not in used)  # private use first


def _fence(control_tokens: Iterable[str], marker: str) -> Callable[[str], str]:
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
