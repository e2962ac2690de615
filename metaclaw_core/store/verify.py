"""Is the store what it says it is? Every hash derived again, every reference followed.

A hash that doesn't fit its content means damage, or a change to `chain.canonical_pieces` without a new
prefix; a missing parent means that something was deleted from under a conversation. Nothing is repaired.

Limits: reads every message once; the whole takes about as long as reading the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, LargeBinary, func, select, type_coerce

from metaclaw_core.errors import StoreError
from metaclaw_core.store.chain import blob_id, rederived, unpack_message
from metaclaw_core.store.tables import blobs, messages, turns
from metaclaw_core.store.types import unpack

_MAX_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class VerifyReport:
    messages: int  # examined
    turns: int
    problems: tuple[str, ...]  # sentences, the first 100
    found: int  # problems in all


class _Problems:
    """Keeps the first ones and counts them all."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.count = 0

    def append(self, problem: str) -> None:
        self.count += 1
        if self.count <= _MAX_PROBLEMS:
            self.kept.append(problem)


def verify(connection: Connection) -> VerifyReport:
    problems = _Problems()
    examined = 0
    raw = type_coerce(messages.c.content, LargeBinary).label("content")  # unpacked here, so that damage has a name
    every = select(messages.c.id, messages.c.parent, messages.c.role, raw)
    for row in connection.execution_options(yield_per=200).execute(every):
        examined += 1
        try:
            derived = rederived(row.id, row.parent, unpack_message(row.role, unpack(bytes(row.content))))
        except (KeyError, TypeError, ValueError, StoreError) as e:
            problems.append(f"message {row.id} can't be read: {type(e).__name__}: {e}")
            continue
        if derived != row.id:
            problems.append(f"message {row.id} has content that hashes to {derived}")
    raw = type_coerce(blobs.c.content, LargeBinary).label("content")
    for row in connection.execution_options(yield_per=200).execute(select(blobs.c.id, raw)):
        try:
            derived = blob_id(unpack(bytes(row.content)))
        except StoreError as e:
            problems.append(f"blob {row.id} can't be read: {e}")
            continue
        if derived != row.id:
            problems.append(f"blob {row.id} has content that hashes to {derived}")
    parent = messages.alias("parent")
    orphans = (
        select(messages.c.id, messages.c.parent)
        .outerjoin(parent, parent.c.id == messages.c.parent)
        .where(messages.c.parent.is_not(None), parent.c.id.is_(None))
    )
    for row in connection.execute(orphans):
        problems.append(f"message {row.id} follows {row.parent}, which is missing")
    for table, names in (
        (messages, ("system_tip", "prompt_tip", "response_tip")),
        (blobs, ("tools", "extra", "injection")),
    ):
        for name in names:
            column = turns.c[name]
            lost = (
                select(turns.c.id, column.label("missing"))
                .outerjoin(table, table.c.id == column)
                .where(column.is_not(None), table.c.id.is_(None))
            )
            for row in connection.execute(lost):
                problems.append(f"turn {row.id}: its {name} {row.missing} is missing")
    counted = connection.scalar(select(func.count()).select_from(turns)) or 0
    return VerifyReport(examined, counted, tuple(problems.kept), problems.count)
