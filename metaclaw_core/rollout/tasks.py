"""Reading tasks and keeping what came of them.

Design: a folder of ``*.jsonl`` files with one ``{"task_id", "instruction"}`` a line, as the reference system's
``openclaw_env_data_dir`` has it. A folder beside them that is named like a task holds the files the task starts with. A
result is one JSON file a task, replaced atomically; that a task has one is all that "done" means.

Limits: other fields of a task are kept in its result and given no meaning. Links in a task's files are not followed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

from metaclaw_core.errors import ConfigError, WireError
from metaclaw_core.model import Json
from metaclaw_core.settings import private_dir
from metaclaw_core.skills.files import write_atomic
from metaclaw_core.wire.jsonio import loads_object

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Task:
    id: str
    instruction: str
    extra: dict[str, Json] = field(default_factory=dict)  # the line's other fields

    @property
    def name(self) -> str:
        """The id as the name of a file; told apart by a hash where that changes it."""
        safe = _UNSAFE.sub("_", self.id).lstrip(".")[:_LONGEST_NAME]
        return safe if safe == self.id else f"{safe}-{sha256(self.id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class Outcome:
    status: Literal["done", "failed", "timeout"]
    reply: str | None = None  # the agent's last words
    error: str | None = None  # why it is not done
    session: str | None = None  # as `metaclaw turns --session` knows it; None: the agent does not say
    steps: int | None = None  # calls of the LLM; None: the agent does not say


def read_tasks(folder: Path) -> list[Task]:
    """All tasks, in the order of files and lines. Raises ConfigError that names the file and the line."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: name one that holds *.jsonl files with tasks.")
    tasks: dict[str, Task] = {}
    files = sorted(folder.glob("*.jsonl"))
    for file in files:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if line.strip():
                task = _task(line, f"{file}, line {number}")
                if task.id in tasks:
                    raise ConfigError(f"{file}, line {number}: there is another task {task.id!r} before it.")
                tasks[task.id] = task
    if not tasks:
        raise ConfigError(f"{folder} holds no tasks: one JSON object with task_id and instruction a line, in *.jsonl files.")
    return list(tasks.values())


def _task(line: bytes, where: str) -> Task:
    try:
        value = loads_object(line, "task")
    except WireError as e:
        raise ConfigError(f"{where}: {e}") from e
    for name in ("task_id", "instruction"):
        if not isinstance(value.get(name), str) or not value[name].strip():
            raise ConfigError(f"{where}: {name} must be a text that is not empty.")
    return Task(value.pop("task_id"), value.pop("instruction"), value)


class Results:
    """What is kept under one folder: ``results/NAME.json`` and ``work/NAME/``."""

    def __init__(self, folder: Path) -> None:
        self._results, self._work = private_dir(folder / "results"), private_dir(folder / "work")

    def open_tasks(self, tasks: Iterable[Task], *, again: bool) -> list[Task]:
        """Those without a result; with `again` also those that were not done."""
        return [task for task in tasks if (status := self.status(task)) is None or (again and status != "done")]

    def status(self, task: Task) -> str | None:
        """None: there is no result yet, or one that can't be read."""
        try:
            return str(json.loads((self._results / f"{task.name}.json").read_bytes())["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def workspace(self, task: Task, source: Path) -> Path:
        """A new folder for the task, with the files of `source`/TASK_ID if there are some; what an earlier try left is gone."""
        folder = self._work / task.name
        if folder.exists():
            shutil.rmtree(folder)
        files = source / task.id
        if "/" not in task.id and task.id not in (".", "..") and files.is_dir():
            shutil.copytree(files, folder, symlinks=True)
        return private_dir(folder)

    def write(self, task: Task, outcome: Outcome, started_at: float, seconds: float) -> None:
        row = {
            "task_id": task.id,
            "instruction": task.instruction,
            **asdict(outcome),
            "started_at": started_at,
            "seconds": round(seconds, 3),
            "task": task.extra,
        }
        write_atomic(self._results / f"{task.name}.json", json.dumps(row, indent=1).encode() + b"\n")
