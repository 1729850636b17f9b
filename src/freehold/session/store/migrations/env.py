"""Run by alembic: the revisions beside this file, on the connection and in the transaction of `migrate.py`.

Configures no logging: that belongs to the process.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"], **context.config.attributes["options"])
context.run_migrations()
