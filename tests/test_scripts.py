"""scripts/start and scripts/test find a Python, make .venv once, and say what is missing: run for real, but for pip.

Each test has a small checkout of its own and a PATH that holds nothing but the few programs the scripts call. A stand-in
for Python says that it is one, makes a `.venv` with itself in it and writes down what pip is asked for, so nothing here
needs a network; what else is asked of it the real Python answers. What really gets installed CI sees in a fresh clone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("bash", "cat", "chmod", "cp", "cut", "dirname", "env", "grep", "id", "mkdir", "mv", "rm", "sed", "sha256sum", "sleep", "sort")

STAND_IN = """#!/bin/sh
case "$1 $2" in
  "-I -c") echo "{version} $0" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >> "{log}" ;;
  "-m pip") echo "pip $*" >> "{log}"; sleep {slow}; [ ! -e "{broken}" ] || {{ echo "no such package" >&2; exit 1; }}
            printf '#!/bin/sh\\necho "metaclaw $*"\\n' > "{venv}/bin/metaclaw"; chmod +x "{venv}/bin/metaclaw" ;;
  *) exec "{python}" "$@" ;;
esac
"""


VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


class Checkout:
    """A checkout with the real scripts and lock files, and the PATH they see."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.log = folder / "log"
        self.broken = folder / "pip-is-broken"
        self.root.mkdir()
        self.bin.mkdir()
        self.home.mkdir(exist_ok=True)
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for name in PROGRAMS:
            if program := shutil.which(name):
                (self.bin / name).symlink_to(program)

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def python(self, path: Path, slow: str = "0") -> None:
        text = STAND_IN.format(
            log=self.log, broken=self.broken, venv=self.root / ".venv", slow=slow, python=sys.executable, version=VERSION
        )
        self.program(path, text)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *command],
            cwd=self.root,
            env={"PATH": str(self.bin), "HOME": str(self.home), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def find(self, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", 'set -euo pipefail; . scripts/_env.sh; find_python; echo "$PYTHON_VERSION $PYTHON_PATH"', **env)

    def ensure(self, kind: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", f"set -euo pipefail; . scripts/_env.sh; ensure_venv {kind}")

    def asked(self) -> list[str]:
        """What Python was asked to make and install since the last look, shortened to the words that matter."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [re.sub(rf"pip .*?(--require-hashes -r |--editable ){re.escape(str(self.root))}/?", r"\1", line) for line in lines]


RUNTIME = "--require-hashes -r requirements/runtime.lock"
TEST = "--require-hashes -r requirements/test.lock"
PROJECT = "--editable "
NOTHING_FOUND = (
    "No Python 3.12 or newer was found: install one (for example python3.12 with its venv package, or pyenv install 3.13),"
    " or name it with PYTHON=/path/to/python3, then run this again.\n"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_shim_that_fails_and_an_old_python_are_passed_over(checkout: Checkout) -> None:
    checkout.program(checkout.bin / "python3.13", "#!/bin/sh\necho 'shim: command not found' >&2\nexit 127\n")
    checkout.program(checkout.bin / "python3.12", "#!/bin/sh\nexit 3\n")  # what the probe says in an older Python
    checkout.program(checkout.bin / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    found = checkout.find()
    assert found.stdout == f"{VERSION} {sys.executable}\n"
    assert found.stderr == ""


def test_the_newest_python_of_pyenv_is_found_where_no_name_on_path_works(checkout: Checkout) -> None:
    versions = checkout.home / ".pyenv" / "versions"
    checkout.program(versions / "3.9.18" / "bin" / "python3", "#!/bin/sh\nexit 3\n")
    checkout.program(versions / "3.12.1" / "bin" / "python3", "#!/bin/sh\necho 3.12 the-older\n")
    checkout.program(versions / "3.13.0" / "bin" / "python3", "#!/bin/sh\necho 3.13 the-newer\n")
    assert checkout.find().stdout == "3.13 the-newer\n"


def test_a_python_that_only_uv_knows_is_found(checkout: Checkout) -> None:
    checkout.program(checkout.home / "managed" / "python3", "#!/bin/sh\necho 3.13 from-uv\n")
    checkout.program(checkout.bin / "uv", f"#!/bin/sh\necho {checkout.home}/managed/python3\n")
    assert checkout.find().stdout == "3.13 from-uv\n"


def test_the_python_that_was_named_comes_first_and_a_wrong_name_is_said(checkout: Checkout) -> None:
    checkout.program(checkout.bin / "python3", "#!/bin/sh\necho 3.13 on-path\n")
    checkout.program(checkout.home / "mine", "#!/bin/sh\necho 3.12 mine\n")
    assert checkout.find(PYTHON=str(checkout.home / "mine")).stdout == "3.12 mine\n"
    wrong = checkout.find(PYTHON="/nowhere/python3")
    assert wrong.stdout == "3.13 on-path\n"
    assert wrong.stderr.startswith("PYTHON=/nowhere/python3 is no CPython 3.12 or newer ")


@pytest.mark.parametrize("script", ["scripts/start", "scripts/test"])
def test_without_a_python_one_sentence_says_what_to_install(checkout: Checkout, script: str) -> None:
    result = checkout.run(script)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", NOTHING_FOUND)


def test_a_python_without_venv_is_named(checkout: Checkout) -> None:
    checkout.program(checkout.bin / "python3", "#!/bin/sh\nexit 4\n")  # what the probe says without ensurepip
    result = checkout.run("scripts/start")
    assert result.returncode == 1
    assert result.stderr.startswith("python3 has no venv module: install it ")


def test_the_first_start_installs_and_the_second_starts_at_once(checkout: Checkout) -> None:
    checkout.python(checkout.bin / "python3")
    first = checkout.run("scripts/start", "--mode", "rl")
    assert (first.returncode, first.stdout) == (0, "metaclaw start --mode rl\n")
    assert checkout.asked() == ["venv", RUNTIME, PROJECT]
    begin = time.monotonic()
    second = checkout.run("scripts/start")
    assert (second.stdout, second.stderr) == ("metaclaw start\n", "")
    assert time.monotonic() - begin < 1.0
    assert checkout.asked() == []


def test_the_tests_add_their_tools_to_an_environment_made_by_start(checkout: Checkout) -> None:
    checkout.python(checkout.bin / "python3")
    assert checkout.ensure("runtime").returncode == 0
    checkout.asked()
    assert checkout.ensure("test").returncode == 0
    assert checkout.asked() == [TEST, PROJECT]
    assert checkout.ensure("runtime").returncode == 0  # the tools' environment serves both
    assert checkout.ensure("test").returncode == 0
    assert checkout.asked() == []


def test_a_changed_lock_is_installed_over_what_is_there(checkout: Checkout) -> None:
    checkout.python(checkout.bin / "python3")
    checkout.ensure("test")
    checkout.asked()
    with (checkout.root / "requirements" / "runtime.lock").open("a") as lock:
        lock.write("# changed\n")
    assert checkout.ensure("runtime").returncode == 0
    assert checkout.asked() == [TEST, PROJECT]  # the tools stay, at the versions that fit


def test_an_interrupted_installation_is_made_anew(checkout: Checkout) -> None:
    checkout.python(checkout.bin / "python3")
    checkout.broken.touch()
    failed = checkout.run("scripts/start")
    assert failed.returncode == 1
    assert failed.stderr.endswith(
        "no such package\npip could not install requirements/runtime.lock; see above. Run this again to start over.\n"
    )
    checkout.broken.unlink()
    checkout.asked()
    assert checkout.run("scripts/start").stdout == "metaclaw start\n"
    assert checkout.asked() == ["venv", RUNTIME, PROJECT]


@pytest.mark.parametrize("harm", ["its Python is gone", "it lies elsewhere", "its stamp is empty"])
def test_an_environment_that_is_not_whole_is_made_anew(checkout: Checkout, harm: str) -> None:
    checkout.python(checkout.bin / "python3")
    checkout.run("scripts/start")
    stamp = checkout.root / ".venv" / "installed"
    if harm == "its Python is gone":
        (checkout.root / ".venv" / "bin" / "python").unlink()
    elif harm == "it lies elsewhere":
        stamp.write_text(stamp.read_text().replace(str(checkout.root), "/where/it/was/made"))
    else:
        stamp.write_text("")
    checkout.asked()
    again = checkout.run("scripts/start")
    assert again.stdout == "metaclaw start\n"
    assert "The environment in .venv is not whole: making it anew." in again.stderr
    assert checkout.asked() == ["venv", RUNTIME, PROJECT]


def test_of_two_runs_at_once_one_installs_and_the_other_waits(checkout: Checkout) -> None:
    checkout.python(checkout.bin / "python3", slow="0.3")
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(checkout.run("scripts/start"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(result.returncode, result.stdout) for result in results] == [(0, "metaclaw start\n")] * 2
    assert checkout.asked() == ["venv", RUNTIME, PROJECT]


def pins(name: str) -> dict[str, str]:
    lock = (ROOT / "requirements" / f"{name}.lock").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", lock, re.MULTILINE))


def test_a_package_has_one_version_in_all_locks() -> None:
    runtime, test, full = pins("runtime"), pins("test"), pins("full")
    assert runtime.items() <= test.items()
    assert test.items() <= full.items()
    assert {"mitmproxy", "hatchling", "editables"} <= runtime.keys()
    assert {"pytest", "ruff", "mypy"} <= test.keys() - runtime.keys()
    assert {"tinker", "transformers", "torch"} <= full.keys() - test.keys()


@pytest.mark.parametrize("name", ["runtime", "test", "full"])
def test_every_pin_of_a_lock_has_a_hash_and_no_host_is_named(name: str) -> None:
    lock = (ROOT / "requirements" / f"{name}.lock").read_text()
    assert "://" not in lock
    assert "/" not in lock.splitlines()[0].replace("scripts/lock", "")
    for entry in re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]:
        assert re.search(r"\n    --hash=sha256:[0-9a-f]{64}", entry), entry
