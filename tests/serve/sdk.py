"""Objects on the wire held against the types of OpenAI's SDK, strictly: nothing missing, nothing unknown."""

import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from openai._models import BaseModel
from pydantic import TypeAdapter

# What the API's documents have and the SDK's types do not (yet).
_BEYOND_THE_SDK = {
    "ChatCompletionMessage": {"reasoning", "reasoning_content"},
    "ChoiceDelta": {"reasoning", "reasoning_content"},
    "Response": {"frequency_penalty", "presence_penalty", "store"},
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},
    "ResponseCustomToolCall": {"status"},
    "ResponseCustomToolCallOutput": {"status"},
    "ResponseTextDeltaEvent": {"obfuscation"},
    "ResponseReasoningTextDeltaEvent": {"obfuscation"},
    "ResponseFunctionCallArgumentsDeltaEvent": {"obfuscation"},
    "ResponseCustomToolCallInputDeltaEvent": {"obfuscation"},
}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def check(kind: Any, value: Any) -> None:
    """Raises where a JSON value is not exactly one of this type."""
    errors = _errors(kind, value, "$")
    assert not errors, errors


def _errors(kind: Any, value: Any, where: str) -> list[str]:
    origin = get_origin(kind)
    if origin is Annotated:
        return _errors(get_args(kind)[0], value, where)
    if origin in (Union, types.UnionType):
        return _of_union(get_args(kind), value, where)
    if origin is list:
        if not isinstance(value, list):
            return [f"{where}: no list: {value!r:.60}"]
        return [error for at, part in enumerate(value) for error in _errors(get_args(kind)[0], part, f"{where}[{at}]")]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _of_model(kind, value, where)
    if origin is Literal:
        return [] if value in get_args(kind) else [f"{where}: {value!r:.60} is none of {get_args(kind)}"]
    if kind is float and type(value) is int:
        return []
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValueError as error:
        return [f"{where}: {error}"]
    return []


def _of_union(kinds: tuple[Any, ...], value: Any, where: str) -> list[str]:
    found = [_errors(kind, value, where) for kind in kinds]
    if [] in found:
        return []
    if isinstance(value, Mapping):  # the branch that is meant is the one of this type
        found = [errors for errors in found if not any(error.startswith(f"{where}.type") for error in errors)] or found
    return min(found, key=len)


def _of_model(kind: type[BaseModel], value: Any, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: no {kind.__name__}: {value!r:.60}"]
    fields = {field.alias or name: field for name, field in kind.model_fields.items()}
    unknown = set(value) - set(fields) - _BEYOND_THE_SDK.get(kind.__name__, set())
    missing = {name for name, field in fields.items() if field.is_required()} - set(value)
    errors = [f"{where}: {kind.__name__} has no {name!r}" for name in unknown]
    errors += [f"{where}.{name}: missing in {kind.__name__}" for name in missing]
    for name, field in fields.items():
        if name in value:
            errors += _errors(field.annotation, value[name], f"{where}.{name}")
    return errors
