"""The tables as they are now; how a database gets there is `migrations`.

messages    a chain linked by hashes: a conversation is one id, its tip. Written once, never changed.
blobs       other content that repeats from request to request (tools, extra fields, injected text), by its hash.
sessions    (principal, session id): who talked with what.
turns       one exchange with an LLM each; the only rows that move through states.
leases      who may act on the store.
counters    what ingest saw, for `status`.
votes       what the judge's models said of a turn, one row a vote.
spend       tokens that our own calls of LLMs took, a row per day, purpose and model.
health      checks that decide whether something may go on (RL needs a judge that passed its own).
segments    stretches of sessions that skills are written from, and what came of each.
evolve_cursors  how far the turns of a session have been put into segments.
skill_uses  which human turn had which skill in its prompt.
job_runs    what the worker's jobs did; a run without an end was cut off.
notices     what the user was told once.
caller_spend  what our calls with a caller's own key took.
samples     the exact tokens of an answer that one of our own versions gave, a row per exchange.
versions    weights that were made: where they are saved, and what became of them.
route_events  which versions serve; the last row is the route in force.
steps       the trainer's journal, a row per optimiser step, from claim to route.
step_turns  what a step did with each turn it claimed.
trainer_state  what the trainer carries from step to step (value trackers, gate), as JSON.

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
    LargeBinary,
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
    Column("id", Text, primary_key=True),  # "v1:" + place + "-" + sha256, see chain.py
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
    Column("history_mark", Text),  # digest of what a compaction left at the head of the history
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
    Column("redacted", Boolean, nullable=False),  # a secret was replaced in the request or the answer
    Column("status_code", Integer),
    Column("error", SafeText),
    Column("injected", JsonText),  # names of skills; NULL: nothing was injected, [] : names unknown
    Column("injected_scores", JsonText),  # the retriever's, one for each name when it was chosen; NULL: not known
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
    Column("score", Integer),  # +1, 0 or -1 as the judge's majority said; NULL: not judged, or no majority
    Column("reward", Float),  # what RL makes of it: 1, 0, or NULL for a score of 0 too, which says nothing
    Column("scored_at", Float),  # NULL: not judged yet
    Column("version", BigInteger),  # of our own weights that answered; NULL: the upstream did
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

votes = Table(
    "votes",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("turn", _Id, ForeignKey("turns.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),  # from 0; a turn has one vote of each number
    Column("score", Integer),  # +1, 0 or -1; NULL: abstained
    Column("problem", SafeText),  # why it is an abstention
    Column("reason", SafeText),  # the judge's own words, redacted and cut
    Column("model", Text, nullable=False),
    Column("prompt", Text, nullable=False),  # version of the prompt, a hash
    Column("started_at", Float, nullable=False),
    Column("latency_ms", Float, nullable=False),  # retries included
    UniqueConstraint("turn", "number", name="votes_turn_number"),
)

spend = Table(
    "spend",
    metadata,
    Column("day", Text, primary_key=True),  # 2026-11-25, in UTC
    Column("purpose", Text, primary_key=True),  # "judge", "evolve" …
    Column("model", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("estimated_tokens", BigInteger, nullable=False),  # how many of both are our estimate, the provider said none
)

health = Table(
    "health",
    metadata,
    Column("name", Text, primary_key=True),
    Column("ok", Boolean, nullable=False),
    Column("reason", SafeText),  # NULL: ok
    Column("checked_at", Float, nullable=False),
    Column("detail", JsonText),
)

evolve_cursors = Table(
    "evolve_cursors",
    metadata,
    Column("session", Text, primary_key=True),
    Column("started_at", Float, nullable=False),  # of the last turn that is in a segment
    Column("turn", _Id, nullable=False),
)

segments = Table(
    "segments",
    metadata,
    Column("id", Text, primary_key=True),  # derived from the session and its first and last turn
    Column("session", Text, nullable=False),
    Column("principal", Text, nullable=False),
    Column("first_turn", _Id, nullable=False),
    Column("last_turn", _Id, nullable=False),
    Column("turns", Integer, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),  # start of its last turn
    Column("end_reason", Text, nullable=False),  # "idle", "new session", "compaction", "reset", "asked for"
    Column("trust", SafeText),  # why what was said in it is not surely the user's; NULL: nothing speaks against it
    Column("state", Text, nullable=False),  # "waiting", "proposed" (edits are decided, not all applied), "done", "skipped", "failed"
    Column("detail", SafeText),  # what it waits for, or why it was skipped or failed
    Column("attempts", Integer, nullable=False),
    Column("next_try_at", Float, nullable=False),
    Column("model", Text),  # that proposed the edits
    Column("edits", JsonText),  # decisions in order, see learn.ledger
    Column("updated_at", Float, nullable=False),
    Index("segments_state_next_try_at", "state", "next_try_at"),
    Index("segments_session", "session"),
)

skill_uses = Table(
    "skill_uses",
    metadata,
    Column("skill", Text, primary_key=True),
    Column("turn_id", Text, primary_key=True),
    Column("session", Text),
    Column("at", Float, nullable=False),
)

job_runs = Table(
    "job_runs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),  # NULL: running, or killed
    Column("ok", Boolean),
    Column("report", JsonText),
    Column("error", SafeText),
    Index("job_runs_name_started_at", "name", "started_at"),
)

notices = Table(
    "notices",
    metadata,
    Column("name", Text, primary_key=True),
    Column("at", Float, nullable=False),
    Column("text", SafeText, nullable=False),
)

caller_spend = Table(
    "caller_spend",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("principal", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("tokens", BigInteger, nullable=False),  # as the provider counted, else as reserved
    Column("status", Integer),  # NULL: no answer came
    Index("caller_spend_principal_at", "principal", "at"),
)

samples = Table(
    "samples",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("flow_id", Text, nullable=False),  # of the exchange it answered, as in `turns`
    Column("created_at", Float, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("tokenizer", Text, nullable=False),  # fingerprint of vocabulary, special tokens and chat template
    Column("version", BigInteger, nullable=False),  # in `versions`
    Column("checkpoint", Text),  # path it was sampled from; NULL: the base model itself
    Column("klass", Text, nullable=False),  # "A", "B" or "C"
    Column("klass_reason", Text),  # why it is not A; NULL: it is
    Column("sampling", JsonText, nullable=False),  # temperature, top_p, top_k, max_tokens, seed, stop as asked of the sampler
    Column("prompt_ids", LargeBinary),  # int32, little-endian, zstd; NULL: not kept, as they held a secret
    Column("tokens", LargeBinary),  # int32, the same; what was sent to the client, stop token included where one was sampled
    Column("logprobs", LargeBinary),  # float32, one per token
    Column("prompt_length", Integer, nullable=False),
    Column("length", Integer, nullable=False),
    Column("reused", Integer, nullable=False),  # how many prompt ids were taken over from earlier samples
    Column("segments", Integer, nullable=False),  # calls of the sampler it took
    Column("stop_reason", Text, nullable=False),  # "stop", "length", "context", "aborted"
    Column("malformed", Boolean, nullable=False),  # it began a tool call that can't be read
    Column("redacted", Boolean, nullable=False),
    UniqueConstraint("flow_id", name="samples_flow_id"),
    Index("samples_version", "version"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),  # the version's number; 1 is where training begins
    Column("base_model", Text, nullable=False),
    Column("parent", BigInteger),  # NULL: the base model, or a checkpoint it was resumed from
    Column("step", BigInteger),  # in `steps`; NULL: no step made it
    Column("state_path", Text),  # weights and optimiser, to train on from; NULL: the base model
    Column("sampler_path", Text),  # weights to sample from; NULL: the base model
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),  # of sampler_path at the server; NULL: never, or the base model
    Column("status", Text, nullable=False),  # "candidate", "working", "stable", "retired", "rejected"
    Column("reason", SafeText),  # why it was rejected or retired
    Column("checks", JsonText),  # what the fast checks saw
)

route_events = Table(
    "route_events",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),  # the route's generation
    Column("at", Float, nullable=False),
    Column("working", BigInteger, nullable=False),
    Column("stable", BigInteger, nullable=False),
    Column("pinned", Boolean, nullable=False),  # by hand: training moves it no more
    Column("reason", SafeText, nullable=False),
)

steps = Table(
    "steps",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("state", Text, nullable=False),  # "claimed", "saved", "published", "routed", "rejected", "abandoned"
    Column("base_version", BigInteger, nullable=False),
    Column("version", BigInteger),  # that it made; NULL: none yet
    Column("algorithm", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("state_path", Text),
    Column("metrics", JsonText),
    Column("error", SafeText),
    Index("steps_state", "state"),
)

step_turns = Table(
    "step_turns",
    metadata,
    Column("step", _Id, ForeignKey("steps.id"), primary_key=True),
    Column("turn", _Id, ForeignKey("turns.id", ondelete="CASCADE"), primary_key=True),
    Column("reason", Text),  # why it was left out; NULL: trained on
    Column("reward", Float),
    Column("advantage", Float),
    Column("mean_ratio", Float),
    Column("staleness", Integer),
    Index("step_turns_turn", "turn"),
)

trainer_state = Table(
    "trainer_state",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", JsonText, nullable=False),
    Column("updated_at", Float, nullable=False),
)
