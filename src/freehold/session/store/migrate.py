"""Brings a database to the newest revision. The caller holds the lock that keeps other processes from doing the same.

Refuses a database that a newer Freehold has written, and one that holds somebody else's tables.
"""

import threading
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from freehold.errors import StoreError

FOLDER = Path(__file__).parent / "migrations"
VERSION_TABLE = "freehold_version"

_alembic_is_one_per_process = threading.Lock()  # its `context` and `op` are module globals


def upgrade(connection: sa.Connection, name: str, *, to: str = "head") -> None:
    """Run the revisions that are missing, within the connection's transaction; `name` is for messages."""
    from alembic import command
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    options: dict[str, Any] = {"version_table": VERSION_TABLE, "transactional_ddl": True}
    current = MigrationContext.configure(connection, opts=options).get_current_heads()
    script = ScriptDirectory(str(FOLDER))
    known = {revision.revision for revision in script.walk_revisions()}
    if unknown := [revision for revision in current if revision not in known]:
        raise StoreError(
            f"{name} was written by a newer Freehold (its revision is {unknown[0]}); "
            "update Freehold, or name another store"
        )
    if not current and (tables := set(sa.inspect(connection).get_table_names()) - {VERSION_TABLE}):
        raise StoreError(f"{name} holds somebody else's tables, such as {min(tables)!r}; name another store")
    if to == "head" and tuple(current) == tuple(script.get_heads()):
        return
    with _alembic_is_one_per_process:
        command.upgrade(_config(connection, options), to)


def _config(connection: sa.Connection, options: dict[str, Any]) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes.update(connection=connection, options=options)
    return config
