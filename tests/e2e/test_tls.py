"""TLS clients that don't know our CA: tools the agent runs must keep their network."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess

import pytest
from live_tools import GIT, chat, connection, control, eventually, kit, post, quiet_proxy, site  # noqa: F401 - fixtures

from metaclaw_core.testing import ScriptedLLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("git") and shutil.which("curl")), reason="git and curl are needed"),
]


def tool(kit, proxy, *line: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """A tool that trusts the site's CA and not ours."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env = clean | {"https_proxy": proxy.url, "CURL_CA_BUNDLE": str(kit.ca), "GIT_SSL_CAINFO": str(kit.ca), "GIT_TERMINAL_PROMPT": "0"}
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=30)


def test_git_and_curl_succeed_at_the_second_try_and_one_warning_names_the_ca(tmp_path, kit, site):  # noqa: F811
    with quiet_proxy(tmp_path, kit) as proxy:
        first = tool(kit, proxy, "git", "ls-remote", f"{site}/repo.git")
        assert first.returncode != 0
        second = tool(kit, proxy, "git", "ls-remote", f"{site}/repo.git")
        assert second.returncode == 0, second.stderr
        assert second.stdout.split()[1::2] == ["HEAD", "refs/heads/main"]
        # The same host, hence no failure first.
        assert tool(kit, proxy, "curl", "-sS", f"{site}/hello.txt").stdout == "hello"
        # Another host of the same machine fails once for itself.
        other = site.replace("localhost", "127.0.0.1")
        assert tool(kit, proxy, "curl", "-sS", f"{other}/hello.txt").returncode == 60
        assert tool(kit, proxy, "curl", "-sS", f"{other}/hello.txt").stdout == "hello"
        log = proxy.output()
    assert log.count("a client does not trust our CA for localhost") == 1
    assert f"NODE_EXTRA_CA_CERTS={tmp_path / 'mitmproxy'}/mitmproxy-ca-cert.pem" in log


def test_a_client_that_trusts_us_is_decrypted_whatever_other_hosts_did(tmp_path, kit, site):  # noqa: F811
    with ScriptedLLM(tls=kit.tls()) as llm, quiet_proxy(tmp_path, kit) as proxy:
        assert tool(kit, proxy, "curl", "-sS", f"{site}/hello.txt").returncode == 60
        post(llm.url + "/v1/chat/completions", chat(GIT), proxy, ca=kit.mitm_ca)
        assert llm.received[-1].body.count(b"<metaclaw-skills>") == 1


def test_a_client_that_has_spoken_to_a_host_may_hang_up_on_it(tmp_path, kit):  # noqa: F811
    """A connection without a request means distrust only from a client that never made one."""
    with ScriptedLLM(tls=kit.tls()) as llm, quiet_proxy(tmp_path, kit) as proxy:
        url = llm.url + "/v1/chat/completions"
        post(url, chat(GIT), proxy, ca=kit.mitm_ca)
        idle = connection(url, proxy, kit.mitm_ca)
        idle.connect()
        idle.close()
        eventually(lambda: proxy.output().count("client disconnect") >= 3)
        post(url, chat(GIT), proxy, ca=kit.mitm_ca)
        assert llm.received[-1].body.count(b"<metaclaw-skills>") == 1
        assert "does not trust" not in proxy.output()


@pytest.mark.parametrize("option", ["ignore_hosts=^example\\.com:443$", "allow_hosts=^localhost:\\d+$"])
def test_who_chose_hosts_by_hand_has_decided(tmp_path, kit, site, option):  # noqa: F811
    with quiet_proxy(tmp_path, kit, "--set", option) as proxy:
        for _ in range(2):
            assert tool(kit, proxy, "curl", "-sS", f"{site}/hello.txt").returncode == 60
        assert "NODE_EXTRA_CA_CERTS" not in proxy.output()


def test_a_client_that_goes_away_in_the_handshake_changes_nothing(tmp_path, kit, site):  # noqa: F811
    port = site.rpartition(":")[2]
    with quiet_proxy(tmp_path, kit) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as client:
            client.sendall(f"CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")  # no TLS at all
        eventually(lambda: proxy.output().count("client disconnect") >= 2)
        context = ssl.create_default_context(cafile=str(kit.mitm_ca))
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as raw:
            raw.sendall(f"CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            raw.recv(100)
            with context.wrap_socket(raw, server_hostname="localhost") as secure:  # our certificate, so not tunnelled
                issuer = dict(pair for part in secure.getpeercert()["issuer"] for pair in part)
        assert issuer["commonName"] == "mitmproxy"
        assert control(proxy)["open_requests"] == 0
