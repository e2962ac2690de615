"""metaclaw wire: shown first, done after a yes, undone without a trace, with a fake home and a fake systemctl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaclaw_core.wiring.records import wirings
from metaclaw_core.wiring.units import read_environment_file

CONFIG = '{\n  "gateway": {"mode": "local"},\n  "models": {}\n}\n'


@pytest.fixture
def openclaw_json(user_home: Path) -> Path:
    file = user_home / ".openclaw" / "openclaw.json"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG)
    file.chmod(0o640)
    return file


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def drop_in(gateway: Path) -> Path:
    return gateway.with_name(f"{gateway.name}.d") / "metaclaw.conf"


def test_without_a_service_it_refuses_and_names_both_ways_out(cli, gateway, systemctl):
    ran = cli("wire", "openclaw", "--yes")
    assert (ran.code, ran.out) == (1, "")
    assert "run `metaclaw service install` first" in ran.err
    assert "--no-service" in ran.err


def test_without_a_gateway_service_it_says_what_to_do(cli, service_file, systemctl):
    ran = cli("wire", "openclaw", "--yes")
    assert ran.err == (
        "metaclaw: There is no gateway service openclaw-gateway.service: `openclaw gateway install` makes one. "
        "A gateway that you start yourself needs no wiring: metaclaw run -- openclaw gateway run.\n"
    )


def test_a_dry_run_shows_all_and_changes_nothing(cli, user_home, gateway, service_file, systemctl):
    before = tree(user_home)
    ran = cli("wire", "openclaw", "--dry-run")
    assert ran.code == 0
    assert f"write {drop_in(gateway)}" in ran.out
    assert "OPENCLAW_PROXY_URL=http://127.0.0.1:30000" in ran.out
    assert "run systemctl --user try-restart openclaw-gateway.service" in ran.out
    assert tree(user_home) == before
    assert systemctl() == []


def test_nobody_to_ask_and_no_yes_changes_nothing(cli, user_home, gateway, service_file, systemctl):
    before = tree(user_home)
    ran = cli("wire", "openclaw")
    assert ran.code == 1
    assert ran.err.endswith("Nobody can be asked here: add --yes to do it, or --dry-run to only see it.\n")
    assert tree(user_home) == before


def test_the_gateway_gets_proxy_and_ca_and_keeps_its_unit(cli, metaclaw_home, gateway, service_file, systemctl):
    unit = gateway.read_bytes()
    assert cli("wire", "openclaw", "--yes").code == 0
    assert gateway.read_bytes() == unit
    file = metaclaw_home / "wire" / "openclaw-gateway.service.env"
    assert drop_in(gateway).read_text().endswith(f"[Service]\nEnvironmentFile=-{file}\n")
    variables = read_environment_file(file.read_text())
    assert variables["OPENCLAW_PROXY_URL"] == variables["HTTPS_PROXY"] == "http://127.0.0.1:30000"
    assert variables["NODE_EXTRA_CA_CERTS"] == str(metaclaw_home / "mitmproxy" / "mitmproxy-ca-cert.pem")
    assert systemctl() == ["daemon-reload", "try-restart openclaw-gateway.service"]
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [str(wiring) for wiring in wirings(metaclaw_home)] == [
        f"OpenClaw's service openclaw-gateway.service uses the proxy ({drop_in(gateway)})"
    ]


def test_wired_twice_is_wired_once(cli, gateway, service_file, systemctl):
    cli("wire", "openclaw", "--yes")
    ran = cli("wire", "openclaw", "--yes")
    assert (ran.code, ran.out) == (0, "OpenClaw is wired already.\n")
    assert systemctl() == ["daemon-reload", "try-restart openclaw-gateway.service"]


def test_a_changed_port_gets_there_by_wiring_again(cli, metaclaw_home, gateway, service_file, systemctl):
    cli("wire", "openclaw", "--yes")
    cli("config", "proxy.port", "30123")
    ran = cli("wire", "openclaw", "--yes", "--no-restart")
    assert "    +OPENCLAW_PROXY_URL=http://127.0.0.1:30123" in ran.out
    assert len(wirings(metaclaw_home)) == 1


def test_the_ca_of_the_gateways_own_company_stays_trusted(cli, metaclaw_home, gateway, service_file, systemctl, tmp_path):
    company = tmp_path / "company.pem"
    company.write_text("-----BEGIN CERTIFICATE-----\nY29tcGFueQ==\n-----END CERTIFICATE-----\n")
    gateway.write_text(gateway.read_text() + f"[Service]\nEnvironment=NODE_EXTRA_CA_CERTS={company}\n")
    cli("wire", "openclaw", "--yes")
    variables = read_environment_file((metaclaw_home / "wire" / "openclaw-gateway.service.env").read_text())
    assert "Y29tcGFueQ==" in Path(variables["NODE_EXTRA_CA_CERTS"]).read_text()


def test_undone_everything_is_as_it_was(cli, metaclaw_home, user_home, gateway, service_file, openclaw_json, systemctl):
    before = tree(user_home)
    assert cli("wire", "openclaw", "--yes", "--via-config").code == 0
    assert tree(user_home) != before
    ran = cli("wire", "openclaw", "--undo", "--yes")
    assert ran.code == 0
    assert tree(user_home) == before
    assert openclaw_json.stat().st_mode & 0o777 == 0o640
    assert wirings(metaclaw_home) == []
    assert cli("wire", "openclaw", "--undo", "--yes").out == "OpenClaw is not wired, so there is nothing to undo.\n"


def test_via_config_the_environment_carries_only_the_ca(cli, metaclaw_home, gateway, service_file, openclaw_json, systemctl):
    ran = cli("wire", "openclaw", "--yes", "--via-config")
    assert '    +  "proxy": {"proxyUrl": "http://127.0.0.1:30000"},' in ran.out
    assert json.loads(openclaw_json.read_text())["proxy"] == {"proxyUrl": "http://127.0.0.1:30000"}
    variables = read_environment_file((metaclaw_home / "wire" / "openclaw-gateway.service.env").read_text())
    assert "NODE_EXTRA_CA_CERTS" in variables
    assert not {"OPENCLAW_PROXY_URL", "HTTPS_PROXY", "http_proxy"} & set(variables)


def test_via_config_without_a_service_says_that_the_ca_is_missing(cli, service_file, openclaw_json, systemctl):
    ran = cli("wire", "openclaw", "--yes", "--via-config")
    assert ran.code == 0
    assert "OpenClaw must also trust the CA, by its environment before it starts: NODE_EXTRA_CA_CERTS=" in ran.err


def test_via_config_again_with_another_port_replaces_our_own_value(cli, user_home, service_file, openclaw_json, systemctl):
    cli("wire", "openclaw", "--yes", "--via-config")
    cli("config", "proxy.port", "30123")
    cli("wire", "openclaw", "--yes", "--via-config")
    assert json.loads(openclaw_json.read_text())["proxy"] == {"proxyUrl": "http://127.0.0.1:30123"}
    cli("wire", "openclaw", "--undo", "--yes")
    assert openclaw_json.read_text() == CONFIG


def test_what_others_changed_in_between_stays(cli, gateway, service_file, openclaw_json, systemctl):
    cli("wire", "openclaw", "--yes", "--via-config")
    changed = json.loads(openclaw_json.read_text())
    changed["models"] = {"mode": "merge"}
    changed["proxy"]["loopbackMode"] = "proxy"
    openclaw_json.write_text(json.dumps(changed, indent=2))
    (drop_in(gateway).parent / "mine.conf").write_text("[Service]\n")
    gateway.write_text("[Service]\nExecStart=/usr/bin/node new\n")
    cli("wire", "openclaw", "--undo", "--yes")
    assert json.loads(openclaw_json.read_text()) == {
        "proxy": {"loopbackMode": "proxy"},
        "gateway": {"mode": "local"},
        "models": {"mode": "merge"},
    }
    assert sorted(path.name for path in drop_in(gateway).parent.iterdir()) == ["mine.conf"]
    assert gateway.read_text() == "[Service]\nExecStart=/usr/bin/node new\n"


def test_a_drop_in_without_a_record_is_undone_too(cli, metaclaw_home, gateway, service_file, systemctl):
    cli("wire", "openclaw", "--yes")
    (metaclaw_home / "wirings.json").unlink()
    assert cli("wire", "openclaw", "--undo", "--yes").code == 0
    assert not drop_in(gateway).parent.exists()


def test_a_proxy_of_the_users_own_is_not_taken_over(cli, service_file, openclaw_json, systemctl):
    openclaw_json.write_text('{"proxy": {"proxyUrl": "http://u:p@corp:1"}}')
    ran = cli("wire", "openclaw", "--yes", "--via-config")
    assert ran.code == 1
    assert "already names another proxy (http://***@corp:1)" in ran.err
    assert openclaw_json.read_text() == '{"proxy": {"proxyUrl": "http://u:p@corp:1"}}'


def test_without_a_reachable_manager_nothing_is_written(cli, user_home, gateway, service_file, monkeypatch, tmp_path):
    before = tree(user_home)
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = cli("wire", "openclaw", "--yes")
    assert ran.code == 1
    assert "systemd's user manager can't be reached (there is no systemctl here)" in ran.err
    assert tree(user_home) == before


def test_the_lines_for_a_whole_session_are_only_printed(cli, user_home):
    before = tree(user_home)
    ran = cli("wire", "--system-proxy")
    assert "HTTPS_PROXY=http://127.0.0.1:30000" in ran.out
    assert "launchctl setenv HTTPS_PROXY http://127.0.0.1:30000" in ran.out
    assert 'setx HTTPS_PROXY "http://127.0.0.1:30000"' in ran.out
    assert "Node, and so OpenClaw, ignores the proxy setting of the desktop" in ran.out
    assert tree(user_home) == before


def test_json_says_what_would_be_done(cli, gateway, service_file, systemctl):
    found = json.loads(cli("wire", "openclaw", "--dry-run", "--json").out)
    assert found["done"] is False
    assert found["steps"][-1] == ["run systemctl --user try-restart openclaw-gateway.service"]
    assert json.loads(cli("wire", "--json").out) == {"wirings": []}


def test_a_damaged_record_is_one_sentence(cli, metaclaw_home):
    metaclaw_home.mkdir()
    (metaclaw_home / "wirings.json").write_text("{")
    ran = cli("wire")
    assert ran.code == 1
    assert ran.err.startswith(f"metaclaw: {metaclaw_home / 'wirings.json'} can't be read")
