"""Every command of the table exists and explains itself; the first answer is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from metaclaw_core.cli.main import _COMMANDS


@pytest.mark.parametrize("name", list(_COMMANDS))
def test_each_command_has_help(cli, name):
    ran = cli(name, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: metaclaw {name}")


def test_a_command_that_does_not_exist_gets_the_nearest(cli):
    ran = cli("strat")
    assert ran.code == 2
    assert "There is no command 'strat'. Did you mean start?" in ran.err


def test_help_loads_no_heavy_module():
    probe = (
        "import sys; from metaclaw_core.cli.main import group; group(['--help'], standalone_mode=False);"
        "print([m for m in ('mitmproxy', 'sqlalchemy', 'pydantic', 'numpy', 'sklearn', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=30)
    assert out.stdout.splitlines()[-1] == "[]"
