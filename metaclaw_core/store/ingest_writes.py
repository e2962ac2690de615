"""Rows of a batch that wait to be inserted together, a statement for each kind of row.

Design: a statement for many rows costs a fraction of one for each. Who looks something up that a waiting row may hold
calls `flush` first. Histories and blobs may have been written by somebody else meanwhile, and then stay as they
are; a turn or an answer that has is an IntegrityError, since what was decided of it no longer holds.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert

from metaclaw_core.model import Json, Role
from metaclaw_core.store.chain import pack_message
from metaclaw_core.store.ingest_chain import Chain
from metaclaw_core.store.queries import insert_new
from metaclaw_core.store.sessions import touch
from metaclaw_core.store.tables import blobs, messages, turns

_NEW_MESSAGES = insert(messages)
_NEW_TURNS = insert(turns)


class Writes:
    def __init__(self, connection: Connection) -> None:
        self._db = connection
        self._sessions: dict[str, dict[str, Any]] = {}
        self._messages: list[dict[str, Any]] = []
        self._answers: list[dict[str, Any]] = []
        self._blobs: dict[str, dict[str, Any]] = {}
        self._turns: list[dict[str, Any]] = []

    def session(self, row: dict[str, Any]) -> None:
        """As ``sessions.touch`` does with one after the other."""
        before = self._sessions.setdefault(row["id"], row)
        if before is not row:
            before["first_at"] = min(before["first_at"], row["first_at"])
            before["last_at"] = max(before["last_at"], row["last_at"])
            if before["session_key"] is None:
                before["session_key"] = row["session_key"]

    def messages(self, chain: Chain, places: list[int]) -> None:
        for place in places:
            message = chain.messages[place]
            parent = chain.ids[place - 1] if place else chain.parent
            row = {"id": chain.ids[place], "parent": parent, "role": message.role.value, "content": pack_message(message)}
            self._messages.append(row)

    def answer(self, tip: str, parent: str | None, content: Json) -> None:
        self._answers.append({"id": tip, "parent": parent, "role": Role.ASSISTANT.value, "content": content})

    def blob(self, key: str, content: Json) -> None:
        self._blobs[key] = {"id": key, "content": content}

    def turn(self, row: dict[str, Any]) -> None:
        self._turns.append(row)

    def flush(self) -> None:
        """In the order in which rows refer to each other."""
        touch(self._db, list(self._sessions.values()))
        insert_new(self._db, messages, self._messages)
        insert_new(self._db, blobs, list(self._blobs.values()))
        if self._answers:
            self._db.execute(_NEW_MESSAGES, self._answers)
        if self._turns:
            self._db.execute(_NEW_TURNS, self._turns)
        self._sessions, self._messages, self._answers, self._blobs, self._turns = {}, [], [], {}, []
