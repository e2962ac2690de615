"""What skills are written from, what was written, how they do, and what the jobs did."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Connection, Float, Index, Integer, MetaData, Table, Text

_metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")

Table(
    "evolve_cursors",
    _metadata,
    Column("session", Text, primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("turn", _Id, nullable=False),
)

Table(
    "segments",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("session", Text, nullable=False),
    Column("principal", Text, nullable=False),
    Column("first_turn", _Id, nullable=False),
    Column("last_turn", _Id, nullable=False),
    Column("turns", Integer, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("end_reason", Text, nullable=False),
    Column("trust", Text),
    Column("state", Text, nullable=False),
    Column("detail", Text),
    Column("attempts", Integer, nullable=False),
    Column("next_try_at", Float, nullable=False),
    Column("model", Text),
    Column("edits", Text),
    Column("updated_at", Float, nullable=False),
    Index("segments_state_next_try_at", "state", "next_try_at"),
    Index("segments_session", "session"),
)

Table(
    "skill_uses",
    _metadata,
    Column("skill", Text, primary_key=True),
    Column("turn_id", Text, primary_key=True),
    Column("session", Text),
    Column("at", Float, nullable=False),
)

Table(
    "job_runs",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("ok", Boolean),
    Column("report", Text),
    Column("error", Text),
    Index("job_runs_name_started_at", "name", "started_at"),
)

Table(
    "notices",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("at", Float, nullable=False),
    Column("text", Text, nullable=False),
)

Table(
    "caller_spend",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("principal", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("status", Integer),
    Index("caller_spend_principal_at", "principal", "at"),
)


def m0003_evolve(connection: Connection) -> None:
    _metadata.create_all(connection)
