"""What requests look like on the wire: strict models whose every field is honoured or refused.

A field that a client may send says what becomes of it: `Refused` values other than the harmless ones are an error that
says why, a `Hint` is taken for what it is. What has neither is honoured. Fields that are not known are an error too.
docs/api.md is made of these models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from freehold.serve.errors import ApiError

_LONGEST_PARAM = 200
_SHAPES = {
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "none_required": "null",
}
"""What pydantic says in Python's words, in JSON's."""


class Wire(BaseModel):
    """Base of everything that is read from a request's body."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


@dataclass(frozen=True, slots=True)
class Refused:
    """An annotation: only the values in `unless` are taken, and they mean the same as leaving the field out."""

    reason: str
    unless: tuple[Any, ...] = (None,)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any) -> Any:
            if not any(value == harmless and type(value) is type(harmless) for harmless in self.unless):
                raise PydanticCustomError("refused", "is not supported: {reason}", {"reason": self.reason})
            return value

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        taken: dict[str, Any] = {"enum": list(self.unless)} if self.unless else {"not": {}}
        return {**taken, "description": f"Refused: {self.reason}."}


@dataclass(frozen=True, slots=True)
class Hint:
    """An annotation: the value is valid and there is nothing here for it to change; `reason` says why."""

    reason: str


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request, in OpenAI's words, with the field as `param`."""
    first, *_ = error.errors()
    where, *path = first["loc"]
    return _complaint(first, _in_body(path, error.body, first["type"]) if where == "body" else path)


_Model = TypeVar("_Model", bound=BaseModel)


def read(model: type[_Model], value: Any, param: str) -> _Model:
    """A part of a body whose kind has just been made out. Raises ApiError; `param` is where the part is."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first, *_ = error.errors()
        raise _complaint(first, [param, *_in_body(first["loc"], value, first["type"])]) from None


def _complaint(error: Mapping[str, Any], path: Sequence[int | str]) -> ApiError:
    param = _param(path)
    match error["type"]:
        case "extra_forbidden":
            return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        case "missing" if not param:
            return ApiError(400, "the request has no body; send a JSON object")
        case "missing":
            return ApiError(
                400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
        case "refused":
            return ApiError(400, f"'{param}' {error['msg']}.", param=param, code="unsupported_parameter")
    if error["type"] in _SHAPES:
        message = f"must be {_SHAPES[error['type']]}"
    else:
        message = error["msg"].removeprefix("Value error, ")
    if not param:
        message = f"the body {message}"
    return ApiError(400, f"Invalid value for '{param}': {message}." if param else message, param=param or None)


def _in_body(path: Sequence[int | str], body: Any, kind: str) -> list[int | str]:
    """The path without the names of a union's branches, which pydantic puts into it: they are nowhere in the body."""
    result: list[int | str] = []
    for number, part in enumerate(path):
        inside = dict(enumerate(body)) if isinstance(body, list) else body
        if isinstance(inside, dict) and part in inside:
            body = inside[part]
        elif kind != "missing" or number < len(path) - 1:
            continue
        result.append(part)
    return result


def _param(path: Sequence[int | str]) -> str:
    """`input[0].content`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text[:_LONGEST_PARAM]
