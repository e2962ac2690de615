"""What the judge says of a turn, what the LLMs cost, and whether the judge can be trusted."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

_metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")

Table("turns", _metadata, Column("id", _Id, primary_key=True))  # only so that `votes` can refer to it

_votes = Table(
    "votes",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("turn", _Id, ForeignKey("turns.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("score", Integer),
    Column("problem", Text),
    Column("reason", Text),
    Column("model", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("latency_ms", Float, nullable=False),
    UniqueConstraint("turn", "number", name="votes_turn_number"),
)

_spend = Table(
    "spend",
    _metadata,
    Column("day", Text, primary_key=True),
    Column("purpose", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("estimated_tokens", BigInteger, nullable=False),
)

_health = Table(
    "health",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("ok", Boolean, nullable=False),
    Column("reason", Text),
    Column("checked_at", Float, nullable=False),
    Column("detail", Text),
)


def m0002_judge(connection: Connection) -> None:
    for column in ("score INTEGER", "reward FLOAT", "scored_at FLOAT"):
        connection.execute(text(f"ALTER TABLE turns ADD COLUMN {column}"))
    _metadata.create_all(connection, [_votes, _spend, _health])
