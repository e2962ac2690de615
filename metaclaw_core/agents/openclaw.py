"""OpenClaw: who speaks, in which session, and in what kind of turn.

Design: what is decided here comes from places that only the client writes: the session line at the end of
the system prompt or of the first user message, the carrier (a user message of its own that starts with a
fixed mark and whose data lines are JSON strings), fixed sentences at the start of a message. The same words
quoted elsewhere by a human or a tool mean nothing. The opening of a turn is found by walking back over tool
results, assistant messages and carriers to the last user message that somebody or something said.

Kinds beyond the obvious: HEARTBEAT is every turn that the machine started by itself (heartbeat, cron job,
reminder, finished command, restart, chatter in a room that nobody addressed to the agent). ANNOUNCE is every
message from another session, not only a subagent's result. TITLE is every call without tools that is no turn
of the conversation: title, label, image description, /btw question.

Limits: what the carrier alone tells is lost when the carrier is gone, so in later requests a message of
another session or a room's chatter looks like a human's (`human_texts`). A message sent while the agent works
shares the trace id of the turn it was steered into. A cron session shows its key and no id. /new keeps the
session's id and drops its history. Memory flush and titles were never seen on the wire.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from metaclaw_core.agents.base import Identity, Prior, Remembered
from metaclaw_core.agents.envelope import CARRIER, RUNTIME, Spoken, split_runtime, unwrap
from metaclaw_core.model import Hints, Kind, Message, Request, Role, Text

_STABLE = "<!-- openclaw:attempt:STABLE -->"
_DYNAMIC_END = "<!-- /openclaw:attempt:DYNAMIC -->"
_PERSONA = "You are a personal assistant running inside OpenClaw."
_SUMMARY = "The conversation history before this point was compacted into the following summary:"
_COMPACTION = "You are a context summarization assistant."
_SIDE_SYSTEMS = (
    "Generate a concise session title",
    "Generate a very short topic label",
    "Describe the image.",
    "You are answering an ephemeral /btw side question",
)
_LABELLING = "You are labeling the supplied message, not participating in its conversation."

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TOOL_IMAGE = "Attached image(s) from tool result:"  # the client's own message: the image a tool returned

_TASK = re.compile(r"^\[Subagent Task\]\n+(.*?)(?:\n+Begin\. Execute the assigned task to completion\.)?\s*\Z", re.DOTALL | re.MULTILINE)
_FROM_SESSION = (
    "A background task completed. Use this result",
    "[Internal task completion event]",
    "[Inter-session message] ",
    "[Subagent Context] ",
)
_FROM_SESSION_TAIL = re.compile(
    r"^\[Inter-session message\] [^\n]*isUser=false\nThis content was routed by OpenClaw [^\n]*\Z", re.MULTILINE
)
_FROM_SESSION_DATA = '\n"[Inter-session message] '  # in the carrier: the start of a data line
_ROOM_EVENT = "\n[OpenClaw room event]\n"  # in the carrier: a line of its own; data can't hold a bare newline

_MACHINE = re.compile(  # written without a date stamp, for the text holds the time itself
    r"Follow the heartbeat monitor scratch context when provided\.|Read HEARTBEAT\.md if it exists"
    r"|A scheduled (?:reminder has been|cron event was) triggered[.,]|An (?:approved )?async command "
    r"|\[cron:\S+ [^\]\n]*\] "
)
_MACHINE_TAIL = re.compile(r"\nCurrent time: [^\n]+\nReference UTC: \d{4}-\d\d-\d\d \d\d:\d\d UTC\Z")
_MACHINE_STAMPED = re.compile(
    r"\[OpenClaw (?:heartbeat poll|exec completion|cron wake|session (?:event|new|reset|[a-z]+))\]"
    r"|\[System\] (?:Your previous (?:turn was interrupted|reply was not delivered)|Continue from the recovered transcript)"
    r"|A new session was started via /new or /reset|Continue the OpenClaw runtime event\.\Z"
)


class _Said(NamedTuple):
    """A user message in which somebody or something speaks."""

    at: int  # in request.messages
    kind: Kind  # MAIN, ANNOUNCE or HEARTBEAT
    spoken: Spoken


class OpenClaw:
    name = "openclaw"

    def recognises(self, request: Request, hints: Hints) -> bool:
        return hints.client == "openclaw" or _is_agent(request) or _side_call(request) is not None

    def identify(self, request: Request, hints: Hints, prior: Prior | None = None) -> Identity:
        key, line_id = _runtime(request)
        session_id = hints.session_id or line_id or _body_session(request)
        side = _side_call(request)
        if side is None and key is None and not request.tools and not _is_agent(request):
            side = Kind.TITLE
        if side is not None:
            return Identity(self.name, side, session_id, key, None, (), False, hints.trace_id)
        if prior is not None:
            session_id, key = session_id or prior.session_id, key or prior.session_key
        said = tuple(_said(request.messages))
        last_work = _last_work(request.messages)
        opening: _Said | None = None
        humans: list[_Said] = []
        retry = False
        for one in said:
            retry = retry or (one.spoken.retry and one.at > last_work)
            if not _is_retry_notice(one):
                opening = one
                if one.kind is Kind.MAIN:
                    humans.append(one)
        if opening is None:
            return self._from_prior(request, hints, prior, session_id, key, retry)  # a chain: no head of a history

        kind = _addressed(opening, request.messages)
        if kind is Kind.MAIN and last_work > opening.at:
            kind = Kind.TOOL
        kind = _kind_of_session(key) or kind
        user_text, human_texts, human_at = None, tuple(s.spoken.text for s in humans), tuple(s.at for s in humans)
        if kind in (Kind.MAIN, Kind.TOOL):
            user_text = opening.spoken.text
        elif kind is Kind.SUBAGENT:
            user_text, human_texts, human_at = _task(said) or (prior.user_text if prior else None), (), ()
        elif opening.kind is Kind.MAIN:  # only the carrier or the session tells that no human said it
            human_texts, human_at = human_texts[:-1], human_at[:-1]
        return Identity(
            self.name,
            kind,
            session_id,
            key,
            user_text,
            human_texts,
            retry,
            hints.trace_id,
            unknown_preambles=opening.spoken.unknown,
            human_at=human_at,
            history_mark=_history_mark(request.messages),
        )

    def _from_prior(
        self, request: Request, hints: Hints, prior: Prior | None, session_id: str | None, key: str | None, retry: bool
    ) -> Identity:
        """A request that holds nothing but tool results or a retry notice: the history is at the provider."""
        of_session = _kind_of_session(key)
        if prior is None:
            return Identity(self.name, of_session or Kind.UNKNOWN, session_id, key, None, (), retry, hints.trace_id)
        kind = of_session or prior.kind
        if kind is Kind.MAIN and any(m.role is Role.TOOL for m in request.messages):
            kind = Kind.TOOL
        speaks = kind in (Kind.MAIN, Kind.TOOL, Kind.SUBAGENT)
        user_text = prior.user_text if speaks else None
        human_texts = (user_text,) if user_text is not None and kind is not Kind.SUBAGENT else ()
        return Identity(self.name, kind, session_id, key, user_text, human_texts, retry, hints.trace_id)


OPENCLAW = OpenClaw()


def conversation_of(request: Request) -> str | None:
    """What a compaction call asks to summarise, in the client's own transcript form ("[User]: …"); None: no such call."""
    if _side_call(request) is not Kind.COMPACTION:
        return None
    for message in request.messages:
        text = message.text
        if message.role is Role.USER and text.startswith("<conversation>\n"):
            end = text.rfind("\n</conversation>")
            return text[len("<conversation>\n") : end] if end >= 0 else None
    return None


# --- the session --------------------------------------------------------------------------------


def _leading(request: Request) -> Iterator[Message]:
    for message in request.messages:
        if message.role not in (Role.SYSTEM, Role.DEVELOPER):
            return
        yield message


def _is_agent(request: Request) -> bool:
    first = request.messages[0] if request.messages else None
    if first is None or first.role not in (Role.SYSTEM, Role.DEVELOPER):
        return False
    text = first.text
    return text.startswith(_STABLE) or _PERSONA in text[:200]


@lru_cache(maxsize=16)  # a system prompt is large, and the same in all requests of a session
def _session_line(text: str) -> re.Match[str] | None:
    head, mark, _ = text.rpartition(_DYNAMIC_END)
    return RUNTIME.fullmatch((head if mark else text).rstrip().rpartition("\n")[2])


def _runtime(request: Request) -> tuple[str | None, str | None]:
    """(session key, session id) of the session line, read only where the client writes it."""
    if not _is_agent(request):
        return None, None
    for message in _leading(request):
        if found := _session_line(message.text):
            return found[1], found[2]
    first = next((m for m in request.messages if m.role is Role.USER), None)
    texts = [p.text for p in first.parts if isinstance(p, Text)] if first else []
    line = split_runtime(texts[-1])[1] if texts else None
    return (line[1], line[2]) if line else (None, None)


def _body_session(request: Request) -> str | None:
    """Native Responses says it in the body, too."""
    named = request.metadata.get("openclaw_session_id")
    if isinstance(named, str) and _ID.fullmatch(named):
        return named
    cache_key = request.extra.get("prompt_cache_key")
    if isinstance(cache_key, str) and (found := re.fullmatch(r"([0-9a-f-]{36}):\d+", cache_key)):
        return found[1]
    return None


def _kind_of_session(key: str | None) -> Kind | None:
    if key is None:
        return None
    return Kind.SUBAGENT if ":subagent:" in key else Kind.HEARTBEAT if ":cron:" in key else None


def _side_call(request: Request) -> Kind | None:
    if request.tools:
        return None
    system = request.system or ""
    if system.startswith(_COMPACTION):
        return Kind.COMPACTION
    return Kind.TITLE if system.startswith(_SIDE_SYSTEMS) or _LABELLING in system else None


def _history_mark(messages: tuple[Message, ...]) -> str | None:
    """Digest of the summary that stands in for a compacted history: another compaction, another mark."""
    first = next((m for m in messages if m.role is Role.USER), None)
    if first is None or not first.text.startswith(_SUMMARY):
        return None
    summary = next(p.text for p in first.parts if isinstance(p, Text))
    return sha256(split_runtime(summary)[0].encode("utf-8", "surrogatepass")).hexdigest()


# --- who spoke ----------------------------------------------------------------------------------


def _said(messages: tuple[Message, ...]) -> Iterator[_Said]:
    first = True
    for index, message in enumerate(messages):
        if message.role is not Role.USER:
            continue
        if not first and len(message.parts) == 1 and isinstance(only := message.parts[0], Text):  # nearly all
            if (heard := _heard(only.text)) is not None:
                yield _Said(index, *heard)
            continue
        texts = [p.text for p in message.parts if isinstance(p, Text)]
        if first:
            first = False
            texts = [stripped for t in texts if (stripped := split_runtime(t)[0])]
            if not texts and len(message.parts) == 1:
                continue
        if len(texts) == 1:
            if (heard := _heard(texts[0])) is not None:
                yield _Said(index, *heard)
            continue
        own = [t for t in texts if not t.startswith(CARRIER)]
        if (texts and not own) or (own and own[0].startswith((_SUMMARY, _TOOL_IMAGE))):
            continue
        spoken = _joined([unwrap(text) for text in own])
        yield _Said(index, _speaker(spoken), spoken)


def _hear(text: str) -> tuple[Kind, Spoken] | None:
    """Who speaks in a user message of one text, and what is said; None: nobody does."""
    if text.startswith((CARRIER, _SUMMARY, _TOOL_IMAGE)):
        return None
    spoken = unwrap(text)
    return _speaker(spoken), spoken


_heard = Remembered(_hear, 1 << 20)


def _last_work(messages: tuple[Message, ...]) -> int:
    """Where the agent last said something or got a result; -1: nowhere."""
    for i in range(len(messages) - 1, -1, -1):
        if messages[i].role is Role.ASSISTANT or messages[i].role is Role.TOOL:
            return i
    return -1


def _joined(messages: list[Spoken]) -> Spoken:
    """Messages in a row are merged by the client into one with a part for each."""
    text = "\n".join(m.text for m in messages if m.text)
    return Spoken(text, any(m.stamped for m in messages), any(m.retry for m in messages), sum(m.unknown for m in messages))


def _speaker(spoken: Spoken) -> Kind:
    text = spoken.text
    if text.startswith(_FROM_SESSION) or _ends_with(text, "[Inter-session message] ", _FROM_SESSION_TAIL):
        return Kind.ANNOUNCE
    if _MACHINE_STAMPED.match(text):
        return Kind.HEARTBEAT
    if not spoken.stamped and (_MACHINE.match(text) or _ends_with(text, "\nCurrent time: ", _MACHINE_TAIL)):
        return Kind.HEARTBEAT
    return Kind.MAIN


def _ends_with(text: str, start: str, tail: re.Pattern[str]) -> bool:
    """Does `text` end with `tail`, which begins with `start`? A pasted text can be large, so no regex searches it."""
    at = text.rfind(start)
    return at >= 0 and tail.match(text, at) is not None


def _addressed(opening: _Said, messages: tuple[Message, ...]) -> Kind:
    """The opening's kind, corrected by the carrier that belongs to it (the last one after it)."""
    if opening.kind is not Kind.MAIN:
        return opening.kind
    for message in reversed(messages[opening.at + 1 :]):
        if message.role is Role.USER and (text := message.text).startswith(CARRIER):
            if _FROM_SESSION_DATA in text:
                return Kind.ANNOUNCE
            return Kind.HEARTBEAT if _ROOM_EVENT in text else Kind.MAIN
    return Kind.MAIN


def _is_retry_notice(said: _Said) -> bool:
    """The client's "Continue the current task…" as a message of its own; the human's message stands before it."""
    return said.spoken.retry and not said.spoken.text


def _task(said: tuple[_Said, ...]) -> str | None:
    for one in reversed(said):
        if found := _TASK.search(one.spoken.text):
            return found[1]
    return None
