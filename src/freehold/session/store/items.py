"""Items, wherever they lie: as rows to be written, by the page, and by their ids."""

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from freehold.errors import NotFoundError, UsageError
from freehold.session.store import text
from freehold.session.store.records import Page
from freehold.session.store.schema import items as item_table

MOST_BYTES = 64 << 20
"""Of what is read at once: no model has a context for more, and a client may have stored any amount of it."""

_ROW_BYTES = 200  # about what a row and its places in indices take besides its text


def size(body: str) -> int:
    """Bytes that a row with this text takes, roughly."""
    return len(body.encode("utf-8")) + _ROW_BYTES


def rows(
    owner: str,
    given: Iterable[Mapping[str, Any]],
    *,
    response_id: str | None = None,
    is_output: bool = False,
    conversation_id: str | None = None,
) -> list[dict[str, Any]]:
    """The rows of items that are to lie in one place."""
    place = {"owner": owner, "response_id": response_id, "is_output": is_output, "conversation_id": conversation_id}
    bodies = [(item["id"], text.dump(item)) for item in given]
    return [{**place, "id": name, "num_bytes": size(body), "body": body} for name, body in bodies]


def insert(connection: sa.Connection, new: list[dict[str, Any]]) -> int:
    """Write rows, in this order; returns the bytes they take."""
    if new:
        connection.execute(sa.insert(item_table), new)
    return sum(row["num_bytes"] for row in new)


def find(connection: sa.Connection, owner: str, item_id: str, *where: sa.ColumnElement[bool]) -> sa.Row[Any]:
    """The row of an item; the one that was written last, where it lies in several places."""
    found = connection.execute(
        sa.select(item_table)
        .where(item_table.c.owner == owner, item_table.c.id == item_id, *where)
        .order_by(item_table.c.number.desc())
        .limit(1)
    ).first()
    if found is None:
        raise not_found("item", item_id)
    return found


def page(
    connection: sa.Connection, owner: str, *where: sa.ColumnElement[bool], after: str | None, limit: int, order: str
) -> Page:
    """Up to `limit` items of one place, after the item with the id `after` if that is given; fewer where they are
    large, one at least."""
    if order not in ("asc", "desc"):
        raise UsageError(f"items cannot be had in the order {order!r}; give asc or desc")
    if limit < 1:
        raise UsageError(f"a page cannot have {limit} items; give 1 or more")
    query = sa.select(item_table.c.number, item_table.c.num_bytes).where(item_table.c.owner == owner, *where)
    if after is not None:
        last = find(connection, owner, after, *where).number
        query = query.where(item_table.c.number > last if order == "asc" else item_table.c.number < last)
    query = query.order_by(item_table.c.number if order == "asc" else item_table.c.number.desc()).limit(limit + 1)
    found = connection.execute(query).all()
    num_bytes, numbers = 0, list[int]()
    for row in found[:limit]:
        num_bytes += row.num_bytes
        if numbers and num_bytes > MOST_BYTES:
            break
        numbers.append(row.number)
    rows = connection.execute(
        sa.select(item_table.c.number, item_table.c.body).where(item_table.c.number.in_(numbers))
    ).all()
    bodies = {row.number: row.body for row in rows}
    return Page(items=tuple(text.load(bodies[at]) for at in numbers), has_more=len(found) > len(numbers))


def check_size(kind: str, name: str, num_bytes: int) -> None:
    """Raises UsageError for what is too large to be read at once."""
    if num_bytes > MOST_BYTES:
        raise UsageError(
            f"what was said up to the {kind} {name!r:.80} has {num_bytes:,} bytes, and {MOST_BYTES:,} are the most "
            "that can be gone on from; send what matters of it as input"
        )


def not_found(kind: str, name: str) -> NotFoundError:
    """The error for an id that is unknown, or another owner's: both read the same."""
    shown = name if len(name) <= 64 else f"{name[:64]}…"
    return NotFoundError(f"there is no {kind} {shown!r}; it was never stored here, or it has been deleted")
