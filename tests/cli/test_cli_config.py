"""``metaclaw config``."""

from __future__ import annotations

import json

import pytest


def test_show_names_every_key_its_source_and_no_secret(cli, config, monkeypatch):
    config.write_text("llm:\n  api_key: sk-0123456789abcdef\nstore:\n  url: postgresql://me:hunter2@db/x\nproxy:\n  port: 31000\n")
    monkeypatch.setenv("METACLAW_RL_PRM_API_KEY", "short")
    monkeypatch.setenv("METACLAW_PROXY_PORT", "31001")
    ran = cli("config", "show", "--json")
    found = json.loads(ran.out)
    assert found["llm.api_key"] == {"value": "***cdef", "source": "file"}
    assert found["rl.prm_api_key"] == {"value": "***", "source": "environment"}
    assert found["store.url"] == {"value": "postgresql://me:***@db/x", "source": "file"}
    assert found["proxy.port"] == {"value": 31001, "source": "environment"}
    assert found["skills.top_k"] == {"value": 6, "source": "default"}
    text = cli("config", "show").out
    assert "proxy.port" in text
    assert "hunter2" not in text
    assert "0123456789" not in text


def test_a_key_prints_its_value_alone(cli, config):
    config.write_text("proxy:\n  hosts: [a, b]\nllm:\n  api_key: sk-0123456789abcdef\n")
    assert cli("config", "proxy.port").out == "30000\n"
    assert cli("config", "proxy.hosts").out == "[a, b]\n"
    assert cli("config", "proxy.hosts", "--json").out == '["a","b"]\n'
    assert cli("config", "max_context_tokens").out == "null\n"
    assert cli("config", "llm.api_key").out == "***cdef\n"
    assert cli("config", "llm.api_key", "--reveal").out == "sk-0123456789abcdef\n"


def test_a_change_keeps_the_comments_and_makes_the_file_private(cli, config):
    config.write_text("# mine\nproxy:\n  port: 30000  # here\n")
    config.chmod(0o644)
    ran = cli("config", "proxy.port", "31000")
    assert (ran.code, ran.out) == (0, "proxy.port = 31000\n")
    assert config.read_text() == "# mine\nproxy:\n  port: 31000  # here\n"
    assert config.stat().st_mode & 0o777 == 0o600


def test_values_have_the_type_of_their_key(cli, config):
    for key, text in [
        ("llm.api_key", "123"),  # text stays text
        ("skills.enabled", "no"),
        ("proxy.hosts", "a.example, b.example"),
        ("skills.extra_dirs", "[~/x]"),
        ("max_context_tokens", "32000"),
        ("opd.kl_penalty_coef", "0.5"),
        ("mode", "rl"),
    ]:
        assert cli("config", key, text).code == 0
    found = {k: v["value"] for k, v in json.loads(cli("config", "show", "--json").out).items() if v["source"] == "file"}
    assert found == {
        "mode": "rl",
        "llm.api_key": "***",
        "proxy.hosts": ["a.example", "b.example"],
        "skills.enabled": False,
        "skills.extra_dirs": ["~/x"],
        "opd.kl_penalty_coef": 0.5,
        "max_context_tokens": 32000,
    }
    assert cli("config", "max_context_tokens", "null").code == 0
    assert cli("config", "max_context_tokens").out == "null\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("proxy.prt", "1"), "proxy.prt is not a known setting. Did you mean proxy.port?"),
        (("proxy.prt",), "proxy.prt is not a known setting. Did you mean proxy.port?"),
        (("proxy.port", "99999"), "proxy.port = 99999 is not allowed (from the command line): Input should be less than or equal to 65535."),
        (("mode", "auto"), "mode = 'auto' is not allowed (from the command line): Input should be 'skills_only' or 'rl'."),
        (("skills.top_k", "many"), "skills.top_k = 'many' is not allowed (from the command line): Input should be a valid integer"),
        (("proxy",), "proxy is a section: name one key, as in proxy.port, or use `metaclaw config show`."),
        (("skills.top_k", "--unset"), "skills.top_k is not set in"),
        (("skills.top_k", "3", "--unset"), "--unset takes a key and no value."),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence_and_changes_nothing(cli, config, words, says):
    config.write_text("mode: rl\n")
    ran = cli("config", *words)
    assert ran.code == 1
    assert ran.err.startswith(f"metaclaw: {says}")
    assert ran.err.count("\n") == 1
    assert config.read_text() == "mode: rl\n"


def test_an_unknown_key_in_the_file_is_named_with_its_remedy_and_the_remedy_works(cli, config):
    config.write_text("proxy:\n  prt: 1\n  port: 31000\n")
    ran = cli("config", "show")
    assert ran.err == (
        f"metaclaw: proxy.prt is not a known setting (from {config}). Did you mean proxy.port? "
        "`metaclaw config proxy.prt --unset` takes it out.\n"
    )
    assert cli("config", "proxy.prt", "--unset").code == 0
    assert config.read_text() == "proxy:\n  port: 31000\n"
    assert cli("config", "show").code == 0


def test_a_bad_value_in_the_file_can_be_mended_by_the_command(cli, config):
    config.write_text("proxy:\n  port: x\n")
    assert "proxy.port = 'x' is not allowed" in cli("config", "show").err
    assert cli("config", "proxy.port", "31000").code == 0
    assert cli("config", "proxy.port").out == "31000\n"


def test_a_change_that_the_environment_hides_is_said(cli, config, monkeypatch):
    monkeypatch.setenv("METACLAW_SKILLS_TOP_K", "9")
    ran = cli("config", "skills.top_k", "3")
    assert ran.err == "But METACLAW_SKILLS_TOP_K in the environment wins over the file.\n"


def test_a_secret_can_come_from_standard_input(cli, config):
    ran = cli("config", "llm.api_key", "-", input="sk-0123456789abcdef\n")
    assert ran.out == "llm.api_key = '***cdef'\n"
    assert config.read_text() == "llm:\n  api_key: sk-0123456789abcdef\n"


def test_a_linked_file_stays_a_link(cli, config, tmp_path):
    real = tmp_path / "dotfiles.yaml"
    real.write_text("mode: rl\n")
    config.symlink_to(real)
    assert cli("config", "mode", "skills_only").code == 0
    assert config.is_symlink()
    assert real.read_text() == "mode: skills_only\n"
