"""``metaclaw setup``."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from metaclaw_core.settings import load_settings


def test_enter_to_the_end_is_a_working_set_up_without_any_key(cli, metaclaw_home):
    ran = cli("setup", input="\n" * 10)
    assert ran.code == 0
    assert "Next: metaclaw start" in ran.out
    file = metaclaw_home / "config.yaml"
    assert file.stat().st_mode & 0o777 == 0o600
    assert metaclaw_home.stat().st_mode & 0o777 == 0o700
    settings = load_settings()
    assert (settings.mode, settings.llm.provider, settings.proxy.port) == ("skills_only", "", 30000)
    assert (settings.rl.batch_size, settings.rl.min_sessions) == (32, 4)
    assert (settings.rl.enabled, settings.skills.auto_evolve) == (False, True)


def test_no_file_means_the_defaults_of_the_reference_system(metaclaw_home):
    assert load_settings().rl.batch_size == 4


def test_answers_and_flags_come_to_the_same(cli, metaclaw_home):
    typed = cli("setup", input="skills_only\nkimi\n\n\nsk-0123456789abcdef\nn\n31000\n")
    assert typed.code == 0
    by_answers = (metaclaw_home / "config.yaml").read_text()
    (metaclaw_home / "config.yaml").unlink()
    ran = cli(
        *("setup", "--non-interactive", "--mode", "skills_only", "--provider", "kimi"),
        *("--api-key", "sk-0123456789abcdef", "--no-auto-evolve", "--port", "31000"),
    )
    assert ran.code == 0
    assert (metaclaw_home / "config.yaml").read_text() == by_answers
    settings = load_settings()
    assert settings.llm.api_base == "https://api.moonshot.ai/v1"
    assert (settings.llm.api_key, settings.proxy.port, settings.skills.auto_evolve) == ("sk-0123456789abcdef", 31000, False)
    assert "sk-0123456789abcdef" not in typed.out + ran.out


def test_a_second_run_keeps_values_comments_and_keys_it_does_not_ask_about(cli, config):
    config.write_text(
        "# mine\nmode: skills_only\nllm:\n  provider: openai  # work\n  api_base: https://llm.corp/v1\n  model_id: m\n"
        "  api_key: sk-0123456789abcdef\nskills:\n  top_k: 3 # few\n"
    )
    before = config.read_text()
    assert cli("setup", "--non-interactive").code == 0
    assert config.read_text() == before
    ran = cli("setup", input="\n" * 10)
    assert ran.code == 0
    assert "[Enter keeps ***cdef, - removes it]" in ran.out
    assert config.read_text() == before
    assert cli("setup", "--non-interactive", "--port", "31000").code == 0
    assert config.read_text() == before + "proxy:\n  port: 31000\n"


def test_a_key_is_not_carried_over_to_another_provider(cli, config):
    config.write_text("llm:\n  provider: openai\n  api_base: https://api.openai.com/v1\n  model_id: m\n  api_key: sk-openai-secret\n")
    assert cli("setup", "--non-interactive", "--provider", "ollama").code == 0
    llm = load_settings().llm
    assert (llm.provider, llm.api_base, llm.api_key) == ("ollama", "http://127.0.0.1:11434/v1", "")
    assert cli("setup", "--non-interactive", "--provider", "none").code == 0
    llm = load_settings().llm
    assert (llm.provider, llm.api_base, llm.model_id, llm.api_key) == ("", "", "", "")


def test_an_interrupted_wizard_changes_nothing(cli, config):
    config.write_text("mode: skills_only\n")
    ran = cli("setup", input="rl\nkimi\n")  # then the input ends, as by Ctrl-C or Ctrl-D
    assert ran.code == 130
    assert "Nothing was changed" in ran.err
    assert config.read_text() == "mode: skills_only\n"


def test_a_custom_provider_needs_a_url(cli, metaclaw_home):
    ran = cli("setup", "--non-interactive", "--provider", "custom")
    assert ran.err == "metaclaw: The provider custom needs a base URL: --api-base URL.\n"
    assert not (metaclaw_home / "config.yaml").exists()


class _Tinker(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[str, str | None]]

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("X-API-Key")))
        models = [
            {"model_name": "a/small", "trainable": True},
            {"model_name": "a/frozen", "trainable": False},
            {"model_name": "a/big"},
        ]
        body = json.dumps({"supported_models": models}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def tinker():
    class Handler(_Tinker):
        seen = []  # noqa: RUF012

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_rl_offers_the_models_that_the_server_can_train(cli, tinker, metaclaw_home):
    url, seen = tinker
    #        mode, provider, evolve, port, backend, url, model, judge
    ran = cli("setup", input=f"rl\n\n\n\nlocal\n{url}\n2\n\n")
    assert ran.code == 0
    assert seen == [("/api/v1/get_server_capabilities", None)]
    assert "a/frozen" not in ran.out
    rl = load_settings().rl
    assert (rl.enabled, rl.tinker_base_url, rl.model) == (True, url, "a/big")
    assert "No judge yet" in ran.out


def test_a_server_that_cannot_be_asked_leaves_the_name_to_the_person(cli, metaclaw_home):
    ran = cli("setup", "--mode", "rl", "--rl-backend", "local", "--tinker-url", "http://127.0.0.1:9", input="\n\n\nme/mine\n\n")
    assert ran.code == 0
    assert "The list of models can't be had: http://127.0.0.1:9 can't be reached (ConnectError). Type its name." in ran.out
    assert load_settings().rl.model == "me/mine"


def test_rl_without_questions(cli, metaclaw_home):
    ran = cli(
        *("setup", "--non-interactive", "--mode", "rl", "--tinker-key", "tml-0123456789abcdef", "--rl-model", "Q/8B"),
        *("--prm-url", "https://judge/v1", "--prm-model", "j", "--prm-key", "sk-judge-123456", "--batch-size", "16"),
    )
    assert ran.code == 0
    settings = load_settings()
    assert (settings.mode, settings.rl.model, settings.rl.tinker_api_key) == ("rl", "Q/8B", "tml-0123456789abcdef")
    assert (settings.rl.prm_url, settings.rl.prm_model, settings.rl.batch_size) == ("https://judge/v1", "j", 16)
    assert "tml-0123" not in ran.out
