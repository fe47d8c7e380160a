"""Alembic's entry: migrations run on the connection that `overnight.store.database` hands over.

Views are no history: they are dropped before the tables change and made from the code's own definitions after. On
PostgreSQL the reading role is then let in again.
"""

from alembic import context
from sqlalchemy import text

from overnight.store.reading_postgresql import grant_reading
from overnight.store.tables import Table
from overnight.store.views import VIEWS

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
with context.begin_transaction():
    for view in reversed(VIEWS):
        connection.execute(text(f"DROP VIEW IF EXISTS {view.name}"))
    context.run_migrations()
    for view in VIEWS:
        connection.exec_driver_sql(f"CREATE VIEW {view.name} AS {view.sql(connection.dialect.name)}")
    if connection.dialect.name == "postgresql":
        grant_reading(connection)
