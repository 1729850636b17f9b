"""Which MCP servers to use: from the command line, or from a config file in the usual shape.

    {"mcpServers": {"git": {"command": "uvx", "args": ["mcp-server-git"], "env": {"KEY": "${MY_KEY}"}},
                    "docs": {"url": "https://example.com/mcp", "headers": {"Authorization": "Bearer ${DOCS_TOKEN}"}}}}

`${NAME}`, `${env:NAME}` and `${NAME:-otherwise}` stand for variables of this environment, so that secrets need not be
in the file. Entries with `"disabled": true` are left out. What other clients keep here for themselves, such as what
they may call without asking, is not ours to follow and is passed over; anything else that is not known is refused.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from freehold.errors import UnsupportedError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,63}")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_\-]*)=(.+)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_RUNNERS = ("uvx", "npx", "bunx", "pipx", "uv", "python", "python3", "node", "deno", "run", "docker", "podman")
_TRANSPORTS = {"stdio": "command", "http": "url", "streamable-http": "url", "streamableHttp": "url"}
_HEADER = re.compile(r"[!#$%&'*+.^_`|~\w\-]+", re.ASCII)
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?|")
_OTHERS = ("alwaysAllow", "autoApprove", "autoapprove", "trust", "description", "name", "title", "icon", "gallery")


@dataclass(frozen=True, slots=True, kw_only=True)
class StdioServer:
    """A program that speaks MCP on its standard input and output. `env` is added to the little it is given."""

    name: str
    command: str
    args: tuple[str, ...] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: Path | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not self.command or "\0" in "".join((self.command, *self.args)):
            raise UsageError(f"MCP server {self.name!r} has no command that could be run: {self.command!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpServer:
    """A server at a URL, by streamable HTTP."""

    name: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_name(self.name)
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"MCP server {self.name!r}: {without_secrets(self.url)!r} is no http or https URL")
        for name, value in self.headers.items():
            if not _HEADER.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise UsageError(
                    f"MCP server {self.name!r}: the header {name!r} cannot be sent; it has a line end, spaces "
                    "around it, or what is not ASCII"
                )


McpServer = StdioServer | HttpServer


def function_name(server: str, tool: str) -> str:
    """What the model calls a server's tool."""
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", f"{server}__{tool}")


def without_secrets(url: str) -> str:
    """A URL as it may be shown: without user, password and query."""
    return re.sub(r"(?<=//)[^/?#]*@", "", url).partition("?")[0]


def parse_server(text: str) -> McpServer:
    """What `--mcp` is given: a command line or a URL, after `NAME=` if it is to have another name than its own."""
    named = _NAMED.fullmatch(text.strip())
    name, rest = (named[1], named[2]) if named else (None, text.strip())
    if rest.startswith(("http://", "https://")):
        return HttpServer(name=name or _clean((urlsplit(rest).hostname or "").removeprefix("www.")), url=rest)
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"{text!r} is no command line: {error}") from None
    if not words:
        raise UsageError("an MCP server is a command such as 'uvx mcp-server-git', or a URL; got nothing")
    return StdioServer(name=name or _name_of(words), command=words[0], args=tuple(words[1:]))


def read_config(path: Path) -> tuple[McpServer, ...]:
    """The servers of a config file, without the disabled ones. Raises UsageError and UnsupportedError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}") from None
    servers = raw.get("mcpServers", raw.get("servers")) if isinstance(raw, dict) else None
    if not isinstance(servers, dict):
        raise UsageError(f'{path} has no servers; they stand in {{"mcpServers": {{NAME: {{…}}}}}}')
    found: list[McpServer] = []
    for name, entry in servers.items():
        try:
            server = _server(_clean(str(name)), entry, path.parent)
        except (UsageError, UnsupportedError) as error:
            raise type(error)(f"{path}: {name}: {error}") from None
        if server is not None:
            found.append(server)
    return tuple(found)


def _server(name: str, entry: Any, folder: Path) -> McpServer | None:
    if not isinstance(entry, dict):
        raise UsageError(f"expected an object, got {entry!r:.60}")
    if entry.get("disabled") is True or entry.get("enabled") is False:
        return None
    given = {key: value for key, value in entry.items() if key not in (*_OTHERS, "disabled", "enabled", "type")}
    kind = entry.get("type", "stdio" if "command" in entry else "http")
    if kind not in _TRANSPORTS:
        raise UnsupportedError(f"transport {kind!r} is not supported; use stdio or streamable HTTP")
    needed = _TRANSPORTS[kind]
    known = ("command", "args", "env", "cwd") if needed == "command" else ("url", "headers")
    for key in given:
        if key not in known:
            raise UnsupportedError(f"field {key!r} is not supported; leave it out")
    if not isinstance(entry.get(needed), str):
        raise UsageError(f"it has neither 'command' nor 'url' as text; {needed!r} is what type {kind!r} needs")
    if needed == "url":
        return HttpServer(name=name, url=_expanded(entry["url"]), headers=_texts(entry, "headers"))
    args = entry.get("args") or []
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise UsageError(f"'args' is a list of texts, got {args!r:.60}")
    cwd = entry.get("cwd")
    if not isinstance(cwd, str | None):
        raise UsageError(f"'cwd' is the path of a folder, got {cwd!r:.60}")
    return StdioServer(
        name=name,
        command=_expanded(entry["command"]),
        args=tuple(map(_expanded, args)),
        env=_texts(entry, "env"),
        cwd=None if cwd is None else folder / Path(_expanded(cwd)).expanduser(),
    )


def _texts(entry: Mapping[str, Any], key: str) -> dict[str, str]:
    raw = entry.get(key) or {}
    if not isinstance(raw, dict) or not all(isinstance(value, str | int | float) for value in raw.values()):
        raise UsageError(f"{key!r} is an object of texts")  # without its values, which may be secrets
    return {name: _expanded(str(value)) for name, value in raw.items()}


def _expanded(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise UsageError(f"{match[0]} is not set in this environment; set it, or write ${{{match[1]}:-otherwise}}")
        return found

    return _VARIABLE.sub(value, text)


def _name_of(words: list[str]) -> str:
    """A name for a command line: of what is run, not of what runs it."""
    first, *rest = words
    if Path(first).name in _RUNNERS:
        first = next((word for word in rest if not word.startswith("-") and word not in _RUNNERS), first)
    return _clean(
        re.sub(r"(?<=.)@.*", "", first).rstrip("/").rpartition("/")[2].removesuffix(".py").removesuffix(".js")
    )


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", name).strip("_-")[:64] or "server"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be an MCP server's name; use ASCII letters, digits, '_' and '-'")
