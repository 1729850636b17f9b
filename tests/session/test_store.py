"""The store, on SQLite and on PostgreSQL alike: what it keeps, from whom, and what it survives."""

import contextlib
import json
import multiprocessing
import random
import resource
import secrets
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from freehold import paths
from freehold.errors import DiskError, NotFoundError, StoreError, UsageError
from freehold.session.store import migrate
from freehold.session.store.keys import hash_secret
from freehold.session.store.records import (
    ConversationRecord,
    FileRecord,
    JobRecord,
    ModelRecord,
    Page,
    ResponseRecord,
)
from freehold.session.store.schema import metadata
from freehold.session.store.store import Store
from tests import stores
from tests.stores import NASTY, conversation, execute, message, response

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["tests.stores", "alembic.command", "alembic.config", "alembic.script"])


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/store.db"
    else:
        with stores.postgres() as url:
            yield url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def postgres_url() -> Iterator[str]:
    with stores.postgres() as url:
        yield url


# --- what is kept -------------------------------------------------------------------------------------------------


def test_any_text_comes_back_as_it_was_and_leads_to_nobody_else(store: Store) -> None:
    for text in NASTY:
        _comes_back(store, text)


def _comes_back(store: Store, text: str) -> None:
    owner, name = f"owner{text}", f"resp{text}"
    item = {**message(f"item{text}", text), text: [text, None, 1.5, True, 2**70, {text: text}]}
    record = response(name, owner, input=(item,), output=[message(f"out{text}", text)], conversation_id=f"conv{text}")
    store.create_conversation(ConversationRecord(id=f"conv{text}", owner=owner, created_at=1, metadata={text: text}))
    event = json.dumps({"delta": text}, ensure_ascii=False)
    store.put_response(record, [(0, event)])
    assert store.response(name, owner) == record
    assert store.history(name, owner) == [record]
    assert store.item(f"item{text}", owner) == item
    assert store.conversation(f"conv{text}", owner).metadata == {text: text}
    assert store.conversation_history(f"conv{text}", owner) == (item, *record.output)
    assert [json.loads(kept) for _, kept in store.events(name, owner)] == [{"delta": text}]
    for stranger in ("", f"{owner} ", text):
        with pytest.raises(NotFoundError, match="there is no response"):
            store.response(name, stranger)
    store.delete_response(name, owner)
    assert store.conversation_item(f"conv{text}", f"item{text}", owner) == item


def test_an_id_of_another_owner_reads_like_one_that_never_was(store: Store) -> None:
    store.create_conversation(conversation("theirs", "them"), [message("theirs", "secret")])
    store.put_response(response("theirs", "them"), [(0, "{}")])
    questions: list[Callable[[str], object]] = [
        lambda name: store.response(name, "me"),
        lambda name: store.delete_response(name, "me"),
        lambda name: store.history(name, "me"),
        lambda name: store.input_items(name, "me"),
        lambda name: store.item(name, "me"),
        lambda name: store.append_events(name, "me", [(1, "{}")]),
        lambda name: store.events(name, "me"),
        lambda name: store.conversation(name, "me"),
        lambda name: store.update_conversation(name, "me", {}),
        lambda name: store.delete_conversation(name, "me"),
        lambda name: store.add_conversation_items(name, "me", [message("new")]),
        lambda name: store.conversation_items(name, "me"),
        lambda name: store.conversation_history(name, "me"),
        lambda name: store.conversation_item(name, "theirs", "me"),
        lambda name: store.delete_conversation_item(name, "theirs", "me"),
    ]
    for ask in questions:
        answers = []
        for name in ("theirs", "nobody"):
            with pytest.raises(NotFoundError) as refused:
                ask(name)
            answers.append(str(refused.value).replace(name, "…"))
        assert answers[0] == answers[1]
    assert store.events("theirs", "them") == [(0, "{}")]
    assert store.conversation_history("theirs", "them") == (message("theirs", "secret"),)
    store.put_response(
        response("theirs", "me", previous_response_id="gone")
    )  # the same id, of another owner, is another
    assert store.response("theirs", "them").previous_response_id is None


def test_history_is_the_chain_and_names_the_link_that_is_missing(store: Store) -> None:
    chain = [response("r0")]
    chain += [response(f"r{number}", previous_response_id=f"r{number - 1}") for number in range(1, 6)]
    for record in chain:
        store.put_response(record)
    store.put_response(response("branch", previous_response_id="r2"))
    assert store.history("r5", "me") == chain
    assert [record.id for record in store.history("branch", "me")] == ["r0", "r1", "r2", "branch"]
    store.delete_response("r1", "me")
    with pytest.raises(NotFoundError, match="no response 'r1', which 'r2' comes after"):
        store.history("r5", "me")
    store.put_response(replace(chain[0], previous_response_id="r2"))
    store.put_response(replace(chain[1], previous_response_id="r0"))
    with pytest.raises(StoreError, match="in a circle"):
        store.history("r5", "me")


def test_an_item_that_comes_back_changes_nothing_that_came_before(store: Store) -> None:
    store.create_conversation(conversation("conv"), [message("item", "first")])
    store.put_response(response("r1", input=(message("item", "second"),), conversation_id="conv"))
    store.put_response(response("r2", input=(message("item", "third"), message("new"))))
    assert store.conversation_item("conv", "item", "me") == message("item", "first")
    assert [item["id"] for item in store.conversation_history("conv", "me")] == ["item", "out_r1"]
    assert store.input_items("r1", "me").items == (message("item", "second"),)
    assert store.item("item", "me") == message("item", "third")
    store.delete_response("r2", "me")
    assert store.item("item", "me") == message("item", "second")
    store.create_conversation(conversation("both"))
    store.put_response(
        response("r3", input=(message("x"), message("y")), output=[message("x", "z")], conversation_id="both")
    )
    assert store.conversation_history("both", "me") == (message("x"), message("y"))  # in and out: where it was first
    with pytest.raises(UsageError, match="has an item 'item' already"):
        store.add_conversation_items("conv", "me", [message("other"), message("item")])
    with pytest.raises(NotFoundError):  # nothing of what was refused
        store.conversation_item("conv", "other", "me")
    with pytest.raises(UsageError, match="input item 'a' is there twice"):
        response("r3", input=(message("a"), message("a")))


def test_only_what_ended_well_joins_the_conversation_and_only_once(store: Store) -> None:
    store.create_conversation(conversation("conv"))
    for status in ("queued", "in_progress", "failed", "cancelled"):
        store.put_response(response(f"r_{status}", status=status, conversation_id="conv"))
        assert store.conversation_history("conv", "me") == ()
    record = response("r_queued", status="incomplete", conversation_id="conv")
    store.put_response(record)
    store.delete_conversation_item("conv", "in_r_queued", "me")
    store.put_response(replace(record, status="completed"))
    assert store.conversation_history("conv", "me") == tuple(record.output)
    store.delete_conversation("conv", "me")
    store.put_response(response("late", conversation_id="conv"))  # deleted while it was made
    with pytest.raises(NotFoundError):
        store.conversation("conv", "me")
    assert store.response("late", "me").status == "completed"


def test_pages_go_through_a_list_in_both_directions(store: Store) -> None:
    given = [message(f"i{number}") for number in range(7)]
    store.put_response(response("r", input=tuple(given)))
    store.create_conversation(conversation("conv"), given)
    for page in (store.input_items, store.conversation_items):
        name = "r" if page == store.input_items else "conv"
        assert page(name, "me", limit=3) == Page(items=tuple(given[:3:-1]), has_more=True)
        assert page(name, "me", limit=3, after="i4") == Page(items=tuple(given[3:0:-1]), has_more=True)
        assert page(name, "me", limit=7) == Page(items=tuple(given[::-1]), has_more=False)
        assert page(name, "me", after="i4", order="asc") == Page(items=tuple(given[5:]), has_more=False)
        with pytest.raises(NotFoundError, match="no item 'out_r'"):
            page(name, "me", after="out_r")
        with pytest.raises(UsageError, match="0 items"):
            page(name, "me", limit=0)
        with pytest.raises(UsageError, match="sideways"):
            page(name, "me", order="sideways")


def test_events_are_kept_in_order_and_sending_them_again_is_harmless(store: Store) -> None:
    store.put_response(response("r", status="queued"), [(0, '{"n":0}')])
    store.append_events("r", "me", [(2, '{"n":2}'), (1, '{"n":1}')])
    store.append_events("r", "me", [(1, '{"n":1}'), (3, '{"n":3}')])
    store.put_response(response("r"))  # a response that is written again keeps its events
    assert store.events("r", "me", 0) == [(1, '{"n":1}'), (2, '{"n":2}'), (3, '{"n":3}')]
    store.delete_response("r", "me")
    store.put_response(response("r"))
    assert store.events("r", "me") == []


def test_ids_that_no_index_could_hold_are_refused_and_lead_to_nothing(store: Store) -> None:
    for changes in ({"input": (message("😀" * 200),)}, {"output": [message("x" * 513)]}):
        with pytest.raises(UsageError, match="too long"):
            response("r", **changes)
    with pytest.raises(UsageError, match="too long"):
        store.create_conversation(conversation("conv"), [message("x" * 513)])
    with pytest.raises(NotFoundError) as refused:
        store.item("x" * 100_000, "me")
    assert len(str(refused.value)) < 200
    widest = "é" * 85  # escaped: 510 characters
    store.create_conversation(conversation(widest, widest), [message(widest)])
    assert store.conversation_item(widest, widest, widest) == message(widest)


TEXTS = st.text(max_size=6).map(lambda text: str(json.loads(json.dumps(text))))
IDS = st.sampled_from(["a", "b", "c", "'--", "\0", "\ud800"])
OWNERS = st.sampled_from(["one", "two"])
ITEMS = st.dictionaries(IDS, TEXTS, max_size=3).map(lambda found: [message(name, found[name]) for name in found])


class Books(RuleBasedStateMachine):
    """The store beside a model of it in plain dictionaries; each run has owners of its own in the same database."""

    runs = 0

    def __init__(self, store: Store) -> None:
        super().__init__()
        Books.runs += 1
        self.store = store
        self.responses: dict[tuple[str, str], ResponseRecord] = {}
        self.conversations: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self.joined: set[tuple[str, str]] = set()

    def owner(self, owner: str) -> str:
        return f"{owner}{self.runs}"

    @rule(
        name=IDS,
        owner=OWNERS,
        before=st.none() | IDS,
        place=st.none() | IDS,
        status=st.sampled_from(["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]),
        given=ITEMS,
        made=ITEMS,
    )
    def put(self, name: str, owner: str, before: Any, place: Any, status: str, given: Any, made: Any) -> None:
        before = None if before == name else before
        owner = self.owner(owner)
        record = response(
            name,
            owner,
            status=status,
            previous_response_id=before,
            conversation_id=place,
            input=tuple(given),
            output=made,
        )
        self.store.put_response(record)
        self.responses[owner, name] = record
        if place is not None and status in ("completed", "incomplete") and (owner, name) not in self.joined:
            self.joined.add((owner, name))
            if (owner, place) in self.conversations:
                for item in (*given, *made):
                    self.conversations[owner, place].setdefault(item["id"], item)

    @rule(name=IDS, owner=OWNERS)
    def delete(self, name: str, owner: str) -> None:
        owner = self.owner(owner)
        self.expect((owner, name) in self.responses, lambda: self.store.delete_response(name, owner))
        self.responses.pop((owner, name), None)
        self.joined.discard((owner, name))

    @rule(name=IDS, owner=OWNERS, given=ITEMS)
    def create(self, name: str, owner: str, given: Any) -> None:
        owner = self.owner(owner)
        if (owner, name) not in self.conversations:
            self.store.create_conversation(conversation(name, owner), given)
            self.conversations[owner, name] = {item["id"]: item for item in given}

    @rule(name=IDS, owner=OWNERS, given=ITEMS)
    def add(self, name: str, owner: str, given: Any) -> None:
        owner = self.owner(owner)
        held = self.conversations.get((owner, name), {})
        new = [item for item in given if item["id"] not in held]
        if self.expect(
            (owner, name) in self.conversations, lambda: self.store.add_conversation_items(name, owner, new)
        ):
            held.update((item["id"], item) for item in new)

    @rule(name=IDS, item=IDS, owner=OWNERS)
    def take_out(self, name: str, item: str, owner: str) -> None:
        owner = self.owner(owner)
        held = self.conversations.get((owner, name), {})
        if self.expect(item in held, lambda: self.store.delete_conversation_item(name, item, owner)):
            del held[item]

    @rule(name=IDS, owner=OWNERS)
    def end(self, name: str, owner: str) -> None:
        owner = self.owner(owner)
        self.expect((owner, name) in self.conversations, lambda: self.store.delete_conversation(name, owner))
        self.conversations.pop((owner, name), None)

    @rule(name=IDS, owner=OWNERS)
    def look_back(self, name: str, owner: str) -> None:
        owner = self.owner(owner)
        chain: list[ResponseRecord] = []
        cursor: str | None = name
        while cursor is not None:
            if (owner, cursor) not in self.responses or cursor in {record.id for record in chain}:
                with pytest.raises(StoreError if (owner, cursor) in self.responses else NotFoundError):
                    self.store.history(name, owner)
                return
            chain.append(self.responses[owner, cursor])
            cursor = chain[-1].previous_response_id
        assert self.store.history(name, owner) == chain[::-1]

    @rule(name=IDS, owner=OWNERS)
    def look(self, name: str, owner: str) -> None:
        owner = self.owner(owner)
        if self.expect((owner, name) in self.responses, lambda: self.store.response(name, owner)):
            assert self.store.response(name, owner) == self.responses[owner, name]
            page = self.store.input_items(name, owner, order="asc")
            assert page.items == self.responses[owner, name].input

    @invariant()
    def conversations_agree(self) -> None:
        for (owner, name), held in self.conversations.items():
            assert self.store.conversation_history(name, owner) == tuple(held.values())

    def expect(self, there: bool, ask: Callable[[], object]) -> bool:
        with contextlib.nullcontext() if there else pytest.raises(NotFoundError):
            ask()
        return there


def test_the_store_does_what_dictionaries_would(store: Store) -> None:
    few = settings(
        max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    machine: Any = lambda: Books(store)  # noqa: E731 — whatever makes a machine will do
    run_state_machine_as_test(machine, settings=few)


# --- threads and processes ----------------------------------------------------------------------------------------


def test_threads_write_and_read_side_by_side_through_two_stores(store: Store, url: str) -> None:
    store.create_conversation(conversation("conv"))

    def work(number: int) -> None:
        one, another = (store, second) if number % 2 else (second, store)
        one.put_response(response(f"r{number}", conversation_id="conv"))
        another.append_events(f"r{number}", "me", [(0, "{}")])
        assert one.response(f"r{number}", "me").status == "completed"

    with Store.open(url) as second, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(60)))
    held = [item["id"] for item in store.conversation_history("conv", "me")]
    assert len(held) == 120
    for number in range(60):  # what one response brought stands together
        place = held.index(f"in_r{number}")
        assert held[place + 1] == f"out_r{number}"


def test_killing_a_writer_at_any_moment_loses_nothing_that_was_acknowledged(url: str) -> None:
    with Store.open(url) as store:
        store.create_conversation(conversation("conv"))
    chance = random.Random(6)
    acknowledged: set[int] = set()
    first = 0
    for _ in range(12 if url.startswith("sqlite") else 4):
        ours, theirs = SPAWN.Pipe(duplex=False)
        writer = SPAWN.Process(target=stores.write_until_killed, args=(url, first, theirs))
        writer.start()
        theirs.close()
        acknowledged.update(ours.recv() for _ in range(chance.randint(1, 8)))
        time.sleep(chance.random() * 0.01)  # anywhere within a transaction
        writer.kill()
        with contextlib.suppress(EOFError):  # what it said before it died counts too
            while True:
                acknowledged.add(ours.recv())
        writer.join()
        ours.close()
        first = max(acknowledged) + 2
    with Store.open(url) as store:
        held = {item["id"]: item for item in store.conversation_history("conv", "me")}
        kept = set()
        for number in range(first):
            try:
                record = store.response(f"resp_{number}", "me")
            except NotFoundError:
                assert f"in_resp_{number}" not in held
                continue
            kept.add(number)
            text = "x" * (number * 997 % 20_000)
            assert record.input == (message(f"in_resp_{number}", text),) == (held[f"in_resp_{number}"],)
            assert list(record.output) == [held[f"out_resp_{number}"]]
            assert store.events(f"resp_{number}", "me") == [(0, json.dumps({"text": text}))]
        assert acknowledged <= kept
    if url.startswith("sqlite"):
        assert execute(url, "PRAGMA integrity_check") == [("ok",)]


def test_processes_that_open_a_new_database_at_once_all_find_it_ready(url: str) -> None:
    together = SPAWN.Barrier(4)
    ours, theirs = SPAWN.Pipe(duplex=False)
    openers = [SPAWN.Process(target=stores.open_at_once, args=(url, number, together, theirs)) for number in range(4)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    theirs.close()
    assert [opener.exitcode for opener in openers] == [0] * 4
    with Store.open(url) as store:
        assert {ours.recv() for _ in openers} == set(range(4))
        assert all(store.response(f"resp_{number}", "me") for number in range(4))
    ours.close()


def test_what_a_dead_process_left_is_marked_and_what_a_living_one_makes_is_not(store: Store, url: str) -> None:
    ours, theirs = SPAWN.Pipe()
    other = SPAWN.Process(target=stores.begin_and_wait, args=(url, theirs))
    other.start()
    theirs.close()
    assert ours.recv() == 1
    store.put_response(response("resp_mine", status="in_progress"))
    assert store.recover() == []
    other.kill()
    other.join()
    ours.close()
    deadline = time.monotonic() + 30  # PostgreSQL ends a session when it sees that its client is gone
    while not (recovered := store.recover()) and time.monotonic() < deadline:
        pass
    assert sorted(recovered) == ["resp_silent", "resp_theirs"]
    assert store.recover() == []
    failed = store.response("resp_theirs", "me")
    said = "the server stopped while this response was being made; send it again"
    assert failed.status == failed.response["status"] == "failed"
    assert failed.response["error"] == {"code": "server_error", "message": said}
    assert failed.output == response("resp_theirs").output
    *_, (number, last) = store.events("resp_theirs", "me")
    assert number == 2
    assert json.loads(last) == {"type": "response.failed", "sequence_number": 2, "response": failed.response}
    assert store.events("resp_silent", "me") == []  # none were kept
    assert store.response("resp_mine", "me").status == "in_progress"
    with Store.open(url) as another:
        store.close()
        assert another.recover() == ["resp_mine"]


def test_a_finished_response_is_nobodys_to_recover(url: str) -> None:
    with Store.open(url) as store:
        store.put_response(response("r", status="in_progress"))
        store.put_response(response("r"))
    with Store.open(url) as store:
        assert store.recover() == []
        assert store.response("r", "me").status == "completed"


def test_leases_leave_no_files_behind(sqlite_url: str, tmp_path: Path) -> None:
    ours, theirs = SPAWN.Pipe()
    other = SPAWN.Process(target=stores.begin_and_wait, args=(sqlite_url, theirs))
    other.start()
    theirs.close()
    ours.recv()
    other.kill()
    other.join()
    ours.close()
    with Store.open(sqlite_url) as store:
        store.put_response(response("r", status="in_progress"))
        assert len(list(tmp_path.glob(".store.db.instance-*"))) == 2
        store.recover()
        assert len(list(tmp_path.glob(".store.db.instance-*"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store.db"]


# --- retention ----------------------------------------------------------------------------------------------------


def test_old_chains_and_conversations_are_forgotten_whole_by_their_last_use(url: str) -> None:
    now = 1000.0
    with Store.open(url, clock=lambda: now) as store:
        store.put_response(response("old"))
        store.put_response(response("begun"))
        store.put_response(response("running", status="in_progress"))
        store.create_conversation(conversation("idle"), [message("gone")])
        store.create_conversation(conversation("busy"), [message("kept")])
        now = 2000.0
        store.put_response(response("continued", previous_response_id="begun", conversation_id="busy"))
        assert store.sweep(max_age_seconds=1000.0) == 0
        now = 2000.5
        assert store.sweep(max_age_seconds=1000.0) == 2
        assert [record.id for record in store.history("continued", "me")] == ["begun", "continued"]
        assert store.response("running", "me").status == "in_progress"
        assert len(store.conversation_history("busy", "me")) == 3
        for ask in (lambda: store.response("old", "me"), lambda: store.item("gone", "me")):
            with pytest.raises(NotFoundError):
                ask()
        assert store.sweep(max_age_seconds=0, now=1e12) == 3
        assert store.sweep(max_age_seconds=0, now=1e12) == 0
        assert store.response("running", "me").status == "in_progress"


def test_the_oldest_go_until_the_rest_is_small_enough(url: str, tmp_path: Path) -> None:
    ticks = iter(range(10_000))
    text = "x" * 10_000
    with Store.open(url, clock=lambda: float(next(ticks))) as store:
        for number in range(130):
            store.put_response(response(f"r{number}", input=(message("i", text),)))
            if number % 2:
                store.create_conversation(conversation(f"c{number}"), [message("i", text)])
        before = sum(path.stat().st_size for path in tmp_path.glob("store.db*"))
        assert store.sweep(max_bytes=10_000_000) == 0
        removed = store.sweep(max_bytes=300_000)
        assert 160 < removed < 172  # about 28 of 195 fit, with what a row takes
        for number in range(115, 130):
            assert store.response(f"r{number}", "me")
        with pytest.raises(NotFoundError):
            store.response("r70", "me")
        with pytest.raises(NotFoundError):
            store.conversation("c71", "me")
        if url.startswith("sqlite"):
            assert sum(path.stat().st_size for path in tmp_path.glob("store.db*")) < before / 2
        for number in range(115, 130):  # sizes are kept right through changes and deletions
            store.append_events(f"r{number}", "me", [(0, text), (1, text)])
            store.put_response(response(f"r{number}"))
            store.delete_response(f"r{number}", "me")
        store.sweep(max_bytes=0)
        sizes = [
            execute(url, f"SELECT count(*), coalesce(sum(num_bytes), 0) FROM {name}")
            for name in ("chains", "responses", "events", "conversations", "items")
        ]
        assert sizes == [[(0, 0)]] * 5


def test_sizes_agree_with_what_is_there(store: Store, url: str) -> None:
    store.create_conversation(conversation("c"), [message("a"), message("b")])
    store.put_response(response("r1", status="queued"), [(0, "{}")])
    store.put_response(response("r2", previous_response_id="r1", conversation_id="c"))
    store.put_response(response("r1", input=(message("x", "longer"),)), [(0, "{}"), (1, "[]")])
    store.delete_conversation_item("c", "a", "me")
    store.update_conversation("c", "me", {"much": "more"})
    in_chains = execute(url, "SELECT sum(num_bytes) FROM chains")
    assert in_chains == execute(
        url, "SELECT (SELECT sum(num_bytes) FROM responses) + (SELECT sum(num_bytes) FROM events)"
    )
    in_it = "SELECT sum(num_bytes) + 200 + 15 FROM items WHERE conversation_id IS NOT NULL"
    assert execute(url, "SELECT num_bytes FROM conversations") == execute(url, in_it)
    store.delete_response("r1", "me")
    assert execute(url, "SELECT num_bytes FROM chains") == execute(url, "SELECT num_bytes FROM responses")


def test_what_was_deleted_is_in_no_file_any_more(sqlite_url: str, tmp_path: Path) -> None:
    with Store.open(sqlite_url) as store:
        store.put_response(response("r", input=(message("i", "a-secret-word" * 1000),)), [(0, '"a-secret-word"')])
        store.put_response(response("s"))
        assert any(b"a-secret-word" in path.read_bytes() for path in tmp_path.iterdir())
        store.delete_response("r", "me")
    assert [path.name for path in tmp_path.iterdir() if b"a-secret-word" in path.read_bytes()] == []


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_key_is_kept_by_the_hash_of_its_secret_until_it_is_revoked(store: Store, url: str) -> None:
    record, secret = store.create_key("laptop", requests_per_minute=60, tokens_per_minute=1000)
    nameless, other = store.create_key()
    assert secret.startswith("fh-")
    assert len(secret) == 3 + 43
    assert secret.startswith(record.hint)
    assert len(record.hint) < 10
    assert store.keys_by_hash() == {hash_secret(secret): record, hash_secret(other): nameless}
    assert store.keys() == [record, nameless]
    assert nameless.name == nameless.id
    assert secret[10:] not in str(execute(url, "SELECT * FROM keys"))
    with pytest.raises(UsageError, match="a key 'laptop' already"):
        store.create_key("laptop")
    assert store.revoke_key("laptop").revoked_at is not None
    assert store.revoke_key(nameless.id).id == nameless.id
    assert all(key.revoked_at is not None for key in store.keys_by_hash().values())
    assert {key.name for key in store.keys() if key.revoked_at is not None} == {"laptop", nameless.id}  # noqa: SIM118
    for name in ("laptop", nameless.id, *NASTY):
        with pytest.raises(NotFoundError, match="no active key"):
            store.revoke_key(name)
    assert store.create_key("laptop")[0].id != record.id
    for name in ("", "x" * 65, "a\nb", "\0", "key_1"):
        with pytest.raises(UsageError, match="cannot be called"):
            store.create_key(name)
    for limit in (0, -1, 2**63):
        with pytest.raises(UsageError, match="cannot have tokens_per_minute"):
            store.create_key(tokens_per_minute=limit)


# --- databases ----------------------------------------------------------------------------------------------------


def test_the_default_is_one_private_file_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FREEHOLD_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    with Store.open() as store:
        store.put_response(response("r"))
        folder = tmp_path / "share" / "freehold"
        assert paths.data_dir() == folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == dict.fromkeys(["freehold.db", "freehold.db-wal", "freehold.db-shm"], 0o600)
        assert store.name == str(folder / "freehold.db")
    monkeypatch.setenv("FREEHOLD_DATA", str(tmp_path / "named"))
    assert paths.data_dir() == tmp_path / "named"
    with Store.open() as store, pytest.raises(NotFoundError):
        store.response("r", "me")


def test_every_revision_leads_to_the_tables_in_the_code(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        migrate.upgrade(connection, "it", to="0001")
    with Store.open(url) as store:
        store.put_response(response("r"))
    with Store.open(url) as store:
        assert store.response("r", "me")
    with engine.connect() as connection:
        options = {"version_table": migrate.VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_an_old_database_keeps_all_that_it_holds_and_takes_what_is_new(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        migrate.upgrade(connection, "it", to="0001")
    # What a Freehold of that revision wrote, as it wrote it.
    hash_of_key = "'\\x{}'" if url.startswith("postgresql") else "x'{}'"
    for statement in (
        "INSERT INTO chains VALUES ('key_1', 'resp_1', 7.5, 400)",
        "INSERT INTO responses (owner, id, chain_id, created_at, status, background, in_conversation, num_bytes, body)"
        " VALUES ('key_1', 'resp_1', 'resp_1', 7.5, 'completed', false, false, 400, '{\"output\":[]}')",
        "INSERT INTO items (owner, id, response_id, is_output, num_bytes, body)"
        " VALUES ('key_1', 'in_1', 'resp_1', false, 200, '{\"id\":\"in_1\"}')",
        "INSERT INTO keys (id, name, hash, hint, created_at)"
        f" VALUES ('key_1', 'me', {hash_of_key.format(hash_secret('fh-x').hex())}, 'fh-x', 1.5)",
    ):
        execute(url, statement)
    with Store.open(url) as store:
        assert store.response("resp_1", "key_1").input == ({"id": "in_1"},)
        assert store.keys_by_hash()[hash_secret("fh-x")].name == "me"
        store.add_file(file("file-1"), most_bytes=1 << 20)
        store.create_job(job("ftjob-1"), [{"message": "made"}], most_unfinished=1)
    with Store.open(url) as store:
        assert store.next_job("here") == job("ftjob-1")
        assert store.job_events("ftjob-1", "me", "here").items == ((1, {"message": "made"}),)


def test_a_migration_that_fails_half_way_has_changed_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        migrate.upgrade(connection, "it", to="0001")

    def fail(*_: object) -> None:
        raise RuntimeError("after the first table")

    made = op.create_index
    monkeypatch.setattr(op, "create_index", fail)
    with pytest.raises(RuntimeError):
        Store.open(url)
    with engine.connect() as connection:
        assert not {"files", "tuning_jobs"} & set(sa.inspect(connection).get_table_names())
    assert execute(url, f"SELECT version_num FROM {migrate.VERSION_TABLE}") == [("0001",)]
    monkeypatch.setattr(op, "create_index", made)
    with Store.open(url) as store:
        store.add_file(file("file-1"), most_bytes=1 << 20)


# --- files and fine-tuning ----------------------------------------------------------------------------------------


def file(name: str, owner: str = "me", **changes: Any) -> FileRecord:
    fields: dict[str, Any] = {"expires_at": None, "purpose": "fine-tune", "filename": "a.jsonl", "num_bytes": 10}
    return FileRecord(id=name, owner=owner, place="here", created_at=1.5, **(fields | changes))


def job(name: str, owner: str = "me", **changes: Any) -> JobRecord:
    fields: dict[str, Any] = {
        "status": "queued",
        "training_file": "file-1",
        "validation_file": None,
        "finished_at": None,
    }
    return JobRecord(id=name, owner=owner, place="here", created_at=1.5, job={"seed": 1}, **(fields | changes))


def test_files_and_jobs_are_their_owners_and_their_places(store: Store) -> None:
    for owner in ("me", "you", NASTY[4]):
        store.add_file(file("file-1", owner, filename=f"{owner}{NASTY[3]}"), most_bytes=10)
        store.create_job(job("ftjob-1", owner), [{"message": text} for text in NASTY], most_unfinished=1)
        assert store.file("file-1", owner, "here").filename == f"{owner}{NASTY[3]}"
        found = store.job_events("ftjob-1", owner, "here", limit=100)
        assert [said["message"] for _, said in found.items] == [*NASTY[::-1]]
        with pytest.raises(NotFoundError):
            store.file("file-1", owner, "elsewhere")
        with pytest.raises(NotFoundError):
            store.job("ftjob-1", owner, "elsewhere")
    assert store.next_job("elsewhere") is None and store.file_ids("here") == {"file-1"}
    with pytest.raises(NotFoundError, match="no file 'file-2'"):
        store.create_job(job("ftjob-2", training_file="file-2"), most_unfinished=9)
    with pytest.raises(UsageError, match="1 fine-tuning jobs of yours"):
        store.create_job(job("ftjob-2"), most_unfinished=1)
    with pytest.raises(UsageError, match="delete some"):
        store.add_file(file("file-2"), most_bytes=19)


def test_a_file_is_there_until_its_bytes_are_gone_and_as_long_as_a_job_reads_it(store: Store) -> None:
    store.add_file(file("file-1"), most_bytes=100)
    store.create_job(job("ftjob-1"), most_unfinished=1)
    removed: list[str] = []
    with pytest.raises(UsageError, match="the fine-tuning job ftjob-1 reads file-1"):
        store.delete_file("file-1", "me", "here", remove=lambda: removed.append("too early"))
    store.update_job(job("ftjob-1"), lambda old: replace(old, status="failed", finished_at=2.5))

    def cannot() -> None:
        raise DiskError("busy")

    with pytest.raises(DiskError, match="busy"):
        store.delete_file("file-1", "me", "here", remove=cannot)
    assert store.file("file-1", "me", "here")
    store.delete_file("file-1", "me", "here", remove=lambda: removed.append("file-1"))
    assert removed == ["file-1"] and store.files("me", "here").items == ()


def test_owners_take_turns(store: Store) -> None:
    for owner, names in (
        ("me", ("ftjob-1", "ftjob-2", "ftjob-3")),
        ("you", ("ftjob-4", "ftjob-5")),
        ("she", ("ftjob-6",)),
    ):
        store.add_file(file("file-1", owner), most_bytes=100)
        for name in names:
            store.create_job(job(name, owner), most_unfinished=9)
    order = []
    while (found := store.next_job("here")) is not None:
        order.append(found.id)
        ended = replace(found, status="succeeded", finished_at=float(len(order)))
        store.update_job(found, lambda old, ended=ended: ended)  # type: ignore[misc]
    assert order == ["ftjob-1", "ftjob-4", "ftjob-6", "ftjob-2", "ftjob-5", "ftjob-3"]


def test_a_job_that_had_begun_goes_before_those_that_wait(store: Store) -> None:
    store.add_file(file("file-1"), most_bytes=100)
    for name in ("ftjob-1", "ftjob-2", "ftjob-3"):
        store.create_job(job(name), most_unfinished=9)

    def now() -> str:
        found = store.next_job("here")
        return "" if found is None else found.id

    assert now() == "ftjob-1"
    store.update_job(job("ftjob-3"), lambda old: replace(old, status="running"))
    assert now() == "ftjob-3"
    for name, status in (("ftjob-3", "succeeded"), ("ftjob-1", "cancelled")):
        store.update_job(job(name), lambda old, status=status: replace(old, status=status))  # type: ignore[misc]
    assert now() == "ftjob-2"


def test_what_changes_a_job_is_written_whole_or_not_at_all(store: Store) -> None:
    store.add_file(file("file-1"), most_bytes=100)
    store.create_job(job("ftjob-1"), most_unfinished=9)
    model = ModelRecord(
        name="m", place="here", owner="me", job_id="ftjob-1", step=None, created_at=1.5, model={"folder": "x"}
    )
    with pytest.raises(UsageError):
        store.update_job(job("ftjob-1"), lambda old: replace(old, status="x"), events=[{}], models=[model])
    assert store.job_events("ftjob-1", "me", "here").items == () and store.models("here") == []
    store.update_job(job("ftjob-1"), events=[{"n": 1}], models=[model])
    store.update_job(job("ftjob-1"), events=[{"n": 2}], models=[model])
    page = store.job_events("ftjob-1", "me", "here", limit=1)
    assert (page.items, page.has_more) == (((2, {"n": 2}),), True)
    assert store.job_events("ftjob-1", "me", "here", before=2).items == ((1, {"n": 1}),)
    assert store.models("here", owner="me") == [model] and store.models("here", owner="you") == []
    with pytest.raises(NotFoundError):
        store.delete_model("m", "you", "here", remove=lambda _: None)
    store.delete_model("m", "me", "here", remove=lambda _: None)
    assert store.models("here") == []


def test_a_database_of_a_newer_freehold_or_of_somebody_else_is_refused_and_left_alone(url: str) -> None:
    execute(url, "CREATE TABLE cookies (id INTEGER)")
    with pytest.raises(StoreError, match="somebody else's tables, such as 'cookies'"):
        Store.open(url)
    execute(url, "DROP TABLE cookies")
    Store.open(url).close()
    execute(url, f"UPDATE {migrate.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(StoreError, match="written by a newer Freehold \\(its revision is 9999\\); update"):
        Store.open(url)
    assert execute(url, f"SELECT version_num FROM {migrate.VERSION_TABLE}") == [("9999",)]


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 500)
    with pytest.raises(StoreError, match=r"notes\.txt is not a database"):
        Store.open(f"sqlite:///{path}")
    assert path.read_text() == "not a database " * 500
    with pytest.raises(DiskError, match="cannot be"):
        Store.open(f"sqlite:///{tmp_path}")
    with pytest.raises(DiskError, match="cannot be"):
        Store.open(f"sqlite:///{path}/store.db")
    damaged = tmp_path / "damaged.db"
    with Store.open(f"sqlite:///{damaged}") as store:
        store.put_response(response("r", input=(message("i", "x" * 100_000),)))
    damaged.write_bytes(damaged.read_bytes()[:4096] + b"\xff" * 200_000)
    with pytest.raises(StoreError, match="is damaged"), Store.open(f"sqlite:///{damaged}") as store:
        store.response("r", "me")


@pytest.mark.parametrize(
    "wrong",
    ["sqlite://", "sqlite:///:memory:", "sqlite:///a.db?mode=ro", "mysql://u:pw@h/d", "nothing", "postgresql://h:x/"],
)
def test_urls_that_name_no_store_are_refused_without_their_password(wrong: str) -> None:
    with pytest.raises(UsageError, match="give sqlite:") as refused:
        Store.open(wrong)
    assert "pw" not in str(refused.value)


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    with pytest.raises(StoreError, match="cannot be reached") as refused:
        Store.open("postgresql://me:a-secret@127.0.0.1:1/db", patience_seconds=2)
    assert "a-secret" not in str(refused.value)


def test_a_server_whose_text_is_not_unicode_is_refused(postgres_url: str) -> None:
    server = sa.create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    name = f"test_latin_{secrets.token_hex(6)}"
    with server.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        encoding = "ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        connection.exec_driver_sql(f"CREATE DATABASE {name} {encoding}")
        try:
            with pytest.raises(StoreError, match="keeps text as LATIN1"):
                Store.open(sa.make_url(postgres_url).set(database=name).render_as_string(hide_password=False))
        finally:
            connection.exec_driver_sql(f"DROP DATABASE {name}")


def test_a_store_that_is_closed_says_so(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.keys()


# --- trouble, and afterwards --------------------------------------------------------------------------------------


def test_a_locked_database_is_a_typed_error_and_works_again(sqlite_url: str, tmp_path: Path) -> None:
    with Store.open(sqlite_url, patience_seconds=0.05) as store:
        other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"has been busy for 0\.05 s") as refused:
            store.put_response(response("r", input=(message("i", "a-secret"),)))
        assert "a-secret" not in str(refused.value)
        assert refused.value.__cause__ is None
        assert store.keys() == []  # readers need not wait
        other.close()
        store.put_response(response("r"))
        assert store.response("r", "me") == response("r")


def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(sqlite_url: str) -> None:
    with Store.open(sqlite_url) as store:
        store.put_response(response("before"))
        large = response("large", input=(message("i", "x" * 1_000_000),))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
            with pytest.raises(DiskError, match="cannot be read or written"):
                store.put_response(large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(NotFoundError):
            store.response("large", "me")
        store.put_response(large)
        assert [store.response(name, "me").id for name in ("before", "large")] == ["before", "large"]


FULL_AND_READ_ONLY = """
import subprocess, sys
from freehold.errors import DiskError, DiskSpaceError
from freehold.session.store.store import Store
from tests.stores import message, response
folder = sys.argv[1]
store = Store.open(f"sqlite:///{folder}/store.db")
number = 0
try:
    while number < 100:
        store.put_response(response(f"r{number}", input=(message("i", "x" * 200_000),)))
        number += 1
except DiskSpaceError as error:
    print(error)
for kept in range(number):
    store.response(f"r{kept}", "me")
subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
store.put_response(response("after", input=(message("i", "x" * 200_000),)))
store.close()
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
try:
    Store.open(f"sqlite:///{folder}/store.db")
except DiskError as error:
    print(error)
"""


def test_a_full_and_a_read_only_disk_are_typed_errors(tmp_path: Path) -> None:
    inside = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=3m none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*inside, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets no test mount a file system")
    command = [
        *inside,
        "sh",
        "-c",
        f'{mount} && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        FULL_AND_READ_ONLY,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    full, read_only = done.stdout.splitlines()
    assert full == f"{tmp_path}/store.db cannot grow: the disk is full; free some space and send it again"
    assert "Read-only file system" in read_only


def test_a_lost_connection_is_a_typed_error_and_the_next_one_works(postgres_url: str) -> None:
    def end_all(condition: str) -> list[tuple[Any, ...]]:
        mine = f"query LIKE '%%' AND pid <> pg_backend_pid() AND datname = current_database() AND {condition}"
        return execute(postgres_url, f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {mine}")

    with Store.open(postgres_url) as store, Store.open(postgres_url) as other:
        store.put_response(response("r", status="in_progress"))
        assert other.recover() == []
        assert end_all("state LIKE 'idle%%'")
        assert store.response("r", "me").status == "in_progress"  # a new connection was made
        store.put_response(response("r", status="in_progress"))  # and a new lease
        assert other.recover() == []

        engine = sa.create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
        failures: list[Exception] = []

        def write() -> None:
            try:
                store.put_response(response("lost"))
            except StoreError as error:
                failures.append(error)

        with engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE responses")
            writer = threading.Thread(target=write)
            writer.start()
            while not end_all("wait_event_type = 'Lock'"):
                pass
            writer.join()
        assert "cannot be reached" in str(failures[0]) or "refused" in str(failures[0])
        store.put_response(response("found"))
        with pytest.raises(NotFoundError):
            store.response("lost", "me")
