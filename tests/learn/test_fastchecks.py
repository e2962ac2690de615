"""What makes new weights fail before they serve: literal shares, lengths and bounds."""

from __future__ import annotations

import json
import math

import pytest

from metaclaw_core.learn.fastchecks import Bounds, Reply, check

FINE = Reply(10, empty=False, malformed=False, kl=0.5)
BEFORE = Reply(10, empty=False, malformed=False)
EMPTY, MALFORMED = Reply(1, empty=True, malformed=False, kl=0.5), Reply(10, empty=False, malformed=True, kl=0.5)


def test_without_a_logged_prompt_there_is_nothing_to_compare():
    found = check([], [])
    assert (found.ok, found.prompts, found.kl) == (True, 0, None)


@pytest.mark.parametrize(
    ("new", "stable", "reason"),
    [
        ([FINE] * 8, [BEFORE] * 8, None),
        ([EMPTY] * 4 + [FINE] * 4, [BEFORE] * 8, None),
        ([EMPTY] * 5 + [FINE] * 3, [BEFORE] * 8, "62% of the replies are empty, 0% of the stable weights'"),
        ([EMPTY] * 8, [Reply(1, empty=True, malformed=False)] * 4 + [BEFORE] * 4, None),  # half of the old ones were, too
        ([MALFORMED] * 2 + [FINE] * 6, [BEFORE] * 8, None),
        ([MALFORMED] * 3 + [FINE] * 5, [BEFORE] * 8, "38% of the replies hold a malformed tool call, 0% of the stable weights'"),
        ([Reply(87, empty=False, malformed=False, kl=0.5)] * 8, [BEFORE] * 8, None),
        ([Reply(88, empty=False, malformed=False, kl=0.5)] * 8, [BEFORE] * 8, "replies have 88 tokens, the stable weights' 10"),
        ([FINE] * 8, [Reply(88, empty=False, malformed=False)] * 8, "replies have 10 tokens, the stable weights' 88"),
        ([Reply(10, empty=False, malformed=False, kl=4.0)] * 8, [BEFORE] * 8, None),
        ([Reply(10, empty=False, malformed=False, kl=4.1)] * 8, [BEFORE] * 8, "the stable weights find the replies absurd: 4.1 nats per token, at most 4"),
        ([FINE] * 7 + [Reply(10, empty=False, malformed=False, kl=math.nan)], [BEFORE] * 8, "a logprob of the replies is no number"),
        ([Reply(0, empty=True, malformed=False, failed="It broke.")] * 8, [BEFORE] * 8, "nothing can be sampled from them: It broke."),
    ],
)
def test_what_new_weights_fail_for(new: list[Reply], stable: list[Reply], reason: str | None):
    found = check(new, stable)
    assert (found.ok, found.reason, found.prompts) == (reason is None, reason, 8)
    assert "NaN" not in json.dumps(found.to_json())  # not every store takes one


def test_the_kl_is_the_mean_of_the_replies_that_hold_a_token():
    silent = Reply(0, empty=True, malformed=False, kl=None)
    assert check([Reply(5, empty=False, malformed=False, kl=1.0), FINE, silent], [BEFORE] * 3).kl == 0.75
    assert check([silent], [silent]).kl is None


def test_bounds_may_be_set():
    assert check([EMPTY] * 8, [BEFORE] * 8, Bounds(empty=1.0)).reason is None
