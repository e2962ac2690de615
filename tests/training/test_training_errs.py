"""A training server that errs, hangs or is lost, for one call or for all: turns may be taken again or are trained once, and the
sentence says what to do.

Through `Trainer.run_once`, with the real SDK on the real engine; between them a server that answers errors where it is told to.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from between_help import HANG, Between, Lane
from guard_help import Lab, asking
from policy_help import RunningEngine

from metaclaw_core.learn.trainer import TIMEOUT, ServerError, TrainingServer
from metaclaw_core.routes import read_route

pytestmark = [pytest.mark.local, pytest.mark.slow]

# (status, the point from which it errs, the path, what the turns and the step are then, the sentence)
LATE, ODD, BILL, MANY, KEY = (
    "The training server did not answer in time (", "The training server failed (", "The training server wants to be paid first (status 402)",
    "The training server asks to be called less often (status 429)", "The training server refuses the key: check rl.tinker_api_key",
)  # fmt: skip
ERRS = [
    (HANG, "begin", "create_session", "scored", None, LATE),
    (HANG, "begin", "create_model", "scored", None, LATE),
    (HANG, "claimed", "forward_backward", "scored", "abandoned", LATE),
    (HANG, "claimed", "retrieve_future", "scored", "abandoned", LATE),
    (HANG, "before step", "forward_backward", "scored", "abandoned", LATE),
    (HANG, "before step", "optim_step", "scored", "abandoned", LATE),
    (HANG, "stepped", "save_weights", "scored", "abandoned", LATE),
    (HANG, "before publish", "save_weights_for_sampler", "trained", "saved", LATE),
    (HANG, "published", "/ttl", "trained", "published", LATE),
    (HANG, "before checks", "create_sampling_session", "trained", "published", LATE),
    (HANG, "before checks", "asample", "trained", "published", LATE),
    (402, "begin", "", "scored", None, BILL),
    (402, "opened", "", "scored", "abandoned", BILL),
    (402, "before step", "", "scored", "abandoned", BILL),
    (402, "stepped", "", "scored", "abandoned", BILL),
    (402, "before publish", "", "trained", "saved", BILL),
    (402, "published", "", "trained", "published", BILL),
    (402, "before checks", "", "trained", "published", BILL),
    (429, "claimed", "forward_backward", "scored", "abandoned", LATE),
    (503, "before step", "optim_step", "scored", "abandoned", LATE),
    (503, "stepped", "save_weights", "scored", "abandoned", LATE),
    (401, "claimed", "forward_backward", "scored", "abandoned", KEY),
    (401, "stepped", "retrieve_future", "scored", "abandoned", KEY),
    (401, "before publish", "save_weights_for_sampler", "trained", "saved", KEY),
    (400, "before step", "optim_step", "scored", "abandoned", ODD),
]


@pytest.mark.parametrize("statuses", [(HANG,), (402,), (400, 401, 429, 503)], ids=["no answer", "402", "other"])
async def test_whatever_the_server_answers_the_step_is_made_once_it_is_well_again(lab, lanes: Between, statuses: Sequence[int]):
    """All cases side by side: most of the time is waiting."""
    with ExitStack() as opened:
        cases = []
        for case in ERRS:
            if case[0] in statuses:
                proxy = opened.enter_context(lanes.lane())
                cases.append((case, proxy, lab(proxy=proxy)))
        failed = [fault for faults in await asyncio.gather(*(broken(*case) for case in cases)) for fault in faults]
        assert failed == []


async def broken(case: tuple[int, str, str, str, str | None, str], proxy: Lane, one: Lab) -> list[str]:
    """What is not as it should be in one case."""
    status, point, path, state, step, sentence = case
    name, faults = f"{status} of {path} from {point!r}", []

    def expect(found: Any, expected: Any) -> None:
        if found != expected:
            faults.append(f"{name}: {found!r}, not {expected!r}")

    def err() -> None:
        proxy.errs[path] = status

    if point == "begin":
        err()
    else:
        one.hooks[point] = err
    report = await one.trainer.run_once()
    expect((report.waits or "")[: len(sentence)], sentence)
    expect(report.problems, (report.waits,))
    expect(len(proxy.refused) > 0, True)
    expect(one.states(), {state})
    expect(one.steps(), [] if step is None else [step])
    expect(read_route(one.home).working, 1)
    proxy.errs.clear()
    await one.trainer.run_once()
    expect(one.steps()[-1], "routed")
    expect((one.trained(), one.states()), ([1, 2, 3, 4], {"trained"}))
    expect(read_route(one.home).working, 2)
    await one.trainer.aclose()
    return faults


async def test_after_a_failure_the_server_is_asked_less_and_less_often_and_once_where_a_person_has_to_help(lab, proxy: Lane):
    one = lab(retry_s=0.2)
    proxy.errs = {"": 400}
    reports, gaps, last = [await one.trainer.run_once()], [], time.monotonic()
    while len(reports) < 4:
        proxy.refused.clear()
        report = await one.trainer.run_once()
        if report.problems:  # it asked again
            reports.append(report)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
        else:
            assert proxy.refused == []
            assert (report.waits or "").startswith("the last try failed; the next one is in ")
            await asyncio.sleep(0.02)
    assert {report.waits for report in reports} == {reports[0].waits}
    for gap, wait in zip(gaps, (0.2, 0.4, 0.8), strict=True):
        assert wait <= gap < wait + 0.3
    await asyncio.sleep(1.6)
    proxy.errs = {"": 401}
    assert (await one.trainer.run_once()).waits == f"{KEY} ({one.settings.rl.model})."
    assert (await one.trainer.run_once()).waits == "the last try failed; the next one is in 24 s"  # 120 times the first wait
    proxy.errs.clear()
    await one.trainer.aclose()


def test_a_call_may_take_longer_than_the_sdk_tries_and_not_as_long_as_it_waits_for_a_bill(lab):
    """The SDK tries for five minutes, and waits for a bill for an hour (`billing_exception_max_pause_duration_sec`)."""
    from tinker.types import ClientConfigResponse

    assert 5 * 60 < TIMEOUT < ClientConfigResponse().billing_exception_max_pause_duration_sec
    assert inspect.signature(TrainingServer).parameters["timeout_s"].default == TIMEOUT


async def test_while_a_session_can_not_be_opened_the_loop_and_the_end_of_the_process_wait_for_nothing(engine: RunningEngine, lanes: Between):
    """The SDK opens it on a thread and under a lock, for as long as it takes. The worker's other jobs must go on."""
    with lanes.lane() as lane:
        lane.errs["create_session"] = HANG
        where = asking(engine, lane, 0.3)
        late = 0.0

        async def tick() -> None:
            nonlocal late
            while True:
                began = time.monotonic()
                await asyncio.sleep(0.01)
                late = max(late, time.monotonic() - began)

        ticking = asyncio.ensure_future(tick())
        for _ in range(7):  # more than the loop has threads of its own on two cores
            with pytest.raises(ServerError, match="did not answer in time"):
                await asyncio.wait_for(where.open(None), 5)
            where.drop()
        await asyncio.wait_for(where.aclose(), 6)
        ticking.cancel()
        assert late < 0.5
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 1) == 7
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "tinker")
