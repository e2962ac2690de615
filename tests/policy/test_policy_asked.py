"""What a request of any dialect asks of the sampler, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metaclaw_core.model import Message, Request, Role, Text
from metaclaw_core.policy.asked import Defaults, Plan, RefusedError, load_defaults, plan

NONE = Defaults()
EXPLORING = (1.0, 1.0, -1)


def request(sampling: dict[str, Any] | None = None, **extra: Any) -> Request:
    return Request("openai_chat", "m", False, (Message(Role.USER, (Text("Hi"),)),), sampling=sampling or {}, extra=extra)


def planned(sampling: dict[str, Any], *, explore: bool = False, defaults: Defaults = NONE) -> Plan:
    return plan(request(sampling), defaults, explore=explore, max_tokens=4096)


def values(found: Plan) -> tuple[float, float, int]:
    return found.sampling.temperature, found.sampling.top_p, found.sampling.top_k


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens", "num_predict"])
def test_every_dialects_limit_is_understood(name: str) -> None:
    assert planned({name: 77}).sampling.max_tokens == 77


@pytest.mark.parametrize("value", [None, 0, -1, "many", True])
def test_without_a_usable_limit_ours_holds(value: Any) -> None:
    assert planned({"num_predict": value}).sampling.max_tokens == 4096


def test_an_exploring_session_samples_from_the_models_own_distribution() -> None:
    found = planned({"temperature": 0.2, "top_p": 0.5, "top_k": 5}, explore=True, defaults=Defaults(0.6, 0.95, 20))
    assert (values(found), found.not_a) == (EXPLORING, None)


def test_other_sessions_have_the_clients_values_and_are_not_of_class_a() -> None:
    found = planned({"temperature": 0.2, "topP": 0.5, "topK": 5}, defaults=Defaults(0.6, 0.95, 20))
    assert values(found) == (0.2, 0.5, 5)
    assert found.not_a == "temperature 0.2, top_p 0.5, top_k 5"


def test_what_the_client_leaves_open_is_as_the_models_makers_have_it() -> None:
    assert values(planned({"temperature": 1}, defaults=Defaults(0.6, 0.95, 20))) == (1, 0.95, 20)


def test_a_client_that_asks_for_the_models_own_distribution_gets_class_a() -> None:
    found = planned({"temperature": 1.0, "top_p": 1.0, "top_k": 0})
    assert (values(found), found.not_a) == (EXPLORING, None)


def test_a_seed_is_passed_on_and_none_is_made_up() -> None:
    assert planned({"seed": 7}, explore=True).sampling.seed == 7
    assert planned({}, explore=True).sampling.seed is None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("presence_penalty", 0.5, "presence_penalty was asked for"),
        ("frequencyPenalty", -0.5, "frequencyPenalty was asked for"),
        ("repetition_penalty", 1.1, "repetition_penalty was asked for"),
        ("min_p", 0.05, "min_p was asked for"),
        ("presence_penalty", 0, None),
        ("repeat_penalty", 1.0, None),
        ("min_p", None, None),
    ],
)
def test_what_is_left_out_costs_class_a(name: str, value: Any, reason: str | None) -> None:
    assert planned({name: value}, explore=True).not_a == reason


REFUSED: list[dict[str, Any]] = [
    {"n": 2},
    {"best_of": 3},
    {"candidateCount": 2},
    {"logprobs": True},
    {"top_logprobs": 5},
    {"responseLogprobs": True},
    {"logit_bias": {"50256": -100}},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "read"}}},
    {"tool_choice": {"type": "any"}},
    {"tool_choice": {"type": "tool", "name": "read"}},
    {"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {}}},
    {"text": {"format": {"type": "json_schema"}}},
    {"output_config": {"format": {"type": "json_schema"}}},
    {"responseMimeType": "application/json"},
    {"responseSchema": {"type": "OBJECT"}},
    {"format": "json"},
    {"guided_regex": "a+"},
    {"modalities": ["text", "audio"]},
]


@pytest.mark.parametrize("sampling", REFUSED, ids=json.dumps)
def test_what_would_be_wrong_to_ignore_is_refused(sampling: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"served\.$|asks for\.$"):
        planned(sampling, explore=True)


SERVED: list[dict[str, Any]] = [
    {"n": 1},
    {"logprobs": False},
    {"logit_bias": {}},
    {"tool_choice": "auto"},
    {"tool_choice": "none"},
    {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    {"toolConfig": {"functionCallingConfig": {"mode": "AUTO"}}},
    {"response_format": {"type": "text"}},
    {"text": {"format": {"type": "text"}, "verbosity": "low"}},
    {"responseMimeType": "text/plain"},
    {"modalities": ["text"]},
    {"responseModalities": ["TEXT"]},
    {"reasoning": {"effort": "high"}},
]


@pytest.mark.parametrize("sampling", SERVED, ids=json.dumps)
def test_what_says_the_usual_is_served(sampling: dict[str, Any]) -> None:
    assert planned(sampling, explore=True).not_a is None


def test_an_answer_in_the_background_is_refused() -> None:
    with pytest.raises(RefusedError, match="background"):
        plan(request({}, background=True), NONE, explore=True, max_tokens=10)


def test_the_models_own_values_come_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": 5}')
    assert load_defaults(str(tmp_path)) == Defaults(0.6, None, 20)


@pytest.mark.parametrize("text", [None, "[]", "no json"])
def test_without_a_readable_file_nothing_is_known(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert load_defaults(str(tmp_path)) == Defaults()
