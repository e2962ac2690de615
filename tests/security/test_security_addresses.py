"""Where we open connections ourselves, a metadata service is never asked: not by number, not by name, not by a redirect."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.addresses import ForbiddenAddress, forbidden_address, forbidden_host, forbidden_url, refuse_forbidden
from metaclaw_core.cli.presets import tinker_models
from metaclaw_core.errors import ConfigError
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.caller import CallerClient
from metaclaw_core.learn.credentials import Borrowed, CallerKey, Callers
from metaclaw_core.learn.endpoint import Endpoint, evolver_endpoint, judge_endpoint, llm_endpoint
from metaclaw_core.learn.llm import LLMClient, LLMRefused, Retry
from metaclaw_core.settings import Settings, load_settings
from metaclaw_core.skills.embedding import EmbeddingError, HttpEmbedder, create_embedder
from metaclaw_core.skills.retrieve import Options
from metaclaw_core.store.db import open_store

METADATA = [
    "169.254.169.254",
    "169.254.170.2",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "100.100.100.200",
    "metadata.google.internal",
    "Metadata.Google.Internal.",
]
IS = "at a link-local or cloud metadata address"


@pytest.mark.parametrize("host", METADATA)
def test_nothing_that_can_be_configured_may_be_a_metadata_service(host):
    url = f"http://{host}/v1"
    assert forbidden_url(url) == IS
    llm = {"api_base": url, "model_id": "m"}
    with pytest.raises(ConfigError, match=IS):
        llm_endpoint(Settings.model_validate({"llm": llm}))
    with pytest.raises(ConfigError, match=IS):
        judge_endpoint(Settings.model_validate({"rl": {"prm_url": url, "prm_model": "m"}}))
    with pytest.raises(ConfigError, match=IS):
        evolver_endpoint(Settings.model_validate({"rl": {"evolver_api_base": url, "evolver_model": "m"}}))
    with pytest.raises(ConfigError, match=f"skills.embedding_url = .* is {IS}"):
        create_embedder(Options(embedding_url=url, embedding_model="m"))
    assert tinker_models(url, "tml-x").problem == f"{url} is {IS}"
    with pytest.raises(ConfigError, match=f"rl.tinker_base_url = .* is not allowed .*: it is {IS}"):
        load_settings({"rl": {"tinker_base_url": url}})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.5", "192.168.1.7", "172.16.0.1", "[fd12::1]", "api.openai.com", "llm.lan"])
def test_loopback_and_private_networks_are_where_local_models_live(host):
    assert forbidden_url(f"http://{host}:8000/v1") is None


def test_what_is_no_url_is_not_judged_here():
    assert forbidden_url("http://[::1") is None
    assert forbidden_url("") is None


@given(st.integers(min_value=0, max_value=2**16 - 1))
def test_every_link_local_address_is_refused_in_every_spelling(low):
    address = f"169.254.{low >> 8}.{low & 255}"
    for spelled in (address, f"::ffff:{address}", f"64:ff9b::{address}", f"::ffff:a9fe:{low:x}"):
        assert forbidden_address(spelled) == IS


@given(st.text(max_size=20))
def test_any_text_may_be_a_host(text):
    assert forbidden_host(text) in (None, IS, "at no address of a server")


@pytest.mark.parametrize("spelled", ["2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518"])
def test_a_spelling_that_only_the_resolver_knows_is_seen_by_the_socket(spelled):
    """Such a host is a name to us; the address that is looked at is the one that a connection has been made to."""
    address = socket.getaddrinfo(spelled, 80, socket.AF_INET)[0][4][0]
    assert address == "169.254.169.254"
    with pytest.raises(ForbiddenAddress, match=f"169.254.169.254 is {IS}; it is not asked."):
        asyncio.run(refuse_forbidden("connection.connect_tcp.complete", {"return_value": Connected(address)}))


class Connected:
    """What httpx has once a connection stands."""

    def __init__(self, address: str) -> None:
        self.address, self.closed = address, False

    def get_extra_info(self, what: str) -> tuple[str, int]:
        assert what == "server_addr"
        return (self.address, 80)

    async def aclose(self) -> None:
        self.closed = True


def test_the_connection_is_closed_before_a_byte_is_sent():
    stream = Connected("169.254.169.254")
    with pytest.raises(ForbiddenAddress):
        asyncio.run(refuse_forbidden("connection.connect_tcp.complete", {"return_value": stream}))
    assert stream.closed
    asyncio.run(refuse_forbidden("connection.connect_tcp.complete", {"return_value": Connected("127.0.0.1")}))
    asyncio.run(refuse_forbidden("http11.send_request_headers.started", {}))


@contextmanager
def listening(host: str) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers nothing; what reaches it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server(socket.getaddrinfo(host, 0, family, socket.SOCK_STREAM)[0][4], family=family) as server:
        got: list[bytes] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    got.append(connection.recv(1000))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], got
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def link_local() -> str | None:
    """A link-local address of this machine; None: it has none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, scope, _, name = line.split()
            if scope == "20":
                return f"{ipaddress.ip_address(int(digits, 16))}%{name}"
    return None


@pytest.mark.skipif(link_local() is None, reason="this machine has no link-local address")
def test_a_server_at_a_link_local_address_is_connected_to_and_sent_nothing():
    host = link_local()
    assert host is not None
    with listening(host) as (port, got):

        async def ask() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                # The zone as httpx wants it; the URL itself is not looked at here.
                await client.post(f"http://[{host}]:{port}/v1", content=b"secret", extensions={"trace": refuse_forbidden})

        with pytest.raises(ForbiddenAddress):
            asyncio.run(ask())
    assert got in ([], [b""])


@contextmanager
def redirecting(to: str) -> Iterator[tuple[str, list[str]]]:
    """A server that sends everybody on."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            self.send_response(307)
            self.send_header("location", to)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_no_client_of_ours_follows_a_redirect(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    with listening("127.0.0.1") as (port, got), redirecting(f"http://127.0.0.1:{port}/latest/meta-data/") as (url, asked), open_store(tmp_path / "store.db") as store:

        async def ask() -> None:
            budget = Budget(store, None)
            async with LLMClient(Endpoint(f"{url}/v1", "m", "k"), budget, retry=Retry(attempts=1)) as client:
                with pytest.raises(LLMRefused, match=r"redirects to 127\.0\.0\.1, which is not followed; set the API base"):
                    await client.complete(messages, purpose="judge", max_tokens=10)
            embedder = HttpEmbedder(f"{url}/v1", "m", "k")
            with pytest.raises(EmbeddingError, match="307"):
                await embedder.embed(["x"], 5)
            await embedder.aclose()
            origin = urlsplit(url)
            key = CallerKey("p", "http", "127.0.0.1", origin.port or 0, "/v1/chat/completions", "openai_chat", "authorization", "k")
            caller = CallerClient(Borrowed(key, "m", 10_000), Callers(store, ["127.0.0.1"], enabled=True), budget)
            with pytest.raises(LLMRefused, match="answered 307 to the caller's key"):
                await caller.complete(messages, purpose="evolve", max_tokens=1_000)

        asyncio.run(ask())
    assert asked == ["/v1/chat/completions", "/v1/embeddings", "/v1/chat/completions"]
    assert got == []


def test_a_listener_of_this_test_is_what_it_seems():
    """Without it the test above would pass for a server that nobody can reach."""
    with listening("127.0.0.1") as (port, got):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        client.request("GET", "/")
        with pytest.raises(http.client.HTTPException):
            client.getresponse()
        client.close()
    assert got[0].startswith(b"GET / HTTP/1.1")

