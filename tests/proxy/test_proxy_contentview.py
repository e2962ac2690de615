import json

import pytest
from mitmproxy import contentviews, http
from mitmproxy.test import tflow

from metaclaw_core.proxy.contentview import META, LLMView

VIEW = LLMView()


def shown(body: object, path: str = "/v1/chat/completions", notes: dict[str, object] | None = None) -> str:
    flow = tflow.tflow()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    flow.request = http.Request.make("POST", f"http://llm.test{path}", data)
    if notes:
        flow.metadata[META] = notes
    metadata = contentviews.Metadata(flow=flow, http_message=flow.request)
    assert VIEW.render_priority(data, metadata) == 2
    return VIEW.prettify(data, metadata)


def test_what_we_made_of_a_request_comes_first_and_its_messages_follow():
    body = {
        "model": "m",
        "stream": True,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "List the files."},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "ls", "arguments": '{"p":"."}'}}]},
            {"role": "tool", "tool_call_id": "c", "content": "a b"},
        ],
        "tools": [{"type": "function", "function": {"name": "ls"}}],
    }
    notes = {"agent": "generic", "kind": "tool", "session": "s1", "skills": ["one", "two"], "block": "The text.", "passed": ""}
    assert shown(body, notes=notes).splitlines() == [
        "openai_chat  model m  stream",
        "agent: generic",
        "session: s1",
        "kind: tool",
        "skills: one, two",
        "",
        "--- text added by metaclaw ---",
        "The text.",
        "--- end ---",
        "",
        "tools: ls",
        "",
        "[system]",
        "Be brief.",
        "",
        "[user]",
        "List the files.",
        "",
        "[assistant]",
        '-> ls({"p":"."})',
        "",
        "[tool]",
        "<- a b",
    ]


def test_long_texts_are_shortened_and_lone_surrogates_can_be_printed():
    text = shown({"model": "m\ud800", "messages": [{"role": "user", "content": "a" * 5000 + "\ud800"}]}, notes={"passed": "nothing to add"})
    assert "unchanged: nothing to add" in text
    assert " … 4401 characters … " in text
    text.encode("utf-8")


def test_what_is_no_llm_request_is_left_to_other_views():
    flow = tflow.tflow(resp=True)
    for message, data in ((flow.request, b"x"), (flow.response, b"x"), (None, b"x")):
        assert VIEW.render_priority(data, contentviews.Metadata(flow=flow, http_message=message)) == -1
    with pytest.raises(ValueError, match="not an LLM request"):
        VIEW.prettify(b"x", contentviews.Metadata(flow=flow, http_message=flow.request))
    with pytest.raises(ValueError, match="JSON"):
        shown(b"not JSON")


def test_the_view_can_be_registered_twice():
    contentviews.add(VIEW)
    contentviews.add(LLMView())
    assert "metaclaw" in contentviews.registry
