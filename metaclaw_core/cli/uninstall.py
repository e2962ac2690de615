"""``metaclaw uninstall``: everything MetaClaw wrote goes, in the order that leaves no agent without a network.

Design: wirings first (the gateway restarts without the proxy), then the service, then proxies that run by hand, then
the files. Of METACLAW_HOME only what is known to be ours is removed; what somebody else put there is named and stays.
The program itself is the package manager's to remove.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import click

from metaclaw_core.cli.optimised import COMPILED, environment_folder
from metaclaw_core.cli.wire import YES, carry_out, undo_all
from metaclaw_core.errors import ConfigError, MetaClawError
from metaclaw_core.settings import Settings, home, load_settings

_OURS = (
    *("config.yaml", "wirings.json", "wire", "ca", "mitmproxy", "spool", "run", "logs", "principal.key", "engine"),
    *("store.db", "store.db-wal", "store.db-shm", "skills.index", COMPILED),
)
_GRACE = 60.0
_WORKER_SECONDS = 15.0


@click.command("uninstall")
@click.option("--skills", is_flag=True, help="Remove your own and learned skills too; without it they stay.")
@click.option("--grace", type=click.FloatRange(0, 3600), default=_GRACE, show_default=True, help="Seconds to let open answers end.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@YES
def command(skills: bool, grace: float, dry_run: bool, yes: bool) -> None:
    """Undo every wiring, remove the service, stop the proxy and remove METACLAW_HOME. Your skills stay unless --skills."""
    from metaclaw_core.proxy.detach import live_proxies, stop
    from metaclaw_core.wiring.service import this_manager

    here = home()
    ours = _present(here, skills)
    running = live_proxies(here)
    click.echo("\n".join(["Uninstalling", *(f"  stop the proxy {live}" for live in running), *(f"  remove {path}" for path in ours)]))
    if not ours:
        click.echo(f"  nothing of MetaClaw's is in {here}")
    for note in _stays(here, skills):
        click.echo(f"  {note}")
    if not undo_all(restart=True, dry_run=dry_run, yes=yes, as_json=False) and not dry_run:
        raise ConfigError("The wiring is still in force, so nothing else was done.")
    manager = this_manager()
    steps = manager.remove_steps()
    if steps and not carry_out(steps, dry_run=dry_run, yes=yes, as_json=False, nothing="") and not dry_run:
        raise ConfigError("The service is still installed, so nothing else was done.")
    if dry_run or not (ours or running):
        return
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("Nobody can be asked here: add --yes to do it, or --dry-run to only see it.")
        if not click.confirm("Stop the proxy and remove these files for good?", default=False):
            return
    running = live_proxies(here)
    children = [child["pid"] for live in running if live.status for child in live.status["children"] if child["pid"]]
    for live in running:
        stop(live, grace)
    _wait_for(children)
    for path in _present(here, skills):  # looked up again: the last exchanges may have made the store
        _remove(path)
    left = _left(here)
    click.echo(f"{here} still holds {', '.join(left)}." if left else f"{here} is gone.")
    click.echo("The program: pip uninstall metaclaw-mitmproxy (or uv tool, pipx).")


def _present(here: Path, skills: bool) -> list[Path]:
    names = (*_OURS, *(("skills",) if skills else ()))
    paths = [here / name for name in names]
    if os.access(environment_folder(), os.W_OK):  # else it isn't ours to remove
        paths.append(environment_folder() / COMPILED)
    return [path for path in paths if path.exists()]


def _stays(here: Path, skills: bool) -> list[str]:
    """What is not removed, as sentences."""
    try:
        settings = load_settings()
    except ConfigError:
        settings = Settings()
    notes = []
    own = here / "skills"
    if own.exists() and not skills:
        notes.append(f"keep {own} (--skills removes it too)")
    if settings.skills.dir != Settings().skills.dir and Path(settings.skills.dir).expanduser() != own:
        notes.append(f"keep {settings.skills.dir}, which is not in {here}")
    if settings.store.url:
        notes.append("keep the database of store.url: `metaclaw purge --all` empties it before")
    return notes


def _wait_for(pids: list[int]) -> None:
    """The worker takes in the last exchanges when its proxy has ended; its files must not come back."""
    deadline = time.monotonic() + _WORKER_SECONDS
    while pids and time.monotonic() < deadline:
        pids = [pid for pid in pids if _runs(pid)]
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        raise MetaClawError(f"{e.filename or path} can't be removed ({e.strerror}): remove {path} by hand.") from e


def _left(here: Path) -> list[str]:
    """What others put there; an empty home goes."""
    if not here.exists():
        return []
    left = sorted(entry.name for entry in os.scandir(here))
    if not left and not here.is_symlink():
        here.rmdir()
    return left
