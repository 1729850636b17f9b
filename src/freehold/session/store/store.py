"""The store of a server: what it made, for whom, and who may ask. Synchronous, and safe on any number of threads.

Every method takes the owner, and answers for an id of another owner as for one that never was. What a method has
written is on the disk when it returns, whole; a method that raised has written nothing. `freehold.errors` says what
happened: NotFoundError, UsageError for what cannot be stored, DiskError and DiskSpaceError, StoreError for a database
that is busy, damaged, newer or out of reach. The store is of use again as soon as the cause is gone.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from freehold.session.store import conversations, files, items, keys, responses, retention, text, tuning
from freehold.session.store.database import Database
from freehold.session.store.leases import leases_of
from freehold.session.store.records import (
    ConversationRecord,
    FileRecord,
    JobRecord,
    KeyRecord,
    Listed,
    ModelRecord,
    Page,
    ResponseRecord,
)

_STOPPED = {
    "code": "server_error",
    "message": "the server stopped while this response was being made; send it again",
}


class Store:
    """Made by `Store.open`; close it, or use it in a `with` block."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._leases = leases_of(database)

    @classmethod
    def open(
        cls, url: str | None = None, *, patience_seconds: float = 30.0, clock: Callable[[], float] = time.time
    ) -> Self:
        """The store at an URL: `sqlite:////folder/file.db` or `postgresql://user@host/name`. Made if it is not there.

        Default: `freehold.db` in the data directory. `patience_seconds` bounds the wait for a database that is busy.
        Raises UsageError, StoreError, DiskError, and BackendError where PostgreSQL's driver is missing.
        """
        return cls(Database(url, patience_seconds=patience_seconds), clock)

    @property
    def name(self) -> str:
        """Where it is: a path, or an URL without its password."""
        return self._database.name

    def close(self) -> None:
        """Let go of the database. Responses that this store worked on count as abandoned from now on."""
        self._leases.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- responses --------------------------------------------------------------------------------------------------

    def put_response(self, record: ResponseRecord, events: Iterable[tuple[int, str]] = ()) -> None:
        """Insert or replace a response with its items, and append `events` of its stream, in one step.

        A response that completed, or ended early, adds its items to its conversation the first time that it is put so.
        While it is not finished it belongs to this store, and counts as abandoned when this store is no more.
        """
        instance = None if record.finished else self._leases.hold()
        with self._database.writing() as connection:
            responses.put(connection, record, instance=instance, now=self._clock())
            responses.append_events(connection, record.id, record.owner, events)

    def response(self, response_id: str, owner: str) -> ResponseRecord:
        """One response."""
        with self._database.reading() as connection:
            return responses.get(connection, response_id, owner)

    def delete_response(self, response_id: str, owner: str) -> None:
        """Delete a response with its items and events; what it added to a conversation stays there."""
        with self._database.writing() as connection:
            responses.delete(connection, response_id, owner)

    def history(self, response_id: str, owner: str) -> list[ResponseRecord]:
        """A response and all those before it, the oldest first. NotFoundError names the one that is missing."""
        with self._database.reading() as connection:
            return responses.history(connection, response_id, owner)

    def input_items(
        self, response_id: str, owner: str, *, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> Page:
        """Some of a response's own input items; `desc` has the last one first."""
        with self._database.reading() as connection:
            return responses.input_items(connection, response_id, owner, after=after, limit=limit, order=order)

    def item(self, item_id: str, owner: str) -> dict[str, Any]:
        """An item of any response or conversation; as it was written last, where it lies in several."""
        with self._database.reading() as connection:
            return dict(text.load(items.find(connection, owner, item_id).body))

    def append_events(self, response_id: str, owner: str, events: Iterable[tuple[int, str]]) -> None:
        """Keep events of a stream, each with its sequence number. Sending the same ones again changes nothing."""
        with self._database.writing() as connection:
            responses.append_events(connection, response_id, owner, events)

    def events(self, response_id: str, owner: str, after: int = -1) -> list[tuple[int, str]]:
        """The events that were kept with higher sequence numbers than `after`, in order."""
        with self._database.reading() as connection:
            return responses.get_events(connection, response_id, owner, after=after)

    # --- conversations ----------------------------------------------------------------------------------------------

    def create_conversation(self, record: ConversationRecord, items: Sequence[Mapping[str, Any]] = ()) -> None:
        """A new conversation that begins with these items."""
        with self._database.writing() as connection:
            conversations.create(connection, record, items, now=self._clock())

    def conversation(self, conversation_id: str, owner: str) -> ConversationRecord:
        """A conversation without its items."""
        with self._database.reading() as connection:
            return conversations.get(connection, conversation_id, owner)

    def update_conversation(self, conversation_id: str, owner: str, metadata: dict[str, str]) -> ConversationRecord:
        """Replace its metadata; returns it as it is now."""
        with self._database.writing() as connection:
            conversations.update(connection, conversation_id, owner, metadata, now=self._clock())
            return conversations.get(connection, conversation_id, owner)

    def delete_conversation(self, conversation_id: str, owner: str) -> None:
        """Delete a conversation and its items; responses that were made in it stay."""
        with self._database.writing() as connection:
            conversations.delete(connection, conversation_id, owner)

    def add_conversation_items(self, conversation_id: str, owner: str, items: Sequence[Mapping[str, Any]]) -> None:
        """Add items at its end. UsageError for an item that it has already."""
        with self._database.writing() as connection:
            conversations.add(connection, conversation_id, owner, items, now=self._clock())

    def conversation_items(
        self, conversation_id: str, owner: str, *, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> Page:
        """Some of its items; `desc` has the last one first."""
        with self._database.reading() as connection:
            return conversations.page(connection, conversation_id, owner, after=after, limit=limit, order=order)

    def conversation_history(self, conversation_id: str, owner: str) -> tuple[dict[str, Any], ...]:
        """All of its items, the oldest first."""
        with self._database.reading() as connection:
            return conversations.history(connection, conversation_id, owner)

    def conversation_item(self, conversation_id: str, item_id: str, owner: str) -> dict[str, Any]:
        """One of its items."""
        with self._database.reading() as connection:
            return conversations.item(connection, conversation_id, item_id, owner)

    def delete_conversation_item(self, conversation_id: str, item_id: str, owner: str) -> None:
        """Take one of its items out of it."""
        with self._database.writing() as connection:
            conversations.delete_item(connection, conversation_id, item_id, owner, now=self._clock())

    # --- keys -------------------------------------------------------------------------------------------------------

    def create_key(
        self, name: str | None = None, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
    ) -> tuple[KeyRecord, str]:
        """A new API key, and its secret, which cannot be had again."""
        with self._database.writing() as connection:
            return keys.create(
                connection,
                name,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                now=self._clock(),
            )

    def keys(self) -> list[KeyRecord]:
        """All keys, revoked ones too, the oldest first."""
        with self._database.reading() as connection:
            return keys.all_keys(connection)

    def revoke_key(self, id_or_name: str) -> KeyRecord:
        """End a key; NotFoundError where no active key is called that."""
        with self._database.writing() as connection:
            return keys.revoke(connection, id_or_name, now=self._clock())

    def keys_by_hash(self) -> Mapping[bytes, KeyRecord]:
        """Every key by `keys.hash_secret` of its secret; revoked ones too, which say that this store is not open."""
        with self._database.reading() as connection:
            return keys.by_hash(connection)

    # --- files ------------------------------------------------------------------------------------------------------

    def add_file(self, record: FileRecord, *, most_bytes: int) -> None:
        """Know a file, whose bytes are on the disk already. UsageError where its owner's would be more than so many."""
        with self._database.writing() as connection:
            files.add(connection, record, most_bytes=most_bytes)

    def file_bytes(self, owner: str, place: str) -> int:
        """Of all files of an owner together."""
        with self._database.reading() as connection:
            return files.num_bytes(connection, owner, place)

    def file(self, file_id: str, owner: str, place: str) -> FileRecord:
        """One file."""
        with self._database.reading() as connection:
            return files.get(connection, file_id, owner, place, now=self._clock())

    def files(
        self,
        owner: str,
        place: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
    ) -> Listed[FileRecord]:
        """Some of an owner's files; `desc` has the newest first."""
        with self._database.reading() as connection:
            return files.page(
                connection, owner, place, purpose=purpose, after=after, limit=limit, order=order, now=self._clock()
            )

    def delete_file(self, file_id: str, owner: str, place: str, *, remove: Callable[[], object]) -> None:
        """Forget a file. `remove` takes its bytes away, before it is forgotten: what was deleted is never left behind,
        and where that goes wrong it can be deleted again. UsageError for a file that an unfinished job reads."""
        with self._database.writing() as connection:
            files.delete(connection, file_id, owner, place, now=self._clock())
            remove()

    def expire_files(self, place: str, *, remove: Callable[[FileRecord], object]) -> int:
        """Forget the files whose time is over; returns how many went."""
        count = 0
        while True:
            with self._database.writing() as connection:
                going = files.expired(connection, place, now=self._clock())
                for record in going:
                    remove(record)
                    files.forget(connection, record)
            if not going:
                return count
            count += len(going)

    def file_ids(self, place: str) -> frozenset[str]:
        """Of all files in a place, whoever's they are."""
        with self._database.reading() as connection:
            return files.ids(connection, place)

    def job_ids(self, place: str) -> frozenset[str]:
        """Of all fine-tuning jobs in a place, whoever's they are."""
        with self._database.reading() as connection:
            return tuning.ids(connection, place)

    # --- fine-tuning ------------------------------------------------------------------------------------------------

    def create_job(self, record: JobRecord, events: Iterable[Mapping[str, Any]] = (), *, most_unfinished: int) -> None:
        """A new job. NotFoundError for a file that is not there, UsageError where so many of its owner's wait."""
        with self._database.writing() as connection:
            tuning.create(connection, record, events, most_unfinished=most_unfinished, now=self._clock())

    def job(self, job_id: str, owner: str, place: str) -> JobRecord:
        """One job."""
        with self._database.reading() as connection:
            return tuning.get(connection, job_id, owner, place)

    def update_job(
        self,
        record: JobRecord,
        change: Callable[[JobRecord], JobRecord] = lambda job: job,
        *,
        events: Iterable[Mapping[str, Any]] = (),
        models: Iterable[ModelRecord] = (),
    ) -> JobRecord:
        """What `change` makes of a job as it is now, what it has told meanwhile, and what came of it, in one step."""
        with self._database.writing() as connection:
            new = tuning.update(connection, record.id, record.owner, record.place, change, events)
            tuning.add_models(connection, models)
            return new

    def jobs(
        self,
        owner: str,
        place: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Listed[JobRecord]:
        """Some of an owner's jobs, the newest first."""
        with self._database.reading() as connection:
            return tuning.page(connection, owner, place, after=after, limit=limit, metadata=metadata)

    def next_job(self, place: str) -> JobRecord | None:
        """The one of all owners' that is to be done now."""
        with self._database.reading() as connection:
            return tuning.next_in(connection, place)

    def job_events(
        self, job_id: str, owner: str, place: str, *, before: int | None = None, limit: int = 20
    ) -> Listed[tuple[int, dict[str, Any]]]:
        """Some of what a job told, with numbers, the newest first."""
        with self._database.reading() as connection:
            return tuning.events(connection, job_id, owner, place, before=before, limit=limit)

    def models(self, place: str, *, owner: str | None = None, job_id: str | None = None) -> Sequence[ModelRecord]:
        """The models of a place, all of them or an owner's, and a job's; checkpoints too."""
        with self._database.reading() as connection:
            return tuning.models(connection, place, owner=owner, job_id=job_id)

    def delete_model(self, name: str, owner: str, place: str, *, remove: Callable[[ModelRecord], object]) -> None:
        """Forget a model. `remove` takes its files away first, as for `delete_file`."""
        with self._database.writing() as connection:
            remove(tuning.delete_model(connection, name, owner, place))

    def forget_jobs(self, place: str, *, before: float, remove: Callable[[JobRecord], object]) -> int:
        """Forget jobs that ended before a moment and whose model is not there; returns how many went."""
        count = 0
        while True:
            with self._database.writing() as connection:
                going = tuning.forgettable(connection, place, before=before)
                for record in going:
                    remove(record)
                    tuning.forget(connection, record)
            if not going:
                return count
            count += len(going)

    # --- housekeeping -----------------------------------------------------------------------------------------------

    def recover(self) -> list[str]:
        """Mark what stores that are no more left unfinished as failed; returns the ids.

        Where events were kept, `response.failed` becomes the last. What a store that still lives works on, in this
        process or another, is left to it.
        """
        with self._database.reading() as connection:
            instances = responses.instances(connection)
        recovered = []
        for instance in instances:
            with self._database.writing() as connection:
                if self._leases.ended(connection, instance):
                    for response_id, owner in responses.unfinished(connection, instance):
                        self._fail(connection, response_id, owner)
                        recovered.append(response_id)
        self._leases.tidy()
        return recovered

    def sweep(
        self, *, max_age_seconds: float | None = None, max_bytes: int | None = None, now: float | None = None
    ) -> int:
        """Forget responses and conversations by their last use: those older than an age, then the oldest until what is
        left takes no more than `max_bytes`. Returns how many went.

        Responses that continue one another go together, and none goes while one of them is being made.
        """
        now = self._clock() if now is None else now
        return retention.sweep(self._database, max_age_seconds=max_age_seconds, max_bytes=max_bytes, now=now)

    def _fail(self, connection: Any, response_id: str, owner: str) -> None:
        record = responses.get(connection, response_id, owner)
        failed = {**record.response, "status": "failed", "error": dict(_STOPPED)}
        record = replace(record, status="failed", response=failed)
        responses.put(connection, record, instance=None, now=self._clock())
        if (last := responses.last_event(connection, response_id, owner)) is not None:
            event = {"type": "response.failed", "sequence_number": last + 1, "response": failed}
            responses.append_events(connection, response_id, owner, [(last + 1, text.dump(event))])
