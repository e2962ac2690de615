"""``metaclaw skills``: look at, search, add, check and take back skills."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metaclaw_core.cli.output import json_line, table
from metaclaw_core.errors import SkillError
from metaclaw_core.settings import Settings, home, load_settings, skills_settings
from metaclaw_core.skills.inject import SkillText, fits
from metaclaw_core.skills.library import Library, open_library
from metaclaw_core.skills.skill import Skill, Status, read

if TYPE_CHECKING:
    from metaclaw_core.learn.counters import Figures

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
    used = _figures()
    if as_json:
        for skill in skills:
            json_line(_described(skill) | _counted(used.get(skill.name)))
    else:
        rows = ((s.name, s.status, s.category or "-", *_cells(used.get(s.name)), s.description) for s in skills)
        heads = ["name", "status", "category", "turns", "sessions", "score with", "without", "description"]
        table(heads, rows, empty="There is no skill.", wide=("description",))
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
    try:
        skill = _read(path)
    except SkillError as e:
        raise SkillError(f"{path} is not a valid skill: {str(e).removesuffix('.')}.") from e
    generation = _library().add(skill)
    click.echo(f"{skill.name} is in your skills (generation {generation}).")
    most = load_settings().skills.max_injected_tokens
    if not fits(SkillText(skill.name, skill.description, skill.body), most):
        click.echo(f"It is too long to be injected: skills.max_injected_tokens is {most:,}.", err=True)


@command.command("validate")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path, exists=True))
@_JSON
def validate_(paths: tuple[Path, ...], as_json: bool) -> None:
    """Check skill folders against the Agent Skills standard, or folders of skill folders; without PATHS the whole library.

    Exit status 1 if one fails.
    """
    if paths:
        found = {str(path): _problems(path) for given in paths for path in _skill_folders(given)}
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


@command.command("review")
@_JSON
def review(as_json: bool) -> None:
    """List what waits for you: candidates, and what was quarantined, each with the reason."""
    scan = _library().scan()
    waiting = [*scan.candidates, *(s for s in scan.skills if s.status is Status.QUARANTINED)]
    reasons = _reasons()
    if as_json:
        for skill in waiting:
            json_line({**_described(skill), "body": skill.body, "reasons": reasons.get(skill.content_hash, [])})
        return
    rows = ((s.name, s.status, s.description, "; ".join(reasons.get(s.content_hash, [])) or "-") for s in waiting)
    table(["name", "status", "description", "why"], rows, empty="Nothing waits for review.", wide=("description", "why"))
    if waiting:
        click.echo("metaclaw skills show|diff NAME, then approve NAME or reject NAME.")


@command.command("approve")
@click.argument("name")
@click.option("--quarantined", is_flag=True, help="Also one that looks like an attack.")
def approve(name: str, quarantined: bool) -> None:
    """Put a candidate into use. Where it refines a skill it takes its place; rollback undoes it."""
    library = _library()
    candidate = library.get(name, Status.CANDIDATE)
    if candidate is None and library.get(name, Status.QUARANTINED) is not None and not quarantined:
        raise SkillError(f"{name!r} is quarantined; read it (metaclaw skills show {name}) and approve it with --quarantined.")
    if candidate is None and not (quarantined and library.get(name, Status.QUARANTINED) is not None):
        raise SkillError(f"There is no candidate {name!r}; see `metaclaw skills review`.")
    generation = library.set_status(name, Status.ACTIVE, note=f"{name}: approved")
    click.echo(f"{name} is in use (generation {generation}).")


@command.command("reject")
@click.argument("name")
def reject(name: str) -> None:
    """Take a candidate or a quarantined skill away; the same lesson does not come back."""
    library = _library()
    if library.get(name, Status.CANDIDATE) is not None:
        generation = library.reject(name, note=f"{name}: rejected")
    elif library.get(name, Status.QUARANTINED) is not None:
        generation = library.archive(name, note=f"{name}: rejected")
    else:
        raise SkillError(f"{name!r} is neither a candidate nor quarantined; see `metaclaw skills review`.")
    click.echo(f"{name} is rejected (generation {generation}).")


@command.command("diff")
@click.argument("name")
def diff(name: str) -> None:
    """What a candidate would change, or what is in it where it is new."""
    import difflib

    from metaclaw_core.skills.skill import render

    library = _library()
    new = library.get(name, Status.CANDIDATE) or library.get(name, Status.QUARANTINED)
    if new is None:
        raise SkillError(f"There is no candidate {name!r}; see `metaclaw skills review`.")
    old = next((s for s in library.scan().usable if s.name == name), None)
    before = render(old).splitlines() if old is not None else []
    lines = difflib.unified_diff(before, render(new).splitlines(), f"{name} (in use)", f"{name} ({new.status})", lineterm="")
    click.echo("\n".join(lines) or "They are the same.")


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


def _read(path: Path) -> Skill:
    return read(path / "SKILL.md" if path.is_dir() else path)


def _skill_folders(path: Path) -> list[Path]:
    """`path` itself, or where it is a folder of skill folders, those."""
    if path.is_file() or (path / "SKILL.md").exists():
        return [path]
    try:
        inside = sorted(file.parent for file in path.glob("*/SKILL.md") if not file.parent.name.startswith("."))
    except OSError:
        inside = []
    return inside or [path]


def _problems(path: Path) -> list[str]:
    try:
        _read(path)
    except SkillError as e:
        return [str(e)]
    return []


def _described(skill: Skill) -> dict[str, object]:
    return {
        "name": skill.name,
        "description": skill.description,
        "status": str(skill.status),
        "category": skill.category,
        "triggers": list(skill.triggers),
        "path": str(skill.source) if skill.source else None,
    }


def _figures() -> dict[str, Figures]:
    """How the skills do, as far as the store knows; a listing works without one."""
    from metaclaw_core.cli.output import opened_store
    from metaclaw_core.learn.counters import count_uses, figures

    if not load_settings().store.url and not (home() / "store.db").exists():
        return {}
    with opened_store(drain=False) as store:
        count_uses(store)
        return figures(store)


def _counted(found: Figures | None) -> dict[str, object]:
    from dataclasses import asdict

    names = ("turns", "sessions", "last_used", "score_with", "score_without")
    return {"injected": asdict(found) if found is not None else dict.fromkeys(names)}


def _cells(found: Figures | None) -> tuple[str, str, str, str]:
    def score(value: float | None) -> str:
        return "-" if value is None else f"{value:+.2f}"

    if found is None:
        return "-", "-", "-", "-"
    return str(found.turns), str(found.sessions), score(found.score_with), score(found.score_without)


def _reasons() -> dict[str, list[str]]:
    """Content hash of what the evolver wrote → why it is not in use."""
    from sqlalchemy import select

    from metaclaw_core.cli.output import opened_store
    from metaclaw_core.store.tables import segments

    if not load_settings().store.url and not (home() / "store.db").exists():
        return {}
    with opened_store(drain=False) as store, store.reading() as db:
        edits = [edit for row in db.scalars(select(segments.c.edits).where(segments.c.edits.is_not(None))) for edit in row]
    return {e["skill"]["provenance"]["digest"]: e["reasons"] for e in edits if e.get("skill") and e["status"] != "active"}
