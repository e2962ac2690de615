"""The index brought up to date where little has changed, without scikit-learn and without a process of its own.

Design: a skill that somebody puts into the folder, or that the evolver has just written, should be used at the next
turn. A full build takes a process that imports scikit-learn: a second of work, which on a busy machine is many, as
the worker yields to everything else. So what differs from the file is added and taken out here, in some tens of
milliseconds, and the file is marked as patched; the full build follows and writes the index as it should be.

A patched index lacks two things: mean lengths of the new texts (they stay those of the last build) and vectors of
new skills. The first index of a home, made here from nothing, has its mean lengths counted beforehand, so it is what a
build gives but for the order of the skills.

Limits: more than `MOST` differences are left to the build: each costs a copy of the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from metaclaw_core.skills.content import encode
from metaclaw_core.skills.index import EMPTY_FIELD, EMPTY_STATE, Index, body_terms, head_terms
from metaclaw_core.skills.indexfile import IndexDamaged, load_index, save_index
from metaclaw_core.skills.skill import Skill

MARK = "~"  # at the end of the origin of a patched file, so that it is no build's
MOST = 500


def patched(previous: Index, skills: Iterable[Skill], *, most: int = MOST) -> Index | None:
    """An index of the retrievable ones among `skills`, made from `previous`, which is left as it is.

    None: more than `most` differ.
    """
    wanted = {skill.name: skill for skill in skills if skill.retrievable}
    state = previous.state
    contents = dict(zip(state.names, state.contents, strict=True))
    removed = [name for name in state.names if name not in wanted]
    added = [skill for name, skill in wanted.items() if contents.get(name) != encode(skill)]
    if len(added) + len(removed) > most:
        return None
    if not state.names and added:
        state = replace(
            EMPTY_STATE,
            generation=state.generation,
            head=replace(EMPTY_FIELD, mean_length=_mean([len(head_terms(skill)) for skill in added])),
            body=replace(EMPTY_FIELD, mean_length=_mean([len(body_terms(skill)) for skill in added])),
        )
    return Index(state).change(added, removed)


def patch_file(path: Path, skills: Iterable[Skill], origin: str) -> Index | None:
    """Brings the file at `path` up to date and marks it as patched. None: left to a build, which a damaged file is, too.

    Raises OSError.
    """
    try:
        previous = load_index(path)
    except FileNotFoundError:
        previous = Index()
    except IndexDamaged:
        return None
    index = patched(previous, skills)
    if index is None or index.state.names == ():
        return None
    index = Index(replace(index.state, origin=origin + MARK))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    save_index(index, path)
    return index


def _mean(lengths: Sequence[int]) -> float:
    return sum(lengths) / len(lengths)
