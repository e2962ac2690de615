"""The policy server and the engine listen on loopback only. That each refuses who has not its token or key is tested with them."""

from __future__ import annotations

import psutil
import pytest
from policy_help import RunningEngine, RunningPolicy

pytestmark = [pytest.mark.slow, pytest.mark.local]


def listens(pid: int) -> set[str]:
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {c.laddr.ip for process in family for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_the_policy_server_listens_on_loopback_only(policy: RunningPolicy) -> None:
    assert listens(policy.process.pid) == {"127.0.0.1"}


def test_the_engine_listens_on_loopback_only(engine: RunningEngine) -> None:
    assert listens(engine.process.pid) == {"127.0.0.1"}


def test_what_the_policy_server_leaves_is_private(policy: RunningPolicy) -> None:
    modes = {str(path): oct(path.lstat().st_mode) for path in policy.home.rglob("*") if path.lstat().st_mode & 0o077}
    assert modes == {}
