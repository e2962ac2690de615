"""Exchanges become turns: whose they are, what they hold, why they are skipped."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metaclaw_core.model import Hints, Injection, Message, Role, Text
from metaclaw_core.store.db import open_store
from metaclaw_core.store.rollouts import Store
from metaclaw_core.wire import by_name
from metaclaw_core.wire.beside import slot_beside
from metaclaw_core.wire.reread import read
from metaclaw_core.wire.splice import insert, render_block


def rows(store: Store, *fields: str, **wanted: Any) -> list[Any]:
    found = [tuple(row[f] for f in fields) for row in store.turns(**wanted)]
    return [row[0] for row in found] if len(fields) == 1 else found


# --- what a row holds -------------------------------------------------------------------------


def test_a_turn_holds_what_was_asked_and_answered(store: Store, chat: Any, chat_stream: Callable[..., bytes]) -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}]
    exchange = chat(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is in a?"},
        answer=chat_stream("Let me look.", calls=calls),
        body={"temperature": 0.2, "tools": [{"type": "function", "function": {"name": "read"}}], "user": "u"},
        injection=Injection("the block", ("reading", "files"), 7, (4.5, None)),
    )
    report = store.ingest([exchange])
    assert (report.stored, report.skipped, report.duplicates, report.failed) == (1, 0, 0, ())
    [row] = store.turns()
    expected = {
        "flow_id": "flow-1",
        "agent": "generic",
        "kind": "main",
        "dialect": "openai_chat",
        "host": "api.example.com",
        "path": "/v1/chat/completions",
        "model": "m-1",
        "response_model": "m-1-2026",
        "response_id": "chatcmpl-1",
        "history_known": True,
        "sampling": {"temperature": 0.2},
        "user_text": "What is in a?",
        "assistant_text": "Let me look.",
        "tool_calls": [{"name": "read", "arguments": '{"path": "a"}', "id": "call_1"}],
        "stop_reason": "tool_calls",
        "usage": None,
        "status_code": 200,
        "injected": ["reading", "files"],
        "injected_scores": [4.5, None],
        "index_generation": 7,
        "state": "captured",
        "reason": None,
        "retry": False,
        "attempts": 0,
        "started_at": 1_795_466_304.25,
        "duration_ms": 812.5,
        "live": True,
    }
    assert {name: row[name] for name in expected} == expected
    assert store.blob(row["injection"]) == "the block"
    assert store.blob(row["tools"]) == [{"type": "function", "function": {"name": "read"}}]
    assert store.blob(row["extra"]) == {"extra": {"user": "u"}}
    assert [(m.role, m.text) for m in store.conversation(row["response_tip"])] == [
        (Role.SYSTEM, "Be brief."),
        (Role.USER, "What is in a?"),
        (Role.ASSISTANT, "Let me look."),
    ]
    json.dumps(row)


def test_reported_tokens_are_kept_and_unreported_ones_are_null(store: Store, chat: Any) -> None:
    answer = {
        "id": "c",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3},
    }
    odd = {**answer, "usage": {"prompt_tokens": 10**22, "completion_tokens": 3}}
    as_json = {"response_type": "application/json", "body": {"stream": False}}
    store.ingest([chat("a", answer=json.dumps(a).encode(), **as_json) for a in (answer, odd)])
    assert [usage["input_tokens"] for usage in rows(store, "usage")] == [12, None]
    assert [usage["reasoning_tokens"] for usage in rows(store, "usage")] == [None, None]


def test_the_same_answer_with_other_reasoning_is_kept_in_full(
    store: Store, chat: Any, chat_stream: Callable[..., bytes]
) -> None:
    store.ingest(
        [
            chat("2+2?", answer=chat_stream("4", reasoning_content="two and two")),
            chat("2+2?", answer=chat_stream("4", reasoning_content="counting")),
            chat("2+2?", answer=chat_stream("4", reasoning_content="two and two")),
        ]
    )
    found = list(store.turns())
    assert len({row["response_tip"] for row in found}) == 1
    assert [row["response"] is None for row in found] == [True, False, True]
    thoughts = [store.response(row).parts[0].text for row in found]
    assert thoughts == ["two and two", "counting", "two and two"]


def test_a_secret_is_replaced_and_the_turn_says_so(store: Store, chat: Any, chat_stream: Callable[..., bytes]) -> None:
    """An import brings bodies that no spool has searched; a stream may split a secret over two events."""
    key = "sk-ant-api03-aaaabbbbccccdddd"
    head = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n'
    split = head % b"your key: sk-ant-" + head % b"api03-aaaabbbbccccdddd" + chat_stream("")
    store.ingest([chat(f"my key is {key}", answer="ok"), chat("what was it?", answer=split), chat("thanks")])
    assert rows(store, "user_text", "assistant_text", "redacted") == [
        ("my key is [redacted:anthropic-key]", "ok", True),
        ("what was it?", "your key: [redacted:anthropic-key]", True),
        ("thanks", "Hello.", False),
    ]


def test_a_path_that_is_no_url_loses_its_key_only(store: Store, chat: Any) -> None:
    store.ingest([chat("hi", path="//[?key=AIzaSyAaaaaaaaaaaa")])
    assert rows(store, "path", "state", "reason") == [("//[?key=[redacted]", "captured", None)]


# --- sessions and turns -------------------------------------------------------------------------


def test_a_session_without_an_id_is_known_by_its_prefix(store: Store, chat: Any) -> None:
    store.ingest(
        [
            chat("hi", answer="hello"),
            chat("hi", "hello", "how?", answer="so"),
            chat("another", answer="ok"),
            chat("hi", "hello", "how?", "so", "bye", answer="bye"),
            chat("hi", "hello", "a fork", answer="fine"),
        ]
    )
    a, b, c, d, e = rows(store, "session_id")
    assert a.startswith("p-")
    assert len(a) == 18
    assert (b, d, e) == (a, a, a)
    assert c != a
    assert [(s["generated"], s["turns"], s["kinds"]) for s in store.sessions()] == [
        (True, 4, {"main": 4}),
        (True, 1, {"main": 1}),
    ]


def test_a_prefix_is_found_across_batches_and_string_or_list_content(store: Store, chat: Any) -> None:
    for exchange in (
        chat("hi", answer="hello"),
        chat(
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "hello"},
            "x",
        ),
    ):
        store.ingest([exchange])
    assert len(set(rows(store, "session"))) == 1


def test_a_deep_history_that_was_rewritten_at_its_end_still_belongs(store: Store, chat: Any) -> None:
    history = [str(i) for i in range(200)]
    store.ingest([chat(*history, "ask")])
    store.ingest([chat(*history, *(f"new {i}" for i in range(100)), "ask")])
    first, second = rows(store, "session")
    assert first != second  # the prompt ends with a message that the other does not have: no tip is shared
    store.ingest([chat(*history, "ask", "Hello.", *(f"new {i}" for i in range(101)))])
    assert rows(store, "session")[2] == first


def test_another_principal_never_shares_a_session(store: Store, chat: Any) -> None:
    hints = Hints(session_id="s-1", client="codex")
    store.ingest(
        [
            chat("hi", hints=hints),
            chat("hi", "Hello.", "x", hints=hints, principal="other"),
            chat("hi", "Hello.", "y", principal="third"),
        ]
    )
    assert len(set(rows(store, "session"))) == 3
    assert rows(store, "session_id")[:2] == ["s-1", "s-1"]


def test_an_equal_opening_is_a_repetition_only_at_once_or_after_a_failure(store: Store, chat: Any) -> None:
    first = chat("report!")
    store.ingest(
        [
            first,
            chat("report!", started_at=first.started_at + 30),
            chat("report!", started_at=first.started_at + 3600, status_code=429, answer=b""),
            chat("report!", started_at=first.started_at + 3700),
        ]
    )
    a, b, c, d = rows(store, "session")
    assert a == b
    assert c == d
    assert a != c
    assert rows(store, "retry") == [False, True, False, True]


def test_a_tool_loop_is_one_turn(store: Store, chat: Any) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    store.ingest(
        [chat("ask"), chat("ask", call, result), chat("ask", call, result, "done"), chat("ask", "Hello.", "next")]
    )
    a, b, c, d = rows(store, "turn_id")
    assert a == b == c
    assert d != a
    assert all(len(turn) == 32 for turn in (a, d))


def test_a_client_that_hangs_up_after_the_last_event_is_no_error(
    store: Store, chat: Any, chat_stream: Callable[..., bytes]
) -> None:
    whole = chat_stream("Hello.")
    gone = {"complete": False, "error": "Client disconnected."}
    store.ingest([chat("hi", answer=whole, **gone), chat("ho", answer=whole[: len(whole) // 2], **gone)])
    assert rows(store, "state", "reason", "error") == [
        ("captured", None, None),
        ("skipped", "response cut", "Client disconnected."),
    ]


def test_a_trace_with_two_messages_of_the_human_is_two_turns(store: Store, chat: Any) -> None:
    runtime = "\n\nRuntime: agent=main | session=agent:main:main | sessionId=5c89be32-3adc-43ec-b0fd-efea88de0220 | x=y"
    system = {"role": "system", "content": "<!-- openclaw:attempt:STABLE -->"}
    hints = Hints(trace_id="a" * 32)
    first = {"role": "user", "content": f"[Mon 2026-11-23 20:38 UTC] first{runtime}"}
    second = {"role": "user", "content": "[Mon 2026-11-23 20:39 UTC] and this"}
    answer = {"role": "assistant", "content": "Hello."}
    store.ingest(
        [
            chat(system, first, hints=hints),
            chat(system, first, hints=hints),  # a retry
            chat(system, first, answer, second, hints=hints),  # said while the agent worked: the same trace
        ]
    )
    a, b, c = rows(store, "turn_id")
    assert a == b
    assert c != a


def test_a_request_that_cannot_be_read_has_no_turn_and_no_session(store: Store, chat: Any) -> None:
    store.ingest([replace(chat(), request_body=b"{", hints=Hints(session_id="s-1"))])
    assert rows(store, "turn_id", "session", "kind", "state") == [(None, None, "unknown", "skipped")]


# --- provider-side history ----------------------------------------------------------------------


def responses(
    chat: Any,
    number: int,
    items: list[Any],
    answer: str,
    previous: str | None = None,
    instructions: str | None = "Be brief.",
) -> Any:
    body = {
        "model": "m-1",
        "input": items,
        "store": True,
        "previous_response_id": previous,
        "instructions": instructions,
    }
    response = {
        "id": f"resp_{number}",
        "object": "response",
        "status": "completed",
        "model": "m-1",
        "output": [
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": answer, "annotations": []}],
            }
        ],
    }
    body = {k: v for k, v in body.items() if v is not None}
    return replace(
        chat(),
        dialect="openai_responses",
        path="/v1/responses",
        request_body=json.dumps(body).encode(),
        response_body=json.dumps(response).encode(),
        response_type="application/json",
    )


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def heard(store: Store, row: dict[str, Any]) -> list[str]:
    return [m.text for m in store.conversation(row["response_tip"])]


def test_a_request_with_a_previous_response_is_appended_to_its_history(store: Store, chat: Any) -> None:
    store.ingest([responses(chat, 1, [said("a")], "A"), responses(chat, 2, [said("b")], "B", "resp_1")])
    store.ingest([responses(chat, 3, [said("c")], "C", "resp_2")])
    found = list(store.turns())
    assert heard(store, found[2]) == ["Be brief.", "a", "A", "b", "B", "c", "C"]
    assert [row["history_known"] for row in found] == [True, True, True]
    assert len({row["session"] for row in found}) == 1
    assert store.verify().messages == 7


def test_other_instructions_replace_those_of_the_history(store: Store, chat: Any) -> None:
    store.ingest(
        [
            responses(chat, 1, [said("a")], "A"),
            responses(chat, 2, [said("b")], "B", "resp_1", "Be long."),
            responses(chat, 3, [said("c")], "C", "resp_2", "Be long."),
        ]
    )
    found = list(store.turns())
    assert heard(store, found[1]) == ["Be long.", "a", "A", "b", "B"]
    assert heard(store, found[2]) == ["Be long.", "a", "A", "b", "B", "c", "C"]
    assert store.verify().problems == ()


def test_a_history_we_have_not_seen_is_said_to_be_unknown(store: Store, chat: Any) -> None:
    store.ingest([responses(chat, 2, [said("b")], "B", "resp_1"), responses(chat, 3, [said("c")], "C", "resp_2")])
    found = list(store.turns())
    assert [row["history_known"] for row in found] == [False, False]
    assert heard(store, found[1]) == ["Be brief.", "b", "B", "c", "C"]


def test_another_principals_response_id_gives_no_history(store: Store, chat: Any) -> None:
    own = responses(chat, 1, [said("a")], "A")
    stolen = replace(responses(chat, 2, [said("b")], "B", "resp_1"), principal="other")
    store.ingest([own, stolen])
    second = list(store.turns())[1]
    assert heard(store, second) == ["Be brief.", "b", "B"]
    assert second["history_known"] is False


# --- reasons ------------------------------------------------------------------------------------

CUT = b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"Hel"}}]}\n\n'


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status_code": 429, "response_body": b'{"error":{"message":"slow down"}}'}, "status 429"),
        ({"status_code": 302, "response_body": b""}, "status 302"),
        ({"status_code": None, "response_body": b"", "complete": False}, "no response"),
        ({"response_body": CUT, "complete": False}, "response cut"),
        ({"response_body": CUT}, "response cut"),
        ({"response_body": b"", "complete": False}, "response cut"),
        ({"response_body": gzip.compress(CUT)[:-9], "response_encoding": "gzip", "complete": False}, "response cut"),
        ({"response_body": b""}, "empty response"),
        ({"response_body": b'{"id"', "response_type": "application/json", "complete": False}, "response cut"),
        ({"response_body": b"<html>", "response_type": "text/html"}, "response body is not JSON: Expecting value at 0"),
        ({"request_body": b"hello"}, "request body is not JSON: Expecting value at 0"),
        ({"request_body": b""}, "request body is not JSON: Expecting value at 0"),
        ({"request_body": b"[1]"}, "request body is JSON, but list and not an object"),
        ({"request_body": b'{"messages": "\xff"}'}, "request body is not valid UTF-8 (byte 14)"),
        ({"request_encoding": "aws-chunked"}, "request body: content-encoding 'aws-chunked' is not known"),
        ({"response_encoding": "aws-chunked"}, "response body: content-encoding 'aws-chunked' is not known"),
        (
            {"dialect": "klingon"},
            "dialect 'klingon' is not known; install the package that provides it",
        ),
        (
            {"request_body": b"", "error": "bodies not stored: content-encoding 'x' is not known"},
            "bodies not stored: content-encoding 'x' is not known",
        ),
    ],
)
def test_a_failed_request_is_a_skipped_turn_with_a_reason(
    store: Store, chat: Any, changes: dict[str, Any], reason: str
) -> None:
    report = store.ingest([replace(chat("hi"), **changes)])
    assert (report.stored, report.skipped) == (1, 1)
    assert rows(store, "state", "reason") == [("skipped", reason)]


def test_a_failed_request_keeps_what_arrived(store: Store, chat: Any) -> None:
    store.ingest(
        [
            replace(chat("hi"), status_code=429, response_body=b'{"error":{"message":"slow down"}}'),
            replace(chat("hi"), response_body=CUT, complete=False, error="peer closed"),
        ]
    )
    assert rows(store, "user_text", "assistant_text", "error") == [
        ("hi", None, "slow down"),
        ("hi", "Hel", "peer closed"),
    ]


def test_an_error_inside_a_stream_is_a_reason(store: Store, chat: Any) -> None:
    body = CUT + b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n'
    store.ingest([replace(chat("hi"), response_body=body)])
    assert rows(store, "reason", "error") == [("error in the response", "overloaded")]


# --- once and only once -------------------------------------------------------------------------


def test_the_same_flow_twice_is_stored_once(store: Store, chat: Any) -> None:
    exchange = chat("hi")
    assert store.ingest([exchange, exchange]).duplicates == 1
    assert store.ingest([replace(exchange, response_body=CUT)]).duplicates == 1
    assert len(list(store.turns())) == 1


def test_the_same_content_under_another_flow_id_is_stored_once(store: Store, chat: Any) -> None:
    """A HAR keeps no flow id, rounds times to microseconds and holds decoded bodies."""
    live = replace(
        chat("hi"), started_at=1_795_466_303.2089813, path="/v1/chat/completions?api-version=1&key=AIzaSyAaaa"
    )
    live = replace(live, request_body=gzip.compress(live.request_body), request_encoding="gzip")
    from_har = replace(
        live,
        flow_id="",
        started_at=1_795_466_303.208981,
        path="/v1/chat/completions?api-version=1&key=[redacted]",
        host="API.example.com",
        request_body=gzip.decompress(live.request_body),
        request_encoding="",
        live=False,
    )
    assert store.ingest([live]).stored == 1
    assert store.ingest([from_har]).duplicates == 1
    assert store.ingest([replace(from_har, started_at=1_795_466_303.208982)]).stored == 1


def test_a_duplicate_leaves_no_trace(store: Store, chat: Any) -> None:
    exchange = chat("hi")
    store.ingest([exchange])
    store.ingest([replace(exchange, request_body=chat("something else").request_body)])
    assert store.verify().messages == 2
    assert len(list(store.sessions())) == 1
    assert store.counters() == {"duplicates": 1, "skipped": 0, "stored": 1, "unknown_preambles": 0}


def test_a_capture_of_injected_traffic_is_the_clients_own(store: Store, chat: Any) -> None:
    original = chat({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"})
    block = render_block("## Skills\n\n### reading-files\n\n_How to read._\n\nOpen it.\n\n### maths\n\n_Sums._\n\nAdd.")
    slot = by_name("openai_chat").system_slot(original.request_body)
    sent = insert(original.request_body, slot, block)
    assert sent != original.request_body
    captured = replace(original, request_body=sent, live=False)
    store.ingest([captured])
    [row] = store.turns()
    assert row["injected"] == ["reading-files", "maths"]
    assert row["index_generation"] is None
    assert store.blob(row["injection"]) == block
    assert row["injected_scores"] is None  # a capture holds the block and not why
    assert [m.text for m in store.conversation(row["prompt_tip"])] == ["Be brief.", "hi"]
    live = replace(original, flow_id="live", injection=Injection(block, ("reading-files", "maths"), 3))
    assert store.ingest([live]).duplicates == 1


def test_a_capture_with_skills_beside_the_words_of_the_human_is_the_clients_own(store: Store, chat: Any) -> None:
    original = chat({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"})
    dialect, body = by_name("openai_chat"), original.request_body
    block, more = (render_block(f"## Skills\n\n### {name}\n\n_D._\n\nB.") for name in ("reading-files", "maths"))
    reading = read(dialect, body, original.path)
    body = insert(body, slot_beside(reading, 1), more)  # behind the block, so that its place stays
    sent = insert(body, reading.slot(), block)
    store.ingest([replace(original, request_body=sent, live=False)])
    [row] = store.turns()
    assert (row["injected"], row["user_text"]) == (["reading-files", "maths"], "hi")
    assert store.blob(row["injection"]) == f"{block}\n\n{more}"
    assert [m.text for m in store.conversation(row["prompt_tip"])] == ["Be brief.", "hi"]
    assert store.ingest([replace(original, flow_id="live")]).duplicates == 1


def test_a_capture_imported_as_file_and_as_har_adds_nothing_twice(
    store: Store, captured: Callable[..., list[Any]]
) -> None:
    assert store.ingest(captured("openai-completions.mitm")).stored == 7
    assert store.ingest(captured("openai-completions.har")).duplicates == 7
    assert store.ingest(captured("openai-completions.mitm")).duplicates == 7


def test_workers_that_ingest_the_same_at_once_store_it_once(store: Store, chat: Any) -> None:
    texts = ["a"]
    exchanges = []
    for i in range(20):
        exchanges.append(chat(*texts, answer=f"answer {i}"))
        texts += [f"answer {i}", f"ask {i}"]
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(store.ingest, [exchanges] * 3))
    assert sum(report.stored for report in reports) == 20
    assert sum(report.duplicates for report in reports) == 40
    assert len(set(rows(store, "session"))) == 1
    assert store.verify().problems == ()


# --- bad input ----------------------------------------------------------------------------------


def test_what_unicode_and_json_allow_is_stored_as_it_was(store: Store, chat: Any) -> None:
    """A lone surrogate, NUL, a 23-digit integer: any of them breaks a naive column."""
    odd = "lone \ud800, nul \x00, 你好"
    store.ingest(
        [
            chat(
                {"role": "user", "content": odd, "weight": 12345678901234567890123},
                answer="\udfff\x00 answer",
                body={"model": "m\x00\ud800", "seed": 12345678901234567890123},
                error="\x00",
            )
        ]
    )
    [row] = store.turns()
    assert (row["user_text"], row["assistant_text"], row["model"]) == (odd, "\udfff\x00 answer", "m\ufffd\ufffd")
    assert row["sampling"] == {"seed": 12345678901234567890123}
    assert store.conversation(row["prompt_tip"])[0] == Message(
        Role.USER, (Text(odd),), {"weight": 12345678901234567890123}
    )
    assert store.verify().problems == ()


def test_a_30_mb_body_is_stored(store: Store, chat: Any) -> None:
    store.ingest([chat("x" * 30_000_000)])
    assert [len(text) for text in rows(store, "user_text")] == [30_000_000]


def test_long_names_are_cut_and_stay_apart(store: Store, chat: Any) -> None:
    store.ingest([chat("a", body={"model": "m" * 5000 + end}) for end in "ab"])
    one, other = rows(store, "model")
    assert (len(one), len(other)) == (255, 255)
    assert one != other


def test_one_bad_exchange_does_not_take_its_neighbours_along(store: Store, chat: Any) -> None:
    """One that the database refuses as parsed, and one that it refuses in any form."""
    refused = chat("x", injection=Injection("block", (), 10**30))
    impossible = chat("y", port=10**30)
    report = store.ingest([chat("a"), refused, impossible, chat("b")])
    assert (report.stored, report.skipped) == (3, 1)
    [(place, why)] = report.failed
    assert place == 2
    assert why.startswith("internal error: ")
    assert rows(store, "state", "user_text") == [("skipped", None), ("captured", "a"), ("captured", "b")]
    assert rows(store, "reason", state="skipped")[0].startswith("internal error: ")
    assert store.verify().problems == ()


def test_a_nesting_too_deep_for_the_parser_is_a_reason(store: Store, chat: Any) -> None:
    body = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    store.ingest([replace(chat(), request_body=body)])
    assert rows(store, "reason") == ["request body is nested too deeply"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    request=st.binary(max_size=60) | st.from_regex(rb'\{"messages":\[.{0,40}\]\}', fullmatch=True),
    response=st.binary(max_size=60) | st.from_regex(rb"data: \{.{0,40}\}\n\n", fullmatch=True),
    dialect=st.sampled_from(["openai_chat", "openai_responses", "anthropic", "gemini", "ollama"]),
    encoding=st.sampled_from(["", "gzip", "br", "zstd", "deflate", "x"]),
    status=st.sampled_from([None, 0, 200, 204, 500]),
)
def test_no_bytes_make_ingest_raise(
    tmp_path_factory: pytest.TempPathFactory,
    chat: Any,
    request: bytes,
    response: bytes,
    dialect: str,
    encoding: str,
    status: int | None,
) -> None:
    made = replace(
        chat(),
        request_body=request,
        response_body=response,
        dialect=dialect,
        response_encoding=encoding,
        status_code=status,
    )
    path = tmp_path_factory.getbasetemp() / "fuzz.db"
    with open_store(path) as fuzzed:
        report = fuzzed.ingest([replace(made, flow_id="", started_at=1e9 + chat.made)])
    assert report.failed == ()
    assert report.stored + report.duplicates == 1


# --- real recordings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("openai-completions.mitm", "main main tool main tool main tool"),
        ("anthropic-messages-native.mitm", "main main tool main tool main tool"),
        ("google-generative-ai-native.mitm", "main main tool main tool main tool"),
        ("ollama.mitm", "main main tool"),
        ("openai-responses-native-codemode.mitm", "main main tool main"),
    ],
)
def test_a_recorded_session_is_one_session_with_its_turns(
    store: Store, captured: Callable[..., list[Any]], name: str, kinds: str
) -> None:
    store.ingest(captured(name))
    assert rows(store, "kind") == kinds.split()
    assert len(set(rows(store, "session_id"))) == 1
    assert len(set(rows(store, "turn_id"))) == kinds.count("main")
    assert set(rows(store, "state", "agent", "history_known")) == {("captured", "openclaw", True)}
    assert rows(store, "user_text")[0].startswith("Hello, please introduce yourself")
    assert store.verify().problems == ()


def test_recorded_failures_are_skipped_and_their_retries_belong_to_the_same_turn(
    store: Store, captured: Callable[..., list[Any]]
) -> None:
    store.ingest(captured("errors-openai-completions.mitm"))
    found = rows(store, "reason", "retry", "turn_id")
    assert [(reason, retry) for reason, retry, _ in found] == [
        ("status 429", False),
        (None, True),
        ("status 500", False),
        (None, True),
        ("response cut", False),
        (None, True),
        (None, False),
        (None, False),
        ("status 400", False),
    ]
    assert [found[i][2] == found[i + 1][2] for i in (0, 2, 4)] == [True, True, True]


def test_a_recorded_compaction_belongs_to_the_session_it_summarises(
    store: Store, captured: Callable[..., list[Any]]
) -> None:
    store.ingest(captured("compaction-openai-completions.mitm"))
    assert rows(store, "kind") == ["main", "main", "compaction", "main"]
    assert len(set(rows(store, "session"))) == 1


def test_a_compaction_of_a_conversation_we_have_not_seen_is_left_open(
    store: Store, captured: Callable[..., list[Any]]
) -> None:
    first, _, compaction, last = captured("compaction-openai-completions.mitm")
    other = replace(compaction, principal="other", flow_id="o", started_at=compaction.started_at + 1e-3)
    store.ingest([first, compaction, other, last])
    assert rows(store, "session_id", kind="compaction") == [None, None]


def test_a_subagent_and_its_announcement_are_told_apart(store: Store, captured: Callable[..., list[Any]]) -> None:
    store.ingest(captured("subagent-openai-completions.mitm"))
    found = rows(store, "kind", "session_key")
    assert [kind for kind, _ in found] == ["main", "tool", "subagent", "announce"]
    assert found[0][1] == found[1][1] == found[3][1] == "agent:main:sub1"
    assert found[2][1].startswith("agent:main:subagent:")


# --- size ---------------------------------------------------------------------------------------


def test_a_long_session_takes_less_than_a_tenth_of_its_request_bodies(tmp_path: Path) -> None:
    """40 turns, a 42 kB system prompt, 4 kB tool results."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench_ingest.py"
    spec = importlib.util.spec_from_file_location("bench_ingest", script)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    exchanges = list(bench.session(0, 40))
    path = tmp_path / "store.db"
    with open_store(path) as store:
        assert store.ingest(exchanges).stored == 40
    assert path.stat().st_size < 0.1 * sum(len(e.request_body) for e in exchanges)
