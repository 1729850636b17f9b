"""What goes wrong around a request: its client leaves, the store fails, the engine fails, somebody deletes what is
being made. Each ends clearly, and nothing is left over: no place at the gate, no request of the runner, no task."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from freehold.errors import DiskSpaceError, StoreError
from freehold.session.store.store import Store
from tests.serve.fortress import Fortress, Told, logged

RESPONSES, CHAT, COMPLETIONS, MESSAGES = "/v1/responses", "/v1/chat/completions", "/v1/completions", "/v1/messages"
TURN = {"match": "", "reasoning": "Let me see.", "answer": "It is sunny today."}
SLOW = {"match": "slow", "answer": "and so on " * 300}
USER = {"role": "user", "content": "Hello"}
BODIES: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "Hello"},
    CHAT: {"model": "default", "messages": [USER], "n": 2},
    COMPLETIONS: {"model": "default", "prompt": ["Hello", "Bye"]},
    MESSAGES: {"model": "default", "max_tokens": 99, "messages": [USER]},
}


@pytest.fixture
def log() -> Iterator[Any]:
    with logged() as stream:
        yield stream


def last_event(told: Told) -> dict[str, Any]:
    blocks = [block for block in told.body.decode().split("\n\n") if block and block != "data: [DONE]"]
    found: dict[str, Any] = json.loads(blocks[-1].partition("data: ")[2])
    return found


def complaints(log: Any) -> list[str]:
    lines = map(json.loads, log.getvalue().splitlines())
    return [line["message"] for line in lines if line["level"] != "notice"]


@pytest.mark.parametrize("path", BODIES)
def test_a_client_may_leave_at_any_moment(tmp_path: Path, log: Any, path: str) -> None:
    with Fortress(tmp_path, TURN) as built:
        whole = built.ask(path, BODIES[path] | {"stream": True})
        for number in range(whole.body.count(b"\n\n") + 3):
            told = built.ask(path, BODIES[path] | {"stream": True}, gone_after=number)
            assert len(told.body) <= len(whole.body) + 400
            assert built.held() == (0, 0, 0), number
        for _ in range(3):
            built.ask(path, BODIES[path], gone_after=0)
            assert built.held() == (0, 0, 0)
    assert complaints(log) == []


def test_who_leaves_early_has_still_used_what_was_made(tmp_path: Path, log: Any) -> None:
    with Fortress(tmp_path, TURN) as built:
        for number in (4, 8, None):
            built.ask(CHAT, BODIES[CHAT] | {"stream": True}, gone_after=number)
        prompt = len(built.prompts[0].prompt)
    used = [json.loads(line)["tokens"] - prompt for line in log.getvalue().splitlines()]
    assert 0 < used[0] < used[1] < used[2]


def test_a_client_of_a_response_in_the_background_may_leave_and_come_back(tmp_path: Path, log: Any) -> None:
    body = {"input": "Hello", "background": True, "stream": True}
    with Fortress(tmp_path, TURN) as built:
        whole = built.ask(RESPONSES, body)
        for number in range(1, whole.body.count(b"\n\n") + 1, 3):
            told = built.ask(RESPONSES, body, gone_after=number)
            built.run(built.server.background.finish())
            assert built.held() == (0, 0, 0)
            if b"resp_" not in told.body:
                continue
            name = json.loads(told.body.partition(b"data: ")[2].partition(b"\n")[0])["response"]["id"]
            again = built.ask(f"{RESPONSES}/{name}", method="GET", query="stream=true")
            assert again.body.startswith(told.body) and again.body.endswith(b"data: [DONE]\n\n")
            assert last_event(again)["type"] == "response.completed"
    assert complaints(log) == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_an_engine_that_fails_in_the_middle_is_told_at_the_end_of_the_stream(
    tmp_path: Path, log: Any, path: str, stream: bool
) -> None:
    with Fortress(tmp_path, TURN | {"fault": "the engine broke down"}) as built:
        told = built.ask(path, BODIES[path] | {"stream": stream})
        assert built.held() == (0, 0, 0)
        if stream:
            event = last_event(told)
            assert told.status == 200 and event.get("type") in ("error", "response.failed", None)
            assert "the engine broke down" in json.dumps(event)
        else:
            assert told.status == 500 and told.error["message"] == "the engine broke down"
    (said,) = complaints(log)
    assert "RequestError" in said and "broke down" not in said


class Full(Store):
    """A store whose disk has no space left, or that is busy."""

    error: Exception | None = None

    def put_response(self, record: Any, events: Any = ()) -> None:
        if self.error is not None and (self.fails_first or record.status != "queued"):
            raise self.error
        super().put_response(record, events)

    fails_first = True


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DiskSpaceError("/secret/place/freehold.db cannot grow: the disk is full"), 507),
        (StoreError("/secret/place is busy"), 503),
    ],
)
def test_what_cannot_be_stored_is_not_told_to_be_complete(
    tmp_path: Path, log: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    with Fortress(tmp_path, TURN) as built:
        built.store.__class__ = Full
        store: Any = built.store
        store.error = error
        told = built.ask(RESPONSES, {"input": "Hello"})
        assert told.status == status and b"secret" not in told.body and "later" in told.error["message"]
        told = built.ask(RESPONSES, {"input": "Hello", "stream": True})
        assert last_event(told)["type"] == "response.failed" and b"secret" not in told.body
        assert b"response.completed" not in told.body
        told = built.ask(RESPONSES, {"input": "Hello", "background": True})
        assert told.status == status
        store.fails_first = False
        told = built.ask(RESPONSES, {"input": "Hello", "background": True, "stream": True})
        assert last_event(told)["type"] == "response.failed" and b"secret" not in told.body
        built.run(built.server.background.finish())
        assert built.held() == (0, 0, 0)
        store.error = None
        assert built.ask(RESPONSES, {"input": "Hello"}).status == 200
        assert any("/secret/place" in said for said in complaints(log))  # the operator has to know


def test_a_store_that_somebody_else_holds_is_waited_for_and_no_longer_than_that(tmp_path: Path, log: Any) -> None:
    with Fortress(tmp_path, TURN, patience=0.2) as built:
        other = sqlite3.connect(tmp_path / "freehold.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        async def all_at_once() -> list[Told]:
            kinds: tuple[dict[str, Any], ...] = ({}, {"stream": True}, {"background": True}, {"store": False})
            return await asyncio.gather(*(built.send(RESPONSES, {"input": "Hello"} | kind) for kind in kinds))

        whole, streamed, later, unkept = built.run(all_at_once())
        assert (whole.status, later.status, unkept.status) == (503, 503, 200)
        assert last_event(streamed)["type"] == "response.failed"
        assert built.held() == (0, 0, 0)
        other.execute("ROLLBACK")
        other.close()
        assert built.ask(RESPONSES, {"input": "Hello"}).status == 200


async def begun(built: Fortress, **more: Any) -> str:
    """A slow response in the background, of which something has been said."""
    told = await built.send(RESPONSES, {"input": "slow", "background": True, **more})
    name = str(told.json["id"])
    async with asyncio.timeout(30):
        while not built.server.background._runs or built.runner.stats().generated_tokens < 5:
            await asyncio.sleep(0.005)
    return name


def test_two_who_cancel_at_once_are_told_the_same(tmp_path: Path, log: Any) -> None:
    async def scenario(built: Fortress) -> None:
        name = await begun(built)
        one, two = await asyncio.gather(*(built.send(f"{RESPONSES}/{name}/cancel") for _ in range(2)))
        assert one.status == two.status == 200 and one.body == two.body and one.json["status"] == "cancelled"

    with Fortress(tmp_path, SLOW, tokens_per_second=200) as built:
        built.run(scenario(built))
        assert built.held() == (0, 0, 0)
    assert complaints(log) == []


def test_two_who_delete_at_once_and_one_who_cancels(tmp_path: Path, log: Any) -> None:
    async def scenario(built: Fortress) -> None:
        name = await begun(built)
        told = await asyncio.gather(
            built.send(f"{RESPONSES}/{name}", method="DELETE"),
            built.send(f"{RESPONSES}/{name}", method="DELETE"),
            built.send(f"{RESPONSES}/{name}/cancel"),
            built.send(f"{RESPONSES}/{name}", method="GET", query="stream=true"),
        )
        statuses = [each.status for each in told]
        assert sorted(statuses[:2]) == [200, 404] and statuses[2] in (200, 404)
        assert (await built.send(f"{RESPONSES}/{name}", method="GET")).status == 404

    with Fortress(tmp_path, SLOW, tokens_per_second=200) as built:
        built.run(scenario(built))
        assert built.held() == (0, 0, 0)
    assert complaints(log) == []


@pytest.mark.parametrize("kind", [{}, {"stream": True}, {"background": True}])
def test_a_conversation_that_is_deleted_meanwhile_takes_nothing_and_the_response_completes(
    tmp_path: Path, log: Any, kind: dict[str, Any]
) -> None:
    async def scenario(built: Fortress) -> None:
        held = (await built.send("/v1/conversations", {})).json["id"]
        body = {"input": "Hello", "conversation": held} | kind
        asked = asyncio.create_task(built.send(RESPONSES, body))
        async with asyncio.timeout(30):
            while built.runner.stats().generated_tokens < 3:
                await asyncio.sleep(0.002)
        assert (await built.send(f"/v1/conversations/{held}", method="DELETE")).status == 200
        told = await asked
        await built.server.background.finish()
        name = last_event(told)["response"]["id"] if "stream" in kind else told.json["id"]
        assert (await built.send(f"{RESPONSES}/{name}", method="GET")).json["status"] == "completed"
        assert (await built.send(f"/v1/conversations/{held}", method="GET")).status == 404

    with Fortress(tmp_path, TURN, tokens_per_second=200) as built:
        built.run(scenario(built))
        assert built.held() == (0, 0, 0)
    assert complaints(log) == []
