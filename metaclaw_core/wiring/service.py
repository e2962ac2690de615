"""Our own service: ``metaclaw start`` kept alive by systemd or launchd.

Design: the text of the files is `units`; here is where they lie, whether the manager can be reached, and which steps
install and remove them. Installing twice is one installation; a changed command or home is a changed unit.

Limits: launchd's commands are written from Apple's documentation and were not tried. A unit of a user ends when he
logs out, unless lingering is switched on; that is said and not done.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from metaclaw_core.errors import MetaClawError
from metaclaw_core.settings import is_setting_variable
from metaclaw_core.wiring import units
from metaclaw_core.wiring.plan import Run, Step, last_line, remove, run, write


@dataclass(frozen=True, slots=True)
class Manager:
    """The service manager of this user on this system."""

    platform: str
    user_home: Path

    @property
    def launchd(self) -> bool:
        return self.platform == "darwin"

    @property
    def file(self) -> Path:
        return units.launch_agent(self.user_home) if self.launchd else units.unit_folder(self.user_home) / units.SERVICE

    @property
    def installed(self) -> bool:
        return self.file.exists()

    def serves(self, home: Path) -> bool:
        """Is there a service, and is it for this METACLAW_HOME?"""
        try:
            return str(home.absolute()) in self.file.read_text(encoding="utf-8")
        except OSError:
            return False

    @property
    def log_hint(self) -> str:
        return "see logs/proxy.log in METACLAW_HOME" if self.launchd else f"see journalctl --user -u {units.SERVICE}"

    def problem(self) -> str | None:
        """Why it can't be used, as a sentence; None: it can."""
        if self.platform not in ("linux", "darwin"):
            return f"On {self.platform} there is no service manager that this program knows"
        if self.launchd:
            return None
        code, out = run(("systemctl", "--user", "show", "--property=Version"), 10)
        return None if code == 0 else f"systemd's user manager can't be reached ({last_line(out, code)})"

    def state(self) -> dict[str, str]:
        """What the manager says of our service; {} if nothing."""
        if self.launchd:
            code, out = run(("launchctl", "print", f"{self._domain}/{units.LABEL}"), 10)
            return {} if code else {"ActiveState": "active" if "state = running" in out else "inactive"}
        names = "ActiveState,SubState,UnitFileState,MainPID,NRestarts"
        code, out = run(("systemctl", "--user", "show", units.SERVICE, f"--property={names}"), 10)
        return {} if code else dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def install_steps(self, home: Path, gateways: Sequence[str]) -> list[Step]:
        environment = service_environment(home)
        if self.launchd:
            log = home.absolute() / "logs" / "proxy.log"
            steps = write(self.file, units.launchd_plist(command(), environment, log), 0o644)
            return [*steps, *self._launchd_load()] if steps else []
        unit = units.service_unit(command(), environment, sorted({units.GATEWAY, *gateways}))
        known = self.installed
        steps = write(self.file, unit.encode(), 0o644)
        if steps:
            steps.append(Run(("systemctl", "--user", "daemon-reload")))
        state = self.state()
        if state.get("UnitFileState") != "enabled" or state.get("ActiveState") != "active":
            steps.append(Run(("systemctl", "--user", "enable", "--now", units.SERVICE)))
        elif steps and known:
            steps.append(Run(("systemctl", "--user", "restart", units.SERVICE)))
        return steps

    def remove_steps(self) -> list[Step]:
        if not self.installed:
            return []
        if self.launchd:
            return [Run(("launchctl", "bootout", f"{self._domain}/{units.LABEL}"), needed=False), *remove(self.file)]
        return [
            Run(("systemctl", "--user", "disable", "--now", units.SERVICE), needed=False),
            *remove(self.file),
            Run(("systemctl", "--user", "daemon-reload"), needed=False),
        ]

    def _launchd_load(self) -> list[Step]:
        return [
            Run(("launchctl", "bootout", f"{self._domain}/{units.LABEL}"), needed=False),
            Run(("launchctl", "bootstrap", self._domain, str(self.file))),
        ]

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"

    def lingers(self) -> bool | None:
        """Whether the user's services outlive his log-in; None: there is no such thing here."""
        if self.launchd:
            return None
        with contextlib.suppress(OSError, KeyError):
            return (Path("/var/lib/systemd/linger") / getpass.getuser()).exists()
        return None


def this_manager() -> Manager:
    return Manager(sys.platform, Path.home())


def command() -> list[str]:
    """How the service starts the proxy: this very Python, nothing imported from the folder it starts in."""
    return [sys.executable, "-P", "-m", "metaclaw_core.cli.main", "start"]


def service_environment(home: Path) -> dict[str, str]:
    found = {"METACLAW_HOME": str(home.absolute())}
    try:
        metadata.distribution("metaclaw-mitmproxy")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        found["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    return found


def left_behind(environment: Mapping[str, str]) -> list[str]:
    """Settings of this shell that a service does not see."""
    return sorted(name for name in environment if is_setting_variable(name))


def is_ours(pid: int) -> bool:
    """Whether a process runs as our service: then it comes back when it is ended, and is stopped by `stop`."""
    with contextlib.suppress(OSError):
        return units.service_of_cgroup(Path(f"/proc/{pid}/cgroup").read_text()) == units.SERVICE
    return False


def stop() -> None:
    """Stop our service until it is started again or the machine is. Raises MetaClawError."""
    _manage("stop")


def restart() -> None:
    """End our service and start it anew. Raises MetaClawError."""
    _manage("restart")


def _manage(verb: str) -> None:
    code, out = run(("systemctl", "--user", verb, units.SERVICE))
    if code:
        raise MetaClawError(f"systemctl --user {verb} {units.SERVICE} failed ({last_line(out, code)}); `metaclaw service status` says more.")
