"""What is known of uploaded files, within a transaction of the caller. Their bytes lie elsewhere, in their place.

A file whose time is over is not there any more, whether or not somebody has swept it away already.
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from freehold.errors import UsageError
from freehold.session.store.items import not_found
from freehold.session.store.records import UNFINISHED_JOBS, FileRecord, Listed
from freehold.session.store.schema import files, tuning_jobs


def add(connection: sa.Connection, record: FileRecord, *, most_bytes: int) -> None:
    """A new file. UsageError where its owner's files would have more than `most_bytes` together."""
    there = num_bytes(connection, record.owner, record.place)
    if there + record.num_bytes > most_bytes:
        raise UsageError(
            f"your files have {there:,} bytes, and with this one's {record.num_bytes:,} they would have more than "
            f"{most_bytes:,}; delete some"
        )
    connection.execute(
        sa.insert(files).values({name: getattr(record, name) for name in FileRecord.__dataclass_fields__})
    )


def num_bytes(connection: sa.Connection, owner: str, place: str) -> int:
    """Of all files of an owner together."""
    held = sa.select(sa.func.coalesce(sa.func.sum(files.c.num_bytes), 0))
    return int(connection.scalar(held.where(files.c.owner == owner, files.c.place == place)) or 0)


def get(connection: sa.Connection, file_id: str, owner: str, place: str, *, now: float) -> FileRecord:
    row = connection.execute(sa.select(files).where(*_there(owner, place, now), files.c.id == file_id)).first()
    if row is None:
        raise not_found("file", file_id)
    return _record(row)


def page(
    connection: sa.Connection,
    owner: str,
    place: str,
    *,
    purpose: str | None,
    after: str | None,
    limit: int,
    order: str,
    now: float,
) -> Listed[FileRecord]:
    query = sa.select(files).where(*_there(owner, place, now))
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    if after is not None:
        get(connection, after, owner, place, now=now)
        number = sa.select(files.c.number).where(files.c.owner == owner, files.c.id == after).scalar_subquery()
        query = query.where(files.c.number > number if order == "asc" else files.c.number < number)
    query = query.order_by(files.c.number if order == "asc" else files.c.number.desc()).limit(limit + 1)
    rows = connection.execute(query).all()
    return Listed(items=tuple(map(_record, rows[:limit])), has_more=len(rows) > limit)


def delete(connection: sa.Connection, file_id: str, owner: str, place: str, *, now: float) -> None:
    """UsageError for a file that a job is going to read."""
    get(connection, file_id, owner, place, now=now)
    if (job := connection.scalar(sa.select(tuning_jobs.c.id).where(*_reads(owner, file_id)).limit(1))) is not None:
        raise UsageError(f"the fine-tuning job {job} reads {file_id}; cancel it first, or wait for its end")
    connection.execute(sa.delete(files).where(files.c.owner == owner, files.c.id == file_id))


def expired(connection: sa.Connection, place: str, *, now: float) -> Sequence[FileRecord]:
    """Those whose time is over and that no job is going to read."""
    query = sa.select(files).where(files.c.place == place, files.c.expires_at <= now)
    read = sa.exists().where(*_reads(files.c.owner, files.c.id)).correlate(files)
    return [_record(row) for row in connection.execute(query.where(~read).limit(100))]


def forget(connection: sa.Connection, record: FileRecord) -> None:
    connection.execute(sa.delete(files).where(files.c.owner == record.owner, files.c.id == record.id))


def ids(connection: sa.Connection, place: str) -> frozenset[str]:
    """Of all files that lie there, whoever's."""
    return frozenset(connection.scalars(sa.select(files.c.id).where(files.c.place == place)))


def _reads(owner: Any, file_id: Any) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        tuning_jobs.c.owner == owner,
        sa.or_(tuning_jobs.c.training_file == file_id, tuning_jobs.c.validation_file == file_id),
        tuning_jobs.c.status.in_(UNFINISHED_JOBS),
    )


def _there(owner: str, place: str, now: float) -> tuple[sa.ColumnElement[bool], ...]:
    alive = sa.or_(files.c.expires_at.is_(None), files.c.expires_at > now)
    return files.c.owner == owner, files.c.place == place, alive


def _record(row: sa.Row[Any]) -> FileRecord:
    return FileRecord(**{name: getattr(row, name) for name in FileRecord.__dataclass_fields__})
