from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine_help import RunningEngine

pytestmark = [pytest.mark.local, pytest.mark.slow]


def test_the_engine_does_everything_the_doctor_asks_of_tinker(engine: RunningEngine) -> None:
    from metaclaw_core.engine.conformance import conformance

    checks = asyncio.run(conformance(engine.url, engine.key, engine.model))
    assert [f"{c.name}: {c.detail}" for c in checks if c.status != "ok"] == []
    assert [c.name for c in checks] == [
        *("connect", "capabilities", "create", "tokenizer", "loss is a sum", "gradients accumulate", "save and sample"),
        *("logprobs agree", "score a suffix", "logprob scale", "stop token", "seed", "segments", "resume"),
        *("time to live", "unknown weights", "chat by path", "clean up"),
    ]
    assert sum(c.prefilled + c.sampled + c.trained for c in checks) < 5000


def test_with_a_wrong_key_every_check_says_so_and_nothing_raises(engine: RunningEngine) -> None:
    from metaclaw_core.engine.conformance import conformance

    checks = asyncio.run(conformance(engine.url, "tml-not-the-key", engine.model))
    assert {c.status for c in checks} == {"failed", "skipped"}
    assert "TINKER_API_KEY" in checks[0].detail
