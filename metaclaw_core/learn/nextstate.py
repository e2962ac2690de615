"""What was asked, and what came of the answer: the results of its tools, or what the human said next.

Design: clients send the whole history with each request, so the next request of the session shows the
answer again and behind it what happened. The answer is looked for by content, not by its chain id:
clients move and rewrite other messages, and each of these gives all that follow new ids. Where the
answer is not to be found (a compaction rewrote the history), what the human said next in the session
is still what came of an answer without tool calls.

Limits: only the next few requests of the session are looked at, and only the last messages of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, Integer, Row, and_, literal, select

from metaclaw_core.model import Kind, Message, Role, ToolResult
from metaclaw_core.store.chain import canonical_pieces, unpack_message
from metaclaw_core.store.tables import messages, turns

SCORED_KINDS = (Kind.MAIN.value, Kind.TOOL.value, Kind.SUBAGENT.value)
_REQUESTS = 6
_MESSAGES = 64


@dataclass(frozen=True, slots=True)
class NextState:
    results: tuple[ToolResult, ...]  # in the order of the calls
    human: str | None  # without the client's envelope; None: the human has not spoken yet


def follows(later: FromClause, earlier: FromClause) -> ColumnElement[bool]:
    """Whether turn `later` can show what came of turn `earlier`."""
    return and_(
        later.c.session == earlier.c.session,
        later.c.started_at > earlier.c.started_at,
        later.c.kind.in_(SCORED_KINDS),
        later.c.prompt_tip != earlier.c.prompt_tip,  # the same again is a retry
    )


def next_state(connection: Connection, row: Mapping[str, Any], answer: Message) -> NextState | None:
    """What came of `answer`, the one of turn `row`; None: nothing is known yet."""
    if row["session"] is None:
        return None
    earlier = turns.alias()
    candidates = connection.execute(
        select(turns)
        .join(earlier, follows(turns, earlier))
        .where(earlier.c.id == row["id"])
        .order_by(turns.c.started_at, turns.c.id)
        .limit(_REQUESTS)
    ).all()
    for candidate in candidates:
        after = _behind(_tail(connection, candidate.prompt_tip), answer)
        human = _human(candidate, row)
        if after is not None:
            results = tuple(r for m in after for r in m.tool_results)
            spoke = human if any(m.role is Role.USER for m in after) else None
            if results or spoke is not None:
                return NextState(results, spoke)
        elif human is not None and not answer.tool_calls and not candidate.retry:
            return NextState((), human)
    return None


def instruction_of(connection: Connection, row: Mapping[str, Any]) -> str | None:
    """What the human asked for with this turn; a continuation may not repeat it. None: not known."""
    if row["user_text"] is not None or row["turn_id"] is None:
        return row["user_text"]  # type: ignore[no-any-return]
    query = select(turns.c.user_text).where(turns.c.turn_id == row["turn_id"], turns.c.user_text.is_not(None)).limit(1)
    text: str | None = connection.scalar(query)
    return text


def said_before(connection: Connection, row: Mapping[str, Any]) -> str | None:
    """What the human had said before this turn."""
    if row["session"] is None:
        return None
    query = (
        select(turns.c.user_text)
        .where(
            turns.c.session == row["session"],
            turns.c.started_at < row["started_at"],
            turns.c.kind == "main",
            turns.c.user_text.is_not(None),
            turns.c.turn_id != row["turn_id"],
        )
        .order_by(turns.c.started_at.desc(), turns.c.id.desc())
        .limit(1)
    )
    text: str | None = connection.scalar(query)
    return text


def _human(candidate: Row[Any], row: Mapping[str, Any]) -> str | None:
    """What the human said with `candidate`, if that is not what `row` answers already."""
    new = candidate.kind == Kind.MAIN and candidate.turn_id != row["turn_id"]
    return candidate.user_text if new else None


def _tail(connection: Connection, tip: str) -> list[Message]:
    """The last messages of a conversation, oldest first."""
    walk = select(messages.c.id, messages.c.parent, literal(0, Integer).label("depth")).where(messages.c.id == tip)
    steps = walk.cte("walk", recursive=True)
    steps = steps.union_all(
        select(messages.c.id, messages.c.parent, (steps.c.depth + 1).label("depth"))
        .where(messages.c.id == steps.c.parent)
        .where(steps.c.depth < _MESSAGES)
    )
    rows = connection.execute(
        select(messages.c.role, messages.c.content)
        .join(steps, steps.c.id == messages.c.id)
        .order_by(steps.c.depth.desc())
    )
    return [unpack_message(row.role, row.content) for row in rows]


def _behind(history: Sequence[Message], answer: Message) -> list[Message] | None:
    """What stands behind the last message that is `answer`, up to the next answer; None: it isn't there."""
    for place in range(len(history) - 1, -1, -1):
        if history[place].role is Role.ASSISTANT and _same(history[place], answer):
            after = []
            for message in history[place + 1 :]:
                if message.role is Role.ASSISTANT:
                    break
                after.append(message)
            return after
    return None


def _same(one: Message, other: Message) -> bool:
    """Equal calls, and equal text unless there are calls: clients trim or drop the words beside a call."""
    if one.tool_calls or other.tool_calls:
        return canonical_pieces(Message(Role.ASSISTANT, one.tool_calls)) == canonical_pieces(
            Message(Role.ASSISTANT, other.tool_calls)
        )
    return one.text.split() == other.text.split()
