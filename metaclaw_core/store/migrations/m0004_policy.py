"""Exact tokens of our own model's answers, its versions, routes and the trainer's journal."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

_metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")
Table("turns", _metadata, Column("id", _Id, primary_key=True))  # only so that `step_turns` can refer to it

Table(
    "samples",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("flow_id", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("tokenizer", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("checkpoint", Text),
    Column("klass", Text, nullable=False),
    Column("klass_reason", Text),
    Column("sampling", Text, nullable=False),
    Column("prompt_ids", LargeBinary),
    Column("tokens", LargeBinary),
    Column("logprobs", LargeBinary),
    Column("prompt_length", Integer, nullable=False),
    Column("length", Integer, nullable=False),
    Column("reused", Integer, nullable=False),
    Column("segments", Integer, nullable=False),
    Column("stop_reason", Text, nullable=False),
    Column("malformed", Boolean, nullable=False),
    Column("redacted", Boolean, nullable=False),
    UniqueConstraint("flow_id", name="samples_flow_id"),
    Index("samples_version", "version"),
)

Table(
    "versions",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("base_model", Text, nullable=False),
    Column("parent", BigInteger),
    Column("step", BigInteger),
    Column("state_path", Text),
    Column("sampler_path", Text),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("checks", Text),
)

Table(
    "route_events",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("working", BigInteger, nullable=False),
    Column("stable", BigInteger, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
)

Table(
    "steps",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("state", Text, nullable=False),
    Column("base_version", BigInteger, nullable=False),
    Column("version", BigInteger),
    Column("algorithm", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("state_path", Text),
    Column("metrics", Text),
    Column("error", Text),
    Index("steps_state", "state"),
)

Table(
    "step_turns",
    _metadata,
    Column("step", _Id, ForeignKey("steps.id"), primary_key=True),
    Column("turn", _Id, ForeignKey("turns.id", ondelete="CASCADE"), primary_key=True),
    Column("reason", Text),
    Column("reward", Float),
    Column("advantage", Float),
    Column("mean_ratio", Float),
    Column("staleness", Integer),
    Index("step_turns_turn", "turn"),
)

Table(
    "trainer_state",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Column("updated_at", Float, nullable=False),
)


def m0004_policy(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE turns ADD COLUMN version BIGINT"))
    _metadata.create_all(connection)
