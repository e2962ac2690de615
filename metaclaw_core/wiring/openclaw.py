"""What wiring OpenClaw means in steps: the drop-in beside its gateway's unit, or its own configuration, and back.

Design: OpenClaw's paths are derived as it derives them (its variables, its profile), the gateway's environment is
read from its unit, and everything else is `units` and `openclaw_config`. Wiring again is how a changed port or CA gets
there: files of ours are written anew, a value of ours in the configuration is replaced.

Limits: a gateway that is a system-wide unit, or runs in a container, is not ours to touch; the sentence says what its
owner can do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from metaclaw_core.errors import ConfigError
from metaclaw_core.wiring import units
from metaclaw_core.wiring.openclaw_config import proxy_of, set_proxy, unset_proxy
from metaclaw_core.wiring.plan import Run, Step, read, remove, write
from metaclaw_core.wiring.records import Wiring

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "OPENCLAW_PROXY_URL", "NO_PROXY", "no_proxy")
SYSTEM_FOLDERS = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway as a ``systemd --user`` service."""

    unit: str
    file: Path
    environment: dict[str, str]

    @property
    def drop_in(self) -> Path:
        return self.file.with_name(f"{self.unit}.d") / units.DROP_IN


def gateway_units(user_home: Path) -> list[str]:
    return sorted(path.name for path in units.unit_folder(user_home).glob("openclaw-gateway*.service"))


def find_gateway(user_home: Path, environment: Mapping[str, str], asked: str | None = None) -> Gateway | None:
    """The gateway's service; None if it isn't one. Raises ConfigError where several could be meant."""
    unit = units.gateway_name(asked, environment, gateway_units(user_home))
    file = units.unit_folder(user_home) / unit
    text = read(file)
    if text is None:
        return None
    variables, files = units.unit_environment(text.decode(errors="replace"), user_home)
    for name in files:
        with contextlib.suppress(OSError):
            variables |= units.read_environment_file(name.read_text(errors="replace"))
    return Gateway(unit, file, {"HOME": str(user_home), **variables})


def no_gateway(unit: str) -> str:
    """The sentence for a gateway that is no user service."""
    owned = next((folder / unit for folder in SYSTEM_FOLDERS if (folder / unit).exists()), None)
    if owned is not None:
        return (
            f"The gateway is a system-wide service ({owned}), which is not this user's: its owner can give it the lines of "
            "`metaclaw env --shell sh` with `systemctl edit`. Or use --via-config."
        )
    return (
        f"There is no gateway service {unit}: `openclaw gateway install` makes one. A gateway that you start yourself "
        "needs no wiring: metaclaw run -- openclaw gateway run."
    )


def config_file(environment: Mapping[str, str], user_home: Path) -> Path:
    """OpenClaw's configuration."""
    if named := environment.get("OPENCLAW_CONFIG_PATH", "").strip():
        return _below(named, user_home)
    return state_dir(environment, user_home) / "openclaw.json"


def state_dir(environment: Mapping[str, str], user_home: Path) -> Path:
    """Where OpenClaw keeps its sessions."""
    if named := environment.get("OPENCLAW_STATE_DIR", "").strip():
        return _below(named, user_home)
    home = _below(environment.get("OPENCLAW_HOME", "").strip() or str(user_home), user_home)
    profile = environment.get("OPENCLAW_PROFILE", "").strip()
    return home / (f".openclaw-{profile}" if profile and profile.lower() != "default" else ".openclaw")


def _below(name: str, user_home: Path) -> Path:
    return user_home / name[1:].lstrip("/") if name.startswith("~") else Path(name)


def service_steps(
    gateway: Gateway, home: Path, variables: Mapping[str, str], *, after_service: bool, restart: bool
) -> tuple[Wiring, list[Step]]:
    """The drop-in and its environment file; no steps where both are in place."""
    file = _environment_file(home, gateway.unit)
    steps = [
        *write(file, units.environment_file(variables).encode()),
        *write(gateway.drop_in, units.drop_in(file, after_service=after_service).encode(), 0o644),
    ]
    if steps:
        steps += _reload(gateway.unit, restart=restart, needed=True)
    return Wiring("openclaw-service", str(gateway.drop_in), gateway.unit), steps


def config_steps(file: Path, url: str, known: Wiring | None) -> tuple[Wiring, list[Step]]:
    """``proxy.proxyUrl`` in the configuration; `known` is what we put there before. Raises ConfigError."""
    text = _text(file)
    if known is not None:
        if known.url == url and proxy_of(text) == url:
            return known, []
        text = unset_proxy(text, known.url, made_section=known.made_section, name=str(file))
    wired = set_proxy(text, url, str(file))
    wiring = Wiring("openclaw-config", str(file), url=url, made_section=wired.made_section)
    return wiring, write(file, wired.text.encode())


def undo_steps(wiring: Wiring, home: Path, *, restart: bool) -> list[Step]:
    """Takes our own keys and files away; none where they are gone already. Raises ConfigError."""
    file = Path(wiring.file)
    if wiring.kind == "openclaw-service":
        steps = [*remove(file), *remove(_environment_file(home, wiring.unit))]
        # After the removal nothing depends on the manager: where it can't be reached, the next login does the rest.
        return [*steps, *_reload(wiring.unit, restart=restart, needed=False)] if steps else []
    if not file.exists():
        return []
    text = unset_proxy(_text(file), wiring.url, made_section=wiring.made_section, name=str(file))
    return write(file, text.encode())


def unrecorded(user_home: Path, known: list[Wiring]) -> list[Wiring]:
    """Drop-ins of ours that the record does not know, because somebody removed it."""
    files = {wiring.file for wiring in known}
    found = sorted(units.unit_folder(user_home).glob(f"*.service.d/{units.DROP_IN}"))
    return [Wiring("openclaw-service", str(path), path.parent.name.removesuffix(".d")) for path in found if str(path) not in files]


def _reload(unit: str, *, restart: bool, needed: bool) -> list[Step]:
    steps: list[Step] = [Run(("systemctl", "--user", "daemon-reload"), needed)]
    if restart:
        steps.append(Run(("systemctl", "--user", "try-restart", unit), needed))
    return steps


def _environment_file(home: Path, unit: str) -> Path:
    return home.absolute() / "wire" / f"{unit}.env"


def _text(file: Path) -> str:
    data = read(file)
    if data is None:
        raise ConfigError(f"There is no {file}: `openclaw onboard` makes it.")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{file} is no UTF-8 text, so it is left alone.") from e
