from __future__ import annotations

from pathlib import Path

from sqlalchemy import insert

from metaclaw_core.learn.estimate import Estimate, Offered, TurnShape, estimate, proposed, shape_of
from metaclaw_core.learn.prices import Prices
from metaclaw_core.store.db import open_store
from metaclaw_core.store.tables import turns

ROW = {
    "principal": "p", "dialect": "openai_chat", "scheme": "http", "host": "h", "port": 80, "path": "/", "redacted": False,
    "retry": False, "attempts": 0, "live": True, "state": "captured",
}  # fmt: skip
PRICES = Prices.model_validate(
    {"training": {"tinker": {"models": {"a": {"prefill": 1, "sample": 4, "train": 3}, "b": {"prefill": 2, "sample": 2, "train": 2}, "c": {"prefill": 1}}}}}
)
SHAPE = TurnShape(turns=2, requests=1.5, prompt_tokens=15_000, answer_tokens=200, longest=20_000)


def test_the_shape_of_a_turn_is_its_requests_and_their_tokens(tmp_path: Path):
    seen = [
        ("t1", "main", 10_000, 100), ("t1", "tool", 12_000, 50), ("t2", "main", 8_000, 250),
        ("t3", "heartbeat", 9_999, 9), ("t4", "main", None, 5), (None, "main", 5, 5),
    ]  # fmt: skip
    with open_store(tmp_path / "store.db") as store:
        assert shape_of(store) is None
        with store.transaction() as db:
            for n, (turn, kind, prompt, answer) in enumerate(seen):
                row = {**ROW, "flow_id": f"f{n}", "content_key": f"k{n}", "started_at": float(n)}
                db.execute(insert(turns).values(row | {"turn_id": turn, "kind": kind, "input_tokens": prompt, "output_tokens": answer}))
        assert shape_of(store) == TurnShape(turns=2, requests=1.5, prompt_tokens=15_000.0, answer_tokens=200.0, longest=12_050)


def test_a_hundred_turns_are_prefilled_sampled_and_trained_on_once():
    # 1.5 M tokens of prompt at 1, 20,000 sampled at 4, both trained on at 3: 1.5 + 0.08 + 4.56
    found = estimate(Offered("a", 32_768), SHAPE, PRICES)
    assert found.fits is True
    assert round(found.usd or 0, 6) == 6.14


def test_what_is_not_known_is_not_made_up():
    assert estimate(Offered("a", None), SHAPE, PRICES).fits is None
    assert estimate(Offered("c", 32_768), SHAPE, PRICES).usd is None
    assert estimate(Offered("none", 32_768), SHAPE, PRICES).usd is None
    assert estimate(Offered("a", 32_768), None, PRICES) == Estimate(Offered("a", 32_768), None, None)
    assert estimate(Offered("a", 23_000), SHAPE, PRICES).fits is False  # a fifth more than the longest so far


def test_the_cheapest_that_fits_is_proposed_unless_the_preferred_one_does():
    small, a, b = (estimate(Offered(*model), SHAPE, PRICES) for model in (("small", 8_192), ("a", 32_768), ("b", 32_768)))
    assert proposed([small, b, a], "b") == "b"
    assert proposed([small, b, a], "small") == "b"  # 3.0 + .04 + 3.04 is less than 6.14
    assert proposed([small, estimate(Offered("x", None), SHAPE, PRICES)], "none") == "x"
    assert proposed([small], "small") is None
    assert proposed([], "x") is None
