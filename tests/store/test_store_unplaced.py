"""A store whose messages were recorded before their ids had a place (`store.chain`) is sound, and its conversations go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from metaclaw_core.doctor.runtime import sample
from metaclaw_core.store.rollouts import Store

SYSTEM = {"role": "system", "content": "rules"}


@pytest.fixture
def older(store: Store, chat: Any) -> Callable[[], None]:
    """What is in the store now becomes what it would have been then."""

    def turn_back() -> None:
        with store.transaction() as connection:
            for table, columns in (("messages", ("id", "parent")), ("turns", ("system_tip", "prompt_tip", "response_tip"))):
                for name in columns:
                    connection.execute(text(f"UPDATE {table} SET {name} = 'v1:' || substr({name}, 13) WHERE {name} LIKE 'v1:________-%'"))

    return turn_back


def user(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def assistant(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


def test_it_verifies_and_its_conversations_are_whole(store: Store, chat: Any, older: Callable[[], None]) -> None:
    store.ingest([chat(SYSTEM, user("hi"), answer="Hello."), chat(SYSTEM, user("hi"), assistant("Hello."), user("more"), answer="Yes.")])
    older()
    report = store.verify()
    assert (report.messages, report.turns, report.problems) == (5, 2, ())
    assert sample(store) == (2, [])
    [row] = list(store.turns(limit=1))
    assert len(row["response_tip"]) == 67
    assert [m.text for m in store.conversation(row["response_tip"])] == ["rules", "hi", "Hello.", "more", "Yes."]


def test_changed_content_is_found_there_too(store: Store, chat: Any, older: Callable[[], None]) -> None:
    store.ingest([chat(user("hi"))])
    older()
    with store.transaction() as connection:
        connection.execute(text("UPDATE messages SET role = 'system' WHERE parent IS NULL"))
    assert ["has content that hashes to v1:" in problem for problem in store.verify().problems] == [True]


def test_a_session_without_a_name_goes_on(store: Store, chat: Any, older: Callable[[], None]) -> None:
    """The client repeats its history, whose ids have places now: it is stored once more, and the session is the same."""
    store.ingest([chat(SYSTEM, user("hi"), answer="Hello.")])
    older()
    store.ingest([chat(SYSTEM, user("hi"), assistant("Hello."), user("more"), answer="Yes.")])
    store.ingest([chat(SYSTEM, user("hi"), assistant("Hello."), user("more"), assistant("Yes."), user("and?"), answer="No.")])
    rows = list(store.turns())
    assert len({row["session"] for row in rows}) == 1
    assert [len(row["prompt_tip"]) for row in rows] == [67, 76, 76]
    report = store.verify()
    assert (report.messages, report.problems) == (3 + 7, ())


def test_the_same_request_again_is_a_repetition(store: Store, chat: Any, older: Callable[[], None]) -> None:
    store.ingest([chat(SYSTEM, user("hi"))])
    older()
    store.ingest([chat(SYSTEM, user("hi"))])
    assert [row["retry"] for row in store.turns()] == [False, True]
    assert len({row["session"] for row in store.turns()}) == 1
