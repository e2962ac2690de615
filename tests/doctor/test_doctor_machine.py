"""Python, mitmproxy, disk, modes and the CA: what is found, and what is said about it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from metaclaw_core.doctor import Check, exit_status, machine
from metaclaw_core.proxy.ca import ensure_ca


def test_the_worst_check_is_the_exit_status():
    ok, warn, fail = Check("a", "ok", "x"), Check("b", "warn", "x", "y"), Check("c", "fail", "x", "y")
    assert (exit_status([]), exit_status([ok]), exit_status([ok, warn]), exit_status([fail, ok, warn])) == (0, 0, 1, 2)


def test_an_old_python_or_mitmproxy_fails_with_the_version_that_is_needed():
    assert machine.check_python((3, 11, 9), "/usr/bin/python3") == Check(
        "python", "fail", "Python 3.11.9 is too old.", "Install MetaClaw with Python 3.12 or newer."
    )
    assert machine.check_python((3, 13, 0), "/x").status == "ok"
    assert machine.check_mitmproxy("12.1.9").status == "fail"
    assert machine.check_mitmproxy("12.2.0").status == machine.check_mitmproxy("13.0.1").status == "ok"
    assert machine.check_mitmproxy(None).remedy == "pip install 'mitmproxy>=12.2' into this environment."


def test_little_room_on_the_disk_is_said_before_it_is_none():
    home = Path("/x")
    assert machine.check_disk(100 << 20, home).what == "Only 100 MiB are free for /x: nothing more can be recorded soon."
    assert machine.check_disk(500 << 20, home).status == "warn"
    assert machine.check_disk(3 << 30, home) == Check("disk", "ok", "3.0 GiB are free for /x")


def test_what_others_could_read_is_named(tmp_path):
    home = tmp_path / "metaclaw"
    (home / "spool").mkdir(parents=True)
    (home / "skills" / "mine").mkdir(parents=True)
    (home / "store.db").touch(mode=0o600)
    (home / "skills" / "mine" / "SKILL.md").touch(mode=0o644)
    for folder in (home, home / "spool"):
        folder.chmod(0o700)
    assert machine.check_modes(machine.entries(home), os.getuid()).status == "ok"
    (home / "store.db").chmod(0o644)
    assert machine.check_modes(machine.entries(home), os.getuid()) == Check(
        "files", "warn", f"{home / 'store.db'} would be readable by others if the folder were.", f"chmod -R go= {home}"
    )
    home.chmod(0o755)
    assert machine.check_modes(machine.entries(home), os.getuid()).remedy == f"chmod 700 {home}"
    assert machine.check_modes(machine.entries(home), os.getuid() + 1).what == f"{home} belongs to another user."


def test_a_new_ca_is_valid_and_private(tmp_path):
    folder = tmp_path / "mitmproxy"
    folder.mkdir(mode=0o700)
    assert machine.check_ca(machine.look_at_ca(folder)).what == "No CA has been made yet; the first start makes one."
    ensure_ca(folder)
    ca = machine.look_at_ca(folder)
    assert machine.check_ca(ca).status == "ok"
    assert ca.expires_at is not None
    assert machine.check_ca(ca, now=ca.expires_at - 86400).what == "The CA expires in 1 days."
    assert machine.check_ca(ca, now=ca.expires_at + 86400 * 3).what == "The CA expired 3 days ago."
    (folder / "mitmproxy-ca.p12").chmod(0o644)
    assert machine.check_ca(machine.look_at_ca(folder)).what == f"Others can read the CA's key in {folder}."


def test_a_damaged_ca_is_named(tmp_path):
    (tmp_path / "mitmproxy-ca.pem").write_text("no certificate")
    assert machine.check_ca(machine.look_at_ca(tmp_path)).status == "fail"


@pytest.mark.parametrize("ignored", [True, False])
def test_a_key_in_a_repository_fails_unless_git_ignores_it(tmp_path, ignored):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, capture_output=True)
    folder = tmp_path / "mitmproxy"
    folder.mkdir(mode=0o700)
    ensure_ca(folder)
    if ignored:
        (tmp_path / ".gitignore").write_text("mitmproxy/\n")
    check = machine.check_ca(machine.look_at_ca(folder))
    assert check.status == ("ok" if ignored else "fail")
    assert ignored or check.what == f"The CA's key lies in the git repository {tmp_path}."
