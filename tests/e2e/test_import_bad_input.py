"""Everything that can be wrong with captured traffic, in one import: each gets its reason, and nothing else is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import ROOT, metaclaw  # noqa: F401 - a fixture
from mitmproxy import http
from mitmproxy.flow import Error
from mitmproxy.io import FlowReader, FlowWriter

CAPTURE = ROOT / "tests" / "captures" / "openai-completions.mitm"
STREAM = b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"%s"},"finish_reason":null}]}\n\n'
END = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def ask(text: bytes, more: bytes = b"") -> bytes:
    return b'{"model":"m","stream":true,"messages":[{"role":"user","content":"%s"}]%s}' % (text, more)


def cut(flow: http.HTTPFlow) -> None:
    flow.response.raw_content = STREAM % b"Hel"
    flow.error = Error("peer closed connection without sending complete message body")


def lost(flow: http.HTTPFlow) -> None:
    flow.response, flow.error = None, Error("connection refused")


def body(data: bytes) -> Callable[[http.HTTPFlow], None]:
    def change(flow: http.HTTPFlow) -> None:
        flow.request.raw_content = data

    return change


def answer(data: bytes, kind: str = "text/event-stream", encoding: str = "") -> Callable[[http.HTTPFlow], None]:
    def change(flow: http.HTTPFlow) -> None:
        flow.response.raw_content = data
        flow.response.headers["content-type"] = kind
        if encoding:
            flow.response.headers["content-encoding"] = encoding

    return change


# what is wrong → (how, state, reason, the human's text, the answer's)
CASES: dict[str, tuple[Callable[[http.HTTPFlow], None], str, str | None, str | None, str | None]] = {
    "nothing": (lambda flow: None, "captured", None, "hi", "Hello."),
    "request not JSON": (body(b"<xml/>"), "skipped", "request body is not JSON: Expecting value at 0", None, "Hello."),
    "request empty": (body(b""), "skipped", "request body is not JSON: Expecting value at 0", None, "Hello."),
    "request a list": (body(b"[1]"), "skipped", "request body is JSON, but list and not an object", None, "Hello."),
    "request no UTF-8": (body(ask(b"\xff")), "skipped", "request body is not valid UTF-8 (byte 65)", None, "Hello."),
    "request too deep": (body(b"[" * 10**6), "skipped", "request body is nested too deeply", None, "Hello."),
    "request endless number": (
        body(ask(b"hi", b',"seed":' + b"9" * 5000)),
        "skipped",
        "request body is not JSON that can be held: Exceeds the limit (4300 digits) for integer string conversion: "
        "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit",
        None,
        "Hello.",
    ),
    "lone surrogate and NUL": (body(ask(b"\\ud800 \\u0000")), "captured", None, "\ud800 \x00", "Hello."),
    "23-digit integer": (body(ask(b"hi", b',"seed":12345678901234567890123')), "captured", None, "hi", "Hello."),
    "30 MB": (body(ask(b"x" * 30_000_000)), "captured", None, "x" * 30_000_000, "Hello."),
    "answer empty": (answer(b"", "application/json"), "skipped", "empty response", "hi", None),
    "answer not JSON": (answer(b"<html>", "text/html"), "skipped", "response body is not JSON: Expecting value at 0", "hi", None),
    "answer cut": (cut, "skipped", "response cut", "hi", "Hel"),
    "answer no UTF-8": (answer(STREAM % b"\xff\xfe" + END), "captured", None, "hi", "\ufffd\ufffd"),
    "answer lone surrogate": (answer(STREAM % b"\\udfff" + END), "captured", None, "hi", "\udfff"),
    "answer unknown encoding": (
        answer(STREAM % b"x", encoding="rot13"),
        "skipped",
        "response body: content-encoding 'rot13' is not known",
        "hi",
        None,
    ),
    "answer falsely gzip": (answer(STREAM % b"x" + END, encoding="gzip"), "skipped", "response cut", "hi", None),
    "no answer": (lost, "skipped", "no response", "hi", None),
    "nothing again": (lambda flow: None, "captured", None, "hi", "Hello."),
}


def write_flows(path: Path) -> None:
    with CAPTURE.open("rb") as file:
        model = next(iter(FlowReader(file).stream()))
    assert isinstance(model, http.HTTPFlow)
    assert model.response is not None
    with path.open("wb") as out:
        writer = FlowWriter(out)
        for number, (change, *_) in enumerate(CASES.values()):
            flow = model.copy()
            assert flow.response is not None
            flow.request.timestamp_start += number
            flow.request.headers.clear()
            flow.request.raw_content = ask(b"hi")
            flow.response.raw_content = STREAM % b"Hello." + END
            change(flow)
            writer.add(flow)
        other = model.copy()
        other.request.path = "/v1/models"
        writer.add(other)


@pytest.mark.slow
def test_one_import_of_everything_bad_loses_nothing_and_says_why(tmp_path, metaclaw):  # noqa: F811
    flows, torn, picture = tmp_path / "bad.mitm", tmp_path / "torn.mitm", tmp_path / "picture.png"
    write_flows(flows)
    torn.write_bytes(CAPTURE.read_bytes()[:300_000])
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    result = metaclaw("import", "--json", str(torn), str(picture), str(flows), str(CAPTURE), check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["new"], r["known"], r["skipped"], r["passed_over"], r["failed"]) for r in reports] == [
        (5, 0, 0, 0, 0),
        (0, 0, 0, 0, 0),
        (19, 0, 12, 1, 0),
        (2, 5, 0, 0, 0),  # those that the torn file had lost
    ]
    assert re.search(r"torn\.mitm breaks off after 5 flows \(.*\); the flows before that are recorded\.$", reports[0]["problem"])
    assert "neither a mitmproxy capture nor a HAR" in reports[1]["problem"]
    assert reports[2]["problem"] is reports[3]["problem"] is None
    rows = [json.loads(line) for line in metaclaw("turns", "--json").stdout.splitlines()]
    bad = [row for row in rows if row["agent"] != "openclaw"]
    assert len(rows) == len(bad) + 7
    assert [(r["state"], r["reason"], r["user_text"], r["assistant_text"]) for r in bad] == [case[1:] for case in CASES.values()]
    assert next(r for r in bad if r["sampling"] == {"seed": 12345678901234567890123})
    assert "0 problems" in metaclaw("store", "verify").stdout


def test_a_file_that_claims_to_be_endless_is_a_sentence(tmp_path, metaclaw):  # noqa: F811
    liar = tmp_path / "liar.mitm"
    liar.write_bytes(b"999999999999:abc")
    result = metaclaw("import", str(liar), check=False)
    assert result.returncode == 1
    assert f"metaclaw: {liar} is neither a mitmproxy capture nor a HAR file" in result.stderr
    assert "Traceback" not in result.stderr
