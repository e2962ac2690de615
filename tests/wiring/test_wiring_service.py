"""metaclaw service: a unit that is shown, installed once, and removed, with a fake home and a fake systemctl."""

from __future__ import annotations

import json
import sys

import pytest

from metaclaw_core.wiring import service
from metaclaw_core.wiring.units import SERVICE, unit_folder


def test_installed_twice_is_installed_once(cli, metaclaw_home, user_home, systemctl):
    ran = cli("service", "install", "--yes", "--wait", "0")
    file = unit_folder(user_home) / SERVICE
    assert ran.code == 0
    assert f"write {file}" in ran.out
    assert f'Environment="METACLAW_HOME={metaclaw_home}"' in file.read_text()
    assert f"ExecStart={sys.executable} -P -m metaclaw_core.cli.main start" in file.read_text()
    assert "the proxy does not answer yet: see journalctl --user -u metaclaw.service" in ran.out
    assert systemctl() == ["daemon-reload", "enable --now metaclaw.service"]
    again = cli("service", "install", "--yes", "--wait", "0")
    assert (again.code, again.out) == (0, "The service is installed and runs.\n")
    assert systemctl() == ["daemon-reload", "enable --now metaclaw.service"]


def test_a_changed_unit_is_written_and_restarted(cli, user_home, systemctl):
    cli("service", "install", "--yes", "--wait", "0")
    (unit_folder(user_home) / SERVICE).write_text("[Service]\n")
    cli("service", "install", "--yes", "--wait", "0")
    assert systemctl()[2:] == ["daemon-reload", "restart metaclaw.service"]


def test_a_dry_run_writes_nothing(cli, user_home, systemctl):
    assert cli("service", "install", "--dry-run").code == 0
    assert not unit_folder(user_home).exists()
    assert systemctl() == []


def test_removed_it_leaves_nothing_behind(cli, user_home, systemctl):
    cli("service", "install", "--yes", "--wait", "0")
    assert cli("service", "remove", "--yes").code == 0
    assert not (unit_folder(user_home) / SERVICE).exists()
    assert systemctl()[2:] == ["disable --now metaclaw.service", "daemon-reload"]
    assert cli("service", "remove", "--yes").out == "No service is installed.\n"


def test_it_is_not_removed_from_under_a_wired_gateway(cli, gateway, service_file, systemctl):
    cli("wire", "openclaw", "--yes")
    ran = cli("service", "remove", "--yes")
    assert ran.code == 1
    assert "would have no network without it: metaclaw wire openclaw --undo first." in ran.err
    assert service_file.exists()


def test_status_tells_scripts_what_is_there(cli, systemctl):
    ran = cli("service", "status")
    assert (ran.code, ran.out) == (3, "No service is installed: metaclaw service install.\n")
    cli("service", "install", "--yes", "--wait", "0")
    ran = cli("service", "status", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["manager"]["SubState"] == "running"


def test_without_systemd_the_sentence_says_what_to_run_instead(cli, user_home, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = cli("service", "install", "--yes", "--wait", "0")
    assert ran.code == 1
    assert "systemd's user manager can't be reached (there is no systemctl here)" in ran.err
    assert "metaclaw start --detach" in ran.err
    assert not unit_folder(user_home).exists()


def test_settings_of_the_shell_that_a_service_does_not_see_are_named(cli, systemctl, monkeypatch):
    monkeypatch.setenv("METACLAW_PROXY_PORT", "30123")
    ran = cli("service", "install", "--dry-run")
    assert "The service does not see METACLAW_PROXY_PORT of this shell" in ran.err


def test_on_macos_it_is_a_launch_agent(tmp_path):
    manager = service.Manager("darwin", tmp_path)
    lines = [line for step in manager.install_steps(tmp_path / ".metaclaw", []) for line in step.lines()]
    plist = tmp_path / "Library" / "LaunchAgents" / "ai.metaclaw.proxy.plist"
    assert lines[0] == f"write {plist}"
    assert lines[-1].startswith("run launchctl bootstrap gui/")
    assert not plist.exists()


@pytest.mark.parametrize("platform", ["win32", "freebsd14"])
def test_elsewhere_there_is_none(tmp_path, platform):
    assert service.Manager(platform, tmp_path).problem() == f"On {platform} there is no service manager that this program knows"
