"""What the tests of the live proxy share: a skill index and certificates made once, a client that hides nothing."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from e2e_tools import Proxy, environment, running_proxy
from mitmproxy.certs import CertStore

from metaclaw_core.proxy.control import RunningProxy, call, running_proxies

# The addon without its worker: for tests that are about traffic only.
QUIET = """
from metaclaw_core.proxy.addon import MetaClaw
from metaclaw_core.proxy.tls import TunnelUntrusting
addons = [MetaClaw(worker=False), TunnelUntrusting()]
"""
GIT = "How do I resolve a git rebase conflict?"  # the built-in bank has a skill for it
AUTH = "Bearer sk-test-0123456789abcdef"


@dataclass(frozen=True)
class Kit:
    """Made once for all tests: `index` is the built-in bank's; `confdir` holds mitmproxy's CA; `ca` signed `leaf`."""

    index: Path
    confdir: Path
    ca: Path
    leaf: Path

    @property
    def mitm_ca(self) -> Path:
        return self.confdir / "mitmproxy-ca-cert.pem"

    def tls(self) -> ssl.SSLContext:
        """For a server on 127.0.0.1 and localhost."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.leaf)
        return context


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    home = folder / "metaclaw"
    home.mkdir()
    build = [sys.executable, "-m", "metaclaw_core.skills.build"]
    subprocess.run(build, env=environment(home), check=True, capture_output=True, timeout=120)
    CertStore.from_store(folder / "mitmproxy", "mitmproxy", 2048)
    store = CertStore.from_store(folder / "upstream", "upstream", 2048)
    entry = store.get_cert("localhost", [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    leaf = folder / "leaf.pem"
    key = entry.privatekey.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    leaf.write_bytes(entry.cert.to_pem() + key)
    return Kit(home / "skills.index", folder / "mitmproxy", folder / "upstream" / "upstream-ca-cert.pem", leaf)


def prepare(folder: Path, kit: Kit) -> Path:
    """A home with the skill index in it; its path."""
    home = folder / "metaclaw"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (home / "skills.index").exists():
        shutil.copy(kit.index, home / "skills.index")
    if not (folder / "mitmproxy").exists():
        shutil.copytree(kit.confdir, folder / "mitmproxy")
    return home


@contextmanager
def quiet_proxy(folder: Path, kit: Kit, *arguments: str, script: str = QUIET) -> Iterator[Proxy]:
    """mitmdump with the addon but no worker."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, kit)
    file = folder / "quiet.py"
    file.write_text(script)
    upstream_ca = ("--set", f"ssl_verify_upstream_trusted_ca={kit.ca}")
    with running_proxy(folder, "-s", str(file), *upstream_ca, *arguments) as proxy:
        control(proxy)  # the addon is there
        yield proxy


# --- what else is in the network ------------------------------------------------------------------


@contextmanager
def https_files(folder: Path, context: ssl.SSLContext) -> Iterator[str]:
    """The files of `folder` over HTTPS."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # a handshake that the client broke off

    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"https://localhost:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def site(tmp_path: Path, kit: Kit) -> Iterator[str]:
    """A git repository (the "dumb" protocol) and a text file."""
    www = tmp_path / "www"
    www.mkdir()
    (www / "hello.txt").write_text("hello")
    run = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    work = tmp_path / "work"
    subprocess.run(["git", "init", "-q", "-b", "main", str(work)], check=True)
    subprocess.run([*run, "-C", str(work), "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(www / "repo.git")], check=True)
    subprocess.run(["git", "-C", str(www / "repo.git"), "update-server-info"], check=True)
    with https_files(www, kit.tls()) as url:
        yield url


# --- what can be asked ---------------------------------------------------------------------------


def control(proxy: Proxy, command: str = "status", **arguments: Any) -> dict[str, Any]:
    found = eventually(lambda: _running(proxy) or proxy.process.poll() is not None, 30)
    assert isinstance(found, RunningProxy), f"the proxy has ended ({proxy.process.returncode}):\n{proxy.output()}"
    return call(found, command, **arguments)


def _running(proxy: Proxy) -> RunningProxy | None:
    return next((p for p in running_proxies(proxy.home) if p.pid == proxy.process.pid and p.socket.exists()), None)


def eventually[T](check: Callable[[], T | None], seconds: float = 10.0) -> T:
    """What `check` returns, once that is something."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def turns(home: Path) -> list[dict[str, Any]]:
    """``metaclaw turns --json``, which takes the spools in first."""
    tool = Path(sys.executable).with_name("metaclaw")
    result = subprocess.run([tool, "turns", "--json"], env=environment(home), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def descendants(home: Path) -> dict[int, str]:
    """The processes of this home by METACLAW_HOME in their environment, ours aside."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"METACLAW_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    found.pop(os.getpid(), None)
    return {pid: line for pid, line in found.items() if line}


def workers(home: Path) -> list[int]:
    return [pid for pid, line in descendants(home).items() if "metaclaw_core.worker" in line]


# --- a client ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


def connection(url: str, proxy: Proxy | None, ca: Path | None = None) -> http.client.HTTPConnection:
    """To `url`'s host, through `proxy` where there is one; `ca` is what the client trusts."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.partition("/")[0].partition(":")
    if scheme == "http":
        return http.client.HTTPConnection(host, proxy.port if proxy else int(port), timeout=20)
    context = ssl.create_default_context(cafile=str(ca))
    if proxy is None:
        return http.client.HTTPSConnection(host, int(port), timeout=20, context=context)
    tunnel = http.client.HTTPSConnection(host, proxy.port, timeout=20, context=context)
    tunnel.set_tunnel(host, int(port))
    return tunnel


def headers_for(url: str, body: bytes, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """What a client sends, in an order and spelling of its own."""
    host = url.partition("://")[2].partition("/")[0]
    return [
        ("hOst", host),
        ("User-Agent", "test/1"),
        ("AUTHORIZATION", AUTH),
        ("accept-encoding", "gzip, br"),
        ("X-Stainless-Lang", "js"),
        ("Content-Type", "application/json"),
        *more,
        ("content-Length", str(len(body))),
        ("X-Last", "1"),
    ]


def post(
    url: str,
    body: bytes,
    proxy: Proxy | None = None,
    *,
    ca: Path | None = None,
    headers: list[tuple[str, str]] | None = None,
    over: http.client.HTTPConnection | None = None,
) -> Answer:
    """One POST as it is given; `over` an open connection."""
    client = over or connection(url, proxy, ca)
    absolute = proxy is not None and url.startswith("http:")
    path = url if absolute else "/" + url.partition("://")[2].partition("/")[2]
    client.putrequest("POST", path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers if headers is not None else headers_for(url, body):
        client.putheader(name, value)
    client.endheaders(body)
    response = client.getresponse()
    answer = Answer(response.status, response.getheaders(), response.read())
    if over is None:
        client.close()
    return answer


def chat(text: str, **more: Any) -> bytes:
    messages = [{"role": "system", "content": "You are a tester."}, {"role": "user", "content": text}]
    return json.dumps({"model": "m", "messages": messages, **more}).encode()
