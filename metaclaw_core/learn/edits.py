"""What the evolver's model proposes: delta edits, strictly read.

Design: the model answers with one JSON object. What surrounds it (a code fence, a sentence) is peeled
off, and each edit is checked by itself: a fault in one does not take the others along, and its sentence
goes back to the model in the one repair round. An edit is a small change of the library (add a skill,
change places of one, retire one), never a rewrite of it: whole rewrites lose what was learned.

Every edit quotes its evidence. Whether the quotes are real is `admission`'s question.

Limits: words are counted by spaces; two Chinese, Japanese or Korean characters count as one word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from metaclaw_core.errors import WireError
from metaclaw_core.model import Json
from metaclaw_core.skills.skill import MAX_NAME
from metaclaw_core.wire.jsonio import loads_object

MAX_EDITS = 4
MIN_WORDS, MAX_WORDS = 40, 600  # of a body
MAX_DESCRIPTION = 300  # the standard allows more; a long one only drags queries in
MAX_TRIGGERS, MAX_TRIGGER = 12, 80
MAX_QUOTES = 8
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True, slots=True)
class Edit:
    """One proposed change. Which fields matter follows from `op`."""

    op: Literal["add", "refine", "retire"]
    name: str
    quotes: tuple[str, ...]
    description: str = ""  # "" in a refine: leave it
    body: str = ""  # of an add
    triggers: tuple[str, ...] = ()
    changes: tuple[tuple[str, str], ...] = ()  # of a refine: (old text, new text); old "" appends
    why: str = ""  # of a retire


@dataclass(frozen=True, slots=True)
class Proposal:
    edits: tuple[Edit, ...]
    faults: tuple[str, ...]  # sentences for the model


def parse_proposal(text: str, known: Mapping[str, str]) -> Proposal:
    """The edits in a model's answer. `known`: name → body of the skills that may be refined or retired.

    Raises WireError if there is no such object at all.
    """
    value = loads_object(_object_in(text), "the answer")
    raw = value.get("edits")
    if not isinstance(raw, list):
        raise WireError('the answer has no list "edits"')
    edits: list[Edit] = []
    faults: list[str] = []
    for number, item in enumerate(raw[:MAX_EDITS], 1):
        made = _edit(item, known)
        if isinstance(made, Edit):
            edits.append(made)
        else:
            faults += [f"edit {number}: {fault}" for fault in made]
    if len(raw) > MAX_EDITS:
        faults.append(f"there are {len(raw)} edits, at most {MAX_EDITS} are read")
    names = [edit.name for edit in edits]
    for name in {name for name in names if names.count(name) > 1}:
        faults.append(f"two edits change {name!r}; only the first counts")
    return Proposal(tuple(edit for at, edit in enumerate(edits) if edit.name not in names[:at]), tuple(faults))


def words_in(text: str) -> int:
    """How long a text is, in words."""
    cjk = len(_CJK.findall(text))
    return len(_CJK.sub(" ", text).split()) + cjk // 2


def clean_line(text: str) -> str:
    """`text` as one line."""
    return " ".join(text.split())


def _object_in(text: str) -> str:
    """The outermost braces of `text`."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise WireError("the answer holds no JSON object")
    return text[start : end + 1]


def _edit(item: Json, known: Mapping[str, str]) -> Edit | list[str]:
    if not isinstance(item, dict):
        return ["it is not an object"]
    op = item.get("op")
    if op not in ("add", "refine", "retire"):
        return [f'"op" is {op!r}, not "add", "refine" or "retire"']
    faults: list[str] = []
    name = item.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        faults.append(f'"name" must be 1 to {MAX_NAME} lower-case letters, digits and single hyphens, not {name!r}')
        name = ""
    if op != "add" and name and name not in known:
        faults.append(f"there is no skill {name!r} to {op}")
    quotes = _quotes(item.get("evidence"))
    if not quotes:
        faults.append('"evidence" must be a list of {"quote": words copied from the conversation}')
    if op == "retire":
        why = item.get("why")
        return faults or Edit("retire", name, quotes, why=clean_line(why)[:300] if isinstance(why, str) else "")
    description = item.get("description", "")
    if not isinstance(description, str):
        faults.append('"description" is not a text')
        description = ""
    description = description.strip()
    if "\n" in description or len(description) > MAX_DESCRIPTION:
        faults.append(f'"description" must be one line of at most {MAX_DESCRIPTION} characters')
    triggers = _triggers(item.get("triggers"))
    if triggers is None:
        faults.append(f'"triggers" must be at most {MAX_TRIGGERS} short phrases, one line each')
        triggers = ()
    if op == "add":
        body = item.get("body")
        if not isinstance(body, str):
            faults.append('"body" is missing')
            body = ""
        if not description:
            faults.append('"description" is missing')
        faults += length_faults(body) if body else []
        return faults or Edit("add", name, quotes, description, body.strip(), triggers)
    changes = _changes(item.get("changes"))
    if changes is None:
        return [*faults, '"changes" must be a list of {"old": text of the skill or "", "new": text}']
    if not (changes or description or triggers):
        faults.append("it changes nothing")
    edit = Edit("refine", name, quotes, description, "", triggers, changes)
    if not faults:
        changed = changed_body(known[name], changes)
        faults += [changed] if isinstance(changed, Fault) else length_faults(changed)
    return faults or edit


class Fault(str):
    """A sentence where a text was hoped for."""


def changed_body(body: str, changes: Sequence[tuple[str, str]]) -> str:
    """`body` with the changes made; a `Fault` if an old text isn't there exactly once."""
    for old, new in changes:
        if not old.strip():
            body = f"{body.rstrip()}\n\n{new.strip()}"
            continue
        if body.count(old) != 1:
            return Fault(f"the old text {old[:60]!r} is in the skill {body.count(old)} times, not once")
        body = body.replace(old, new)
    return body.strip()


def length_faults(body: str) -> list[str]:
    count = words_in(body)
    if MIN_WORDS <= count <= MAX_WORDS:
        return []
    return [f"the body has {count} words; {MIN_WORDS} to {MAX_WORDS} are allowed"]


def _quotes(value: Json) -> tuple[str, ...]:
    """[{"quote": …}, …] or a list of texts."""
    if not isinstance(value, list):
        return ()
    texts = [item.get("quote") if isinstance(item, dict) else item for item in value[:MAX_QUOTES]]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _triggers(value: Json) -> tuple[str, ...] | None:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TRIGGERS or not all(isinstance(item, str) for item in value):
        return None
    phrases = [unicodedata.normalize("NFC", item).strip() for item in value]
    if any("\n" in phrase or len(phrase) > MAX_TRIGGER for phrase in phrases):
        return None
    return tuple(dict.fromkeys(phrase for phrase in phrases if phrase))


def _changes(value: Json) -> tuple[tuple[str, str], ...] | None:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > 2 * MAX_EDITS:
        return None
    out = []
    for item in value:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("new"), str)
            or not isinstance(item.get("old", ""), str)
        ):
            return None
        out.append((item.get("old", ""), item["new"]))
    return tuple(out)
