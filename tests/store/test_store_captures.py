"""The ten recordings through the store: each exchange one row, as a reader of the recordings says it is.

The table is the one of tests/agents. What the store knows beyond it: whose conversation a compaction summarises, and
that a turn of the table is one `turn_id`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from expected_captures import COMPACTED, EXPECTED, Row
from mitmproxy import http
from mitmproxy.io import FlowReader

from metaclaw_core.proxy.capture import exchange
from metaclaw_core.store.db import open_store
from metaclaw_core.wire import find_route

SKIPPED = {  # by recording: place of the row → reason
    "errors-openai-completions": {0: "status 429", 2: "status 500", 4: "response cut", 8: "status 400"},
}


def expected(name: str) -> list[tuple[Any, ...]]:
    reasons = SKIPPED.get(name, {})
    return [
        (*(COMPACTED if row.kind == "compaction" else row[:2]), *row[2:], "skipped" if i in reasons else "captured", reasons.get(i))
        for i, row in enumerate(EXPECTED[name])
    ]


def stored(folder: Path, exchanges: list[Any]) -> list[tuple[Any, ...]]:
    with open_store(folder / "store.db") as store:
        report = store.ingest(exchanges)
        assert (report.stored, report.duplicates, report.failed) == (len(exchanges), 0, ())
        assert store.verify().problems == ()
        found = list(store.turns())
    turns: dict[str, int] = {}
    fields = [name for name in Row._fields if name != "turn"]
    return [
        (*(row[f] for f in fields), turns.setdefault(row["turn_id"], len(turns) + 1), row["state"], row["reason"])
        for row in found
    ]


def without_tail(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Filler has replaced the sentence that closes a subagent's task, so that it can't be cut off there."""
    return [(*r[:3], r[3].partition("\n")[0], *r[4:]) if r[2] == "subagent" else r for r in rows]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_exchange_of_a_recording_is_the_row_a_reader_expects(
    tmp_path: Path, captured: Callable[..., list[Any]], name: str
) -> None:
    assert without_tail(stored(tmp_path, captured(f"{name}.mitm"))) == expected(name)


@pytest.mark.shared
@pytest.mark.parametrize("name", EXPECTED)
def test_the_full_recordings_give_the_same_rows(tmp_path: Path, shared: Path, name: str) -> None:
    with (shared / "captures" / f"{name}.mitm").open("rb") as file:
        flows = [flow for flow in FlowReader(file).stream() if isinstance(flow, http.HTTPFlow)]
    routes = [find_route(flow.request.method, flow.request.path) for flow in flows]
    exchanges = [exchange(f, r[1], b"key", live=False) for f, r in zip(flows, routes, strict=True) if r]
    assert stored(tmp_path, exchanges) == expected(name)
