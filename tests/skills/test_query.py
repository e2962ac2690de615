from __future__ import annotations

import numpy as np

from metaclaw_core.skills import Index, Query
from metaclaw_core.skills.query import MAX_TURNS, terms, turns


def test_a_repeated_word_counts_logarithmically_and_at_most_double() -> None:
    found = terms("index index query")
    assert found["query"] == 1.0
    assert round(found["index"], 3) == 1.693  # 1 + ln 2
    assert found["index query"] == 1.0
    assert terms("index " * 60)["index"] == 2.0


def test_a_pasted_log_that_repeats_one_word_does_not_outshout_the_request(index: Index) -> None:
    request = "write the quarterly report for the board:\n"
    assert index.search(request)[0].name == "quarterly-report"
    assert index.search(request + "docker " * 60)[0].name == "quarterly-report"


def test_one_text_and_a_conversation_make_the_same_kind_of_query() -> None:
    assert Query.of("hi").texts == ("hi",)
    assert Query.of(["a", "b"]).texts == ("a", "b")
    assert Query.of([str(n) for n in range(20)]).texts == tuple(str(n) for n in range(20 - MAX_TURNS, 20))


def test_an_older_turn_speaks_as_far_as_the_newer_ones_said_little() -> None:
    best = {"yes": 0.0, "maybe the index": 1.0, "a whole request": 9.0}

    def score(text: str) -> np.ndarray:
        return np.array([best[text]], np.float32)

    def spoken(*texts: str) -> list[tuple[str, float]]:
        return turns(Query.of(texts), 1.0, score)

    assert spoken("a whole request", "yes") == [("yes", 1.0), ("a whole request", 1.0)]
    assert spoken("yes", "a whole request") == [("a whole request", 1.0)]
    assert spoken("a whole request", "maybe the index") == [("maybe the index", 1.0), ("a whole request", 0.75)]


def test_an_acknowledgement_finds_what_the_request_before_it_found(index: Index) -> None:
    request = "the pod is in CrashLoopBackOff on Kubernetes, please diagnose it"
    assert index.search("yes, do it") == []
    assert index.search([request, "yes, do it"])[0].name == "kubernetes-crashloop"
    assert index.search([request, "ok", "thanks", "go ahead"])[0].name == "kubernetes-crashloop"


def test_a_new_subject_leaves_the_old_one_behind(index: Index) -> None:
    old = "the pod is in CrashLoopBackOff on Kubernetes, please diagnose it"
    new = "now write a cover letter for my job application at that company"
    hits = index.search([old, new])
    assert hits[0].name == "cover-letter"
    assert hits[0].score > 2 * next((h.score for h in hits if h.name == "kubernetes-crashloop"), 0.0)


def test_without_any_words_nothing_is_asked(index: Index) -> None:
    assert index.search([]) == []
    assert index.search("") == []
    assert index.search(["", "…", "🙂"]) == []
