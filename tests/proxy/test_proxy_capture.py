import stat

import pytest
from mitmproxy import flow as mflow
from mitmproxy import http
from mitmproxy.test import tflow

from metaclaw_core.proxy import capture
from metaclaw_core.wire import find_route

KEY = b"k" * 32


def chat_flow(**headers: str) -> http.HTTPFlow:
    flow = tflow.tflow(resp=True)
    flow.request = http.Request.make("POST", "http://LLM.test:8000/v1/chat/completions", b'{"messages":[]}', headers)
    flow.request.timestamp_start, flow.response.timestamp_end = 100.0, 100.25
    return flow


def exchange(flow: http.HTTPFlow, **more):
    found = find_route("POST", flow.request.path)
    assert found is not None
    return capture.exchange(flow, found[1], KEY, live=True, **more)


def test_a_credential_at_an_origin_is_a_principal_and_can_not_be_read_back():
    def of(url="http://a.test/v1/chat/completions", **headers):
        return capture.principal(http.Request.make("POST", url, b"", headers), KEY)

    one = of(Authorization="Bearer sk-1")
    assert len(one) == 32
    assert of(authorization="Bearer sk-1") == one
    others = {
        of(),
        of(authorization="Bearer sk-2"),
        of("http://b.test/v1/chat/completions", authorization="Bearer sk-1"),
        of("https://a.test/v1/chat/completions", authorization="Bearer sk-1"),
        of("http://a.test:81/v1/chat/completions", authorization="Bearer sk-1"),
        of("http://a.test/v1beta/models/m:generateContent?key=sk-1"),
        of(**{"x-api-key": "sk-3"}),
        of(**{"x-goog-api-key": "sk-4"}),
        capture.principal(http.Request.make("POST", "http://a.test/v1/chat/completions", b"", {"authorization": "Bearer sk-1"}), b"other"),
    }
    assert one not in others
    assert len(others) == 9
    assert of("http://A.test/v1/chat/completions", Authorization="Bearer sk-1") == one


def test_the_key_is_made_once_and_private(tmp_path):
    key = capture.principal_key(tmp_path / "home")
    assert len(key) == 32
    assert capture.principal_key(tmp_path / "home") == key
    (file,) = (tmp_path / "home").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_no_header_but_what_is_named_reaches_the_record():
    flow = chat_flow(authorization="Bearer sk-canary-1", cookie="canary-2", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    flow.response.headers["set-cookie"] = "canary-3"
    record = exchange(flow)
    assert "canary" not in repr(record)
    assert record.hints.trace_id == "a" * 32
    assert (record.host, record.port, record.path) == ("llm.test", 8000, "/v1/chat/completions")
    assert record.duration_ms == pytest.approx(250.0)
    assert record.complete
    assert record.response_type == ""


def test_a_flow_without_an_answer_and_one_that_broke_are_not_complete():
    flow = chat_flow()
    flow.response = None
    record = exchange(flow)
    assert (record.status_code, record.complete, record.duration_ms, record.response_body) == (None, False, None, b"")
    flow = chat_flow()
    flow.error = mflow.Error("server closed connection")
    record = exchange(flow)
    assert (record.complete, record.error) == (False, "server closed connection")
    flow = chat_flow()
    flow.response.status_code = 0  # how a HAR says that nothing came
    assert exchange(flow).status_code is None


def test_given_bodies_count_and_a_secret_in_the_path_does_not():
    flow = chat_flow()
    flow.request.path = "/v1/chat/completions?key=sk-1&x=1"
    record = exchange(flow, request_body=b"own", response_body=b"teed")
    assert (record.request_body, record.response_body) == (b"own", b"teed")
    assert record.path == "/v1/chat/completions?key=[redacted]&x=1"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"id": "resp_1", "object": "response"}', "resp_1"),
        (b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_2"}}\n\n', "resp_2"),
        (b'{"id":"msg_1"}', None),
        (b"\x1f\x8b compressed", None),
        (b"x" * 5000 + b'"id":"resp_3"', None),
        (b"", None),
    ],
)
def test_the_id_of_a_responses_answer(body, found):
    assert capture.response_id(body) == found


def test_a_media_type_has_no_parameters_and_no_case():
    assert capture.media_type(http.Response.make(200, b"", {"content-type": "Text/Event-Stream; charset=utf-8"})) == "text/event-stream"
    assert capture.media_type(http.Response.make(200, b"", {})) == ""
    assert capture.media_type(None) == ""
