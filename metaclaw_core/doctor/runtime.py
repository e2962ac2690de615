"""What runs: the proxy, its worker, what waits in the spools, whether the store is whole, whether TLS works through it.

Design: the probe is a CONNECT and a TLS handshake for a name below a provider's that nobody has: the proxy answers it
with a certificate of its own CA before it would connect anywhere (``connection_strategy=lazy``). A name that agents
use is not taken, because a connection without a request looks like a client that distrusts the CA.

Limits: of the store the newest answers are derived again, not all (`metaclaw store verify` does that).
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import make_url, select

from metaclaw_core import __version__
from metaclaw_core.doctor import Check
from metaclaw_core.errors import MetaClawError
from metaclaw_core.proxy.detach import Live
from metaclaw_core.store.chain import rederived, unpack_message
from metaclaw_core.store.db import open_store
from metaclaw_core.store.migrations import MIGRATIONS
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.spool import SpoolError, SpoolReader
from metaclaw_core.store.tables import messages, turns

PROBE_HOST = "doctor.metaclaw.api.openai.com"  # below a provider's, so that it is decrypted; nobody has it
_SAMPLE = 200
_BACKLOG = 1000
_SECONDS = 10.0


# --- the proxy --------------------------------------------------------------------------------


def port_is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_proxy(live: Sequence[Live], wanted: int, taken: bool, wired: bool) -> Check:
    """`taken`: something listens on the wanted port; `wired`: an agent has no network without the proxy."""
    if not live:
        if taken:
            return Check("proxy", "fail", f"Port {wanted} is another program's, and no proxy of this home runs.", "Another port: metaclaw config proxy.port N, then metaclaw start.")
        if wired:
            return Check("proxy", "fail", "No proxy runs, and a wired agent has no network without it.", "metaclaw service install, or metaclaw start --detach; or metaclaw wire openclaw --undo.")
        return Check("proxy", "warn", "No proxy runs.", "metaclaw start, or metaclaw run -- COMMAND, which brings one.")
    for proxy in live:
        if proxy.status is None:
            return Check("proxy", "fail", f"The proxy {proxy} does not answer.", "metaclaw restart; its log is logs/proxy.log.")
        if proxy.port is None:
            return Check("proxy", "warn", f"The proxy {proxy} listens nowhere on 127.0.0.1.", "metaclaw restart")
    if wired and all(proxy.port != wanted for proxy in live):
        return Check("proxy", "fail", f"The proxy runs {live[0]}, but agents are wired to port {wanted}.", "metaclaw wire openclaw again, or metaclaw restart --port with the old one.")
    old = [proxy for proxy in live if proxy.status and proxy.status.get("version") not in (None, __version__)]
    if old:
        return Check("proxy", "warn", f"The proxy {old[0]} is of version {old[0].status['version'] if old[0].status else ''}, this is {__version__}.", "metaclaw restart")
    bypassed = [proxy for proxy in live if proxy.status and proxy.status.get("bypass")]
    if bypassed:
        return Check("proxy", "warn", f"The proxy {bypassed[0]} lets everything pass unchanged (bypass is on).", "metaclaw bypass off")
    return Check("proxy", "ok", f"The proxy runs {', '.join(map(str, live))}")


def check_worker(live: Sequence[Live]) -> Check:
    answered = [proxy.status for proxy in live if proxy.status is not None]
    if not answered:
        return Check("worker", "ok", "Starts with the proxy")
    children: list[Mapping[str, Any]] = [child for status in answered for child in status.get("children", ())]
    if not children:
        return Check("worker", "warn", "The proxy has no worker: nothing is taken in or learned.", "metaclaw worker, or start the proxy without metaclaw_worker=false.")
    for child in children:
        if child["pid"] is None:
            return Check("worker", "fail", f"The {child['name']} does not run (last exit {child['last_exit']}, {child['restarts']} restarts).", f"See logs/{child['name']}.log in METACLAW_HOME.")
        if child["restarts"] > 3:
            return Check("worker", "warn", f"The {child['name']} was started again {child['restarts']} times.", f"See logs/{child['name']}.log in METACLAW_HOME.")
    return Check("worker", "ok", ", ".join(f"{child['name']} runs (pid {child['pid']})" for child in children))


@dataclass(frozen=True, slots=True)
class SpoolCounts:
    waiting: int
    aside: int
    problems: tuple[str, ...] = ()


def count_spools(folder: Path) -> SpoolCounts:
    waiting = aside = 0
    problems: list[str] = []
    for path in sorted(folder.glob("*.db")):
        try:
            with SpoolReader(path) as reader:
                more, less = reader.counts()
            waiting, aside = waiting + more, aside + less
        except SpoolError as e:
            problems.append(str(e))
    return SpoolCounts(waiting, aside, tuple(problems))


def check_spool(counts: SpoolCounts, live: Sequence[Live]) -> Check:
    for proxy in live:
        spool = proxy.status.get("spool", {}) if proxy.status else {}
        if spool.get("dropped"):
            return Check("spool", "fail", f"{spool['dropped']} exchanges were lost because they could not be written ({spool.get('last_error')}).", "Make room on the disk, then metaclaw restart.")
        if spool.get("last_error"):
            return Check("spool", "fail", f"Exchanges can't be written at the moment: {spool['last_error']}", "Make room on the disk, or METACLAW_HOME writable.")
    if counts.problems:
        return Check("spool", "fail", counts.problems[0], "Move the file away; what it holds can't be taken in.")
    if counts.aside:
        return Check("spool", "warn", f"{counts.aside} recorded exchanges can't be taken in; they lie in their spool.", "logs/worker.log says why; metaclaw purge forgets them.")
    if counts.waiting > _BACKLOG:
        return Check("spool", "warn", f"{counts.waiting} exchanges wait to be taken in.", "metaclaw turns takes them in now; if they grow, see logs/worker.log.")
    return Check("spool", "ok", f"{counts.waiting} exchanges wait to be taken in")


# --- the probe --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """How a TLS handshake through the proxy ended."""

    ok: bool
    problem: str = ""
    untrusted: bool = False  # the certificate is not of a CA in the file


def handshake(proxy_url: str, ca_file: Path, host: str = PROBE_HOST) -> Probe:
    """CONNECT and TLS through the proxy, trusting only the CAs in `ca_file`, as an agent would."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as e:
        return Probe(ok=False, problem=f"{ca_file} can't be used: {e.strerror or e}")
    address = urlsplit(proxy_url)
    try:
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=_SECONDS) as connection:
            connection.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n".encode())
            head = _head(connection)
            if head.split(b" ", 2)[1:2] != [b"200"]:
                said = head.split(b"\r\n", 1)[0].decode(errors="replace")
                return Probe(ok=False, problem=f"the proxy answered {said!r}" if head else "the proxy hung up")
            with context.wrap_socket(connection, server_hostname=host):
                return Probe(ok=True)
    except ssl.SSLCertVerificationError as e:
        return Probe(ok=False, problem=e.verify_message, untrusted=True)
    except (OSError, ValueError) as e:
        return Probe(ok=False, problem=str(e))


def _head(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < 65536:
        more = connection.recv(4096)
        if not more:
            break
        data += more
    return data


def check_probe(probe: Probe | None, port: int | None, ca_file: Path) -> Check:
    """`probe` with our own CA, as `metaclaw run` and `env` give it; None: no proxy to try."""
    if probe is None or port is None:
        return Check("tls", "ok", "Not tried, no proxy runs")
    if probe.ok:
        return Check("tls", "ok", f"TLS through 127.0.0.1:{port} works with {ca_file}")
    if probe.untrusted:
        return Check("tls", "fail", f"The proxy on port {port} does not use the CA in {ca_file} ({probe.problem}).", "metaclaw restart, then start agents anew: the CA was replaced.")
    return Check("tls", "fail", f"TLS through 127.0.0.1:{port} fails: {probe.problem}.", "metaclaw restart; logs/proxy.log says more.")


# --- the store --------------------------------------------------------------------------------


def check_store(target: str | Path) -> Check:
    """Reads it; a database that is of an older version is not migrated for it."""
    if isinstance(target, Path) or "://" not in target or target.startswith("sqlite"):
        path = Path(target) if "://" not in str(target) else Path(make_url(str(target)).database or "")
        if not path.exists():
            return Check("store", "ok", "Nothing has been recorded yet")
        early = _version(path)
        if early is not None:
            return early
    try:
        with open_store(target) as store:
            count, problems = sample(store)
    except MetaClawError as e:
        return Check("store", "fail", str(e), "Move the file away or restore a copy; traffic goes on, and a new one is made.")
    if problems:
        return Check("store", "fail", f"The store is damaged: {problems[0]}.", "metaclaw store verify lists all of it.")
    return Check("store", "ok", f"The store opens, and its newest {count} messages are what they were")


def _version(path: Path) -> Check | None:
    known = {step.__name__ for step in MIGRATIONS}
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            applied = {name for (name,) in database.execute("SELECT name FROM metaclaw_migrations")} if "metaclaw_migrations" in tables else set()
    except sqlite3.Error as e:
        return Check("store", "fail", f"{path} can't be read ({e}).", "Move the file away or restore a copy; traffic goes on, and a new one is made.")
    if newer := sorted(applied - known):
        return Check("store", "fail", f"{path} was written by a newer MetaClaw (it has {', '.join(newer)}).", "Upgrade MetaClaw, or set METACLAW_HOME to another folder.")
    if known - applied:
        return Check("store", "ok", f"{path} is of an older version; the next start brings it up to date")
    return None


def sample(store: Store, limit: int = _SAMPLE) -> tuple[int, list[str]]:
    """The newest answers derived again: how many, and what is wrong."""
    newest = select(turns.c.response_tip).where(turns.c.response_tip.is_not(None)).order_by(turns.c.id.desc()).limit(limit)
    problems: list[str] = []
    with store.reading() as connection:
        tips = set(connection.scalars(newest))
        rows = connection.execute(select(messages).where(messages.c.id.in_(tips))).all()
    problems += [f"message {tip} is missing" for tip in sorted(tips - {row.id for row in rows})]
    for row in rows:
        try:
            derived = rederived(row.id, row.parent, unpack_message(row.role, row.content))
        except (KeyError, TypeError, ValueError) as e:
            problems.append(f"message {row.id} can't be read: {e}")
            continue
        if derived != row.id:
            problems.append(f"message {row.id} has content that hashes to {derived}")
    return len(rows), problems
