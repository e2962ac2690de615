"""Statements that more than one module of the store needs, the same on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import batched
from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, Select, Table, Text, bindparam, case, literal, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.dml import Insert as PostgresInsert
from sqlalchemy.dialects.sqlite.dml import Insert as SqliteInsert
from sqlalchemy.sql.dml import ReturningInsert

from metaclaw_core.errors import StoreError
from metaclaw_core.model import Message, Role
from metaclaw_core.store.chain import unpack_message
from metaclaw_core.store.tables import counters, messages, turns

MANY = 500  # values in one IN list


def upsert(dialect: str, table: Table) -> SqliteInsert | PostgresInsert:
    """An INSERT that can say ON CONFLICT, which SQLAlchemy has per database only."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


@cache  # building a statement takes longer than running it
def _insert_new(dialect: str, table: Table) -> SqliteInsert | PostgresInsert:
    return upsert(dialect, table).on_conflict_do_nothing()


@cache
def _insert_one(dialect: str, table: Table) -> ReturningInsert[Any]:
    return _insert_new(dialect, table).returning(table.c.id)


def insert_new(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert what isn't there; rows of another writer stay as they are."""
    if rows:
        connection.execute(_insert_new(connection.dialect.name, table), rows)


def insert_one(connection: Connection, table: Table, row: dict[str, Any]) -> bool:
    """The same for one row; False if it was there."""
    return connection.execute(_insert_one(connection.dialect.name, table), row).first() is not None


_KNOWN = select(messages.c.id).where(messages.c.id.in_(bindparam("ids", expanding=True)))


def known_messages(connection: Connection, ids: Iterable[str]) -> Iterator[str]:
    """Those of `ids` that are in the database."""
    return _those_of(connection, _KNOWN, ids)


_FLOWS = select(turns.c.flow_id).where(turns.c.flow_id.in_(bindparam("ids", expanding=True)))
_CONTENTS = select(turns.c.content_key).where(turns.c.content_key.in_(bindparam("ids", expanding=True)))
_TURN_IDS = select(turns.c.turn_id).distinct().where(turns.c.turn_id.in_(bindparam("ids", expanding=True)))


def recorded(connection: Connection, flow_ids: Iterable[str], content_keys: Iterable[str]) -> tuple[set[str], set[str]]:
    """Those of `flow_ids` and of `content_keys` that a turn has."""
    return set(_those_of(connection, _FLOWS, flow_ids)), set(_those_of(connection, _CONTENTS, content_keys))


def with_turn_id(connection: Connection, turn_ids: Iterable[str]) -> Iterator[str]:
    """Those of `turn_ids` that a turn has."""
    return _those_of(connection, _TURN_IDS, turn_ids)


def _those_of(connection: Connection, query: Select[Any], ids: Iterable[str]) -> Iterator[str]:
    for some in batched(ids, MANY):
        yield from connection.scalars(query, {"ids": list(some)})


@cache
def _add(dialect: str) -> SqliteInsert | PostgresInsert:
    insert = upsert(dialect, counters)
    total = {"value": counters.c.value + insert.excluded.value}
    return insert.on_conflict_do_update(index_elements=["name"], set_=total)


def add_to_counter(connection: Connection, name: str, value: int) -> None:
    connection.execute(_add(connection.dialect.name), {"name": name, "value": value})


def load_chain(connection: Connection, tip: str | None, role: Role | None = None) -> tuple[Message, ...]:
    """The conversation that ends with `tip`, oldest message first; () for None. With `role` only its messages, and no other
    is unpacked. Raises StoreError if a message is missing."""
    if tip is None:
        return ()
    rows = connection.execute(_chain_of(role), {"tip": tip}).all()
    if not rows or rows[0].parent is not None:
        raise StoreError(f"The conversation that ends with {tip} has a gap; `metaclaw store verify` names it.")
    return tuple(unpack_message(row.role, row.content) for row in rows if role is None or row.role == role.value)


@cache
def _chain_of(role: Role | None) -> Select[Any]:
    """All rows of a chain, oldest first; `content` is NULL for those of another role."""
    walk = (
        select(messages.c.id, messages.c.parent, literal(0, Integer).label("depth"))
        .where(messages.c.id == bindparam("tip", type_=Text))
        .cte("walk", recursive=True)
    )
    walk = walk.union_all(
        select(messages.c.id, messages.c.parent, (walk.c.depth + 1).label("depth")).where(
            messages.c.id == walk.c.parent
        )
    )
    content: ColumnElement[Any] = messages.c.content
    if role is not None:
        content = case((messages.c.role == role.value, messages.c.content)).label("content")
    return select(messages.c.role, content, messages.c.parent).join(walk, walk.c.id == messages.c.id).order_by(walk.c.depth.desc())
