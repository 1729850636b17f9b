"""API keys: a name, limits, and the SHA-256 of a secret that is shown once and kept nowhere.

A slow hash guards secrets that people think up, by making each guess dear. These are 256 random bits, which nobody
guesses however cheap a guess is; so the hash can be one that costs a server nothing at each request.
"""

import hashlib
import secrets
from collections.abc import Mapping
from types import MappingProxyType

import sqlalchemy as sa

from freehold.errors import UsageError
from freehold.session.store.items import not_found
from freehold.session.store.records import KeyRecord
from freehold.session.store.schema import keys

_ID_PREFIX = "key_"
_HINT_CHARACTERS = 7  # 24 of the 256 bits


def hash_secret(secret: str) -> bytes:
    """What is kept of a secret, and what a server compares (in constant time) with what a client sends."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def create(
    connection: sa.Connection,
    name: str | None,
    *,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    now: float,
) -> tuple[KeyRecord, str]:
    """A new key and its secret. Without a name it goes by its id."""
    key_id = _ID_PREFIX + secrets.token_hex(8)
    secret = "fh-" + secrets.token_urlsafe(32)
    record = KeyRecord(
        id=key_id,
        name=key_id if name is None else name,
        hint=secret[:_HINT_CHARACTERS],
        created_at=now,
        revoked_at=None,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    if name is not None and name.startswith(_ID_PREFIX):
        raise UsageError(f"a key cannot be called {name!r}: ids begin like this; give another name")
    if any(key.name == name for key in _active(connection)):
        raise UsageError(f"there is a key {name!r} already; give another name, or revoke that one first")
    row = {field: getattr(record, field) for field in KeyRecord.__dataclass_fields__}
    connection.execute(sa.insert(keys), {**row, "hash": hash_secret(secret)})
    return record, secret


def all_keys(connection: sa.Connection) -> list[KeyRecord]:
    """Every key, revoked ones too, the oldest first."""
    return [_record(row) for row in connection.execute(sa.select(keys).order_by(keys.c.created_at, keys.c.id))]


def by_hash(connection: sa.Connection) -> Mapping[bytes, KeyRecord]:
    """Every key, revoked ones too, by the hash of its secret."""
    return MappingProxyType({bytes(row.hash): _record(row) for row in connection.execute(sa.select(keys))})


def _active(connection: sa.Connection) -> list[KeyRecord]:
    return [key for key in all_keys(connection) if key.revoked_at is None]


def revoke(connection: sa.Connection, id_or_name: str, *, now: float) -> KeyRecord:
    """End a key, by its id or its name."""
    for key in _active(connection):
        if id_or_name in (key.id, key.name):
            connection.execute(sa.update(keys).where(keys.c.id == key.id).values(revoked_at=now))
            return next(record for record in all_keys(connection) if record.id == key.id)
    raise not_found("active key", id_or_name)


def _record(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    return KeyRecord(**{field: getattr(row, field) for field in KeyRecord.__dataclass_fields__})
