"""One request, rewritten or left alone: parse, identify, plan, splice.

Design: pure apart from the session table. The answer is a value; the addon assigns it to the flow in
one step. Only a new human turn is retrieved for; its tool loop, its retries and every later request
of the session get the session's block as it is. Whatever can't be proven leaves the body alone and is
counted under its reason.

With ``skills.placement: turn``, and always in rl mode, what is added to a session's block later stands beside the
message it was chosen for, in this request and in every later one that has the message, the same bytes each time: no
byte in front of it changes.

An epoch ends where the provider's cache is lost anyway or the block must not live on: after a
compaction, after an idle time, when most of the history is gone, or when a skill of the block has left
the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple
from weakref import WeakValueDictionary

from metaclaw_core.agents import identify
from metaclaw_core.agents.base import Identity, Prior
from metaclaw_core.errors import SpliceError, WireError
from metaclaw_core.model import Hints, Injection, Kind, Request, Role
from metaclaw_core.prefix import Likeness
from metaclaw_core.proxy.recent import Recent
from metaclaw_core.proxy.sessions import MAX_TEXTS, Sessions, SessionSink, SessionState, session_key
from metaclaw_core.redact import redact_text
from metaclaw_core.settings import Settings
from metaclaw_core.skills.index import Hit, Index
from metaclaw_core.skills.inject import Block, SkillText, addition, plan
from metaclaw_core.skills.retrieve import Options, Retriever, create_retriever
from metaclaw_core.wire import splice
from metaclaw_core.wire.base import Dialect, Slot
from metaclaw_core.wire.beside import slot_beside
from metaclaw_core.wire.reread import Reading

_SERVED = (Kind.MAIN, Kind.TOOL, Kind.SUBAGENT)
_TOUCH_SECONDS = 60.0
RETRIEVAL_SECONDS = 2.0  # a client waits no longer for its skills, whatever the retriever
_LISTED = re.compile(r"<name>([^<\n]{1,64})</name>")


@dataclass(frozen=True, slots=True)
class Rewritten:
    """`body` None: send the client's own bytes. `reason` says why, for the counters; None where a block went in."""

    body: bytes | None
    reason: str | None  # one of few, whatever the client sends
    identity: Identity | None = None
    session: str | None = None
    injection: Injection | None = None
    detail: str | None = None  # more about the reason
    like: Likeness | None = None  # of the client's body to one before it


class Beside(NamedTuple):
    """A text that stands beside what the human said, and how his message is known again."""

    at: int  # the how manieth of the human's texts; -1: the request did not hold those before it
    said: str  # digest of his words
    turn: str  # digest of the turn it was chosen for
    text: str


def prior_of(identity: Identity) -> Prior:
    return Prior(identity.session_id, identity.session_key, identity.kind, identity.user_text, identity.trace)


class Rewriter:
    """`rewrite` is a coroutine for the sake of retrievers that ask over the network; the default never waits."""

    def __init__(
        self, settings: Settings, sessions: Sessions, sink: SessionSink, retriever: Retriever | None = None
    ) -> None:
        """`retriever`: in place of the settings' own. Raises ConfigError for an unknown retrieval mode."""
        self._skills = settings.skills
        self._adds_beside = settings.skills.placement == "turn" or settings.mode == "rl"
        self._sessions = sessions
        self._sink = sink
        self._retriever = retriever or create_retriever(
            self._skills.retrieval_mode,
            Options(
                task_specific_top_k=self._skills.task_specific_top_k,
                embedding_url=self._skills.embedding_url,
                embedding_model=self._skills.embedding_model,
                embedding_api_key=self._skills.embedding_api_key,
            ),
        )
        self._waits = getattr(self._retriever, "waits", True)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._recent = Recent()
        self.patience = RETRIEVAL_SECONDS
        self.note: str | None = None  # why the last retrieval fell back to TF-IDF, or failed

    async def aclose(self) -> None:
        await self._retriever.aclose()

    def forget(self) -> None:
        """Drop the requests that are kept to read the next ones by."""
        self._recent = Recent()

    async def rewrite(
        self, dialect: Dialect, body: bytes, path: str, hints: Hints, principal: str, index: Index | None
    ) -> Rewritten:
        """`body` is decoded. Never raises for what a client sends."""
        try:
            reading, like = self._recent.read(dialect, body, path, principal)
        except WireError:
            return Rewritten(None, "passed: not a request of its dialect")
        request = reading.request
        identity = identify(request, hints, self._sessions.prior(principal, request.previous_response_id))
        if identity.kind not in _SERVED:
            return Rewritten(None, f"side turn: {identity.kind}", identity, like=like)
        name = identity.session_id or _generic_session(request)
        key = session_key(principal, name)
        state = self._sessions.get(key)
        if state is not None and identity.kind is Kind.TOOL and key not in self._locks:  # nothing is planned within a turn
            self._touch(key, state, state.messages if request.previous_response_id else len(request.messages))
        elif not self._waits and key not in self._locks:
            state = await self._plan(key, reading, identity, index)
        else:
            # One at a time for each session: two first requests side by side must not choose two blocks.
            async with self._locks.setdefault(key, asyncio.Lock()):
                state = await self._plan(key, reading, identity, index)
        if identity.session_id != name:
            identity = replace(identity, session_id=name)  # so that a response id leads the client's next request here
        self._recent.keep(key, principal, reading)
        if not state.block or not self._skills.enabled:
            return Rewritten(None, "nothing to add", identity, key, like=like)
        try:
            slot = reading.slot()
            if splice.has_block(body, slot):
                return Rewritten(None, "passed: injected already", identity, key)
            new = body
            pieces = [(slot, state.block), *_beside(reading, identity, state)]
            for place, text in sorted(pieces, key=lambda piece: piece[0].at, reverse=True):
                new = splice.insert(new, place, splice.render_block(text))
        except SpliceError as e:
            return Rewritten(None, "passed: no proven place for a block", identity, key, detail=str(e))
        injection = Injection(_whole(state), tuple(state.skills), state.generation, tuple(state.scores))
        return Rewritten(new, None, identity, key, injection, like=like)

    def _touch(self, key: str, state: SessionState, messages: int) -> None:
        """A request that changes nothing but these two; the file may lag behind by a minute."""
        now = time.time()
        stale = now - state.used_at > _TOUCH_SECONDS
        state.messages, state.used_at = messages, now
        if stale:
            self._sessions.put(key, state, self._sink)

    async def _plan(self, key: str, reading: Reading, identity: Identity, index: Index | None) -> SessionState:
        now, request = time.time(), reading.request
        state = self._sessions.get(key)
        if state is None:
            state = SessionState(identity.session_id, identity.session_key)
        # A trace id alone is not one turn: what a person adds while the agent works shares it.
        turn = _digest(f"{identity.trace or len(identity.human_texts)}\n{identity.user_text}")
        fresh = identity.kind is not Kind.TOOL and turn != state.turn and not (identity.retry and state.turn)
        if fresh and identity.user_text and index is not None:
            if request.previous_response_id:
                texts = [*state.texts, identity.user_text]
            else:
                texts = list(identity.human_texts) or [identity.user_text]  # a subagent has a task, and no human
            hits = await self._found(texts, index)
            if self._epoch_ended(state, request, identity, index, now):
                state.epoch, state.block, state.skills, state.scores, state.appends = state.epoch + 1, "", [], [], 0
                state.beside = []
            state.turn = turn
            self._choose(state, reading, identity, hits, index)
            if not request.previous_response_id:
                state.mark = identity.history_mark
            if request.dialect == "openai_responses":  # the only one whose later requests may lack the history
                state.texts = [redact_text(text[:2000]) for text in texts[-MAX_TEXTS:]]
            state.used_at = 0.0  # changed: to be saved
        messages = state.messages if request.previous_response_id else len(request.messages)
        if self._sessions.get(key) is None:
            state.used_at = 0.0
        self._touch(key, state, messages)
        return state

    def _epoch_ended(self, state: SessionState, request: Request, identity: Identity, index: Index, now: float) -> bool:
        if not state.block:
            return False
        whole = not request.previous_response_id  # a delta shows neither the summary nor how long the history is
        return (
            (whole and identity.history_mark != state.mark)
            or now - state.used_at > self._skills.idle_minutes * 60
            or (whole and len(request.messages) < state.messages // 2)
            or any(name not in index for name in state.skills)
        )

    async def _found(self, texts: list[str], index: Index) -> Sequence[Hit]:
        """The skills for these turns; none where the retriever fails, and the session keeps the block it has."""
        try:
            looking = self._retriever.retrieve(texts, index, self._skills.top_k)
            found = await (asyncio.wait_for(looking, self.patience) if self._waits else looking)
        except Exception as e:  # noqa: BLE001 - the boundary to retrievers, which needn't be ours
            self.note = f"retrieval failed: {e!r}"
            return ()
        self.note = found.note
        return found.hits

    def _choose(
        self, state: SessionState, reading: Reading, identity: Identity, hits: Sequence[Hit], index: Index
    ) -> None:
        def lookup(name: str) -> SkillText | None:
            skill = index.skill(name)
            return SkillText(skill.name, skill.description, skill.body) if skill else None

        before = _whole(state)
        block = plan(
            Block(before, tuple(state.skills), state.appends, tuple(state.scores)),
            hits,
            lookup,
            top_k=self._skills.top_k,
            max_tokens=self._skills.max_injected_tokens,
            listed=_listed(reading.request.system or ""),
        )
        if block.inner != before:
            beside = _place(reading, identity, state, addition(before, block.inner)) if self._adds_beside and before else None
            if beside is not None:
                state.beside = [*state.beside, beside]
            else:
                state.block = sys.intern(state.block + block.inner[len(before) :])  # many sessions have the same
            state.skills, state.scores, state.appends = list(block.skills), list(block.scores), block.appends
            state.generation = index.generation


def _whole(state: SessionState) -> str:
    """All that a session's requests are given."""
    return "\n\n".join((state.block, *(text for _, _, _, text in state.beside)))


def _place(reading: Reading, identity: Identity, state: SessionState, text: str) -> Beside | None:
    """`text` beside the newest of the human's words; None where they have no place in the body: a subagent's task, say."""
    if not identity.human_texts or len(identity.human_at) != len(identity.human_texts) or identity.human_texts[-1] != identity.user_text:
        return None
    try:
        slot_beside(reading, identity.human_at[-1])
    except SpliceError:
        return None
    at = -1 if reading.request.previous_response_id else len(identity.human_at) - 1
    return Beside(at, _digest(identity.human_texts[-1]), state.turn or "", text)


def _beside(reading: Reading, identity: Identity, state: SessionState) -> list[tuple[Slot, str]]:
    """The texts that stand beside what was said, with their places. One whose message isn't there, or can't be told from
    another of the same words, is left out: so is one that the provider keeps with the history."""
    if not state.beside or len(identity.human_at) != len(identity.human_texts):
        return []
    said = [_digest(words) for words in identity.human_texts]
    found: list[tuple[Slot, str]] = []
    for beside in map(Beside._make, state.beside):
        places = [i for i, digest in enumerate(said) if digest == beside.said]
        if reading.request.previous_response_id:
            places = places[-1:] if beside.turn == state.turn else []
        elif beside.at in places:
            places = [beside.at]
        if len(places) == 1:
            with contextlib.suppress(SpliceError):
                found.append((slot_beside(reading, identity.human_at[places[0]]), beside.text))
    return found


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _generic_session(request: Request) -> str:
    """For clients without a session id: the system prompt and the first human message stay the same."""
    first = next((m.text for m in request.messages if m.role is Role.USER), "")
    return _prefix_session(request.system, first)


# Both are asked for the same system prompt again and again, which may be large.


@lru_cache(maxsize=8)
def _prefix_session(system: str | None, first: str) -> str:
    return "p-" + _digest(f"{system}\n{first}")


@lru_cache(maxsize=8)
def _listed(system: str) -> frozenset[str]:
    """The skills that the client lists itself."""
    return frozenset(_LISTED.findall(system))
