"""What the soak's check finds in a store and a journal that were written by hand: it must see what it is there to see."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import samples, step_turns, steps, turns

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from check_invariants import check, table

TURN = {
    "principal": "p", "kind": "main", "dialect": "openai_chat", "scheme": "http", "host": "h", "port": 80, "redacted": False,
    "retry": False, "attempts": 0, "live": True, "state": "captured", "agent": "openclaw",
}  # fmt: skip
SAMPLE = {
    "created_at": 1.0, "base_model": "m", "tokenizer": "t", "klass": "A", "sampling": {}, "reused": 0, "segments": 1, "stop_reason": "stop",
    "malformed": False, "redacted": False, "prompt_ids": b"", "tokens": b"", "logprobs": b"", "prompt_length": 0, "length": 0, "version": 1,
}  # fmt: skip

type Soaked = Callable[..., dict[str, Any]]


def line(request: str, *, same: bool | None = True, by: str | None = None, at: float = 100.0, **more: Any) -> dict[str, Any]:
    values = {"dialect": "openai_chat", "stream": False, "kind": "ok", "opened": at, "sent": at, "answered": at + 1, "status": 200, "problem": None}
    return {"request": request, "same": same, "by": by, "again": False, **values, **more}


@pytest.fixture
def soaked(tmp_path: Path) -> Soaked:
    def make(
        journal: list[dict[str, Any]], *, stored: list[str] = [], routed: list[str] = [], tokens: list[str] = [], reached: list[str] = [], **rl: Any  # noqa: B006
    ) -> dict[str, Any]:
        folder = tmp_path / "soak"
        home = folder / "home"
        home.mkdir(mode=0o700, parents=True)
        with open_store(home / "store.db") as store, store.transaction() as db:
            for n, name in enumerate([*stored, *routed], 1):
                row = {"id": n, "flow_id": f"f{n}", "content_key": f"k{n}", "path": f"/v1/x?id={name}&kind=ok", "started_at": 1.0}
                db.execute(insert(turns).values(TURN | row | {"version": 1 if n > len(stored) else None}))
                if name in tokens:
                    db.execute(insert(samples).values(SAMPLE | {"flow_id": f"f{n}"}))
            for number, state in rl.get("steps", ()):
                db.execute(insert(steps).values(id=number, state=state, base_version=1, version=number, algorithm="single", started_at=1.0, updated_at=1.0))
                db.execute(insert(step_turns).values(step=number, turn=1))
        (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal))
        (folder / "llm.log").write_text("".join(f"{name}\n" for name in ["direct", *reached]))
        told = {"faults": {"proxy killed": 1}, "seconds": 1, "sessions": 1, "dropped": 0, "rl": {"serves": True, "trains": True, "steps": 2}}
        (folder / "soak.json").write_text(json.dumps(told))
        return check(folder, margin=0.25)

    return make


def test_nothing_is_found_where_all_is_well(soaked: Soaked) -> None:
    found = soaked([line("a"), line("b", same=False, by="policy")], stored=["a"], routed=["b"], tokens=["b"], reached=["a"])
    assert (found["lost"], found["duplicated"], found["wrong"], found["store"], found["excused"]) == ([], {}, [], [], {})
    assert (found["served"], found["routed"]) == (2, 1)
    assert "**0 lost, 0 duplicated, 0 answered otherwise**" in table(found)


def test_what_is_missing_and_what_is_there_twice_is_named(soaked: Soaked) -> None:
    journal = [line("a"), line("b"), line("c"), line("d", same=False, by="policy"), {"killed": 300.0, "dead": 300.1}, line("e", at=298.9)]
    found = soaked(journal, stored=["b", "b"], routed=["d"], reached=["b", "c", "c"])
    assert found["lost"] == ["a", "c", "d (its tokens)"]
    assert found["duplicated"] == {"b": 2, "c": 2}
    assert found["excused"] == {"answered a moment before the kill": 1}


def test_an_answer_must_be_of_the_one_that_the_store_names_and_of_nobody_else(soaked: Soaked) -> None:
    policy = {"same": False, "by": "policy"}
    found = soaked([line("a", **policy), line("b"), line("c", **policy)], stored=["a"], routed=["b", "c"], tokens=["a", "b", "c"], reached=["b", "c"])
    assert {row["request"]: row["problem"] for row in found["wrong"]} == {
        "b": "answered by the LLM, and the store says otherwise",
        "c": "answered by the policy server, and the LLM was asked, too",
    }
    assert found["lost"] == ["a (its tokens)"]


def test_a_failure_of_the_policy_server_costs_one_attempt_and_no_more(soaked: Soaked) -> None:
    failed = {"same": False, "again": True, "status": 503}
    journal = [line("a", **failed), line("a-again"), line("b", **failed), line("b-again", **failed), line("c", same=None, problem="TimeoutError")]
    found = soaked([*journal, line("d", same=None, problem="TimeoutError", at=200.0), {"stopped_from": 199.0, "stopped_to": 205.0}], stored=["a-again"])
    assert [row["request"] for row in found["wrong"]] == ["b-again", "c"]
    assert found["excused"] == {"the policy server failed, the client asked again": 2, "the policy server stood still, the client gave up": 1}


def test_a_turn_that_was_trained_on_twice_is_found_unless_the_one_step_was_undone(soaked: Soaked) -> None:
    assert soaked([], stored=["a"], steps=[(2, "routed"), (3, "routed"), (4, "abandoned")])["store"] == ["turn 1: trained on twice"]
