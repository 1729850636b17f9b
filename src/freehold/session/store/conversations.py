"""Conversations and their items, within a transaction of the caller."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from freehold.errors import UsageError
from freehold.session.store import items, text
from freehold.session.store.records import ConversationRecord, Page, check_items
from freehold.session.store.schema import conversations
from freehold.session.store.schema import items as item_table


def create(
    connection: sa.Connection, record: ConversationRecord, given: Sequence[Mapping[str, Any]], *, now: float
) -> None:
    """A new conversation, with the items it begins with."""
    if connection.scalar(sa.select(conversations.c.id).where(*_is(record.id, record.owner))) is not None:
        raise UsageError(f"there is a conversation {record.id!r} already; give another id")
    check_items("conversation", given)
    body = text.dump(record.metadata)
    new = items.rows(record.owner, given, conversation_id=record.id)
    row = {
        "owner": record.owner,
        "id": record.id,
        "created_at": record.created_at,
        "used_at": now,
        "num_bytes": items.size(body) + sum(row["num_bytes"] for row in new),
        "metadata": body,
    }
    connection.execute(sa.insert(conversations), row)
    items.insert(connection, new)


def get(connection: sa.Connection, name: str, owner: str) -> ConversationRecord:
    """A conversation, without its items."""
    row = connection.execute(sa.select(conversations).where(*_is(name, owner))).first()
    if row is None:
        raise items.not_found("conversation", name)
    # The table's own `metadata` column: an attribute of this name would be the row's.
    metadata = text.load(row._mapping["metadata"])
    return ConversationRecord(id=row.id, owner=row.owner, created_at=row.created_at, metadata=metadata)


def update(connection: sa.Connection, name: str, owner: str, metadata: dict[str, str], *, now: float) -> None:
    """New metadata in place of the old."""
    old = len(text.dump(get(connection, name, owner).metadata).encode("utf-8"))
    body = text.dump(metadata)
    connection.execute(sa.update(conversations).where(*_is(name, owner)).values(metadata=body))
    _grow(connection, name, owner, len(body.encode("utf-8")) - old, now=now)


def delete(connection: sa.Connection, name: str, owner: str) -> None:
    """Delete a conversation and the items that lie in it; responses that were made in it stay."""
    if connection.execute(sa.delete(conversations).where(*_is(name, owner))).rowcount == 0:
        raise items.not_found("conversation", name)


def join(connection: sa.Connection, name: str, owner: str, given: Sequence[Mapping[str, Any]], *, now: float) -> None:
    """Add what a response brought; an item that is there already stays as and where it is.

    A conversation that was deleted while the response was made takes nothing.
    """
    if _lock(connection, name, owner):
        there = _ids(connection, name, owner)
        new: dict[str, Mapping[str, Any]] = {}
        for item in given:
            if item["id"] not in there:
                new.setdefault(item["id"], item)
        rows = items.rows(owner, new.values(), conversation_id=name)
        _grow(connection, name, owner, items.insert(connection, rows), now=now)


def add(connection: sa.Connection, name: str, owner: str, given: Sequence[Mapping[str, Any]], *, now: float) -> None:
    """Add items at the end."""
    check_items("conversation", given)
    if not _lock(connection, name, owner):
        raise items.not_found("conversation", name)
    there = _ids(connection, name, owner)
    for item in given:
        if item["id"] in there:
            raise UsageError(f"the conversation {name!r} has an item {item['id']!r} already; leave it out")
    rows = items.rows(owner, given, conversation_id=name)
    _grow(connection, name, owner, items.insert(connection, rows), now=now)


def page(connection: sa.Connection, name: str, owner: str, *, after: str | None, limit: int, order: str) -> Page:
    """A page of its items."""
    get(connection, name, owner)
    return items.page(connection, owner, _in(name), after=after, limit=limit, order=order)


def history(connection: sa.Connection, name: str, owner: str) -> tuple[dict[str, Any], ...]:
    """All of its items, the oldest first. UsageError where they are too many."""
    get(connection, name, owner)
    num_bytes = connection.scalar(sa.select(conversations.c.num_bytes).where(*_is(name, owner)))
    items.check_size("conversation", name, num_bytes or 0)
    query = sa.select(item_table.c.body).where(item_table.c.owner == owner, _in(name)).order_by(item_table.c.number)
    return tuple(text.load(body) for body in connection.scalars(query))


def item(connection: sa.Connection, name: str, item_id: str, owner: str) -> dict[str, Any]:
    """One of its items."""
    get(connection, name, owner)
    return dict(text.load(items.find(connection, owner, item_id, _in(name)).body))


def delete_item(connection: sa.Connection, name: str, item_id: str, owner: str, *, now: float) -> None:
    """Take one of its items out; where else that item lies, it stays."""
    if not _lock(connection, name, owner):
        raise items.not_found("conversation", name)
    found = items.find(connection, owner, item_id, _in(name))
    connection.execute(sa.delete(item_table).where(item_table.c.number == found.number))
    _grow(connection, name, owner, -found.num_bytes, now=now)


def _lock(connection: sa.Connection, name: str, owner: str) -> bool:
    """Whether it is there; nobody else adds to it until the transaction ends."""
    return connection.scalar(sa.select(conversations.c.id).where(*_is(name, owner)).with_for_update()) is not None


def _ids(connection: sa.Connection, name: str, owner: str) -> set[str]:
    return set(connection.scalars(sa.select(item_table.c.id).where(item_table.c.owner == owner, _in(name))))


def _grow(connection: sa.Connection, name: str, owner: str, num_bytes: int, *, now: float) -> None:
    connection.execute(
        sa.update(conversations)
        .where(*_is(name, owner))
        .values(num_bytes=conversations.c.num_bytes + num_bytes, used_at=now)
    )


def _is(name: str, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return conversations.c.owner == owner, conversations.c.id == name


def _in(name: str) -> sa.ColumnElement[bool]:
    return item_table.c.conversation_id == name
