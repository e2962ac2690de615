"""The one function that every writer calls before something reaches the disk."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.prefix import common_prefix, common_suffix
from metaclaw_core.redact import (
    _SHAPES,
    _hits,
    redact,
    redact_answer,
    redact_between,
    redact_header,
    redact_path,
    redact_text,
)
from metaclaw_core.testing import Script, _events
from metaclaw_core.wire import by_name

SECRETS = {
    "anthropic-key": "sk-ant-api03-" + "a1B2" * 8,
    "openai-key": "sk-proj-" + "a1B2" * 8,
    "google-key": "AIza" + "Sy" * 17 + "x",
    "google-oauth": "ya29." + "a0" * 20,
    "aws-key-id": "AKIA" + "ABCD" * 4,
    "github-token": "ghp_" + "a1" * 18,
    "gitlab-token": "glpat-" + "a1" * 10,
    "slack-token": "xoxb-" + "1234-" * 4 + "abcd",
    "huggingface-token": "hf_" + "aB" * 17,
    "tinker-key": "tml-" + "aB3" * 8,
    "npm-token": "npm_" + "aB3" * 12,
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlLWhlcmU",
    "private-key": "-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
def test_each_shape_becomes_its_typed_placeholder_and_the_rest_stays(kind, secret):
    assert redact_text(f"before {secret} after") == f"before [redacted:{kind}] after"
    assert redact_text(f'{{"key":"{secret}"}}') == f'{{"key":"[redacted:{kind}]"}}'


def test_bearer_and_telegram_tokens_need_what_stands_before_them():
    assert redact_text("Authorization: Bearer abcdefghijklmnop1") == "Authorization: B[redacted:bearer]"
    assert redact_text("bot123456:AA" + "x" * 33) == "bot123456[redacted:telegram-token]"
    assert redact_text("time:AA" + "x" * 33) == "time:AA" + "x" * 33


@pytest.mark.parametrize("text", ["task-abcdefghijklmnop", "a risk-assessment-document", "sk-short", "eyJ only", "AKIA", ""])
def test_words_that_only_look_alike_stay(text):
    assert redact_text(text) == text


def test_a_body_without_secrets_is_the_same_object():
    body = b'{"messages":[]}' * 100
    assert redact(body) == (body, 0)
    assert redact(body)[0] is body


_PIECES = [shape.anchor for shape in _SHAPES] + [
    *(b"a", b" ", b"-", b'"', b"\\n", b"B", b"1", b".", b"_", b"s", b"k", b"proj-", b"AB12" * 6, b"x" * 33),
    *(b"abcdefghijklmnopqrstuvwxyz0123456789", b"PRIVATE KEY-----", b"RSA ", b"-----END PRIVATE KEY-----"),
]


@given(st.lists(st.sampled_from(_PIECES), max_size=9).map(b"".join))
def test_all_anchors_at_once_find_what_each_alone_does(data):
    alone = []
    for shape in _SHAPES:
        at = data.find(shape.anchor)
        while at >= 0:
            match = shape.pattern.match(data, at)
            if match and shape.before.search(data[max(0, at - 6) : at]):
                alone.append((at, match.end(), shape.kind))
            at = data.find(shape.anchor, match.end() if alone and match and alone[-1][0] == at else at + 1)
    apart = []
    for hit in sorted(alone):
        if not apart or hit[0] >= apart[-1][1]:
            apart.append(hit)
    assert _hits(data) == apart


def test_a_json_body_stays_valid_json():
    body = json.dumps({"a": list(SECRETS.values()), "b": "x"}).encode()
    clean, count = redact(body)
    assert count == len(SECRETS)
    assert json.loads(clean)["b"] == "x"
    assert all(value == f"[redacted:{kind}]" for kind, value in zip(SECRETS, json.loads(clean)["a"], strict=True))


@given(st.text(st.characters(codec=None)), st.sampled_from(list(SECRETS.values())), st.text(st.characters(codec=None)))
def test_no_secret_survives_whatever_surrounds_it(before, secret, after):
    assert secret not in redact_text(f"{before} {secret} {after}")


@given(st.binary())
def test_any_bytes_are_taken_and_a_second_pass_changes_nothing(data):
    once, _ = redact(data)
    assert redact(once) == (once, 0)


def test_secret_parameters_of_a_path_lose_their_value_and_others_keep_theirs():
    assert redact_path("/v1beta/models/m:streamGenerateContent?alt=sse&key=AIzaX") == (
        "/v1beta/models/m:streamGenerateContent?alt=sse&key=[redacted]"
    )
    assert redact_path("/v1/chat/completions") == "/v1/chat/completions"
    assert redact_path("/x?access_token=a&b=") == "/x?access_token=[redacted]&b="


def test_a_secret_that_is_part_of_a_path_is_replaced_by_its_shape():
    assert redact_path("/sk-ant-api03-aaaabbbbcccc/v1/messages?beta=true") == "/[redacted:anthropic-key]/v1/messages?beta=true"
    assert redact_path("/v1/messages?x=sk-ant-api03-aaaabbbbcccc") == "/v1/messages?x=[redacted:anthropic-key]"
    assert redact_path("/v1/messages?a=1#token=hunter2") == "/v1/messages?a=1"


def test_a_path_that_is_no_url_keeps_its_form():
    assert redact_path("//openai/v1/chat/completions?api-version=1") == "//openai/v1/chat/completions?api-version=1"
    assert redact_path("//[?key=AIzaX") == "//[?key=[redacted]"
    assert redact_path("/v1\udcff?a=\udcff%ff") == "/v1\udcff?a=%3F%EF%BF%BD"


@given(st.text(st.characters(codec=None)) | st.text("ab?&=#%/[]:+;\udcffkey", max_size=30))
def test_any_path_is_taken_and_a_second_pass_changes_nothing(path):
    once = redact_path(path)
    assert redact_path(once) == once


BEGIN, END = "-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"
LINES = ["MIIEowIBAAKCAQEA" + "q7" * 24, "h4Jk+/" * 10 + "abcd", "Zm9vYmFyCg=="]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"what does {BEGIN} mean?", "what does [redacted:private-key] mean?"),
        (f"a {BEGIN} b", "a [redacted:private-key] b"),
        ("\n".join([BEGIN, *LINES, END, "and more"]), "[redacted:private-key]\nand more"),
        ("\r\n".join([BEGIN, "Proc-Type: 4,ENCRYPTED", "DEK-Info: AES-128-CBC,3F2B", "", *LINES, END]), "[redacted:private-key]"),
        ("\n".join([BEGIN, "Proc-Type: 4,ENCRYPTED", "", *LINES[:2]]), "[redacted:private-key]"),
        ("\n".join([BEGIN, *LINES[:2]]) + "\n[truncated]", "[redacted:private-key]\n[truncated]"),
        (f'KEY = "{BEGIN}\\n" +\n "{LINES[0]}\\n" +\n "{END}"', 'KEY = "[redacted:private-key]"'),
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_private_key_is_taken_out_of_its_text_and_nothing_else_is(text, left, depth):
    body, expected = text, left
    for _ in range(depth):
        body, expected = json.dumps({"a": body, "systemInstruction": 1}), json.dumps({"a": expected, "systemInstruction": 1})
    clean = redact(body.encode())[0].decode()
    if depth < 2 or "KEY =" not in text:
        assert clean == expected
    assert not any(line in clean for line in LINES[:2])
    if depth:
        json.loads(clean)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("space", [None, 2])
def test_a_private_key_in_a_list_of_lines_is_found_and_the_list_stays_json(ended, space):
    body = json.dumps({"lines": [BEGIN, *LINES[:2], *([LINES[2], END] if ended else [])], "role": "user"}, indent=space)
    clean = redact(body.encode())[0].decode()
    assert json.loads(clean) == {"lines": ["[redacted:private-key]"], "role": "user"}


def test_two_messages_that_speak_of_the_two_lines_of_a_key_stay_two():
    body = json.dumps({"messages": [{"content": f"from {BEGIN}"}, {"content": ["x", f"to {END}"]}]})
    assert json.loads(redact(body.encode())[0]) == {
        "messages": [{"content": "from [redacted:private-key]"}, {"content": ["x", f"to {END}"]}]
    }


@given(st.lists(st.sampled_from([BEGIN, END, *LINES, "x", '"', "\n", "\\", ",", " and ", "a" * 50]), max_size=12), st.integers(1, 3))
def test_whatever_stands_around_it_a_body_that_was_json_is_json_without_the_key(parts, depth):
    body = "".join(parts)
    for _ in range(depth):
        body = json.dumps({"a": [body, "b"], "c" * 45: body})
    json.loads(redact(body.encode())[0])


FILLER = b'{"messages":"' + b"lorem ipsum dolor " * 4000 + b'"}'


@pytest.mark.parametrize("at", [0, 13, 16_000, 30_000, len(FILLER) - 2, len(FILLER)])
def test_a_secret_is_found_wherever_a_known_body_has_changed(at):
    body = FILLER[:at] + b" " + SECRETS["github-token"].encode() + b" " + FILLER[at:]
    prefix = common_prefix(FILLER, body)
    assert redact_between(body, prefix, common_suffix(FILLER, body, len(FILLER) - prefix)) == redact(body)
    assert redact_between(FILLER, len(FILLER), 0) == (FILLER, 0)


@given(st.lists(st.tuples(st.integers(0, len(FILLER)), st.sampled_from([b"x", b"ghp_", b"a1" * 18, b'","', b"sk-"])), max_size=8))
def test_of_a_growing_body_the_new_part_says_what_all_of_it_says(changes):
    body = FILLER
    for at, piece in changes:
        known, body = redact(body)[0], body[:at] + piece + body[at:]
        prefix = common_prefix(known, body)
        suffix = common_suffix(known, body, min(len(known), len(body)) - prefix)
        assert redact_between(body, prefix, suffix) == redact(body)


@pytest.mark.parametrize(
    "name",
    ["Authorization", "proxy-authorization", "Cookie", "set-cookie", "x-api-key", "api-key", "X-Goog-Api-Key", "x-auth-token",
     "x-amz-security-token", "x-client-secret", "x-session", "x-password"],
)  # fmt: skip
def test_a_credentials_header_loses_its_value_whatever_it_looks_like(name):
    assert redact_header(name.encode(), b"opensesame") == (name.encode(), b"[redacted]")


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        (b"x-ratelimit-remaining-tokens", b"4000", b"4000"),
        (b"session_id", b"0b3f", b"0b3f"),
        (b"x-note", b"use sk-proj-abcdefghijklmnop now", b"use [redacted:openai-key] now"),
        (b"Location", b"https://e.test/a?token=abc&page=2", b"https://e.test/a?token=[redacted]&page=2"),
        (b"referer", b"\xff?key=1", b"\xff?key=[redacted]"),
    ],
)
def test_another_header_keeps_all_but_what_is_secret_in_it(name, value, left):
    assert redact_header(name, value) == (name, left)


@pytest.mark.parametrize("before", ["\n", "\t", "\r\n", "\u001f", '{"a": "', "\\n"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_secret_at_the_start_of_a_line_is_found_however_often_the_text_is_escaped(before, depth):
    text = f"env:{before}ghp_abcdefghijklmnopqrstuvwxyz0123"
    for _ in range(depth):
        text = json.dumps(text)
    assert "ghp_" not in redact_text(text)


def test_a_word_that_ends_in_the_letters_of_an_escape_is_still_a_word():
    assert redact_text("ordinsk-abcdefghijklmnopq") == "ordinsk-abcdefghijklmnopq"


DIALECTS = ("openai_chat", "openai_responses", "anthropic", "gemini", "ollama")


@pytest.mark.parametrize("dialect", DIALECTS)
@given(st.text(max_size=20), st.integers(1, 60), st.text(max_size=20))
def test_a_secret_that_is_spread_over_the_events_of_a_stream_is_found(dialect, before, pieces, after):
    text = f"{before} ghp_abcdefghijklmnopqrstuvwxyz0123 -----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY----- {after}"
    body = b"".join(_events(dialect, Script(text=text, pieces=pieces)))
    clean, count = redact_answer(body)
    assert count >= 2
    parser = by_name(dialect).stream_parser()
    parser.feed(clean)
    assert parser.finish().message.text == f"{before} [redacted:github-token] [redacted:private-key] {after}"
    assert redact_answer(clean) == (clean, 0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_without_secrets_is_the_same_object(dialect):
    body = b"".join(_events(dialect, Script(text="The key is under the mat, as ever; ask for it.", pieces=9)))
    assert redact_answer(body)[0] is body


def test_arguments_of_a_call_and_a_cut_stream_lose_their_parts_too():
    parts = ['{\\"key\\": \\"sk-pr', "oj-abcdefgh", "ijklmnop"]
    events = [f'data: {{"choices":[{{"delta":{{"tool_calls":[{{"function":{{"arguments":"{part}"}}}}]}}}}]}}\n\n' for part in parts]
    clean, count = redact_answer("".join(events).encode()[:-20])
    assert count == 1
    assert [part in clean for part in (b"sk-pr", b"oj-abc", b"ijk")] == [False] * 3
    assert b"[redacted:openai-key]" in clean
