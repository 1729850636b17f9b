"""Uploaded files, and fine-tuning: jobs with their events, and the models that came of them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("number", _NUMBER, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_files"),
        sa.UniqueConstraint("owner", "id", name="uq_files_owner_id"),
    )
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_table(
        "tuning_jobs",
        sa.Column("number", _NUMBER, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("training_file", sa.Text, nullable=False),
        sa.Column("validation_file", sa.Text),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_tuning_jobs"),
        sa.UniqueConstraint("owner", "id", name="uq_tuning_jobs_owner_id"),
    )
    op.create_index("ix_tuning_jobs_place_status", "tuning_jobs", ["place", "status"])
    op.create_table(
        "tuning_events",
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("owner", "job_id", "number", name="pk_tuning_events"),
        sa.ForeignKeyConstraint(
            ["owner", "job_id"],
            ["tuning_jobs.owner", "tuning_jobs.id"],
            name="fk_tuning_events_tuning_jobs",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "tuned_models",
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("step", sa.BigInteger),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("place", "name", name="pk_tuned_models"),
        sa.ForeignKeyConstraint(
            ["owner", "job_id"],
            ["tuning_jobs.owner", "tuning_jobs.id"],
            name="fk_tuned_models_tuning_jobs",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_tuned_models_owner_job_id", "tuned_models", ["owner", "job_id"])
