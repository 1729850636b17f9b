"""The tables. Whoever changes them adds a revision under `migrations/versions`; a test holds the two together.

Every row belongs to an owner, whose id leads each primary key, so that no query can find another's row by its id. An
item lies where it was put, once for each response or conversation that holds it: later input that carries the id of an
earlier item changes nothing in what came before.

    chains ──< responses ──< items >── conversations
                   └──< events                            keys

    files        tuning_jobs ──< tuning_events
                      └──< tuned_models

A *chain* is a tree of responses that continue one another. It has a last use and a size, and is forgotten as a whole.
Sizes are kept up to date by whoever writes, as `num_bytes`. A *place* is the folder where the bytes of files and models
lie, by the name that it has itself (serve/tuning/workshop.py): servers that share a database need not share a disk.
"""

from typing import Any

import sqlalchemy as sa

from freehold.session.store.text import escape, unescape

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)


class Id(sa.types.TypeDecorator[str]):
    """Text that clients may have made up: any text can be stored, and looked for."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else escape(value)

    def process_result_value(self, value: Any | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else unescape(value)


Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # only INTEGER counts up by itself there


chains = sa.Table(
    "chains",
    metadata,
    sa.Column("owner", Id, primary_key=True),
    sa.Column("id", Id, primary_key=True),  # of the response that began it
    sa.Column("used_at", sa.Double, nullable=False, index=True),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
)

responses = sa.Table(
    "responses",
    metadata,
    sa.Column("owner", Id, primary_key=True),
    sa.Column("id", Id, primary_key=True),
    sa.Column("chain_id", Id, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("background", sa.Boolean, nullable=False),
    sa.Column("previous_response_id", Id),
    sa.Column("conversation_id", Id),
    sa.Column("in_conversation", sa.Boolean, nullable=False),  # its items have been added there
    sa.Column("instance", sa.Text),  # the store that works on it; none once it is finished
    sa.Column("num_bytes", sa.BigInteger, nullable=False),  # with its items, without its events
    sa.Column("body", sa.Text, nullable=False),  # `output` is empty here: its items are rows
    sa.ForeignKeyConstraint(["owner", "chain_id"], ["chains.owner", "chains.id"], ondelete="CASCADE"),
    sa.Index(None, "owner", "chain_id"),
    sa.Index(None, "instance"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("owner", Id, primary_key=True),
    sa.Column("response_id", Id, primary_key=True),
    sa.Column("sequence_number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["owner", "response_id"], ["responses.owner", "responses.id"], ondelete="CASCADE"),
)

conversations = sa.Table(
    "conversations",
    metadata,
    sa.Column("owner", Id, primary_key=True),
    sa.Column("id", Id, primary_key=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("used_at", sa.Double, nullable=False, index=True),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("metadata", sa.Text, nullable=False),
)

items = sa.Table(
    "items",
    metadata,
    sa.Column("number", Number, primary_key=True),  # in the order of writing
    sa.Column("owner", Id, nullable=False),
    sa.Column("id", Id, nullable=False),
    sa.Column("response_id", Id),  # either this
    sa.Column("is_output", sa.Boolean, nullable=False),
    sa.Column("conversation_id", Id),  # or this
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["owner", "response_id"], ["responses.owner", "responses.id"], ondelete="CASCADE"),
    sa.ForeignKeyConstraint(
        ["owner", "conversation_id"], ["conversations.owner", "conversations.id"], ondelete="CASCADE"
    ),
    sa.Index(None, "owner", "id"),
    sa.Index(None, "owner", "response_id"),
    sa.UniqueConstraint("owner", "conversation_id", "id"),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", Id, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("hint", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
)

files = sa.Table(
    "files",
    metadata,
    sa.Column("number", Number, primary_key=True),  # in the order of coming
    sa.Column("owner", Id, nullable=False),
    sa.Column("id", Id, nullable=False),
    sa.Column("place", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, index=True),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("filename", Id, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("owner", "id"),
)

tuning_jobs = sa.Table(
    "tuning_jobs",
    metadata,
    sa.Column("number", Number, primary_key=True),
    sa.Column("owner", Id, nullable=False),
    sa.Column("id", Id, nullable=False),
    sa.Column("place", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("finished_at", sa.Double),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("training_file", Id, nullable=False),
    sa.Column("validation_file", Id),
    sa.Column("body", sa.Text, nullable=False),
    sa.UniqueConstraint("owner", "id"),
    sa.Index(None, "place", "status"),
)

tuning_events = sa.Table(
    "tuning_events",
    metadata,
    sa.Column("owner", Id, primary_key=True),
    sa.Column("job_id", Id, primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["owner", "job_id"], ["tuning_jobs.owner", "tuning_jobs.id"], ondelete="CASCADE"),
)

tuned_models = sa.Table(
    "tuned_models",
    metadata,
    sa.Column("place", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),  # of the adapter; requests ask for `model:name`
    sa.Column("owner", Id, nullable=False),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("step", sa.BigInteger),  # of a checkpoint
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["owner", "job_id"], ["tuning_jobs.owner", "tuning_jobs.id"], ondelete="CASCADE"),
    sa.Index(None, "owner", "job_id"),
)
