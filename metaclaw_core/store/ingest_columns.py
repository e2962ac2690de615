"""The columns of a turn that one exchange decides by itself."""

from __future__ import annotations

from typing import Any

from metaclaw_core.model import Kind, Response
from metaclaw_core.store.reading import Reading
from metaclaw_core.store.tables import turns
from metaclaw_core.store.types import plain

USAGE = ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
_MAX_INT = 2**31 - 1  # PostgreSQL's integer
_NOTHING: dict[str, Any] = dict.fromkeys(c.name for c in turns.columns if c.name != "id")


def exchange_columns(reading: Reading) -> dict[str, Any]:
    """Every column that one exchange alone decides, and None for the others."""
    exchange = reading.exchange
    return _NOTHING | {
        "flow_id": plain(exchange.flow_id) or None,
        "content_key": reading.content_key,
        "principal": plain(exchange.principal),
        "kind": Kind.UNKNOWN.value,
        "dialect": plain(exchange.dialect),
        "scheme": plain(exchange.scheme),
        "host": plain(exchange.host),
        "port": exchange.port,
        "path": plain(exchange.path),
        "redacted": reading.redacted,
        "status_code": exchange.status_code,
        "error": reading.error,
        "state": "captured" if reading.reason is None else "skipped",
        "reason": reading.reason,
        "retry": False,
        "attempts": 0,
        "started_at": exchange.started_at,
        "duration_ms": exchange.duration_ms,
        "live": exchange.live,
        "version": exchange.version,
    }


def response_columns(response: Response | None) -> dict[str, Any]:
    """What the answer alone decides."""
    if response is None:
        return {}
    columns: dict[str, Any] = {
        "response_id": plain(response.id),
        "response_model": plain(response.model),
        "stop_reason": response.stop_reason.value if response.stop_reason else None,
        "raw_stop_reason": plain(response.raw_stop_reason),
        "response_extra": dict(response.extra) or None,
    }
    if response.usage is not None:
        columns |= {name: _count(getattr(response.usage, name)) for name in USAGE}
    if (message := response.message) is not None:
        calls = [{"name": c.name, "arguments": c.arguments, "id": c.id} for c in message.tool_calls]
        columns |= {"assistant_text": message.text or None, "tool_calls": calls or None}
    return columns


def _count(value: int | None) -> int | None:
    """A token count as the database can hold it; nonsense is unknown."""
    return value if value is not None and 0 <= value <= _MAX_INT else None
