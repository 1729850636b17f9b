"""JSON schemas as tools have them, in the styles of those who write them, and a judge of what matches them.

Each entry of formats/schemas/tools.jsonl has a name, a schema, and either values that match it or, where the grammar
refuses it, the pointer of the reason.
"""

import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema

_FILE = Path(__file__).with_name("formats") / "schemas" / "tools.jsonl"
SCHEMAS: list[dict[str, Any]] = [json.loads(line) for line in _FILE.read_bytes().splitlines()]


def _openapi_nulls(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_openapi_nulls(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    read = {name: _openapi_nulls(value) for name, value in schema.items()}
    if read.get("nullable") is True and isinstance(read.get("type"), str):
        read["type"] = [read["type"], "null"]
    return read


def _exact_multiple(_: Any, divisor: float, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """jsonschema divides floats, and finds 1.1 to be no multiple of 0.01."""
    is_number = isinstance(instance, int | float) and not isinstance(instance, bool)
    if is_number and Fraction(str(instance)) % Fraction(str(divisor)):
        yield jsonschema.ValidationError(f"{instance} is not a multiple of {divisor}")


def validator(schema: Any) -> Any:
    """jsonschema's, of the draft that the schema says or that its tuples are of."""
    tuples = "$schema" not in schema and any(f'"items": {start}' in json.dumps(schema) for start in ("[{", "[["))
    default: Any = jsonschema.Draft7Validator if tuples else jsonschema.Draft202012Validator
    extend: Any = jsonschema.validators.extend
    kind = extend(jsonschema.validators.validator_for(schema, default=default), {"multipleOf": _exact_multiple})
    return kind(_openapi_nulls(schema), format_checker=kind.FORMAT_CHECKER)
