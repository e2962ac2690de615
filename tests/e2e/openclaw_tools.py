"""The real OpenClaw behind the real mitmdump, with the kit's scripted LLM behind both.

Design: one gateway, one proxy and one LLM serve many tests, since a gateway takes ten seconds to start. The LLM
runs in the test's own process and keeps the bytes it received; a script named before ours keeps the bytes the
client sent (record_client.py). So "byte for byte" compares two recordings made on the two sides of the proxy.
Everything listens on loopback; the kit's upstream_map.py refuses any other host. No key is real.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, urlsplit

import httpx
from e2e_tools import ROOT, SCRIPT, environment, free_port, wait_for_port

from metaclaw_core.wire import find_route, splice

KIT = ROOT / ".openclaw-kit"
SCRIPTS = Path(os.environ.get("METACLAW_SHARED") or ROOT.parent / "shared") / "openclaw"
LLM_HOSTS = "api.openai.com,api.anthropic.com,generativelanguage.googleapis.com,ollama.com,api.example-llm.com"
OPENCLAW = str(KIT / "node_modules/.bin/openclaw")
TOKEN = "fake-gateway-token"
MARK = b"metaclaw-skills"
KEYS = {
    "OPENAI_API_KEY": "sk-fake-openai-0000",
    "ANTHROPIC_API_KEY": "sk-ant-api03-fake-0000",
    "GEMINI_API_KEY": "AIzaFake0000",
}

type Script = Callable[[ModuleType, list[Any], dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One request, as it was on the wire on one side of the proxy."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]  # order and spelling kept
    body: bytes
    dialect: str = ""  # as the scripted LLM names it; "other" for what is no chat
    answered: str = ""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    @property
    def trace(self) -> str | None:
        """The whole traceparent: the span is another one in every request."""
        return self.header("traceparent")

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Pair:
    """A request before and behind the proxy."""

    sent: Message
    got: Message

    @property
    def block(self) -> str | None:
        """The text that the proxy put in; None if it sent the client's bytes. Fails unless all else is the same."""
        mine, theirs = _without(self.sent, "content-length"), _without(self.got, "content-length")
        assert (self.got.method, self.got.path, theirs) == (self.sent.method, self.sent.path, mine)
        assert self.got.header("content-length") == str(len(self.got.body))
        if self.got.body == self.sent.body:
            return None
        at, more = common_prefix(self.sent.body, self.got.body), len(self.got.body) - len(self.sent.body)
        assert more > 0, "the proxy took something away"
        assert self.got.body[at + more :] == self.sent.body[at:], "more than one place differs"
        assert MARK not in self.sent.body
        assert (self.got.body.count(b"<metaclaw-skills>"), self.got.body.count(b"</metaclaw-skills>")) == (1, 1)
        found = find_route(self.got.method, self.got.path)
        assert found is not None
        removed = splice.remove(self.got.body, found[0].system_slot(self.got.body))
        assert removed is not None
        assert removed[0] == self.sent.body
        return removed[1]

    @property
    def has_tools(self) -> bool:
        return bool(self.sent.json().get("tools"))

    def in_session(self, name: str) -> bool:
        return b"session=agent:main:%s |" % name.encode() in self.sent.body


def _without(message: Message, name: str) -> list[tuple[str, str]]:
    return [(key, value) for key, value in message.headers if key.lower() != name]


def common_prefix(a: bytes, b: bytes) -> int:
    """How many first bytes are the same."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class RecordingLLM:
    """The kit's scripted LLM on a plain and a TLS port. `script` is asked first: (the kit, what was said, body) → reply or None.

    `prepare` may change the kit before it serves.
    """

    def __init__(self, script: Script | None = None, prepare: Callable[[ModuleType], None] = lambda kit: None) -> None:
        kit = _kit_llm()
        prepare(kit)
        self.received: list[Message] = []
        received, now = self.received, threading.local()

        class Handler(kit.Handler):  # type: ignore[misc, name-defined]
            def do_POST(self) -> None:
                self.raw = self.rfile.read(int(self.headers.get("content-length") or 0))
                socket, self.rfile = self.rfile, io.BytesIO(self.raw)
                try:
                    super().do_POST()
                finally:
                    self.rfile = socket

            do_GET = do_HEAD = do_PUT = do_DELETE = do_POST

            def chat(self, name: str) -> None:
                now.body = self.body
                super().chat(name)

            def note(self, name: str, status: int, answered: str) -> None:
                headers = tuple((key, value) for key, value in self.headers.items())
                received.append(Message(self.command, self.path, headers, self.raw, name, answered))

        if script is not None:
            own = kit.decide
            kit.decide = lambda turns, tools, trace: script(kit, turns, now.body) or own(turns, tools, trace)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(KIT / "ca/llm.pem", KIT / "ca/llm.key")
        self._servers = [kit.Server(0, None), kit.Server(0, None, tls)]
        for server in self._servers:
            server.RequestHandlerClass = Handler
            server.daemon_threads = True
        self.port, self.tls_port = (server.server_address[1] for server in self._servers)

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _kit_llm() -> ModuleType:
    """A fresh copy of the kit's module, so that one LLM's state is not another's."""
    spec = importlib.util.spec_from_file_location("scripted_llm", SCRIPTS / "scripted_llm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stage:
    """One user: OpenClaw's gateway, the proxy, the LLM. ``with Stage(folder) as stage: stage.say("hello", "example/fake-1", …)``

    Without a gateway: ``with WithoutGateway(folder)`` and `agent`.
    """

    def __init__(self, folder: Path, llm: RecordingLLM, change: Callable[[dict[str, Any]], None] = lambda config: None) -> None:
        """`change` edits OpenClaw's configuration (the kit's) before it starts."""
        self.folder, self.llm = folder, llm
        self.user, self.home, self.state = folder / "user", folder / "metaclaw", folder / "user/.openclaw"
        self.flows, self.client_log = folder / "flows.mitm", folder / "client.jsonl"
        self.said: list[str] = []  # by the human, for the store to be asked about
        self.kinds: list[str] = []  # of the requests that the addon saw, as the tests expect them
        self.proxy_port, self.reverse_port, self.gateway_port = free_port(), free_port(), free_port()
        self._running: list[subprocess.Popen[bytes]] = []
        self._proxy: subprocess.Popen[bytes] | None = None
        self._change = change

    def __enter__(self) -> Self:
        try:
            self.make_home()
            self.start_proxy()
            self.start_gateway()
        except BaseException:
            self.__exit__()
            raise
        return self

    def make_home(self) -> None:
        for path in (self.home, self.state / "workspace", self.folder / "tmp"):
            path.mkdir(parents=True)
        (self.state / "workspace/notes.txt").write_text("remember the milk\n")
        config = json.loads((SCRIPTS / "openclaw.json").read_text())
        config["gateway"]["http"] = {"endpoints": {"chatCompletions": {"enabled": True}}}
        config["models"]["providers"]["ollama"]["baseUrl"] = f"http://127.0.0.1:{self.reverse_port}"
        self._change(config)
        (self.state / "openclaw.json").write_text(json.dumps(config))

    def __exit__(self, *exc: object) -> None:
        for process in reversed(self._running):
            _end(process, 10)

    # --- processes ----------------------------------------------------------------------------

    def start_proxy(self, *, addon: bool = True) -> None:
        """mitmdump, with our script and a capture, or with neither. The index is built before, for the first turn's sake."""
        scripts = [SCRIPTS / "upstream_map.py", ROOT / "tests/e2e/record_client.py", *([SCRIPT] if addon else [])]
        if addon and not (self.home / "skills.index").exists():
            _run([sys.executable, "-m", "metaclaw_core.skills.build"], environment(self.home), self.folder)
        env = environment(self.home) | {
            "KIT_LLM_HOSTS": LLM_HOSTS,
            "LLM_PORT": str(self.llm.port),
            "LLM_TLS_PORT": str(self.llm.tls_port),
        }
        modes = [f"regular@127.0.0.1:{self.proxy_port}", f"reverse:http://127.0.0.1:{self.llm.port}@127.0.0.1:{self.reverse_port}"]
        command = [str(Path(sys.executable).with_name("mitmdump")), "--set", f"confdir={self.folder / 'mitmproxy'}"]
        command += ["--set", f"ssl_verify_upstream_trusted_ca={KIT / 'ca/ca.pem'}", *(["-w", f"+{self.flows}"] if addon else [])]
        command += [part for mode in modes for part in ("--mode", mode)]
        command += [part for script in scripts for part in ("-s", str(script))]
        command += ["--set", f"record_client={self.client_log}"]
        self._proxy = self._start("mitmdump", command, env, self.proxy_port)
        self.wait_for(self._proxy_serves)

    def stop_proxy(self) -> None:
        assert self._proxy is not None
        self._proxy.send_signal(signal.SIGINT)
        self._proxy.wait(20)
        self._running.remove(self._proxy)

    def _proxy_serves(self) -> bool:
        """Is a request answered? mitmdump ends after it has opened its port if a script of it can't be loaded."""
        assert self._proxy is not None
        assert self._proxy.poll() is None, (self.folder / "mitmdump.log").read_text()[-2000:]
        try:
            return httpx.get(f"http://127.0.0.1:{self.reverse_port}/api/version", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def start_gateway(self) -> None:
        self.gateway = self._start("gateway", [OPENCLAW, "gateway", "run"], self.agent_env(), self.gateway_port)

    def agent_env(self, **more: str) -> dict[str, str]:
        """What a user sets, and what the kit's configuration refers to."""
        url = f"http://127.0.0.1:{self.proxy_port}"
        bare = {key: value for key, value in environment(self.home).items() if key != "METACLAW_HOME"}
        return bare | KEYS | {
            "HOME": str(self.user),
            "PATH": f"{KIT / 'node_modules/.bin'}:{os.environ['PATH']}",
            "TMPDIR": str(self.folder / "tmp"),
            "HTTP_PROXY": url,
            "HTTPS_PROXY": url,
            "NODE_EXTRA_CA_CERTS": str(self.folder / "mitmproxy/mitmproxy-ca-cert.pem"),
            "LLM_PORT": str(self.llm.port),
            "OPENCLAW_GATEWAY_PORT": str(self.gateway_port),
            "OPENCLAW_LOG_FILE": str(self.folder / "openclaw.log"),
            "NO_COLOR": "1",
        } | more

    def _start(self, name: str, command: Sequence[str], env: dict[str, str], port: int) -> subprocess.Popen[bytes]:
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=self.folder, start_new_session=True)
        self._running.append(process)
        wait_for_port(port, process, log)
        return process

    # --- what a person does -------------------------------------------------------------------

    def openclaw(self, *arguments: str) -> str:
        """The command line, as a user would type it."""
        return _run([OPENCLAW, *arguments], self.agent_env(), self.user)

    def say(self, text: str, model: str, session: str) -> str:
        self.said.append(text)
        return self.openclaw("agent", "--agent", "main", "--session-key", f"agent:main:{session}", "--model", model, "-m", text)

    def once(self, text: str, model: str, session: str) -> str:
        """Another user, without a gateway, whose proxy is in OPENCLAW_PROXY_URL alone and whose Ollama is in the cloud."""
        self.said.append(text)
        home = self.folder / "other"
        (home / ".openclaw/workspace").mkdir(parents=True)
        (home / ".openclaw/workspace/notes.txt").write_text("remember the milk\n")
        (home / ".openclaw/openclaw.json").write_text((SCRIPTS / "openclaw.json").read_text())
        arguments = ("agent", "--local", "--agent", "main", "--session-key", f"agent:main:{session}", "--model", model, "-m", text)
        env = self.agent_env(HOME=str(home), OPENCLAW_PROXY_URL=f"http://127.0.0.1:{self.proxy_port}")
        return _run([OPENCLAW, *arguments], {k: v for k, v in env.items() if k not in ("HTTP_PROXY", "HTTPS_PROXY")}, home)

    def agent(self, text: str, model: str, session: str, **env: str) -> str:
        """One turn of the same user without a gateway; `env` over what `agent_env` sets."""
        arguments = ("--local", "--agent", "main", "--session-key", f"agent:main:{session}", "--model", model, "-m", text)
        return _run([OPENCLAW, "agent", *arguments], self.agent_env(**env), self.user)

    def call(self, method: str, **parameters: Any) -> None:
        """A method of the gateway, as its own clients call it."""
        self.openclaw("gateway", "call", method, "--params", json.dumps(parameters), "--json")

    def post(self, text: str, model: str, session: str) -> str:
        """The same over the gateway's chat API, which spares the start of the command line."""
        self.said.append(text)
        answer = httpx.post(
            f"http://127.0.0.1:{self.gateway_port}/v1/chat/completions",
            json={"model": "openclaw", "messages": [{"role": "user", "content": text}]},
            headers={
                "authorization": f"Bearer {TOKEN}",
                "x-openclaw-session-key": f"agent:main:{session}",
                "x-openclaw-model": model,
            },
            timeout=90,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        said: str = answer.json()["choices"][0]["message"]["content"]
        return said

    # --- what was seen ------------------------------------------------------------------------

    def sent(self) -> list[Message]:
        if not self.client_log.exists():
            return []
        rows = [json.loads(line) for line in self.client_log.read_text().splitlines()]
        return [
            Message(r["method"], r["path"], tuple((k, v) for k, v in r["headers"]), b64decode(r["body"])) for r in rows
        ]

    def pairs(self, start: int = 0) -> list[Pair]:
        """Chats from the `start`-th on in the order in which the LLM received them, each with what the client sent."""
        got = [message for message in list(self.llm.received)[start:] if message.dialect != "other"]
        before = {message.trace: message for message in self.sent()}
        assert all(message.trace for message in got)
        return [Pair(before[message.trace], message) for message in got]

    def wait_for(self, what: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"it did not come in {seconds} s"
            time.sleep(0.1)


class WithoutGateway(Stage):
    def start_gateway(self) -> None:
        """OpenClaw's command line does without, in more time per turn."""


def _run(command: Sequence[str], env: dict[str, str], folder: Path) -> str:
    done = subprocess.run(command, env=env, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask, wait, insist: a gateway that was stopped in the middle of a turn would drain for minutes."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- a channel ------------------------------------------------------------------------------------


class Telegram:
    """As much of the Bot API as OpenClaw's channel needs for a private chat. `write` is a person's message, `replies` the bot's."""

    BOT: ClassVar[dict[str, Any]] = {"id": 777000111, "is_bot": True, "first_name": "Claw", "username": "claw_test_bot"}
    PERSON: ClassVar[dict[str, Any]] = {"id": 4242, "is_bot": False, "first_name": "Ada", "username": "ada_l"}

    def __init__(self) -> None:
        self._updates: list[dict[str, Any]] = []
        self.replies: list[str] = []
        telegram = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("content-length") or 0))
                try:
                    arguments = json.loads(raw or b"{}")
                except ValueError:
                    arguments = dict(parse_qsl(raw.decode("latin-1")))
                result = telegram._answer(urlsplit(self.path).path.rpartition("/")[2], arguments)
                body = json.dumps({"ok": True, "result": result}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exc_info()[1], OSError):  # the gateway ended while it was being answered
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.settings = {
            "enabled": True,
            "botToken": "777000111:AAFakeFakeFakeFakeFakeFakeFakeFakeFake0",
            "apiRoot": f"http://127.0.0.1:{self._server.server_address[1]}",
            "dmPolicy": "open",
            "allowFrom": ["*"],
        }

    def _answer(self, method: str, arguments: dict[str, Any]) -> Any:
        if method == "getMe":
            return self.BOT
        if method == "getUpdates":
            first, deadline = int(arguments.get("offset") or 0), time.monotonic() + min(float(arguments.get("timeout") or 0), 20)
            while not (new := [u for u in list(self._updates) if u["update_id"] >= first]) and time.monotonic() < deadline:
                time.sleep(0.1)
            return new
        if method in ("sendMessage", "editMessageText"):
            self.replies.append(str(arguments.get("text", "")))
            chat = {"id": arguments.get("chat_id"), "type": "private"}
            return {"message_id": 1000 + len(self.replies), "date": int(time.time()), "chat": chat, "from": self.BOT, "text": self.replies[-1]}
        if method == "getWebhookInfo":
            return {"url": "", "has_custom_certificate": False, "pending_update_count": 0}
        return [] if method == "getMyCommands" else True

    def write(self, text: str) -> None:
        n = len(self._updates) + 1
        chat = {"id": 4242, "type": "private", "first_name": "Ada"}
        message = {"message_id": n, "from": self.PERSON, "chat": chat, "date": int(time.time()), "text": text}
        self._updates.append({"update_id": 5000 + n, "message": message})

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
