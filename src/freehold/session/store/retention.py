"""Forgetting: what has not been used for long, and what was used longest ago where there is too much.

Chains of responses and conversations go as a whole, by their last use, so that nothing that goes on loses its
beginning. A chain with a response that is being made stays.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import sqlalchemy as sa

from freehold.session.store.database import Database
from freehold.session.store.records import UNFINISHED
from freehold.session.store.schema import chains, conversations, responses

_BATCH = 100  # holders in a transaction: others write in between


def sweep(database: Database, *, max_age_seconds: float | None, max_bytes: int | None, now: float) -> int:
    """Forget what is too old or too much; returns how many responses and conversations went."""
    removed = 0
    if max_age_seconds is not None:
        for table in (chains, conversations):
            while count := _forget_before(database, table, now - max_age_seconds):
                removed += count
    if max_bytes is not None:
        while count := _shrink(database, max_bytes):
            removed += count
    if removed:
        database.give_back()
    return removed


def _forget_before(database: Database, table: sa.Table, used_at: float) -> int:
    with database.writing() as connection:
        return _forget(connection, table, _oldest(connection, table, table.c.used_at < used_at))


def _shrink(database: Database, max_bytes: int) -> int:
    with database.writing() as connection:
        held = [sa.select(sa.func.coalesce(sa.func.sum(table.c.num_bytes), 0)) for table in (chains, conversations)]
        excess = sum(int(connection.scalar(query) or 0) for query in held) - max_bytes
        candidates = {table: _oldest(connection, table) for table in (chains, conversations)}
        going: dict[sa.Table, list[sa.Row[Any]]] = {table: [] for table in candidates}
        in_order = sorted(
            chain.from_iterable(((row.used_at, table, row) for row in rows) for table, rows in candidates.items()),
            key=lambda candidate: candidate[0],
        )
        for _, table, row in in_order[:_BATCH]:  # beyond that the other table may have older ones
            if excess <= 0:
                break
            going[table].append(row)
            excess -= row.num_bytes
        return sum(_forget(connection, table, rows) for table, rows in going.items())


def _oldest(connection: sa.Connection, table: sa.Table, *where: sa.ColumnElement[bool]) -> list[sa.Row[Any]]:
    query = sa.select(table.c.owner, table.c.id, table.c.used_at, table.c.num_bytes).where(*where)
    if table is chains:
        in_it = (responses.c.owner == chains.c.owner, responses.c.chain_id == chains.c.id)
        query = query.where(~sa.exists().where(*in_it, responses.c.status.in_(UNFINISHED)))
    # What somebody is writing to has just been used.
    return list(
        connection.execute(query.order_by(table.c.used_at).limit(_BATCH).with_for_update(of=table, skip_locked=True))
    )


def _forget(connection: sa.Connection, table: sa.Table, rows: Iterable[sa.Row[Any]]) -> int:
    removed = 0
    for row in rows:
        if table is chains:
            inside = (responses.c.owner == row.owner, responses.c.chain_id == row.id)
            removed += connection.scalar(sa.select(sa.func.count()).select_from(responses).where(*inside)) or 0
        else:
            removed += 1
        connection.execute(sa.delete(table).where(table.c.owner == row.owner, table.c.id == row.id))
    return removed
