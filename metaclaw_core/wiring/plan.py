"""Steps that change something outside METACLAW_HOME: shown first, then carried out.

Design: a step knows what it found; a file that has changed since is not written over. A folder that a step empties
goes with its file, a folder it needs is made. Commands of the service manager come as steps too, so that what is shown
is all that happens.

Limits: no step undoes the ones before it when one fails; each is safe to repeat, and says so.
"""

from __future__ import annotations

import contextlib
import difflib
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaclaw_core.errors import MetaClawError
from metaclaw_core.skills.files import write_atomic

_SECONDS = 120


class StepError(MetaClawError):
    """A step could not be done; those before it are done, and all can be repeated."""


@dataclass(frozen=True, slots=True)
class Write:
    path: Path
    data: bytes
    before: bytes | None  # None: there was no file
    mode: int = 0o600

    def lines(self) -> list[str]:
        if self.before is None:
            return [f"write {self.path}", *(f"    {line}" for line in _text(self.data))]
        changed = difflib.unified_diff(_text(self.before), _text(self.data), n=0, lineterm="")
        return [f"change {self.path}", *(f"    {line}" for line in changed if not line.startswith(("---", "+++", "@@")))]

    def do(self) -> None:
        path = self.path.resolve()  # a link is followed: people keep their configuration in a repository
        if read(path) != self.before:
            raise StepError(f"{self.path} has changed in the meantime and is left alone: run the command again.")
        try:
            path.parent.mkdir(mode=0o755 if self.mode & 0o044 else 0o700, parents=True, exist_ok=True)
            write_atomic(path, self.data, self.mode)
        except OSError as e:
            raise StepError(f"{self.path} can't be written ({e.strerror}): make its folder yours and run the command again.") from e


@dataclass(frozen=True, slots=True)
class Remove:
    path: Path

    def lines(self) -> list[str]:
        return [f"remove {self.path}"]

    def do(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as e:
            raise StepError(f"{self.path} can't be removed ({e.strerror}): remove it by hand.") from e
        if self.path.parent.name.endswith(".d"):
            with contextlib.suppress(OSError):  # others have files there
                self.path.parent.rmdir()


@dataclass(frozen=True, slots=True)
class Run:
    command: tuple[str, ...]
    needed: bool = True  # False: what it is for may not be there (a unit that doesn't run)

    def lines(self) -> list[str]:
        return [f"run {shlex.join(self.command)}"]

    def do(self) -> None:
        code, out = run(self.command)
        if code and self.needed:
            raise StepError(f"{shlex.join(self.command)} failed ({last_line(out, code)}); what was done before it stays.")


type Step = Write | Remove | Run


def write(path: Path, data: bytes, mode: int = 0o600) -> list[Step]:
    """The step that makes `path` hold `data`; none if it does. An existing file keeps its mode."""
    before = read(path)
    if before == data:
        return []
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode & 0o777
    return [Write(path, data, before, mode)]


def remove(path: Path) -> list[Step]:
    return [Remove(path)] if path.exists() or path.is_symlink() else []


def read(path: Path) -> bytes | None:
    """None if there is no file. Raises StepError if it can't be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise StepError(f"{path} can't be read ({e.strerror}): make it readable for you.") from e


def show(steps: Iterable[Step]) -> str:
    return "\n".join(f"  {line}" for step in steps for line in step.lines())


def perform(steps: Sequence[Step]) -> None:
    """All of them in order. Raises StepError at the first that fails."""
    for step in steps:
        step.do()


def run(command: Sequence[str], seconds: float = _SECONDS) -> tuple[int, str]:
    """Exit status and what it printed; 127 where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)  # noqa: S603 - our own words
    except FileNotFoundError:
        return 127, f"there is no {command[0]} here"
    except (OSError, subprocess.TimeoutExpired) as e:
        return 126, str(e)
    return done.returncode, (done.stdout + done.stderr).strip()


def last_line(out: str, code: int) -> str:
    """What a command said at its end, else its status."""
    return out.splitlines()[-1] if out else f"status {code}"


def _text(data: bytes) -> list[str]:
    return data.decode(errors="replace").splitlines()
