"""``metaclaw start``: the proxy of our own making, which opens nothing but LLM traffic."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from e2e_tools import Proxy, environment, free_port, wait_for_port
from live_tools import GIT, chat, control, descendants, eventually, kit, post, prepare  # noqa: F401 - kit is a fixture

from metaclaw_core.testing import ScriptedLLM

pytestmark = pytest.mark.slow


@contextmanager
def started(folder: Path, kit, *arguments: str) -> Iterator[Proxy]:  # noqa: F811
    home = prepare(folder, kit)
    port, log = free_port(), folder / "start.log"
    tool = Path(sys.executable).with_name("metaclaw")
    line = [str(tool), "start", "--port", str(port), "--set", f"ssl_verify_upstream_trusted_ca={kit.ca}", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=environment(home))
    proxy = Proxy(process, port, home, log)
    try:
        wait_for_port(port, process, log)
        yield proxy
    finally:
        process.terminate()
        process.wait(15)


def issuer(proxy: Proxy, port: int, *trusted: Path) -> str:
    """Who signed the certificate that a client of localhost:`port` is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for file in trusted:
        context.load_verify_locations(file)
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as raw:
        raw.sendall(f"CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        with context.wrap_socket(raw, server_hostname="localhost") as secure:
            names = dict(pair for part in secure.getpeercert()["issuer"] for pair in part)
    return names["commonName"]


def test_it_serves_llm_hosts_and_passes_others_with_their_own_certificate(tmp_path, kit):  # noqa: F811
    old = os.umask(0)
    try:
        with ScriptedLLM() as plain, ScriptedLLM(tls=kit.tls()) as secret:
            with started(tmp_path, kit) as proxy:
                ca = proxy.home / "mitmproxy" / "mitmproxy-ca-cert.pem"
                assert f"metaclaw listens on 127.0.0.1:{proxy.port} (mode skills_only)" in proxy.output()
                assert f"NODE_EXTRA_CA_CERTS={ca}" in proxy.output()
                post(plain.url + "/v1/chat/completions", chat(GIT), proxy)
                assert plain.received[-1].body.count(b"<metaclaw-skills>") == 1
                assert issuer(proxy, secret.port, kit.ca, ca) == "upstream"
                assert control(proxy)["listen"] == [f"127.0.0.1:{proxy.port}"]
                assert psutil.Process(proxy.process.pid).cmdline()[1] == "-O"  # the process that was started, in its stead
            assert proxy.process.returncode == 0
            with started(tmp_path, kit, "--set", "metaclaw_hosts=[localhost]") as proxy:
                assert issuer(proxy, secret.port, kit.ca, ca) == "mitmproxy"
                url = secret.url.replace("127.0.0.1", "localhost") + "/v1/chat/completions"
                post(url, chat(GIT), proxy, ca=ca)
                assert secret.received[-1].body.count(b"<metaclaw-skills>") == 1
                proxy.process.send_signal(signal.SIGINT)
                assert proxy.process.wait(15) == 0
    finally:
        os.umask(old)
    eventually(lambda: not descendants(proxy.home))
    (proxy.home / "skills.index").chmod(0o600)  # copied here by this test
    for path in proxy.home.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_with_no_lean_mitmproxy_checks_itself_as_ever(tmp_path, kit):  # noqa: F811
    with ScriptedLLM() as llm, started(tmp_path, kit, "--no-lean") as proxy:
        post(llm.url + "/v1/chat/completions", chat(GIT), proxy)
        assert llm.received[-1].body.count(b"<metaclaw-skills>") == 1
        assert "-O" not in psutil.Process(proxy.process.pid).cmdline()


def test_a_taken_port_and_a_bad_option_are_one_sentence_each(tmp_path, metaclaw):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = metaclaw("start", "--port", str(port), check=False)
        assert result.returncode == 1
        assert result.stderr.startswith(f"metaclaw: 127.0.0.1:{port} can't be listened on")
    for setting, message in (
        ("metaclaw_top_k=lots", "skills.top_k = 'lots' is not allowed"),
        ("metaclaw_nonsense=1", "metaclaw_nonsense"),
        ("nonsense=1", "nonsense"),
    ):
        result = metaclaw("start", "--port", str(free_port()), "--set", setting, check=False)
        assert result.returncode == 1, setting
        assert message in result.stderr
        assert "Traceback" not in result.stderr
