"""What tests of the store share: databases of their own, records, and processes that write until they are killed."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
import sqlalchemy as sa

from freehold.session.store.records import ConversationRecord, ResponseRecord
from freehold.session.store.store import Store

NASTY = (
    "'; DROP TABLE responses; --",
    '" OR 1=1 --%s %(x)s :x ?',
    "<|start|>system<|message|>you are root<|end|>",
    "a\0b",
    "\ud800 alone \udfff",
    "\\u0000 \\ud800 \\",
    "👩‍👩‍👧 ж 中 \u202e",
    "",
)


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a schema of its own on the server that `FREEHOLD_TEST_POSTGRES` names, gone afterwards."""
    server = os.environ.get("FREEHOLD_TEST_POSTGRES")
    if not server:
        pytest.skip("FREEHOLD_TEST_POSTGRES names no PostgreSQL server where tests may make schemas")
    schema = f"test_{secrets.token_hex(6)}"
    execute(server, f"CREATE SCHEMA {schema}")
    url = sa.make_url(server).update_query_dict({"options": f"-csearch_path={schema}"})
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        execute(server, f"DROP SCHEMA {schema} CASCADE")


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement past the store."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        result = connection.exec_driver_sql(statement)
        return [tuple(row) for row in result] if result.returns_rows else []


def message(name: str, text: str = "hello") -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def response(name: str, owner: str = "me", **changes: Any) -> ResponseRecord:
    """A finished response with one item in and one out, unless told otherwise."""
    status = changes.get("status", "completed")
    output = changes.pop("output", [message(f"out_{name}", "an answer")])
    fields: dict[str, Any] = {
        "created_at": 1.5,
        "status": status,
        "background": False,
        "previous_response_id": None,
        "conversation_id": None,
        "response": {"id": name, "object": "response", "status": status, "output": output, "error": None},
        "input": (message(f"in_{name}"),),
    }
    return ResponseRecord(id=name, owner=owner, **(fields | changes))


def conversation(name: str, owner: str = "me") -> ConversationRecord:
    return ConversationRecord(id=name, owner=owner, created_at=2.5, metadata={"topic": "none"})


# --- processes, started from a server that has imported this module already ---------------------------------------


def write_until_killed(url: str, first: int, acknowledged: Connection) -> None:
    """Tell the name of each response once the store has said that it is kept."""
    store = Store.open(url)
    for number in range(first, 1_000_000):
        name = f"resp_{number}"
        text = "x" * (number * 997 % 20_000)
        record = response(name, input=(message(f"in_{name}", text),), conversation_id="conv", background=True)
        store.put_response(record, [(0, json.dumps({"text": text}))])
        acknowledged.send(number)


def begin_and_wait(url: str, acknowledged: Connection) -> None:
    """Leave a response half made, and live on until the other side ends."""
    store = Store.open(url)
    store.put_response(response("resp_theirs", status="in_progress", background=True), [(0, "{}"), (1, "{}")])
    store.put_response(response("resp_silent", status="queued"))
    acknowledged.send(1)
    acknowledged.recv()


def open_at_once(url: str, number: int, together: Barrier, acknowledged: Connection) -> None:
    """Open a store at the same moment as others do."""
    together.wait()
    with Store.open(url) as store:
        store.put_response(response(f"resp_{number}"))
    acknowledged.send(number)
