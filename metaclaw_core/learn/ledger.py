"""Carrying out decisions exactly once, whatever is killed in between.

Design: the store comes first. A segment's decisions, each with the whole skill it writes, are committed
with the state `proposed`; then they are applied to the library one by one; then the segment is `done`. The
library keeps a journal, and each change we make names its segment and place there (`mark`), so after a
crash what is in the journal is not done again. A crash between the skill's folder and its journal line
leaves the folder, which is whole; doing it again gives the same bytes at the same place.

Limits: a human who rolls the library back between the crash and the restart gets what was rolled back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select, update

from metaclaw_core.errors import SkillError
from metaclaw_core.learn.admission import Decision
from metaclaw_core.model import Json
from metaclaw_core.skills.library import Library
from metaclaw_core.skills.skill import Provenance, Skill, Status
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import segments

type Step = Callable[[str], None]


def mark(segment: str, place: int) -> str:
    """How a change of the library's journal names the decision it carries out."""
    return f"evolve {segment}/{place}"


def propose(store: Store, segment: str, decisions: Sequence[Decision], model: str) -> None:
    """Commit what is to be done for a segment."""
    _set(store, segment, state="proposed", detail=None, model=model, edits=[packed(d) for d in decisions])


def apply_proposed(store: Store, library: Library, step: Step) -> list[tuple[str, Json]]:
    """Carry out what is proposed and not done; (segment, decision) of each. Raises StoreError."""
    with store.reading() as db:
        rows = db.execute(select(segments).where(segments.c.state == "proposed").order_by(segments.c.updated_at)).all()
    done: list[tuple[str, Json]] = []
    for row in rows:
        written = _journal_marks(library, row.id)
        edits = [dict(edit) for edit in row.edits]
        for place, edit in enumerate(edits):
            step(f"apply {place}")
            noted = mark(row.id, place)
            edit["result"] = "ok" if noted in written else _apply(library, edit, noted)
            done.append((row.id, edit))
        step("applied")
        _set(store, row.id, state="done", edits=edits)
    return done


def _journal_marks(library: Library, segment: str) -> set[str]:
    return {c.note.partition(":")[0] for c in library.history() if c.note.startswith(f"evolve {segment}/")}


def _apply(library: Library, edit: Json, note: str) -> str:
    try:
        if edit["action"] == "write":
            skill = unpacked(edit["skill"], Status(edit["status"]))
            library.add(skill, note=f"{note}: {skill.name}")
        elif edit["action"] == "retire":
            library.archive(edit["name"], note=f"{note}: {edit['name']}")
    except SkillError as e:  # changed by hand meanwhile; nothing of it was done
        return str(e)
    return "ok"


def set_state(store: Store, row: Row[Any], **values: Any) -> None:
    _set(store, row.id, **values)


def _set(store: Store, segment: str, **values: Any) -> None:
    with store.transaction() as db:
        db.execute(update(segments).where(segments.c.id == segment).values(**values, updated_at=time.time()))


def packed(decision: Decision) -> Json:
    skill = decision.skill
    return {
        "action": decision.action,
        "op": decision.op,
        "name": decision.name,
        "status": decision.status.value if decision.status else None,
        "reasons": list(decision.reasons),
        "skill": None if skill is None else _packed_skill(skill),
    }


def _packed_skill(skill: Skill) -> Json:
    p = skill.provenance
    return {
        "name": skill.name,
        "description": skill.description,
        "body": skill.body,
        "triggers": list(skill.triggers),
        "category": skill.category,
        "metadata": _json(skill.metadata),
        "extra": _json(skill.extra),
        "source": str(skill.source) if skill.source else None,
        "provenance": None
        if p is None
        else {"sessions": list(p.sessions), "model": p.model, "created": p.created, "digest": p.digest},
    }


def _json(value: Any) -> Json:
    """Front matter as JSON: YAML knows dates."""
    return json.loads(json.dumps(value, default=str))


def unpacked(value: Json, status: Status) -> Skill:
    p = value["provenance"]
    return Skill(
        name=value["name"],
        description=value["description"],
        body=value["body"],
        triggers=tuple(value["triggers"]),
        category=value["category"],
        metadata=value["metadata"],
        extra=value["extra"],
        source=Path(value["source"]) if value["source"] else None,
        provenance=None if p is None else Provenance(tuple(p["sessions"]), p["model"], p["created"], p["digest"]),
        status=status,
    )
