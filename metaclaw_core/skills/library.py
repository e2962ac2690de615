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

Every change is a generation that `rollback` can bring back, a rollback included; see `history`.

Limits: another program that is pointed at the user's folder must skip hidden folders, as is the custom. Two versions of a
folder are swapped by two renames, so a reader may miss the skill for some microseconds; the next look finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from metaclaw_core.errors import SkillError
from metaclaw_core.skills.files import write_atomic
from metaclaw_core.skills.folders import SKILL_FILE, copy_files, discard, skill_files, slot, staged
from metaclaw_core.skills.history import Change, History
from metaclaw_core.skills.skill import Skill, Status, read, render, validate

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
        self._history = History(folder)
        self._extra = tuple(extra)
        self._bundled = bundled
        self._read: dict[Path, tuple[tuple[int, ...], Skill | str]] = {}  # SKILL.md → (stat, the skill or its faults)

    # --- reading --------------------------------------------------------------------------------

    def scan(self) -> Scan:
        """Reads what is new or changed since the last scan of this object and gives the whole picture."""
        problems: list[Problem] = []
        chosen: dict[str, Skill] = {}
        for status in _HIDING:
            for skill in self._layer(slot(self.folder, status), status, problems, depth=1):
                chosen.setdefault(skill.name, skill)
        for folder in (*self._extra, *([self._bundled] if self._bundled else [])):
            for skill in self._layer(folder, Status.ACTIVE, problems, depth=_DEPTH):
                chosen.setdefault(skill.name, skill)
        candidates = self._layer(slot(self.folder, Status.CANDIDATE), Status.CANDIDATE, problems, depth=1)
        return Scan(
            skills=tuple(sorted(chosen.values(), key=lambda s: s.name)),
            candidates=tuple(sorted(candidates, key=lambda s: s.name)),
            problems=tuple(problems),
        )

    def files(self) -> list[Path]:
        """Every SKILL.md that a scan would read."""
        layers = [(slot(self.folder, status), 1) for status in Status]
        layers += [(folder, _DEPTH) for folder in (*self._extra, *([self._bundled] if self._bundled else []))]
        return [file for folder, depth in layers for file in skill_files(folder, depth)]

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
        for path in skill_files(folder, depth):
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
            return f"{SKILL_FILE} can't be read: {e.strerror}"
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
        return self._history.generation

    def history(self) -> list[Change]:
        """All changes, oldest first. Raises SkillError for a damaged journal."""
        return self._history.changes()

    # --- changing -------------------------------------------------------------------------------

    def add(self, skill: Skill, *, note: str = "") -> int:
        """Writes `skill` to the place of its status and returns the generation.

        One of that name and status is replaced; other files of its folder stay. A skill that becomes active leaves
        its other places (candidate, stale, archived, quarantined).
        """
        _check(skill)
        with self._history.changing() as record:
            target = slot(self.folder, skill.status) / skill.name
            if target.is_dir():
                write_atomic(target / SKILL_FILE, render(skill).encode(), 0o600)
            else:
                with staged(target) as staging:
                    if skill.source is not None and skill.source.is_dir():
                        copy_files(skill.source, staging)  # scripts and references that the skill comes with
                    write_atomic(staging / SKILL_FILE, render(skill).encode(), 0o600)
            self._leave_other_places(skill.name, skill.status)
            return record("add", note or skill.name)

    def set_status(self, name: str, status: Status, *, note: str = "") -> int:
        """Moves the skill that counts under `name`. To ACTIVE a candidate goes first, and replaces the active one."""
        with self._history.changing() as record:
            skill = self.get(name, Status.CANDIDATE) if status is Status.ACTIVE else None
            skill = skill or self.get(name) or self.get(name, Status.CANDIDATE)
            if skill is None or skill.source is None:
                raise SkillError(f"There is no skill {name!r} in {self.folder} or the folders below it.")
            target = slot(self.folder, status) / name
            if skill.source != target:
                with staged(target) as staging:
                    copy_files(skill.source, staging)
                if skill.source.is_relative_to(self.folder):
                    discard(skill.source)
            self._leave_other_places(name, status)
            return record(status.value, note or name)

    def archive(self, name: str, *, note: str = "") -> int:
        return self.set_status(name, Status.ARCHIVED, note=note)

    def reject(self, name: str, status: Status = Status.ARCHIVED, *, note: str = "") -> int:
        """Takes a candidate away: to `status`, or, where that would hide another skill of the name, to the history only."""
        with self._history.changing() as record:
            candidate = slot(self.folder, Status.CANDIDATE) / name
            if not (candidate / SKILL_FILE).is_file():
                raise SkillError(f"There is no candidate {name!r} in {self.folder}.")
            if self.get(name) is None:
                with staged(slot(self.folder, status) / name) as staging:
                    copy_files(candidate, staging)
            discard(candidate)
            return record(status.value, note or f"candidate {name}")

    def rollback(self, generation: int, *, note: str = "") -> int:
        """Makes the user's folder what it was at `generation`, and records that as a new one."""
        with self._history.changing() as record:
            now, then = self._history.state_at(self.generation), self._history.state_at(generation)
            if missing := self._history.lacks(then.values()):
                raise SkillError(f"The history in {self.folder} lacks {missing} of the folders of generation {generation}.")
            for path in now.keys() | then.keys():
                if now.get(path) == then.get(path):
                    continue
                if path in then:
                    self._history.restore(then[path], self.folder / path)
                else:
                    discard(self.folder / path)
            return record("rollback", note or f"to generation {generation}")

    def _leave_other_places(self, name: str, status: Status) -> None:
        if status is not Status.CANDIDATE:  # a candidate stands beside what it may replace
            others = set(Status) - {status} - ({Status.CANDIDATE} if status is not Status.ACTIVE else set())
            for other in others:
                discard(slot(self.folder, other) / name)


def _check(skill: Skill) -> None:
    faults = validate(skill)
    if faults:
        raise SkillError(f"The skill {skill.name!r} can't be written: {'; '.join(faults)}.")
