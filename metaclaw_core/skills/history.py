"""The history of the user's own skills: a journal of generations, and a copy of every version.

Design: every change is one line of ``.history/journal.jsonl`` that says which folders have which content (a hash),
appended after the folders are in place. The content lies under ``.history/versions/<hash>/``. Before a change,
whatever was edited by hand since the last one is recorded as a generation of its own, and so is what a crash left
between the two steps; so any state that ever was the state at a change can be restored.

Writers exclude each other by a lock on a file; readers need none.

Limits: never pruned; a library of text is small. A folder whose SKILL.md is invalid is kept like any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from metaclaw_core.errors import SkillError
from metaclaw_core.skills.folders import SKILL_FILE, UNFINISHED, copy_files, folder_hash, skill_files, slot, staged
from metaclaw_core.skills.skill import Status

_HISTORY = ".history"


@dataclass(frozen=True, slots=True)
class Change:
    """One generation of the user's own folder."""

    generation: int
    at: str  # ISO 8601, UTC
    action: str  # "add", "archived" and the other statuses, "rollback", "edited" (by hand)
    note: str
    folders: Mapping[str, str | None]  # path below the library → hash of its content; None: gone


class History:
    """Of the user's own folder, which need not exist. See the module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def generation(self) -> int:
        """Of the last recorded change; 0: none yet."""
        history = self.changes()
        return history[-1].generation if history else 0

    def changes(self) -> list[Change]:
        """All changes, oldest first. A last line that a crash cut short is not one."""
        try:
            lines = self._journal.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        changes = []
        for number, line in enumerate(lines, 1):
            try:
                changes.append(Change(**json.loads(line)))
            except (ValueError, TypeError) as e:
                raise SkillError(
                    f"Line {number} of {self._journal} is damaged; restore the file or move it away."
                ) from e
        return changes

    def state_at(self, generation: int) -> dict[str, str]:
        """Path below the library → content hash, as of `generation`."""
        history = self.changes()
        if generation != 0 and generation not in {c.generation for c in history}:
            raise SkillError(
                f"There is no generation {generation}; there are 0 to {history[-1].generation if history else 0}."
            )
        state: dict[str, str] = {}
        for change in history:
            if change.generation > generation:
                break
            for path, digest in change.folders.items():
                if digest is None:
                    state.pop(path, None)
                else:
                    state[path] = digest
        return state

    @contextlib.contextmanager
    def changing(self) -> Iterator[Callable[[str, str], int]]:
        """Holds the lock; what differs from the journal on entry becomes a generation first. Gives the recorder."""
        history = self._folder / _HISTORY
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.mkdir(mode=0o700, exist_ok=True)
        self._versions.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(history / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            for leftover in (
                *self._folder.glob(f"{UNFINISHED}*"),
                *self._folder.glob(f".*/{UNFINISHED}*"),
                *self._versions.glob(f"{UNFINISHED}*"),
            ):
                shutil.rmtree(leftover, ignore_errors=True)
            for place in {slot(self._folder, status) for status in Status}:
                for torn in place.glob(f"*/.{SKILL_FILE}.*.tmp"):  # a writer was killed: it must not become part of the skill
                    torn.unlink(missing_ok=True)
            self._record("edited", "found changed on disk", only_if_changed=True)
            yield self._record  # while the lock is held
        finally:
            os.close(fd)  # releases the lock

    def restore(self, digest: str, target: Path) -> None:
        """Puts the content with that hash in the place of the folder `target`."""
        with staged(target) as staging:
            copy_files(self._versions / digest, staging)

    def lacks(self, digests: Iterable[str]) -> int:
        """How many of these contents are not there."""
        return sum(not (self._versions / digest).is_dir() for digest in digests)

    def _record(self, action: str, note: str, *, only_if_changed: bool = False) -> int:
        last = self.generation
        before = self.state_at(last)
        now = {}
        for status in Status:
            for file in skill_files(slot(self._folder, status), 1):
                path = str(file.parent.relative_to(self._folder))
                now[path] = self._keep(file.parent)
        paths = sorted(now.keys() | before.keys())
        changed = {path: now.get(path) for path in paths if now.get(path) != before.get(path)}
        if only_if_changed and not changed:
            return last
        at = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"generation": last + 1, "at": at, "action": action, "note": note, "folders": changed}
        _append_line(self._journal, json.dumps(line).encode())
        return last + 1

    def _keep(self, folder: Path) -> str:
        """Stores this content of a folder if it is new; its hash."""
        digest = folder_hash(folder)
        target = self._versions / digest
        if not target.is_dir():
            with staged(target) as staging:
                copy_files(folder, staging)
        return digest

    @property
    def _journal(self) -> Path:
        return self._folder / _HISTORY / "journal.jsonl"

    @property
    def _versions(self) -> Path:
        return self._folder / _HISTORY / "versions"


def _append_line(path: Path, line: bytes) -> None:
    """Appends one whole line and makes it durable; a torn one that a crash left is cut off first."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "r+b") as file:
        content = file.read()
        file.seek(content.rfind(b"\n") + 1)
        file.truncate()
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
