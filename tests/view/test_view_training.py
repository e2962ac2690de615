"""What training has done, on the page, in the report and in the terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from e2e_tools import environment
from sqlalchemy import insert

from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import route_events, steps, versions
from metaclaw_core.view.charts import Series, line_chart
from metaclaw_core.view.site import report
from metaclaw_core.view.training import charts, training

AT = 1_795_600_000.0
METRICS = {"reward_mean": 0.5, "kl": 0.002, "kl_v2": 0.003, "ratio_mean": 1.01, "turns": 32, "skipped": 3}


def with_steps(store: Store, n: int = 3) -> Store:
    with store.transaction() as db:
        for number in range(1, n + 1):
            made = {"base_model": "tiny", "created_at": AT, "status": "working", "sampler_path": f"tinker://r/sampler_weights/{number}"}
            db.execute(insert(versions).values(made))
            step = {"state": "routed", "base_version": number, "algorithm": "single", "started_at": AT, "updated_at": AT}
            db.execute(insert(steps).values(**step, version=number, metrics={**METRICS, "reward_mean": number / 10}))
        db.execute(insert(steps).values(state="abandoned", base_version=n, algorithm="single", started_at=AT, updated_at=AT, error="<b>no</b>"))
        db.execute(insert(route_events).values(at=AT, working=n, stable=1, pinned=False, reason="step 3 <script>"))
    return store


def svg(markup: str) -> ET.Element:
    return ET.fromstring(re.search(r"<svg.*</svg>", markup, re.DOTALL)[0])


def test_a_chart_has_a_point_for_each_figure_and_a_gap_where_one_is_unknown():
    drawn = svg(line_chart("x", [Series("a", [(1, 0.0), (2, 10.0), (3, None), (4, 5.0), (5, 5.0), (6, None), (7, 0.0)])]))
    lines = [line.get("points") for line in drawn.iter("polyline")]
    assert lines == ["52.0,164.0 118.3,12.0", "251.0,88.0 317.3,88.0"]
    assert [(dot.get("cx"), dot.get("cy")) for dot in drawn.iter("circle")] == [("450.0", "164.0")]
    assert [text.text for text in drawn.iter("text")] == ["0", "5", "10", "1", "7"]


def test_a_chart_of_one_figure_of_equal_figures_and_of_none():
    assert svg(line_chart("x", [Series("a", [(1, 3.0)])])).find("circle").get("cx") == "251.0"
    assert svg(line_chart("x", [Series("a", [(1, 0.0), (2, 0.0)])])).find("polyline") is not None
    for points in ([], [(1, None)], [(1, float("nan"))]):
        assert "No figures yet." in line_chart("x", [Series("a", points)])


def test_titles_and_marks_are_text():
    drawn = line_chart("<i>", [Series("a<b", [(1, 1.0)]), Series("c", [(1, 2.0)])], marks=[(1, "<script>")])
    assert "<script>" not in drawn
    assert "<i>" not in drawn
    assert "a&lt;b" in drawn


def test_the_curves_come_from_the_journal(tmp_path: Path):
    store = with_steps(open_store(tmp_path / "store.db"))
    found = training(store)
    reward = svg(charts(found.steps)[0])
    assert len(reward.find("polyline").get("points").split()) == 3  # the abandoned step has no figure and is no zero
    assert [mark.find("title").text for mark in reward.iter("line") if mark.get("class") == "mark"] == ["version 1", "version 2", "version 3"]
    store.close()


def test_the_report_needs_no_other_file_and_its_text_is_data(tmp_path: Path):
    store = with_steps(open_store(tmp_path / "store.db"))
    page = report(store, AT)
    assert "<svg" in page
    assert "step 3 &lt;script&gt;" in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!#)|url\(|@import|<script""", page)
    store.close()


def test_an_empty_store_says_that_nothing_was_trained(tmp_path: Path):
    store = open_store(tmp_path / "store.db")
    page = report(store, AT)
    assert "No step has been made yet." in page
    assert "no model of your own has a route" in page
    store.close()


def test_status_and_report_on_the_command_line(tmp_path: Path):
    home = tmp_path / "metaclaw"
    home.mkdir()
    with_steps(open_store(home / "store.db")).close()

    def metaclaw(*words: str) -> subprocess.CompletedProcess[str]:
        line = [str(Path(sys.executable).with_name("metaclaw")), *words]
        return subprocess.run(line, env=environment(home), capture_output=True, text=True, timeout=60)

    shown = metaclaw("train", "status").stdout
    assert "working version 3, stable version 1 (step 3 <script>)" in shown
    assert re.search(r"3\s+routed\s+32\s+0.3\s+0.002\s+1.01\s+3", shown)
    assert re.search(r"4\s+abandoned\s+–\s+–\s+–\s+–\s+–\s+<b>no</b>", shown)
    assert json.loads(metaclaw("train", "status", "--json").stdout)["routes"][0]["working"] == 3
    written = Path(metaclaw("train", "report").stdout.strip())
    assert written.parent == home / "reports"
    assert written.stat().st_mode & 0o777 == 0o600
    assert metaclaw("train", "report", str(tmp_path / "r.html")).stdout.strip() == str(tmp_path / "r.html")
    bad = metaclaw("train", "report", str(tmp_path / "none/r.html"))
    assert bad.returncode == 1
    assert "can't be written (No such file or directory)" in bad.stderr
