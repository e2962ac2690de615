"""The skills on disk: layers of plain folders, and a history of the user's own one.

Design: a skill is a folder with a SKILL.md, whoever wrote it. Layers, the first that has a name wins: the user's
own folder (`skills.dir`), then the extra folders of the settings (OpenClaw's, Claude's; read only), then the bank
that ships with the program. A skill's status is where it lies in the user's folder:

    <name>/SKILL.md                 active
    .candidate/<name>/SKILL.md      proposed; beside an active one of the same name, which it may replace
    .stale/<name>/                  still used
    .archived/<name>/               not used; hides skills of that name in the lower layers
    .quarantined/<name>/            the same
    .history/                       ours: the journal, a copy of every version, the lock

so a human sees everything with `ls`, and bringing a skill back changes no byte of it. Archiving a skill of a lower
layer copies it up and archives the copy.

Every change is a generation: one line of `.history/journal.jsonl` that says which folders have which content
(a hash), appended after the folders are in place. The content lies under `.history/versions/<hash>/`. Before a
change, whatever was edited by hand since the last one is recorded as a generation of its own, and so is what a crash
left between the two steps; so `rollback` can restore any state that ever was the state at a change. A rollback is a new
generation itself.

Writers exclude each other by a lock on a file; readers need none, because a file or folder appears by a rename.

Limits: another program that is pointed at the user's folder must skip hidden folders, as is the custom. History is
never pruned; a library of text is small. A folder whose SKILL.md is invalid is kept in the history like any other.
Two versions of a folder are swapped by two renames, so a reader may miss the skill for some microseconds; the next
look finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from metaclaw_core.errors import SkillError
from metaclaw_core.skills.files import sync_folder, write_atomic
from metaclaw_core.skills.skill import Skill, Status, read, render, validate

_FILE = "SKILL.md"
_HISTORY = ".history"
_DEPTH = 6  # folders deep; where OpenClaw stops looking
# Of several skills with one name in the user's folder the first of these counts.
_HIDING = (Status.ACTIVE, Status.STALE, Status.QUARANTINED, Status.ARCHIVED)


@dataclass(frozen=True, slots=True)
class Problem:
    """A folder that is no valid skill."""

    name: str  # of the folder
    reason: str
    path: Path


@dataclass(frozen=True, slots=True)
class Scan:
    """What one look at the folders found."""

    skills: tuple[Skill, ...]  # one per name, of any status but candidate, sorted by name
    candidates: tuple[Skill, ...]
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> tuple[Skill, ...]:
        """What may be injected."""
        return tuple(s for s in self.skills if s.retrievable)


@dataclass(frozen=True, slots=True)
class Change:
    """One generation of the user's own folder."""

    generation: int
    at: str  # ISO 8601, UTC
    action: str  # "add", "archived" and the other statuses, "rollback", "edited" (by hand)
    note: str
    folders: Mapping[str, str | None]  # path below the library → hash of its content; None: gone


class Places(Protocol):
    """The part of the settings that says where skills are (`settings.Skills`)."""

    @property
    def dir(self) -> str: ...

    @property
    def extra_dirs(self) -> tuple[str, ...]: ...


def open_library(places: Places) -> Library:
    """The library that the settings describe, over the bank that ships with the program."""
    extra = [Path(folder).expanduser() for folder in places.extra_dirs]
    return Library(Path(places.dir).expanduser(), extra=extra, bundled=bundled_folder())


def bundled_folder() -> Path:
    """The bank that ships with the program: package data of a wheel, or `skills/` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "_bundled" / "skills"
    return inside if inside.is_dir() else package.parent / "skills"


class Library:
    """See the module. `folder` need not exist; `bundled=None` leaves the bank out."""

    def __init__(self, folder: Path, *, extra: Sequence[Path] = (), bundled: Path | None = None) -> None:
        self.folder = folder
        self._extra = tuple(extra)
        self._bundled = bundled
        self._read: dict[Path, tuple[tuple[int, ...], Skill | str]] = {}  # SKILL.md → (stat, the skill or its faults)

    # --- reading --------------------------------------------------------------------------------

    def scan(self) -> Scan:
        """Reads what is new or changed since the last scan of this object and gives the whole picture."""
        problems: list[Problem] = []
        chosen: dict[str, Skill] = {}
        for status in _HIDING:
            for skill in self._layer(_slot(self.folder, status), status, problems, depth=1):
                chosen.setdefault(skill.name, skill)
        for folder in (*self._extra, *([self._bundled] if self._bundled else [])):
            for skill in self._layer(folder, Status.ACTIVE, problems, depth=_DEPTH):
                chosen.setdefault(skill.name, skill)
        candidates = self._layer(_slot(self.folder, Status.CANDIDATE), Status.CANDIDATE, problems, depth=1)
        return Scan(
            skills=tuple(sorted(chosen.values(), key=lambda s: s.name)),
            candidates=tuple(sorted(candidates, key=lambda s: s.name)),
            problems=tuple(problems),
        )

    def files(self) -> list[Path]:
        """Every SKILL.md that a scan would read."""
        layers = [(_slot(self.folder, status), 1) for status in Status]
        layers += [(folder, _DEPTH) for folder in (*self._extra, *([self._bundled] if self._bundled else []))]
        return [file for folder, depth in layers for file in _skill_files(folder, depth)]

    def skills(self) -> tuple[Skill, ...]:
        """What may be injected."""
        return self.scan().usable

    def get(self, name: str, status: Status | None = None) -> Skill | None:
        """The skill that counts under `name`, or with `status` the one that has it."""
        scan = self.scan()
        pool = scan.candidates if status is Status.CANDIDATE else scan.skills
        return next((s for s in pool if s.name == name and status in (None, s.status)), None)

    def _layer(self, folder: Path, status: Status, problems: list[Problem], *, depth: int) -> list[Skill]:
        found = []
        for path in _skill_files(folder, depth):
            skill = self._parsed(path, status)
            if isinstance(skill, str):
                problems.append(Problem(path.parent.name, skill, path))
            else:
                found.append(skill)
        return found

    def _parsed(self, path: Path, status: Status) -> Skill | str:
        try:
            stat = path.stat()
        except OSError as e:
            return f"{_FILE} can't be read: {e.strerror}"
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if path not in self._read or self._read[path][0] != seen:
            try:
                self._read[path] = seen, read(path, status=status)
            except SkillError as e:
                if isinstance(e.__cause__, OSError):
                    return str(e)  # perhaps a moment's matter, or rights, which change no time: look again
                self._read[path] = seen, str(e)
        return self._read[path][1]

    # --- history --------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Of the last recorded change; 0: none yet."""
        history = self.history()
        return history[-1].generation if history else 0

    def history(self) -> list[Change]:
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
        history = self.history()
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

    # --- changing -------------------------------------------------------------------------------

    def add(self, skill: Skill, *, note: str = "") -> int:
        """Writes `skill` to the place of its status and returns the generation.

        One of that name and status is replaced; other files of its folder stay. A skill that becomes active leaves
        its other places (candidate, stale, archived, quarantined).
        """
        _check(skill)
        with self._changing() as record:
            target = _slot(self.folder, skill.status) / skill.name
            if target.is_dir():
                write_atomic(target / _FILE, render(skill).encode(), 0o600)
            else:
                with _staged(target) as staging:
                    if skill.source is not None and skill.source.is_dir():
                        _copy(skill.source, staging)  # scripts and references that the skill comes with
                    write_atomic(staging / _FILE, render(skill).encode(), 0o600)
            self._leave_other_places(skill.name, skill.status)
            return record("add", note or skill.name)

    def set_status(self, name: str, status: Status, *, note: str = "") -> int:
        """Moves the skill that counts under `name`. To ACTIVE a candidate goes first, and replaces the active one."""
        with self._changing() as record:
            skill = self.get(name, Status.CANDIDATE) if status is Status.ACTIVE else None
            skill = skill or self.get(name) or self.get(name, Status.CANDIDATE)
            if skill is None or skill.source is None:
                raise SkillError(f"There is no skill {name!r} in {self.folder} or the folders below it.")
            target = _slot(self.folder, status) / name
            if skill.source != target:
                with _staged(target) as staging:
                    _copy(skill.source, staging)
                if skill.source.is_relative_to(self.folder):
                    _discard(skill.source)
            self._leave_other_places(name, status)
            return record(status.value, note or name)

    def archive(self, name: str, *, note: str = "") -> int:
        return self.set_status(name, Status.ARCHIVED, note=note)

    def reject(self, name: str, status: Status = Status.ARCHIVED, *, note: str = "") -> int:
        """Takes a candidate away: to `status`, or, where that would hide another skill of the name, to the history only."""
        with self._changing() as record:
            candidate = _slot(self.folder, Status.CANDIDATE) / name
            if not (candidate / _FILE).is_file():
                raise SkillError(f"There is no candidate {name!r} in {self.folder}.")
            if self.get(name) is None:
                with _staged(_slot(self.folder, status) / name) as staging:
                    _copy(candidate, staging)
            _discard(candidate)
            return record(status.value, note or f"candidate {name}")

    def rollback(self, generation: int, *, note: str = "") -> int:
        """Makes the user's folder what it was at `generation`, and records that as a new one."""
        with self._changing() as record:
            now, then = self.state_at(self.generation), self.state_at(generation)
            missing = [digest for digest in then.values() if not (self._versions / digest).is_dir()]
            if missing:
                raise SkillError(f"{self._versions} lacks {len(missing)} of the folders of generation {generation}.")
            for path in now.keys() | then.keys():
                if now.get(path) == then.get(path):
                    continue
                if path in then:
                    with _staged(self.folder / path) as staging:
                        _copy(self._versions / then[path], staging)
                else:
                    _discard(self.folder / path)
            return record("rollback", note or f"to generation {generation}")

    def record_edits(self) -> int:
        """Records what was edited by hand as a generation, if anything was, and returns the current one."""
        with self._changing():
            return self.generation

    def _leave_other_places(self, name: str, status: Status) -> None:
        if status is not Status.CANDIDATE:  # a candidate stands beside what it may replace
            others = set(Status) - {status} - ({Status.CANDIDATE} if status is not Status.ACTIVE else set())
            for other in others:
                _discard(_slot(self.folder, other) / name)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Callable[[str, str], int]]:
        """Holds the lock; what differs from the journal on entry becomes a generation first. Gives the recorder."""
        history = self.folder / _HISTORY
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.mkdir(mode=0o700, exist_ok=True)
        self._versions.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(history / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            for leftover in (
                *self.folder.glob(".new-*"),
                *self.folder.glob(".*/.new-*"),
                *self._versions.glob(".new-*"),
            ):
                shutil.rmtree(leftover, ignore_errors=True)
            for slot in {_slot(self.folder, status) for status in Status}:
                for torn in slot.glob(f"*/.{_FILE}.*.tmp"):  # a writer was killed: it must not become part of the skill
                    torn.unlink(missing_ok=True)
            self._record("edited", "found changed on disk", only_if_changed=True)
            yield self._record  # while the lock is held
        finally:
            os.close(fd)  # releases the lock

    def _record(self, action: str, note: str, *, only_if_changed: bool = False) -> int:
        last = self.generation
        before = self.state_at(last)
        now = {}
        for status in Status:
            for file in _skill_files(_slot(self.folder, status), 1):
                path = str(file.parent.relative_to(self.folder))
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
        digest = _folder_hash(folder)
        target = self._versions / digest
        if not target.is_dir():
            with _staged(target) as staging:
                _copy(folder, staging)
        return digest

    @property
    def _journal(self) -> Path:
        return self.folder / _HISTORY / "journal.jsonl"

    @property
    def _versions(self) -> Path:
        return self.folder / _HISTORY / "versions"


def _check(skill: Skill) -> None:
    faults = validate(skill)
    if faults:
        raise SkillError(f"The skill {skill.name!r} can't be written: {'; '.join(faults)}.")


def _slot(folder: Path, status: Status) -> Path:
    return folder if status is Status.ACTIVE else folder / f".{status.value}"


def _skill_files(folder: Path, depth: int) -> list[Path]:
    """The SKILL.md files at most `depth` folders below `folder`, sorted. Hidden folders are not looked into."""
    found: list[Path] = []

    def look(at: Path, left: int) -> None:
        try:
            entries = sorted(os.scandir(at), key=lambda e: e.name)
        except OSError:  # not there, or not ours to read
            return
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            file = at / entry.name / _FILE
            if file.is_file():
                found.append(file)
            elif left > 1:
                look(at / entry.name, left - 1)

    look(folder, depth)
    return found


def _folder_files(folder: Path) -> list[Path]:
    """Regular files below `folder`, sorted; links are followed for files, not for folders."""
    return sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names if (Path(at) / name).is_file())


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in _folder_files(folder):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(folder)}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _copy(source: Path, target: Path) -> None:
    """Copies the files of `source` into the existing folder `target`, keeping what may be executed."""
    for file in _folder_files(source):
        to = target / file.relative_to(source)
        to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        executable = file.stat().st_mode & 0o100
        write_atomic(to, file.read_bytes(), 0o600 | executable)


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends well."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = target.parent / f".new-{secrets.token_hex(6)}"
    staging.mkdir(mode=0o700)
    try:
        yield staging
        sync_folder(staging)
        _discard(target)
        staging.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _discard(folder: Path) -> None:
    """Takes a folder away: out of sight by one rename, then deleted. Its content is in the history."""
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.parent / f".new-{secrets.token_hex(6)}"
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone)


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
