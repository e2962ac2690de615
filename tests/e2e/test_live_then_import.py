"""Traffic that was recorded live, imported again from mitmproxy's own files: nothing is added.

The proxy injects into these requests, so the files hold other bodies than the store: our block has to be found in them
and taken out before anything is hashed.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import sqlite3
from pathlib import Path

import pytest
from e2e_tools import metaclaw  # noqa: F401 - a fixture
from live_tools import GIT, chat, connection, eventually, headers_for, kit, post, quiet_proxy, turns  # noqa: F401 - kit is a fixture

from metaclaw_core.testing import Received, Script, ScriptedLLM

SECRET = "sk-ant-api03-" + "a1B2" * 8
USER = {"role": "user", "content": GIT}


def scripts(received: Received) -> Script:
    text = received.body.decode("utf-8", "replace")
    if "answer: 500" in text:
        return Script(status=500)
    if "answer: cut" in text:
        return Script(text="this answer is cut off in its middle", pieces=8, cut_after=4)
    return Script(text=f"an answer with a key in it: {SECRET}" if "answer: key" in text else "Use git rebase --continue.")


def requests() -> list[tuple[str, bytes]]:
    """(path, body): most get a block, the last can't be rewritten."""
    chats, found = "/v1/chat/completions", []
    for stream in (True, False):
        bodies = {
            chats: {"messages": [{"role": "system", "content": "Be brief."}, USER], "stream": stream},
            "/v1/responses": {"input": [USER], "instructions": "Be brief.", "stream": stream},
            "/v1/messages": {"max_tokens": 9, "system": "Be brief.", "messages": [USER], "stream": stream},
            "/api/chat": {"messages": [{"role": "system", "content": "Be brief."}, USER], "stream": stream},
            f"/v1beta/models/m:{'streamG' if stream else 'g'}enerateContent?{'alt=sse&' if stream else ''}key=AIzaSyFake0123456789abcd": {
                "contents": [{"role": "user", "parts": [{"text": GIT}]}],
                "systemInstruction": {"parts": [{"text": "Be brief."}]},
            },
        }
        found += [(path, json.dumps({"model": "m", **body}).encode()) for path, body in bodies.items()]
    answer = {"role": "assistant", "content": "Use git rebase --continue."}
    again = {"role": "user", "content": "And how do I abort the rebase?"}
    talk = {"model": "m", "stream": True, "messages": [{"role": "system", "content": "Be brief."}, USER, answer, again]}
    return [
        *found,
        (chats, json.dumps(talk).encode()),
        (chats, chat(f"{GIT} answer: 500", stream=True)),
        (chats, chat(f"{GIT} answer: key", stream=True)),
        (chats, chat(f"{GIT} My key is {SECRET}")),
        (chats, chat(f"{GIT} answer: cut", stream=True)),
        (chats, b"no JSON at all"),
        (chats, b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}'),
        (chats, json.dumps({"model": "m", "messages": [{"role": "user", "content": "lone \ud800"}], "seed": 10**22}).encode()),
    ]


def roots(home: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(home / "store.db")) as store:
        return sorted(row[0] for row in store.execute("SELECT id FROM messages WHERE parent IS NULL"))


@pytest.mark.slow
def test_importing_the_file_or_the_har_of_live_traffic_adds_nothing(tmp_path, kit, metaclaw):  # noqa: F811
    saved, har = tmp_path / "saved.mitm", tmp_path / "saved.har"
    sent = requests()
    with ScriptedLLM(scripts) as llm, quiet_proxy(tmp_path, kit, "-w", str(saved), "--set", f"hardump={har}") as proxy:
        for path, body in sent:
            url = llm.url + path
            with contextlib.closing(connection(url, proxy)) as over, contextlib.suppress(http.client.IncompleteRead):
                post(url, body, proxy, over=over)
        eventually(lambda: len(llm.received) == len(sent))
        proxy.stop()
    home = tmp_path / "metaclaw"
    live = turns(home)
    assert len(live) == len(sent) == 18
    assert [row["live"] for row in live] == [True] * 18
    assert [row["injected"] for row in live[:10]] == [["git-rebase-conflicts"]] * 10
    assert [(row["state"], row["reason"]) for row in live[10:]] == [
        ("captured", None),
        ("skipped", "status 500"),
        ("captured", None),
        ("captured", None),
        ("skipped", "response cut"),
        ("skipped", "request body is not JSON: Expecting value at 0"),
        ("skipped", "request body is not valid UTF-8 (byte 51)"),
        ("captured", None),
    ]
    before = (roots(home), metaclaw("sessions", "--json").stdout)
    for file in (saved, har, saved):
        (report,) = [json.loads(line) for line in metaclaw("import", "--json", str(file)).stdout.splitlines()]
        assert (report["new"], report["known"], report["failed"], report["problem"]) == (0, 18, 0, None), file.name
    assert (roots(home), metaclaw("sessions", "--json").stdout) == before
    assert turns(home) == live
    assert "0 problems" in metaclaw("store", "verify").stdout


@pytest.mark.slow
def test_the_file_alone_gives_the_turns_that_were_recorded_live(tmp_path, kit, metaclaw):  # noqa: F811
    """Into another home: the same sessions and texts, and the block beside the conversation, not in it."""
    saved = tmp_path / "saved.mitm"
    with ScriptedLLM(scripts) as llm, quiet_proxy(tmp_path / "live", kit, "-w", str(saved)) as proxy:
        for path, body in requests()[:11]:
            post(llm.url + path, body, proxy)
        proxy.stop()
    live = turns(tmp_path / "live" / "metaclaw")
    metaclaw("import", str(saved))
    imported = turns(tmp_path / "metaclaw")
    same = ("flow_id", "content_key", "kind", "dialect", "model", "prompt_tip", "response_tip", "injected", "user_text", "assistant_text")
    assert [[row[f] for f in same] for row in imported] == [[row[f] for f in same] for row in live]
    assert roots(tmp_path / "metaclaw") == roots(tmp_path / "live" / "metaclaw")


@pytest.mark.slow
def test_a_compressed_request_is_recorded_as_what_the_client_said(tmp_path, kit, metaclaw):  # noqa: F811
    """It is sent on as identity with the block in it; what is recorded are the client's own bytes, searched for secrets."""
    saved, body = tmp_path / "saved.mitm", gzip.compress(chat(f"{GIT} My key is {SECRET}", stream=True))
    with ScriptedLLM() as llm, quiet_proxy(tmp_path, kit, "-w", str(saved)) as proxy:
        url = llm.url + "/v1/chat/completions"
        post(url, body, proxy, headers=headers_for(url, body, ("Content-Encoding", "gzip")))
        proxy.stop()
    (row,) = turns(tmp_path / "metaclaw")
    assert (row["state"], row["injected"]) == ("captured", ["git-rebase-conflicts"])
    assert row["user_text"] == f"{GIT} My key is [redacted:anthropic-key]"
    (report,) = [json.loads(line) for line in metaclaw("import", "--json", str(saved)).stdout.splitlines()]
    assert (report["new"], report["known"]) == (0, 1)
