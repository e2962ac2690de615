"""What we know of a client: the protocol of an agent module, and what it answers.

Design: an agent module is pure: it sees one parsed request, the few hints taken from its headers and,
where the request continues a provider-side chain, what is known of the response it continues. It
keeps no state. What only history can tell (prefix sessions, inherited kinds) is the caller's: the
store at ingest, the proxy's session state on the hot path.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
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
    human_at: tuple[int, ...] = ()  # for each of human_texts its place in request.messages; () where they are not there
    history_mark: str | None = None  # what a compaction left at the head of the history (its digest); None: never compacted


class Agent(Protocol):
    name: str

    def recognises(self, request: Request, hints: Hints) -> bool: ...

    def identify(self, request: Request, hints: Hints, prior: Prior | None = None) -> Identity: ...


_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$")
_SESSION_HEADERS = ("x-openclaw-session-id", "session_id", "session-id")
_CLIENTS = (("openclaw", "openclaw"), ("claude-code", "claude-cli"), ("codex", "codex"))
_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


def hints_from_headers(headers: Mapping[str, str]) -> Hints:
    """The only reader of request headers. Values that don't look like ids are dropped, never kept as they are.

    `headers` must look names up case-insensitively (mitmproxy's and httpx's do).
    """
    trace = _TRACEPARENT.match(headers.get("traceparent", ""))
    session = client = None
    for name in _SESSION_HEADERS:
        if (value := headers.get(name)) and _ID.match(value):
            session = value
            break
    agent = f"{headers.get('user-agent', '')} {headers.get('originator', '')} {headers.get('x-app', '')}".lower()
    for name, mark in _CLIENTS:
        if mark in agent:
            client = name
            break
    return Hints(trace_id=trace.group(1) if trace else None, session_id=session, client=client)


class Remembered[T]:
    """A pure function of a text that remembers its last answers, for an agent sends its history with every request.

    Bounded in characters; the oldest go first. For several threads.
    """

    def __init__(self, function: Callable[[str], T], chars: int) -> None:
        self._function = function
        self._answers: dict[str, T] = {}
        self._room = chars
        self._lock = threading.Lock()

    def __call__(self, text: str) -> T:
        try:
            return self._answers[text]
        except KeyError:
            answer = self._function(text)
        with self._lock:
            if text not in self._answers:
                self._answers[text] = answer
                self._room -= len(text) + 64
            while self._room < 0:
                oldest = next(iter(self._answers))
                del self._answers[oldest]
                self._room += len(oldest) + 64
        return answer
