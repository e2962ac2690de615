"""Each bound on the caller's own key has a test here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evolve_tools import OTHER, PRINCIPAL, START, Talk, add, edits
from mitmproxy.test import tflow
from sqlalchemy import select

from metaclaw_core.agents.base import Identity
from metaclaw_core.learn.budget import Budget
from metaclaw_core.learn.caller import CallerClient, most_tokens, request_body
from metaclaw_core.learn.credentials import Borrowed, Callers, Waiting
from metaclaw_core.learn.evolve import Evolver, segment_counts
from metaclaw_core.learn.llm import LLMRefused, LLMUnavailable
from metaclaw_core.learn.runs import all_notices
from metaclaw_core.learn.segments import SegmentFinder
from metaclaw_core.model import Kind
from metaclaw_core.providers import is_api_key
from metaclaw_core.proxy.credentials import CallerKeys
from metaclaw_core.settings import load_settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import segments
from metaclaw_core.testing import Received, Script, ScriptedLLM
from metaclaw_core.wire import by_name

KEY = "sk-fake-Canary0123456789"
SESSION_SECONDS = 60.0


@pytest.fixture
def store(metaclaw_home: Path) -> Iterator[Store]:
    with open_store(metaclaw_home / "store.db") as opened:
        yield opened


def line(**fields: Any) -> dict[str, Any]:
    return {
        "type": "caller_key",
        "principal": PRINCIPAL,
        "scheme": "https",
        "host": "api.openai.com",
        "port": 443,
        "path": "/v1/chat/completions",
        "dialect": "openai_chat",
        "header": "authorization",
        "key": KEY,
        **fields,
    }


class At:
    """A clock that stands still."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def segment_of(store: Store, **fields: Any) -> Any:
    """The one segment of a session of three requests of 20,100 tokens each."""
    talk = (
        Talk(**fields)
        .say("Install left-pad in my repository.")
        .say("No, use pnpm, not npm, please.")
        .say("Never npm, once more.")
    )
    talk.into(store)
    SegmentFinder(store, 30.0).find(talk.now + SESSION_SECONDS)
    with store.reading() as db:
        return db.execute(select(segments).where(segments.c.principal == fields.get("principal", PRINCIPAL))).first()


def callers(store: Store, clock: Callable[[], float], *lines: dict[str, Any], **options: Any) -> Callers:
    made = Callers(store, options.pop("hosts", ()), enabled=options.pop("enabled", True), clock=clock)
    for message in lines:
        made.take(message)
    return made


def reason(outcome: Borrowed | Waiting) -> str:
    return outcome.reason if isinstance(outcome, Waiting) else "borrowed"


# --- which key ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "header", "key", "accepted"),
    [
        ("api.openai.com", "authorization", "sk-proj-abcdefgh12345678", True),
        ("api.openai.com", "authorization", "eyJhbGciOi.eyJzdWIiOiI.c2lnbmF0dXJl", False),
        ("api.openai.com", "authorization", "sess-abcdefgh12345678", False),
        ("api.openai.com", "x-api-key", "sk-proj-abcdefgh12345678", False),
        ("api.anthropic.com", "x-api-key", "sk-ant-api03-abcdefgh1234", True),
        ("api.anthropic.com", "authorization", "sk-ant-oat01-abcdefgh1234", False),
        ("api.anthropic.com", "x-api-key", "sk-ant-oat01-abcdefgh1234", False),
        ("generativelanguage.googleapis.com", "x-goog-api-key", "AIzaSyAbcdefgh12345678", True),
        ("generativelanguage.googleapis.com", "authorization", "ya29.abcdefgh12345678", False),
        ("aiplatform.googleapis.com", "x-goog-api-key", "AIzaSyAbcdefgh12345678", False),
        ("europe-west1.aiplatform.googleapis.com", "authorization", "AIzaSyAbcdefgh12345678", False),
        ("chatgpt.com", "authorization", "sk-proj-abcdefgh12345678", False),
        ("bedrock-runtime.us-east-1.amazonaws.com", "authorization", "ABSKabcdefgh12345678", False),
        ("api.githubcopilot.com", "authorization", "tid=abc;exp=123", False),
        ("api.groq.com", "authorization", "gsk_abcdefgh12345678", True),
        ("api.groq.com", "authorization", "ghu_abcdefgh12345678", False),
        ("llm.example.test", "authorization", "0123456789abcdef", True),
        ("llm.example.test", "authorization", "short", False),
        ("llm.example.test", "authorization", "two words here", False),
        ("llm.example.test", "cookie", "0123456789abcdef", False),
    ],
)
def test_only_plain_api_keys_are_borrowed(host: str, header: str, key: str, accepted: bool) -> None:
    assert is_api_key(host, header, key) is accepted


def flow(host: str = "api.openai.com", status: int = 200, path: str = "/v1/chat/completions", **headers: str) -> Any:
    made = tflow.tflow(resp=True)
    made.request.scheme, made.request.host, made.request.port, made.request.path = "https", host, 443, path
    made.request.headers.clear()
    for name, value in headers.items():
        made.request.headers[name.replace("_", "-")] = value
    made.response.status_code = status
    made.live = True  # type: ignore[assignment]
    return made


def identity(kind: Kind = Kind.MAIN) -> Identity:
    return Identity("openclaw", kind, "s-1", None, "hello", ("hello",), False, None)


BEARER = f"Bearer {KEY}"


def test_a_key_that_worked_on_a_humans_turn_is_taken_once() -> None:
    keys = CallerKeys()
    seen = keys.seen(flow(authorization=BEARER), "openai_chat", PRINCIPAL, identity(), ())
    assert seen == line()
    assert keys.seen(flow(authorization=BEARER), "openai_chat", PRINCIPAL, identity(Kind.TOOL), ()) is None
    assert list(keys.lines()) == [line()]


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (flow(authorization=BEARER, status=400), Kind.MAIN),
        (flow(authorization=BEARER), Kind.HEARTBEAT),
        (flow(authorization=BEARER), Kind.SUBAGENT),
        (flow(authorization=BEARER), Kind.TITLE),
        (flow(host="llm.stranger.example", authorization=BEARER), Kind.MAIN),
        (flow(authorization=BEARER, x_api_key="sk-fake-other-012345"), Kind.MAIN),
        (flow(authorization=BEARER, chatgpt_account_id="acc"), Kind.MAIN),
        (flow(host="chatgpt.com", authorization=BEARER), Kind.MAIN),
        (
            flow(
                host="api.anthropic.com", authorization="Bearer sk-ant-oat01-abcdefgh1234", anthropic_beta="oauth-2025"
            ),
            Kind.MAIN,
        ),
        (
            flow(host="api.anthropic.com", x_api_key="sk-ant-api03-abcdefgh", anthropic_beta="oauth-2025-04-20"),
            Kind.MAIN,
        ),
        (flow(authorization=BEARER, path="/v1/chat/completions?key=abc"), Kind.MAIN),
        (flow(authorization="Basic dXNlcjpwYXNzd29yZA=="), Kind.MAIN),
        (flow(), Kind.MAIN),
    ],
)
def test_no_other_exchange_lends_its_key(made: Any, kind: Kind) -> None:
    keys = CallerKeys()
    assert keys.seen(made, "openai_chat", PRINCIPAL, identity(kind), ()) is None
    assert len(keys) == 0


def test_a_captured_exchange_and_one_that_broke_lend_nothing() -> None:
    keys = CallerKeys()
    captured, broken = flow(authorization=BEARER), flow(authorization=BEARER)
    captured.live = False
    broken.error = tflow.terr()
    for made in (captured, broken):
        assert keys.seen(made, "openai_chat", PRINCIPAL, identity(), ()) is None


def test_a_refusal_is_told_only_of_a_key_that_was_lent() -> None:
    keys = CallerKeys()
    refused = flow(authorization=BEARER, status=429)
    assert keys.seen(refused, "openai_chat", PRINCIPAL, identity(), ()) is None
    keys.seen(flow(authorization=BEARER), "openai_chat", PRINCIPAL, identity(), ())
    assert keys.seen(refused, "openai_chat", PRINCIPAL, None, ()) == {
        "type": "caller_refused",
        "principal": PRINCIPAL,
        "status": 429,
    }


@pytest.mark.parametrize(
    "message",
    [
        line(host="llm.stranger.example"),
        line(key="sk-ant-oat01-abcdefgh1234"),
        line(path="no-slash"),
        line(port="443"),
        line(scheme="file"),
        {"type": "caller_key"},
        {"type": "something"},
        {},
    ],
)
def test_the_worker_checks_again_what_it_is_handed(store: Store, message: dict[str, Any]) -> None:
    made = callers(store, At(START))
    assert made.take(message) is False
    assert len(made) == 0


# --- for what --------------------------------------------------------------------------------------


def test_a_key_is_lent_to_a_session_that_used_it(store: Store) -> None:
    segment = segment_of(store)
    lent = callers(store, At(START + 100), line()).borrow(segment, 2_000)
    assert isinstance(lent, Borrowed)
    assert (lent.key.origin, lent.key.path, lent.model, lent.tokens) == (
        "https://api.openai.com:443",
        "/v1/chat/completions",
        "m-1",
        3015,  # 5 % of three times 20,100
    )


def test_no_other_sessions_key_is_used(store: Store) -> None:
    segment = segment_of(store, session="s-2", principal=OTHER)
    assert reason(callers(store, At(START + 100), line()).borrow(segment, 0)) == "credential"


def test_a_key_is_used_only_on_the_path_where_it_worked(store: Store) -> None:
    segment = segment_of(store)
    elsewhere = callers(store, At(START + 100), line(path="/v1/responses", dialect="openai_responses"))
    assert reason(elsewhere.borrow(segment, 0)) == "credential"


def test_a_session_read_from_a_capture_gets_no_key(store: Store) -> None:
    talk = Talk(live=False).say("No, use pnpm, not npm, please.").into(store)
    SegmentFinder(store, 30.0).find(talk.now + 60, imported=True)
    with store.reading() as db:
        segment = db.execute(select(segments)).one()
    assert reason(callers(store, At(START + 100), line()).borrow(segment, 0)) == "credential"


def test_at_most_five_percent_of_the_callers_tokens_are_spent(store: Store) -> None:
    segment = segment_of(store)
    made = callers(store, At(START + 100), line())
    assert reason(made.borrow(segment, 3_016)) == "budget"
    lent = made.borrow(segment, 3_000)
    assert isinstance(lent, Borrowed)
    made.record(lent.key, 2_500, 200)
    assert reason(made.borrow(segment, 600)) == "budget"
    again = callers(store, At(START + 100), line())  # a restart forgets nothing
    assert again.allowance(PRINCIPAL, 600) == 515


def test_only_the_last_day_counts(store: Store) -> None:
    segment = segment_of(store)
    assert reason(callers(store, At(START + 90_000), line()).borrow(segment, 1)) == "budget"


def test_where_the_provider_counts_nothing_the_text_gives_a_lower_bound(store: Store) -> None:
    talk = Talk()
    talk.say("word " * 900, "Done.")
    made = talk.made[0]
    body = json.loads(made.response_body)
    del body["usage"]
    store.ingest([replace(made, response_body=json.dumps(body).encode())])
    assert callers(store, At(START + 100), line()).allowance(PRINCIPAL, 10_000) == 54  # 5 % of 4.5 bytes a token


@pytest.mark.parametrize("status", [401, 429, 500, 503, 529])
def test_after_a_refusal_seen_in_the_callers_traffic_it_pauses_for_15_minutes(store: Store, status: int) -> None:
    segment = segment_of(store)
    clock = At(START + 100)
    made = callers(store, clock, line())
    Talk("s-9", at=START + 98).say("Something that fails, please.", None, status_code=status, duration_ms=1000.0).into(
        store
    )
    assert reason(made.borrow(segment, 0)) == "paused"
    clock.now = START + 98 + 1 + 1 + 899
    assert reason(made.borrow(segment, 0)) == "paused"
    clock.now += 2
    assert reason(made.borrow(segment, 0)) == "borrowed"


def test_a_bad_request_is_no_refusal(store: Store) -> None:
    segment = segment_of(store)
    Talk("s-9", at=START + 98).say("Something that fails, please.", None, status_code=400).into(store)
    assert reason(callers(store, At(START + 100), line()).borrow(segment, 0)) == "borrowed"


def test_a_refusal_that_the_proxy_tells_of_pauses_at_once(store: Store) -> None:
    segment = segment_of(store)
    clock = At(START + 100)
    made = callers(store, clock, line(), {"type": "caller_refused", "principal": PRINCIPAL, "status": 429})
    assert reason(made.borrow(segment, 0)) == "paused"
    clock.now += 901
    assert reason(made.borrow(segment, 0)) == "borrowed"


def test_switched_off_nothing_is_taken_and_nothing_lent(store: Store) -> None:
    segment = segment_of(store)
    made = callers(store, At(START + 100), line(), enabled=False)
    assert (len(made), reason(made.borrow(segment, 0))) == (0, "off")


def test_a_key_shows_in_no_representation(store: Store) -> None:
    segment = segment_of(store)
    made = callers(store, At(START + 100), line())
    assert KEY not in repr(made) + repr(made.borrow(segment, 0))


# --- the call --------------------------------------------------------------------------------------

DIALECTS = {
    "openai_chat": ("/v1/chat/completions", "authorization"),
    "openai_responses": ("/v1/responses", "authorization"),
    "anthropic": ("/v1/messages", "x-api-key"),
    "gemini": ("/v1beta/models/m-1:streamGenerateContent?alt=sse", "x-goog-api-key"),
    "ollama": ("/api/chat", "authorization"),
}


def borrowed(
    store: Store, llm: ScriptedLLM, dialect: str = "openai_chat", tokens: int = 5_000
) -> tuple[CallerClient, Callers]:
    path, header = DIALECTS[dialect]
    place = {
        "scheme": "http",
        "host": "127.0.0.1",
        "port": llm.port,
        "path": path,
        "dialect": dialect,
        "header": header,
    }
    made = Callers(store, ["127.0.0.1"], enabled=True)
    assert made.take(line(**place))
    key = next(iter(made._keys.values()))
    return CallerClient(Borrowed(key, "m-1", tokens), made, Budget(store, None)), made


ASK = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Well?"}]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_every_dialect_is_asked_on_its_own_path_and_understood(store: Store, dialect: str) -> None:
    with ScriptedLLM(lambda _: Script(text="It is so.")) as llm:
        client, _ = borrowed(store, llm, dialect)
        answer = await client.complete(ASK, purpose="evolve", max_tokens=400)
    assert (answer.text, answer.input_tokens, answer.output_tokens) == ("It is so.", 10, 5)
    [received] = llm.received
    path, header = DIALECTS[dialect]
    assert (received.path, received.header(header)) == (path, f"Bearer {KEY}" if header == "authorization" else KEY)
    assert received.header("x-metaclaw") == "off"
    request = by_name(dialect).parse_request(received.body, received.path)
    assert (request.system, request.messages[-1].text) == ("Answer.", "Well?")


async def test_what_a_call_took_is_written_down_and_announced_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedLLM() as llm:
        client, made = borrowed(store, llm)
        await client.complete(ASK, purpose="evolve", max_tokens=400)
        await client.complete(ASK, purpose="evolve", max_tokens=400)
    assert made.allowance(PRINCIPAL, 1) == -30
    assert [n["name"] for n in all_notices(store)] == ["caller credentials"]
    assert sum("your agent's own model and key" in r.getMessage() for r in caplog.records) == 1
    assert KEY not in caplog.text


@pytest.mark.parametrize("status", [401, 429, 503])
async def test_our_own_refused_call_pauses_the_key_and_is_not_tried_again(store: Store, status: int) -> None:
    with ScriptedLLM(lambda _: Script(status=status)) as llm:
        client, made = borrowed(store, llm)
        with pytest.raises(LLMUnavailable) as e:
            await client.complete(ASK, purpose="evolve", max_tokens=400)
    assert len(llm.received) == 1
    assert KEY not in str(e.value)
    until = made.paused_until(PRINCIPAL)
    assert until is not None
    assert 890 < until - time.time() <= 900
    assert Callers(store, (), enabled=True).paused_until(PRINCIPAL) is not None  # after a restart, too


async def test_what_does_not_fit_into_the_share_is_not_sent(store: Store) -> None:
    with ScriptedLLM() as llm:
        client, _ = borrowed(store, llm, tokens=310)
        with pytest.raises(LLMRefused, match="no room for an answer"):
            await client.complete(ASK, purpose="evolve", max_tokens=400)
    assert llm.received == []


async def test_a_redirect_does_not_carry_the_key_away(store: Store) -> None:
    with (
        ScriptedLLM() as elsewhere,
        ScriptedLLM(lambda _: Script(status=307, headers={"location": elsewhere.url})) as llm,
    ):
        client, _ = borrowed(store, llm)
        with pytest.raises(LLMRefused):
            await client.complete(ASK, purpose="evolve", max_tokens=400)
    assert elsewhere.received == []


def test_the_estimate_of_a_prompt_is_no_less_than_its_tokens() -> None:
    assert most_tokens("word " * 100) == 143
    assert most_tokens("中文" * 50) == 101


def test_openai_gets_the_name_of_the_limit_that_its_models_take() -> None:
    assert request_body("openai_chat", "m", ASK, 9, "api.openai.com")["max_completion_tokens"] == 9
    assert request_body("openai_chat", "m", ASK, 9, "openrouter.ai")["max_tokens"] == 9


# --- all together ----------------------------------------------------------------------------------


async def test_with_nothing_configured_a_session_becomes_a_skill_through_the_callers_model(store: Store) -> None:
    def answer(received: Received) -> Script:
        return Script(text=json.dumps(edits(add())))

    with ScriptedLLM(answer) as llm:
        place = {"scheme": "http", "host": "127.0.0.1", "port": llm.port}
        now = time.time()
        talk = Talk(at=now - 4000, **place).say("Install left-pad in my repository.")
        talk.say("No. In this repository use pnpm, not npm.").say("Again: never npm here, please.").into(store)
        settings = load_settings({"proxy": {"hosts": ["127.0.0.1"]}})
        made = Callers(store, settings.proxy.hosts, enabled=True)
        evolver = Evolver(store, settings, callers=made)
        assert (await evolver.run()).waiting == {"credential": 1}
        assert segment_counts(store) == {"waiting(credential)": 1}
        made.take(line(**place))
        later = Evolver(store, settings, callers=made, clock=lambda: time.time() + 60)
        report = await later.run()
    assert report.active == ("use-pnpm",)
    [received] = llm.received
    assert received.header("authorization") == f"Bearer {KEY}"
    spent = most_tokens(received.json()["messages"][0]["content"] + received.json()["messages"][1]["content"])
    assert spent + received.json()["max_tokens"] <= 0.05 * 3 * 20_100


async def test_with_too_little_traffic_the_work_waits_for_the_budget(store: Store) -> None:
    now = time.time()
    Talk(at=now - 4000).say("In this repository use pnpm, not npm.").into(store)
    made = Callers(store, (), enabled=True)
    made.take(line())
    assert (await Evolver(store, load_settings(), callers=made).run()).waiting == {"budget": 1}
