"""`skills.placement: turn` with the real OpenClaw: skills for a new subject stand beside the message that brought it up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest
from e2e_tools import environment
from openclaw_tools import MARK, Pair, RecordingLLM, Stage, common_prefix

from metaclaw_core.wire import find_route, splice
from metaclaw_core.wire.beside import without_beside

pytestmark = [pytest.mark.openclaw, pytest.mark.slow]

REBASE = "Help me resolve a git rebase conflict in two files."
SLOW = "Why is this SQL query slow?"
READ = 'TOOL:read {"path":"notes.txt"} END'


class Beside(Stage):
    def make_home(self) -> None:
        super().make_home()
        (self.home / "config.yaml").write_text("skills: {placement: turn}\n")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with RecordingLLM() as llm, Beside(tmp_path_factory.mktemp("openclaw"), llm) as stage:
        yield stage


def taken_out(pair: Pair) -> list[str]:
    """What was put in: the block first. Fails unless all else is what the client sent."""
    found = find_route(pair.got.method, pair.got.path)
    assert found is not None
    removed = splice.remove(pair.got.body, found[0].system_slot(pair.got.body))
    assert removed is not None
    body, texts = without_beside(found[0], removed[0], pair.got.path)
    assert body == pair.sent.body
    return [removed[1], *texts]


@pytest.mark.parametrize("model", ["example/fake-1", "anthropic/claude-opus-4-6", "google/gemini-2.5-pro"])
def test_a_new_subject_costs_none_of_the_cached_history(stage: Stage, model: str) -> None:
    start, session = len(stage.llm.received), model.partition("/")[0]
    for text in (REBASE, f"{REBASE} Once more. {READ}", SLOW, f"{SLOW} Once more. {READ}", "Thank you."):
        stage.post(text, model, session)
    pairs = [pair for pair in stage.pairs(start) if pair.has_tools]
    assert len(pairs) == 7
    added = [taken_out(pair) for pair in pairs]
    assert [len(texts) for texts in added] == [1, 1, 1, 2, 2, 2, 2]
    block, beside = added[-1]
    assert "### git-rebase-conflicts" in block
    assert "### sql-slow-query" in beside
    assert {text for texts in added for text in texts} == {block, beside}  # the same bytes each time
    for older, newer in pairwise(pairs):
        # As much of the request before is at the head of this one as in what the client sent, and what we had put in.
        assert common_prefix(older.got.body, newer.got.body) >= common_prefix(older.sent.body, newer.sent.body)


def test_openclaws_own_state_never_holds_it(stage: Stage) -> None:
    held = [path for path in stage.state.rglob("*") if path.is_file() and not path.is_symlink() and MARK in path.read_bytes()]
    assert held == []


def test_the_store_has_the_clients_words_and_a_capture_adds_nothing(stage: Stage) -> None:
    def metaclaw(*words: str) -> str:
        line = [sys.executable, "-m", "metaclaw_core.cli.main", *words]
        return subprocess.run(line, env=environment(stage.home), capture_output=True, text=True, timeout=90, check=True).stdout

    rows = [json.loads(line) for line in metaclaw("turns", "--json").splitlines()]
    assert SLOW in {row["user_text"] for row in rows}
    assert not [row for row in rows if "metaclaw-skills" in (row["user_text"] or "")]
    stage.stop_proxy()
    said = json.loads(metaclaw("import", "--json", str(stage.flows)))
    assert said["new"] == 0
