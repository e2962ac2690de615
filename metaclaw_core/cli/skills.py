"""``metaclaw skills``: look at, search, add, check and take back skills."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from metaclaw_core.cli.output import json_line, table
from metaclaw_core.errors import SkillError
from metaclaw_core.settings import Settings, home, load_settings, skills_settings
from metaclaw_core.skills.library import Library, open_library
from metaclaw_core.skills.skill import Skill, Status, parse, validate

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON, one object a line.")


def _library(settings: Settings | None = None) -> Library:
    return open_library(skills_settings(settings or load_settings()))


@click.group("skills")
def command() -> None:
    """The skill library: the built-in bank, your own folder over it, and folders named in skills.extra_dirs."""


@command.command("list")
@click.option("--all", "everything", is_flag=True, help="Archived and quarantined ones and candidates too.")
@_JSON
def list_(everything: bool, as_json: bool) -> None:
    """List the skills that can be injected."""
    scan = _library().scan()
    skills = [*scan.skills, *scan.candidates] if everything else list(scan.usable)
    if as_json:
        for skill in skills:
            json_line(_described(skill))
    else:
        rows = ((s.name, s.status, s.category or "-", s.description) for s in skills)
        table(["name", "status", "category", "description"], rows, empty="There is no skill.", wide=("description",))
    for problem in scan.problems:
        click.echo(f"skipped: {problem.path}: {problem.reason}", err=True)


@command.command("show")
@click.argument("name")
@_JSON
def show(name: str, as_json: bool) -> None:
    """Print one skill whole, and where it is."""
    skill = _library().get(name) or _library().get(name, Status.CANDIDATE)
    if skill is None:
        raise SkillError(f"There is no skill {name!r}; see `metaclaw skills list --all`.")
    if as_json:
        json_line({**_described(skill), "body": skill.body})
        return
    click.echo(f"{skill.name} ({skill.status})\n{skill.source}\n\n{skill.description}\n\n{skill.body}")


@command.command("search")
@click.argument("text")
@click.option("-k", type=click.IntRange(1), help="At most this many; default: skills.top_k.")
@_JSON
def search(text: str, k: int | None, as_json: bool) -> None:
    """What would be found for TEXT, best first. Nothing is said where nothing fits well enough to be injected."""
    from metaclaw_core.skills.build import INDEX_FILE, build_index, library_fingerprint, needs_build
    from metaclaw_core.skills.indexfile import load_index

    settings = load_settings()
    if needs_build(home(), library_fingerprint(settings)):
        index = build_index(_library(settings).scan().usable)
    else:
        index = load_index(home() / INDEX_FILE)
    hits = index.search(text, k or settings.skills.top_k)
    if as_json:
        for hit in hits:
            json_line({"name": hit.name, "score": round(hit.score, 3)})
        return
    rows = ((hit.name, f"{hit.score:.1f}", skill.description if (skill := index.skill(hit.name)) else "") for hit in hits)
    nothing = f"No skill scores above the cut-off of {index.cutoff:.1f}: nothing would be injected."
    table(["name", "score", "description"], rows, empty=nothing, wide=("description",))


@command.command("add")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def add(path: Path) -> None:
    """Copy a skill folder (or a SKILL.md) into your own skills. One of the same name is replaced; rollback undoes it."""
    file = path / "SKILL.md" if path.is_dir() else path
    skill = parse(file.read_text(encoding="utf-8"), source=file.parent)
    if problems := validate(skill):
        raise SkillError(f"{file} is not a valid skill: {'; '.join(problems)}.")
    generation = _library().add(skill)
    click.echo(f"{skill.name} is in your skills (generation {generation}).")


@command.command("validate")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path, exists=True))
@_JSON
def validate_(paths: tuple[Path, ...], as_json: bool) -> None:
    """Check skill folders against the Agent Skills standard; without PATHS the whole library. Exit status 1 if one fails."""
    if paths:
        found = {str(path): _problems(path) for path in paths}
    else:
        scan = _library().scan()
        found = {str(s.source): [] for s in (*scan.skills, *scan.candidates)}
        found |= {str(p.path): [p.reason] for p in scan.problems}
    for path, problems in found.items():
        if as_json:
            json_line({"path": path, "problems": problems})
        elif problems:
            click.echo(f"{path}: {'; '.join(problems)}")
    bad = sum(bool(problems) for problems in found.values())
    if not as_json:
        click.echo(f"{len(found)} checked, {bad} not valid.")
    sys.exit(1 if bad else 0)


@command.command("archive")
@click.argument("name")
def archive(name: str) -> None:
    """Take a skill out of use. It stays on disk, and rollback brings it back."""
    generation = _library().archive(name)
    click.echo(f"{name} is archived (generation {generation}).")


@command.command("rollback")
@click.argument("generation", type=int, required=False)
@_JSON
def rollback(generation: int | None, as_json: bool) -> None:
    """Make your skills what they were at GENERATION; without it, list the generations."""
    library = _library()
    if generation is not None:
        click.echo(f"Your skills are those of generation {generation} again (as generation {library.rollback(generation)}).")
        return
    history = library.history()
    if as_json:
        for change in history:
            json_line({"generation": change.generation, "at": change.at, "action": change.action, "note": change.note})
        return
    rows = ((str(c.generation), c.at, c.action, c.note) for c in history)
    table(["generation", "at", "action", "what"], rows, empty="Your skills have no history yet: nothing was changed.")


def _problems(path: Path) -> list[str]:
    file = path / "SKILL.md" if path.is_dir() else path
    try:
        return validate(parse(file.read_text(encoding="utf-8"), source=file.parent))
    except SkillError as e:
        return [str(e)]
    except (OSError, UnicodeDecodeError) as e:
        return [f"{file.name} can't be read: {e}"]


def _described(skill: Skill) -> dict[str, object]:
    return {
        "name": skill.name,
        "description": skill.description,
        "status": str(skill.status),
        "category": skill.category,
        "triggers": list(skill.triggers),
        "path": str(skill.source) if skill.source else None,
    }
