"""What mitmproxy's own -w and hardump hold while ``metaclaw_redact_dumps`` is on, and what agent and LLM get."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from e2e_tools import Proxy
from live_tools import Kit, connection, eventually, kit, post, prepare, quiet_proxy  # noqa: F401 - a fixture
from mitmproxy.io import FlowReader
from test_start import started

from metaclaw_core.testing import Received, Script, ScriptedLLM
from metaclaw_core.wire import by_name

SCRIPT = """
from metaclaw_core.proxy.addon import MetaClaw
from metaclaw_core.proxy.dumps import RedactDumps
metaclaw = MetaClaw(worker=False)
addons = [metaclaw, RedactDumps(lambda: metaclaw.redacts_dumps)]
"""
CANARY = "CanaryCanaryCanary0123456789"
KEY = f"sk-proj-{CANARY}"
HEADERS = [
    ("authorization", f"Bearer {CANARY}"),
    ("X-Api-Key", CANARY),
    ("cookie", f"session={CANARY}"),
    ("x-goog-api-key", CANARY),
    ("referer", f"http://example.test/?token={CANARY}"),
    ("x-custom", KEY),
    ("content-type", "application/json"),
]


def answer(received: Received) -> Script:
    """A secret in the answer's headers and body; on /files a body of no LLM."""
    if received.path.startswith("/files"):
        return Script(raw=json.dumps({"file": KEY}).encode(), headers={"set-cookie": f"sid={CANARY}"})
    if received.path.startswith("/slow"):
        return Script(first_after=60)
    return Script(text=f"Your key is {KEY}.", pieces=8, headers={"set-cookie": f"sid={CANARY}"})


def said(body: bytes) -> str:
    """The text of a chat completion, of a stream's deltas put together."""
    if not body.startswith(b"data:"):
        return body.decode()
    parser = by_name("openai_chat").stream_parser()
    parser.feed(body)
    message = parser.finish().message
    return message.text if message is not None else ""


def body(*, stream: bool) -> bytes:
    return json.dumps({"model": "m", "stream": stream, "messages": [{"role": "user", "content": f"my key: {KEY}"}]}).encode()


@pytest.fixture(params=["on", "off"])
def played(request: pytest.FixtureRequest, tmp_path: Path, kit: Kit) -> Iterator[tuple[bool, ScriptedLLM, list[Path]]]:  # noqa: F811
    """A chat, a stream, a gzipped chat and a file, all with secrets; the proxy has ended. (setting, the LLM, the dumps)"""
    on = request.param == "on"
    dumps = [tmp_path / "flows.mitm", tmp_path / "flows.har"]
    options = ("-w", str(dumps[0]), "--set", f"hardump={dumps[1]}", *(("--set", "metaclaw_redact_dumps=true") if on else ()))
    with ScriptedLLM(answer) as llm:
        with quiet_proxy(tmp_path, kit, *options, script=SCRIPT) as proxy:
            url = f"{llm.url}/v1/chat/completions?key={CANARY}"
            gzipped = gzip.compress(body(stream=False), mtime=0)
            sent = [(url, body(stream=False)), (url, body(stream=True)), (url, gzipped), (f"{llm.url}/files/1", body(stream=False))]
            for place, content in sent:
                encoding = [("content-encoding", "gzip")] if content is gzipped else []
                headers = [*HEADERS, *encoding, ("host", llm.url.partition("://")[2]), ("content-length", str(len(content)))]
                got = post(place, content, proxy, headers=headers)
                assert KEY in said(got.body)  # the agent gets what the LLM said
                assert ("set-cookie", f"sid={CANARY}") in got.headers
            with closing(_open(proxy, llm)):
                proxy.stop()
        assert [received.body for received in llm.received[:4]] == [content for _, content in sent]
        assert all(received.header("x-api-key") == CANARY for received in llm.received)
        yield on, llm, dumps


def _open(proxy: Proxy, llm: ScriptedLLM) -> HTTPConnection:
    """A request that waits for its answer when the proxy ends; mitmproxy writes it then."""
    client = connection(llm.url, proxy)
    client.request("POST", f"{llm.url}/slow/v1/chat/completions", body(stream=False), dict(HEADERS))
    eventually(lambda: any(received.path.startswith("/slow") for received in llm.received))
    return client


def test_dumps_hold_no_secret_and_everybody_else_gets_everything(played: tuple[bool, ScriptedLLM, list[Path]]) -> None:
    on, _, dumps = played
    assert b"/slow/v1" in dumps[0].read_bytes()
    found = [dump.read_bytes().count(CANARY.encode()) for dump in dumps]
    if on:
        assert found == [0, 0]
        assert [dump.read_bytes().count(b"[redacted:openai-key]") > 6 for dump in dumps] == [True, True]
        with dumps[0].open("rb") as file:
            bodies = [flow.response.get_content() for flow in FlowReader(file).stream() if flow.response is not None]
        assert [said(answer) for answer in bodies if answer.startswith(b"data:")] == ["Your key is [redacted:openai-key]."]
    else:
        assert all(count > 20 for count in found)  # so the search finds them


@pytest.mark.slow
def test_metaclaw_start_redacts_before_mitmproxys_own_writers_too(tmp_path: Path, kit: Kit) -> None:  # noqa: F811
    dump = tmp_path / "flows.mitm"
    options = ("--no-lean", "--set", f"save_stream_file={dump}", "--set", "metaclaw_redact_dumps=true")
    with ScriptedLLM(answer) as llm:
        with started(tmp_path, kit, *options) as proxy:
            content = body(stream=False)
            headers = [*HEADERS, ("host", llm.url.partition("://")[2]), ("content-length", str(len(content)))]
            assert KEY.encode() in post(f"{llm.url}/v1/chat/completions", content, proxy, headers=headers).body
        assert llm.received[0].body == content
    assert (dump.read_bytes().count(CANARY.encode()), dump.read_bytes().count(b"[redacted:openai-key]")) == (0, 3)
