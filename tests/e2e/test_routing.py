"""Mode rl through a real mitmdump: a policy server without a model answers, or fails to."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e_tools import Proxy
from live_tools import AUTH, Kit, chat, connection, control, eventually, headers_for, kit, post, quiet_proxy, turns  # noqa: F401

from metaclaw_core.routes import Route, Served, read_heartbeat, write_route
from metaclaw_core.testing import Script, ScriptedLLM

RL = """
from metaclaw_core.proxy.addon import MetaClaw
from metaclaw_core.proxy.tls import TunnelUntrusting
addons = [MetaClaw(worker=False, policy="fake_policy"), TunnelUntrusting()]
"""


def route(working: int, stable: int = 1, *, enabled: bool = True) -> Route:
    served = tuple(Served(v, None if v == 1 else f"tinker://w/{v}") for v in range(1, working + 1))
    return Route(working, "base", working, stable, served, enabled)


class Lab:
    """The proxy in rl mode with its policy server, and the upstream."""

    def __init__(self, proxy: Proxy, upstream: ScriptedLLM, made: Kit) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self.kit = made
        self._turns = 0

    @property
    def home(self) -> Path:
        return self.proxy.home

    def order(self, **order: Any) -> None:
        new = self.home / "fake.json.new"
        new.write_text(json.dumps(order))
        new.replace(self.home / "fake.json")

    def policy_got(self) -> list[dict[str, Any]]:
        file = self.home / "fake-received.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def ask(self, body: bytes, path: str = "/v1/chat/completions", trace: str = "1", *more: tuple[str, str]) -> tuple[int, str]:
        url = self.upstream.url + path
        headers = headers_for(url, body, ("traceparent", f"00-{trace:0>32}-2222222222222222-01"), *more)
        with closing(connection(url, self.proxy, self.kit.mitm_ca)) as client:
            found = post(url, body, self.proxy, headers=headers, over=client)
        assert not [name for name, _ in found.headers if name.lower().startswith("x-metaclaw")]
        return found.status, found.body.decode()

    def say(self, text: str, trace: str = "1", **more: Any) -> tuple[int, str]:
        """The answer's text."""
        status, body = self.ask(chat(text, **more), trace=trace)
        try:
            return status, json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError):
            return status, body

    def routed_to(self, working: int) -> None:
        """Wait until the proxy knows of a route and of a server that has it."""

        def is_so() -> bool:
            found = self.status()["route"]
            return found["ready"] and found["enabled"] and found["working"] == working and working in found["versions"]

        eventually(is_so, 30)

    def status(self) -> dict[str, Any]:
        return control(self.proxy)

    def turns(self) -> list[dict[str, Any]]:
        """Recorded since the last `begin`."""
        return turns(self.home)[self._turns :]

    def begin(self) -> None:
        """As new, but for what is known of sessions."""
        self.order()
        write_route(self.home, route(3))
        control(self.proxy, "bypass", value="off")
        self.routed_to(3)
        self.upstream.received.clear()
        (self.home / "fake-received.jsonl").unlink(missing_ok=True)
        self._turns = len(turns(self.home))


@contextmanager
def a_lab(folder: Path, made: Kit, *arguments: str) -> Iterator[Lab]:
    folder.mkdir(exist_ok=True)
    write_route(folder / "metaclaw", route(3))
    upstream = ScriptedLLM(lambda _: Script(text="from upstream"), tls=made.tls())
    with upstream, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with quiet_proxy(folder, made, *arguments, script=RL) as proxy:
            found = Lab(proxy, upstream, made)
            found.routed_to(3)
            yield found


IN_RL = ("--set", "metaclaw_mode=rl", "--set", "metaclaw_rl_model=base", "--set", "metaclaw_rl_control_share=0")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, kit: Kit) -> Iterator[Lab]:  # noqa: F811
    with a_lab(tmp_path_factory.mktemp("rl"), kit, *IN_RL) as found:
        yield found


@pytest.fixture
def lab(shared: Lab) -> Lab:
    """Nothing in it may fail: the breaker remembers."""
    shared.begin()
    return shared


@pytest.fixture
def fresh(tmp_path: Path, kit: Kit) -> Iterator[Lab]:  # noqa: F811
    with a_lab(tmp_path, kit, *IN_RL) as found:
        yield found


def test_the_policy_server_answers_and_no_key_reaches_it(lab: Lab) -> None:
    body = chat("How do I resolve a git rebase conflict?")
    canary = [("x-api-key", "canary-1"), ("Cookie", "canary-2"), ("x-goog-api-key", "canary-3"), ("X-MetaClaw-Version", "canary-4")]
    status, answer = lab.ask(body, "/v1/chat/completions?api_key=canary-5&x=1", "1", *canary)
    assert status == 200
    assert "from version 3" in answer
    (got,) = lab.policy_got()
    beat = read_heartbeat(lab.home)
    assert beat is not None
    names = dict(got["headers"])
    flow, session, principal, length = (names.pop(name) for name in ("x-metaclaw-flow", "x-metaclaw-session", "x-metaclaw-principal", "content-length"))
    assert names == {
        "host": f"127.0.0.1:{beat.port}",
        "authorization": f"Bearer {(lab.home / 'fake-token').read_text()}",
        "x-metaclaw-version": "3",
        "x-metaclaw-explore": "1",
        "Content-Type": "application/json",
        "traceparent": "00-00000000000000000000000000000001-2222222222222222-01",
    }
    assert "canary" not in json.dumps(got)
    assert AUTH not in json.dumps(got)
    assert got["path"] == "/v1/chat/completions?api_key=[redacted]&x=1"
    assert b"<metaclaw-skills>" in got["body"].encode()
    assert len(got["body"].encode()) == int(length)
    assert lab.upstream.received == []

    (row,) = lab.turns()
    assert (row["flow_id"], row["principal"], row["version"]) == (flow, principal, 3)
    assert (row["scheme"], row["host"], row["port"]) == ("https", "127.0.0.1", lab.upstream.port)
    assert row["path"] == "/v1/chat/completions?api_key=[redacted]&x=1"
    assert row["assistant_text"] == "from version 3"
    assert len(session) == 32


def test_a_stream_comes_through_and_is_recorded(lab: Lab) -> None:
    status, answer = lab.ask(chat("stream it", stream=True))
    assert (status, answer.count("data: ")) == (200, 6)
    (row,) = lab.turns()
    assert (row["assistant_text"], row["version"], row["state"]) == ("from version 3", 3, "captured")


def test_requests_of_every_dialect_are_routed(lab: Lab) -> None:
    user = [{"role": "user", "content": "in every dialect"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"model": "m", "messages": user},
        "/v1/responses": {"model": "m", "input": user},
        "/v1/messages": {"model": "m", "max_tokens": 9, "messages": user},
        "/v1beta/models/m:generateContent": {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]},
        "/api/chat": {"model": "m", "messages": user, "stream": False},
    }
    for path, body in bodies.items():
        status, answer = lab.ask(json.dumps(body).encode(), path)
        assert (status, "from version 3" in answer) == (200, True), path
    assert [got["path"] for got in lab.policy_got()] == list(bodies)
    assert {row["dialect"]: row["version"] for row in lab.turns()} == dict.fromkeys(
        ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama"), 3
    )


def test_routed_and_not_routed_requests_share_a_connection(lab: Lab) -> None:
    url = lab.upstream.url + "/v1/chat/completions"
    client = connection(url, lab.proxy, lab.kit.mitm_ca)
    body = chat("over one connection")
    texts = []
    for more in ([], [("x-metaclaw", "off")], []):
        answer = post(url, body, lab.proxy, headers=headers_for(url, body, *more), over=client)
        texts.append(json.loads(answer.body)["choices"][0]["message"]["content"])
    client.close()
    assert texts == ["from version 3", "from upstream", "from version 3"]
    (arrived,) = lab.upstream.received
    assert arrived.header("authorization") == AUTH
    assert arrived.header("host") == f"127.0.0.1:{lab.upstream.port}"


def test_a_tool_loop_keeps_its_weights_and_the_next_message_gets_the_new_ones(lab: Lab) -> None:
    asked = [{"role": "user", "content": "list files"}]
    assert lab.ask(json.dumps({"model": "m", "messages": asked}).encode())[1].count("from version 3") == 1
    write_route(lab.home, route(4))
    began = time.monotonic()
    lab.routed_to(4)
    assert time.monotonic() - began < 1.0
    call = {"id": "c1", "type": "function", "function": {"name": "ls", "arguments": "{}"}}
    loop = [*asked, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "a b"}]
    assert "from version 3" in lab.ask(json.dumps({"model": "m", "messages": loop}).encode())[1]
    more = [*loop, {"role": "assistant", "content": "a and b"}, {"role": "user", "content": "thanks"}]
    assert "from version 4" in lab.ask(json.dumps({"model": "m", "messages": more}).encode(), trace="2")[1]


def test_after_a_failure_the_agents_retry_reaches_its_upstream_with_its_own_key(fresh: Lab) -> None:
    fresh.order(fail="timeout")
    assert fresh.say("hello")[0] == 503
    fresh.order()
    assert fresh.say("hello") == (200, "from upstream")
    assert fresh.upstream.received[0].header("authorization") == AUTH
    assert fresh.say("next", trace="2") == (200, "from version 3")
    first, second, third = fresh.turns()
    assert (first["state"], first["reason"], first["error"], first["version"]) == ("skipped", "status 503", "policy: timeout", None)
    assert (second["state"], second["retry"], second["version"]) == ("captured", True, None)
    assert third["version"] == 3
    assert fresh.status()["counters"]["the policy server failed: timeout"] == 1

    # No strange status of the policy server is taken for the provider's: after a 401 an agent drops its key.
    fresh.order(status=401)
    assert fresh.say("third", trace="3")[0] == 503
    assert fresh.say("third", trace="3") == (200, "from upstream")
    assert fresh.turns()[3]["error"] == "policy: status 401"


def test_a_server_that_breaks_off_or_dies_costs_one_attempt_and_is_started_again(fresh: Lab) -> None:
    fresh.order(cut_after=2)
    with pytest.raises(http.client.IncompleteRead):
        fresh.ask(chat("hello", stream=True))
    fresh.order()
    assert fresh.say("hello") == (200, "from upstream")
    fresh.order(die=True)
    status, _ = fresh.say("next", trace="2")
    assert status == 502  # mitmproxy's own page: agents repeat it as they do a 503
    fresh.order()
    assert fresh.say("next", trace="2") == (200, "from upstream")
    cut, _, dead, _ = fresh.turns()
    assert cut["error"].startswith("policy: the answer broke off")
    assert dead["error"].startswith("policy: no connection")
    assert (cut["state"], dead["state"]) == ("skipped", "skipped")
    fresh.routed_to(3)
    assert fresh.say("third", trace="3") == (200, "from version 3")


def test_three_failures_open_the_breaker(fresh: Lab) -> None:
    fresh.order(fail="engine")
    for n in range(3):
        assert fresh.say(f"q{n}", trace=f"{n}")[0] == 503
    fresh.order()
    assert fresh.say("other", trace="9") == (200, "from upstream")
    assert fresh.status()["route"]["breaker"] == "open"


def test_a_server_that_hangs_is_ended_so_that_its_requests_are_repeated(fresh: Lab) -> None:
    assert fresh.say("hello")[0] == 200
    beat = read_heartbeat(fresh.home)
    assert beat is not None
    os.kill(beat.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert fresh.say("next", trace="2")[0] == 502
    assert time.monotonic() - began < 25
    assert fresh.say("next", trace="2") == (200, "from upstream")
    fresh.routed_to(3)


@pytest.mark.parametrize("order", [{"ready": False}, {"versions": []}])
def test_without_a_server_that_is_ready_nothing_is_routed(lab: Lab, order: dict[str, Any]) -> None:
    lab.order(**order)
    eventually(lambda: lab.say("hello", trace=f"{time.monotonic_ns() % 10**9}") == (200, "from upstream"))
    lab.order()


def test_a_route_that_is_off_sends_everything_to_the_upstream(lab: Lab) -> None:
    write_route(lab.home, route(3, enabled=False))
    eventually(lambda: lab.status()["route"]["enabled"] is False)
    assert lab.say("hello") == (200, "from upstream")
    assert lab.policy_got() == []


def test_a_side_turn_and_a_bypassed_one_go_to_the_upstream(lab: Lab) -> None:
    title = {"model": "m", "messages": [{"role": "system", "content": "Generate a short title"}, {"role": "user", "content": "x"}]}
    openclaw = ("User-Agent", "openclaw/2026.9.6")
    body = json.dumps(title).encode()
    url = lab.upstream.url + "/v1/chat/completions"
    headers = [openclaw if name == "User-Agent" else (name, value) for name, value in headers_for(url, body)]
    assert b"from upstream" in post(url, body, lab.proxy, ca=lab.kit.mitm_ca, headers=headers).body
    control(lab.proxy, "bypass", value="on")
    assert lab.say("hello") == (200, "from upstream")
    assert lab.policy_got() == []


def test_a_conversation_that_is_ours_is_not_continued_at_the_upstream(lab: Lab) -> None:
    answer = {"id": "resp_mc_0123", "object": "response", "status": "completed", "model": "m", "created_at": 1, "output": []}
    lab.order(raw=json.dumps(answer))
    first = {"model": "m", "input": [{"role": "user", "content": "hi"}]}
    assert "resp_mc_0123" in lab.ask(json.dumps(first).encode(), "/v1/responses")[1]
    lab.order(ready=False)
    eventually(lambda: lab.status()["route"]["ready"] is False)
    more = {"model": "m", "input": [{"role": "user", "content": "and?"}], "previous_response_id": "resp_mc_0123"}
    status, body = lab.ask(json.dumps(more).encode(), "/v1/responses", trace="2")
    assert (status, json.loads(body)["error"]["code"]) == (503, "previous_response_not_found")
    whole = {"model": "m", "input": [*first["input"], {"role": "user", "content": "and?"}]}  # type: ignore[misc]
    assert "from upstream" in lab.ask(json.dumps(whole).encode(), "/v1/responses", trace="2")[1]
    assert len(lab.upstream.received) == 1


def test_the_mode_can_change_while_the_proxy_runs(tmp_path: Path, kit: Kit) -> None:  # noqa: F811
    home = tmp_path / "metaclaw"
    home.mkdir(mode=0o700)
    (home / "config.yaml").write_text("mode: rl\nrl: {model: base, control_share: 0}\n")
    with a_lab(tmp_path, kit) as lab:
        assert lab.say("hello") == (200, "from version 3")
        (home / "config.yaml").write_text("mode: skills_only\n")
        control(lab.proxy, "reload")
        assert lab.say("next", trace="2") == (200, "from upstream")
        assert (lab.status()["route"], lab.status()["children"]) == (None, [])
        (home / "config.yaml").write_text("mode: rl\nrl: {model: base, control_share: 0}\n")
        control(lab.proxy, "reload")
        lab.routed_to(3)
        assert lab.say("third", trace="3") == (200, "from version 3")


def test_a_dump_holds_the_clients_own_request_and_not_our_token(tmp_path: Path, kit: Kit) -> None:  # noqa: F811
    dump = tmp_path / "flows"
    with a_lab(tmp_path, kit, *IN_RL, "-w", str(dump)) as lab:
        assert lab.say("hello", trace="5")[0] == 200
        token = (lab.home / "fake-token").read_text()
        lab.proxy.stop()
    content = dump.read_bytes()
    assert token.encode() not in content
    assert f"https;4:host;9:127.0.0.1;4:port;5:{lab.upstream.port}".encode() in content or str(lab.upstream.port).encode() in content
    assert AUTH.encode() in content
    assert "sets connection_strategy=lazy, http2=false" in lab.proxy.output()
