"""The values that travel through the system: frozen, without I/O, the same for all five dialects.

Design: a dialect turns bytes into a `Request` and a `Response`; both hold `Message` values whose
parts keep what the wire said (raw tool arguments, opaque reasoning, unknown parts). Nothing is
normalised away here; what takes part in a hash is decided in ``store``. None always means
*unknown*, never zero or empty.

Limits: media are kept as the raw JSON of their part, not decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

type Json = Any  # what json.loads returns: dict, list, str, int, float, bool or None


class Role(StrEnum):
    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"  # Gemini's "model"
    TOOL = "tool"  # a result; Anthropic and Gemini carry it in a user message


class Kind(StrEnum):
    """What opened the turn a request belongs to. A tool loop of a side turn keeps that side turn's kind."""

    MAIN = "main"  # a human's message is waiting for an answer
    TOOL = "tool"  # continuation of a MAIN turn after tool results
    SUBAGENT = "subagent"  # any request of a subagent's own session
    ANNOUNCE = "announce"  # a background task's result handed to the parent session
    HEARTBEAT = "heartbeat"
    COMPACTION = "compaction"
    TITLE = "title"  # titles, recaps, memory flush: a call without tools that no human waits for
    UNKNOWN = "unknown"


class StopReason(StrEnum):
    """Normalised; the wire's own word is `Response.raw_stop_reason`."""

    STOP = "stop"  # the model ended its turn (end_turn, STOP, stop sequence)
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"  # refusal, SAFETY
    OTHER = "other"  # pause_turn and words we don't know


# --- parts of a message -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    extra: Mapping[str, Json] = field(default_factory=dict)  # unknown fields of the part (cache_control, annotations …)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Thinking. `opaque` is signed or encrypted state, kept and never interpreted."""

    text: str  # "" where only opaque state came
    opaque: Json = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is the raw string the model emitted, not re-serialised. Where the wire carries an
    object (Anthropic, Gemini and Ollama JSON), it is that object as compact JSON in wire key order."""

    name: str
    arguments: str
    id: str | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolResult:
    text: str  # the text of the result, blocks joined with "\n"
    call_id: str | None = None
    name: str | None = None
    is_error: bool | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)  # non-text blocks under "blocks", unknown fields


@dataclass(frozen=True, slots=True)
class Opaque:
    """A part of a type we don't interpret (image, audio, file, item_reference …), as it was on the wire."""

    type: str
    raw: Json


type Part = Text | Reasoning | ToolCall | ToolResult | Opaque


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    extra: Mapping[str, Json] = field(default_factory=dict)  # unknown fields of the message object

    @property
    def text(self) -> str:
        """All `Text` parts joined with a newline; "" if there are none."""
        return "\n".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(p for p in self.parts if isinstance(p, ToolCall))

    @property
    def tool_results(self) -> tuple[ToolResult, ...]:
        return tuple(p for p in self.parts if isinstance(p, ToolResult))


# --- one exchange with an LLM -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    name: str  # "" for provider tools without a name (then `raw["type"]` says what it is)
    description: str | None
    raw: Json  # the whole declaration as it was on the wire


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for.

    `messages` begins with the system prompt (roles SYSTEM or DEVELOPER), wherever the wire had it:
    Anthropic `system`, Responses `instructions`, Gemini `systemInstruction` become leading messages.
    A tool result that travels in a user message (Anthropic, Gemini) becomes a TOOL message of its own,
    in wire order; the rest of that user message stays a USER message.
    """

    dialect: str
    model: str | None
    stream: bool
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    sampling: Mapping[str, Json] = field(default_factory=dict)  # temperature, top_p, max tokens, seed, stop …, wire names
    previous_response_id: str | None = None  # Responses only: the history before `messages` is at the provider
    metadata: Mapping[str, Json] = field(default_factory=dict)  # the body's own `metadata` object
    extra: Mapping[str, Json] = field(default_factory=dict)  # every other top-level field, unchanged

    @property
    def system(self) -> str | None:
        """The leading system and developer messages' text joined with a blank line; None if there is none."""
        texts = []
        for message in self.messages:
            if message.role not in (Role.SYSTEM, Role.DEVELOPER):
                break
            texts.append(message.text)
        return "\n\n".join(texts) if texts else None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the provider counted them. None: not reported."""

    input_tokens: int | None = None  # the whole prompt, cache reads and writes included, on every dialect
    output_tokens: int | None = None  # reasoning included where the provider includes it
    cached_tokens: int | None = None  # part of input_tokens that was read from a cache
    cache_write_tokens: int | None = None  # part of input_tokens that was written to a cache (Anthropic)
    reasoning_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error object of the dialect, from an error status or from inside a stream."""

    message: str
    type: str | None = None
    code: str | None = None
    raw: Json = None


@dataclass(frozen=True, slots=True)
class Response:
    """What came back. A cut stream gives what had arrived, with `complete` False."""

    message: Message | None  # role ASSISTANT; None if nothing of it arrived
    complete: bool  # the terminal event or the whole JSON body was seen
    id: str | None = None
    model: str | None = None
    stop_reason: StopReason | None = None
    raw_stop_reason: str | None = None
    usage: Usage | None = None
    error: ApiError | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hints:
    """The few facts taken from request headers; the headers themselves are never kept."""

    trace_id: str | None = None  # 32 hex of `traceparent`
    session_id: str | None = None  # `x-openclaw-session-id`, `session_id` (Codex) …
    client: str | None = None  # "openclaw", "claude-code", "codex" where a header names it


@dataclass(frozen=True, slots=True)
class Injection:
    """What we added to a request: the text, and for whom."""

    text: str
    skills: tuple[str, ...]
    index_generation: int
    scores: tuple[float | None, ...] = ()  # the retriever's, one a skill when it was chosen; None: not known; (): none is


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP exchange as the proxy saw it: raw bytes plus the little that can't be derived from them.

    This is the row of the spool. Bodies are secrets-redacted and may be content-encoded.
    `request_body` is the client's own body, before injection.
    """

    flow_id: str
    dialect: str
    method: str
    scheme: str
    host: str
    port: int
    path: str  # query kept, but secret parameters (key, token …) removed
    started_at: float  # unix seconds, µs precision: flow.request.timestamp_start
    duration_ms: float | None  # request start to last response byte; None: never finished
    principal: str  # hex HMAC of upstream origin and credential
    hints: Hints
    request_body: bytes
    request_encoding: str  # content-encoding, "" for identity
    status_code: int | None  # None: no response head arrived
    response_body: bytes
    response_encoding: str
    response_type: str  # media type of the response without parameters, lower case, "" if none
    complete: bool  # the response ended as HTTP says it should
    error: str | None  # mitmproxy's words if the flow broke
    live: bool  # False: read from a capture
    injection: Injection | None = None
    version: int | None = None  # of our own weights that answered; None: the upstream did, or nobody
