"""A row is never written as a difference from a base that the reader has deleted, however many of them have gone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from metaclaw_core.store.bases import FROM_BYTES
from metaclaw_core.store.spool import SpoolReader, SpoolWriter


def body(seed: int, size: int) -> bytes:
    """A start that all have, and an end of its own."""
    return random.Random(0).randbytes(FROM_BYTES).hex().encode() + random.Random(seed).randbytes(size // 2).hex().encode()


def test_a_row_whose_nearest_bases_are_all_gone_brings_a_base_of_its_own(tmp_path: Path, chat: Any) -> None:
    path = tmp_path / "spool" / "1-1.db"
    with SpoolWriter(path) as writer:
        for seed in (1, 2, 3):  # so far from each other that each becomes a base
            writer.append([replace(chat(), flow_id=f"old-{seed}", request_body=body(seed, 20_000))])
        with SpoolReader(path) as reader:
            reader.delete([row for row, _ in reader.batch(10)])
        writer.append([replace(chat(), flow_id="new", request_body=body(4, 12_000))])  # near to each of them
        with SpoolReader(path) as reader:
            assert [exchange.request_body for _, exchange in reader.batch(10)] == [body(4, 12_000)]
            assert reader.counts() == (1, 0)
