"""The database behind a store: SQLite in one file, or PostgreSQL by URL; transactions on it, and its failures as typed
errors that name it and never what was in a statement.

What a `writing` block wrote is on the disk when the block has ended, or none of it is. A `reading` block sees one
moment of the database from beginning to end. Any thread may use either. After a failure the next block starts afresh.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, TimeoutError

from freehold import paths
from freehold.disk import exclusive
from freehold.errors import BackendError, DiskError, DiskSpaceError, FreeholdError, StoreError, UsageError
from freehold.session.store import migrate
from freehold.session.store.schema import metadata

_MIGRATING = 7233175204  # the advisory lock of those who look whether there is something to migrate
_SQLITE_PRAGMAS = {
    "auto_vacuum": "INCREMENTAL",  # first: it takes effect only while there are no pages
    "journal_mode": "WAL",
    "synchronous": "FULL",
    "foreign_keys": "ON",
    "secure_delete": "ON",  # what was deleted is not left lying in free pages
    "trusted_schema": "OFF",
}

_VACUUM_PAGES = 2000  # at a time


class Database:
    """One database, brought to the newest revision. `path` is its file, or None for PostgreSQL.

    Waits for others who write for at most `patience_seconds`.
    """

    def __init__(self, url: str | None, *, patience_seconds: float) -> None:
        parsed = _parse(url)
        self.path = (
            Path(parsed.database).absolute() if parsed.get_backend_name() == "sqlite" and parsed.database else None
        )
        self.name = str(self.path or parsed.render_as_string(hide_password=True).replace("+psycopg", "", 1))
        self._patience_seconds = patience_seconds
        self._one_writer = threading.Lock()  # SQLite has one; threads of this process wait in line, not by polling
        self._closed = False
        if self.path is None:
            self._start_postgresql(parsed)
        else:
            self._start_sqlite(self.path)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one moment and changes nothing."""
        with self.typed_errors(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is durable when the block has ended, and has not been when the block raised."""
        with self.typed_errors(), self._in_line(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def session(self) -> Iterator[sa.Connection]:
        """A connection outside of any transaction, for housekeeping."""
        options = {"isolation_level": "AUTOCOMMIT"} if self.path is None else {"freehold_begin": None}
        with self.typed_errors(), self._writer.connect().execution_options(**options) as connection:
            yield connection

    def give_back(self) -> None:
        """The space of what was deleted: to the file system with SQLite, to rows to come with PostgreSQL."""
        if self.path is None:
            with self.session() as connection:
                for table in metadata.sorted_tables:
                    connection.exec_driver_sql(f"VACUUM {table.name}")
            return
        free = -1
        while free != (free := self._vacuum_some()) and free:
            pass
        with self.session() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").all()

    def _vacuum_some(self) -> int:
        """Cut some free pages off; returns how many are left. Others write in between."""
        with self._in_line(), self.session() as connection:
            driver: Any = connection.connection.dbapi_connection
            driver.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")  # `execute` would stop after one page
            return int(connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0)

    def close(self) -> None:
        """Let go of all connections. Closing twice is as good as once."""
        self._closed = True
        self._writer.dispose()

    @contextmanager
    def _in_line(self) -> Iterator[None]:
        if self.path is None:
            yield
            return
        if not self._one_writer.acquire(timeout=self._patience_seconds):
            raise self._busy()
        try:
            yield
        finally:
            self._one_writer.release()

    def _start_sqlite(self, path: Path) -> None:
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)),
            connect_args={"timeout": self._patience_seconds},
            pool_timeout=self._patience_seconds,
            max_overflow=-1,
            hide_parameters=True,
        )

        @sa.event.listens_for(engine, "connect")
        def _prepare(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = None  # transactions begin where we say so
            for pragma, value in _SQLITE_PRAGMAS.items():
                connection.execute(f"PRAGMA {pragma}={value}")

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            if how := connection.get_execution_options()["freehold_begin"]:
                connection.exec_driver_sql(how)

        # A writer takes the write lock at once: one that reads first could not get it after somebody else has written.
        self._writer = engine.execution_options(freehold_begin="BEGIN IMMEDIATE")
        self._reader = engine.execution_options(freehold_begin="BEGIN")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{path.parent} cannot be made ({error.strerror}); name another store") from None
        with exclusive(path), self._closed_on_failure():
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            except OSError as error:
                raise DiskError(f"{path} cannot be opened ({error.strerror}); check its permissions") from None
            with self.writing() as connection:
                migrate.upgrade(connection, self.name)

    def _start_postgresql(self, url: sa.URL) -> None:
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise BackendError("PostgreSQL needs psycopg; run: pip install 'freehold[postgres]'") from None
        patience_ms = round(self._patience_seconds * 1000)
        engine = sa.create_engine(
            url,
            isolation_level="READ COMMITTED",
            connect_args={
                "connect_timeout": max(2, round(self._patience_seconds)),
                "options": f"{url.query.get('options', '')} -c lock_timeout={patience_ms}".strip(),
                "tcp_user_timeout": patience_ms,  # a server that vanished is noticed
            },
            pool_timeout=self._patience_seconds,
            pool_pre_ping=True,  # a server that was restarted is found by the next transaction
            max_overflow=35,
            hide_parameters=True,
        )
        self._writer = engine.execution_options()
        self._reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with self._closed_on_failure(), self.writing() as connection:
            if (encoding := connection.exec_driver_sql("SHOW server_encoding").scalar()) != "UTF8":
                raise StoreError(f"{self.name} keeps text as {encoding}; name a database made with ENCODING 'UTF8'")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
            migrate.upgrade(connection, self.name)

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    @contextmanager
    def typed_errors(self) -> Iterator[None]:
        """What the database says against it, as errors of ours."""
        if self._closed:
            raise StoreError(f"the store {self.name} is closed; open it again")
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            raise self._explained(getattr(error, "orig", error)) from None
        except TimeoutError:
            raise self._busy() from None

    def _explained(self, error: Any) -> FreeholdError:
        if self.path is not None:
            return self._explained_sqlite(getattr(error, "sqlite_errorcode", 0) & 0xFF, error)
        match getattr(error, "sqlstate", None):
            case "53100":
                return DiskSpaceError(f"{self.name} has no disk space left; free some and send it again")
            case "55P03" | "40P01":
                return self._busy()
            case None:
                reason = (str(error).strip().splitlines() or ["no reason was given"])[0]
                return StoreError(f"{self.name} cannot be reached ({reason}); check that the server runs")
            case _:
                return StoreError(f"{self.name} refused to do its work ({error.diag.message_primary})")

    def _explained_sqlite(self, code: int, error: Any) -> FreeholdError:
        match code:
            case sqlite3.SQLITE_FULL:
                return DiskSpaceError(f"{self.name} cannot grow: the disk is full; free some space and send it again")
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR | sqlite3.SQLITE_PERM:
                return DiskError(f"{self.name} cannot be read or written ({error}); check its disk and its permissions")
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return self._busy()
            case sqlite3.SQLITE_NOTADB:
                return StoreError(f"{self.name} is not a database; name another file, or move it away")
            case sqlite3.SQLITE_CORRUPT:
                return StoreError(f"{self.name} is damaged ({error}); put a copy of it in its place, or move it away")
            case _:
                return StoreError(f"{self.name} refused to do its work ({error})")

    def _busy(self) -> StoreError:
        return StoreError(
            f"{self.name} has been busy for {self._patience_seconds:g} s; see whether another process holds it, "
            "and send it again"
        )


def upsert(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any], *, update: Mapping[str, Any]) -> None:
    """Insert a row, or update the one that has its primary key."""
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name](table)
    key = [column.name for column in table.primary_key]
    connection.execute(insert.values(**row).on_conflict_do_update(index_elements=key, set_=dict(update)))


def _parse(url: str | None) -> sa.URL:
    if url is None:
        return sa.URL.create("sqlite", database=str(paths.data_dir() / "freehold.db"))
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise UsageError("the store's URL cannot be read; give sqlite:////folder/file.db or postgresql://…") from None
    match parsed.drivername:
        case "sqlite" if parsed.database and parsed.database != ":memory:" and not parsed.host and not parsed.query:
            return parsed
        case "postgresql" | "postgres" | "postgresql+psycopg":
            return parsed.set(drivername="postgresql+psycopg")
    raise UsageError(
        f"the store {parsed.render_as_string(hide_password=True)} cannot be used; "
        "give sqlite:////folder/file.db or postgresql://…"
    )
