"""The real OpenClaw reads what we wrote and writes the file anew; the service's command works where a service runs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from e2e_tools import ROOT, free_port, wait_for_port

from metaclaw_core.wiring import service, units
from metaclaw_core.wiring.openclaw_config import set_proxy, unset_proxy

URL = "http://127.0.0.1:30000"
BIN = ROOT / ".openclaw-kit" / "node_modules" / ".bin"


@pytest.mark.openclaw
@pytest.mark.slow
def test_openclaw_takes_the_setting_and_keeps_its_own_after_it_is_gone(user_home: Path):
    file = user_home / ".openclaw" / "openclaw.json"
    file.parent.mkdir()
    file.write_text("{\n  // mine\n  gateway: {mode: 'local', auth: {mode: 'token', token: 'fake-gateway-token'},},\n}\n")

    def openclaw(*words: str) -> str:
        environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(user_home), "NO_COLOR": "1"}
        return subprocess.run([str(BIN / "openclaw"), *words], env=environment, capture_output=True, text=True, timeout=120, check=False).stdout

    wired = set_proxy(file.read_text(), URL)
    file.write_text(wired.text)
    assert "proxyUrl" in openclaw("config", "get", "proxy")
    openclaw("config", "set", "gateway.port", "18999")  # writes the whole file anew
    rewritten = json.loads(file.read_text())
    assert rewritten["proxy"] == {"proxyUrl": URL}
    file.write_text(unset_proxy(file.read_text(), URL, made_section=wired.made_section))
    assert json.loads(file.read_text()) == {key: value for key, value in rewritten.items() if key != "proxy"}
    assert openclaw("config", "get", "gateway.port").strip() == "18999"


@pytest.mark.slow
def test_the_command_of_the_unit_serves_in_a_bare_environment(user_home: Path, metaclaw_home: Path, tmp_path: Path):
    """As systemd starts it: no shell, no virtual environment switched on, another folder."""
    port = free_port()
    metaclaw_home.mkdir(mode=0o700)
    (metaclaw_home / "config.yaml").write_text(f"proxy:\n  port: {port}\n")
    unit = units.service_unit(service.command(), service.service_environment(metaclaw_home), [units.GATEWAY])
    line = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    variables, _ = units.unit_environment(unit, user_home)
    log = tmp_path / "log"
    environment = {"HOME": str(user_home), "PATH": "/usr/bin:/bin", **variables}
    for ending in (signal.SIGKILL, signal.SIGTERM):  # killed and started again it serves again
        with log.open("wb") as out:
            process = subprocess.Popen(shlex.split(line.removeprefix("ExecStart=")), env=environment, stdout=out, stderr=out, cwd="/")
        try:
            wait_for_port(port, process, log)
            os.kill(process.pid, ending)
            process.wait(20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0
