"""Siblings without a server: which prompts are chosen, how a judge tells them apart, what each is to learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_tools import assistant, client_of, exchange, result, user
from rl_tools import sample

pytest.importorskip("tinker")  # no server is asked, but a source holds a client of one

from training_help import put

from metaclaw_core.errors import ConfigError
from metaclaw_core.learn import journal
from metaclaw_core.learn.advantage import Tracker, key_of
from metaclaw_core.learn.cluster import Clusters
from metaclaw_core.learn.evolve import is_support
from metaclaw_core.learn.groups import Group, Member, Prompt, Siblings
from metaclaw_core.learn.guards import Guards
from metaclaw_core.learn.journal import Trained
from metaclaw_core.learn.llm import LLMRefused, LLMUnavailable
from metaclaw_core.learn.prices import Prices
from metaclaw_core.learn.ranking import Asked, Reply, Worth, agreed, won, worth_of
from metaclaw_core.learn.siblings import SiblingSource, results_before
from metaclaw_core.learn.trainer import TrainingServer
from metaclaw_core.model import Message, Role, Text, ToolCall
from metaclaw_core.settings import Judge, Settings
from metaclaw_core.store.rollouts import Store
from metaclaw_core.testing import Received, Script, ScriptedLLM

ASKED = Asked("Say a letter.")


@pytest.fixture
def opened(tmp_path: Path):
    from metaclaw_core.store.db import open_store

    with open_store(tmp_path / "store.db") as store:
        yield store


def says(text: str, **fields: Any) -> Reply:
    return Reply(Message(Role.ASSISTANT, (Text(text),) if text else ()), **fields)


def calls(name: str) -> Reply:
    return Reply(Message(Role.ASSISTANT, (ToolCall(name, "{}"),)))


# --- the judge ------------------------------------------------------------------------------------


class ByRule:
    """Scores a reply by what stands in it, prefers the longer of two; `first` prefers what is shown first."""

    def __init__(self, score: Callable[[str], int | str], *, first: bool = False) -> None:
        self.score, self.first, self.scored, self.compared = score, first, 0, 0

    def __call__(self, received: Received) -> Script:
        shown: str = received.json()["messages"][-1]["content"]
        texts = [block.split("\n")[1] for block in shown.split("<<<")[1:] if "action: text" in block.split("\n")[0]]
        if len(texts) == 2:
            self.compared += 1
            better = "A" if self.first or len(texts[0]) > len(texts[1]) else "B"
            return Script(text=f"Better: {better}")
        self.scored += 1
        return Script(text=f"Score: {self.score(texts[-1] if texts else shown)}")


async def ask(store: Store, rule: Any, replies: Sequence[Reply], *, votes: int = 1, **options: bool) -> Worth:
    with ScriptedLLM(rule) as llm:
        client = client_of(llm, store)
        try:
            return await worth_of(client, Judge(votes=votes), ASKED, replies, **({"calls": False, "pairs": True} | options))
        finally:
            await client.aclose()


async def test_where_scores_differ_they_are_what_a_reply_is_worth_and_nothing_is_compared(opened: Store) -> None:
    rule = ByRule(lambda text: 1 if text == "good" else -1 if text == "bad" else 0)
    found = await ask(opened, rule, [says("good"), says("bad"), says("so so"), says("good")], votes=3)
    assert found == Worth((1.0, 0.0, None, 1.0), (1.0, 0.0, None, 1.0))
    assert (rule.scored, rule.compared) == (12, 0)


async def test_where_scores_are_the_same_pairs_decide_in_both_orders(opened: Store) -> None:
    rule = ByRule(lambda _: 1)
    found = await ask(opened, rule, [says("a"), says("aaa"), says("aa")])
    assert found == Worth((1.0, 1.0, 1.0), (0.0, 1.0, 0.5), paired=True)
    assert rule.compared == 6


async def test_a_judge_that_follows_the_order_decides_nothing(opened: Store) -> None:
    found = await ask(opened, ByRule(lambda _: -1, first=True), [says("a"), says("aaa"), says("aa")])
    assert found == Worth((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), paired=True)


async def test_an_abstaining_judge_leaves_no_score_and_pairs_may_still_tell(opened: Store) -> None:
    assert await ask(opened, ByRule(lambda _: "?"), [says("a"), says("aa")]) == Worth((None, None), (0.0, 1.0), paired=True)
    assert await ask(opened, ByRule(lambda _: "?"), [says("a"), says("aa")], pairs=False) == Worth((None, None), (None, None))


async def test_cut_replies_are_worth_nothing_known_and_calls_that_cant_be_read_are_worth_nothing(opened: Store) -> None:
    rule = ByRule(lambda _: 1)
    replies = [says("cut", cut=True), says("broken", malformed=True), calls("exec"), says("fine"), says("both", cut=True, malformed=True)]
    assert await ask(opened, rule, replies) == Worth((None, 0.0, None, 1.0, None), (None, 0.0, None, 1.0, None))
    assert rule.scored == 1


async def test_calls_are_judged_where_they_may_be(opened: Store) -> None:
    rule = ByRule(lambda text: -1 if "call of exec" in text else 1)
    assert await ask(opened, rule, [calls("exec"), says("fine")], calls=True) == Worth((0.0, 1.0), (0.0, 1.0))


async def test_equal_replies_are_never_compared(opened: Store) -> None:
    rule = ByRule(lambda _: 1)
    assert await ask(opened, rule, [says("a"), says("a"), says("a")]) == Worth((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    assert rule.compared == 0
    found = await ask(opened, rule, [says("a"), says("a"), says("aa")])
    assert found == Worth((1.0, 1.0, 1.0), (0.25, 0.25, 1.0), paired=True)
    assert rule.compared == 4


async def test_a_refusal_of_one_reply_is_an_abstention_and_one_of_the_key_is_raised(opened: Store) -> None:
    def refuses(status: int) -> Callable[[Received], Script]:
        def answer(received: Received) -> Script:
            bad = "bad" in received.json()["messages"][-1]["content"]
            return Script(status=status) if bad else Script(text="Score: 1")

        return answer

    assert (await ask(opened, refuses(422), [says("bad"), says("fine")], pairs=False)).scores == (None, 1.0)
    with pytest.raises(LLMRefused):
        await ask(opened, refuses(401), [says("bad"), says("fine")])
    with pytest.raises(LLMUnavailable):
        await ask(opened, refuses(503), [says("bad"), says("fine")])


async def test_the_judge_sees_what_was_asked_and_what_tools_had_returned_but_not_what_came_of_it(opened: Store) -> None:
    seen: list[str] = []

    def answer(received: Received) -> Script:
        seen.append(received.json()["messages"][-1]["content"])
        return Script(text="Score: 1")

    with ScriptedLLM(answer) as llm:
        client = client_of(llm, opened)
        asked = Asked("yes, do it", "Delete the old logs.", (("exec", "three files"),))
        await worth_of(client, Judge(votes=1), asked, [says("They are gone.")], calls=True, pairs=True)
        await client.aclose()
    [shown] = seen
    heads = [line.split(" ", 1)[1] for line in shown.split("\n") if line.startswith("<<<")]
    assert heads == [
        "earlier request, written by: human",
        "instruction, written by: human",
        "what exec had returned before the step, written by: tool or web",
        "action: text, written by: assistant",
    ]
    assert "three files" in shown
    assert "What came of the step is not known." in shown


def test_a_pair_counts_only_where_both_orders_name_the_same_reply() -> None:
    assert [agreed("A", "B"), agreed("B", "A")] == [1, -1]
    assert [agreed("A", "A"), agreed("B", "B"), agreed("neither", "neither"), agreed("A", None), agreed(None, None), agreed("A", "neither")] == [0] * 6


@given(st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda p: p[0] < p[1]), st.sampled_from((-1, 0, 1))))
def test_shares_of_pairs_are_0_to_1_and_one_half_on_average(better: dict[tuple[int, int], int]) -> None:
    shares = won(range(5), better)
    assert all(0 <= share <= 1 for share in shares.values())
    assert sum(shares.values()) == pytest.approx(2.5)


# --- groups ---------------------------------------------------------------------------------------


def prompt(turn: int, cluster: str = "0", agent: str = "openclaw/main") -> Prompt:
    ids = np.array([1, 2, 3], dtype=np.int32)
    return Prompt(turn, f"s-{turn}", f"c-{turn}", float(turn), ids, 16, (), False, ASKED, "Say a letter.", agent, cluster)


def group(turn: int, first: int, worth: Sequence[float | None], scores: Sequence[float | None] | None = None, **fields: Any) -> Group:
    given = worth if scores is None else scores
    members = [Member(sample(-first - n, reward=w, session=f"s-{turn}"), s) for n, (w, s) in enumerate(zip(worth, given, strict=True))]
    return Group(prompt(turn), tuple(members), **fields)


def said(turn: int, reason: str | None = None) -> Trained:
    return Trained(turn, reason, 1.0, 0.5, 1.0, 0)


def test_each_sibling_learns_how_much_better_it_was_than_its_group() -> None:
    work = Siblings((group(7, 1, [1.0, 0.0, None, 0.0]), group(8, 5, [1.0, 1.0]), group(9, 7, [0.25, 0.75], [1.0, 1.0])), Clusters())
    assert [s.turn for s in work.samples] == [-1, -2, -4, -7, -8]  # neither what could not be judged nor what tells nothing
    given, tracker = work.advantages(Tracker(), work.samples)
    assert given == pytest.approx({-1: 2 / 3, -2: -1 / 3, -4: -1 / 3, -7: -0.25, -8: 0.25})
    assert tracker.rewards == 7  # what each earned by itself, in groups without a signal, too; pairs are no score
    assert tracker.value(key_of("0", "openclaw/main")) > 0.6


def test_a_sibling_that_is_dropped_is_left_out_of_its_group_s_mean() -> None:
    work = Siblings((group(7, 1, [1.0, 0.0, 0.0]),), Clusters())
    given, _ = work.advantages(Tracker(), [s for s in work.samples if s.turn != -2])
    assert given == {-1: 0.5, -3: -0.5}
    given, _ = work.advantages(Tracker(), [s for s in work.samples if s.turn != -1])
    assert given == {}


def test_what_is_told_is_told_of_the_prompts() -> None:
    groups = (
        group(7, 1, [1.0, 0.0]),
        group(8, 3, [1.0, 1.0]),
        group(9, 5, [None, 1.0]),
        Group(prompt(10), (), problem="it can't be answered: no"),
        group(11, 7, [0.0, 1.0]),
    )
    work = Siblings(groups, Clusters())
    told = work.told([said(-1), said(-2, "veto"), said(-7, "veto"), said(-8, "veto")])
    assert [(one.turn, one.reason, one.reward) for one in told] == [
        (7, None, 0.5),
        (8, "its siblings earned the same", 1.0),
        (9, "too few of its siblings could be judged", 1.0),
        (10, "it can't be answered: no", None),
        (11, "veto", 0.5),
    ]
    assert {one.advantage for one in told} == {None}
    found = work.metrics([said(-1), said(-2, "veto"), said(-7, "veto"), said(-8, "veto")])
    assert (found["turns"], found["skipped"], found["groups"], found["groups_without_signal"], found["sessions"]) == (8, 7, 5, 3, 5)
    assert found["reward_mean"] == pytest.approx(5 / 7)


def test_a_teacher_is_shown_siblings_of_groups_that_tell_nothing_apart() -> None:
    work = Siblings((group(8, 1, [1.0, 1.0]), group(9, 3, [None, 1.0])), Clusters(), taught=True)
    assert [s.turn for s in work.samples] == [-1, -2, -3, -4]
    assert work.advantages(Tracker(), work.samples)[0] == {}


# --- prompts --------------------------------------------------------------------------------------


def source(store: Store, **rl: Any) -> SiblingSource:
    settings = Settings.model_validate({"mode": "rl", "rl": {"model": "m", "batch_size": 8, "group_size": 4, "support_share": 0, **rl}})
    guards = Guards(store, settings, Prices(), judged=False, taught=False)
    return SiblingSource(store, settings, TrainingServer("m"), guards, None, taught=False, at=lambda _: None)  # type: ignore[arg-type] - nobody is judged


def log(store: Store, n: int, **fields: Any) -> int:
    values = {"user_text": f"Say {n}.", "sampling": {"temperature": 1.0, "max_tokens": 5}}
    return put(store, n, (1, 2, 3), (4, 5), (-1.0, -1.0), **(values | fields))


def chosen(store: Store, **rl: Any) -> list[int] | None:
    batch, _, _ = source(store, **rl).choose(journal.begin(store, "m"))
    return None if batch is None else [p.turn for p in batch]


def states(store: Store) -> dict[str, tuple[str, str | None]]:
    return {row["flow_id"]: (row["state"], row["reason"]) for row in store.turns()}


def test_prompts_are_the_newest_turns_whatever_they_scored(opened: Store) -> None:
    turns = [log(opened, n, reward=(1.0, 0.0, None)[n % 3]) for n in range(4)]
    assert chosen(opened) == [turns[3], turns[2]]
    [newest, _] = source(opened).choose(journal.begin(opened, "m"))[0] or ()
    assert (newest.ids.tolist(), newest.max_tokens, newest.asked.instruction, newest.agent) == ([1, 2, 3], 5, "Say 3.", "openclaw/main")


def test_turns_that_the_judge_has_not_seen_wait_for_it(opened: Store) -> None:
    log(opened, 0, state="captured")
    log(opened, 1, state="captured")
    one = log(opened, 2)
    assert chosen(opened) is None
    assert source(opened).choose(journal.begin(opened, "m"))[1] == "1 of 2 prompts are there"
    assert chosen(opened, batch_size=4) == [one]


def test_what_may_never_be_trained_on_is_no_prompt_and_says_why(opened: Store) -> None:
    log(opened, 0, klass="C", klass_reason="top_p")
    put(opened, 1, (), (4,), (-1.0,), user_text="Say 1.", prompt_ids=None, sampling={"max_tokens": 5})
    log(opened, 2, user_text=None)
    log(opened, 3, base_model="another")
    supporting = next(f"s{n}" for n in range(50) if is_support(f"s{n}", 0.25))
    querying = next(f"s{n}" for n in range(50) if not is_support(f"s{n}", 0.25))
    log(opened, 4, session=supporting)
    one = log(opened, 5, session=querying)
    for n in (0, 1, 2, 3):
        with opened.transaction() as db:
            db.exec_driver_sql(f"UPDATE turns SET session = '{querying}' WHERE flow_id = 'f{n}'")
    assert chosen(opened, support_share=0.25, batch_size=4) == [one]
    assert states(opened) == {
        "f0": ("skipped", "training: not class A"),
        "f1": ("skipped", "training: no tokens"),
        "f2": ("skipped", "training: what was asked is not known"),
        "f3": ("scored", None),  # of another model: nothing is known against it
        "f4": ("skipped", "training: support session"),
        "f5": ("scored", None),
    }


def test_tool_loops_only_where_they_are_asked_for(opened: Store) -> None:
    called = log(opened, 0, tool_calls=[{"name": "exec", "arguments": "{}", "id": "1"}])
    inside = log(opened, 1, kind="tool")
    log(opened, 2, kind="subagent")
    plain = log(opened, 3)
    assert chosen(opened, batch_size=4) == [plain]
    assert chosen(opened) is None
    assert chosen(opened, batch_size=12, grpo_tools=True) == [plain, inside, called]


def test_prompts_that_neither_always_nor_never_succeed_come_first(opened: Store) -> None:
    easy, hard, open_ = "Spell the name of the river", "Prove this conjecture about primes", "Sort my photos by colour"
    turns = [log(opened, n, user_text=text) for n, text in enumerate((open_, easy, hard, open_, easy))]
    clusters, tracker = Clusters(), Tracker()
    for text, rewards in ((easy, [1.0] * 30), (hard, [0.0] * 60), (open_, [0.0, 1.0] * 15)):
        key, clusters = clusters.place(text)
        for reward in rewards:
            tracker = tracker.seen(key_of(key, "openclaw/main"), reward)
    assert tracker.value(key_of("0", "openclaw/main")) > 0.8
    assert tracker.value(key_of("1", "openclaw/main")) < 0.2
    journal.carry(opened, {"tracker": tracker.to_json(), "clusters": clusters.to_json()})
    batch, _, _ = source(opened, batch_size=12).choose(journal.begin(opened, "m"))
    assert batch is not None
    assert [p.turn for p in batch][:2] == [turns[3], turns[0]]
    assert [p.promising for p in batch] == [True, True, False]


def test_a_step_takes_prompts_of_several_sessions(opened: Store) -> None:
    for n in range(6):
        log(opened, n, session="one")
    assert chosen(opened, min_sessions=2) is None
    other = log(opened, 9, session="other")
    assert chosen(opened, min_sessions=2) == [other, 6]


def test_what_tools_returned_last_stands_before_a_reply_in_a_tool_loop(opened: Store) -> None:
    asked = user("Delete the old logs.")
    listed = [asked, assistant("", [("1", "exec", "{}")]), result("1", "three files")]
    more = [*listed, assistant("", [("2", "exec", "{}"), ("3", "read", "{}")]), result("2", "gone"), result("3", "empty")]
    opened.ingest([exchange(n, messages, "Done.") for n, messages in enumerate(([asked], listed, more))])
    found = [results_before(opened, row["id"]) for row in opened.turns()]
    assert found == [(), (("exec", "three files"),), (("exec", "gone"), ("read", "empty"))]


def test_a_step_that_can_hold_no_group_is_refused(opened: Store) -> None:
    with pytest.raises(ConfigError, match=r"rl.group_size is 8, more than rl.batch_size \(4\)"):
        source(opened, batch_size=4, group_size=8)
