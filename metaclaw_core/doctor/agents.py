"""Agents that run, and what they did that we have not seen.

Design: a process shows its environment to its own user (/proc/PID/environ), so it can be told whether it uses the
proxy and trusts the CA; the CA is tried by a handshake, not guessed from a name. What went past us is told by
OpenClaw's own record: a session whose transcript grew while the store has nothing of it.

Limits: Linux only. Of OpenClaw's configuration ``proxy.proxyUrl`` counts, nothing per provider. Only processes with
the same HOME are ours to judge. A turn that failed before it reached an LLM also looks like one that went past us, so
it is a warning.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from metaclaw_core.doctor import Check
from metaclaw_core.doctor.runtime import Probe

_GRACE = 120.0  # seconds between OpenClaw's note of an answer and ours
_NAME = re.compile(r"(^|/)openclaw(\.m?js)?$|/openclaw/dist/[\w./-]+\.m?js$")
_PROXIES = ("OPENCLAW_PROXY_URL", "HTTPS_PROXY", "https_proxy")
_REMEDY = "Start it with `metaclaw run -- …`; OpenClaw's own service: metaclaw wire openclaw, then openclaw gateway restart."


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    name: str
    environment: Mapping[str, str]

    @property
    def proxy(self) -> str | None:
        return next((self.environment[name] for name in _PROXIES if self.environment.get(name)), None)

    @property
    def ca_file(self) -> Path | None:
        named = self.environment.get("NODE_EXTRA_CA_CERTS")
        return Path(named) if named else None


def openclaw_processes(user_home: str, proc: Path = Path("/proc")) -> list[Process]:
    """This user's OpenClaw processes with this HOME."""
    found = []
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or not ours
            if folder.stat().st_uid != os.getuid():
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            comm = (folder / "comm").read_text().strip()
            if not is_openclaw(comm, words):
                continue
            pairs = (entry.partition("=") for entry in (folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            environment = {name: value for name, _, value in pairs if name}
            if environment.get("HOME") == user_home:
                found.append(Process(int(folder.name), words[0] if words[0].startswith("openclaw") else comm, environment))
    return sorted(found, key=lambda process: process.pid)


def is_openclaw(comm: str, words: Sequence[str]) -> bool:
    """By the title it gives itself (the kernel keeps 15 letters), or the script that Node runs."""
    return comm.startswith("openclaw") or any(_NAME.search(word.split(" ")[0]) for word in words[:2])


def check_process(process: Process, ports: Iterable[int], config_proxy: str | None, probe: Probe | None) -> Check:
    """`ports`: where the proxy is, or should be; `probe`: a handshake with the process' own proxy and CA file."""
    name = f"{process.name} (pid {process.pid})"
    url = process.environment.get("OPENCLAW_PROXY_URL") or config_proxy or process.proxy
    if url is None:
        return Check("agent", "fail", f"{name} goes past the proxy: it has no proxy variable.", _REMEDY)
    if not _is_ours(url, ports):
        return Check("agent", "fail", f"{name} uses another proxy ({_bare(url)}).", _REMEDY)
    if process.ca_file is None:
        if process.environment.get("NODE_USE_SYSTEM_CA") == "1":
            return Check("agent", "ok", f"{name} uses the proxy and the system's CAs")
        return Check("agent", "fail", f"{name} uses the proxy and does not trust its CA (no NODE_EXTRA_CA_CERTS).", _REMEDY)
    if probe is not None and not probe.ok:
        return Check("agent", "fail", f"{name} can't talk through the proxy with {process.ca_file}: {probe.problem}.", _REMEDY)
    return Check("agent", "ok", f"{name} uses the proxy" + (" and trusts its CA" if probe is not None else ""))


def _is_ours(url: str, ports: Iterable[int]) -> bool:
    with contextlib.suppress(ValueError):
        found = urlsplit(url)
        return found.hostname in ("127.0.0.1", "localhost", "::1") and found.port in set(ports)
    return False


def _bare(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


# --- sessions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Activity:
    """A session by OpenClaw's own record."""

    session_id: str
    key: str
    at: float  # unix seconds of its newest transcript entry


def openclaw_activity(state_dir: Path, since: float) -> list[Activity]:
    """Sessions whose transcript grew after `since`, from every agent's database; [] where there is none to read."""
    found: list[Activity] = []
    for path in sorted(state_dir.glob("agents/*/agent/openclaw-agent.sqlite")):
        # Read as it lies there, without its log, where nobody has it open: nothing is written beside it.
        how = "mode=ro" if path.with_name(f"{path.name}-shm").exists() else "immutable=1"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as database:
            rows = database.execute(
                "SELECT session_id, session_key, transcript_updated_at FROM session_windows WHERE transcript_updated_at > ?", (since * 1000,)
            )
            found += [Activity(str(name), str(key), at / 1000) for name, key, at in rows]
    return found


def check_activity(activity: Sequence[Activity], recorded: Mapping[str, float], now: float) -> Check:
    """`recorded`: when each session's newest exchange in the store began."""
    settled = [session for session in activity if now - session.at > 10]
    past = [s for s in settled if recorded.get(s.session_id, float("-inf")) < s.at - _GRACE]
    if past:
        newest = max(past, key=lambda session: session.at)
        rest = f" and {len(past) - 1} more" if len(past) > 1 else ""
        known = "nothing of it was recorded" if newest.session_id not in recorded else "its last turn was not recorded"
        return Check(
            "sessions", "warn", f"A session goes past the proxy: OpenClaw worked on {newest.key} ({newest.session_id}){rest}, but {known}.", _REMEDY
        )
    if not activity:
        return Check("sessions", "ok", "OpenClaw had no session lately")
    return Check("sessions", "ok", f"All {len(activity)} sessions of OpenClaw's last day went through the proxy")
