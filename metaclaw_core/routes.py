"""Who answers in rl mode: the route that training publishes, and the sign of life of the policy server.

Design: two small files under ``METACLAW_HOME/run``, each written by one process and replaced atomically, read by others as
immutable values. ``route.json`` is derived from the last row of `route_events` and written after each change of it (and
again when the worker starts, so that a crash in between heals). ``policy.json`` is the policy server's heartbeat; older than
`FRESH_SECONDS` it says that nobody is there.

The per-run token of the policy server is in neither: the proxy makes it and hands it over on the child's stdin.

Limits: one route for all agents of a home.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROUTE_FILE = "route.json"
POLICY_FILE = "policy.json"
FRESH_SECONDS = 2.0
BEAT_SECONDS = 0.5

# What the proxy tells the policy server of a request, beside ``authorization: Bearer TOKEN``, ``content-type`` and
# ``traceparent``; every other header of the client stays behind.
FLOW_HEADER = "x-metaclaw-flow"  # the flow's id: key of the sample and of the turn
VERSION_HEADER = "x-metaclaw-version"  # the number of the version to sample from, pinned for a human turn
SESSION_HEADER = "x-metaclaw-session"  # key of the session, opaque; for what is kept per session
PRINCIPAL_HEADER = "x-metaclaw-principal"  # to find the conversation behind a previous_response_id in the store
EXPLORE_HEADER = "x-metaclaw-explore"  # "1": sample at T=1 (class A); "0": with the client's values (class C)
# What the policy server says in its answer's head, stripped by the proxy.
FAILED_HEADER = "x-metaclaw-failed"  # one word: why it could not answer; the agent's retry goes to the upstream
RESPONSE_ID_PREFIX = "resp_mc_"  # begins the id of each Responses answer of ours: no upstream knows such an id


@dataclass(frozen=True, slots=True)
class Served:
    """One version that may be asked for."""

    version: int
    sampler_path: str | None  # None: the base model


@dataclass(frozen=True, slots=True)
class Route:
    """The route in force. `served` holds working, stable and every version that a session may still be pinned to."""

    generation: int  # id of the row in `route_events`
    base_model: str
    working: int
    stable: int
    served: tuple[Served, ...]
    enabled: bool = True  # False: requests go to their upstream (warm-up, budget spent with rl.on_budget: upstream)
    reason: str | None = None  # why it is not enabled


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What the policy server last said of itself."""

    at: float  # unix seconds
    pid: int
    port: int
    base_model: str
    ready: bool  # it can sample; False: still loading, or the engine does not answer
    problem: str | None = None  # one sentence, where it is not ready
    versions: tuple[int, ...] = ()  # that it can serve now
    max_context: int | None = None  # tokens; None: not known

    def fresh(self, now: float) -> bool:
        return self.ready and now - self.at <= FRESH_SECONDS


def read_route(home: Path) -> Route | None:
    """None: there is none yet, or the file can't be read as one."""
    value = _read(home / "run" / ROUTE_FILE)
    try:
        return None if value is None else Route(**{**value, "served": tuple(Served(**s) for s in value["served"])})
    except (TypeError, KeyError):
        return None


def read_heartbeat(home: Path) -> Heartbeat | None:
    """None: there is none yet, or the file can't be read as one."""
    value = _read(home / "run" / POLICY_FILE)
    try:
        return None if value is None else Heartbeat(**{**value, "versions": tuple(value["versions"])})
    except (TypeError, KeyError):
        return None


def write_route(home: Path, route: Route) -> None:
    _write(home / "run" / ROUTE_FILE, asdict(route))


def write_heartbeat(home: Path, heartbeat: Heartbeat) -> None:
    _write(home / "run" / POLICY_FILE, asdict(heartbeat))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, value: Mapping[str, object]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(value, file)
    new.replace(path)
