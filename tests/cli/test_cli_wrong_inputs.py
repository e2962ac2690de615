"""What is wrong is said in one sentence with a remedy; no traceback, and an exit status that a script sees."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_tools import environment, free_port

TOOL = str(Path(sys.executable).with_name("metaclaw"))


def refused(home: Path, *words: str, **extra: str) -> str:
    result = subprocess.run([TOOL, *words], env=environment(home) | extra, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("metaclaw: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr.removeprefix("metaclaw: ").rstrip("\n")


@pytest.fixture
def start(metaclaw_home: Path):
    """``start("--set", …)``: what a foreground start is refused with."""
    return lambda *words, **extra: refused(metaclaw_home, "start", "--port", str(free_port()), *words, **extra)


@pytest.mark.slow
def test_a_set_that_is_none(start):
    assert start("--set", "nothing") == "--set nothing: write NAME=VALUE."
    assert start("--set", "listen_port=1") == "--set listen_port: use --port N."
    assert start("--set", "metaclaw_topk=1") == "--set metaclaw_topk: there is no such option. Did you mean metaclaw_top_k?"
    assert start("--set", "qqqqqq=1") == "--set qqqqqq: there is no such option. `mitmdump --options` lists mitmproxy's."
    assert start("--set", "connection_strategy=x") == "--set connection_strategy=x is not allowed: eager or lazy."
    assert start("--set", "tcp_timeout=x").startswith("--set tcp_timeout: ")


@pytest.mark.slow
def test_a_set_with_a_bad_value_names_key_value_and_what_is_allowed(start):
    assert start("--set", "metaclaw_top_k=999") == (
        "skills.top_k = 999 is not allowed (from --set or a flag): Input should be less than or equal to 50."
    )


@pytest.mark.slow
def test_an_option_that_lean_leaves_out_is_named_with_the_remedy(start):
    assert start("--set", "hardump=x.har") == (
        "--set hardump needs a part of mitmproxy that the lean proxy leaves out: add --no-lean."
    )


@pytest.mark.slow
@pytest.mark.parametrize("item", ["listen_host=0.0.0.0", "listen_host=", "mode=regular@0.0.0.0:8999", "mode=socks5@192.0.2.1:1"])
def test_it_listens_nowhere_but_on_loopback(start, item):
    assert start("--set", item).startswith("metaclaw listens on 127.0.0.1 only, not on ")


@pytest.mark.slow
def test_a_port_that_is_taken(metaclaw_home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        says = f"127.0.0.1:{port} can't be listened on (Address already in use): another program has it. Another port: metaclaw start --port N"
        assert refused(metaclaw_home, "start", "--port", str(port)).startswith(says)
        detached = refused(metaclaw_home, "start", "--detach", "--port", str(port))
        assert detached.startswith(f"The proxy did not start: {says}")


@pytest.mark.slow
def test_a_home_that_cannot_be_made(tmp_path):
    home = tmp_path / "file"
    home.touch()
    nowhere = Path("/proc/nowhere")  # not writable, even for root
    remedy = "make it yours, or name another folder with METACLAW_HOME."
    assert refused(home, "start") == f"{home}/config.yaml can't be read (Not a directory): {remedy}"
    assert refused(nowhere, "start") == f"{nowhere} can't be used (No such file or directory): {remedy}"
    assert refused(nowhere, "start", "-d") == f"{nowhere}/logs/proxy.log can't be written (No such file or directory): {remedy}"
    assert refused(nowhere, "setup", "--non-interactive") == f"{nowhere}/config.yaml can't be written (No such file or directory): {remedy}"
    assert refused(nowhere, "turns") == (
        f"The store sqlite:///{nowhere}/store.db can't be opened (No such file or directory): "
        "make its folder yours, or name another with METACLAW_HOME."
    )
    assert refused(nowhere, "env") == (
        f"The CA can't be made or read in {nowhere}/mitmproxy (No such file or directory): "
        "make this folder yours and writable, or move everything with METACLAW_HOME."
    )


@pytest.mark.slow
def test_a_ca_that_cannot_be_made_or_read(start, metaclaw_home):
    metaclaw_home.mkdir()
    folder = metaclaw_home / "mitmproxy"
    folder.touch()
    assert start().startswith(f"The CA can't be made or read in {folder} (File exists): make this folder yours and writable")
    folder.unlink()
    folder.mkdir()
    (folder / "mitmproxy-ca.pem").write_text("garbage")
    assert start().startswith(f"The CA in {folder} is damaged (")


@pytest.mark.slow
def test_a_skills_folder_that_cannot_be_read(start, tmp_path):
    file = tmp_path / "file"
    file.touch()
    says = f"{file} can't be read (Not a directory): make it a readable folder or name another."
    assert start(METACLAW_SKILLS_DIR=str(file)) == f"skills.dir = {says}"
    assert start(METACLAW_SKILLS_EXTRA_DIRS=str(file)) == f"skills.extra_dirs = {says}"


@pytest.mark.slow
def test_a_broken_file_of_settings(start, metaclaw_home):
    metaclaw_home.mkdir()
    file = metaclaw_home / "config.yaml"
    file.write_text("proxy: [\n")
    assert start().startswith(f"{file} is not valid YAML in line 2: ")
    file.write_text("proxy:\n  prt: 1\n")
    assert start("-d").startswith(f"proxy.prt is not a known setting (from {file}). Did you mean proxy.port?")
    file.write_text("- a\n")
    assert start() == f"{file} must hold keys and values, not a list."


def test_a_key_that_was_copied_wrong_is_refused_and_not_shown(cli, config):
    ran = cli("config", "llm.api_key", "sk-canary 1234")
    assert ran.code == 1
    assert ran.err == (
        "metaclaw: llm.api_key = *** is not allowed (from the command line): "
        "a key has no spaces, line breaks or letters outside ASCII; copy it again.\n"
    )
    assert not config.exists()


def test_an_engine_without_a_model_is_told_what_to_give(cli):
    ran = cli("engine")
    assert ran.code == 2
    assert "Give --model, the folder or hub id of a base model." in ran.err
