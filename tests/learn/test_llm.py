"""The LLM client against a real HTTP server: what it sends, what it makes of trouble, where it never goes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from judge_tools import QUICK, client_of

from metaclaw_core.addresses import forbidden_address
from metaclaw_core.errors import ConfigError
from metaclaw_core.learn.budget import Budget, BudgetExhausted, spent
from metaclaw_core.learn.endpoint import Endpoint, evolver_endpoint, judge_endpoint, llm_endpoint
from metaclaw_core.learn.llm import Completion, LLMClient, LLMRefused, LLMUnavailable
from metaclaw_core.settings import Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.testing import Received, Script, ScriptedLLM

KEY = "k-0123456789"
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.db") as opened:
        yield opened


def ask(client: LLMClient, times: int = 1, **fields: Any) -> list[Any]:
    """The results of `times` calls at once, exceptions among them."""

    async def run() -> list[Any]:
        async with client:
            calls = (
                client.complete(ASK, **{"purpose": "judge", "max_tokens": 64, **fields}) for _ in range(times)
            )
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


def in_turn(*scripts: Script) -> Callable[[Received], Script]:
    """The scripts one after the other, the last one for ever."""
    left = list(scripts)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


# --- what is sent -------------------------------------------------------------------------------


def test_a_call_sends_the_question_and_brings_the_answer_with_its_counts(store: Store) -> None:
    with ScriptedLLM(lambda _: Script(text="Hi.")) as llm:
        assert ask(client_of(llm, store), temperature=0.5) == [Completion("Hi.", "scripted", 10, 5, False)]
        [sent] = llm.received
    assert sent.json() == {"model": "judge-1", "messages": ASK, "max_tokens": 64, "temperature": 0.5}
    assert (sent.path, sent.header("authorization")) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert sent.header("x-metaclaw") == "off"


def test_anthropic_messages_have_their_own_shape(store: Store) -> None:
    with ScriptedLLM(lambda _: Script(text="Hi.")) as llm:
        endpoint = Endpoint(llm.url, "claude", KEY, "anthropic")
        assert ask(LLMClient(endpoint, Budget(store, None))) == [Completion("Hi.", "scripted", 10, 5, False)]
        [sent] = llm.received
    assert sent.json() == {
        "model": "claude",
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_tokens": 64,
        "temperature": 0.0,
    }
    assert (sent.path, sent.header("x-api-key"), sent.header("authorization")) == ("/v1/messages", KEY, None)
    assert sent.header("anthropic-version") == "2023-06-01"


def test_a_json_object_can_be_asked_for_and_another_model(store: Store) -> None:
    with ScriptedLLM() as llm:
        ask(client_of(llm, store), json_object=True, model="judge-2")
        assert llm.received[0].json()["response_format"] == {"type": "json_object"}
        assert llm.received[0].json()["model"] == "judge-2"
        assert spent(store)[0]["model"] == "judge-2"


def test_without_a_key_no_credential_is_sent(store: Store) -> None:
    with ScriptedLLM() as llm:
        ask(LLMClient(Endpoint(f"{llm.url}/v1", "m", ""), Budget(store, None)))
        assert llm.received[0].header("authorization") is None


@pytest.mark.parametrize(
    ("base", "dialect", "url"),
    [
        ("https://a.example/v1", "openai", "https://a.example/v1/chat/completions"),
        ("https://a.example/v1/", "openai", "https://a.example/v1/chat/completions"),
        ("https://a.example/x/chat/completions", "openai", "https://a.example/x/chat/completions"),
        ("https://a.example", "anthropic", "https://a.example/v1/messages"),
        ("https://a.example/v1", "anthropic", "https://a.example/v1/messages"),
        ("https://a.example/x/messages", "anthropic", "https://a.example/x/messages"),
    ],
)
def test_the_address_is_made_from_the_base(base: str, dialect: Any, url: str) -> None:
    assert Endpoint(base, "m", "", dialect).url == url


# --- what comes back ----------------------------------------------------------------------------


def chat(content: Any, **fields: Any) -> bytes:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": fields.pop("reason", "stop")}
    return json.dumps({"choices": [choice], **fields}).encode()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (chat("Hi."), Completion("Hi.", "judge-1", None, None)),
        (chat(None), Completion("", "judge-1", None, None)),
        (chat("Hi", reason="length"), Completion("Hi", "judge-1", None, None, True)),
        (chat([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], model="m-9"), Completion("Hi", "m-9", None, None)),
        (chat("Hi", usage={"prompt_tokens": 3, "completion_tokens": -1}), Completion("Hi", "judge-1", 3, None)),
        (chat("Hi", usage={"prompt_tokens": True, "completion_tokens": "5"}), Completion("Hi", "judge-1", None, None)),
    ],
)
def test_what_the_provider_did_not_say_is_unknown(store: Store, raw: bytes, expected: Completion) -> None:
    with ScriptedLLM(lambda _: Script(raw=raw)) as llm:
        assert ask(client_of(llm, store)) == [expected]


@pytest.mark.parametrize(
    "raw", [b"<html>down</html>", b"{}", b"[]", b'{"choices": []}', b'{"error": {"message": "overloaded", "code": 502}}']
)
def test_an_answer_that_is_none_is_a_reason_to_try_again_and_is_paid_for(store: Store, raw: bytes) -> None:
    with ScriptedLLM(lambda _: Script(raw=raw)) as llm:
        [error] = ask(client_of(llm, store))
        assert isinstance(error, LLMUnavailable)
        assert len(llm.received) == 3
    assert spent(store)[0]["requests"] == 3
    assert spent(store)[0]["estimated_tokens"] == 3 * (64 + 3 + 2 + 16)


# --- trouble ------------------------------------------------------------------------------------


def test_a_429_is_repeated_after_the_time_the_server_asks_for(store: Store) -> None:
    with ScriptedLLM(in_turn(Script(status=429, headers={"retry-after": "0.3"}), Script(text="Hi."))) as llm:
        started = time.monotonic()
        [answer] = ask(client_of(llm, store))
        assert answer.text == "Hi."
        assert 0.3 <= time.monotonic() - started < 2
        assert len(llm.received) == 2


def test_while_one_request_is_told_to_wait_no_other_is_sent(store: Store) -> None:
    async def run(client: LLMClient) -> float:
        async with client:
            first = asyncio.ensure_future(client.complete(ASK, purpose="judge", max_tokens=8))
            while not llm.received:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            started = time.monotonic()
            await client.complete(ASK, purpose="judge", max_tokens=8)
            await first
            return time.monotonic() - started

    with ScriptedLLM(in_turn(Script(status=429, headers={"retry-after": "0.5"}), Script())) as llm:
        assert asyncio.run(run(client_of(llm, store))) > 0.3


@pytest.mark.parametrize("wait", ["3600", "date"])
def test_a_long_pause_is_left_to_the_caller(store: Store, wait: str) -> None:
    if wait == "date":
        wait = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    with ScriptedLLM(lambda _: Script(status=429, headers={"retry-after": wait})) as llm:
        [error] = ask(client_of(llm, store))
        assert isinstance(error, LLMUnavailable)
        assert error.retry_after == pytest.approx(3600, abs=2)
        assert len(llm.received) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_server_in_trouble_is_asked_three_times_and_costs_nothing(store: Store, status: int) -> None:
    with ScriptedLLM(lambda _: Script(status=status)) as llm:
        [error] = ask(client_of(llm, store))
        assert isinstance(error, LLMUnavailable)
        assert str(error) == f"127.0.0.1:{llm.port} answered {status}: scripted"
        assert len(llm.received) == 3
    assert spent(store) == []


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
def test_a_refusal_is_not_repeated(store: Store, status: int) -> None:
    with ScriptedLLM(lambda _: Script(status=status)) as llm:
        [error] = ask(client_of(llm, store))
        assert isinstance(error, LLMRefused)
        assert error.status == status
        assert len(llm.received) == 1


def test_a_slow_answer_is_given_up_and_counted_as_spent(store: Store) -> None:
    with ScriptedLLM(in_turn(Script(first_after=30), Script(text="Hi."))) as llm:
        [answer] = ask(client_of(llm, store, timeout_s=0.2))
        assert answer.text == "Hi."
        [row] = spent(store)
        assert (row["requests"], row["estimated_tokens"]) == (2, 64 + 3 + 2 + 16)


def test_an_answer_that_trickles_is_given_up_as_a_whole(store: Store) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        try:
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass  # given up, as it should be
        finally:
            writer.close()

    async def run() -> float:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        started = time.monotonic()
        async with LLMClient(Endpoint(f"http://127.0.0.1:{port}", "m", KEY), Budget(store, None), timeout_s=0.3, retry=QUICK) as client:
            with pytest.raises(LLMUnavailable, match=r"did not answer within 0\.3 s"):
                await client.complete(ASK, purpose="judge", max_tokens=8)
        server.close()
        return time.monotonic() - started

    assert 0.9 <= asyncio.run(run()) < 3


def test_nobody_listening_is_no_answer_and_costs_nothing(store: Store) -> None:
    with ScriptedLLM() as llm:
        url = llm.url
    [error] = ask(LLMClient(Endpoint(url, "m", KEY), Budget(store, None), retry=QUICK))
    assert isinstance(error, LLMUnavailable)
    assert "can't be reached" in str(error)
    assert spent(store) == []


def test_without_budget_nothing_is_sent(store: Store) -> None:
    with ScriptedLLM() as llm:
        [error] = ask(client_of(llm, store, daily_tokens=10))
        assert isinstance(error, BudgetExhausted)
        assert llm.received == []


def test_no_more_requests_than_allowed_run_at_once(store: Store) -> None:
    with ScriptedLLM(lambda _: Script(first_after=0.1)) as llm:
        started = time.monotonic()
        answers = ask(client_of(llm, store, concurrency=2), times=10)
        assert time.monotonic() - started >= 0.5
        assert [type(a) for a in answers] == [Completion] * 10


def test_a_parameter_that_a_model_turns_down_is_left_out_from_then_on(store: Store) -> None:
    def newer_model(received: Received) -> Script:
        body = received.json()
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        elif "temperature" in body:
            said = "Unsupported value: 'temperature' does not support 0.6 with this model."
        else:
            return Script(text=json.dumps(sorted(body)))
        return Script(status=400, raw=json.dumps({"error": {"message": said}}).encode())

    with ScriptedLLM(newer_model) as llm:
        client = client_of(llm, store, concurrency=1)
        answers = ask(client, times=2)
        assert [a.text for a in answers] == ['["max_completion_tokens", "messages", "model"]'] * 2
        assert len(llm.received) == 4


def test_a_400_that_stays_is_a_refusal(store: Store) -> None:
    raw = json.dumps({"error": {"message": "temperature out of range"}}).encode()
    with ScriptedLLM(lambda _: Script(status=400, raw=raw)) as llm:
        [error] = ask(client_of(llm, store))
        assert isinstance(error, LLMRefused)
        assert len(llm.received) == 2


# --- where the key goes -------------------------------------------------------------------------


def test_a_redirect_is_not_followed(store: Store) -> None:
    with ScriptedLLM() as other, ScriptedLLM(lambda _: Script(status=307, headers={"location": f"{other.url}/v1"})) as llm:
        [error] = ask(client_of(llm, store))
        assert isinstance(error, LLMRefused)
        assert "redirects to 127.0.0.1" in str(error)
        assert other.received == []


def test_our_own_proxy_is_not_asked(store: Store) -> None:
    with ScriptedLLM() as llm:
        [error] = ask(client_of(llm, store, own_ports=(llm.port,)))
        assert isinstance(error, LLMRefused)
        assert str(error) == f"127.0.0.1:{llm.port} is MetaClaw's own proxy (proxy.port); it is not asked."
        assert llm.received == []


def test_a_proxy_of_the_environment_is_not_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedLLM() as proxy, ScriptedLLM() as llm:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert isinstance(ask(client_of(llm, store))[0], Completion)
        assert proxy.received == []


def test_the_key_is_in_no_error_no_log_and_no_repr(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = {"error": {"message": f"Incorrect API key provided: {KEY}; also sk-ant-abcdefghijkl"}}
    with ScriptedLLM(lambda _: Script(status=401, raw=json.dumps(said).encode())) as llm:
        client = client_of(llm, store)
        [error] = ask(client)
    assert str(error).endswith("Incorrect API key provided: [redacted]; also [redacted:anthropic-key]")
    logged = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("asyncio"))
    assert KEY not in f"{error!r} {client.endpoint!r} {logged}"


@pytest.mark.parametrize(
    ("address", "forbidden"),
    [
        ("169.254.169.254", True),
        ("fe80::1%eth0", True),
        ("::ffff:169.254.169.254", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("fd00:ec2::254", True),
        ("100.100.100.200", True),
        ("0.0.0.0", True),
        ("::", True),
        ("224.0.0.1", True),
        ("127.0.0.1", False),
        ("::1", False),
        ("10.0.0.7", False),
        ("192.168.1.2", False),
        ("1.1.1.1", False),
    ],
)
def test_metadata_and_link_local_addresses_are_never_asked(address: str, forbidden: bool) -> None:
    assert (forbidden_address(address) is not None) is forbidden


@pytest.mark.parametrize(
    ("base", "model", "key", "message"),
    [
        ("http://169.254.169.254/v1", "m", "", "link-local or cloud metadata address"),
        ("http://[::ffff:a9fe:a9fe]/v1", "m", "", "link-local or cloud metadata address"),
        ("ftp://a.example", "m", "", r"must be http\(s\)"),
        ("a.example/v1", "m", "", r"must be http\(s\)"),
        ("https://", "m", "", r"must be http\(s\)"),
        ("https://a.example:99999", "m", "", "is not a URL"),
        ("https://u:p@a.example", "m", "", "neither a user"),
        ("https://a.example/?key=1", "m", "", "neither a user, a query"),
        ("https://a.example", "", "", "No model is named for a.example"),
        ("https://a.example", "m", "k\nx-evil: 1", "holds characters that no key has"),
    ],
)
def test_what_can_be_no_endpoint_is_a_sentence(base: str, model: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Endpoint(base, model, key)


# --- which endpoint the settings mean -----------------------------------------------------------

LLM = {"provider": "custom", "api_base": "https://a.example/v1", "model_id": "big", "api_key": KEY}


@pytest.mark.parametrize(
    ("llm", "expected"),
    [
        ({}, None),
        ({"provider": "kimi"}, None),
        ({"provider": "kimi", "api_key": "k"}, Endpoint("https://api.moonshot.cn/v1", "kimi-k2.5", "k")),
        ({"provider": "openai", "api_key": " k\n", "model_id": "x"}, Endpoint("https://api.openai.com/v1", "x", "k")),
        ({"provider": "ollama", "model_id": "qwen3"}, Endpoint("http://127.0.0.1:11434/v1", "qwen3", "")),
        (LLM, Endpoint("https://a.example/v1", "big", KEY)),
        (
            {"api_base": "https://api.anthropic.com", "model_id": "c", "api_key": "k"},
            Endpoint("https://api.anthropic.com", "c", "k", "anthropic"),
        ),
    ],
)
def test_a_provider_brings_its_address(llm: dict[str, str], expected: Endpoint | None) -> None:
    assert llm_endpoint(Settings.model_validate({"llm": llm})) == expected


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"provider": "custom", "api_key": "k"}, "llm.api_base is needed"),
        ({"api_key": "k"}, "llm.api_base is needed"),
        ({"provider": "ollama"}, "llm.model_id is needed"),
        ({"api_base": "https://a.example"}, "llm.model_id is needed"),
    ],
)
def test_a_half_configured_llm_is_a_sentence(llm: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llm_endpoint(Settings.model_validate({"llm": llm}))


@pytest.mark.parametrize(
    ("rl", "expected"),
    [
        ({}, Endpoint("https://a.example/v1", "big", KEY)),
        ({"prm_model": "small"}, Endpoint("https://a.example/v1", "small", KEY)),
        ({"prm_url": "https://a.example/v2"}, Endpoint("https://a.example/v2", "big", KEY)),
        ({"prm_url": "https://b.example", "prm_model": "p", "prm_api_key": "b"}, Endpoint("https://b.example", "p", "b")),
        ({"prm_url": "https://b.example", "prm_model": "p"}, Endpoint("https://b.example", "p", "")),
        ({"prm_url": "http://a.example/v1", "prm_model": "p"}, Endpoint("http://a.example/v1", "p", "")),
        ({"prm_url": "https://a.example:444/v1", "prm_model": "p"}, Endpoint("https://a.example:444/v1", "p", "")),
    ],
)
def test_the_judge_borrows_the_key_only_for_the_same_origin(rl: dict[str, str], expected: Endpoint) -> None:
    assert judge_endpoint(Settings.model_validate({"llm": LLM, "rl": rl})) == expected


def test_a_judge_elsewhere_needs_its_own_model_name() -> None:
    with pytest.raises(ConfigError, match=r"rl\.prm_model is needed"):
        judge_endpoint(Settings.model_validate({"llm": LLM, "rl": {"prm_url": "https://b.example"}}))


def test_a_judge_that_is_switched_off_is_none() -> None:
    assert judge_endpoint(Settings.model_validate({"llm": LLM, "judge": {"enabled": False}})) is None


def test_judge_and_evolver_are_separate() -> None:
    rl = {"evolver_api_base": "https://e.example", "evolver_model": "e", "evolver_api_key": "k"}
    settings = Settings.model_validate({"rl": rl})
    assert judge_endpoint(settings) is None
    assert evolver_endpoint(settings) == Endpoint("https://e.example", "e", "k")
