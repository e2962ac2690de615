import re

import pytest

from metaclaw_core.proxy import hosts
from metaclaw_core.settings import Settings


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("api.openai.com", "api.openai.com"),
        ("API.OpenAI.com:8443", "api.openai.com"),
        ("https://llm.local:1234/v1", "llm.local"),
        ("http://[::1]:8080/", "::1"),
        ("", None),
        ("http://[broken", None),
    ],
)
def test_the_host_of_a_url_or_host(text, host):
    assert hosts.host_of(text) == host


def test_hosts_come_from_our_settings_and_the_agents_files(tmp_path):
    settings = Settings.model_validate(
        {"proxy": {"hosts": ["mine.test"]}, "llm": {"api_base": "https://base.test/v1"}},
    )
    config = tmp_path / "openclaw.json"
    config.write_text("""{ models: { providers: { x: { baseUrl: "https://gw.example.test/v1" }, y: {"base_url": 'http://10.0.0.7:11434'} } } }""")
    toml = tmp_path / "config.toml"
    toml.write_bytes(b'base_url = "https://codex.test/v1"\n# \xff\n')
    found = hosts.configured_hosts(settings, [config, toml, tmp_path / "missing"])
    assert found == {"mine.test", "base.test", "gw.example.test", "10.0.0.7", "codex.test"}


def allowed(address: str, names: list[str]) -> bool:
    return any(re.search(pattern, address, re.IGNORECASE) for pattern in hosts.allow_hosts(names))


def test_patterns_are_anchored_at_both_ends():
    names = ["api.openai.com", "mine.test"]
    assert allowed("api.openai.com:443", names)
    assert allowed("eu.api.openai.com:443", names)  # a provider's regions
    assert allowed("mine.test:8080", names)
    for address in ("evilapi.openai.com:443", "api.openai.com.evil.test:443", "sub.mine.test:443", "minextest:443", "mine.test:443x"):
        assert not allowed(address, names), address
