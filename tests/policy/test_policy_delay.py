"""An answer of the policy server leaves at once: the kernel does not hold its body back for 40 ms."""

from __future__ import annotations

import time

import pytest
from policy_help import RunningPolicy

pytestmark = [pytest.mark.slow, pytest.mark.local]


def test_an_answer_of_the_policy_server_is_not_held_back_by_nagle_s_delay(policy: RunningPolicy) -> None:
    took = []
    for n in range(20):
        began = time.monotonic()
        assert policy.ask("/v1/nothing", {}, f"delay-{n}").status_code == 404
        took.append(time.monotonic() - began)
    assert sorted(took)[5] < 0.03, took  # every one of them took 0.04 s and more where it was
