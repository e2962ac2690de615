"""What the index keeps of a skill for rendering it: compact JSON, decoded only for the few that are shown.

Lone surrogates survive: a name or body is any Python string.
"""

from __future__ import annotations

import json

from metaclaw_core.skills.skill import Skill, Status


def encode(skill: Skill) -> bytes:
    kept = {"name": skill.name, "description": skill.description, "body": skill.body, "status": skill.status.value}
    if skill.category is not None:
        kept["category"] = skill.category
    if skill.triggers:
        kept["triggers"] = "\n".join(skill.triggers)
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def decode(content: bytes | memoryview) -> Skill:
    kept = json.loads(str(content, "utf-8", "surrogatepass"))
    return Skill(
        name=kept["name"],
        description=kept["description"],
        body=kept["body"],
        category=kept.get("category"),
        triggers=tuple(kept["triggers"].split("\n")) if "triggers" in kept else (),
        status=Status(kept["status"]),
    )
