"""Examining the judge: files of pairs and labels, the numbers, the golden set and what it pauses."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from judge_tools import client_of

from metaclaw_core.cli.judge import command
from metaclaw_core.jobs import examine_judge
from metaclaw_core.learn.calibrate import (
    CalibrationError,
    Label,
    Outcome,
    Pair,
    cohen_kappa,
    examine,
    expected_calibration_error,
    read_items,
    summarise,
)
from metaclaw_core.learn.health import (
    CheckReport,
    check_judge,
    golden_pairs,
    health_due,
    health_of,
    judge_health,
    rl_pause_reason,
)
from metaclaw_core.learn.llm import LLMUnavailable
from metaclaw_core.model import Message, Role, Text, ToolCall
from metaclaw_core.settings import Judge, Settings
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.testing import Received, Script, ScriptedLLM


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "store.db") as opened:
        yield opened


# --- files --------------------------------------------------------------------------------------


def test_pairs_and_labels_are_read_with_their_actions() -> None:
    lines = [
        '{"id": "p", "instruction": "Go.", "better": "Yes.", "worse": {"text": "No.", "calls": [{"name": "x", "arguments": {"a": 1}}]}}',
        "",
        '{"instruction": "Go.", "action": {"calls": [{"name": "x", "arguments": "{"}]}, "next": "Thanks.", "label": -1}',
    ]
    assert read_items(lines, "f") == [
        Pair(
            "p",
            "Go.",
            Message(Role.ASSISTANT, (Text("Yes."),)),
            Message(Role.ASSISTANT, (Text("No."), ToolCall("x", '{"a":1}'))),
        ),
        Label("line 3", "Go.", Message(Role.ASSISTANT, (ToolCall("x", "{"),)), "Thanks.", -1),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "f:1: the line is not JSON"),
        ("[]", "f:1: the line is JSON, but list and not an object."),
        ("{}", "f:1: instruction, action, label is missing; a pair has better and worse, a label action and label."),
        ('{"instruction": "a", "better": "b"}', "f:1: worse is missing"),
        ('{"instruction": "a", "better": "b", "worse": "c", "winner": 1}', "f:1: winner is not known; known are better, id, instruction, worse."),
        ('{"instruction": " ", "better": "b", "worse": "c"}', "f:1: id and instruction must be text."),
        ('{"instruction": "a", "better": "b", "worse": "b"}', "f:1: better and worse are the same."),
        ('{"instruction": "a", "better": "", "worse": "b"}', "f:1: better is empty."),
        ('{"instruction": "a", "better": {"words": "b"}, "worse": "b"}', "f:1: better must be text, or an object with text and calls."),
        ('{"instruction": "a", "better": {"calls": [{"name": "x"}]}, "worse": "b"}', "f:1: better: a call needs a name and arguments."),
        ('{"instruction": "a", "action": "b", "label": 2}', "f:1: label is 2; it must be 1, 0 or -1."),
        ('{"instruction": "a", "action": "b", "label": true}', "f:1: label is True; it must be 1, 0 or -1."),
        ('{"instruction": "a", "action": "b", "label": 1, "next": 3}', "f:1: next must be text."),
        ("", "f holds no pair and no label."),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(CalibrationError) as error:
        read_items([line], "f")
    assert str(error.value).startswith(message)


def test_of_many_bad_lines_the_first_ten_are_told() -> None:
    with pytest.raises(CalibrationError) as error:
        read_items(["{"] * 25, "f")
    told = str(error.value).splitlines()
    assert len(told) == 11
    assert told[0].startswith("f:1: ")
    assert told[-1] == "… and 15 more lines."


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "kappa"),
    [
        ([], None),
        ([("A", "A"), ("B", "B")], 1.0),
        ([("A", "B"), ("B", "A")], -1.0),
        ([("A", "A"), ("B", "A")], 0.0),
        ([("A", None), ("B", None)], 0.0),
        ([("A", "A"), ("A", "A")], None),
        # 20 of 25 and 15 of 25 right: observed .7, by chance .5
        ([("A", "A")] * 20 + [("A", "B")] * 5 + [("B", "A")] * 10 + [("B", "B")] * 15, 0.4),
    ],
)
def test_kappa_is_agreement_beyond_chance(pairs: list[tuple[str, str | None]], kappa: float | None) -> None:
    assert cohen_kappa(pairs) == (None if kappa is None else pytest.approx(kappa))


@given(st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from(["A", "B", "neither", None])), min_size=1))
def test_kappa_lies_between_minus_one_and_one(pairs: list[tuple[str, str | None]]) -> None:
    kappa = cohen_kappa(pairs)
    assert kappa is None or -1.0001 <= kappa <= 1.0001


@pytest.mark.parametrize(
    ("verdicts", "error"),
    [
        ([], None),
        ([(1.0, True)], 0.0),
        ([(1.0, False)], 1.0),
        ([(1.0, True), (1.0, False)], 0.5),
        ([(2 / 3, True), (2 / 3, True), (2 / 3, False)], 0.0),
        ([(1.0, True), (2 / 3, False)], 1 / 3),
    ],
)
def test_calibration_error_is_the_gap_between_confidence_and_being_right(
    verdicts: list[tuple[float, bool]], error: float | None
) -> None:
    assert expected_calibration_error(verdicts) == (None if error is None else pytest.approx(error))


def test_a_flip_is_a_pair_whose_verdict_changes_with_the_order() -> None:
    outcomes = [
        Outcome("same", "A", "A", 1.0, "better"),
        Outcome("same", "B", "B", 1.0, "better"),
        Outcome("flip", "A", "A", 1.0, "better"),
        Outcome("flip", "B", "A", 1.0, "worse"),
        Outcome("tie", "A", "neither", 1.0, "neither"),
        Outcome("tie", "B", "neither", 1.0, "neither"),
        Outcome("half", "A", "A", 1.0, "better"),
        Outcome("half", "B", None, None),
    ]
    found = summarise(outcomes, 2)
    assert (found.pairs, found.labels, found.unanswered, found.abstained) == (4, 0, 2, 1)
    assert found.flips == pytest.approx(1 / 3)
    assert found.first_place == pytest.approx(4 / 5)
    assert found.agreement == pytest.approx(4 / 8)


def test_nothing_answered_is_unknown_and_not_zero() -> None:
    found = summarise([], 3)
    assert (found.kappa, found.agreement, found.flips, found.first_place, found.calibration_error) == (None,) * 5


# --- judges of all sorts ------------------------------------------------------------------------


def candidate_a(received: Received) -> str:
    text = received.json()["messages"][1]["content"]
    return "".join(part for part in text.split("<<<") if " candidate A, " in part[:40])


def oracle(pairs: list[Pair]) -> Callable[[Received], Script]:
    """Knows which candidate is the better one."""
    pieces = {
        pair.id: (pair.instruction, [p.text if isinstance(p, Text) else p.arguments for p in pair.better.parts if isinstance(p, (Text, ToolCall))])
        for pair in pairs
    }

    def answer(received: Received) -> Script:
        asked = received.json()["messages"][1]["content"]
        first = candidate_a(received)
        [better] = [parts for instruction, parts in pieces.values() if f"human\n{instruction}\n" in asked]
        return Script(text=f"Better: {'A' if all(p in first for p in better) else 'B'}")

    return answer


def examined(store: Store, answer: Callable[[Received], Script], **fields: Any) -> Any:
    async def go() -> Any:
        async with client_of(llm, store) as client:
            return await judge_health(store, client, Judge(), **fields)

    with ScriptedLLM(answer) as llm:
        return asyncio.run(go())


def test_a_judge_that_knows_passes_on_the_golden_set(store: Store) -> None:
    found = examined(store, oracle(golden_pairs()))
    assert found.ok
    assert found.reason is None
    assert (found.result["pairs"], found.result["kappa"], found.result["flips"]) == (60, 1.0, 0.0)
    assert found.result["first_place"] == 0.5
    assert health_of(store) == found


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("Better: A", "the judge agrees too little with the golden set: κ is 0.00, it must be at least 0.4"),
        ("Better: neither", "the judge agrees too little with the golden set: κ is 0.00, it must be at least 0.4"),
        ("I can't say.", "the judge agrees too little with the golden set: κ is 0.00, it must be at least 0.4"),
    ],
)
def test_a_judge_without_judgement_pauses_rl(store: Store, says: str, reason: str) -> None:
    found = examined(store, lambda _: Script(text=says))
    assert (found.ok, found.reason) == (False, reason)


def test_a_judge_that_follows_the_order_pauses_rl_although_it_is_mostly_right(store: Store) -> None:
    knows, seen = oracle(golden_pairs()), Counter[str]()

    def biased(received: Received) -> Script:
        """Says A for every fourth pair, whatever stands there."""
        asked = received.json()["messages"][1]["content"].split("human\n")[1].split("\n")[0]
        order = sorted(p.instruction for p in golden_pairs()).index(next(p.instruction for p in golden_pairs() if p.instruction.split("\n")[0] == asked))
        seen[asked] += 1
        return Script(text="Better: A") if order % 4 == 0 else knows(received)

    found = examined(store, biased)
    assert found.result["kappa"] == 0.75
    assert found.reason == "the judge follows the order of the candidates: 25% of the pairs, at most 15% may"


def test_a_judge_that_is_down_leaves_the_last_result(store: Store) -> None:
    passed = examined(store, oracle(golden_pairs()), clock=lambda: 1_000.0)
    with pytest.raises(LLMUnavailable):
        examined(store, lambda _: Script(status=503))
    assert health_of(store) == passed


def test_a_few_lost_answers_do_not_end_the_examination(store: Store) -> None:
    knows = oracle(golden_pairs())
    lost = golden_pairs()[7].instruction
    found = examined(store, lambda r: Script(status=503) if lost in r.json()["messages"][1]["content"] else knows(r))
    assert found.ok
    assert (found.result["pairs"], found.result["unanswered"]) == (59, 1)


def test_the_golden_set_has_sixty_different_pairs_with_calls_and_chinese() -> None:
    pairs = golden_pairs()
    assert len({p.id for p in pairs}) == len({p.instruction for p in pairs}) == 60
    assert sum(bool(p.better.tool_calls or p.worse.tool_calls) for p in pairs) >= 25
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in p.instruction) for p in pairs) >= 10
    longer = sum(len(str(p.better)) > len(str(p.worse)) for p in pairs)
    assert 15 <= longer <= 45  # length alone does not tell


# --- when, and what it decides ------------------------------------------------------------------

DAY = 86_400.0


def judged_by(url: str, **judge: Any) -> Settings:
    rl = {"prm_url": f"{url}/v1", "prm_model": "judge-1", "prm_api_key": "k-0123456789"}
    return Settings.model_validate({"rl": rl, "judge": judge})


def test_rl_is_paused_until_this_judge_has_passed(store: Store) -> None:
    assert rl_pause_reason(store, Settings()) == "no judge is configured (rl.prm_url or llm.*)"

    async def go(llm: ScriptedLLM) -> None:
        async with client_of(llm, store) as client:
            await judge_health(store, client, clock=lambda: 100 * DAY)

    with ScriptedLLM(oracle(golden_pairs())) as llm:
        mine = judged_by(llm.url)
        assert rl_pause_reason(store, mine) == "the judge has not been examined yet"
        assert health_due(store, mine)
        asyncio.run(go(llm))
    assert rl_pause_reason(store, mine) is None
    assert rl_pause_reason(store, judged_by(llm.url, models=["other"])) == "the judge was changed and has not been examined since"
    for at_start, days, due in ((False, 6.9, False), (False, 7.1, True), (True, 0.9, False), (True, 1.1, True)):
        assert health_due(store, mine, at_start=at_start, clock=partial(float, (100 + days) * DAY)) is due
    assert health_due(store, judged_by(llm.url, models=["other"]), clock=lambda: 100 * DAY)
    assert not health_due(store, Settings())


def test_a_judge_whose_examiner_was_killed_is_examined_once_its_lease_has_ended(store: Store) -> None:
    assert store.acquire_lease("job:judge", "a worker that was killed", 0.5)

    async def go(llm: ScriptedLLM) -> CheckReport | None:
        async with client_of(llm, store) as client:
            return await examine_judge(store, judged_by(llm.url), client, at_start=True)

    with ScriptedLLM(lambda received: Script(text="It is.\nScore: 1")) as llm:
        report = asyncio.run(go(llm))
    assert report is not None
    assert report.checked


def test_the_job_examines_the_judge_when_it_is_due_and_tells_of_a_pause(store: Store) -> None:
    async def go(llm: ScriptedLLM) -> list[CheckReport]:
        async with client_of(llm, store) as client:
            mine = judged_by(llm.url)
            return [await check_judge(store, mine, who, at_start=True) for who in (None, client, client)]

    with ScriptedLLM(lambda _: Script(text="Better: A")) as llm:
        none, first, second = asyncio.run(go(llm))
        assert len(llm.received) == 120
    assert (none, second) == (CheckReport(checked=False), CheckReport(checked=False))
    assert first.problems[0].startswith("RL is paused: the judge agrees too little")


# --- labels, and the command --------------------------------------------------------------------

LABELS = [
    {"instruction": "2+2?", "action": "4", "label": 1},
    {"instruction": "2+3?", "action": "4", "next": "No.", "label": -1},
    {"instruction": "2+4?", "action": "Perhaps.", "label": 0},
]


def test_labels_are_scored_as_turns_are(store: Store) -> None:
    def answer(received: Received) -> Script:
        asked = received.json()["messages"][1]["content"]
        return Script(text="Score: -1" if "the human's next message" in asked else "Score: 1")

    async def go() -> Any:
        async with client_of(llm, store) as client:
            return await examine(read_items(map(json.dumps, LABELS), "f"), client, Judge(), votes=3)

    with ScriptedLLM(answer) as llm:
        outcomes, unanswered = asyncio.run(go())
        assert len(llm.received) == 9
    found = summarise(outcomes, unanswered)
    assert (found.pairs, found.labels, found.flips, found.first_place) == (0, 3, None, None)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.kappa == pytest.approx(0.5)
    assert found.calibration_error == pytest.approx(1 / 3)


def cli(*args: str, **env: str) -> Any:
    return CliRunner().invoke(command, args, env=env, catch_exceptions=True)


def test_the_command_prints_the_numbers(tmp_path: Path, metaclaw_home: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs = golden_pairs()[:4]
    lines = Path(__file__).resolve().parents[2].joinpath("metaclaw_core/learn/golden/pairs.jsonl").read_text("utf-8").splitlines()
    file.write_text("\n".join(lines[:4]), "utf-8")
    with ScriptedLLM(oracle(pairs)) as llm:
        env = {"METACLAW_RL_PRM_URL": llm.url + "/v1", "METACLAW_RL_PRM_MODEL": "judge-1", "METACLAW_HOME": str(metaclaw_home)}
        as_json = cli("calibrate", str(file), "--json", **env)
        as_text = cli("calibrate", str(file), "--votes", "1", **env)
        assert len(llm.received) == 4 * 2 * 3 + 4 * 2
    assert json.loads(as_json.output) == {
        "pairs": 4,
        "labels": 0,
        "unanswered": 0,
        "abstained": 0,
        "kappa": 1.0,
        "agreement": 1.0,
        "flips": 0.0,
        "first_place": 0.5,
        "calibration_error": 0.0,
    }
    assert "agreement beyond chance (κ)           1.00" in as_text.output


def test_the_golden_command_keeps_its_result_and_says_by_its_status_whether_rl_is_paused(metaclaw_home: Path) -> None:
    with ScriptedLLM(lambda _: Script(text="Better: A")) as llm:
        env = {"METACLAW_RL_PRM_URL": llm.url, "METACLAW_RL_PRM_MODEL": "m", "METACLAW_HOME": str(metaclaw_home)}
        got = cli("golden", **env)
    assert got.exit_code == 1
    assert "RL is paused: the judge agrees too little with the golden set: κ is 0.00" in got.output
    with open_store(metaclaw_home / "store.db") as store:
        assert health_of(store) is not None


def test_without_a_judge_the_command_says_what_to_set(tmp_path: Path, metaclaw_home: Path) -> None:
    got = cli("golden", METACLAW_HOME=str(metaclaw_home))
    assert str(got.exception) == "No judge is configured: set rl.prm_url, rl.prm_model and rl.prm_api_key, or llm.*."
