"""The third use: captured flows become turns, by mitmdump and by ``metaclaw import``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_tools import ROOT, SCRIPT, environment

CAPTURES = ROOT / "tests" / "captures"
FLOWS = {
    "anthropic-messages-native.mitm": 7,
    "compaction-openai-completions.mitm": 4,
    "env-proxy-loopback-http.mitm": 3,
    "errors-openai-completions.mitm": 9,
    "google-generative-ai-native.mitm": 7,
    "heartbeat-openai-completions.mitm": 1,
    "ollama.mitm": 3,
    "openai-completions.mitm": 7,
    "openai-responses-native-codemode.mitm": 4,
    "subagent-openai-completions.mitm": 4,
}
FAKE_KEYS = (b"sk-fake-", b"sk-ant-api03-fake", b"AIzaFake", b"ollama-fake")


def replay(home: Path, capture: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("mitmdump")
    line = [str(tool), "-nr", str(capture), "-s", str(SCRIPT), *arguments]
    return subprocess.run(line, env=environment(home), capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_mitmdump_records_a_capture_offline_and_a_second_run_adds_nothing(tmp_path, metaclaw):
    home = tmp_path / "metaclaw"
    for _ in range(2):
        result = replay(home, CAPTURES / "openai-completions.mitm")
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in metaclaw("turns", "--json").stdout.splitlines()]
        assert [row["kind"] for row in rows] == ["main", "main", "tool", "main", "tool", "main", "tool"]
        assert {row["state"] for row in rows} == {"captured"}
    assert not (home / "logs").exists()  # no child was started


@pytest.mark.slow
def test_import_takes_every_exchange_once_however_often_and_in_whatever_form_it_comes(tmp_path, metaclaw):
    files = [str(CAPTURES / name) for name in FLOWS]
    first = [json.loads(line) for line in metaclaw("import", "--json", *files).stdout.splitlines()]
    assert {Path(r["file"]).name: r["new"] for r in first} == FLOWS
    second = [json.loads(line) for line in metaclaw("import", "--json", *files).stdout.splitlines()]
    assert {Path(r["file"]).name: (r["new"], r["known"]) for r in second} == {name: (0, n) for name, n in FLOWS.items()}
    har = json.loads(metaclaw("import", "--json", str(CAPTURES / "openai-completions.har")).stdout)
    assert (har["new"], har["known"]) == (0, 7)
    assert "0 problems" in metaclaw("store", "verify").stdout


@pytest.mark.slow
def test_no_key_and_no_header_value_reaches_the_disk(tmp_path, metaclaw):
    metaclaw("import", *[str(CAPTURES / name) for name in FLOWS])
    files = [path for path in (tmp_path / "metaclaw").rglob("*") if path.is_file()]
    assert any(path.name == "store.db" for path in files)
    for path in files:
        data = path.read_bytes()
        for needle in (*FAKE_KEYS, b"OpenAI/JS", b"anthropic-beta", b"x-stainless", b"x-goog-api-client"):
            assert needle not in data, (path, needle)
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.slow
def test_a_file_that_is_no_capture_or_breaks_off_is_named_and_the_rest_is_kept(tmp_path, metaclaw):
    whole = (CAPTURES / "openai-completions.mitm").read_bytes()
    cut = tmp_path / "cut.mitm"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    nothing = tmp_path / "picture.png"
    nothing.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    empty = tmp_path / "empty.mitm"
    empty.touch()
    result = metaclaw("import", "--json", str(cut), str(nothing), str(empty), str(tmp_path / "missing"), check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["new"] for row in rows] == [4, 0, 0, 0]
    assert "breaks off after 4 flows" in rows[0]["problem"]
    assert "neither a mitmproxy capture nor a HAR" in rows[1]["problem"]
    assert "holds no flow" in rows[2]["problem"]
    assert "can't be read" in rows[3]["problem"]
    assert len(metaclaw("turns", "--json").stdout.splitlines()) == 4
