"""In rl mode: which requests go to the policy server, with which weights, and how a flow is turned there and back.

Design: route and heartbeat are read beside the traffic, four times a second, into one immutable `Snapshot`; a flow decides
by the one that stands when its request is whole. A human turn decides once: its pin (a version, or its upstream) is part of
the session's state, so its tool loop and its retries follow it, also after a restart of the proxy. Each new human message
takes the newest version; ``rl.max_staleness`` therefore bounds only what is trained on. A share of the sessions, by a hash
of their key, stays on the stable version to be compared with. A failure pins the turn to its upstream, where the agent's own
retry then goes; three in a minute that are the server's send everything there for half a minute (`Breaker`).

What leaves for the policy server is made new: of the client's headers only `_KEPT`. The flow gets its own request back
before it is recorded or written to a file, so a record names the upstream that was meant, and no dump holds our token.

Limits: a failure costs the agent one attempt, as mitmproxy can't send a request twice. A server that dies after the request
has reached it gives mitmproxy's own page 502, which agents repeat as they do a 503. Only the server that this proxy
started is asked, as it alone knows the token.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from ahocorasick_rs import BytesAhoCorasick, MatchKind
from mitmproxy import http
from mitmproxy.connection import Server

from metaclaw_core.agents.base import Identity
from metaclaw_core.decode import decode_body
from metaclaw_core.errors import MetaClawError
from metaclaw_core.model import Exchange, Kind
from metaclaw_core.proxy.sessions import SessionState
from metaclaw_core.redact import redact_path
from metaclaw_core.routes import (
    EXPLORE_HEADER,
    FLOW_HEADER,
    POLICY_FILE,
    PRINCIPAL_HEADER,
    RESPONSE_ID_PREFIX,
    ROUTE_FILE,
    SESSION_HEADER,
    VERSION_HEADER,
    Heartbeat,
    Route,
    Served,
    read_heartbeat,
    read_route,
)
from metaclaw_core.settings import RL

POLL_SECONDS = 0.25
_ROUTED = (Kind.MAIN, Kind.TOOL, Kind.SUBAGENT)
_KEPT = (b"content-type", b"accept", b"traceparent")
# Why the policy server can't take this request, though it is well; such a failure doesn't count against it.
_OF_THE_REQUEST = frozenset({"images", "unsupported", "too_long", "template", "history", "version"})


# --- what is in force -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    route: Route | None = None  # None: there is none, or it can't be read
    heartbeat: Heartbeat | None = None  # of the server that this proxy started; None: it has given no sign yet
    before: int | None = None  # the working version that was last seen loaded: it serves on while a newer one is being loaded

    def unready(self, now: float, *, goes_on: bool) -> str | None:
        """Why nothing can be sent to the policy server, one of few; None: something can. `goes_on`: in a turn that it has
        answered so far, which ends with the same weights where the route is taken away meanwhile."""
        if self.route is None and not goes_on:
            return "no route yet"
        if self.route is not None and not self.route.enabled and not goes_on:
            return "the route is off"
        if self.heartbeat is None or not self.heartbeat.fresh(now):
            return "the policy server is not ready"
        return None


class RouteWatcher:
    """`current` is replaced by `poll`, never changed. `pid`: of the policy server now; None: none runs."""

    def __init__(self, home: Path, pid: Callable[[], int | None], base: Callable[[], Route | None] = lambda: None) -> None:
        """`base`: the route where there is no file."""
        self.current = Snapshot()
        self._home = home
        self._pid = pid
        self._base = base
        self._stamps: tuple[object, object] = (0, 0)
        self._read: Route | None = None
        self._heard_at: float | None = None  # monotonic, so that a machine that slept is not taken for a server that hangs

    @property
    def silent_seconds(self) -> float:
        """Since the last sign of life of the server that runs now; 0 before its first."""
        return 0.0 if self._heard_at is None else time.monotonic() - self._heard_at

    def poll(self) -> None:
        """Two `stat`s, and a read of what has changed; for a thread."""
        route_stamp, beat_stamp = (_stamp(self._home / "run" / name) for name in (ROUTE_FILE, POLICY_FILE))
        route, beat = self._read, self.current.heartbeat
        if route_stamp != self._stamps[0]:
            route = self._read = read_route(self._home)
        if route_stamp is None:
            route = self._base()
        if beat_stamp != self._stamps[1]:
            found = read_heartbeat(self._home)
            # Another proxy of this home has a server of its own, which writes the same file.
            if found is not None and found.pid == self._pid():
                beat, self._heard_at = found, time.monotonic()
        if beat is not None and beat.pid != self._pid():
            beat = self._heard_at = None
        self._stamps = (route_stamp, beat_stamp)
        before = self.current.before
        if route is not None and beat is not None and route.working in beat.versions:
            before = route.working
        self.current = Snapshot(route, beat, before)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def base_route(rl: RL) -> Route | None:
    """Without training nobody publishes a route: the base model is what there is. None: training will publish one."""
    return None if rl.train or not rl.model else Route(0, rl.model, 1, 1, (Served(1, None),))


# --- the breaker ----------------------------------------------------------------------------------


class Breaker:
    """Closed: requests may go. Open, after `FAILURES` within `WINDOW`: none, for `REST`. Then half-open: one may try."""

    FAILURES = 3
    WINDOW = 60.0  # seconds, as all here
    REST = 30.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: list[float] = []
        self._opened_at: float | None = None
        self._trying = False

    @property
    def state(self) -> str:
        if self._opened_at is None:
            return "closed"
        return "open" if self._clock() - self._opened_at < self.REST else "half-open"

    def allows(self) -> bool:
        """May a request go now? A True while half-open is for one request, whose end has to be told."""
        if self.state == "half-open" and not self._trying:
            self._trying = True
            return True
        return self.state == "closed"

    def failed(self, *, trial: bool) -> None:
        now = self._clock()
        self._failures = [at for at in self._failures if now - at < self.WINDOW] + [now]
        if trial or len(self._failures) >= self.FAILURES:
            self._opened_at, self._trying = now, False

    def succeeded(self, *, trial: bool) -> None:
        if trial:
            self._opened_at, self._trying, self._failures = None, False, []

    def withdrawn(self, *, trial: bool) -> None:
        """The client went away first: nothing is known."""
        if trial:
            self._trying = False


# --- one request ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes."""

    version: int
    explore: bool
    port: int
    turn: str
    trial: bool  # the breaker's one request


@dataclass(slots=True)
class Routed:
    """A request on its way to the policy server; changed by the hooks of its flow only."""

    choice: Choice
    origin: Origin
    breaker: Breaker
    failure: str | None = None  # why it was not answered, one word or few
    _settled: bool = False  # the breaker knows how it went

    def failed(self, word: str, state: SessionState | None) -> bool:
        """The turn is its upstream's from now on; whether `state` has changed and is to be saved."""
        if self.failure is None:
            self.failure = word
        if not self._settled:
            self._settled = True
            if word in _OF_THE_REQUEST:
                self.breaker.withdrawn(trial=self.choice.trial)
            else:
                self.breaker.failed(trial=self.choice.trial)
        if state is None or state.pin_turn != self.choice.turn or state.pin_version is None:
            return False
        state.pin_version = None
        return True

    def succeeded(self) -> None:
        """An answer has begun."""
        if not self._settled:
            self._settled = True
            self.breaker.succeeded(trial=self.choice.trial)

    def withdrawn(self) -> None:
        """It ended without anybody's fault."""
        if not self._settled:
            self._settled = True
            self.breaker.withdrawn(trial=self.choice.trial)

    def recorded(self, exchange: Exchange) -> Exchange:
        """What happened, in the record."""
        if self.failure is not None:
            return replace(exchange, error=f"policy: {self.failure}" + (f" ({exchange.error})" if exchange.error else ""))
        return replace(exchange, version=self.choice.version) if exchange.status_code is not None else exchange


class Router:
    """Decides; used on the event loop only."""

    def __init__(self, watcher: RouteWatcher, token: str, breaker: Breaker | None = None, clock: Callable[[], float] = time.time) -> None:
        self.watcher = watcher
        self.token = token
        self.breaker = breaker or Breaker()
        self._clock = clock
        self._given_back: OrderedDict[tuple[str, str], None] = OrderedDict()  # (session, turn), the latest last

    def give_back(self, key: str, turn: str) -> None:
        """The turn was not answered and is its upstream's, also while another turn of its session has the session's pin."""
        self._given_back[key, turn] = None
        while len(self._given_back) > _GIVEN_BACK:
            self._given_back.popitem(last=False)

    def choose(self, identity: Identity, key: str | None, state: SessionState | None, rl: RL) -> Choice | str:
        """Where the request goes, or in few words why to its upstream. `state` changes where a new turn begins or a pin
        can't be kept; the caller saves it."""
        if identity.kind not in _ROUTED or key is None or state is None:
            return "a side turn"
        turn = turn_of(identity)
        # Without a trace a tool loop of a provider-side chain can't name its turn: it is the session's open one.
        open_turn = identity.kind is Kind.TOOL and identity.trace is None and state.pin_turn is not None
        goes_on = open_turn or state.pin_turn == turn
        if not goes_on and (key, turn) in self._given_back:
            return "the turn is the upstream's"
        if goes_on and state.pin_version is None:
            return "the turn is the upstream's"
        if not goes_on and identity.kind is Kind.TOOL:
            return "the turn began at the upstream"
        snapshot, pinned = self.watcher.current, state.pin_version
        reason = snapshot.unready(self._clock(), goes_on=goes_on)
        version = _version(snapshot, share("control", key) < rl.control_share, pinned, goes_on=goes_on)
        if reason is None and version is None:
            reason = "its version is not served"
        if reason is None and not self.breaker.allows():
            reason = "the breaker is open"
        if not open_turn:
            state.pin_turn = turn
        state.pin_version = version if reason is None else None
        if reason is not None or version is None or snapshot.heartbeat is None:
            return reason or "the policy server is not ready"
        explore = share("explore", key) < rl.explore_share
        return Choice(version, explore, snapshot.heartbeat.port, state.pin_turn or turn, self.breaker.state != "closed")

    def status(self) -> dict[str, object]:
        """What `metaclaw status` shows."""
        snapshot, now = self.watcher.current, self._clock()
        route, beat = snapshot.route, snapshot.heartbeat
        return {
            "working": route and route.working,
            "stable": route and route.stable,
            "generation": route and route.generation,
            "enabled": route and route.enabled,
            "reason": route and route.reason,
            "ready": beat is not None and beat.fresh(now),
            "problem": beat.problem if beat is not None else None,
            "heartbeat_age_s": None if beat is None else round(max(0.0, now - beat.at), 1),
            "versions": list(beat.versions) if beat is not None else [],
            "breaker": self.breaker.state,
        }


def _version(snapshot: Snapshot, control: bool, pinned: int | None, *, goes_on: bool) -> int | None:
    """The pinned one within a turn, else the route's; where the server hasn't loaded that yet, one that it has."""
    route, served = snapshot.route, snapshot.heartbeat.versions if snapshot.heartbeat else ()
    if goes_on:
        return pinned if pinned in served else None
    if route is None:
        return None
    target, before = route.stable if control else route.working, snapshot.before
    # After a roll-back what was before is what must not serve.
    goes_before = before is not None and before < target and not control and any(s.version == before for s in route.served)
    return next((version for version in (target, before if goes_before else None, pinned, route.stable) if version in served), None)


def turn_of(identity: Identity) -> str:
    """A name for the human turn within its session. A trace alone is not one turn: what a person adds while the agent
    works shares it."""
    name = f"{identity.trace or len(identity.human_texts)}\n{identity.user_text}"
    return sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def share(what: str, key: str) -> float:
    """A number in [0, 1) that is the session's own, another one for each `what`."""
    return int.from_bytes(sha256(f"{what}\n{key}".encode()).digest()[:7]) / 2**56


# --- the flow -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """What a request said of where it goes, and its headers: as they were before."""

    scheme: bytes
    host: str
    port: int
    path: bytes
    authority: bytes
    headers: http.Headers
    content: bytes | None  # as it was to be sent


def turn_away(flow: http.HTTPFlow, body: bytes | None, choice: Choice, *, token: str, principal: str, session: str) -> Origin:
    """Send the request to the policy server. `body`: decoded, where it is still encoded; None: as it is. Returns the way
    back."""
    data = flow.request.data
    origin = Origin(data.scheme, data.host, data.port, data.path, data.authority, data.headers, data.content)
    content = body if body is not None else data.content or b""
    ours: Mapping[str, str] = {
        "host": f"127.0.0.1:{choice.port}",
        "authorization": f"Bearer {token}",
        "content-length": str(len(content)),
        FLOW_HEADER: flow.id,
        VERSION_HEADER: str(choice.version),
        SESSION_HEADER: session,
        PRINCIPAL_HEADER: principal,
        EXPLORE_HEADER: "1" if choice.explore else "0",
    }
    kept = [(name, value) for name, value in data.headers.fields if name.lower() in _KEPT]
    headers = http.Headers([*((name.encode(), value.encode("latin-1")) for name, value in ours.items()), *kept])
    path = redact_path(flow.request.path).encode("utf-8", "surrogateescape")
    # Nothing above changes the flow, nothing below can fail.
    data.scheme, data.host, data.port, data.path, data.authority = b"http", "127.0.0.1", choice.port, path, b""
    data.headers, data.content, data.trailers = headers, content, None
    # A new one: the old may be open already, and may be reached through an upstream proxy that must not see this.
    flow.server_conn = Server(address=("127.0.0.1", choice.port))
    return origin


def turn_back(flow: http.HTTPFlow, origin: Origin) -> None:
    """The request as the client addressed it."""
    data = flow.request.data
    data.scheme, data.host, data.port, data.path = origin.scheme, origin.host, origin.port, origin.path
    data.authority, data.headers, data.content = origin.authority, origin.headers, origin.content


def strip(response: http.Response) -> None:
    """Take out what was meant for the proxy alone."""
    for name in {name.lower() for name in response.headers if name.lower().startswith("x-metaclaw-")}:
        del response.headers[name]


def client_left(flow: http.HTTPFlow) -> bool:
    """Did the flow end because the client went away?"""
    return not flow.client_conn.connected or (flow.error is not None and flow.error.msg.startswith(_LEFT))


def annotate(flow: http.HTTPFlow, choice: Choice) -> None:
    """A note for people who look at the flow."""
    flow.comment = f"{flow.comment} → version {choice.version}".strip()


def continues_ours(body: bytes, encoding: str) -> bool:
    """Does a Responses request continue an answer that the policy server gave?"""
    try:
        body = decode_body(body, encoding, _LARGEST)[0] if encoding else body
        # The key first: that passes over 400 kB in 8 µs, the regular expression needs 600.
        if not _find_key(body) or _CONTINUES.search(body) is None:
            return False
        value = json.loads(body)
    except (MetaClawError, ValueError, RecursionError):
        return False
    name = value.get("previous_response_id") if isinstance(value, dict) else None
    return isinstance(name, str) and name.startswith(RESPONSE_ID_PREFIX)


_GIVEN_BACK = 256  # turns
_LEFT = ("Client disconnected", "stream reset by client")
_find_key = BytesAhoCorasick([b'"previous_response_id"'], matchkind=MatchKind.LeftmostFirst).find_matches_as_indexes
_CONTINUES = re.compile(rb'"previous_response_id"\s*:\s*"' + RESPONSE_ID_PREFIX.encode())
_LARGEST = 64 << 20
