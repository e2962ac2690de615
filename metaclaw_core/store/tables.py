"""The tables as they are now; how a database gets there is `migrations`.

messages    a chain linked by hashes: a conversation is one id, its tip. Written once, never changed.
blobs       other content that repeats from request to request (tools, extra fields, injected text), by its hash.
sessions    (principal, session id): who talked with what.
turns       one exchange with an LLM each; the only rows that move through states.
leases      who may act on the store.
counters    what ingest saw, for `status`.

Every column that may be unknown is NULL then, never 0 or "". Times are unix seconds.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from metaclaw_core.store.types import JsonText, PackedJson, SafeText

metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself in INTEGER only

messages = Table(
    "messages",
    metadata,
    Column("id", Text, primary_key=True),  # "v1:" + sha256, see chain.py
    Column("parent", Text),  # NULL: the first message of a conversation
    Column("role", Text, nullable=False),
    Column("content", PackedJson, nullable=False),  # all of the message as its first writer had it
)

blobs = Table(
    "blobs",
    metadata,
    Column("id", Text, primary_key=True),  # sha256 of the canonical JSON
    Column("content", PackedJson, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),  # derived from the next two, so that any process names it alike
    Column("principal", Text, nullable=False),
    Column("session_id", Text, nullable=False),  # the client's own, or a generated "p-…"
    Column("generated", Boolean, nullable=False),
    Column("session_key", Text),  # a name that outlives resets
    Column("agent", Text, nullable=False),
    Column("first_at", Float, nullable=False),
    Column("last_at", Float, nullable=False),
    UniqueConstraint("principal", "session_id", name="sessions_principal_session_id"),
    Index("sessions_principal_last_at", "principal", "last_at"),
)

turns = Table(
    "turns",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("flow_id", Text),  # NULL: a format that keeps none (HAR)
    Column("content_key", Text, nullable=False),  # sha256 of start time, URL, original body, response
    Column("turn_id", Text),  # 32 hex of the human turn; NULL: the request can't be read
    Column("session", Text, ForeignKey("sessions.id")),  # NULL: can't be told
    Column("principal", Text, nullable=False),
    Column("agent", Text),
    Column("kind", Text, nullable=False),
    Column("trace_id", Text),
    Column("dialect", Text, nullable=False),
    Column("scheme", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("port", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("model", Text),  # asked for
    Column("response_model", Text),  # said to have answered
    Column("stream", Boolean),
    Column("response_id", Text),
    Column("previous_response_id", Text),
    Column("history_known", Boolean),  # False: previous_response_id names a response we have not seen
    Column("system_tip", Text),  # message id of the last leading system message
    Column("prompt_tip", Text),
    Column("response_tip", Text),
    Column("response", PackedJson),  # the answer's own content, where `response_tip` keeps another writer's
    Column("tools", Text),  # blob
    Column("sampling", JsonText),
    Column("extra", Text),  # blob: {"metadata", "extra"} of the request
    Column("response_extra", JsonText),  # what else the answer held
    Column("user_text", SafeText),
    Column("assistant_text", SafeText),
    Column("tool_calls", JsonText),  # [{"name", "arguments", "id"}]; NULL: none, or no answer
    Column("stop_reason", Text),
    Column("raw_stop_reason", Text),
    Column("input_tokens", Integer),
    Column("output_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("cache_write_tokens", Integer),
    Column("reasoning_tokens", Integer),
    Column("status_code", Integer),
    Column("error", SafeText),
    Column("injected", JsonText),  # names of skills; NULL: nothing was injected, [] : names unknown
    Column("injection", Text),  # blob: the injected text
    Column("index_generation", BigInteger),
    Column("state", Text, nullable=False),
    Column("reason", SafeText),
    Column("retry", Boolean, nullable=False),
    Column("attempts", Integer, nullable=False),  # failed tries to move on from the state
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

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("expires_at", Float, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
