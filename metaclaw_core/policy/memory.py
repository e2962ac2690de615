"""What was said before: the sampled tokens of a session's replies, and the conversation behind a response id.

Design: read from memory, else from the policy's file, else (conversations only) from the store, which also knows the
answers that an upstream gave. The file has a thread of its own, and the store another, so the event loop never waits, nor
does an answer for a store that is locked. In memory a reply that held a secret is still known, on disk it is not.

Limits: memory holds the last `SESSIONS` sessions; the store is a few seconds behind, so a conversation that is not found
is looked for again for `PATIENCE` seconds.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from metaclaw_core.model import Message
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.samplefile import Reply, Response, Sample, SampleFile, continued
from metaclaw_core.store.tables import turns
from metaclaw_core.store.types import plain

SESSIONS = 256
CONVERSATIONS = 256
PATIENCE = 3.0  # seconds; ingest runs every two
_PAUSE = 0.5


class SessionTokens:
    """Satisfies `render.Known`."""

    def __init__(self, tokens: Mapping[str, Sequence[int]] | None = None) -> None:
        self._tokens = {key: array("i", ids) for key, ids in (tokens or {}).items()}

    def tokens_of(self, key: str) -> Sequence[int] | None:
        return self._tokens.get(key)

    def add(self, reply: Reply) -> None:
        self._tokens[reply.key] = array("i", reply.tokens)


@dataclass(frozen=True, slots=True)
class Past:
    messages: tuple[Message, ...]
    ours: bool  # the answer is in our own file, so the next one can refer to it


class Memory:
    """Methods are called on one event loop. Raises StoreError where the file can't be used."""

    def __init__(self, path: Path, store_target: str | Path) -> None:
        """`store_target`: as `open_store` takes it; opened when it is first needed."""
        self._file = SampleFile(path)
        self._target = store_target
        self._store: Store | None = None
        self._thread = ThreadPoolExecutor(1, "metaclaw-file")
        self._store_thread = ThreadPoolExecutor(1, "metaclaw-store")
        self._sessions: OrderedDict[str, SessionTokens] = OrderedDict()
        self._conversations: OrderedDict[tuple[str, str], tuple[Message, ...]] = OrderedDict()
        self._forgotten = self._file.forgotten()

    async def close(self) -> None:
        await self._off(self._file.close)
        await asyncio.get_running_loop().run_in_executor(self._store_thread, self._close_store)
        self._thread.shutdown(wait=False)
        self._store_thread.shutdown(wait=False)

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()

    async def _off[T](self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def tokens(self, session: str | None) -> SessionTokens:
        """Of a session; without a name nothing is known."""
        if session is None:
            return SessionTokens()
        known = self._sessions.get(session)
        if known is None:
            read = SessionTokens(await self._off(self._file.replies, session))
            known = self._sessions.setdefault(session, read)
        self._sessions.move_to_end(session)
        while len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        return known

    async def past(self, principal: str, response_id: str) -> Past | None:
        """The conversation up to and including that answer; None: nobody here knows it."""
        if (held := self._conversations.get((principal, response_id))) is not None:
            return Past(held, ours=True)
        own = await self._off(self._file.conversation, principal, response_id)
        if own is not None:
            return Past(own, ours=True)
        for wait in (0.0, *[_PAUSE] * int(PATIENCE / _PAUSE)):
            await asyncio.sleep(wait)
            work = asyncio.get_running_loop().run_in_executor(self._store_thread, self._from_store, principal, response_id)
            if (found := await work) is not None:
                return Past(found, ours=False)
        return None

    def _from_store(self, principal: str, response_id: str) -> tuple[Message, ...] | None:
        if self._store is None:
            self._store = open_store(self._target)
        query = (
            select(turns.c.response_tip)
            .where(turns.c.principal == principal, turns.c.response_id == plain(response_id))
            .where(turns.c.history_known.is_(True), turns.c.response_tip.is_not(None))
            .order_by(turns.c.id.desc())
            .limit(1)
        )
        with self._store.reading() as connection:
            tip = connection.scalar(query)
        return None if tip is None else self._store.conversation(tip)

    async def keep(
        self, session: str | None, sample: Sample | None, reply: Reply | None, response: Response | None, *, secret: bool
    ) -> None:
        """On disk when this returns. A reply that holds a `secret` stays in memory only."""
        if reply is not None and session is not None and session in self._sessions:
            self._sessions[session].add(reply)
        parent = response.parent if response is not None else None
        if response is not None:
            before = self._conversations.get((response.principal, parent)) if parent is not None else ()
            if before is not None:
                self._conversations[response.principal, response.id] = continued(before, response.messages)
            while len(self._conversations) > CONVERSATIONS:
                self._conversations.popitem(last=False)
        await self._off(self._file.keep, session, sample, None if secret else reply, response)

    async def look_after(self, now: float, *, prune: bool) -> None:
        """Follow a purge; with `prune` also forget what is too old."""
        forgotten = await self._off(self._file.forgotten)
        if forgotten != self._forgotten:
            self._forgotten = forgotten
            self._sessions.clear()
            self._conversations.clear()
        if prune:
            await self._off(self._file.prune, now)
