"""The same exchange under another content-encoding, whole and cut: the same turn, or its prefix."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import pytest
import zstandard
from expected_captures import EXPECTED

from metaclaw_core.model import Exchange
from metaclaw_core.store.db import open_store
from metaclaw_core.store.spool import SpoolReader, SpoolWriter


def _raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


ENCODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "none": ("", bytes),
    "gzip": ("gzip", gzip.compress),
    "br": ("br", lambda body: brotli.compress(body, quality=4)),
    "zstd": ("zstd", zstandard.compress),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", _raw_deflate),
}


@pytest.fixture
def recorded(captured: Callable[..., list[Exchange]]) -> list[Exchange]:
    """All exchanges of the ten recordings, oldest first; none of them is compressed."""
    found = [exchange for name in EXPECTED for exchange in captured(f"{name}.mitm")]
    assert len(found) == 49
    assert {e.request_encoding + e.response_encoding for e in found} == {""}
    return sorted(found, key=lambda e: e.started_at)


def turns(path: Path, exchanges: list[Exchange], *, redacted: bool = False) -> list[dict[str, Any]]:
    with open_store(path) as store:
        report = store.ingest(exchanges, redacted=redacted)
        assert (report.stored, report.failed) == (len(exchanges), ())
        assert store.verify().problems == ()
        return list(store.turns())


def through_spool(path: Path, exchanges: list[Exchange]) -> list[Exchange]:
    with SpoolWriter(path) as writer:
        writer.append(exchanges)
    with SpoolReader(path) as reader:
        return [exchange for _, exchange in reader.batch(len(exchanges))]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_recording_under_another_encoding_gives_the_same_turns(
    tmp_path: Path, recorded: list[Exchange], encoding: str
) -> None:
    word, encode = ENCODINGS[encoding]
    other = [
        replace(
            e,
            request_body=encode(e.request_body),
            request_encoding=word,
            response_body=encode(e.response_body),
            response_encoding=word,
        )
        for e in recorded
    ]
    expected = turns(tmp_path / "plain.db", recorded)
    assert turns(tmp_path / "direct.db", other) == expected
    assert turns(tmp_path / "spooled.db", through_spool(tmp_path / "spool.db", other), redacted=True) == expected
    with open_store(tmp_path / "plain.db") as store:  # and it is known to be the same without its flow id
        assert store.ingest([replace(e, flow_id="") for e in other]).duplicates == 49


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_recording_cut_in_the_middle_of_a_frame_gives_the_prefix_of_each_turn(
    tmp_path: Path, recorded: list[Exchange], encoding: str
) -> None:
    """The native Responses exchanges continue each other's answers, so only the last of them is cut."""
    word, encode = ENCODINGS[encoding]
    last = next(e for e in reversed(recorded) if e.dialect == "openai_responses")
    cuttable = [e for e in recorded if e.dialect != "openai_responses" or e is last]
    whole = turns(tmp_path / "whole.db", recorded)
    flows = {e.flow_id for e in cuttable}
    reasons = []
    for share in (0.0, 0.33, 0.7, 0.97):
        cut = []
        for e in recorded:
            body = encode(e.response_body)
            body = body[: int(len(body) * share)] if e in cuttable else body
            cut.append(replace(e, response_body=body, response_encoding=word, complete=e not in cuttable))
        for row, full in zip(turns(tmp_path / f"{share}.db", cut), whole, strict=True):
            if full["flow_id"] in flows:
                assert_prefix(row, full)
                reasons.append(row["reason"])
    assert reasons.count("response cut") >= 3 * 40  # it was cut indeed


def assert_prefix(row: dict[str, Any], full: dict[str, Any]) -> None:
    asked = ("session_id", "turn_id", "kind", "user_text", "retry", "prompt_tip", "status_code")
    assert [row[f] for f in asked] == [full[f] for f in asked]
    assert (full["assistant_text"] or "").startswith(row["assistant_text"] or "")
    said, meant = row["tool_calls"] or [], full["tool_calls"] or []
    assert [c["name"] for c in said] == [c["name"] for c in meant][: len(said)]
    assert all(whole["arguments"].startswith(one["arguments"]) for one, whole in zip(said, meant, strict=False))
    assert all(n in (None, (full["usage"] or {}).get(field)) for field, n in (row["usage"] or {}).items())
    if row["state"] == "captured":  # only what stands behind the end of the answer is missing
        end = ("response_tip", "assistant_text", "tool_calls", "stop_reason", "state", "reason")
        assert [row[f] for f in end] == [full[f] for f in end]
    else:
        assert row["reason"] in ("response cut", full["reason"])
