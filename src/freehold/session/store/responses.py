"""Responses, their chains, items and stream events, within a transaction of the caller."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from freehold.errors import NotFoundError, StoreError
from freehold.session.store import conversations, items, text
from freehold.session.store.database import upsert
from freehold.session.store.records import Page, ResponseRecord
from freehold.session.store.schema import chains, events, responses
from freehold.session.store.schema import items as item_table

_JOINING = {"completed", "incomplete"}  # what failed or was called off has no place in a conversation


def put(connection: sa.Connection, record: ResponseRecord, *, instance: str | None, now: float) -> None:
    """Insert or replace a response with its items; add them to its conversation, once, when it is complete."""
    chain_id = _chain_of(connection, record)
    chain = {"owner": record.owner, "id": chain_id, "used_at": now, "num_bytes": 0}
    upsert(connection, chains, chain, update={"used_at": now})  # and nobody else writes to this chain until the end
    old = connection.execute(
        sa.select(responses.c.num_bytes, responses.c.in_conversation).where(*_is(record.id, record.owner))
    ).first()

    response = {**record.response, "output": []} if record.output else record.response
    body = text.dump(response)
    rows = [
        *items.rows(record.owner, record.input, response_id=record.id),
        *items.rows(record.owner, record.output, response_id=record.id, is_output=True),
    ]
    num_bytes = items.size(body) + sum(row["num_bytes"] for row in rows)
    in_conversation = old is not None and old.in_conversation
    joins = record.conversation_id is not None and record.status in _JOINING and not in_conversation
    changing = {
        "created_at": record.created_at,
        "status": record.status,
        "background": record.background,
        "previous_response_id": record.previous_response_id,
        "conversation_id": record.conversation_id,
        "in_conversation": in_conversation or joins,
        "instance": instance,
        "num_bytes": num_bytes,
        "body": body,
    }
    row = {"owner": record.owner, "id": record.id, "chain_id": chain_id, **changing}
    upsert(connection, responses, row, update=changing)
    connection.execute(sa.delete(item_table).where(*_items_of(record.id, record.owner)))
    items.insert(connection, rows)
    _grow(connection, record.owner, chain_id, num_bytes - (0 if old is None else old.num_bytes))
    if joins and record.conversation_id is not None:
        conversations.join(connection, record.conversation_id, record.owner, [*record.input, *record.output], now=now)


def get(connection: sa.Connection, name: str, owner: str) -> ResponseRecord:
    """One response."""
    found = _load(connection, owner, lambda column: column == name)
    if name not in found:
        raise items.not_found("response", name)
    return found[name]


def delete(connection: sa.Connection, name: str, owner: str) -> None:
    """Delete a response with its items and events; what it put into a conversation stays there."""
    chain_id = _lock(connection, name, owner)
    connection.execute(sa.delete(responses).where(*_is(name, owner)))
    left = sa.select(responses.c.id).where(responses.c.owner == owner, responses.c.chain_id == chain_id)
    connection.execute(
        sa.delete(chains).where(chains.c.owner == owner, chains.c.id == chain_id, ~sa.exists(left.correlate(None)))
    )
    connection.execute(
        sa.update(chains)
        .where(chains.c.owner == owner, chains.c.id == chain_id)
        .values(num_bytes=_size(owner, chain_id))
    )


def history(connection: sa.Connection, name: str, owner: str) -> list[ResponseRecord]:
    """A response and all that came before it, the oldest first. UsageError where that is too much."""
    back = (
        sa.select(responses.c.id, responses.c.previous_response_id).where(*_is(name, owner)).cte("back", recursive=True)
    )
    # UNION, unlike UNION ALL, ends in a circle too.
    back = back.union(
        sa.select(responses.c.id, responses.c.previous_response_id).where(
            responses.c.owner == owner, responses.c.id == back.c.previous_response_id
        )
    )
    sizes = sa.select(sa.func.sum(responses.c.num_bytes))
    held = connection.scalar(sizes.where(responses.c.owner == owner, responses.c.id.in_(sa.select(back.c.id))))
    items.check_size("response", name, int(held or 0))
    found = _load(connection, owner, lambda column: column.in_(sa.select(back.c.id)))
    if name not in found:
        raise items.not_found("response", name)
    chain = [found.pop(name)]
    while (previous := chain[-1].previous_response_id) is not None:
        if previous in found:
            chain.append(found.pop(previous))
        elif previous in {record.id for record in chain}:
            raise StoreError(f"the responses before {name!r} go in a circle; delete {previous!r}")
        else:
            raise NotFoundError(
                f"there is no response {previous!r}, which {chain[-1].id!r} comes after: it has been deleted; "
                "send its messages as input instead"
            )
    return chain[::-1]


def input_items(connection: sa.Connection, name: str, owner: str, *, after: str | None, limit: int, order: str) -> Page:
    """A page of a response's own input."""
    _require(connection, name, owner)
    where = (*_items_of(name, owner), ~item_table.c.is_output)
    return items.page(connection, owner, *where, after=after, limit=limit, order=order)


def append_events(connection: sa.Connection, name: str, owner: str, new: Iterable[tuple[int, str]]) -> None:
    """Keep events of a response's stream; a number that is there already keeps the event it has."""
    chain_id = _lock(connection, name, owner)
    bodies = {number: text.storable_json(event) for number, event in new}
    if not bodies:
        return
    query = sa.select(events.c.sequence_number).where(
        *_events_of(name, owner), events.c.sequence_number.between(min(bodies), max(bodies))
    )
    there = set(connection.scalars(query))
    rows: list[dict[str, Any]] = [
        {"owner": owner, "response_id": name, "sequence_number": number, "num_bytes": items.size(body), "body": body}
        for number, body in bodies.items()
        if number not in there
    ]
    if rows:
        connection.execute(sa.insert(events), rows)
        _grow(connection, owner, chain_id, sum(row["num_bytes"] for row in rows))


def get_events(connection: sa.Connection, name: str, owner: str, *, after: int) -> list[tuple[int, str]]:
    """The events with higher numbers than `after`, in order."""
    _require(connection, name, owner)
    query = sa.select(events.c.sequence_number, events.c.body).where(
        *_events_of(name, owner), events.c.sequence_number > after
    )
    return [(row.sequence_number, row.body) for row in connection.execute(query.order_by(events.c.sequence_number))]


def last_event(connection: sa.Connection, name: str, owner: str) -> int | None:
    """The highest number of an event, or None where none was kept."""
    last: int | None = connection.scalar(
        sa.select(sa.func.max(events.c.sequence_number)).where(*_events_of(name, owner))
    )
    return last


def unfinished(connection: sa.Connection, instance: str) -> Sequence[tuple[str, str]]:
    """Ids and owners of the responses that a store of this name works on, or did."""
    query = sa.select(responses.c.id, responses.c.owner).where(responses.c.instance == instance)
    return [(row.id, row.owner) for row in connection.execute(query.order_by(responses.c.created_at))]


def instances(connection: sa.Connection) -> Sequence[str]:
    """Whoever works on responses, or did."""
    return connection.scalars(sa.select(responses.c.instance).where(responses.c.instance.is_not(None)).distinct()).all()


def _chain_of(connection: sa.Connection, record: ResponseRecord) -> str:
    for name in (record.id, record.previous_response_id):
        found = connection.scalar(sa.select(responses.c.chain_id).where(*_is(name or "", record.owner)))
        if found is not None:
            return str(found)
    return record.id


def _lock(connection: sa.Connection, name: str, owner: str) -> str:
    """The chain of a response, which nobody else writes to until the transaction ends."""
    query = (
        sa.select(chains.c.id)
        .join(responses, sa.and_(responses.c.owner == chains.c.owner, responses.c.chain_id == chains.c.id))
        .where(*_is(name, owner))
        .with_for_update(of=chains)
    )
    chain_id = connection.scalar(query)
    if chain_id is None:
        raise items.not_found("response", name)
    return str(chain_id)


def _require(connection: sa.Connection, name: str, owner: str) -> None:
    if connection.scalar(sa.select(responses.c.id).where(*_is(name, owner))) is None:
        raise items.not_found("response", name)


def _load(
    connection: sa.Connection, owner: str, which: Callable[[sa.Column[Any]], sa.ColumnElement[bool]]
) -> dict[str, ResponseRecord]:
    rows = connection.execute(sa.select(responses).where(responses.c.owner == owner, which(responses.c.id))).all()
    inside = connection.execute(
        sa.select(item_table.c.response_id, item_table.c.is_output, item_table.c.body)
        .where(item_table.c.owner == owner, which(item_table.c.response_id))
        .order_by(item_table.c.number)
    )
    held: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for row in inside:
        held[row.response_id, row.is_output].append(text.load(row.body))
    found = {}
    for row in rows:
        response = text.load(row.body)
        if output := held[row.id, True]:
            response["output"] = output
        found[row.id] = ResponseRecord(
            id=row.id,
            owner=row.owner,
            created_at=row.created_at,
            status=row.status,
            background=row.background,
            previous_response_id=row.previous_response_id,
            conversation_id=row.conversation_id,
            response=response,
            input=tuple(held[row.id, False]),
        )
    return found


def _grow(connection: sa.Connection, owner: str, chain_id: str, num_bytes: int) -> None:
    connection.execute(
        sa.update(chains)
        .where(chains.c.owner == owner, chains.c.id == chain_id)
        .values(num_bytes=chains.c.num_bytes + num_bytes)
    )


def _size(owner: str, chain_id: str) -> sa.ScalarSelect[Any]:
    """Of a chain, counted anew."""
    inside = (responses.c.owner == owner, responses.c.chain_id == chain_id)
    of_responses = sa.select(sa.func.coalesce(sa.func.sum(responses.c.num_bytes), 0)).where(*inside).scalar_subquery()
    of_events = (
        sa.select(sa.func.coalesce(sa.func.sum(events.c.num_bytes), 0))
        .join(responses, sa.and_(responses.c.owner == events.c.owner, responses.c.id == events.c.response_id))
        .where(*inside)
        .scalar_subquery()
    )
    return sa.select(sa.cast(of_responses + of_events, sa.BigInteger)).scalar_subquery()


def _is(name: str, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return responses.c.owner == owner, responses.c.id == name


def _items_of(name: str, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return item_table.c.owner == owner, item_table.c.response_id == name


def _events_of(name: str, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return events.c.owner == owner, events.c.response_id == name
