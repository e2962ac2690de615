"""From a mitmproxy flow to an `Exchange`: the only place that looks at headers.

Design: of the headers only what `agents.base.hints_from_headers` allows, the two content-encodings
and the response's media type are kept. The credential never leaves `principal`: it goes into an HMAC
under a key that is made on this machine, so that the same key at the same origin is recognised and
nothing can be read back. Works for live flows and for flows read from a capture or HAR alike.

Limits: a flow whose response was streamed past mitmproxy without our tee has no body (mitmproxy
keeps none); it is recorded with an empty one.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs

from mitmproxy import http

from metaclaw_core.agents.base import hints_from_headers
from metaclaw_core.model import Exchange, Hints, Injection
from metaclaw_core.redact import redact_path
from metaclaw_core.settings import private_dir
from metaclaw_core.wire.base import Route

_CREDENTIAL_HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "api-key")
_CREDENTIAL_PARAMETERS = ("key", "api_key", "api-key")
_KEY_BYTES = 32


def principal_key(home: Path) -> bytes:
    """The local secret behind `principal`; made on first use, 0600."""
    path = private_dir(home) / "principal.key"
    try:
        if len(key := path.read_bytes()) == _KEY_BYTES:
            return key
        # Cut short by a full disk or by hand: a guessable key would be worse than sessions that begin anew.
        path.unlink()
    except FileNotFoundError:
        pass
    temporary = path.with_suffix(f".{secrets.token_hex(4)}")
    temporary.touch(mode=0o600)
    temporary.write_bytes(secrets.token_bytes(_KEY_BYTES))
    try:
        path.hardlink_to(temporary)  # fails if another process was first, whose key then counts
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return path.read_bytes()


def plain_headers(request: http.Request) -> dict[str, str]:
    """Lower-case name → value. Looking a name up in mitmproxy's own headers costs 5 µs, and we look up a dozen."""
    return {
        name.decode("latin-1").lower(): value.decode("utf-8", "surrogateescape")
        for name, value in reversed(request.headers.fields)  # of several with a name the first counts
    }


def credential(request: http.Request, headers: Mapping[str, str]) -> str:
    """The caller's credential, "" if there is none. For `principal` and comparison only."""
    for name in _CREDENTIAL_HEADERS:
        if value := headers.get(name):
            return value
    query = parse_qs(request.path.partition("?")[2])
    return next((query[name][0] for name in _CREDENTIAL_PARAMETERS if name in query), "")


def principal(request: http.Request, key: bytes, headers: Mapping[str, str] | None = None) -> str:
    """32 hex digits that stand for (upstream origin, credential)."""
    origin = f"{request.scheme}://{request.host.lower()}:{request.port}"
    return _principal(key, origin, credential(request, plain_headers(request) if headers is None else headers))


@lru_cache(maxsize=16)  # an HMAC costs more than all else here; credentials stay in memory only
def _principal(key: bytes, origin: str, secret: str) -> str:
    return hmac.digest(key, f"{origin}\n{secret}".encode("utf-8", "replace"), "sha256").hex()[:32]


def media_type(response: http.Response | None) -> str:
    """``text/event-stream`` of ``Text/Event-Stream; charset=utf-8``; "" if unknown."""
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() if response else ""


_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,200})"')


def response_id(body: bytes) -> str | None:
    """The id of an OpenAI Responses answer, from its first kilobytes; None if it can't be seen (compressed, an error)."""
    match = _RESPONSE_ID.search(body, 0, 4096)
    return match.group(1).decode() if match else None


def exchange(
    flow: http.HTTPFlow,
    route: Route,
    key: bytes,
    *,
    request_body: bytes | None = None,
    request_encoding: str | None = None,
    response_body: bytes | None = None,
    hints: Hints | None = None,
    principal_id: str | None = None,
    injection: Injection | None = None,
    live: bool,
) -> Exchange:
    """The record of `flow`. `request_body` and `response_body` are given where the flow no longer holds
    the client's own bytes (injected) or never held them (streamed)."""
    request, response = flow.request, flow.response
    body = request_body if request_body is not None else (request.raw_content or b"")
    answer = response_body if response_body is not None else ((response.raw_content or b"") if response else b"")
    # A client that hangs up at the last event leaves no end of the response, but the time it hung up.
    ended = (response.timestamp_end or (flow.error.timestamp if flow.error else None)) if response else None
    started = request.timestamp_start
    return Exchange(
        flow_id=flow.id,
        dialect=route.dialect,
        method=request.method,
        scheme=request.scheme,
        host=request.host,
        port=request.port,
        path=redact_path(request.path),
        started_at=started,
        duration_ms=max(0.0, (ended - started) * 1000) if ended else None,
        principal=principal_id or principal(request, key),
        hints=hints or hints_from_headers(request.headers),
        request_body=body,
        request_encoding=request.headers.get("content-encoding", "") if request_encoding is None else request_encoding,
        status_code=(response.status_code or None) if response else None,  # HAR writes 0 for "no response"
        response_body=answer,
        response_encoding=response.headers.get("content-encoding", "") if response else "",
        response_type=media_type(response),
        complete=flow.error is None and response is not None and response.status_code != 0,
        error=str(flow.error.msg) if flow.error else None,
        live=live,
        injection=injection,
    )
