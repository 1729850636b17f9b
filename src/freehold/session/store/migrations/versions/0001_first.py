"""The first tables: responses in chains with their items and events, conversations, keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "chains",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("used_at", sa.Double, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("owner", "id", name="pk_chains"),
    )
    op.create_index("ix_chains_used_at", "chains", ["used_at"])
    op.create_table(
        "responses",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("chain_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("background", sa.Boolean, nullable=False),
        sa.Column("previous_response_id", sa.Text),
        sa.Column("conversation_id", sa.Text),
        sa.Column("in_conversation", sa.Boolean, nullable=False),
        sa.Column("instance", sa.Text),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("owner", "id", name="pk_responses"),
        sa.ForeignKeyConstraint(
            ["owner", "chain_id"], ["chains.owner", "chains.id"], name="fk_responses_chains", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_responses_owner_chain_id", "responses", ["owner", "chain_id"])
    op.create_index("ix_responses_instance", "responses", ["instance"])
    op.create_table(
        "events",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("response_id", sa.Text, nullable=False),
        sa.Column("sequence_number", sa.BigInteger, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("owner", "response_id", "sequence_number", name="pk_events"),
        sa.ForeignKeyConstraint(
            ["owner", "response_id"],
            ["responses.owner", "responses.id"],
            name="fk_events_responses",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "conversations",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("used_at", sa.Double, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("owner", "id", name="pk_conversations"),
    )
    op.create_index("ix_conversations_used_at", "conversations", ["used_at"])
    op.create_table(
        "items",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("response_id", sa.Text),
        sa.Column("is_output", sa.Boolean, nullable=False),
        sa.Column("conversation_id", sa.Text),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_items"),
        sa.ForeignKeyConstraint(
            ["owner", "response_id"], ["responses.owner", "responses.id"], name="fk_items_responses", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["owner", "conversation_id"],
            ["conversations.owner", "conversations.id"],
            name="fk_items_conversations",
            ondelete="CASCADE",
        ),
        sa.UniqueConstraint("owner", "conversation_id", "id", name="uq_items_owner_conversation_id_id"),
    )
    op.create_index("ix_items_owner_id", "items", ["owner", "id"])
    op.create_index("ix_items_owner_response_id", "items", ["owner", "response_id"])
    op.create_table(
        "keys",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("hash", name="uq_keys_hash"),
    )
