"""The files of service managers, as text: our unit, the drop-in beside OpenClaw's, the launchd job.

Design: the proxy is a ``systemd --user`` unit that comes back one second after any end and is never given up, because
a wired agent has no network without it; it starts before the gateway and ends after it. The gateway's environment
comes by a drop-in ``<unit>.d/metaclaw.conf``, which OpenClaw (2026.9.6) leaves alone when it writes its unit anew. It
names an EnvironmentFile: unlike a line ``Environment=`` that one rules over the files the unit itself names, and
OpenClaw's own doctor does not take it for a proxy that somebody left in the unit. The file is optional (``-``): when
METACLAW_HOME is gone, the gateway's next start is simply without the proxy.

Limits: launchd has no drop-ins, and OpenClaw writes its job there anew; `wire` says what to do instead. The unit has
no readiness protocol: the gateway may start while the proxy still does, and its own retries cover the second between.
"""

from __future__ import annotations

import plistlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from metaclaw_core.errors import ConfigError

SERVICE = "metaclaw.service"
LABEL = "ai.metaclaw.proxy"
GATEWAY = "openclaw-gateway.service"
DROP_IN = "metaclaw.conf"
_MARK = "# Written by `metaclaw {}`; `metaclaw {}` takes it away."
_ENV_SAFE = re.compile(r"[\w@%+=:,./~-]*")


def unit_folder(user_home: Path) -> Path:
    """Where OpenClaw writes its unit, and so do we, whatever XDG_CONFIG_HOME says in a shell."""
    return user_home / ".config" / "systemd" / "user"


def launch_agent(user_home: Path) -> Path:
    return user_home / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def service_unit(command: Sequence[str], environment: Mapping[str, str], gateways: Sequence[str]) -> str:
    """The unit of `metaclaw start`. `gateways`: units that must find the proxy when they start."""
    return "\n".join(
        [
            _MARK.format("service install", "service remove"),
            "[Unit]",
            "Description=MetaClaw proxy",
            f"Before={' '.join(gateways)}",
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(_argument(word) for word in command)}",
            *(_environment(name, value) for name, value in environment.items()),
            "Restart=always",
            "RestartSec=1",
            "KillMode=mixed",
            "TimeoutStopSec=30",
            "OOMPolicy=continue",
            "UMask=0077",
            "NoNewPrivileges=yes",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def launchd_plist(command: Sequence[str], environment: Mapping[str, str], log: Path) -> bytes:
    """The same for launchd."""
    job = {
        "Label": LABEL,
        "ProgramArguments": list(command),
        "EnvironmentVariables": dict(environment),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 1,
        "ProcessType": "Interactive",
        "Umask": 0o077,
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }
    return plistlib.dumps(job, sort_keys=False)


def drop_in(environment_file: Path, *, after_service: bool) -> str:
    """What is laid beside the gateway's unit."""
    lines = [_MARK.format("wire openclaw", "wire openclaw --undo")]
    if after_service:
        lines += ["[Unit]", f"Wants={SERVICE}", f"After={SERVICE}", ""]
    return "\n".join([*lines, "[Service]", f"EnvironmentFile=-{_file_pattern(environment_file)}", ""])


def environment_file(variables: Mapping[str, str]) -> str:
    """Lines that systemd, a shell and dotenv read alike."""
    lines = [_MARK.format("wire openclaw", "wire openclaw --undo")]
    for name, value in variables.items():
        _one_line(value)
        quoted = value if _ENV_SAFE.fullmatch(value) else '"' + re.sub(r'(["\\$`])', r"\\\1", value) + '"'
        lines.append(f"{name}={quoted}")
    return "\n".join([*lines, ""])


def unit_environment(text: str, home: Path) -> tuple[dict[str, str], list[Path]]:
    """What a unit says of its environment: variables it sets, and the files it names for more."""
    variables: dict[str, str] = {}
    files: list[Path] = []
    for key, value in _service_settings(text):
        if key == "Environment":
            for word in _words(value):
                name, separator, found = word.partition("=")
                if separator:
                    variables[name] = found.replace("%%", "%").replace("%h", str(home))
        elif key == "EnvironmentFile" and value:
            name = value.removeprefix("-").replace("%%", "\0").replace("%h", str(home)).replace("\0", "%")
            files.append(Path(re.sub(r"\\(.)", r"\1", name)))
    return variables, files


def read_environment_file(text: str) -> dict[str, str]:
    """NAME=VALUE lines; what is none is passed over, as systemd does."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and name and name[0] not in "#;":
            found[name.strip()] = _unquoted(value.strip())
    return found


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == "'" else value


def gateway_name(asked: str | None, environment: Mapping[str, str], found: Sequence[str]) -> str:
    """Which gateway is meant: the one asked for, the one OpenClaw's own variables name, or the only one there is.

    Raises ConfigError where several could be meant.
    """
    name = asked or environment.get("OPENCLAW_SYSTEMD_UNIT", "").strip()
    profile = environment.get("OPENCLAW_PROFILE", "").strip()
    if name:
        return name if name.endswith(".service") else f"{name}.service"
    if profile and profile.lower() != "default":
        return f"openclaw-gateway-{profile}.service"
    if GATEWAY not in found and len(found) > 1:
        raise ConfigError(f"There are several gateways ({', '.join(found)}): name one with --unit NAME.")
    return GATEWAY if GATEWAY in found or not found else found[0]


def service_of_cgroup(text: str) -> str | None:
    """The ``….service`` a process belongs to, from its /proc/PID/cgroup."""
    for line in text.splitlines():
        for part in reversed(line.rpartition(":")[2].split("/")):
            if part.endswith(".service") and not part.startswith("user@"):
                return part
    return None


def system_lines(variables: Mapping[str, str]) -> dict[str, list[str]]:
    """The lines that give everything in a desktop session the proxy, by the place they go to."""
    return {
        "~/.config/environment.d/60-metaclaw.conf (Linux; from the next login on)": [
            line for line in environment_file(variables).splitlines() if not line.startswith("#")
        ],
        "launchctl (macOS; until the next restart)": [
            f"launchctl setenv {name} {shlex.quote(value)}" for name, value in variables.items()
        ],
        "setx (Windows; for programs that start from now on)": [f'setx {name} "{value}"' for name, value in variables.items()],
    }


def _service_settings(text: str) -> Iterator[tuple[str, str]]:
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            section = line
        elif section == "[Service]" and line and line[0] not in "#;":
            key, _, value = line.partition("=")
            yield key.strip(), value.strip()


def _words(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError:  # a quote that does not end: systemd ignores such a line
        return []


def _argument(word: str) -> str:
    """One word of ExecStart."""
    _one_line(word)
    word = word.replace("%", "%%").replace("$", "$$")
    return word if re.fullmatch(r"[\w@%$+=:,./~-]+", word) else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _environment(name: str, value: str) -> str:
    _one_line(value)
    word = f"{name}={value}".replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'Environment="{word}"'


def _file_pattern(path: Path) -> str:
    """A path in EnvironmentFile=, which is a glob."""
    _one_line(str(path))
    return re.sub(r"([*?\[\\])", r"\\\1", str(path)).replace("%", "%%")


def _one_line(value: str) -> None:
    if re.search(r"[\n\r\0]", value):
        raise ConfigError(f"{value!r} has a line break, which no service file can hold: use another path.")
