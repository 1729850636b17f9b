"""Writes docs/api.md from the endpoints and their models: `python -m freehold.serve.reference > docs/api.md`.

Every field of every body stands in it, and what becomes of it: whether it is honoured, taken as a hint, or refused.
"""

import json
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from freehold.serve.app import create_app
from freehold.serve.bodies import UPLOAD_PATH
from freehold.serve.errors import ApiError
from freehold.serve.files import FileCreate
from freehold.serve.messages_wire import OrText
from freehold.serve.settings import ServeSettings, option_of
from freehold.serve.wire import Hint, Refused, Wire
from freehold.session.scripted import ScriptedTurn, serve_script

_INTRODUCTION = """\
# The HTTP API

Generated from the endpoints themselves by `python -m freehold.serve.reference`; `/openapi.json` on a running server
says the same to programs. [clients.md](clients.md) tells how to set clients up.

Of every field one of three things is true. It is **honoured**. It is a **hint**: the value is checked, and there is
nothing here for it to change. Or it is **refused**: any value but the harmless ones, which mean the same as leaving the
field out, is an error that says why. A field that is not listed is an error as well.
"""

_HEADERS = (
    ("authorization", "request", "`Bearer` and a key, where the server has keys"),
    ("x-api-key", "request", "the same, as Anthropic's clients send it"),
    ("anthropic-version", "request", "for `/v1/messages`: `2023-06-01` or `2026-10-21`; fields of both are known"),
    ("anthropic-beta", "request", "for `/v1/messages`: not needed; what it would switch on is there without it"),
    ("x-request-id", "both", "the request's id: the client's own, or a new one"),
    (
        "x-freehold-warnings",
        "answer",
        "what was left out, such as hosted tools that are not switched on, or taken otherwise than written",
    ),
    ("retry-after", "answer", "seconds, with 429 and 503"),
)

_ERRORS = (
    (400, "a field or value that is wrong or refused; a prompt that is too long, with both numbers"),
    (401, "no key, or one that is not known"),
    (403, "not with this key, or not from this host"),
    (404, "a path, model or id that is not here"),
    (408, "the body did not come in time"),
    (409, "a file or checkpoint that a fine-tuning job still needs is not deleted"),
    (413, "the body is too large"),
    (415, "the body is not JSON; for `/v1/files`, no form"),
    (429, "the queue is full, or a key's limit is reached"),
    (500, "the server failed; its log says why"),
    (503, "the server is shutting down or out of memory"),
    (504, "the answer was not complete in time"),
    (507, "the disk is full"),
)

_ERROR_SHAPES = """\
OpenAI's shape is `{"error": {"message", "type", "param", "code"}}`; `param` is the field that was wrong. Below
`/v1/messages` it is Anthropic's, `{"type": "error", "error": {"type", "message"}}`. What fails after a stream has begun
comes as its last event.
"""

_LIMITS = {
    "max_running": "requests that run at once",
    "max_queue": "requests that wait; what comes then is a 429",
    "max_body_bytes": "of a body",
    "max_upload_bytes": "of an upload to `/v1/files`",
    "max_files_bytes": "of all files of a key together",
    "request_timeout": "seconds until an answer must be complete",
    "receive_timeout": "seconds for a body to come",
    "send_timeout": "seconds that a client may not read",
    "drain_timeout": "seconds for running requests once the server is told to stop",
    "container_timeout": "seconds that what a conversation's tools hold is kept without being used",
    "max_containers": "conversations whose tools' kernels and pages are kept; idle ones of whoever has the most go",
}


def render() -> str:
    """The whole page, in Markdown."""
    return "\n".join(_Page(_app()).lines())


def _app() -> FastAPI:
    """With a model that is asked nothing."""
    return create_app(serve_script([ScriptedTurn(completion="x")]))


@dataclass(slots=True)
class _Page:
    app: FastAPI
    group: str = ""
    models: dict[type[Wire], str] = field(default_factory=dict)  # and the headings that they stand under

    def lines(self) -> Iterator[str]:
        yield _INTRODUCTION
        yield from self._tables()
        yield "## Endpoints\n"
        for route in _routes(self.app):
            yield from self._endpoint(route)
        yield "## Objects\n"
        done = 0
        while done < len(self.models):  # each may name others
            model, heading = list(self.models.items())[done]
            done += 1
            self.group = heading.partition(" ")[0]
            yield f"### {heading}\n"
            yield from _docstring(model)
            yield from self._fields(model)

    def _tables(self) -> Iterator[str]:
        yield "## Headers\n"
        yield from _table(("header", "of", ""), [(f"`{name}`", where, text) for name, where, text in _HEADERS])
        yield "## Errors\n"
        yield _ERROR_SHAPES
        rows = []
        for status, text in _ERRORS:
            error = ApiError(status, "")
            openai, anthropic = error.openai()["error"]["type"], error.anthropic()["error"]["type"]
            rows.append((str(status), f"`{openai}`", f"`{anthropic}`", text))
        yield from _table(("status", "type", "Anthropic's", ""), rows)
        yield "## Limits\n"
        settings = ServeSettings()
        yield from _table(
            ("limit", "unless set", ""),
            [
                (f"`{option_of(name)}`", f"{getattr(settings, name):,}".removesuffix(".0"), text)
                for name, text in _LIMITS.items()
            ],
        )

    def _endpoint(self, route: APIRoute) -> Iterator[str]:
        self.group = str(route.tags[0]).replace(" ", "") if route.tags else "Server"
        yield f"### {' '.join(sorted(route.methods or ()))} {route.path}\n"
        if route.description:
            yield f"{route.description}\n"
        parameters = [
            (f"`{found.alias}`", where, self._type(found.field_info.annotation), *self._fate(found.field_info))
            for where, parameters in (("path", route.dependant.path_params), ("query", route.dependant.query_params))
            for found in parameters
        ]
        if parameters:
            yield from _table(("parameter", "in", "type", "", ""), parameters)
        if route.path == UPLOAD_PATH and "POST" in (route.methods or ()):
            yield "Body: `multipart/form-data`.\n"
            yield from self._fields(FileCreate)
        if route.body_field is not None:
            body = route.body_field.field_info.annotation
            if isinstance(body, type) and issubclass(body, Wire):
                yield from self._fields(body)
                self._note_parts_read_later(body)
            else:
                yield f"Body: {self._type(body)}\n"

    def _note_parts_read_later(self, body: type[Wire]) -> None:
        """A body may leave the kind of its parts open; they are read by models of the same module."""
        for value in vars(sys.modules[body.__module__]).values():
            is_part = isinstance(value, type) and issubclass(value, Wire) and value.__module__ == body.__module__
            if is_part and not value.__name__.startswith("_") and not _is_a_body(self.app, value):
                self._link(value)

    def _fields(self, model: type[Wire]) -> Iterator[str]:
        rows = []
        for name, info in model.model_fields.items():
            required = "**" if info.is_required() else ""
            kind = self._type(Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation)
            rows.append((f"{required}`{info.alias or name}`{required}", kind, *self._fate(info)))
        if rows:
            yield from _table(("field", "type", "", ""), rows)

    def _fate(self, info: FieldInfo) -> tuple[str, str]:
        text = (info.description or "").rstrip(".")
        match _fate_of(info):
            case Refused(reason=reason, unless=unless):
                harmless = ", ".join(f"`{_shown(value)}`" for value in unless if value is not None)
                return "refused", f"{reason}{f'; harmless: {harmless}' if harmless else ''}"
            case Hint(reason=reason):
                return "hint", "; ".join(part for part in (text, reason) if part)
        bounds = ", ".join(_bounds(info.metadata))
        default = ""
        if info.default is not PydanticUndefined and info.default not in (None, [], "", {}):
            default = f"`{_shown(info.default)}` if left out"
        return "honoured", "; ".join(part for part in (text, bounds, default) if part)

    def _type(self, annotation: Any) -> str:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            refused = next((part for part in arguments[1:] if isinstance(part, Refused)), None)
            if refused is not None:
                return "" if refused.unless else f"anything else is refused: {refused.reason}"
            or_text = any(isinstance(part, OrText) for part in arguments[1:])
            return f"{'text or ' if or_text else ''}{self._type(arguments[0])}"
        if origin is Literal:
            return ", ".join(f"`{_shown(value)}`" for value in arguments)
        if origin in (Union, types.UnionType):
            return " or ".join(dict.fromkeys(self._type(part) for part in arguments if part is not type(None)))
        if origin in (list, tuple):
            return f"list of {self._type(arguments[0])}"
        if origin is dict or annotation is dict:
            return "object"
        if isinstance(annotation, type) and issubclass(annotation, Wire):
            return self._link(annotation)
        return {str: "text", int: "integer", float: "number", bool: "true or false", type(None): ""}.get(
            annotation, "any"
        )

    def _link(self, model: type[Wire]) -> str:
        heading = self.models.setdefault(model, f"{self.group} {model.__name__}")
        return f"[{model.__name__}](#{heading.lower().replace(' ', '-')})"


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    for route in app.routes:
        router = getattr(route, "original_router", None)
        for part in [route] if router is None else router.routes:
            if isinstance(part, APIRoute) and part.include_in_schema:
                yield part


def _is_a_body(app: FastAPI, model: type[Wire]) -> bool:
    bodies = [route.body_field.field_info.annotation for route in _routes(app) if route.body_field is not None]
    return any(isinstance(body, type) and issubclass(body, model) for body in bodies)


def _fate_of(info: FieldInfo) -> Refused | Hint | None:
    return next((part for part in info.metadata if isinstance(part, Refused | Hint)), None)


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for part in metadata:
        for name, words in (
            ("ge", "at least"),
            ("gt", "more than"),
            ("le", "at most"),
            ("lt", "less than"),
            ("min_length", "length at least"),
            ("max_length", "length at most"),
        ):
            if (value := getattr(part, name, None)) is not None:
                yield f"{words} {value}"


def _docstring(model: type[Wire]) -> Iterator[str]:
    if model.__doc__ and model.__doc__ != Wire.__doc__:
        yield " ".join(model.__doc__.split()) + "\n"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in row)} |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(render())
