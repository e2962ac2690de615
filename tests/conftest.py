"""What every test gets: a home of its own, a neutral environment, and a reason when it can't run here.

No test sees the user's ~/.metaclaw, keys or proxy settings. Tests marked `shared` read the full recordings that lie
beside the repository (`../shared`, or METACLAW_SHARED); those marked `openclaw` drive the real OpenClaw that
scripts/test installs into .openclaw-kit. Where either is missing these tests skip and say which. Everything else must
pass on a bare checkout: tests/captures holds the recordings without other people's prose (scripts/make_fixtures.py).
"""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mitmproxy import http

ROOT = Path(__file__).resolve().parents[1]
CAPTURES = ROOT / "tests" / "captures"
KIT = ROOT / ".openclaw-kit"
NO_ENGINE = [name for name in ("torch", "tinker", "transformers", "uvicorn") if find_spec(name) is None]

# What scripts/test tells the tests; every other METACLAW_* is a setting of the user's and is taken away.
FOR_TESTS = {"METACLAW_SHARED", "METACLAW_NO_OPENCLAW", "METACLAW_TEST_POSTGRES"}
# Credentials and proxies that httpx, tinker or a child process would pick up by themselves.
FOREIGN = {
    *("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY", "TINKER_API_KEY", "HF_TOKEN"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "OPENCLAW_PROXY_URL", "NODE_EXTRA_CA_CERTS"),
}


def shared_dir() -> Path:
    """Where the full recordings are, if they are here at all."""
    return Path(os.environ.get("METACLAW_SHARED") or ROOT.parent / "shared")


def why_no_openclaw() -> str | None:
    if reason := os.environ.get("METACLAW_NO_OPENCLAW"):
        return f"no OpenClaw: {reason}"
    if not (shared_dir() / "openclaw" / "run.sh").exists():
        return "no OpenClaw: the kit that drives it is not in ../shared/openclaw"
    if not (KIT / "node_modules/openclaw/package.json").exists() or not (KIT / "ca/llm.pem").exists():
        return "no OpenClaw: it is not installed in .openclaw-kit (scripts/test installs it)"
    return None


def pytest_report_header() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("mitmproxy", "sqlalchemy", "pydantic")]
    return f"sqlite {sqlite3.sqlite_version}, {', '.join(versions)}"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What tests of the SDK left open is collected here, or it would be found in a later test, and be its failure."""
    if item.get_closest_marker("local") and not (nextitem and nextitem.get_closest_marker("local")):
        before, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            gc.collect()
        finally:
            sys.unraisablehook = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_openclaw = why_no_openclaw()
    no_shared = None if (shared_dir() / "captures").is_dir() else "the full recordings are not in ../shared/captures"
    for item in items:
        if item.get_closest_marker("local"):
            if NO_ENGINE:
                item.add_marker(pytest.mark.skip(reason=f"no local engine: {', '.join(NO_ENGINE)} not installed"))
            # The SDK leaves the connections of a finished client to the garbage collector.
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
        if no_shared and item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=no_shared))
        if no_openclaw and item.get_closest_marker("openclaw"):
            item.add_marker(pytest.mark.skip(reason=no_openclaw))


@pytest.fixture(autouse=True)
def metaclaw_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """METACLAW_HOME of this test, not made yet; HOME is an empty folder beside it."""
    for name in list(os.environ):
        if (name.startswith("METACLAW_") and name not in FOR_TESTS) or name.upper() in FOREIGN:
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("METACLAW_HOME", str(tmp_path / "metaclaw"))
    return tmp_path / "metaclaw"


@pytest.fixture
def shared() -> Path:
    """The folder of the full recordings; mark the test `shared`."""
    return shared_dir()


@pytest.fixture(scope="session")
def capture() -> Callable[[str], list[http.HTTPFlow]]:
    """capture("ollama"): the flows of tests/captures/ollama.mitm, fresh objects at each call."""
    from mitmproxy import http, io  # 1.5 s, which most test files need not spend

    def flows(name: str) -> list[http.HTTPFlow]:
        with (CAPTURES / f"{name}.mitm").open("rb") as file:
            return [flow for flow in io.FlowReader(file).stream() if isinstance(flow, http.HTTPFlow)]

    return flows
