"""What we know of a client: the protocol of an agent module, and what it answers.

Design: an agent module is pure: it sees one parsed request, the few hints taken from its headers and,
where the request continues a provider-side chain, what is known of the response it continues. It
keeps no state. What only history can tell (prefix sessions, inherited kinds) is the caller's: the
store at ingest, the proxy's session state on the hot path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from metaclaw_core.model import Hints, Kind, Request


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of the response that `previous_response_id` names, or of the turn a request continues."""

    session_id: str | None
    session_key: str | None
    kind: Kind  # of the request that got that response
    user_text: str | None
    turn_id: str | None


@dataclass(frozen=True, slots=True)
class Identity:
    agent: str  # the agent module's name
    kind: Kind
    session_id: str | None  # the client's own id; None: the client shows none
    session_key: str | None  # a name that outlives resets ("agent:main:main"); None: the client has none
    user_text: str | None  # the human's text of this turn without envelope; a subagent's task; None: no human spoke
    human_texts: tuple[str, ...]  # all human turns visible in the request, oldest first, stripped; last == user_text
    retry: bool  # a repeated attempt at the same human turn
    trace: str | None  # what ties the calls of one human turn together; None: use the chain id of the human message
    unknown_preambles: int = 0  # envelopes that were dropped without being known; counted, so that we notice
    history_mark: str | None = None  # what a compaction left at the head of the history (its digest); None: never compacted


class Agent(Protocol):
    name: str

    def recognises(self, request: Request, hints: Hints) -> bool: ...

    def identify(self, request: Request, hints: Hints, prior: Prior | None = None) -> Identity: ...


_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$")
_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


def hints_from_headers(headers: Mapping[str, str]) -> Hints:
    """The only reader of request headers. Values that don't look like ids are dropped, never kept as they are.

    `headers` must look names up case-insensitively (mitmproxy's and httpx's do).
    """
    trace = _TRACEPARENT.match(headers.get("traceparent", ""))
    session = next(
        (v for name in ("x-openclaw-session-id", "session_id", "session-id") if _ID.match(v := headers.get(name, ""))),
        None,
    )
    agent = f"{headers.get('user-agent', '')} {headers.get('originator', '')} {headers.get('x-app', '')}".lower()
    client = next(
        (name for name, mark in (("openclaw", "openclaw"), ("claude-code", "claude-cli"), ("codex", "codex")) if mark in agent),
        None,
    )
    return Hints(trace_id=trace.group(1) if trace else None, session_id=session, client=client)
