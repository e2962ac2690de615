"""``metaclaw doctor``: gather what the checks need, print what they say."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metaclaw_core.cli.output import json_line
from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.settings import Settings, home

if TYPE_CHECKING:
    from metaclaw_core.doctor import Check
    from metaclaw_core.wiring.records import Wiring

_TINKER = "https://tinker.thinkingmachines.dev/services/tinker-prod"  # the SDK's own default
_DAY = 86400.0


@click.command("doctor")
@click.option("--tinker", is_flag=True, help="Also try the Tinker server with a few hundred tokens.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(tinker: bool, as_json: bool) -> None:
    """Look for what is wrong, with a remedy for each. Changes nothing, and asks nobody outside this machine.

    Exit status 0: all is well, 1: warnings, 2: something fails.
    """
    from metaclaw_core.doctor import exit_status

    found: list[Check] = []
    for check in _checks(tinker):
        found.append(check)
        if not as_json:
            click.echo(f"{click.style(f'{check.status:<4}', fg=_COLOURS[check.status])}  {check.name:<10}  {check.what}")
            if check.remedy:
                click.echo(f"{'':<18}→ {check.remedy}")
    status = exit_status(found)
    if as_json:
        fields = [{"name": c.name, "status": c.status, "what": c.what, "remedy": c.remedy or None} for c in found]
        json_line({"status": ("ok", "warn", "fail")[status], "checks": fields})
    else:
        counts = ", ".join(f"{sum(c.status == name for c in found)} {name}" for name in ("ok", "warn", "fail"))
        click.echo(f"{len(found)} checks: {counts}")
    sys.exit(status)


_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def _checks(tinker: bool) -> Iterator[Check]:
    from metaclaw_core.cli.agentenv import current_environment
    from metaclaw_core.doctor import Check, agents, machine, runtime, setup
    from metaclaw_core.proxy.ca import CERTIFICATE, confdir
    from metaclaw_core.proxy.detach import live_proxies
    from metaclaw_core.wiring import openclaw
    from metaclaw_core.wiring.openclaw_config import proxy_of, timeouts_of
    from metaclaw_core.wiring.records import wirings

    here, environment = home(), current_environment()
    yield machine.check_python(sys.version_info[:3], sys.executable)
    yield machine.check_mitmproxy(machine.mitmproxy_version())
    yield machine.check_disk(machine.free_bytes(here), here)
    yield machine.check_modes(machine.entries(here) if here.exists() else [], os.getuid())
    settings, check = setup.read_settings()
    yield check
    settings = settings or Settings()

    try:
        wired = wirings(here)
    except ConfigError as e:
        wired = []
        yield Check("wiring", "fail", str(e).partition(". ")[0] + ".", str(e).partition(". ")[2])
    live = live_proxies(here)
    ca = Path(next((p.status["ca"] for p in live if p.status and p.status.get("ca")), confdir() / CERTIFICATE))
    yield machine.check_ca(machine.look_at_ca(ca.parent))
    yield runtime.check_proxy(live, settings.proxy.port, not live and runtime.port_is_taken(settings.proxy.port), bool(wired))
    yield runtime.check_worker(live)
    yield runtime.check_spool(runtime.count_spools(here / "spool"), live)
    yield runtime.check_store(settings.store.url or here / "store.db")
    port = next((proxy.port for proxy in live if proxy.port), None)
    probe = runtime.handshake(f"http://127.0.0.1:{port}", ca) if port else None
    yield runtime.check_probe(probe, port, ca)
    if wired:
        yield _wiring(settings, wired)

    user_home = Path.home()
    config = openclaw.config_file(environment, user_home)
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "{}"
    ports = {proxy.port for proxy in live if proxy.port} or {settings.proxy.port}
    for process in agents.openclaw_processes(environment.get("HOME", "")):
        url = process.environment.get("OPENCLAW_PROXY_URL") or proxy_of(text) or process.proxy
        tried = runtime.handshake(url, process.ca_file) if port and url and process.ca_file else None
        yield agents.check_process(process, ports, proxy_of(text), tried)
    yield _sessions(settings, openclaw.state_dir(environment, user_home))
    yield setup.check_llm(settings)
    yield setup.check_tinker(settings, environment)
    yield setup.check_skills(settings)
    yield setup.check_timeouts(settings, timeouts_of(text))
    if tinker:
        yield from _conformance(settings, environment)


def _wiring(settings: Settings, wired: list[Wiring]) -> Check:
    from metaclaw_core.doctor import Check
    from metaclaw_core.wiring.units import read_environment_file

    again = "metaclaw wire openclaw again, or --undo."
    for wiring in wired:
        if not Path(wiring.file).exists():
            return Check("wiring", "warn", f"{wiring.file} is gone, so {wiring.unit or 'OpenClaw'} is no longer wired.", again)
        urls = {wiring.url} - {""}
        if wiring.unit:
            file = home() / "wire" / f"{wiring.unit}.env"
            if not file.exists():
                return Check("wiring", "fail", f"{file} is gone: {wiring.unit} goes past the proxy from its next start on.", again)
            variables = read_environment_file(file.read_text(encoding="utf-8", errors="replace"))
            if not Path(variables.get("NODE_EXTRA_CA_CERTS", "")).is_file():
                return Check("wiring", "fail", f"The CA that {wiring.unit} is told to trust is gone.", again)
            urls |= {value for name, value in variables.items() if name == "HTTPS_PROXY"}
        if wrong := sorted(urls - {f"http://127.0.0.1:{settings.proxy.port}"}):
            return Check("wiring", "warn", f"{wiring.unit or wiring.file} uses {wrong[0]}, the settings say port {settings.proxy.port}.", again)
    return Check("wiring", "ok", "; ".join(map(str, wired)))


def _sessions(settings: Settings, state_dir: Path) -> Check:
    """Only what came after this home was first used, and within a day."""
    from sqlalchemy import func, select

    from metaclaw_core.doctor import Check, agents
    from metaclaw_core.store.db import open_store
    from metaclaw_core.store.tables import sessions, turns

    now = time.time()
    born = home() / "principal.key"
    if not born.exists():
        return Check("sessions", "ok", "Nothing was recorded yet, so nothing can be compared")
    activity = agents.openclaw_activity(state_dir, max(now - _DAY, born.stat().st_mtime))
    target = settings.store.url or home() / "store.db"
    if not activity or (isinstance(target, Path) and not target.exists()):
        return agents.check_activity(activity, {}, now)
    ended = func.max(turns.c.started_at + func.coalesce(turns.c.duration_ms, 0) / 1000)
    query = select(sessions.c.session_id, ended).join(turns, turns.c.session == sessions.c.id).group_by(sessions.c.session_id)
    try:
        with open_store(target) as store, store.reading() as connection:
            names = [session.session_id for session in activity]
            recorded = {name: float(at) for name, at in connection.execute(query.where(sessions.c.session_id.in_(names[:500])))}
    except MetaClawError:
        return Check("sessions", "ok", "Not compared, the store can't be read")
    return agents.check_activity(activity[:500], recorded, now)


def _conformance(settings: Settings, environment: Mapping[str, str]) -> Iterator[Check]:
    from metaclaw_core.doctor import Check, setup

    rl = settings.rl
    base = rl.tinker_base_url or environment.get("TINKER_BASE_URL") or _TINKER
    key = rl.tinker_api_key or environment.get("TINKER_API_KEY", "")
    if not rl.model:
        yield Check("tinker", "fail", "rl.model is not set, so there is nothing to try.", "metaclaw config rl.model NAME")
        return
    try:
        from metaclaw_core.engine.conformance import conformance
    except ImportError as e:
        yield Check("tinker", "fail", f"The Tinker SDK is not installed ({e}).", "pip install 'metaclaw-mitmproxy[rl]'")
        return
    import asyncio

    results = asyncio.run(conformance(base, key, rl.model))
    yield from setup.check_conformance([(result.name, result.status, result.detail) for result in results])
