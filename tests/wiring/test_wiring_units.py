"""Unit files, drop-ins and jobs as text; systemd itself is asked where it is installed."""

from __future__ import annotations

import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaclaw_core.errors import ConfigError
from metaclaw_core.wiring import units

COMMAND = ["/opt/my tools/python", "-P", "-m", "metaclaw_core.cli.main", "start"]
HOME = {"METACLAW_HOME": "/home/me/100% \"mine\""}


def test_the_service_comes_back_after_a_second_and_is_never_given_up():
    unit = units.service_unit(COMMAND, HOME, ["openclaw-gateway.service"])
    assert unit == (
        "# Written by `metaclaw service install`; `metaclaw service remove` takes it away.\n"
        "[Unit]\n"
        "Description=MetaClaw proxy\n"
        "Before=openclaw-gateway.service\n"
        "StartLimitIntervalSec=0\n"
        "\n"
        "[Service]\n"
        "Type=exec\n"
        'ExecStart="/opt/my tools/python" -P -m metaclaw_core.cli.main start\n'
        'Environment="METACLAW_HOME=/home/me/100%% \\"mine\\""\n'
        "Restart=always\n"
        "RestartSec=1\n"
        "KillMode=mixed\n"
        "TimeoutStopSec=30\n"
        "OOMPolicy=continue\n"
        "UMask=0077\n"
        "NoNewPrivileges=yes\n"
        "\n"
        "[Install]\n"
        "WantedBy=default.target\n"
    )


def test_the_drop_in_names_an_optional_file_and_starts_after_the_proxy():
    assert units.drop_in(Path("/home/m [1]/.metaclaw/wire/x.env"), after_service=True) == (
        "# Written by `metaclaw wire openclaw`; `metaclaw wire openclaw --undo` takes it away.\n"
        "[Unit]\n"
        "Wants=metaclaw.service\n"
        "After=metaclaw.service\n"
        "\n"
        "[Service]\n"
        "EnvironmentFile=-/home/m \\[1]/.metaclaw/wire/x.env\n"
    )
    assert "[Unit]" not in units.drop_in(Path("/x"), after_service=False)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_unit_and_drop_in(tmp_path):
    folder = units.unit_folder(tmp_path)
    (folder / f"{units.GATEWAY}.d").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    gateway = "[Unit]\nDescription=gateway\n[Service]\nExecStart=/bin/sleep 1\n"
    (folder / units.GATEWAY).write_text(gateway)
    (folder / f"{units.GATEWAY}.d" / units.DROP_IN).write_text(units.drop_in(tmp_path / "a b%.env", after_service=True))
    # A command that exists, since systemd looks.
    (folder / units.SERVICE).write_text(units.service_unit(["/bin/sleep", "a $b %c \\d"], HOME, [units.GATEWAY]))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(run)}
    for unit in (units.SERVICE, units.GATEWAY):
        done = subprocess.run(
            ["systemd-analyze", "--user", "verify", str(folder / unit)], env=environment, capture_output=True, text=True, timeout=60
        )
        if "Failed to initialize manager" in done.stderr:
            pytest.skip(f"systemd-analyze can't work here: {done.stderr.strip()}")
        assert (done.returncode, done.stderr) == (0, "")


def test_the_launchd_job_is_a_plist_that_keeps_it_alive():
    job = plistlib.loads(units.launchd_plist(COMMAND, HOME, Path("/home/me/.metaclaw/logs/proxy.log")))
    assert job["Label"] == "ai.metaclaw.proxy"
    assert job["ProgramArguments"] == COMMAND
    assert job["EnvironmentVariables"] == HOME
    assert (job["KeepAlive"], job["RunAtLoad"], job["ThrottleInterval"], job["Umask"]) == (True, True, 1, 0o077)


_VALUES = st.text(st.characters(min_codepoint=32, exclude_categories=["C", "Z"]) | st.just(" "), max_size=20)


@given(st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), _VALUES))
def test_an_environment_file_comes_back_as_it_was_written(variables):
    assert units.read_environment_file(units.environment_file(variables)) == variables


def test_a_shell_reads_the_environment_file_as_systemd_does(tmp_path):
    file = tmp_path / "x.env"
    value = "/a b/$HOME `id` \"q\" \\n"
    file.write_text(units.environment_file({"A": value, "URL": "http://127.0.0.1:30000"}))
    done = subprocess.run(["sh", "-c", f". {file}; printf '%s|%s' \"$A\" \"$URL\""], capture_output=True, text=True, check=True)
    assert done.stdout == f"{value}|http://127.0.0.1:30000"


def test_the_environment_of_a_gateways_unit_is_read():
    text = (
        "[Unit]\nEnvironment=NOT=this\n[Service]\nExecStart=/usr/bin/node x\n"
        'Environment=HOME=/home/me "NODE_EXTRA_CA_CERTS=/my ca.pem"\n# Environment=A=1\n'
        "Environment=OPENCLAW_STATE_DIR=%h/100%%\nEnvironmentFile=-%h/.openclaw/gateway.systemd.env\n"
    )
    variables, files = units.unit_environment(text, Path("/home/me"))
    assert variables == {"HOME": "/home/me", "NODE_EXTRA_CA_CERTS": "/my ca.pem", "OPENCLAW_STATE_DIR": "/home/me/100%"}
    assert files == [Path("/home/me/.openclaw/gateway.systemd.env")]


@pytest.mark.parametrize(
    ("asked", "environment", "found", "name"),
    [
        (None, {}, [], "openclaw-gateway.service"),
        (None, {}, ["openclaw-gateway-work.service"], "openclaw-gateway-work.service"),
        (None, {}, ["openclaw-gateway-work.service", "openclaw-gateway.service"], "openclaw-gateway.service"),
        (None, {"OPENCLAW_PROFILE": "work"}, [], "openclaw-gateway-work.service"),
        (None, {"OPENCLAW_PROFILE": "Default"}, [], "openclaw-gateway.service"),
        (None, {"OPENCLAW_SYSTEMD_UNIT": "mine"}, [], "mine.service"),
        ("other.service", {"OPENCLAW_SYSTEMD_UNIT": "mine"}, [], "other.service"),
    ],
)
def test_which_gateway_is_meant(asked, environment, found, name):
    assert units.gateway_name(asked, environment, found) == name


def test_two_gateways_must_be_told_apart():
    with pytest.raises(ConfigError, match="name one with --unit"):
        units.gateway_name(None, {}, ["openclaw-gateway-a.service", "openclaw-gateway-b.service"])


def test_the_service_of_a_process_is_read_from_its_control_group():
    path = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/metaclaw.service\n"
    assert units.service_of_cgroup(path) == "metaclaw.service"
    assert units.service_of_cgroup("0::/user.slice/user-1000.slice/user@1000.service/app.slice/term.scope\n") is None
    assert units.service_of_cgroup("12:cpu:/\n0::/\n") is None


def test_a_line_break_in_a_path_is_refused():
    with pytest.raises(ConfigError, match="line break"):
        units.environment_file({"A": "x\nEVIL=1"})
