"""``metaclaw doctor``: what is wrong, and what to do about it.

Design: a check is a pure function from what was found to a `Check`; whoever looks (files, sockets, processes) stands
beside it and is small. Nothing leaves the machine: the probe of the proxy is a TLS handshake for a host name that
nobody has. The one exception is `--tinker`, which is asked for. Nothing is changed either: the store is read as it is.

    machine   Python, mitmproxy, disk, modes, the CA
    setup     settings, keys, skills, time-outs
    runtime   the proxy and its worker, spools, the store
    agents    processes that run, and sessions that went past the proxy
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

type Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Status
    what: str  # what was found, a sentence
    remedy: str = ""  # what to do; never empty unless ok


def exit_status(checks: Iterable[Check]) -> int:
    """0: all is well, 1: warnings, 2: something fails."""
    return max(({"ok": 0, "warn": 1, "fail": 2}[check.status] for check in checks), default=0)
