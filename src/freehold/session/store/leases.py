"""Who is still alive among those who share a database. No clocks: a lease ends when its process does.

A store that works on responses holds a lease with a random name, and writes that name on them. With SQLite the lease
is a locked file beside the database; with PostgreSQL it is an advisory lock of a session of its own, which is why a
pooler that lends sessions out by the transaction must not stand in between. A lease whose session was lost is replaced
by one with a new name.
"""

import fcntl
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa

from freehold.disk import exclusive
from freehold.errors import DiskError, StoreError
from freehold.session.store.database import Database


class Leases(Protocol):
    """Of one store: its own lease, and a look at those of others."""

    def hold(self) -> str:
        """The name of this store's lease, which is taken now if it is not held."""

    def ended(self, connection: sa.Connection, name: str) -> bool:
        """Whether nobody holds the lease of this name; nobody else is told so until the transaction ends."""

    def tidy(self) -> None:
        """Remove what leases that ended have left."""

    def close(self) -> None:
        """Give this store's lease up."""


def leases_of(database: Database) -> Leases:
    """The kind that this database needs."""
    return SessionLeases(database) if database.path is None else FileLeases(database.path)


class FileLeases:
    """Locked files beside an SQLite database. The writer's lock of the database keeps two from looking at once."""

    def __init__(self, path: Path) -> None:
        self._database = path
        self._mutex = threading.Lock()
        self._held: tuple[str, int] | None = None

    def hold(self) -> str:
        with self._mutex:
            if self._held is None:
                name = secrets.token_hex(8)
                with exclusive(self._database), _typed(self._file(name)):  # `tidy` stays away until it is locked
                    handle = os.open(self._file(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._held = name, handle
            return self._held[0]

    def ended(self, connection: sa.Connection, name: str) -> bool:
        return not _locked_elsewhere(self._file(name))

    def tidy(self) -> None:
        with exclusive(self._database):
            for left in self._database.parent.glob(f"{self._file('').name}*"):
                if not _locked_elsewhere(left):
                    with suppress(OSError):
                        left.unlink()

    def close(self) -> None:
        with self._mutex:
            if self._held is not None:
                name, handle = self._held
                with suppress(OSError):
                    self._file(name).unlink()
                os.close(handle)
                self._held = None

    def _file(self, name: str) -> Path:
        return self._database.with_name(f".{self._database.name}.instance-{name}")


class SessionLeases:
    """Advisory locks of PostgreSQL sessions."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._mutex = threading.Lock()
        self._name: str | None = None
        self._session = ExitStack()
        self._connection: sa.Connection | None = None

    def hold(self) -> str:
        with self._mutex:
            if self._name is None or not self._alive():
                self._let_go()
                name = secrets.token_hex(8)
                self._connection = self._session.enter_context(self._database.session())
                with self._database.typed_errors():
                    self._connection.execute(sa.select(sa.func.pg_advisory_lock(_number(name))))
                self._name = name
            return self._name

    def ended(self, connection: sa.Connection, name: str) -> bool:
        return bool(connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_number(name)))))

    def tidy(self) -> None:
        pass  # a session takes its locks with it

    def close(self) -> None:
        with self._mutex:
            if self._connection is not None and self._name is not None and self._alive():
                self._connection.execute(sa.select(sa.func.pg_advisory_unlock(_number(self._name))))
            self._let_go()

    def _alive(self) -> bool:
        assert self._connection is not None
        try:
            self._connection.execute(sa.select(1))
        except sa.exc.DBAPIError:
            return False
        return True

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()  # the session ends, and with it whatever it holds
        with suppress(StoreError):
            self._session.close()
        self._connection, self._name = None, None


def _number(name: str) -> int:
    return int.from_bytes(bytes.fromhex(name), signed=True)


def _locked_elsewhere(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # of another user, whose process may well live
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error.strerror}); check the folder and its permissions") from None
