"""The environment of a program that uses the proxy."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from metaclaw_core.cli.agentenv import agent_env, split_no_proxy
from metaclaw_core.cli.env import line
from metaclaw_core.settings import Settings

PEM = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"
URL = "http://127.0.0.1:30000"


@pytest.fixture
def ca(tmp_path: Path, metaclaw_home: Path) -> Path:
    metaclaw_home.mkdir()
    file = tmp_path / "ours.pem"
    file.write_text(PEM.format("OURS"))
    return file


@pytest.fixture
def corporate(tmp_path: Path) -> Path:
    file = tmp_path / "corporate.pem"
    file.write_text("# a comment\n" + PEM.format("CORP"))
    return file


def made(environment, metaclaw_home, ca, settings=None):
    return agent_env(environment, settings or Settings(), metaclaw_home, 30000, ca)


def test_proxies_in_both_spellings_and_our_ca_beside_those_that_were_trusted(metaclaw_home, ca, corporate):
    found = made({"SSL_CERT_FILE": str(corporate)}, metaclaw_home, ca)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "OPENCLAW_PROXY_URL"):
        assert found.variables[name] == URL
    assert found.variables["NODE_EXTRA_CA_CERTS"] == str(ca)
    bundle = Path(found.variables["SSL_CERT_FILE"])
    assert bundle.parent == metaclaw_home / "ca"
    assert bundle.read_text() == PEM.format("CORP") + PEM.format("OURS")
    assert bundle.stat().st_mode & 0o777 == 0o600
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"):
        assert found.variables[name] == str(bundle)
    assert "AWS_CA_BUNDLE" not in found.variables
    assert found.notes == []


def test_without_any_list_of_its_own_the_system_s_is_in_the_bundle(metaclaw_home, ca):
    bundle = Path(made({}, metaclaw_home, ca).variables["CURL_CA_BUNDLE"]).read_text()
    assert bundle.endswith(PEM.format("OURS"))
    assert bundle.count("BEGIN CERTIFICATE") > 20


def test_lists_that_replace_each_other_are_joined_each_certificate_once(metaclaw_home, ca, corporate):
    environment = {"SSL_CERT_FILE": str(corporate), "REQUESTS_CA_BUNDLE": str(corporate), "AWS_CA_BUNDLE": str(ca)}
    found = made({**environment, "CURL_CA_BUNDLE": "/nowhere"}, metaclaw_home, ca)
    assert Path(found.variables["AWS_CA_BUNDLE"]).read_text().count("BEGIN") == 2


def test_doing_it_twice_changes_nothing(metaclaw_home, ca, corporate):
    environment = {"SSL_CERT_FILE": str(corporate), "NODE_EXTRA_CA_CERTS": str(corporate), "NO_PROXY": "localhost,*"}
    once = made(environment, metaclaw_home, ca)
    again = made(once.over(environment), metaclaw_home, ca)
    assert again.variables == {k: v for k, v in once.variables.items() if k.lower() != "no_proxy"}
    assert again.notes == []


def test_node_keeps_the_certificates_it_was_given(metaclaw_home, ca, corporate):
    found = made({"NODE_EXTRA_CA_CERTS": str(corporate)}, metaclaw_home, ca)
    assert Path(found.variables["NODE_EXTRA_CA_CERTS"]).read_text() == PEM.format("CORP") + PEM.format("OURS")


def test_no_proxy_loses_only_what_hides_llm_traffic():
    hosts = ["api.openai.com", "openrouter.ai"]
    assert split_no_proxy("localhost, .corp.example,10.0.0.0/8", hosts) == (["localhost", ".corp.example", "10.0.0.0/8"], [])
    assert split_no_proxy(".openai.com,api.openai.com:443 *.openrouter.ai,x", hosts) == (
        ["x"],
        [".openai.com", "api.openai.com:443", "*.openrouter.ai"],
    )
    assert split_no_proxy("*", hosts) == ([], ["*"])
    assert split_no_proxy("notopenai.com,openai.com.evil,::1", hosts) == (["notopenai.com", "openai.com.evil", "::1"], [])
    assert split_no_proxy("", hosts) == ([], [])


def test_what_is_taken_out_of_no_proxy_is_said(metaclaw_home, ca):
    found = made({"no_proxy": "localhost,.openai.com"}, metaclaw_home, ca)
    assert (found.variables["NO_PROXY"], found.variables["no_proxy"]) == ("localhost", "localhost")
    assert found.notes == ["NO_PROXY without .openai.com: that is LLM traffic, which MetaClaw is here for."]


def test_a_local_llm_keeps_its_traffic_in_the_proxy(metaclaw_home, ca):
    settings = Settings.model_validate({"proxy": {"hosts": ["127.0.0.1:11434"]}})
    found = made({"NO_PROXY": "localhost,127.0.0.1"}, metaclaw_home, ca, settings)
    assert "OPENCLAW_PROXY_URL" not in found.variables
    assert found.variables["NO_PROXY"] == "localhost"
    assert not any("ollama.com" in note for note in found.notes)


def test_a_local_llm_and_ollama_s_cloud_cannot_both_be_had_with_openclaw_and_that_is_said(metaclaw_home, ca):
    settings = Settings.model_validate({"proxy": {"hosts": ["127.0.0.1:11434", "ollama.com"]}})
    found = made({}, metaclaw_home, ca, settings)
    assert "OPENCLAW_PROXY_URL" not in found.variables
    (note,) = found.notes
    assert note.startswith("OpenClaw sends ollama.com past this proxy")


def test_a_corporate_proxy_is_named_without_its_password(metaclaw_home, ca):
    (note,) = made({"HTTPS_PROXY": "http://me:hunter2@proxy.corp:3128"}, metaclaw_home, ca).notes
    assert "http://***@proxy.corp:3128" in note
    assert "hunter2" not in note


@pytest.mark.parametrize("value", ["plain", "it's", 'a "b" $c `d`', "back\\slash", "/Users/First Last/x"])
def test_lines_survive_their_shell(value):
    out = subprocess.run(["bash", "-c", f"{line('bash', 'X', value)}; printf %s \"$X\""], capture_output=True, text=True)
    assert out.stdout == value
    assert shlex.split(line("bash", "X", value))[1] == f"X={value}"
    assert line("powershell", "X", "it's") == "$env:X = 'it''s'"
    assert line("fish", "X", "it's \\") == "set -gx X 'it\\'s \\\\'"


def test_env_prints_lines_makes_the_ca_and_says_that_no_proxy_runs(cli, metaclaw_home, monkeypatch):
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    ran = cli("env")
    assert ran.code == 0
    assert "set -gx HTTPS_PROXY 'http://127.0.0.1:30000'\n" in ran.out
    assert ran.err == "metaclaw: no proxy runs here yet: metaclaw start --detach\n"
    assert (metaclaw_home / "mitmproxy" / "mitmproxy-ca-cert.pem").is_file()
    assert (metaclaw_home / "mitmproxy").stat().st_mode & 0o777 == 0o700
    assert (metaclaw_home / "mitmproxy" / "mitmproxy-ca.pem").stat().st_mode & 0o777 == 0o600
    assert list(Path(os.environ["HOME"]).iterdir()) == []  # no file of the user's
