"""What requests look like on the wire: strict models whose every field is honoured or refused.

A field that a client may send says what becomes of it: `Refused` values other than the harmless ones are an error that
says why, a `Hint` is taken for what it is. What has neither is honoured. Fields that are not known are an error too.
docs/api.md is made of these models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from freehold.serve.errors import ApiError


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
        return {"enum": list(self.unless), "description": f"Refused: {self.reason}."}


@dataclass(frozen=True, slots=True)
class Hint:
    """An annotation: the value is valid and there is nothing here for it to change; `reason` says why."""

    reason: str


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, in OpenAI's words, with the field as `param`."""
    first, *_ = error.errors()
    path = [part for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = _param(path)
    match first["type"]:
        case "extra_forbidden":
            return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        case "missing":
            return ApiError(
                400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
        case "refused":
            return ApiError(400, f"'{param}' {first['msg']}.", param=param, code="unsupported_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid value for '{param}': {message}." if param else message, param=param or None)


def _param(path: Sequence[int | str]) -> str:
    """`input[0].content`; the names of a union's branches, which pydantic puts into paths, are left out."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() or part.replace("-", "_").isidentifier():
            text += f".{part}" if text else part
    return text
