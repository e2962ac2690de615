from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.errors import ConfigError
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.costs import cost_text, own_cost, traffic_cost
from metaclaw_core.learn.prices import Prices, load_prices, parse
from metaclaw_core.model import Usage
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store

TABLE = """
providers:
  acme:
    hosts: [api.acme.test]
    models:
      m-1: {input: 2, cached_input: 0.2, cache_write: 2.5, output: 10, long_prompt: {over: 1000, input: 4, output: 15}}
      half: {input: 1}
  other:
    hosts: [other.test]
    models:
      m-1: {input: 3, output: 12}
      own: {input: 0, output: 0}
training:
  tinker:
    models:
      base: {prefill: 0.1, sample: 0.4, train: 0.5}
"""
ACME = "api.acme.test"


@pytest.fixture
def prices() -> Prices:
    return parse(TABLE, "a test")


@pytest.fixture
def store(metaclaw_home: Path) -> Iterator[Store]:
    with open_store(metaclaw_home / "store.db") as opened:
        yield opened


def test_cache_reads_and_writes_have_prices_of_their_own(prices: Prices) -> None:
    usage = Usage(input_tokens=1000, output_tokens=100, cached_tokens=600, cache_write_tokens=300)
    assert prices.cost("m-1", usage, host=ACME) == pytest.approx((100 * 2 + 600 * 0.2 + 300 * 2.5 + 100 * 10) / 1e6)


def test_a_long_prompt_pays_its_price_for_all_its_tokens_and_an_unknown_one_makes_the_whole_unknown(prices: Prices) -> None:
    assert prices.cost("m-1", Usage(1001, 10), host=ACME) == pytest.approx((1001 * 4 + 10 * 15) / 1e6)
    assert prices.cost("m-1", Usage(1001, 10, cached_tokens=1), host=ACME) is None
    assert prices.cost("m-1", Usage(1800, 20), host=ACME, requests=2) == pytest.approx((1800 * 2 + 20 * 10) / 1e6)


def test_what_is_not_known_costs_none_and_never_zero(prices: Prices) -> None:
    assert prices.cost("m-2", Usage(10, 1), host=ACME) is None  # no such model
    assert prices.cost("m-1", Usage(10, 1), host="api.gateway.test") is None  # somebody else bills
    assert prices.cost("m-1", Usage(None, 1), host=ACME) is None  # not counted
    assert prices.cost("m-1", Usage(10, None), host=ACME) is None
    assert prices.cost("half", Usage(10, 1), host=ACME) is None  # no price for its output
    assert prices.cost("half", Usage(10, 0), host=ACME) == pytest.approx(10 / 1e6)
    assert prices.cost("own", Usage(10, 1), host="other.test") == 0  # somebody said it is free


def test_without_a_host_a_name_must_have_one_price(prices: Prices) -> None:
    assert prices.cost("m-1", Usage(10, 1)) is None
    assert prices.cost("half", Usage(10, 0)) == pytest.approx(10 / 1e6)


def test_a_dated_name_is_its_model_and_another_suffix_is_another_model(prices: Prices) -> None:
    known = prices.cost("m-1", Usage(10, 1), host=ACME)
    for name in ("m-1-20251101", "m-1-2025-11-01", "m-1-latest", "m-1-001"):
        assert prices.cost(name, Usage(10, 1), host="eu.api.acme.test") == known
    for name in ("m-1-mini", "m-1.5", "m", "M-1"):
        assert prices.cost(name, Usage(10, 1), host=ACME) is None


def test_training_has_its_prices(prices: Prices) -> None:
    assert prices.training_cost("base", prefill=1000, sample=100, train=2000) == pytest.approx((100 + 40 + 1000) / 1e6)
    assert prices.training_cost("base", cached_prefill=1) is None
    assert prices.training_cost("another", train=1) is None
    assert prices.training_cost("base", train=1, biller="elsewhere") is None


def test_the_users_table_goes_over_the_shipped_one_model_by_model(metaclaw_home: Path) -> None:
    metaclaw_home.mkdir()
    shipped = load_prices(metaclaw_home)
    assert shipped.cost("claude-opus-4-5-20251101", Usage(1000, 100, 0, 0), host="api.anthropic.com") == pytest.approx(0.0075)
    (metaclaw_home / "prices.yaml").write_text(
        "providers: {anthropic: {hosts: [gateway.test], models: {claude-opus-4-5: {input: 1, output: 1}}}}\n"
    )
    both = load_prices(metaclaw_home)
    assert both.cost("claude-opus-4-5", Usage(1000, 100), host="gateway.test") == pytest.approx(0.0011)
    assert both.cost("claude-opus-4-5", Usage(1000, 100), host="api.anthropic.com") == pytest.approx(0.0011)
    assert both.cost("claude-haiku-4-5", Usage(1000, 100), host="api.anthropic.com") == pytest.approx(0.0015)
    assert both.training == shipped.training


def test_the_shipped_table_says_where_each_list_comes_from() -> None:
    shipped = load_prices(Path("/nonexistent"))
    lists = [*shipped.providers.values(), *shipped.training.values()]
    assert len(lists) >= 4
    for each in lists:
        assert each.as_of is not None
        assert each.source.startswith("https://")
        assert each.models
    for provider in shipped.providers.values():
        for price in provider.models.values():
            assert price.input is not None
            assert price.output is not None
            assert (price.cached_input or 0) <= price.input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("providers: [", "is not valid YAML in line 1"),
        ("- a\n", "the whole: Input should be a valid dictionary"),
        ("providers: {x: {models: {m: {input: -1}}}}", "providers.x.models.m.input: Input should be greater than or equal to 0"),
        ("providers: {x: {models: {m: {in: 1}}}}", "providers.x.models.m.in: Extra inputs are not permitted"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused_by_key(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml") as e:
        parse(text, "my.yaml")
    assert said in str(e.value)


@given(
    st.integers(0, 10**7), st.integers(0, 10**6), st.none() | st.integers(0, 10**7), st.none() | st.integers(0, 10**7)
)
def test_a_cost_is_never_negative_and_grows_with_the_answer(came_in: int, out: int, cached: int | None, written: int | None) -> None:
    price = parse("providers: {a: {hosts: [h], models: {m: {input: 2, cached_input: 1, cache_write: 3, output: 4}}}}", "t")
    cost = price.cost("m", Usage(came_in, out, cached, written), host="h")
    more = price.cost("m", Usage(came_in, out + 1, cached, written), host="h")
    assert cost is not None
    assert more is not None
    assert 0 <= cost < more


NOW = datetime(2026, 11, 25, 15, tzinfo=UTC).timestamp()


def insert_turn(store: Store, number: int, *, model: str, host: str = ACME, at: float = NOW, **columns: object) -> None:
    row: dict[str, object] = {
        "content_key": f"k{number}", "principal": "p", "kind": "main", "dialect": "openai_chat", "scheme": "https",
        "host": host, "port": 443, "path": "/v1/chat/completions", "model": model, "redacted": False, "state": "captured",
        "retry": False, "attempts": 0, "started_at": at, "live": True, **columns,
    }  # fmt: skip
    names = ", ".join(row)
    with store.transaction() as db:
        db.exec_driver_sql(
            f"INSERT INTO turns ({names}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
        )


def test_todays_traffic_is_priced_turn_by_turn_and_says_what_it_lacks(store: Store, prices: Prices) -> None:
    insert_turn(store, 1, model="m-1", input_tokens=1000, output_tokens=100, cached_tokens=400)
    insert_turn(store, 2, model="alias", response_model="m-1-20251101", input_tokens=10, output_tokens=1)
    insert_turn(store, 3, model="fake", input_tokens=5, output_tokens=2)
    insert_turn(store, 4, model="m-1", response_tip="v1:x")  # answered, but nothing was counted
    insert_turn(store, 5, model="m-1", at=NOW - 86400, input_tokens=7, output_tokens=7)  # yesterday
    insert_turn(store, 6, model="m-1", input_tokens=7, output_tokens=7, version=1)  # our own weights answered
    usd = (600 * 2 + 400 * 0.2 + 100 * 10 + 10 * 2 + 10) / 1e6
    found = traffic_cost(store, prices, NOW)
    assert found == {
        "requests": 3, "input": 1015, "cached": 400, "output": 103,
        "usd": pytest.approx(usd), "priced": 2, "unpriced": {"fake": 1}, "unreported": 1,
    }  # fmt: skip
    assert cost_text(found) == "$0.0023 for 2 of 3 requests (price unknown: fake)"


def test_nothing_today_costs_nothing_that_is_known(store: Store, prices: Prices) -> None:
    assert traffic_cost(store, prices, NOW)["usd"] is None
    assert own_cost(store, prices, NOW) == {"requests": 0, "usd": None, "priced": 0, "unpriced": {}, "estimated": 0}


async def test_our_own_calls_are_priced_by_the_models_name(store: Store, prices: Prices) -> None:
    budget = Budget(store, None, clock=lambda: NOW)
    for model, out in (("half", 0), ("m-9", 5)):
        reservation = await budget.reserve("judge", model, 2000, 100)
        await budget.record(reservation, 1_000_000, out)
        budget.release(reservation)
    found = own_cost(store, prices, NOW)
    assert found == {"requests": 2, "usd": pytest.approx(1.0), "priced": 1, "unpriced": {"m-9": 1}, "estimated": 0}
    assert cost_text(found) == "$1.00 for 1 of 2 requests (price unknown: m-9)"
    assert cost_text({**found, "usd": None}) == "price unknown (m-9)"
    assert cost_text({**found, "unpriced": {}}) == "$1.00"
