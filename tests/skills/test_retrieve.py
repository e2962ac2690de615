from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from metaclaw_core.errors import ConfigError
from metaclaw_core.skills import Index, Skill, build_index
from metaclaw_core.skills.retrieve import GROUP, Retrieval, create_retriever

ROOT = Path(__file__).resolve().parents[2]


async def test_the_default_mode_answers_like_the_index(index: Index) -> None:
    retriever = create_retriever("tfidf")
    texts = ["the pod is in CrashLoopBackOff on Kubernetes", "yes, diagnose it"]
    assert await retriever.retrieve(texts, index, 6) == Retrieval(tuple(index.search(texts, 6)), "tfidf")
    assert await retriever.retrieve(["thanks!"], index, 6) == Retrieval((), "tfidf")
    await retriever.aclose()


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"retrieval_mode is 'magic'; there are embedding, template, tfidf"):
        create_retriever("magic")


def test_a_strangers_retriever_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nnothing = stranger:Nothing\n")
    (tmp_path / "stranger.py").write_text(
        "class Nothing:\n    name = 'nothing'\n    def __init__(self, options):\n        self.options = options\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert create_retriever("nothing").name == "nothing"


@pytest.mark.shared
@pytest.mark.slow
def test_the_labelled_pool_meets_the_targets_for_quality(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shared / "retrieval" / "judge.py").is_file():
        pytest.skip("the labelled skills are not in ../shared/retrieval")
    spec = importlib.util.spec_from_file_location("bench_retrieval", ROOT / "scripts" / "bench_retrieval.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_retrieval", bench)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "DATA", shared / "retrieval")
    with gzip.open(shared / "retrieval" / "skills.core.jsonl.gz", "rt", encoding="utf-8") as file:
        pool = [Skill(e["id"], e["description"], e["body"]) for e in map(json.loads, file)]
    figures = list(bench.quality(pool, build_index(pool)))
    assert [f"{figure.name}: {figure.value:.3f}" for figure in figures if not figure.ok] == []
    assert len(figures) == 11
