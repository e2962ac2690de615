"""What `metaclaw start` was told, as a value: for the process that serves, the one that detaches it, and a restart.

Limits: a restart has to know it, so it lies in ``run/<pid>.start`` while the proxy runs; a ``--set`` that carries a
secret is left out there, and the restart says so.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from metaclaw_core.errors import ConfigError
from metaclaw_core.settings import private_dir

_SECRET_WORDS = ("key", "token", "secret", "password", "auth")


@dataclass(frozen=True, slots=True)
class StartOptions:
    port: int | None = None  # None: proxy.port
    mode: str | None = None  # None: the settings'
    lean: bool = True
    sets: tuple[str, ...] = ()  # NAME=VALUE, of mitmproxy or metaclaw_*
    left_out: tuple[str, ...] = ()  # names of secret sets that were not written down

    def arguments(self) -> list[str]:
        """The same on a command line."""
        words = [] if self.lean else ["--no-lean"]
        if self.port is not None:
            words += ["--port", str(self.port)]
        if self.mode is not None:
            words += ["--mode", self.mode]
        for item in self.sets:
            words += ["--set", item]
        return words

    def over(self, old: StartOptions) -> StartOptions:
        """These, with what they leave open taken from `old`; a set of the same name replaces the old one."""
        named = {item.partition("=")[0] for item in self.sets}
        kept = tuple(item for item in old.sets if item.partition("=")[0] not in named)
        return replace(
            self,
            port=self.port if self.port is not None else old.port,
            mode=self.mode if self.mode is not None else old.mode,
            lean=self.lean and old.lean,
            sets=kept + self.sets,
            left_out=tuple(name for name in old.left_out if name not in named),
        )


def only_tcp(sets: Iterable[str]) -> bool:
    """Does no mode carry QUIC? mitmproxy reads a byte of its first packet within an assertion: under ``-O`` it finds no host in
    it, and waits for more."""
    modes = [item.removeprefix("mode=") for item in sets if item.startswith("mode=")]
    if not modes:
        return True
    from mitmproxy.proxy.mode_specs import ProxyMode

    try:
        return all(ProxyMode.parse(mode).transport_protocol == "tcp" for mode in modes)
    except ValueError:
        return False  # what is wrong with it is said later


def check_sets(sets: tuple[str, ...]) -> None:
    """Raises ConfigError for what is no NAME=VALUE, or has a flag of its own."""
    for item in sets:
        name, separator, _ = item.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {item}: write NAME=VALUE.")
        if name == "listen_port":
            raise ConfigError("--set listen_port: use --port N.")


@contextmanager
def written_down(home: Path, options: StartOptions) -> Iterator[None]:
    """Keep `options` where a restart finds them, as long as this process serves."""
    secret = [item for item in options.sets if _is_secret(item.partition("=")[0])]
    public = replace(
        options,
        sets=tuple(item for item in options.sets if item not in secret),
        left_out=tuple(item.partition("=")[0] for item in secret),
    )
    file = _file(private_dir(home / "run"), os.getpid())
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(asdict(public), out)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def read_back(home: Path, pid: int) -> StartOptions | None:
    """What the proxy `pid` was started with; None if it is none of `metaclaw start`."""
    try:
        found = json.loads(_file(home / "run", pid).read_text())
        return StartOptions(
            found["port"], found["mode"], bool(found["lean"]), tuple(found["sets"]), tuple(found["left_out"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file(run: Path, pid: int) -> Path:
    return run / f"{pid}.start"


def _is_secret(name: str) -> bool:
    return any(word in name for word in _SECRET_WORDS) and "tokens" not in name
