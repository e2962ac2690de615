"""The live proxy: a real mitmdump with the addon between a client and a scripted LLM."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
from e2e_tools import ROOT, SCRIPT, environment, free_port, running_proxy
from live_tools import (  # kit is a fixture
    AUTH,
    GIT,
    QUIET,
    chat,
    connection,
    control,
    descendants,
    eventually,
    headers_for,
    kit,  # noqa: F401
    post,
    prepare,
    quiet_proxy,
    turns,
    workers,
)
from mitmproxy import http as mitm
from mitmproxy import io as mitm_io

from metaclaw_core.skills.indexfile import load_index
from metaclaw_core.testing import Script, ScriptedLLM
from metaclaw_core.wire import find_route, splice

pytestmark = pytest.mark.slow

SYSTEM = "You are a tester.\\nBe brief."
REQUESTS = {
    "openai_chat": (
        "/v1/chat/completions",
        b'{ "model":"m", "seed":12345678901234567890123, "messages":[ {"role":"system","content":"%s"},'
        b'{"role":"user","content":"%s"} ]%s}',
        b',"stream":true',
    ),
    "openai_responses": (
        "/v1/responses",
        b'{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"%(q)s"}]}], "instructions":"%(s)s"%(x)s}',
        b',"stream":true',
    ),
    "anthropic": (
        "/v1/messages?beta=true",
        b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"%(q)s"}],'
        b'"system":[{"type":"text","text":"%(s)s","cache_control":{"type":"ephemeral"}}]%(x)s}',
        b',"stream":true',
    ),
    "gemini": (
        "/v1beta/models/m:generateContent",
        b'{"contents":[{"role":"user","parts":[{"text":"%(q)s"}]}],"systemInstruction":{"parts":[{"text":"%(s)s"}]}%(x)s}',
        b"",
    ),
    "ollama": (
        "/api/chat",
        b'{"model":"m","messages":[{"role":"system","content":"%(s)s"},{"role":"user","content":"%(q)s"}]%(x)s}',
        b',"stream":true',
    ),
}


def request_of(dialect: str, stream: bool) -> tuple[str, bytes]:
    path, template, flag = REQUESTS[dialect]
    extra = flag if stream else (b',"stream":false' if dialect == "ollama" else b"")
    if dialect == "openai_chat":
        return path, template % (SYSTEM.encode(), GIT.encode(), extra)
    if dialect == "gemini" and stream:
        path = path.replace(":generateContent", ":streamGenerateContent?alt=sse")
    return path, template % {b"s": SYSTEM.encode(), b"q": GIT.encode(), b"x": extra}


@pytest.fixture(scope="module")
def llms(kit):  # noqa: F811
    def answer(_):
        return Script(text="The answer is yes, in five pieces.", pieces=5, headers={"X-Request-Id": "r-1"})

    with ScriptedLLM(answer) as plain, ScriptedLLM(answer, tls=kit.tls()) as secret:
        yield {"http": plain, "https": secret}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory, kit):  # noqa: F811
    """One proxy without a worker for the tests that look at traffic only."""
    with quiet_proxy(tmp_path_factory.mktemp("proxy"), kit, "--set", "metaclaw_proxy_max_body_mb=1") as running:
        yield running
    log = running.output()
    assert "Traceback" not in log
    assert "failed; the flow passes" not in log


def without_length(headers):
    return [(name, value) for name, value in headers if name.lower() != "content-length"]


def taken_out(dialect: str, path: str, body: bytes) -> tuple[bytes, str]:
    """The body without our block, and the block."""
    found = find_route("POST", path)
    assert found is not None
    assert found[0].name == dialect
    removed = splice.remove(body, found[0].system_slot(body))
    assert removed is not None
    return removed


# --- rewriting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("dialect", list(REQUESTS))
def test_upstream_gets_the_clients_bytes_plus_one_block_and_the_client_the_same_answer(
    proxy, llms, kit, dialect, scheme, stream  # noqa: F811
):
    llm = llms[scheme]
    path, body = request_of(dialect, stream)
    url = llm.url + path
    direct = post(url, body, ca=kit.ca)
    answer = post(url, body, proxy, ca=kit.mitm_ca)
    received = llm.received[-1]
    original, text = taken_out(dialect, path, received.body)
    assert original == body
    assert text.startswith("<metaclaw-skills>\n## Skills for this conversation\n\n")
    assert "### git-rebase-conflicts" in text
    assert received.body.count(b"<metaclaw-skills>") == 1
    sent = headers_for(url, body)
    assert without_length(received.headers) == without_length(sent)
    assert [name for name, _ in received.headers] == [name for name, _ in sent]
    assert received.header("content-length") == str(len(received.body))
    assert received.header("authorization") == AUTH
    assert received.path == path
    assert (answer.status, answer.headers, answer.body) == (direct.status, direct.headers, direct.body)


def test_a_compressed_request_is_sent_as_identity_with_the_block_in_it(proxy, llms):
    llm = llms["http"]
    url, body = llm.url + "/v1/chat/completions", chat(GIT)
    packed = gzip.compress(body)
    post(url, packed, proxy, headers=headers_for(url, packed, ("Content-Encoding", "gzip")))
    received = llm.received[-1]
    assert received.header("content-encoding") is None
    assert received.header("content-length") == str(len(received.body))
    assert taken_out("openai_chat", received.path, received.body)[0] == body


@pytest.mark.parametrize(
    ("body", "more", "counter"),
    [
        (chat(GIT + "x" * (1 << 20)), (), "passed: body over the limit"),
        (b'{"messages": [nonsense', (), "passed: not a request of its dialect"),
        (b"\x00\xff not JSON", (), "passed: not a request of its dialect"),
        (chat(GIT), (("Content-Encoding", "x-strange"),), "passed: content-encoding can't be undone"),
        (gzip.compress(chat(GIT))[:-9], (("Content-Encoding", "gzip"),), "passed: content-encoding can't be undone"),
        (gzip.compress(chat(GIT + "x" * (2 << 20))), (("Content-Encoding", "gzip"),), "passed: content-encoding can't be undone"),
        (b'{"messages":[],' + chat(GIT)[1:], (), "passed: no proven place for a block"),
        (chat(GIT), (("X-MetaClaw", "off"),), "bypassed"),
    ],
    ids=["large", "broken", "binary", "unknown encoding", "cut gzip", "gzip bomb", "duplicate key", "x-metaclaw"],
)
def test_what_can_not_be_rewritten_passes_byte_for_byte_and_is_counted(proxy, llms, body, more, counter):
    llm = llms["http"]
    url = llm.url + "/v1/chat/completions"
    before = control(proxy)["counters"].get(counter, 0)
    sent = headers_for(url, body, *more)
    assert post(url, body, proxy, headers=sent).status == 200
    received = llm.received[-1]
    assert received.body == body
    assert list(received.headers) == [header for header in sent if header[0] != "X-MetaClaw"]
    assert control(proxy)["counters"][counter] == before + 1


def test_other_paths_pass_with_their_headers_as_they_are(proxy, llms):
    llm = llms["http"]
    url = llm.url + "/v1/embeddings"
    sent = headers_for(url, b"{}", ("X-MetaClaw", "off"))
    post(url, b"{}", proxy, headers=sent)
    assert list(llm.received[-1].headers) == sent


def test_a_chunked_request_stays_chunked(proxy, llms):
    llm = llms["http"]
    client = connection(llm.url, proxy)
    body = chat(GIT)
    head = {"Host": llm.url[7:], "Content-Type": "application/json"}
    client.request("POST", llm.url + "/v1/chat/completions", iter([body[:40], body[40:]]), head, encode_chunked=True)
    assert client.getresponse().status == 200
    client.close()
    received = llm.received[-1]
    assert received.header("transfer-encoding") == "chunked"
    assert received.header("content-length") is None
    assert taken_out("openai_chat", received.path, received.body)[0] == body


def test_bypass_by_the_control_socket_passes_everything_and_still_records(proxy, llms):
    llm = llms["http"]
    url, body = llm.url + "/v1/chat/completions", chat(GIT)
    exchanges = control(proxy)["counters"].get("exchanges", 0)
    assert control(proxy, "bypass", value="on") == {"bypass": True}
    try:
        post(url, body, proxy)
        assert llm.received[-1].body == body
        assert control(proxy)["bypass"] is True
    finally:
        assert control(proxy, "bypass", value="off") == {"bypass": False}
    post(url, body, proxy)
    assert llm.received[-1].body != body
    assert control(proxy)["counters"]["exchanges"] == exchanges + 2
    assert control(proxy, "bypass", value="maybe") == {"error": "bypass takes on or off"}


def websocket(proxy, llm) -> bytes:
    """The first line that comes back to an upgrade on /v1/responses."""
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as client:
        head = (
            f"GET {llm.url}/v1/responses HTTP/1.1\r\nHost: {llm.url[7:]}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        client.sendall(head.encode())
        return client.makefile("rb").readline()


def test_a_websocket_upgrade_is_refused_so_that_the_client_falls_back_to_http(proxy, llms):
    llm = llms["http"]
    count = len(llm.received)
    assert websocket(proxy, llm).startswith(b"HTTP/1.1 426 ")
    assert len(llm.received) == count
    assert control(proxy)["counters"]["websocket: fallback"] == 1


def test_a_websocket_upgrade_passes_where_the_user_says_so(tmp_path, kit, llms):  # noqa: F811
    with quiet_proxy(tmp_path, kit, "--set", "metaclaw_websocket=pass") as proxy:
        llm = llms["http"]
        assert websocket(proxy, llm).startswith(b"HTTP/1.1 200 ")
        assert llm.received[-1].header("upgrade") == "websocket"


def test_two_proxies_in_a_row_inject_once(tmp_path, kit, llms, proxy):  # noqa: F811
    llm = llms["http"]
    with quiet_proxy(tmp_path, kit, "--mode", f"upstream:{proxy.url}") as first:
        post(llm.url + "/v1/chat/completions", chat(GIT), first)
        assert llm.received[-1].body.count(b"<metaclaw-skills>") == 1
        assert control(first)["counters"]["injected"] == 1
    assert control(proxy)["counters"]["passed: injected already"] == 1


REPLAY = """
from mitmproxy import ctx
class Replay:
    def running(self):
        ctx.master.event_loop.call_later(0.3, ctx.master.commands.call, "replay.client.file", {path!r})
addons.append(Replay())
"""


def test_a_replayed_capture_is_sent_as_it_was_injected_the_first_time(tmp_path, kit, llms):  # noqa: F811
    llm = llms["http"]
    saved = tmp_path / "saved.mitm"
    with quiet_proxy(tmp_path, kit, "-w", str(saved)) as proxy:
        post(llm.url + "/v1/chat/completions", chat(GIT), proxy)
    first = llm.received[-1].body
    count = len(llm.received)
    with quiet_proxy(tmp_path, kit, script=QUIET + REPLAY.format(path=str(saved))) as proxy:
        assert eventually(lambda: control(proxy)["counters"].get("passed: injected already")) == 1
        eventually(lambda: control(proxy)["counters"].get("exchanges"))
    assert len(llm.received) == count + 1
    assert llm.received[-1].body == first
    assert first.count(b"<metaclaw-skills>") == 1


# --- the same bytes for a whole session ------------------------------------------------------------

TOPICS = (
    GIT,
    "Now write a bash script with set -euo pipefail that is safe with spaces in file names.",
    "And how should I design the REST API, with pagination and error codes?",
    "Please review the SQL query: it is slow, which index do I need?",
)


def session_body(upto: int, loop: bool = False) -> bytes:
    """The conversation up to human turn `upto`; with `loop` a tool call after it."""
    messages = [{"role": "system", "content": "You are a coder."}]
    for n, text in enumerate(TOPICS[: upto + 1]):
        messages += [{"role": "assistant", "content": "done"}] if n else []
        messages.append({"role": "user", "content": text})
    if loop:
        call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": "{}"}}
        messages += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "x"}]
    return json.dumps({"model": "m", "messages": messages}).encode()


def test_a_session_keeps_its_block_through_tool_loops_and_restarts_and_appends_twice_at_most(tmp_path, kit, llms):  # noqa: F811
    llm = llms["http"]
    url = llm.url + "/v1/chat/completions"

    def block(proxy, body: bytes) -> str:
        post(url, body, proxy)
        original, text = taken_out("openai_chat", "/v1/chat/completions", llm.received[-1].body)
        assert original == body
        return text.removesuffix("\n</metaclaw-skills>")

    blocks = []
    for n in range(len(TOPICS)):
        with quiet_proxy(tmp_path, kit) as proxy:  # a restart between any two human turns
            if n:
                assert block(proxy, session_body(n - 1, loop=True)) == blocks[-1]
            blocks.append(block(proxy, session_body(n)))
            assert block(proxy, session_body(n, loop=True)) == blocks[-1]
            assert block(proxy, session_body(n)) == blocks[-1]  # a retry
            if n % 2:
                control(proxy, "flush")
                proxy.process.kill()
    assert all(later.startswith(earlier) for earlier, later in pairwise(blocks))
    assert len(set(blocks)) == 3


# --- streams and connections -----------------------------------------------------------------------


def chunks_of(url: str, body: bytes, proxy) -> tuple[float, list[tuple[float, bytes]]]:
    """(seconds to the head, [(seconds, chunk)]) as HTTP/1.1 frames them on the wire."""
    port = proxy.port if proxy else int(url.split("/")[2].partition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        head = f"POST {url} HTTP/1.1\r\nHost: {url.split('/')[2]}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        start = time.monotonic()
        client.sendall(head.encode() + body)
        file = client.makefile("rb")
        while file.readline() != b"\r\n":
            pass
        headed = time.monotonic() - start
        chunks = []
        while size := int(file.readline(), 16):
            data = file.read(size + 2)[:-2]
            chunks.append((time.monotonic() - start, data))
        return headed, chunks


def test_every_event_of_a_stream_arrives_as_one_chunk_and_none_waits_for_the_end(proxy):
    script = Script(text="word " * 60, pieces=60, first_after=0.3, every=0.015)
    with ScriptedLLM(lambda _: script) as llm:
        url, body = llm.url + "/v1/chat/completions", chat(GIT, stream=True)
        _, direct = chunks_of(url, body, None)
        headed, through = chunks_of(url, body, proxy)
    assert [data for _, data in through] == [data for _, data in direct]
    assert len(through) == 63
    first, last = through[0][0], through[-1][0]
    assert headed < 0.3
    assert 0.25 < first < 0.7
    assert last >= 0.3 + 62 * 0.015 - 0.05
    middle = through[31][0]
    assert first + 0.2 < middle < last - 0.2


def test_an_open_connection_is_used_again_in_both_directions(proxy):
    ports: list[int] = []

    class Counting(ScriptedLLM):
        async def _serve(self, reader, writer):
            ports.append(writer.get_extra_info("peername")[1])
            await super()._serve(reader, writer)

    with Counting(lambda r: Script(every=0.001)) as llm:
        url = llm.url + "/v1/chat/completions"
        client = connection(url, proxy)
        for n in range(6):
            body = chat(GIT, stream=n % 2 == 1)
            assert post(url, body, proxy, over=client).status == 200
        client.close()
        assert len(llm.received) == 6
    assert len(ports) == 1


def test_a_client_that_leaves_in_the_middle_of_a_stream_leaves_a_partial_turn(tmp_path, kit):  # noqa: F811
    script = Script(text="word " * 50, pieces=50, every=0.05)
    with ScriptedLLM(lambda _: script) as llm, quiet_proxy(tmp_path, kit) as proxy:
        url, body = llm.url + "/v1/chat/completions", chat(GIT, stream=True)
        client = connection(url, proxy)
        client.request("POST", url, body, {"Content-Type": "application/json"})
        response = client.getresponse()
        response.read(600)
        client.sock.close() if client.sock else None
        response.close()
        client.close()
        eventually(lambda: control(proxy)["open_requests"] == 0)
        # One that leaves before the answer has begun, and one that leaves in the middle of its own request.
        for part in (body, body[:30]):
            with socket.create_connection(("127.0.0.1", proxy.port), 10) as raw:
                head = f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                raw.sendall(head.encode() + part)
                eventually(lambda: control(proxy)["open_requests"] == 1)
            eventually(lambda: control(proxy)["open_requests"] == 0)
    rows = turns(tmp_path / "metaclaw")
    assert {row["state"] for row in rows} == {"skipped"}
    assert rows[0]["reason"] == "response cut"
    assert rows[0]["assistant_text"].startswith("word word")
    assert len(rows[0]["assistant_text"]) < 240
    assert len(rows) == 3


def test_a_stream_that_the_end_of_the_proxy_cuts_off_is_recorded_as_cut(tmp_path, kit):  # noqa: F811
    script = Script(text="word " * 50, pieces=50, every=0.05)
    with ScriptedLLM(lambda _: script) as llm, quiet_proxy(tmp_path, kit) as proxy:
        url, body = llm.url + "/v1/chat/completions", chat(GIT, stream=True)
        client = connection(url, proxy)
        client.request("POST", url, body, {"Content-Type": "application/json"})
        client.getresponse().read(600)
        proxy.stop()
        client.close()
    (row,) = turns(tmp_path / "metaclaw")
    assert (row["state"], row["reason"]) == ("skipped", "response cut")
    assert row["assistant_text"].startswith("word word")


class Oddities(ScriptedLLM):
    """Answers byte for byte what is scripted by the model's name."""

    ANSWERS: ClassVar = {
        "401": b"HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nContent-Length: 23\r\nX-Odd: 1\r\n\r\n"
        b'{"error":{"code":"401"}',
        "429": b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 2\r\nContent-Length: 2\r\n\r\n{}",
        "503": b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\nbusy",
        "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "204": b"HTTP/1.1 204 No Content\r\n\r\n",
        "until close": b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"choices":[]}',
        "sse with length": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 14\r\n\r\ndata: [DONE]\n\n",
        "cut length": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        "cut chunk": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n20\r\nx",
        "reset": b"",
        "no http": b"SMTP ready\r\n\r\n",
    }

    async def _serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1])
        body = json.loads(await reader.readexactly(length))
        writer.write(self.ANSWERS[body["model"]])
        await writer.drain()
        writer.close()


def raw_answer(port: int, url: str, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        head = f"POST {url} HTTP/1.1\r\nHost: {url.split('/')[2]}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        data = b""
        try:
            while piece := client.recv(65536):
                data += piece
        except ConnectionResetError:
            data += b"<reset>"
        return data


def test_errors_resets_and_odd_answers_reach_the_client_as_through_a_bare_mitmdump(tmp_path, kit, proxy):  # noqa: F811
    stream = tmp_path / "stream.py"
    stream.write_text("def responseheaders(flow):\n    flow.response.stream = 'content-length' not in flow.response.headers\n")
    with Oddities() as llm, running_proxy(tmp_path, "-s", str(stream)) as bare:
        url = llm.url + "/v1/chat/completions"
        for model in Oddities.ANSWERS:
            body = chat(GIT).replace(b'"m"', json.dumps(model).encode())
            expected = raw_answer(bare.port, url, body)
            found = raw_answer(proxy.port, url, body)
            if model not in ("reset", "no http", "cut length"):
                assert found == expected, model
            else:  # mitmproxy's own page names a client port
                assert found.split(b"\r\n")[0] == expected.split(b"\r\n")[0] == b"HTTP/1.1 502 Bad Gateway", model
    assert eventually(lambda: control(proxy)["open_requests"] == 0)


def test_an_unreachable_upstream_is_a_502_and_leaves_nothing_behind(proxy):
    url = f"http://127.0.0.1:{free_port()}/v1/chat/completions"
    assert post(url, chat(GIT), proxy).status == 502
    assert control(proxy)["open_requests"] == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_an_http2_client_gets_its_stream_and_upstream_the_block(tmp_path, kit, llms):  # noqa: F811
    llm = llms["https"]
    body = chat(GIT, stream=True)
    with quiet_proxy(tmp_path, kit, "--set", "connection_strategy=lazy") as proxy:
        curl = ["curl", "-sS", "--http2", "--cacert", str(kit.mitm_ca), "-x", proxy.url, "-w", "%{http_version}", "--data-binary", "@-"]
        line = [*curl, "-H", f"Authorization: {AUTH}", "-H", "Content-Type: application/json"]
        url = llm.url + "/v1/chat/completions"
        result = subprocess.run([*line, url, url], input=body, capture_output=True, timeout=30)
        assert result.returncode == 0, result.stderr
        assert control(proxy)["counters"]["injected"] >= 1
        assert control(proxy)["open_requests"] == 0
    direct = post(url, body, ca=kit.ca)
    assert result.stdout.startswith(direct.body + b"2")
    assert taken_out("openai_chat", "/v1/chat/completions", llm.received[-3].body)[0] == body


# --- life ------------------------------------------------------------------------------------------


def test_the_script_can_be_saved_while_a_stream_is_running(tmp_path, kit):  # noqa: F811
    addons = tmp_path / "addons"
    addons.mkdir()
    (tmp_path / "metaclaw_core").symlink_to(ROOT / "metaclaw_core")
    script = Path(shutil.copy(SCRIPT, addons / "metaclaw.py"))
    prepare(tmp_path, kit)
    text = "word " * 60
    scripts = [Script(text=text, pieces=60, every=0.0), Script(text=text, pieces=60, every=0.05)]
    with ScriptedLLM(lambda _: scripts.pop()) as llm, running_proxy(tmp_path, "-s", str(script)) as proxy:
        old = eventually(lambda: control(proxy)["children"][0]["pid"])
        url, body = llm.url + "/v1/chat/completions", chat(GIT, stream=True)
        client = connection(url, proxy)
        client.request("POST", url, body, {"Content-Type": "application/json"})
        response = client.getresponse()
        answer = response.read(300)
        for n in (1, 2):  # twice in a row: the second finds the first still starting
            os.utime(script, (time.time() + n, time.time() + n))
            eventually(lambda n=n: proxy.output().count("Loading script") == n + 1)
        answer += response.read()
        client.close()
        assert answer == post(url, body, proxy).body
        status = control(proxy)
        assert status["counters"]["exchanges"] == 2
        assert status["counters"]["injected"] == 2
        assert status["children"][0]["pid"] != old
        assert control(proxy, "bypass", value="on") == {"bypass": True}
        time.sleep(2.5)  # past the predecessors' grace
        eventually(lambda: workers(proxy.home) == [control(proxy)["children"][0]["pid"]])
        assert control(proxy, "bypass", value="off") == {"bypass": False}
        log = proxy.output()
    assert not [line for line in log.splitlines() if "rror" in line or "Traceback" in line], log
    assert [row["assistant_text"] for row in turns(proxy.home)] == ["word " * 60] * 2


SKILL = """---
name: {name}
description: How we water the {plant} in the greenhouse.
---
Water the {plant} at dawn.
"""


def test_options_reach_the_worker_and_a_changed_configuration_reaches_it_on_reload(tmp_path, kit, llms):  # noqa: F811
    home = prepare(tmp_path, kit)
    for name in ("orchids", "cacti"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "SKILL.md").write_text(SKILL.format(name=name, plant=name))
    url, body = llms["http"].url + "/v1/chat/completions", chat("How do we water the orchids in the greenhouse?")
    with running_proxy(tmp_path, "-s", str(SCRIPT), "--set", f"metaclaw_skills_dir={tmp_path / 'orchids'}") as proxy:
        eventually(lambda: load_index(home / "skills.index").skill("orchids"), 30)  # by the worker
        eventually(lambda: control(proxy)["skills"]["generation"] == load_index(home / "skills.index").generation)
        post(url, body, proxy)
        assert b"### orchids" in llms["http"].received[-1].body
        first = control(proxy)["children"][0]["pid"]
        (home / "config.yaml").write_text(f"skills:\n  extra_dirs: [{tmp_path / 'cacti'}]\n")
        assert control(proxy, "reload") == {"reloaded": True}
        eventually(lambda: load_index(home / "skills.index").skill("cacti"), 30)
        assert load_index(home / "skills.index").skill("orchids")
        child = control(proxy)["children"][0]
        assert child["pid"] != first
        assert child["restarts"] == 0
        (home / "config.yaml").write_text("skills: {top_k: 999}")
        assert "skills.top_k = 999 is not allowed" in control(proxy, "reload")["error"]
        assert control(proxy)["children"][0]["pid"] == child["pid"]


@pytest.mark.parametrize("question", ["--options", "--commands"])
def test_asking_for_options_or_commands_starts_nothing(tmp_path, question):
    home = tmp_path / "metaclaw"
    tool = Path(sys.executable).with_name("mitmdump")
    result = subprocess.run([tool, "-s", SCRIPT, question], env=environment(home), capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    if question == "--options":
        assert "metaclaw_top_k" in result.stdout
    assert not home.exists()
    assert descendants(home) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_proxy_and_everything_at_home_is_private(tmp_path, kit, llms, number):  # noqa: F811
    llm = llms["http"]
    prepare(tmp_path, kit)
    old = os.umask(0)
    try:
        with running_proxy(tmp_path, "-s", str(SCRIPT)) as proxy:
            eventually(lambda: workers(proxy.home))
            post(llm.url + "/v1/chat/completions", chat(GIT), proxy)
            eventually(lambda: (proxy.home / "store.db").exists())
            control(proxy, "flush")
            proxy.process.send_signal(number)
            proxy.process.wait(15)
    finally:
        os.umask(old)
    eventually(lambda: not descendants(proxy.home))
    if number != signal.SIGKILL:
        assert list((proxy.home / "run").glob("*.sock")) == []
        assert list((proxy.home / "run").glob("*.json")) == []
    (proxy.home / "skills.index").chmod(0o600)  # copied here by this test
    modes = {str(path): path.stat().st_mode & 0o777 for path in proxy.home.rglob("*") if not path.is_socket()}
    assert {path: oct(mode) for path, mode in modes.items() if mode not in ((0o700,) if Path(path).is_dir() else (0o600,))} == {}
    assert len(turns(proxy.home)) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("metaclaw_top_kk=3", "metaclaw_top_kk=3 is not a known option. Did you mean metaclaw_top_k?"),
        ("metaclaw_top_k=lots", "skills.top_k = 'lots' is not allowed (from --set or a flag): Input should be a valid integer"),
        ("metaclaw_skills_top_k=999", "skills.top_k = 999 is not allowed (from --set or a flag): Input should be less than or equal to 50."),
        ("metaclaw_mode=magic", "mode = 'magic' is not allowed (from --set or a flag): Input should be 'skills_only' or 'rl'."),
        (None, "config.yaml is not valid YAML in line 2: "),
    ],
)
def test_a_bad_setting_ends_mitmdump_with_one_sentence(tmp_path, setting, message):
    home = tmp_path / "metaclaw"
    home.mkdir()
    if setting is None:
        (home / "config.yaml").write_text("skills: [\n")
    tool = Path(sys.executable).with_name("mitmdump")
    line = [str(tool), "--listen-host", "127.0.0.1", "-p", str(free_port()), "-s", str(SCRIPT), "--set", f"confdir={tmp_path / 'c'}"]
    result = subprocess.run(
        [*line, *(["--set", setting] if setting else [])], env=environment(home), capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 1
    text = result.stdout + result.stderr
    assert message in text
    assert "Traceback" not in text
    assert text.count("metaclaw: ") == 1
    assert descendants(home) == {}


# --- what people see -------------------------------------------------------------------------------


def test_comment_view_and_saved_flows_show_what_was_added_and_keep_streamed_answers(tmp_path, kit, llms):  # noqa: F811
    llm = llms["http"]
    saved, har = tmp_path / "saved.mitm", tmp_path / "saved.har"
    with quiet_proxy(tmp_path, kit, "-w", str(saved), "--set", f"hardump={har}", "--set", "flow_detail=3") as proxy:
        url, body = llm.url + "/v1/chat/completions", chat(GIT, stream=True)
        answer = post(url, body, proxy, headers=headers_for(url, body, ("originator", "codex"), ("session_id", "s-1234567890")))
        eventually(lambda: "[user]" in proxy.output())
        shown = proxy.output()
        proxy.stop()
    for line in (
        "openai_chat  model m  stream",
        "kind: main",
        "session: s-1234567890",
        "skills: git-rebase-conflicts",
        "--- text added by metaclaw ---",
        "### git-rebase-conflicts",
        f"{GIT}",
    ):
        assert line in shown, line
    with saved.open("rb") as file:
        (flow,) = mitm_io.FlowReader(file).stream()
    assert isinstance(flow, mitm.HTTPFlow)
    assert flow.comment == "metaclaw: main s-123456 + git-rebase-conflicts"
    assert flow.response is not None
    assert flow.response.raw_content == answer.body
    (entry,) = json.loads(har.read_text())["log"]["entries"]
    assert entry["response"]["content"]["text"] == answer.body.decode()
    assert "### git-rebase-conflicts" in entry["request"]["postData"]["text"]


def rss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def test_memory_stays_below_150_mb_through_two_thousand_requests(tmp_path, kit, llms):  # noqa: F811
    llm = llms["http"]
    with quiet_proxy(tmp_path, kit) as proxy:
        url = llm.url + "/v1/chat/completions"
        client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        for n in range(2000):
            body = chat(f"{GIT} Number {n}.", stream=n % 2 == 0, metadata={"filler": "x" * 20_000})
            client.request("POST", url, body, {"Content-Type": "application/json"})
            client.getresponse().read()
        client.close()
        llm.received.clear()
        status = control(proxy, "status")
        assert control(proxy, "flush") == {"flushed": True}
        assert status["open_requests"] == 0
        assert status["counters"]["exchanges"] == 2000
        assert rss_mb(proxy.process.pid) < 150


def test_the_quiet_script_is_the_shipped_one_without_its_worker():
    assert "MetaClaw(worker=False), TunnelUntrusting()" in QUIET
