"""Settings, keys, skills and time-outs."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaclaw_core.doctor import Check, setup
from metaclaw_core.settings import Settings


def of(**sections) -> Settings:
    return Settings.model_validate(sections)


def test_a_bad_setting_is_the_finding(metaclaw_home: Path):
    metaclaw_home.mkdir()
    (metaclaw_home / "config.yaml").write_text("proxy:\n  prot: 1\nfoo: 2\n")
    settings, check = setup.read_settings()
    assert settings is None
    assert check.status == "fail"
    assert check.what.startswith("proxy.prot is not a known setting")
    assert check.what.endswith("(1 more)")


@pytest.mark.parametrize(
    ("settings", "status", "begins"),
    [
        (of(), "ok", "Skills are written with the agent's own model and key"),
        (of(llm={"use_caller_credentials": False}), "warn", "No LLM is configured"),
        (of(skills={"auto_evolve": False}), "ok", "No skills are written"),
        (of(llm={"provider": "openai", "model_id": "m"}), "fail", "llm.provider is set without a key."),
        (of(llm={"api_base": "https://x/v1"}), "fail", "llm.api_base is set without a key."),
        (of(llm={"api_base": "http://127.0.0.1:1/v1"}), "ok", ""),
        (of(llm={"provider": "ollama"}), "ok", ""),
        (of(llm={"provider": "openai", "model_id": "m", "api_key": "k"}), "ok", "m is configured with a key"),
    ],
)
def test_the_key_of_the_llm_that_writes_skills(settings, status, begins):
    check = setup.check_llm(settings)
    assert (check.status, check.what[: len(begins)]) == (status, begins)
    assert "'k'" not in check.what


@pytest.mark.parametrize(
    ("settings", "environment", "status"),
    [
        (of(), {}, "ok"),
        (of(mode="rl"), {}, "fail"),
        (of(mode="rl", rl={"model": "q"}), {}, "fail"),
        (of(mode="rl", rl={"model": "q"}), {"TINKER_API_KEY": "tml-x"}, "ok"),
        (of(mode="rl", rl={"model": "q", "tinker_api_key": "tml-x"}), {}, "ok"),
        (of(mode="rl", rl={"model": "q", "tinker_base_url": "http://127.0.0.1:8123"}), {}, "ok"),
    ],
)
def test_mode_rl_needs_a_model_and_a_key_or_a_local_engine(settings, environment, status):
    assert setup.check_tinker(settings, environment).status == status


def test_invalid_skills_are_listed_with_their_reason(metaclaw_home: Path):
    folder = metaclaw_home / "skills" / "broken"
    folder.mkdir(parents=True)
    (folder / "SKILL.md").write_text("no front matter\n")
    check = setup.check_skills(of())
    assert check.status == "warn"
    assert check.what.startswith("1 skills are invalid and skipped: broken: ")


def test_a_short_time_out_matters_in_mode_rl_only():
    assert setup.check_timeouts(of(), {"a": 20.0}).status == "ok"
    check = setup.check_timeouts(of(mode="rl"), {"a": 20.0, "b": 300.0})
    assert (check.status, "a 20 s" in check.what, "b 300" in check.what) == ("warn", True, False)
    assert setup.check_timeouts(of(mode="rl"), {}).status == "ok"


def test_what_a_tinker_server_does_differently_is_a_warning():
    checks = setup.check_conformance([("connect", "ok", "x"), ("seed", "differs", "y"), ("resume", "failed", "z"), ("ttl", "skipped", "w")])
    assert [check.status for check in checks] == ["ok", "warn", "fail", "warn"]
    assert checks[0] == Check("tinker: connect", "ok", "x")
