"""A policy server without a model: ``python -m fake_policy`` in place of our own, for tests of the proxy.

It says what ``fake.json`` in the home tells it to, and writes down every request it gets, one JSON a line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from metaclaw_core.routes import FAILED_HEADER, Heartbeat, read_route, write_heartbeat
from metaclaw_core.testing import Received, Script, ScriptedLLM

HOME = Path(os.environ["METACLAW_HOME"])


def orders() -> dict[str, Any]:
    try:
        return dict(json.loads((HOME / "fake.json").read_text()))
    except (OSError, ValueError):
        return {}


def answer(received: Received) -> Script:
    with (HOME / "fake-received.jsonl").open("a") as file:
        line = {"method": received.method, "path": received.path, "headers": received.headers, "body": received.body.decode()}
        file.write(json.dumps(line) + "\n")
    order = orders()
    if order.get("die"):
        os._exit(1)
    if "fail" in order:
        return Script(raw=b'{"error":{"message":"no"}}', status=503, headers={FAILED_HEADER: order["fail"], "retry-after": "1"})
    if "status" in order:
        return Script(raw=b'{"detail":"what?"}', status=order["status"])
    version = received.header("x-metaclaw-version")
    headers = {"x-metaclaw-note": "for the proxy"}
    raw = order["raw"].encode() if "raw" in order else None
    return Script(text=f"from version {version}", headers=headers, cut_after=order.get("cut_after"), raw=raw)


def beat(port: int) -> None:
    while True:
        order, route = orders(), read_route(HOME)
        versions = tuple(order.get("versions", [s.version for s in route.served] if route else [1]))
        ready = bool(order.get("ready", True))
        write_heartbeat(HOME, Heartbeat(time.time(), os.getpid(), port, "base", ready, None if ready else "told so", versions, 32_000))
        time.sleep(0.1)


def main() -> None:
    token = json.loads(sys.stdin.readline())["token"]
    (HOME / "fake-token").write_text(token)
    with ScriptedLLM(answer) as llm:
        threading.Thread(target=beat, args=(llm.port,), daemon=True).start()
        sys.stdin.read()


if __name__ == "__main__":
    main()
