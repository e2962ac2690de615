"""API keys that were seen to work, for the worker's evolver; in memory only.

Design: where the user has configured no LLM, skills are written with the caller's own model and key. The
proxy is the only one who sees a key. It takes one from an exchange that succeeded on a human's turn, at a
host that is a known provider or named in ``proxy.hosts``, and only if it is a plain API key
(`providers.is_api_key`): never a login, a subscription's token or a signed request. The worker gets it as
a line on its stdin and holds it to the bounds (`learn.credentials`). It is never written, logged, shown by
`status` or sent through the control socket.

Limits: a key in a query parameter is not taken; the newest 64 (key, path) are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from mitmproxy import http

from metaclaw_core.agents.base import Identity
from metaclaw_core.model import Kind
from metaclaw_core.providers import KEY_HEADERS, is_api_key, is_trusted
from metaclaw_core.redact import redact_path

MAX_KEYS = 64
REFUSALS = (401, 429)  # and everything from 500
_LOGIN_HEADERS = (
    "chatgpt-account-id",
    "copilot-integration-id",
    "x-amz-date",
    "x-goog-user-project",
    "x-amz-security-token",
)


class CallerKeys:
    """What a proxy has seen. `seen` gives the line for the worker, None where there is nothing new."""

    def __init__(self) -> None:
        self._keys: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()
        # (principal, path as it was sent) → its place in `_keys`. A principal stands for one credential at one origin,
        # so nothing about a request that was looked at once needs to be looked at again.
        self._known: dict[tuple[str, str], tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def lines(self) -> Iterator[dict[str, Any]]:
        """All there is, for a worker that has just started."""
        yield from self._keys.values()

    def forget(self) -> None:
        self._keys.clear()
        self._known.clear()

    def seen(
        self, flow: http.HTTPFlow, dialect: str, principal: str, identity: Identity | None, hosts: Sequence[str]
    ) -> dict[str, Any] | None:
        """One finished exchange. `hosts`: ``proxy.hosts``."""
        if not flow.live or flow.response is None:
            return None
        status = flow.response.status_code
        if status in REFUSALS or status >= 500:
            known = any(name == principal for name, _ in self._keys)
            return {"type": "caller_refused", "principal": principal, "status": status} if known else None
        if not 200 <= status < 300 or flow.error is not None:
            return None
        if identity is None or identity.kind not in (Kind.MAIN, Kind.TOOL):
            return None
        known_place = self._known.get((principal, flow.request.path))
        if known_place in self._keys:
            return None
        found = caller_key(flow.request, hosts)
        if found is None:
            return None
        path = redact_path(flow.request.path)
        line = {
            "type": "caller_key",
            "principal": principal,
            "scheme": flow.request.scheme,
            "host": flow.request.host.lower(),
            "port": flow.request.port,
            "path": path,
            "dialect": dialect,
            "header": found[0],
            "key": found[1],
        }
        place = (principal, path)
        if len(self._known) > 4 * MAX_KEYS:
            self._known.clear()
        self._known[principal, flow.request.path] = place
        if self._keys.get(place) == line:
            self._keys.move_to_end(place)
            return None
        self._keys[place] = line
        while len(self._keys) > MAX_KEYS:
            self._keys.popitem(last=False)
        return line


def caller_key(request: http.Request, hosts: Sequence[str]) -> tuple[str, str] | None:
    """(header, key) of a request whose key may be borrowed; None: it may not."""
    if not is_trusted(request.host, request.port, hosts) or any(name in request.headers for name in _LOGIN_HEADERS):
        return None
    if "oauth" in request.headers.get("anthropic-beta", "").lower() or "[redacted]" in redact_path(request.path):
        return None
    given = [(name, value) for name in KEY_HEADERS if (value := request.headers.get(name))]
    if len(given) != 1:  # two credentials: which one counts is the provider's secret
        return None
    header, value = given[0]
    if header == "authorization":
        scheme, _, value = value.partition(" ")
        if scheme.lower() != "bearer":
            return None
    key = value.strip()
    return (header, key) if is_api_key(request.host, header, key) else None
