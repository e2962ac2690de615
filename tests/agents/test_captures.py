"""The ten recordings of the real OpenClaw, against a table that was written by reading them."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
from mitmproxy import http, io

from metaclaw_core.agents import identify
from metaclaw_core.agents.base import Identity, Prior, hints_from_headers
from metaclaw_core.wire import find_route

HERE = Path(__file__).parent


def _table() -> dict[str, list[tuple[object, ...]]]:
    spec = importlib.util.spec_from_file_location("expected_captures", HERE / "expected_captures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXPECTED  # type: ignore[no-any-return]


EXPECTED = _table()


def identities(file: Path) -> list[Identity]:
    """As the store would: what a request continues is looked up by the id of the response it names."""
    found: list[Identity] = []
    priors: dict[str, Prior] = {}
    with file.open("rb") as stream:
        for flow in io.FlowReader(stream).stream():
            assert isinstance(flow, http.HTTPFlow)
            route = find_route(flow.request.method, flow.request.path)
            assert route is not None
            request = route[0].parse_request(flow.request.content or b"", flow.request.path)
            identity = identify(
                request, hints_from_headers(flow.request.headers), priors.get(request.previous_response_id or "")
            )
            answer = (flow.response.content if flow.response else None) or b""
            if named := re.search(rb'"id": ?"(resp_[0-9a-f]+)"', answer):
                priors[named[1].decode()] = Prior(
                    identity.session_id, identity.session_key, identity.kind, identity.user_text, None
                )
            found.append(identity)
    return found


def rows(found: list[Identity]) -> list[tuple[object, ...]]:
    numbers: dict[object, int] = {}
    return [
        (
            one.session_id,
            one.session_key,
            one.kind.value,
            one.user_text,
            one.retry,
            numbers.setdefault((one.session_id, one.trace), len(numbers) + 1),
        )
        for one in found
    ]


@pytest.mark.shared
@pytest.mark.parametrize("name", EXPECTED)
def test_every_request_of_a_recording_is_what_a_reader_says_it_is(name: str, shared: Path) -> None:
    assert rows(identities(shared / "captures" / f"{name}.mitm")) == [tuple(row) for row in EXPECTED[name]]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_recordings_without_prose_say_the_same(name: str) -> None:
    found = identities(HERE.parent / "captures" / f"{name}.mitm")
    # Filler has replaced the sentence that closes a subagent's task, so that it can't be cut off there.
    told = [replace(one, user_text=(one.user_text or "").partition("\n")[0]) if one.kind == "subagent" else one for one in found]
    assert rows(told) == [tuple(row) for row in EXPECTED[name]]


def test_every_recording_is_in_the_table() -> None:
    assert {file.stem for file in (HERE.parent / "captures").glob("*.mitm")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_no_recording_has_an_envelope_that_we_do_not_know(name: str) -> None:
    found = identities(HERE.parent / "captures" / f"{name}.mitm")
    assert [one.unknown_preambles for one in found] == [0] * len(EXPECTED[name])
    assert {one.agent for one in found} == {"openclaw"}


def test_the_human_texts_are_all_turns_seen_so_far() -> None:
    last = identities(HERE.parent / "captures" / "openai-completions.mitm")[-1]
    assert last.human_texts == (
        "Hello, please introduce yourself in one line.",
        'Read my notes. TOOL:read {"path":"notes.txt"} END',
        'Write a file. TOOL:write {"path":"out.txt","content":"hi\\n"} END',
        'Run echo. TOOL:exec {"command":"echo hello-from-exec"} END',
    )


def test_the_summary_of_a_compaction_is_no_human_text_and_marks_the_history() -> None:
    before, long, call, after = identities(HERE.parent / "captures" / "compaction-openai-completions.mitm")
    assert after.human_texts == ("three LONG:20000", "four LONG:20000", "five LONG:20000", "six", "after compaction")
    assert (before.history_mark, long.history_mark, call.history_mark) == (None, None, None)
    assert after.history_mark is not None
