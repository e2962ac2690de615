"""What tokens cost: a price table, and the cost of a request by it.

Design: a dated table ships with the program (``prices.yaml`` beside this file, each list with its source), and
``prices.yaml`` in METACLAW_HOME goes over it model by model. What neither has is unknown: `cost` gives None, never
0, and whoever shows a sum says what it lacks. A price is found by the host that bills and the model's name; a dated
name (``-20251101``) is its model, any other difference is another model. Nothing here reads the store or a clock.

Limits: list prices, so no invoice: no discounts, batch or priority tiers, taxes, tool fees or storage of caches. A
cache count that the provider did not report counts as none, so such a sum may be off by what its caches save or
cost. Anthropic's one-hour cache writes are counted as five-minute ones. A gateway (OpenRouter, LiteLLM) has prices of
its own, which only the user's file can say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metaclaw_core.errors import ConfigError
from metaclaw_core.model import Usage

FILE = "prices.yaml"  # in METACLAW_HOME, and beside this module
MILLION = 1_000_000
_SAME_MODEL = re.compile(r"-(?:\d{8}|\d{4}-\d{2}-\d{2}|latest|\d{3})$")

type _Rate = float | None  # USD per million tokens; None: unknown


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rates(_Value):
    """USD per 1,000,000 tokens. None: unknown."""

    input: _Rate = Field(None, ge=0)  # of a prompt's tokens that touch no cache
    cached_input: _Rate = Field(None, ge=0)
    cache_write: _Rate = Field(None, ge=0)
    output: _Rate = Field(None, ge=0)


class LongPrompt(Rates):
    over: int = Field(ge=1)  # tokens of the whole prompt


class ModelPrice(Rates):
    long_prompt: LongPrompt | None = None  # what all tokens of a request with a longer prompt cost

    def rates(self, prompt_tokens: float) -> Rates:
        long = self.long_prompt
        return long if long is not None and prompt_tokens > long.over else self


class ProviderList(_Value):
    hosts: tuple[str, ...] = ()
    as_of: date | None = None
    source: str = ""
    models: Mapping[str, ModelPrice] = {}

    def bills(self, host: str) -> bool:
        return any(host == name or host.endswith(f".{name}") for name in self.hosts)


class TrainingPrice(_Value):
    """USD per 1,000,000 tokens. None: unknown."""

    prefill: _Rate = Field(None, ge=0)
    cached_prefill: _Rate = Field(None, ge=0)
    sample: _Rate = Field(None, ge=0)
    train: _Rate = Field(None, ge=0)


class TrainingList(_Value):
    as_of: date | None = None
    source: str = ""
    models: Mapping[str, TrainingPrice] = {}


class Prices(_Value):
    """A table. `providers` and `training` by the name of who bills."""

    providers: Mapping[str, ProviderList] = {}
    training: Mapping[str, TrainingList] = {}

    def price(self, model: str, host: str | None = None) -> ModelPrice | None:
        """Of `model` where `host` bills for it; without a host by the model's name alone, and None where two providers
        ask different prices for it."""
        lists = [p for p in self.providers.values() if host is None or p.bills(host.lower())]
        for name in (model, _SAME_MODEL.sub("", model)):
            found = [p.models[name] for p in lists if name in p.models]
            if found:
                return found[0] if all(price == found[0] for price in found) else None
        return None

    def cost(self, model: str, usage: Usage, *, host: str | None = None, requests: int = 1) -> float | None:
        """USD of `usage`, which may be the sum of several `requests` alike; None: a price or a count of it is unknown."""
        price = self.price(model, host)
        if price is None or usage.input_tokens is None or usage.output_tokens is None:
            return None
        rates = price.rates(usage.input_tokens / requests)
        cached, written = usage.cached_tokens or 0, usage.cache_write_tokens or 0
        return _sum(
            (
                (usage.input_tokens - cached - written, rates.input),
                (cached, rates.cached_input),
                (written, rates.cache_write),
                (usage.output_tokens, rates.output),
            )
        )

    def training_cost(
        self, model: str, *, prefill: int = 0, cached_prefill: int = 0, sample: int = 0, train: int = 0, biller: str = "tinker"
    ) -> float | None:
        """USD of so many tokens of each kind for a base model of `biller`; None: one of the prices is unknown."""
        prices = self.training.get(biller)
        price = prices.models.get(model) if prices is not None else None
        if price is None:
            return None
        return _sum(
            (
                (prefill, price.prefill),
                (cached_prefill, price.cached_prefill),
                (sample, price.sample),
                (train, price.train),
            )
        )

    def over(self, under: Prices) -> Prices:
        """This table with what it lacks taken from `under`: whole models, and the hosts of both."""
        providers = dict(under.providers)
        for name, mine in self.providers.items():
            theirs = providers.get(name, ProviderList())
            hosts = tuple(dict.fromkeys((*theirs.hosts, *mine.hosts)))
            providers[name] = mine.model_copy(update={"hosts": hosts, "models": {**theirs.models, **mine.models}})
        training = dict(under.training)
        for name, ours in self.training.items():
            known = training.get(name, TrainingList())
            training[name] = ours.model_copy(update={"models": {**known.models, **ours.models}})
        return Prices(providers=providers, training=training)


def parse(text: str, where: str) -> Prices:
    """The table in a YAML text. Raises ConfigError, which names `where` and the key that is wrong."""
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where} is not valid YAML{line}: {getattr(e, 'problem', e)}.") from e
    try:
        return Prices.model_validate({} if value is None else value)
    except ValidationError as e:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}" for fault in e.errors()[:3])
        raise ConfigError(f"{where} is no price table: {faults}. Prices are in USD per 1,000,000 tokens.") from e


def load_prices(home: Path) -> Prices:
    """The shipped table with the user's own over it, if there is one. Raises ConfigError."""
    shipped = parse(Path(__file__).with_name(FILE).read_text(encoding="utf-8"), FILE)
    own = home / FILE
    try:
        return parse(own.read_text(encoding="utf-8"), str(own)).over(shipped)
    except FileNotFoundError:
        return shipped
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{own} can't be read: {e}.") from e


def _sum(parts: Iterable[tuple[int, _Rate]]) -> float | None:
    total = 0.0
    for tokens, rate in parts:
        if tokens <= 0:
            continue
        if rate is None:
            return None
        total += tokens * rate
    return total / MILLION
