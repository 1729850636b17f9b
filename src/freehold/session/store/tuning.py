"""Fine-tuning jobs, what they told, and the models that came of them, within a transaction of the caller.

A job's body is its object on the wire; `status` and the files that it reads stand beside it, so that they can be looked
for. A model's row says whose it is and where its adapter lies, from the place's folder on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from freehold.errors import UsageError
from freehold.session.store import files, text
from freehold.session.store.items import not_found
from freehold.session.store.records import UNFINISHED_JOBS, JobRecord, Listed, ModelRecord
from freehold.session.store.schema import tuned_models, tuning_events, tuning_jobs

_QUEUED = "queued"


def create(
    connection: sa.Connection,
    record: JobRecord,
    events: Iterable[Mapping[str, Any]],
    *,
    most_unfinished: int,
    now: float,
) -> None:
    """A new job, whose files have to be there. UsageError where its owner has so many waiting already."""
    for name in record.reads:
        files.get(connection, name, record.owner, record.place, now=now)
    waiting = sa.select(sa.func.count()).where(
        tuning_jobs.c.owner == record.owner,
        tuning_jobs.c.place == record.place,
        tuning_jobs.c.status.in_(UNFINISHED_JOBS),
    )
    if (count := connection.scalar(waiting) or 0) >= most_unfinished:
        raise UsageError(f"{count} fine-tuning jobs of yours wait or run already; wait for one of them, or cancel it")
    connection.execute(sa.insert(tuning_jobs).values(_row(record)))
    add_events(connection, record, events)


def get(connection: sa.Connection, job_id: str, owner: str, place: str) -> JobRecord:
    row = connection.execute(sa.select(tuning_jobs).where(*_is(job_id, owner), tuning_jobs.c.place == place)).first()
    if row is None:
        raise not_found("fine-tuning job", job_id)
    return _record(row)


def ids(connection: sa.Connection, place: str) -> frozenset[str]:
    """Of all jobs whose runs lie there, whoever's."""
    return frozenset(connection.scalars(sa.select(tuning_jobs.c.id).where(tuning_jobs.c.place == place)))


def update(
    connection: sa.Connection,
    job_id: str,
    owner: str,
    place: str,
    change: Callable[[JobRecord], JobRecord],
    events: Iterable[Mapping[str, Any]],
) -> JobRecord:
    """What `change` makes of a job, and what it told meanwhile, in one step."""
    locked = sa.select(tuning_jobs.c.id).where(*_is(job_id, owner)).with_for_update()
    connection.execute(locked)
    old = get(connection, job_id, owner, place)
    new = change(old)
    if new != old:
        connection.execute(sa.update(tuning_jobs).where(*_is(job_id, owner)).values(_row(new)))
    add_events(connection, new, events)
    return new


def page(
    connection: sa.Connection,
    owner: str,
    place: str,
    *,
    after: str | None,
    limit: int,
    metadata: Mapping[str, str] | None,
) -> Listed[JobRecord]:
    """The newest first. With `metadata`, those whose own has all of it."""
    query = sa.select(tuning_jobs).where(tuning_jobs.c.owner == owner, tuning_jobs.c.place == place)
    if after is not None:
        get(connection, after, owner, place)
        query = query.where(
            tuning_jobs.c.number < sa.select(tuning_jobs.c.number).where(*_is(after, owner)).scalar_subquery()
        )
    found: list[JobRecord] = []
    for row in connection.execute(query.order_by(tuning_jobs.c.number.desc())):
        record = _record(row)
        theirs = record.job.get("metadata") or {}
        if metadata is None or metadata.items() <= theirs.items():
            found.append(record)
        if len(found) > limit:
            break
    return Listed(items=tuple(found[:limit]), has_more=len(found) > limit)


def next_in(connection: sa.Connection, place: str) -> JobRecord | None:
    """The job to be done now: one that had begun before those that wait; then the oldest of the owner whose last one
    ended longest ago, so that many jobs of one do not keep all others waiting."""
    query = sa.select(tuning_jobs).where(tuning_jobs.c.place == place, tuning_jobs.c.status.in_(UNFINISHED_JOBS))
    waits = sa.case((tuning_jobs.c.status == _QUEUED, 1), else_=0)
    others = tuning_jobs.alias()
    last_ended = sa.select(sa.func.coalesce(sa.func.max(others.c.finished_at), 0.0)).where(
        others.c.place == place, others.c.owner == tuning_jobs.c.owner
    )
    row = connection.execute(query.order_by(waits, last_ended.scalar_subquery(), tuning_jobs.c.number).limit(1)).first()
    return None if row is None else _record(row)


def add_events(connection: sa.Connection, record: JobRecord, events: Iterable[Mapping[str, Any]]) -> None:
    """Each gets the next number, and its id from that."""
    last = sa.select(sa.func.max(tuning_events.c.number)).where(*_of(record.id, record.owner))
    number = connection.scalar(last) or 0
    rows = [
        {"owner": record.owner, "job_id": record.id, "number": at, "body": text.dump(event)}
        for at, event in enumerate(events, start=number + 1)
    ]
    if rows:
        connection.execute(sa.insert(tuning_events), rows)


def events(
    connection: sa.Connection, job_id: str, owner: str, place: str, *, before: int | None, limit: int
) -> Listed[tuple[int, dict[str, Any]]]:
    """With their numbers, the newest first."""
    get(connection, job_id, owner, place)
    query = sa.select(tuning_events.c.number, tuning_events.c.body).where(*_of(job_id, owner))
    if before is not None:
        query = query.where(tuning_events.c.number < before)
    rows = connection.execute(query.order_by(tuning_events.c.number.desc()).limit(limit + 1)).all()
    found = tuple((row.number, text.load(row.body)) for row in rows[:limit])
    return Listed(items=found, has_more=len(rows) > limit)


# --- models -------------------------------------------------------------------------------------------------------


def add_models(connection: sa.Connection, records: Iterable[ModelRecord]) -> None:
    """Those that are there already stay as they are."""
    for record in records:
        there = sa.select(tuned_models.c.name).where(*_named(record.name, record.place))
        if connection.scalar(there) is None:
            row = {name: getattr(record, name) for name in ModelRecord.__dataclass_fields__ if name != "model"}
            connection.execute(sa.insert(tuned_models).values(row | {"body": text.dump(record.model)}))


def models(
    connection: sa.Connection, place: str, *, owner: str | None = None, job_id: str | None = None
) -> Sequence[ModelRecord]:
    """Of a place; of one owner, of one job. The oldest first."""
    query = sa.select(tuned_models).where(tuned_models.c.place == place)
    if owner is not None:
        query = query.where(tuned_models.c.owner == owner)
    if job_id is not None:
        query = query.where(tuned_models.c.job_id == job_id)
    return [_model(row) for row in connection.execute(query.order_by(tuned_models.c.created_at, tuned_models.c.name))]


def delete_model(connection: sa.Connection, name: str, owner: str, place: str) -> ModelRecord:
    row = connection.execute(
        sa.select(tuned_models).where(*_named(name, place), tuned_models.c.owner == owner).with_for_update()
    ).first()
    if row is None:
        raise not_found("model", name)
    connection.execute(sa.delete(tuned_models).where(*_named(name, place)))
    return _model(row)


# --- forgetting ---------------------------------------------------------------------------------------------------


def forgettable(connection: sa.Connection, place: str, *, before: float) -> Sequence[JobRecord]:
    """Jobs that ended long ago and whose model is not there, or never was."""
    model = sa.exists().where(
        tuned_models.c.owner == tuning_jobs.c.owner,
        tuned_models.c.job_id == tuning_jobs.c.id,
        tuned_models.c.step.is_(None),
    )
    query = sa.select(tuning_jobs).where(
        tuning_jobs.c.place == place, tuning_jobs.c.finished_at < before, ~model.correlate(tuning_jobs)
    )
    return [_record(row) for row in connection.execute(query.limit(100))]


def forget(connection: sa.Connection, record: JobRecord) -> None:
    """With its events and checkpoints."""
    connection.execute(sa.delete(tuning_jobs).where(*_is(record.id, record.owner)))


def _row(record: JobRecord) -> dict[str, Any]:
    return {
        "owner": record.owner,
        "id": record.id,
        "place": record.place,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "status": record.status,
        "training_file": record.training_file,
        "validation_file": record.validation_file,
        "body": text.dump(record.job),
    }


def _record(row: sa.Row[Any]) -> JobRecord:
    return JobRecord(
        id=row.id,
        owner=row.owner,
        place=row.place,
        created_at=row.created_at,
        finished_at=row.finished_at,
        status=row.status,
        training_file=row.training_file,
        validation_file=row.validation_file,
        job=text.load(row.body),
    )


def _model(row: sa.Row[Any]) -> ModelRecord:
    return ModelRecord(
        name=row.name,
        place=row.place,
        owner=row.owner,
        job_id=row.job_id,
        step=row.step,
        created_at=row.created_at,
        model=text.load(row.body),
    )


def _is(job_id: str, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return tuning_jobs.c.owner == owner, tuning_jobs.c.id == job_id


def _of(job_id: str, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return tuning_events.c.owner == owner, tuning_events.c.job_id == job_id


def _named(name: str, place: str) -> tuple[sa.ColumnElement[bool], ...]:
    return tuned_models.c.place == place, tuned_models.c.name == name
