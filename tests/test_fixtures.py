"""The recordings in tests/captures: they open, they are whole, and they hold nobody else's prose."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mitmproxy import http, io

ROOT = Path(__file__).resolve().parents[1]
CAPTURES = ROOT / "tests" / "captures"

# file: host, path, status of each flow (0: the connection was cut in the answer)
FLOWS = {
    "anthropic-messages-native": ("api.anthropic.com", "/v1/messages", [200] * 7),
    "compaction-openai-completions": ("api.example-llm.com", "/v1/chat/completions", [200] * 4),
    "env-proxy-loopback-http": (None, "/v1/chat/completions", [200] * 3),
    "errors-openai-completions": (
        "api.example-llm.com",
        "/v1/chat/completions",
        [429, 200, 500, 200, 0, 200, 200, 200, 400],
    ),
    "google-generative-ai-native": (
        "generativelanguage.googleapis.com",
        "/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse",
        [200] * 7,
    ),
    "heartbeat-openai-completions": ("api.example-llm.com", "/v1/chat/completions", [200]),
    "ollama": ("127.0.0.1", "/api/chat", [200] * 3),
    "openai-completions": ("api.example-llm.com", "/v1/chat/completions", [200] * 7),
    "openai-responses-native-codemode": ("api.openai.com", "/v1/responses", [200] * 4),
    "subagent-openai-completions": ("api.example-llm.com", "/v1/chat/completions", [200] * 4),
}
WORD = re.compile(r"[A-Za-z]+")
Flows = Callable[[str], list[http.HTTPFlow]]


def body(flow: http.HTTPFlow) -> Any:
    return json.loads(flow.request.raw_content or b"")


def answer(flow: http.HTTPFlow) -> bytes:
    return (flow.response.raw_content if flow.response else None) or b""


def pairs(one: Any, other: Any) -> Iterator[tuple[str, str]]:
    """The strings at the same place of both, JSON inside strings opened; fails where the structure differs."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            yield from pairs(value, other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for value, twin in zip(one, other, strict=True):
            yield from pairs(value, twin)
    elif isinstance(one, str):
        assert len(one) == len(other)
        if one[:1] in ("{", "["):
            try:
                inner, twin = json.loads(one), json.loads(other)
            except ValueError:
                yield one, other
            else:
                yield from pairs(inner, twin)
        else:
            yield one, other
    else:
        assert one == other


def five_grams(text: str) -> set[str]:
    words = WORD.findall(text.lower())
    return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_fixtures", ROOT / "scripts" / "make_fixtures.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_fixture_for_each_entry_of_the_table_and_no_other() -> None:
    assert sorted(path.stem for path in CAPTURES.glob("*.mitm")) == list(FLOWS)


@pytest.mark.parametrize("name", FLOWS)
def test_a_fixture_opens_with_the_flows_of_the_table(capture: Flows, name: str) -> None:
    host, path, statuses = FLOWS[name]
    flows = capture(name)
    assert {flow.request.path for flow in flows} == {path}
    assert [0 if flow.error or not flow.response else flow.response.status_code for flow in flows] == statuses
    if host:
        assert {flow.request.host for flow in flows} == {host}
    else:
        assert [flow.request.host for flow in flows] == ["127.0.0.1", "api.example-llm.com", "api.example-llm.com"]


@pytest.mark.parametrize("name", FLOWS)
def test_the_content_length_of_each_request_is_right(capture: Flows, name: str) -> None:
    for flow in capture(name):
        assert int(flow.request.headers["content-length"]) == len(flow.request.raw_content or b"")


def test_the_fake_keys_are_still_in_the_headers(capture: Flows) -> None:
    assert capture("openai-completions")[0].request.headers["authorization"] == "Bearer sk-fake-example-0000"
    assert capture("anthropic-messages-native")[0].request.headers["x-api-key"] == "sk-ant-api03-fake-0000"
    assert capture("google-generative-ai-native")[0].request.headers["x-goog-api-key"] == "AIzaFake0000"


def test_what_recognises_a_message_is_still_there(capture: Flows) -> None:
    first = body(capture("openai-completions")[0])["messages"]
    system, human, carrier = first[0]["content"], first[1]["content"], first[2]["content"][0]["text"]
    assert system.startswith("<!-- openclaw:attempt:STABLE -->\n")
    assert system.endswith("\n<!-- /openclaw:attempt:DYNAMIC -->")
    assert "<available_skills>\n  <skill>\n    <name>" in system
    assert human.startswith("[Mon 2026-11-23 20:38 UTC] Hello, please introduce yourself in one line.\n\nRuntime: agent=main | ")
    assert carrier.startswith("<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n")
    assert carrier.endswith("\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>")
    retry = body(capture("errors-openai-completions")[1])["messages"][1]["content"]
    assert "Trigger ERR:429 please\n\nContinue the current task from the existing transcript, " in retry
    announced = body(capture("subagent-openai-completions")[3])["messages"][-2]["content"]
    assert announced.startswith("[Mon 2026-11-23 20:48 UTC] A background task completed. Use this result ")
    compaction = body(capture("compaction-openai-completions")[2])["messages"]
    assert compaction[0]["content"].startswith("You are a context summarization assistant. ")
    assert compaction[1]["content"][0]["text"].startswith("<conversation>\n[User]: two LONG:20000\n</conversation>")


def test_a_system_prompt_is_the_same_bytes_through_a_session(capture: Flows) -> None:
    prompts = [body(flow)["messages"][0]["content"] for flow in capture("openai-completions")]
    assert len(prompts[0]) == 41866
    assert len(set(prompts)) == 1


def test_the_har_holds_the_same_exchanges(capture: Flows) -> None:
    with (CAPTURES / "openai-completions.har").open("rb") as file:
        from_har = [flow for flow in io.FlowReader(file).stream() if isinstance(flow, http.HTTPFlow)]
    flows = capture("openai-completions")
    assert [flow.request.raw_content for flow in from_har] == [flow.request.raw_content for flow in flows]
    assert [answer(flow) for flow in from_har] == [answer(flow) for flow in flows]


@pytest.mark.shared
@pytest.mark.parametrize("name", FLOWS)
def test_a_fixture_differs_from_its_recording_in_prose_only(capture: Flows, maker: ModuleType, shared: Path, name: str) -> None:
    recorded = maker.read(shared / "captures" / f"{name}.mitm")
    for flow, original in zip(capture(name), recorded, strict=True):
        for _ in pairs(body(original), body(flow)):
            pass
        flow.request.raw_content = original.request.raw_content
        assert flow.get_state() == original.get_state()


@pytest.mark.shared
def test_no_five_words_of_the_original_prose_remain(capture: Flows, maker: ModuleType, shared: Path) -> None:
    prose: set[str] = set()
    remaining: set[str] = set()
    unchanged: set[str] = set()
    for name in FLOWS:
        for flow, original in zip(capture(name), maker.read(shared / "captures" / f"{name}.mitm"), strict=True):
            remaining |= five_grams(answer(flow).decode())
            for before, after in pairs(body(original), body(flow)):
                remaining |= five_grams(after)
                if before == after:
                    unchanged.add(after)
                    continue
                kept = "".join(match[0] for match in maker.KEPT.finditer(before) if " " in match[0])
                assert len(before) < 10_000 or len(kept) < 0.02 * len(before), "the kept phrases swallow the text"
                for start, stop in maker.prose(before):
                    prose |= five_grams(before[start:stop])
    assert len(prose) > 7_000
    assert prose & remaining == set()
    # What was left alone and is more than a name is either the human's, the scripted model's or a Runtime line.
    ours = re.compile(r"\[Mon 2026-11-23 \d\d:\d\d UTC\] |ok: |Tool finished\.|lorem ipsum|Runtime: agent=|Count to three")
    assert [text[:80] for text in unchanged if len(WORD.findall(text)) >= 5 and " " in text and not ours.match(text)] == []


@pytest.mark.shared
def test_the_script_writes_these_very_files(maker: ModuleType, shared: Path, tmp_path: Path) -> None:
    maker.main(shared / "captures", tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in CAPTURES.iterdir()
    }
