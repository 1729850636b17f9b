"""Requests that mean harm, or are only wrong: each gets a clear answer, and leaves nothing behind but a line in the log.

Wrong types are made from the server's own OpenAPI document: of every field of every body, and of what lies in it. Text
that looks like control tokens or SQL is only text, wherever it stands: in the prompt it adds no control token, and what
comes back is what was sent.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.serve.fortress import Fortress, Told, logged

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, CONVERSATIONS = "/v1/messages", "/v1/conversations"

USER = {"role": "user", "content": "Hello"}
VALID: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "Hello"},
    f"{RESPONSES}/input_tokens": {"input": "Hello"},
    CONVERSATIONS: {},
    f"{CONVERSATIONS}/conv_x": {"metadata": {}},
    f"{CONVERSATIONS}/conv_x/items": {"items": [{"role": "user", "content": "Hello"}]},
    CHAT: {"model": "default", "messages": [USER]},
    COMPLETIONS: {"model": "default", "prompt": "Hello"},
    MESSAGES: {"model": "default", "max_tokens": 9, "messages": [USER]},
    f"{MESSAGES}/count_tokens": {"model": "default", "messages": [USER]},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1]},
}

PYTHON = re.compile(r"pydantic|Traceback|NoneType|\bNone\b|dictionary|instance of|_error\b|Wire|object at 0x|\.py\b")
"""What tells a client how the server is made."""

CANARY = "the-canary-sings"


@pytest.fixture(scope="module")
def log() -> Iterator[Any]:
    with logged() as stream:
        yield stream


@pytest.fixture(scope="module")
def fortress(tmp_path_factory: pytest.TempPathFactory, log: Any) -> Iterator[Fortress]:
    with Fortress(tmp_path_factory.mktemp("hostile"), {"match": "", "answer": "ok"}) as built:
        assert built.ask(RESPONSES, {"input": "Hello"}).status == 200
        yield built


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A request, the status it gets, and what the message says of it."""

    path: str
    body: Any = None
    status: int = 400
    says: str = ""
    param: str | None = None
    method: str = "POST"
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def strike(fortress: Fortress, log: Any, attack: Attack, *, key: str | None = None) -> Told:
    """The answer, after which the server is as it was before, and one line longer is the log."""
    log.seek(0)
    log.truncate()
    told = fortress.ask(
        attack.path, attack.body, method=attack.method, query=attack.query, headers=attack.headers, key=key
    )
    assert told.status == attack.status, (attack, told.body[:500])
    assert fortress.held() == (0, 0, 0)
    if attack.status != 200:
        check_refusal(attack, told)
    check_log(log.getvalue(), attack)
    return told


def check_refusal(attack: Attack, told: Told) -> None:
    assert told.headers["content-type"] == "application/json"
    error = told.error
    is_anthropic = attack.path == MESSAGES or attack.path.startswith(f"{MESSAGES}/")
    assert set(error) == ({"type", "message"} if is_anthropic else {"message", "type", "param", "code"})
    message = error["message"]
    assert message and not PYTHON.search(message), message
    assert len(message) < 1500
    assert re.search(attack.says, message), message
    if attack.param is not None:
        assert attack.param in message if is_anthropic else (error["param"] or "").startswith(attack.param), error


def check_log(text: str, attack: Attack) -> None:
    """The fact, and nothing else."""
    (line,) = text.splitlines()
    fields = json.loads(line)
    assert fields["message"] == "request" and fields["status"] == attack.status
    assert CANARY not in line and "secret" not in line


# --- wrong types, of every field ------------------------------------------------------------------------------

WRONG = (CANARY, 12345, [CANARY], {CANARY: CANARY}, [[7]], {"type": CANARY}, True, -7.5, [None], "")


def schema_of(fortress: Fortress, path: str) -> dict[str, Any]:
    known: dict[str, Any] = fortress.app.openapi()["paths"]
    path = path.replace("conv_x", "{conversation_id}")
    found: dict[str, Any] = known[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return found


def wrong_bodies(fortress: Fortress, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field, and each field of objects in it, with values that the document does not allow."""
    components = fortress.app.openapi()["components"]

    def resolved(schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = components["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        return schema

    def wrong(schema: dict[str, Any]) -> list[Any]:
        validator = jsonschema.Draft202012Validator({**schema, "components": components})
        return [value for value in WRONG if not validator.is_valid(value)]

    def inside(schema: dict[str, Any]) -> dict[str, Any]:
        """The object that a field may hold, if there is one kind of it."""
        kinds = [resolved(kind) for kind in schema.get("anyOf", [schema])]
        objects = [kind for kind in kinds if "properties" in kind]
        return objects[0] if len(objects) == 1 else {}

    root = resolved(schema_of(fortress, path))
    for name, schema in root["properties"].items():
        for value in wrong(schema)[:2]:
            yield name, {**VALID[path], name: value}
        within = inside(schema)
        for inner, of_inner in within.get("properties", {}).items():
            if values := wrong(of_inner):
                yield f"{name}.{inner}", {**VALID[path], name: {inner: values[0]}}
    for name in root.get("required", ()):
        yield name, {key: value for key, value in VALID[path].items() if key != name}


@pytest.mark.parametrize("path", VALID)
def test_a_wrong_type_in_any_field_is_refused_by_its_name(fortress: Fortress, log: Any, path: str) -> None:
    count = 0
    for name, body in wrong_bodies(fortress, path):
        param = name.partition(".")[0]
        strike(fortress, log, Attack(path=path, body=body, param=param, says=""))
        count += 1
    assert count >= 2
