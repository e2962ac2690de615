"""What `stop` and `restart` know of the service and of wired agents; no proxy runs here."""

from __future__ import annotations

from metaclaw_core.wiring.records import Wiring, remember


def test_restart_without_a_running_proxy_starts_the_service_of_this_home(cli, metaclaw_home, service_file, systemctl):
    service_file.write_text(f"[Service]\nEnvironment=METACLAW_HOME={metaclaw_home.absolute()}\n")
    ran = cli("restart")
    assert (ran.code, ran.err) == (0, "")
    assert systemctl() == ["restart metaclaw.service"]
    assert "started anew" in ran.out


def test_a_service_takes_no_options_from_the_command_line(cli, metaclaw_home, service_file, systemctl):
    service_file.write_text(f"[Service]\nEnvironment=METACLAW_HOME={metaclaw_home.absolute()}\n")
    ran = cli("restart", "--port", "4000")
    assert ran.code == 1
    assert "takes its options from the configuration" in ran.err
    assert systemctl() == []


def test_stop_with_nothing_running_says_so_and_ends_with_3(cli, metaclaw_home, systemctl):
    remember(metaclaw_home, Wiring(kind="openclaw-service", file="/x/metaclaw.conf", unit="openclaw-gateway.service"))
    ran = cli("stop")
    assert ran.code == 3
    assert "nothing to stop" in ran.err
