"""The first shape of the store."""

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
)

_metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")

Table(
    "messages",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("parent", Text),
    Column("role", Text, nullable=False),
    Column("content", LargeBinary, nullable=False),
)

Table(
    "blobs",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

Table(
    "sessions",
    _metadata,
    Column("id", Text, primary_key=True),
    Column("principal", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("generated", Boolean, nullable=False),
    Column("session_key", Text),
    Column("agent", Text, nullable=False),
    Column("first_at", Float, nullable=False),
    Column("last_at", Float, nullable=False),
    UniqueConstraint("principal", "session_id", name="sessions_principal_session_id"),
    Index("sessions_principal_last_at", "principal", "last_at"),
)

Table(
    "turns",
    _metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("flow_id", Text),
    Column("content_key", Text, nullable=False),
    Column("turn_id", Text),
    Column("session", Text, ForeignKey("sessions.id")),
    Column("principal", Text, nullable=False),
    Column("agent", Text),
    Column("kind", Text, nullable=False),
    Column("trace_id", Text),
    Column("history_mark", Text),
    Column("dialect", Text, nullable=False),
    Column("scheme", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("port", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("model", Text),
    Column("response_model", Text),
    Column("stream", Boolean),
    Column("response_id", Text),
    Column("previous_response_id", Text),
    Column("history_known", Boolean),
    Column("system_tip", Text),
    Column("prompt_tip", Text),
    Column("response_tip", Text),
    Column("response", LargeBinary),
    Column("tools", Text),
    Column("sampling", Text),
    Column("extra", Text),
    Column("response_extra", Text),
    Column("user_text", Text),
    Column("assistant_text", Text),
    Column("tool_calls", Text),
    Column("stop_reason", Text),
    Column("raw_stop_reason", Text),
    Column("input_tokens", Integer),
    Column("output_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("cache_write_tokens", Integer),
    Column("reasoning_tokens", Integer),
    Column("redacted", Boolean, nullable=False),
    Column("status_code", Integer),
    Column("error", Text),
    Column("injected", Text),
    Column("injection", Text),
    Column("index_generation", BigInteger),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("retry", Boolean, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("claimed_by", Text),
    Column("claim_expires_at", Float),
    Column("started_at", Float, nullable=False),
    Column("duration_ms", Float),
    Column("live", Boolean, nullable=False),
    UniqueConstraint("flow_id", name="turns_flow_id"),
    UniqueConstraint("content_key", name="turns_content_key"),
    Index("turns_state_started_at", "state", "started_at"),
    Index("turns_started_at", "started_at"),
    Index("turns_session_started_at", "session", "started_at"),
    Index("turns_turn_id", "turn_id"),
    Index("turns_principal_response_id", "principal", "response_id"),
    Index("turns_prompt_tip", "prompt_tip"),
    Index("turns_response_tip", "response_tip"),
)

Table(
    "leases",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("expires_at", Float, nullable=False),
)

Table(
    "counters",
    _metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)


def m0001_initial(connection: Connection) -> None:
    _metadata.create_all(connection)
