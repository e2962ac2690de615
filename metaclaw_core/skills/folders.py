"""Folders of skills: where each status lies, what is in them, and changing one as a whole.

Design: a folder appears, changes and goes by a rename, so a reader sees the old one or the new one. Everything that is
being made or thrown away has a hidden name, which readers skip.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from metaclaw_core.skills.files import sync_folder, write_atomic
from metaclaw_core.skills.skill import Status

SKILL_FILE = "SKILL.md"
UNFINISHED = ".new-"  # how the name of a folder begins that is being made or thrown away


def slot(folder: Path, status: Status) -> Path:
    """Where skills of `status` lie in the user's `folder`."""
    return folder if status is Status.ACTIVE else folder / f".{status.value}"


def skill_files(folder: Path, depth: int) -> list[Path]:
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
            file = at / entry.name / SKILL_FILE
            if file.is_file():
                found.append(file)
            elif left > 1:
                look(at / entry.name, left - 1)

    look(folder, depth)
    return found


def folder_files(folder: Path) -> list[Path]:
    """Regular files below `folder`, sorted; links are followed for files, not for folders."""
    return sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names if (Path(at) / name).is_file())


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in folder_files(folder):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(folder)}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()[:32]


def copy_files(source: Path, target: Path) -> None:
    """Copies the files of `source` into the existing folder `target`, keeping what may be executed."""
    for file in folder_files(source):
        to = target / file.relative_to(source)
        to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        executable = file.stat().st_mode & 0o100
        write_atomic(to, file.read_bytes(), 0o600 | executable)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends well."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = target.parent / f"{UNFINISHED}{secrets.token_hex(6)}"
    staging.mkdir(mode=0o700)
    try:
        yield staging
        sync_folder(staging)
        discard(target)
        staging.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Takes a folder away: out of sight by one rename, then deleted. Its content is in the history."""
    if folder.is_symlink():
        folder.unlink()
        return
    gone = folder.parent / f"{UNFINISHED}{secrets.token_hex(6)}"
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone)
