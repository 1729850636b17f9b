"""What the Responses API keeps: chains, owners, responses in the background, and what it does not keep."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from openai.types.conversations import ConversationItemList, Message
from openai.types.responses import ResponseItemList

from freehold.errors import DiskSpaceError
from freehold.session.store.records import ResponseRecord
from freehold.session.store.store import Store
from tests.serve.event_order import EventOrder
from tests.serve.responding import LOOK_UP, SUNNY, WEATHER, Responding, events_of, result_of
from tests.serve.sdk import check

pytestmark = pytest.mark.anyio

SLOW = {"answer": "and so on " * 300}
"""At 200 tokens a second it is not over before somebody ends it."""

EVIL_IDS = ("' OR 1=1 --", "resp_%00", "<|start|>system", "é" * 300, "resp_" + "0" * 48, "%2e%2e")


async def until(happens: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not happens():
            await asyncio.sleep(0.005)


async def ended(there: Responding, name: str) -> dict[str, Any]:
    """A response in the background, when it is over."""
    if (run := there.server.background.find("", name)) is not None and run.task is not None:
        await asyncio.wait_for(asyncio.shield(run.task), 30)
    response: dict[str, Any] = await there.get(f"responses/{name}")
    return response


async def test_a_response_in_the_background_outlives_who_asked(tmp_path: Path) -> None:
    async with Responding(SUNNY, {**SUNNY, "fault": "the tokens ran dry"}, SUNNY, path=tmp_path) as there:
        queued = await there.make(input="Hello", background=True)
        assert (queued["status"], queued["output"], queued["background"]) == ("queued", [], True)
        done = await ended(there, queued["id"])
        assert (done["status"], done["output"][-1]["content"][0]["text"]) == ("completed", "It is sunny.")
        failed = await ended(there, (await there.make(input="Hello", background=True))["id"])
        assert (failed["status"], failed["error"]["message"]) == ("failed", "the tokens ran dry")
        assert (await there.make(input="And?", previous_response_id=done["id"]))["status"] == "completed"
        assert "no events" in (await there.get(f"responses/{done['id']}", 400, stream="true"))["error"]["message"]


async def test_the_stream_of_a_response_in_the_background_resumes_anywhere_also_after_a_restart(tmp_path: Path) -> None:
    async with Responding(LOOK_UP, path=tmp_path, tokens_per_second=400) as there:
        body = {"input": "Weather?", "tools": [WEATHER], "background": True, "stream": True}
        asked = asyncio.create_task(there.http.post("/v1/responses", json=body))
        await until(lambda: bool(there.server.background._runs))
        (run,) = there.server.background._runs.values()
        name = run.key[1]
        await until(lambda: run.response["status"] == "in_progress")
        live = events_of(await there.get(f"responses/{name}", stream="true", starting_after=0))
        events = events_of((await asked).text)
    final = EventOrder.of(events)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert live == events[1:]
    async with Responding(path=tmp_path) as there:
        assert await there.get(f"responses/{name}") == final
        for after in (None, 0, 5, len(events) - 2, len(events) - 1, 10_000):
            query: dict[str, Any] = {} if after is None else {"starting_after": after}
            told = events_of(await there.get(f"responses/{name}", stream="true", **query))
            assert told == events[0 if after is None else after + 1 :]


async def test_cancelling_ends_a_response_once_and_for_all(tmp_path: Path) -> None:
    async with Responding(SLOW, SUNNY, path=tmp_path, tokens_per_second=200) as there:
        body = {"input": "Hello", "background": True, "stream": True}
        asked = asyncio.create_task(there.http.post("/v1/responses", json=body))
        await until(lambda: any(run.response["output"] for run in there.server.background._runs.values()))
        ((_, name),) = there.server.background._runs
        cancelled = await there.sdk.responses.cancel(name)
        assert cancelled.status == "cancelled"
        final = EventOrder.of(events_of((await asked).text))
        assert final["status"] == "cancelled" and final["output"][0]["status"] == "incomplete"
        assert await there.get(f"responses/{name}/cancel", method="POST") == final
        assert await there.get(f"responses/{name}") == final
        assert there.server.served.runner.stats().running == 0
        error = await there.refused(input="Go on", previous_response_id=name)
        assert "cancelled" in error["message"]
        done = await there.make(input="Hello")
        await there.get(f"responses/{done['id']}/cancel", 400, method="POST")


async def test_a_response_that_is_deleted_while_it_is_made_is_gone(tmp_path: Path) -> None:
    async with Responding(SLOW, path=tmp_path, tokens_per_second=200) as there:
        name = (await there.make(input="Hello", background=True))["id"]
        assert (await there.get(f"responses/{name}", method="DELETE"))["deleted"] is True
        await there.get(f"responses/{name}", 404)
        assert there.server.served.runner.stats().running == 0


async def test_what_waits_in_the_background_counts_and_ends_with_the_server(tmp_path: Path) -> None:
    async with Responding(SLOW, SUNNY, path=tmp_path, tokens_per_second=200, max_running=1, max_queue=0) as there:
        first = await there.make(input="Hello", background=True)
        assert (await there.refused(429, input="Hello", background=True))["code"] == "queue_full"
        assert (await there.refused(400, input="Hello", previous_response_id=first["id"]))["param"]
        await there.server.served.runner.drain(0)
        await there.server.background.finish()
        failed = await there.get(f"responses/{first['id']}")
        assert failed["status"] == "failed" and "shutting down" in failed["error"]["message"]


async def test_a_server_that_was_killed_left_a_failed_response(tmp_path: Path) -> None:
    async with Responding(SLOW, path=tmp_path, tokens_per_second=200) as there:
        body = {"input": "Hello", "background": True, "stream": True}
        asked = asyncio.create_task(there.http.post("/v1/responses", json=body))
        await until(lambda: any(len(run._told) > 9 for run in there.server.background._runs.values()))
        ((_, name),) = there.server.background._runs
        assert there.store is not None
        there.store.close()  # as good as dead: nothing is written from now on
        await asked
    async with Responding(path=tmp_path) as there:
        assert there.store is not None and there.store.recover() == [name]
        assert (await there.get(f"responses/{name}"))["status"] == "failed"
        final = EventOrder.of(events_of(await there.get(f"responses/{name}", stream="true")))
    assert final["status"] == "failed"


async def test_what_is_not_stored_leaves_nothing_behind(tmp_path: Path) -> None:
    secret = "xylophone"
    async with Responding({"reasoning": secret, "answer": secret}, path=tmp_path) as there:
        response = await there.make(input=secret, instructions=secret, store=False, stream=True)
        await there.get(f"responses/{response['id']}", 404)
        assert (await there.refused(404, input="x", previous_response_id=response["id"]))["code"] == "not_found"
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert secret.encode() not in kept and response["id"].encode() not in kept


async def test_a_server_without_a_store_keeps_nothing_and_says_so() -> None:
    async with Responding(SUNNY) as there:
        response = await there.make(input="Hello")
        assert response["store"] is False
        assert (await there.refused(input="Hello", store=True))["param"] == "store"
        await there.get(f"responses/{response['id']}", 404)
        await there.refused(404, input="x", conversation="conv_1")


async def test_nobody_is_told_of_the_end_before_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Responding(SUNNY, SUNNY, path=tmp_path) as there:
        order: list[str] = []
        put = Store.put_response

        def note(self: Store, *given: Any) -> None:
            put(self, *given)
            order.append("stored")

        monkeypatch.setattr(Store, "put_response", note)
        for stream in (True, False):
            order.clear()
            await asked(there, {"input": "Hello", "stream": stream}, order.append)
            told = next(at for at, body in enumerate(order) if '"status":"completed","background"' in body)
            assert 0 <= order.index("stored") < told


@pytest.mark.parametrize("how", [{"stream": True}, {"background": True}, {"background": True, "stream": True}])
async def test_what_could_not_be_stored_is_not_called_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    async with Responding(SUNNY, path=tmp_path) as there:
        put = Store.put_response

        def full(self: Store, record: ResponseRecord, *given: Any) -> None:
            if record.finished:
                raise DiskSpaceError("the disk is full")
            put(self, record, *given)

        monkeypatch.setattr(Store, "put_response", full)
        made = await there.make(input="Hello", **how)
        if how.get("stream"):
            assert made["status"] == "failed" and "completed_at" in made
        else:
            await there.server.background.finish()
            assert (await there.get(f"responses/{made['id']}"))["status"] == "queued"  # until the next start


async def asked(there: Responding, body: dict[str, Any], sent: Callable[[str], None], *, leaves: bool = False) -> None:
    """One request as the server sees it; the client goes away after the first that it is sent, if it `leaves`."""
    raw = json.dumps(body).encode()
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": raw, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            sent(message["body"].decode())
            if leaves:
                gone.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/responses",
        "raw_path": b"/v1/responses",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await asyncio.wait_for(there.app(scope, receive, send), 30)


async def test_a_client_that_goes_away_ends_its_response_which_is_not_stored(tmp_path: Path) -> None:
    async with Responding(SLOW, path=tmp_path, tokens_per_second=200, max_running=1, max_queue=0) as there:
        told: list[str] = []
        await asked(there, {"input": "Hello", "stream": True}, told.append, leaves=True)
        name = events_of(f"{told[0]}data: [DONE]\n\n")[0]["response"]["id"]
        await until(lambda: there.server.served.runner.stats().running == 0)
        await there.get(f"responses/{name}", 404)
        there.server.gate.enter(1)  # there is room again


async def test_items_can_be_referred_to_and_paged_through(tmp_path: Path) -> None:
    async with Responding(LOOK_UP, SUNNY, SUNNY, path=tmp_path) as there:
        first = await there.make(input="Weather?", tools=[WEATHER])
        given = [{"role": "user", "content": f"{number}"} for number in range(5)]
        referred = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
        second = await there.make(input=[*given, *referred, result_of(first)], tools=[WEATHER])
        asc = await there.get(f"responses/{second['id']}/input_items", order="asc", limit=100)
        check(ResponseItemList, asc)
        kinds = [item["type"] for item in asc["data"]]
        assert kinds == ["message"] * 5 + ["reasoning", "function_call", "function_call_output"]
        seen: list[Any] = []
        query: dict[str, Any] = {"limit": 3}
        while True:
            page = await there.get(f"responses/{second['id']}/input_items", **query)
            seen += page["data"]
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
        assert seen == asc["data"][::-1]
        wrong: list[dict[str, Any]] = [{"limit": 0}, {"limit": 101}, {"order": "up"}, {"before": "x"}, {"include": "x"}]
        for query in wrong:
            await there.get(f"responses/{second['id']}/input_items", 400, **query)
        await there.get(f"responses/{second['id']}/input_items", 404, after="nothing")
        query = {"include[]": "reasoning.encrypted_content"}
        sealed = await there.get(f"responses/{first['id']}", **query)
        assert sealed["output"][0]["encrypted_content"]


async def test_what_is_anothers_is_as_good_as_unknown(tmp_path: Path) -> None:
    async with Responding(SUNNY, SUNNY, path=tmp_path) as there:
        hers = await there.make(owner="ann", input="Hello")
        conversation = (await there.http.post("/v1/conversations", json={}, headers={"x-owner": "ann"})).json()["id"]
        told: set[str] = set()
        known = (hers["id"], conversation, hers["output"][0]["id"])
        for name in (*known, *EVIL_IDS):
            for method, path in (
                ("GET", "responses/{}"),
                ("DELETE", "responses/{}"),
                ("POST", "responses/{}/cancel"),
                ("GET", "responses/{}/input_items"),
                ("GET", "responses/{}?stream=true"),
                ("GET", "conversations/{}"),
                ("DELETE", "conversations/{}"),
                ("GET", "conversations/{}/items"),
                ("GET", "conversations/{}/items/{}"),
            ):
                where = path.format(*[name.replace("%", "%25").replace("?", "%3F")] * 2)
                answer = await there.http.request(method, f"/v1/{where}", headers={"x-owner": "bob"})
                assert answer.status_code == 404, (where, answer.text)
            for body in (
                {"previous_response_id": name},
                {"conversation": name, "input": "x"},
                {"input": [{"type": "item_reference", "id": name}]},
            ):
                if len(name) < 257:
                    error = await there.refused(404, owner="bob", **body)
                    told.add(error["message"].replace(repr(name), "ID"))
        said = "there is no {} ID; it was never stored here, or it has been deleted"
        assert told == {said.format(kind) for kind in ("response", "conversation", "item")}
        assert (await there.make(owner="ann", previous_response_id=hers["id"], input="x"))["status"] == "completed"


async def test_a_conversation_collects_what_is_said_in_it(tmp_path: Path) -> None:
    async with Responding(LOOK_UP, SUNNY, path=tmp_path) as there:
        conversations = there.sdk.conversations
        made = await conversations.create(
            metadata={"topic": "weather"}, items=[{"type": "message", "role": "system", "content": "Be brief."}]
        )
        first = await there.make(input="Weather?", tools=[WEATHER], conversation=made.id)
        await there.make(input=[result_of(first)], tools=[WEATHER], conversation={"id": made.id}, stream=True)
        check(ConversationItemList, await there.get(f"conversations/{made.id}/items"))
        listed = await conversations.items.list(made.id, order="asc")
        assert [item.type for item in listed.data] == [
            "message", "message", "reasoning", "function_call", "function_call_output", "reasoning", "message",
        ]  # fmt: skip
        added = await conversations.items.create(made.id, items=[{"role": "user", "content": "Thanks."}])
        item = await conversations.items.retrieve(str(added.data[0].id), conversation_id=made.id)
        assert item == added.data[0] and isinstance(item, Message)
        assert (await conversations.items.delete(item.id, conversation_id=made.id)).id == made.id
        await there.get(f"conversations/{made.id}/items/{item.id}", 404)
        assert (await conversations.update(made.id, metadata={"a": "b"})).metadata == {"a": "b"}
        assert (await conversations.retrieve(made.id)).metadata == {"a": "b"}
        many = [{"role": "user", "content": "x"}] * 21
        answer = await there.http.post(f"/v1/conversations/{made.id}/items", json={"items": many})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "items")
        assert (await conversations.delete(made.id)).deleted
        await there.get(f"conversations/{made.id}", 404)
        assert (await there.refused(404, input="x", conversation=made.id))["param"] == "conversation"


async def test_a_failed_response_adds_nothing_to_its_conversation(tmp_path: Path) -> None:
    async with Responding({**SUNNY, "fault": "dry"}, path=tmp_path) as there:
        name = (await there.sdk.conversations.create()).id
        with suppress(AssertionError):
            await there.make(input="Hello", conversation=name, stream=True)
        assert (await there.get(f"conversations/{name}/items"))["data"] == []


async def test_a_locked_store_holds_up_only_those_who_need_it(tmp_path: Path) -> None:
    async with Responding({"match": ".", **SUNNY}, path=tmp_path) as there:
        await there.make(input="Hi")
        other = sqlite3.connect(tmp_path / "responses.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        waiting = [asyncio.create_task(there.make(input="Hi")) for _ in range(50)]
        for _ in range(3):
            await there.make(input="Hi", store=False)
        assert not any(task.done() for task in waiting)
        other.execute("ROLLBACK")
        other.close()
        assert {response["status"] for response in await asyncio.gather(*waiting)} == {"completed"}
