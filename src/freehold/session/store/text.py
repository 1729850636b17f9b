"""Python's text as databases can hold it: PostgreSQL takes no NUL, and neither database takes half a surrogate pair.

A high surrogate directly followed by a low one comes back as the one character that the two stand for.
"""

import json
from typing import Any

from freehold.errors import UsageError


def dump(value: Any) -> str:
    """A JSON value as text that any database takes."""
    try:
        return storable_json(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    except RecursionError:
        raise UsageError("a JSON value is nested too deeply to be stored; send a flatter one") from None


def load(text: str) -> Any:
    """What was dumped."""
    return json.loads(text)


def storable_json(text: str) -> str:
    """The same JSON, with an escape in place of each character that a database would not take."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\u0000")


def escape(text: str) -> str:
    """Any text in ASCII without control characters; no two texts become one. Ordinary ids stay what they are."""
    return json.dumps(text)[1:-1]


def unescape(text: str) -> str:
    """What was escaped."""
    return str(json.loads(f'"{text}"'))
