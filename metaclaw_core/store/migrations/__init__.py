"""How a database reaches the shape of `tables`: functions ``mNNNN_what``, forward only.

Design: each step is a function over an open connection, in a module of its own name, and describes the
tables as they were at its time: a step that has shipped is never edited. The names of the applied ones
are kept in the database. All missing steps run in one transaction, so a failed one leaves what was
there. A test compares the result with `tables`.

Limits: no way back. A database with a step that this version doesn't know is refused, untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Column, Connection, Float, MetaData, Table, Text, insert, inspect, select, text

from metaclaw_core.errors import StoreError
from metaclaw_core.store.migrations.m0001_initial import m0001_initial
from metaclaw_core.store.migrations.m0002_judge import m0002_judge
from metaclaw_core.store.migrations.m0003_evolve import m0003_evolve
from metaclaw_core.store.migrations.m0004_policy import m0004_policy
from metaclaw_core.store.migrations.m0005_injected_scores import m0005_injected_scores

MIGRATIONS: tuple[Callable[[Connection], None], ...] = (m0001_initial, m0002_judge, m0003_evolve, m0004_policy, m0005_injected_scores)

migrations = Table(
    "metaclaw_migrations",
    MetaData(),
    Column("name", Text, primary_key=True),
    Column("applied_at", Float, nullable=False),
)
_POSTGRES_LOCK = 0x6D657461  # any number that only we use: two workers that start at once must not both migrate


def migrate(connection: Connection, steps: tuple[Callable[[Connection], None], ...] = MIGRATIONS) -> list[str]:
    """Apply what is missing, inside the caller's write transaction; the names of the steps that ran.

    Raises StoreError for a database of a newer version or of somebody else.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})
    existing = set(inspect(connection).get_table_names())
    if migrations.name not in existing:
        if existing & {"turns", "messages", "sessions", "blobs", "leases", "counters"}:
            raise StoreError(
                f"{connection.engine.url} holds tables of another program; give MetaClaw a database of its own."
            )
        migrations.create(connection)
    applied = set(connection.scalars(select(migrations.c.name)))
    known = [step.__name__ for step in steps]
    if unknown := sorted(applied - set(known)):
        raise StoreError(
            f"{connection.engine.url} was written by a newer MetaClaw (it has {', '.join(unknown)}); "
            "upgrade MetaClaw, or set METACLAW_HOME to another folder."
        )
    done = []
    for step in steps:
        if step.__name__ not in applied:
            step(connection)
            connection.execute(insert(migrations).values(name=step.__name__, applied_at=time.time()))
            done.append(step.__name__)
    return done
