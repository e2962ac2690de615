"""No planted secret reaches our disk, our logs or the models that we ask, while a live proxy and its worker do all they do.

One secret of each shape is planted in each place a secret can be: the system prompt, the human's words, the arguments
of a call (a file's name), what a tool brings, the agent's answers whole and split over many events, an error of the
provider, headers and the query; and in what the judge and the evolver say. Each holds a tag of its own that is looked
for in every file under METACLAW_HOME (databases unpacked, write-ahead logs as they are) and every request of the worker.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zstandard
from e2e_tools import SCRIPT, Proxy, running_proxy
from live_tools import eventually, kit, post, prepare, turns  # noqa: F401 - kit is a fixture

from metaclaw_core.redact import _SHAPES
from metaclaw_core.testing import Received, Script, ScriptedLLM

pytestmark = pytest.mark.slow

SHAPES: dict[str, Callable[[str], str]] = {  # a tag of ten characters → a secret that holds it
    "anthropic": lambda tag: f"sk-ant-api03-{tag}",
    "openai": lambda tag: f"sk-proj-{tag}00",
    "google": lambda tag: f"AIza{tag}",
    "google oauth": lambda tag: f"ya29.{tag}{'x' * 12}",
    "aws": lambda tag: f"AKIA{tag}ABCDEF",
    "aws session": lambda tag: f"ASIA{tag}ABCDEF",
    "github p": lambda tag: f"ghp_{tag}{'x' * 20}",
    "github o": lambda tag: f"gho_{tag}{'x' * 20}",
    "github s": lambda tag: f"ghs_{tag}{'x' * 20}",
    "github u": lambda tag: f"ghu_{tag}{'x' * 20}",
    "github pat": lambda tag: f"github_pat_{tag}{'x' * 20}",
    "gitlab": lambda tag: f"glpat-{tag}{'x' * 10}",
    "slack": lambda tag: f"xoxb-{tag}0000",
    "slack app": lambda tag: f"xapp-{tag}0000",
    "huggingface": lambda tag: f"hf_{tag}{'x' * 12}",
    "tinker": lambda tag: f"tml-{tag}{'x' * 10}",
    "stripe": lambda tag: f"sk_live_{tag}{'x' * 10}",
    "npm": lambda tag: f"npm_{tag}{'x' * 26}",
    "pypi": lambda tag: f"pypi-AgE{tag}{'x' * 20}",
    "telegram": lambda tag: f"777000111:AA{tag}{'x' * 23}",
    "jwt": lambda tag: f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIi{tag}.{tag}xx",
    "pem": lambda tag: f"-----BEGIN RSA PRIVATE KEY-----\n{tag}\nMIIBOgIBAAJB\n-----END RSA PRIVATE KEY-----",
    "bearer": lambda tag: f"Bearer {tag}{'x' * 8}",
}
PLACES = ("system", "human", "name", "result", "whole", "split", "error", "header", "query", "judge", "evolver")
SYSTEM = "<!-- openclaw:attempt:STABLE -->\nYou are a personal assistant running inside OpenClaw.\n<!-- /openclaw:attempt:STABLE -->"
HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie", "proxy-authorization", "x-auth-token", "user-agent")
LESSON = "No. In this repository use pnpm, not npm."
BODY = (
    "When you work in this repository, install and run everything with pnpm. Before you add a dependency, look whether it is "
    "there already. After a change of the lock file run the tests once more and say what changed. Avoid npm and yarn here, "
    "because they write a second lock file that nobody wants to review. "
)


def tag(place: str, number: int = 0) -> str:
    return f"CANARY{PLACES.index(place):02}{number:02}"


def secrets(place: str) -> str:
    """One of each shape."""
    return " ".join(make(tag(place, number)) for number, make in enumerate(SHAPES.values()))


def test_every_shape_that_is_known_is_planted() -> None:
    planted = secrets("human").encode()
    assert [shape.anchor for shape in _SHAPES if shape.anchor not in planted] == []


def agent_llm(received: Received) -> Script:
    last = received.json()["messages"][-1]
    said = str(last["content"])
    if "ERROR" in said:
        return Script(status=401, raw=json.dumps({"error": {"message": f"Incorrect API key: {secrets('error')}"}}).encode())
    if "CALL" in said and last["role"] == "user":
        return Script(tool=("read", {"path": f"/tmp/{secrets('name')}.txt"}))
    if "STREAM" in said:
        return Script(text=f"Here they are: {secrets('split')} Done.", pieces=200)
    return Script(text=f"Understood: {secrets('whole')} Done.")


def learner_llm(received: Received) -> Script:
    """The judge and the evolver, who repeat a secret that only they know."""
    asked = received.json()["messages"]
    if "You keep the skills" not in asked[0]["content"]:
        return Script(text=f"It is fine. {secrets('judge')}\nScore: 1")
    edit = {
        "op": "add",
        "name": "use-pnpm",
        "description": "Use pnpm, never npm, in this repository.",
        "body": BODY + secrets("evolver"),
        "triggers": ["install a package", SHAPES["openai"](tag("evolver"))],
        "evidence": [{"quote": LESSON}],
    }
    return Script(text=json.dumps({"edits": [edit]}))


def converse(proxy: Proxy, llm: ScriptedLLM) -> None:
    """A session with all places in it, and the first turn of the next one, which ends it."""
    url = f"{llm.url}/v1/chat/completions?api_key={SHAPES['openai'](tag('query'))}&x={SHAPES['github p'](tag('query', 1))}"
    planted = [(name, f"{tag('header', n)}-opensesame") for n, name in enumerate(HEADERS)]
    planted[0] = ("authorization", f"Bearer sk-{tag('header')}-opensesame")
    history: list[dict[str, Any]] = []

    def send(*, stream: bool = False) -> None:
        content = json.dumps(
            {"model": "m", "stream": stream, "messages": [{"role": "system", "content": f"{SYSTEM}\n{secrets('system')}"}, *history]}
        ).encode()
        host = llm.url.partition("://")[2]
        head = [("host", host), *planted, ("content-type", "application/json"), ("content-length", str(len(content)))]
        post(url, content, proxy, headers=head)

    def say(text: str, session: str = "s-1", *, stream: bool = False) -> None:
        line = f"\n\nRuntime: agent=main | session=agent:main:main | sessionId={session} | host=h"
        history.append({"role": "user", "content": f"[Wed 2026-11-25 07:24 UTC] {text}" + ("" if history else line)})
        send(stream=stream)

    say(f"Install left-pad. My keys are {secrets('human')}.")
    history.append({"role": "assistant", "content": f"Understood: {secrets('whole')} Done."})
    say(f"{LESSON} CALL")
    call = {"name": "read", "arguments": json.dumps({"path": f"/tmp/{secrets('name')}.txt"})}
    history.append({"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": call}]})
    history.append({"role": "tool", "tool_call_id": "call_1", "content": f"KEYS={secrets('result')}"})
    send()
    history.append({"role": "assistant", "content": f"Understood: {secrets('whole')} Done."})
    say("Show me all of it as a STREAM, please.", stream=True)
    history.append({"role": "assistant", "content": f"Here they are: {secrets('split')} Done."})
    say("And now the ERROR of the provider.")
    history.clear()
    say("A new session begins here.", "s-2")


def texts(path: Path) -> Iterator[bytes]:
    """A file as it lies there, and if it is a database each of its values, unpacked."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"SQLite format 3\0"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in db.execute(f'SELECT * FROM "{table}"'):
                    for value in row:
                        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
                        yield zstandard.decompress(data) if data.startswith(b"\x28\xb5\x2f\xfd") else data


def leaks(home: Path) -> list[tuple[str, bytes]]:
    found = []
    for path in home.rglob("*"):
        if path.is_file():
            for text in texts(path):
                at = text.find(b"CANARY")
                if at >= 0:
                    found.append((str(path.relative_to(home)), text[max(0, at - 60) : at + 40]))
    return found


def test_no_planted_secret_is_in_any_file_or_any_request_of_the_worker(tmp_path: Path, kit: Any) -> None:  # noqa: F811
    prepare(tmp_path, kit)
    with ScriptedLLM(agent_llm) as llm, ScriptedLLM(learner_llm) as learner:
        settings = {
            "METACLAW_PROXY_HOSTS": f"127.0.0.1:{llm.port}",
            "METACLAW_LLM_API_BASE": f"{learner.url}/v1",
            "METACLAW_LLM_MODEL_ID": "judge-1",
            "METACLAW_JUDGE_VOTES": "1",
        }
        options = [part for name, value in settings.items() for part in ("--set", f"{name.lower()}={value}")]
        with running_proxy(tmp_path, "-s", str(SCRIPT), *options) as proxy:
            converse(proxy, llm)
            assert leaks(proxy.home) == []
            eventually(lambda: (proxy.home / "skills/use-pnpm").exists() or any((proxy.home / "skills").glob(".*/use-pnpm")), 60)
            rows = eventually(lambda: _scored(proxy.home), 60)
            assert leaks(proxy.home) == []
            output = proxy.output()
        assert [row["status_code"] for row in rows] == [200, 200, 200, 200, 401, 200]
        assert "CANARY" not in output
        assert leaks(proxy.home) == []
        sent = [b"\n".join((m.path.encode(), repr(m.headers).encode(), m.body)) for m in learner.received]
        assert any(b"You keep the skills" in request for request in sent)
        assert any(b"[redacted:telegram-token]" in request for request in sent)
        assert [request[request.find(b"CANARY") - 60 :][:100] for request in sent if b"CANARY" in request] == []
        received = b"".join(m.body for m in llm.received)
        for place in ("system", "human", "name", "result", "whole", "split"):  # the agent's own traffic is whole
            assert all(tag(place, number).encode() in received for number in range(len(SHAPES)))


def _scored(home: Path) -> list[dict[str, Any]] | None:
    """All turns, once the four answered ones of the first session are scored."""
    rows = turns(home)
    return rows if len(rows) == 6 and sum(row["state"] == "scored" for row in rows) >= 3 else None
