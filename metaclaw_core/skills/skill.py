"""One skill as a value, and the SKILL.md text it comes from and goes to.

Design: the Agent Skills standard is the format and nothing is added to it: what we know beyond it (category,
trigger phrases, where a learned skill came from) lies under `metadata` as strings with the prefix `metaclaw-`,
so that any other agent reads our folders and we read theirs. Front-matter fields we don't know are kept and
written back. The status is not in the text: it is where the folder lies (`library`), so a skill that is archived
and brought back is the same bytes.

A `Skill` value may hold any strings; `validate` is what a skill must pass to be read from or written to a folder.
An unknown field is no fault there: OpenClaw's and Claude's own fields are unknown to the standard.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from metaclaw_core.errors import SkillError

MAX_NAME = 64  # characters, as are the next two; the standard's figures
MAX_DESCRIPTION = 1_024
MAX_COMPATIBILITY = 500
MAX_FILE = 1 << 20  # bytes of a SKILL.md; a larger one is not a skill

_COMMA = re.compile("[,\uff0c\u3001]")  # the Chinese and Japanese ones too
_CATEGORY, _TRIGGERS = "metaclaw-category", "metaclaw-triggers"
_SESSIONS, _MODEL, _CREATED, _DIGEST = "metaclaw-sessions", "metaclaw-model", "metaclaw-created", "metaclaw-digest"


class Status(StrEnum):
    CANDIDATE = "candidate"  # proposed, not yet through the gate: never injected
    ACTIVE = "active"
    STALE = "stale"  # not useful of late: still injected, first in line to be archived
    ARCHIVED = "archived"
    QUARANTINED = "quarantined"  # looks like an attack


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a learned skill came from."""

    sessions: tuple[str, ...] = ()
    model: str | None = None  # that wrote it
    created: str | None = None  # ISO 8601, UTC
    digest: str | None = None  # `content_hash` when it was written: another one now means that a human has edited it


@dataclass(frozen=True, slots=True)
class Skill:
    name: str
    description: str
    body: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)  # without the keys that the next fields stand for
    category: str | None = None
    triggers: tuple[str, ...] = ()  # phrases a user may say, in the user's languages; they count as description
    provenance: Provenance | None = None  # None: written by hand, or by somebody who doesn't say
    status: Status = Status.ACTIVE
    source: Path | None = None  # the folder; None: not on disk
    extra: Mapping[str, Any] = field(default_factory=dict)  # other front matter: license, allowed-tools, homepage …

    @property
    def retrievable(self) -> bool:
        """May be injected: by its status, and by its author (the field is OpenClaw's and Claude's)."""
        wanted = self.extra.get("disable-model-invocation") is not True
        return wanted and self.status in (Status.ACTIVE, Status.STALE)

    @property
    def content_hash(self) -> str:
        """16 hex digits over what a model or a query sees of it. Status and provenance take no part."""
        seen = json.dumps([self.name, self.description, self.body, list(self.triggers)])
        return hashlib.sha256(seen.encode()).hexdigest()[:16]


def validate(skill: Skill) -> list[str]:
    """What breaks the standard, one sentence each; empty: nothing."""
    faults = []
    name = unicodedata.normalize("NFKC", skill.name)
    if not name:
        faults.append("the name is empty")
    elif len(name) > MAX_NAME:
        faults.append(f"the name has {len(name)} characters, at most {MAX_NAME} are allowed")
    elif name != name.lower() or not all(c.isalnum() or c == "-" for c in name):
        faults.append(f"the name {skill.name!r} may hold only lower-case letters, digits and hyphens")
    elif name.startswith("-") or name.endswith("-") or "--" in name:
        faults.append(f"the name {skill.name!r} begins or ends with a hyphen or has two in a row")
    if not skill.description.strip():
        faults.append("the description is empty")
    elif len(skill.description) > MAX_DESCRIPTION:
        faults.append(f"the description has {len(skill.description)} characters, at most {MAX_DESCRIPTION} are allowed")
    compatibility = skill.extra.get("compatibility", "")
    if not isinstance(compatibility, str) or len(compatibility) > MAX_COMPATIBILITY:
        faults.append(f"compatibility is not a text of at most {MAX_COMPATIBILITY} characters")
    return faults


def parse(text: str, *, source: Path | None = None, status: Status = Status.ACTIVE) -> Skill:
    """The skill in the text of a SKILL.md. Raises `SkillError` with every fault in one sentence.

    With `source`, the folder's name must be the skill's, as the standard asks.
    """
    import frontmatter  # lazy: YAML is no business of the proxy
    import yaml

    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        raise SkillError("there is no YAML front matter between two lines of '---'")
    try:
        post = frontmatter.loads(text)
    except (yaml.YAMLError, ValueError) as e:  # ValueError: a date that no calendar has
        raise SkillError(f"the front matter is not valid YAML ({_first_line(e)})") from e
    front: dict[str, Any] = post.metadata
    if not front:
        raise SkillError("the front matter is empty or not closed by a line of '---'")
    faults = [
        f"{key} is missing or not a text" for key in ("name", "description") if not isinstance(front.get(key), str)
    ]
    metadata = front.get("metadata") or {}
    if not isinstance(metadata, dict):
        faults.append("metadata is not a mapping")
    if faults:
        raise SkillError("; ".join(faults))
    ours = {str(k): v for k, v in metadata.items()}
    category = ours.pop(_CATEGORY, None)
    skill = Skill(
        name=front["name"].strip(),
        description=front["description"].strip(),
        body=post.content.strip(),
        category=str(category) if category else None,
        triggers=_phrases(ours.pop(_TRIGGERS, None)),
        provenance=_take_provenance(ours),
        metadata=ours,
        status=status,
        source=source,
        extra={str(k): v for k, v in front.items() if k not in ("name", "description", "metadata")},
    )
    faults = validate(skill)
    if source is not None and unicodedata.normalize("NFKC", source.name) != unicodedata.normalize("NFKC", skill.name):
        faults.append(f"the name {skill.name!r} is not that of its folder {source.name!r}")
    if faults:
        raise SkillError("; ".join(faults))
    return skill


def read(file: Path, *, status: Status = Status.ACTIVE) -> Skill:
    """The skill in a SKILL.md. Raises `SkillError` with every fault in one sentence, also where it can't be read."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise SkillError(f"there is no file {file.name}")
        if (size := file.stat().st_size) > MAX_FILE:
            raise SkillError(f"{file.name} has {size} bytes, at most {MAX_FILE} are read")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise SkillError(f"{file.name} is not UTF-8") from e
    except OSError as e:
        raise SkillError(f"{file.name} can't be read: {e.strerror}") from e
    folder = file.parent
    return parse(text, source=folder if folder.name not in ("", "..") else folder.resolve(), status=status)


def render(skill: Skill) -> str:
    """The SKILL.md of `skill`. `parse(render(s))` has the content of `s`, surrounding white space apart."""
    import frontmatter

    metadata: dict[str, Any] = dict(skill.metadata)
    if skill.category:
        metadata[_CATEGORY] = skill.category
    if skill.triggers:
        joined = "\n".join(skill.triggers)
        metadata[_TRIGGERS] = joined if "\n" in joined or not _COMMA.search(joined) else joined + "\n"
    if skill.provenance is not None:
        p = skill.provenance
        known = {_SESSIONS: "\n".join(p.sessions), _MODEL: p.model, _CREATED: p.created, _DIGEST: p.digest}
        metadata |= {key: value for key, value in known.items() if value}
    front: dict[str, Any] = {"name": skill.name, "description": skill.description, **skill.extra}
    if metadata:
        front["metadata"] = metadata
    post = frontmatter.Post(skill.body, **front)
    return str(frontmatter.dumps(post, sort_keys=False, allow_unicode=True, width=100)) + "\n"


def _take_provenance(metadata: dict[str, Any]) -> Provenance | None:
    taken = {key: metadata.pop(key, None) for key in (_SESSIONS, _MODEL, _CREATED, _DIGEST)}
    if not any(taken.values()):
        return None
    model, created, digest = (str(taken[k]) if taken[k] else None for k in (_MODEL, _CREATED, _DIGEST))
    return Provenance(_strings(taken[_SESSIONS]), model, created, digest)


def _phrases(value: Any) -> tuple[str, ...]:
    """Trigger phrases: a YAML list, one a line, or in a text without lines, as a folded one is, between commas."""
    if isinstance(value, str) and "\n" not in value:
        value = _COMMA.split(value)
    return _strings(value)


def _strings(value: Any) -> tuple[str, ...]:
    """Phrases from a YAML list or from one text with a phrase a line. The standard asks for text; people write lists."""
    if isinstance(value, str):
        value = value.splitlines()
    if not isinstance(value, list):
        return ()
    return tuple(s for v in value if (s := str(v).strip()))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
