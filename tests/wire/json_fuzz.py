"""What the dialect tests share: JSON that no server would send, streams cut anywhere, real recordings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mitmproxy.http import HTTPFlow
from mitmproxy.io import FlowReader

from metaclaw_core.errors import WireError
from metaclaw_core.model import Message, Response, ToolCall, ToolResult
from metaclaw_core.wire.base import Dialect

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value, containers included."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, body: Any) -> Any:
    """`body` with one to three of its values replaced or removed."""
    value = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(1, 3))):
        spots = places(value)
        if not spots:
            break
        *way, last = draw(st.sampled_from(spots))
        parent = value
        for key in way:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = draw(json_values)
        else:
            del parent[last]
    return value


def refusal(parse: Callable[[], object]) -> str | None:
    """The sentence of a WireError, None for what was parsed. Any other exception fails the test."""
    try:
        parse()
    except WireError as e:
        return str(e)
    return None


def feed(dialect: Dialect, *chunks: bytes) -> Response:
    parser = dialect.stream_parser()
    for chunk in chunks:
        parser.feed(chunk)
    return parser.finish()


@st.composite
def chunked(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def identity(message: Message | None) -> list[Any]:
    """What makes two messages the same one: ids and cache marks don't, and arguments count as JSON."""
    out: list[Any] = []
    for part in message.parts if message is not None else ():
        if isinstance(part, ToolCall):
            out.append(("call", part.name, json.loads(part.arguments)))
        elif isinstance(part, ToolResult):
            out.append(("result", part.text))
        else:
            out.append(part)
    return out


def recorded(path: Path) -> list[HTTPFlow]:
    with path.open("rb") as file:
        return [flow for flow in FlowReader(file).stream() if isinstance(flow, HTTPFlow)]
