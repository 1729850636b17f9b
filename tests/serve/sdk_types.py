"""Holds what a server sends against the pydantic types of a client library, more strictly than the library does."""

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel

_M = TypeVar("_M", bound=BaseModel)


def checked(
    kind: type[_M], data: Any, *, ours: Collection[str] = (), complete: bool = False, may_lack: Collection[str] = ()
) -> _M:
    """`data` as the library's type. Fails for values of other types, for fields that are missing and for fields that
    the type does not know, unless they are `ours`. A `complete` object has every field of its type, also those that
    the library takes to be optional, except for what it `may_lack`."""
    parsed = kind.model_validate(data, strict=True)
    for found in _models(parsed):
        name = type(found).__name__
        unknown = set(found.model_extra or ()) - set(ours)
        assert not unknown, f"{name} has no field {', '.join(sorted(unknown))}"
        if complete:
            missing = set(type(found).model_fields) - found.model_fields_set - set(may_lack)
            assert not missing, f"{name} lacks {', '.join(sorted(missing))}"
    return parsed


def _models(value: Any) -> Iterable[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for field in type(value).model_fields:
            yield from _models(getattr(value, field))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _models(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _models(item)
