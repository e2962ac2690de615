import os
import time

import pytest
from mitmproxy import http
from mitmproxy.test import tflow

from metaclaw_core.agents.base import Identity
from metaclaw_core.model import Kind
from metaclaw_core.proxy import route
from metaclaw_core.proxy.route import (
    Breaker,
    Choice,
    Routed,
    Router,
    RouteWatcher,
    Snapshot,
    base_route,
    continues_ours,
    share,
    turn_of,
)
from metaclaw_core.proxy.sessions import SessionState
from metaclaw_core.routes import Heartbeat, Route, Served, write_heartbeat, write_route
from metaclaw_core.settings import RL

ALL = RL(control_share=0.0)
NOW = 1000.0


def identity(text: str = "hello", kind: Kind = Kind.MAIN, trace: str | None = "t1", **more: object) -> Identity:
    return Identity("openclaw", kind, "s", "agent:main:main", text, (text,), bool(more.get("retry", False)), trace)


def a_route(working: int, stable: int = 1, **more: object) -> Route:
    return Route(working, "base", working, stable, (Served(stable, None), Served(working, "w")), **more)  # type: ignore[arg-type]


def beat(*versions: int, at: float = NOW, ready: bool = True) -> Heartbeat:
    return Heartbeat(at, 7, 4321, "base", ready, None if ready else "loading", versions)


class Fixed(RouteWatcher):
    def __init__(self, current: Snapshot) -> None:
        self.current = current


def a_router(current: Snapshot, **more: object) -> Router:
    return Router(Fixed(current), "token", more.get("breaker"), lambda: NOW)  # type: ignore[arg-type]


@pytest.fixture
def state() -> SessionState:
    return SessionState("s", "agent:main:main")


# --- what is in force -----------------------------------------------------------------------------


def test_route_and_heartbeat_are_read_when_they_change(tmp_path):
    watcher = RouteWatcher(tmp_path, os.getpid)
    watcher.poll()
    assert watcher.current == Snapshot(None, None)
    write_route(tmp_path, a_route(3))
    write_heartbeat(tmp_path, Heartbeat(NOW, os.getpid(), 1, "base", True, versions=(1, 3)))
    watcher.poll()
    first = watcher.current
    assert (first.route, first.heartbeat and first.heartbeat.versions) == (a_route(3), (1, 3))
    write_route(tmp_path, a_route(4))
    watcher.poll()
    assert watcher.current.route == a_route(4)
    assert first.route == a_route(3)  # a flow keeps what it began with


def test_the_server_of_another_proxy_is_not_ours(tmp_path):
    watcher = RouteWatcher(tmp_path, lambda: 7)
    write_heartbeat(tmp_path, Heartbeat(NOW, 7, 1, "base", True))
    watcher.poll()
    write_heartbeat(tmp_path, Heartbeat(NOW + 1, 8, 2, "base", True))
    watcher.poll()
    assert watcher.current.heartbeat is not None
    assert watcher.current.heartbeat.pid == 7  # ours spoke last, then the other one; ours grows stale only by time


def test_the_heartbeat_of_a_server_that_has_ended_is_forgotten(tmp_path):
    pids = [7]
    watcher = RouteWatcher(tmp_path, lambda: pids[0])
    write_heartbeat(tmp_path, Heartbeat(NOW, 7, 1, "base", True))
    watcher.poll()
    assert watcher.silent_seconds < 5
    pids[0] = 9
    watcher.poll()
    assert watcher.current.heartbeat is None
    assert watcher.silent_seconds == 0.0


def test_a_damaged_route_is_no_route(tmp_path):
    write_route(tmp_path, a_route(3))
    (tmp_path / "run" / "route.json").write_text('{"generation": 3')
    watcher = RouteWatcher(tmp_path, os.getpid, lambda: a_route(1))
    watcher.poll()
    assert watcher.current.route is None


def test_without_training_the_base_model_is_the_route():
    assert base_route(RL(model="m", train=False)) == Route(0, "m", 1, 1, (Served(1, None),))
    assert base_route(RL(model="m")) is None
    assert base_route(RL(train=False)) is None


# --- pins -----------------------------------------------------------------------------------------


def test_a_turn_keeps_its_version_and_the_next_one_takes_the_newest(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    first = router.choose(identity(), "k", state, ALL)
    assert first == Choice(3, True, 4321, turn_of(identity()), False)
    router.watcher.current = Snapshot(a_route(4), beat(1, 3, 4))
    assert router.choose(identity(kind=Kind.TOOL), "k", state, ALL) == first
    assert router.choose(identity(retry=True), "k", state, ALL) == first
    later = router.choose(identity("and now?", trace="t2"), "k", state, ALL)
    assert isinstance(later, Choice)
    assert later.version == 4


def test_what_a_person_adds_while_the_agent_works_is_a_turn_of_its_own(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    router.choose(identity(), "k", state, ALL)
    router.watcher.current = Snapshot(a_route(4), beat(1, 3, 4))
    added = router.choose(identity("wait, not that"), "k", state, ALL)
    assert isinstance(added, Choice)
    assert added.version == 4


def test_while_new_weights_are_being_loaded_those_before_them_serve_and_not_older_ones(tmp_path, state):
    watcher = RouteWatcher(tmp_path, os.getpid)
    router = Router(watcher, "token", clock=time.time)

    def chosen(route: Route, *loaded: int, session: SessionState) -> int | None:
        write_route(tmp_path, route)
        write_heartbeat(tmp_path, Heartbeat(time.time(), os.getpid(), 4321, "base", True, versions=loaded))
        watcher.poll()
        choice = router.choose(identity(f"question to {loaded}"), "k", session, ALL)
        return choice.version if isinstance(choice, Choice) else None

    def served(*versions: int, working: int) -> Route:
        return Route(len(versions), "base", working, 1, tuple(Served(v, f"w{v}") for v in versions))

    assert chosen(served(1, 2, working=2), 1, 2, session=state) == 2
    assert chosen(served(1, 2, 3, working=3), 1, 2, 3, session=SessionState("other", "k")) == 3
    assert chosen(served(1, 2, 3, 4, working=4), 1, 2, 3, session=SessionState("new", "k")) == 3  # a session that has no pin
    assert chosen(served(1, 2, 3, 4, working=4), 1, 2, 3, session=state) == 3  # and one that lags
    assert chosen(served(1, 2, 3, 4, working=4), 1, 2, 3, 4, session=state) == 4
    assert chosen(served(1, 3, 4, working=3), 1, 4, session=SessionState("rolled back", "k")) == 1


@pytest.mark.parametrize(
    ("current", "why"),
    [
        (Snapshot(None, beat(1)), "no route yet"),
        (Snapshot(a_route(3, enabled=False, reason="warm-up"), beat(1, 3)), "the route is off"),
        (Snapshot(a_route(3), None), "the policy server is not ready"),
        (Snapshot(a_route(3), beat(1, 3, ready=False)), "the policy server is not ready"),
        (Snapshot(a_route(3), beat(1, 3, at=NOW - 2.5)), "the policy server is not ready"),
        (Snapshot(a_route(3), beat()), "its version is not served"),
    ],
)
def test_a_turn_that_began_at_its_upstream_stays_there(state, current, why):
    router = a_router(current)
    assert router.choose(identity(), "k", state, ALL) == why
    router.watcher.current = Snapshot(a_route(3), beat(1, 3))
    assert router.choose(identity(kind=Kind.TOOL), "k", state, ALL) == "the turn is the upstream's"
    assert isinstance(router.choose(identity("next", trace="t2"), "k", state, ALL), Choice)


def test_a_tool_loop_that_nobody_saw_begin_stays_at_its_upstream(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    assert router.choose(identity(kind=Kind.TOOL), "k", state, ALL) == "the turn began at the upstream"
    assert state.pin_turn is None


def test_a_turn_that_began_is_ended_where_the_route_is_taken_away(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    router.choose(identity(), "k", state, ALL)
    router.watcher.current = Snapshot(a_route(3, enabled=False, reason="budget"), beat(1, 3))
    assert isinstance(router.choose(identity(kind=Kind.TOOL), "k", state, ALL), Choice)
    assert router.choose(identity("next", trace="t2"), "k", state, ALL) == "the route is off"


def test_a_pinned_version_that_is_no_longer_served_sends_the_turn_to_its_upstream_for_good(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    router.choose(identity(), "k", state, ALL)
    router.watcher.current = Snapshot(a_route(9), beat(1, 9))
    assert router.choose(identity(kind=Kind.TOOL), "k", state, ALL) == "its version is not served"
    router.watcher.current = Snapshot(a_route(3), beat(1, 3))
    assert router.choose(identity(kind=Kind.TOOL), "k", state, ALL) == "the turn is the upstream's"


def test_until_the_server_has_loaded_a_new_version_a_session_keeps_the_one_before(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    router.choose(identity(), "k", state, ALL)
    router.watcher.current = Snapshot(a_route(4), beat(1, 3))
    choice = router.choose(identity("next", trace="t2"), "k", state, ALL)
    assert isinstance(choice, Choice)
    assert choice.version == 3


@pytest.mark.parametrize("kind", [Kind.HEARTBEAT, Kind.COMPACTION, Kind.TITLE, Kind.ANNOUNCE, Kind.UNKNOWN])
def test_side_turns_go_to_their_upstream_and_leave_the_pin_alone(state, kind):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    router.choose(identity(), "k", state, ALL)
    pin = (state.pin_turn, state.pin_version)
    assert router.choose(identity("x", kind), "k", state, ALL) == "a side turn"
    assert (state.pin_turn, state.pin_version) == pin


def test_without_a_trace_a_tool_loop_belongs_to_the_sessions_open_turn(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    whole = Identity("generic", Kind.MAIN, None, None, "b", ("a", "b"), False, None)
    delta = Identity("generic", Kind.TOOL, None, None, "b", ("b",), False, None)  # the history is at the provider
    first = router.choose(whole, "k", state, ALL)
    router.watcher.current = Snapshot(a_route(4), beat(1, 3, 4))
    assert router.choose(delta, "k", state, ALL) == first
    assert state.pin_turn == turn_of(whole)


def test_shares_are_of_sessions_and_stay_what_they_are():
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    rl = RL(control_share=0.3, explore_share=0.5)
    choices = {}
    for n in range(2000):
        choice = router.choose(identity(), f"k{n}", SessionState(None, None), rl)
        assert isinstance(choice, Choice)
        assert choice == router.choose(identity(), f"k{n}", SessionState(None, None), rl)
        choices[n] = choice
    assert sum(c.version == 1 for c in choices.values()) == pytest.approx(600, abs=70)
    assert sum(c.explore for c in choices.values()) == pytest.approx(1000, abs=80)
    both = sum(c.version == 1 and c.explore for c in choices.values())
    assert both == pytest.approx(300, abs=60)  # the two are independent
    assert all(0 <= share("control", f"k{n}") < 1 for n in range(100))


# --- failures -------------------------------------------------------------------------------------


def a_routed(router: Router, state: SessionState, text: str = "hello") -> Routed:
    choice = router.choose(identity(text, trace=text), "k", state, ALL)
    assert isinstance(choice, Choice), choice
    origin = route.Origin(b"https", "llm.test", 443, b"/", b"", http.Headers(), b"")
    return Routed(choice, origin, router.breaker)


def test_a_failure_pins_the_turn_to_its_upstream(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    routed = a_routed(router, state)
    assert routed.failed("timeout", state) is True
    assert routed.failed("timeout", state) is False
    assert router.choose(identity("hello", trace="hello", retry=True), "k", state, ALL) == "the turn is the upstream's"
    assert isinstance(router.choose(identity("next", trace="t2"), "k", state, ALL), Choice)


def test_of_two_turns_side_by_side_each_that_fails_goes_to_its_upstream(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    under_way = {text: a_routed(router, state, text) for text in ("one", "two")}
    for text, routed in under_way.items():
        routed.failed("timeout", state)
        router.give_back("k", turn_of(identity(text, trace=text)))
    for text in ("one", "two", "one"):
        assert router.choose(identity(text, trace=text, retry=True), "k", state, ALL) == "the turn is the upstream's"
    assert isinstance(router.choose(identity("three", trace="three"), "k", state, ALL), Choice)


def test_a_late_failure_leaves_a_newer_turn_alone(state):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    first = a_routed(router, state)
    a_routed(router, state, "second")
    assert first.failed("timeout", state) is False
    assert state.pin_version == 3


def test_three_failures_in_a_minute_open_the_breaker_for_all_and_one_request_tries_it_again(state):
    clock = [0.0]
    router = a_router(Snapshot(a_route(3), beat(1, 3)), breaker=Breaker(lambda: clock[0]))
    for n in range(3):
        a_routed(router, state, f"q{n}").failed("timeout", state)
        clock[0] += 10
    assert router.choose(identity("a", trace="a"), "k", state, ALL) == "the breaker is open"
    clock[0] = 20 + 29
    assert router.breaker.state == "open"
    clock[0] = 20 + 31
    trial = a_routed(router, state, "trial")
    assert trial.choice.trial is True
    assert router.choose(identity("b", trace="b"), "k", state, ALL) == "the breaker is open"  # one at a time
    trial.failed("timeout", state)
    assert router.breaker.state == "open"
    clock[0] += 31
    again = a_routed(router, state, "again")
    again.withdrawn()
    third = a_routed(router, state, "third")
    third.succeeded()
    assert router.breaker.state == "closed"
    assert a_routed(router, state, "all are welcome").choice.trial is False


def test_failures_far_apart_open_nothing(state):
    clock = [0.0]
    router = a_router(Snapshot(a_route(3), beat(1, 3)), breaker=Breaker(lambda: clock[0]))
    for n in range(6):
        a_routed(router, state, f"q{n}").failed("timeout", state)
        clock[0] += 31
    assert router.breaker.state == "closed"


@pytest.mark.parametrize("word", ["images", "unsupported", "too_long", "template", "history", "version"])
def test_what_only_this_request_can_not_have_is_not_held_against_the_server(state, word):
    router = a_router(Snapshot(a_route(3), beat(1, 3)))
    for n in range(5):
        a_routed(router, state, f"q{n}").failed(word, state)
    assert router.breaker.state == "closed"


# --- the flow -------------------------------------------------------------------------------------


def a_flow() -> http.HTTPFlow:
    flow = tflow.tflow()
    headers = http.Headers(
        [
            (b"Host", b"api.llm.test"),
            (b"Authorization", b"Bearer sk-canary"),
            (b"x-api-key", b"canary"),
            (b"Cookie", b"canary=1"),
            (b"X-Metaclaw-Version", b"666"),
            (b"Content-Type", b"application/json"),
            (b"Accept", b"text/event-stream"),
            (b"traceparent", b"00-11111111111111111111111111111111-2222222222222222-01"),
            (b"content-length", b"2"),
        ]
    )
    flow.request = http.Request.make("POST", "https://api.llm.test/v1beta/m:generateContent?key=canary&alt=sse", b"{}", {})
    flow.request.headers = headers
    flow.live = True
    return flow


def test_only_what_is_listed_leaves_for_the_policy_server():
    flow = a_flow()
    route.turn_away(flow, None, Choice(3, True, 4321, "t", False), token="T", principal="p" * 32, session="s" * 32)
    request = flow.request
    assert (request.scheme, request.host, request.port, request.method) == ("http", "127.0.0.1", 4321, "POST")
    assert request.path == "/v1beta/m:generateContent?key=[redacted]&alt=sse"
    assert dict(request.headers.items(multi=True)) == {
        "host": "127.0.0.1:4321",
        "authorization": "Bearer T",
        "content-length": "2",
        "x-metaclaw-flow": flow.id,
        "x-metaclaw-version": "3",
        "x-metaclaw-session": "s" * 32,
        "x-metaclaw-principal": "p" * 32,
        "x-metaclaw-explore": "1",
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "traceparent": "00-11111111111111111111111111111111-2222222222222222-01",
    }
    assert flow.server_conn.address == ("127.0.0.1", 4321)
    assert flow.server_conn.via is None


def test_a_flow_gets_its_own_request_back():
    flow = a_flow()
    before = flow.request.get_state()
    origin = route.turn_away(flow, b"decoded", Choice(3, False, 4321, "t", False), token="T", principal="p", session="s")
    assert flow.request.raw_content == b"decoded"
    route.turn_back(flow, origin)
    assert flow.request.get_state() == before


def test_what_is_meant_for_the_proxy_is_taken_out_of_an_answer():
    response = http.Response.make(200, b"", {"X-MetaClaw-Failed": "timeout", "x-metaclaw-more": "1", "content-type": "a/b"})
    route.strip(response)
    assert dict(response.headers) == {"content-type": "a/b", "content-length": "0"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"previous_response_id": "resp_mc_12", "input": []}', True),
        (b'{"previous_response_id":"resp_68af", "input": []}', False),
        (b'{"input": "\\"previous_response_id\\": \\"resp_mc_12\\""}', False),
        (b'{"metadata": {"previous_response_id":"resp_mc_12"}}', False),
        (b'["previous_response_id":"resp_mc_12"', False),
        (b"", False),
    ],
)
def test_a_request_that_continues_an_answer_of_ours_is_known_by_its_id(body, expected):
    assert continues_ours(body, "") is expected


def test_a_poll_is_cheap(tmp_path):
    write_route(tmp_path, a_route(3))
    write_heartbeat(tmp_path, Heartbeat(NOW, os.getpid(), 1, "base", True, versions=(1, 3)))
    watcher = RouteWatcher(tmp_path, os.getpid)
    watcher.poll()
    began = time.perf_counter()
    for _ in range(100):
        watcher.poll()
    assert (time.perf_counter() - began) / 100 < 0.002
