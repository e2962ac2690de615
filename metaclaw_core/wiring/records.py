"""Which wirings are in force: ``wirings.json`` in METACLAW_HOME.

Design: written before anything else of a wiring is, and taken back after everything else of it is, so that a crash in
between leaves a record too many and never one too few. `wirings` is what `stop` and `uninstall` ask.

Limits: a wiring whose files somebody has removed by hand is still listed; undoing it then only clears the record.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import private_dir
from metaclaw_core.skills.files import write_atomic

FILE = "wirings.json"


@dataclass(frozen=True, slots=True)
class Wiring:
    kind: Literal["openclaw-service", "openclaw-config"]
    file: str  # of another program's that we changed, or ours beside it
    unit: str = ""  # of a service
    url: str = ""  # what we put into a configuration
    made_section: bool = False  # the configuration had no `proxy` before

    def __str__(self) -> str:
        if self.kind == "openclaw-service":
            return f"OpenClaw's service {self.unit} uses the proxy ({self.file})"
        return f"OpenClaw's configuration names the proxy ({self.file})"

    @property
    def undo(self) -> str:
        return "metaclaw wire openclaw --undo"


def wirings(home: Path) -> list[Wiring]:
    """Those in force, oldest first. Raises ConfigError for a file that is none of ours."""
    path = home / FILE
    try:
        return [Wiring(**entry) for entry in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as e:
        raise ConfigError(
            f"{path} can't be read ({e}). Undo by hand: remove {{systemd's folder}}/openclaw-gateway.service.d/metaclaw.conf "
            "and proxy.proxyUrl from openclaw.json, then that file."
        ) from e


def remember(home: Path, wiring: Wiring) -> None:
    """Add it, or put it in the place of the one of the same file."""
    _write(home, [*(known for known in wirings(home) if known.file != wiring.file), wiring])


def forget(home: Path, wiring: Wiring) -> None:
    _write(home, [known for known in wirings(home) if known != wiring])


def _write(home: Path, entries: list[Wiring]) -> None:
    if not entries:
        (home / FILE).unlink(missing_ok=True)
        return
    private_dir(home)
    write_atomic(home / FILE, json.dumps([asdict(entry) for entry in entries], indent=1).encode() + b"\n")
