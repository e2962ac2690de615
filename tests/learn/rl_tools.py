"""Samples by hand, for the tests of RL's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from metaclaw_core.learn.batch import Sample


def sample(turn: int = 1, prompt: list[int] | None = None, tokens: list[int] | None = None, **fields: Any) -> Sample:
    """A sample that may train, unless `fields` say otherwise; every token has logprob -1."""
    tokens = [7, 8] if tokens is None else tokens
    values: dict[str, Any] = {
        "turn": turn,
        "session": "s-1",
        "split_by": "client-1",
        "human_turn": None,
        "klass": "A",
        "prompt_ids": np.array([1, 2, 3] if prompt is None else prompt, dtype=np.int32),
        "tokens": np.array(tokens, dtype=np.int32),
        "logprobs": np.array(fields.pop("logprobs", [-1.0] * len(tokens)), dtype=np.float32),
        "version": 5,
        "stop_reason": "stop",
        "reward": 1.0,
        "malformed": False,
        "redacted": False,
        "created_at": float(turn),
        "cluster": "0",
        "agent": "openclaw",
    }
    return Sample(**(values | fields))


def tau_outcomes() -> list[list[float]]:
    """Rewards of 50 tasks in 4 trials each, of a real agent."""
    text = (Path(__file__).parent / "tau_airline_outcomes.json").read_text(encoding="utf-8")
    return [[float(digit) for digit in row] for row in json.loads(text)["outcomes"]]
