"""How alike two skills are: the cosine of their TF-IDF vectors, over the words that the index uses too.

Design: a vector is a mapping of terms to sublinear counts times idf, where the idf comes from the library
and the new text together. Name, description, trigger phrases and body all count, once each. No numpy and no
scikit-learn: a few hundred skills take milliseconds, and the worker stays small.

Limits: lexical. Two skills that say the same in different words are not alike here; two that differ only
in a "not" are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from metaclaw_core.skills.skill import Skill
from metaclaw_core.skills.tokens import words

SAME = 0.85  # above: the same lesson again


def terms_of(skill: Skill) -> Counter[str]:
    return Counter(words("\n".join((skill.name.replace("-", " "), skill.description, *skill.triggers, skill.body))))


class Similarity:
    """Of one library; made anew when it changes."""

    def __init__(self, skills: Iterable[Skill]) -> None:
        self._skills = tuple(skills)
        self._terms = [terms_of(skill) for skill in self._skills]
        self._having = Counter(term for terms in self._terms for term in terms)

    def to(self, skill: Skill) -> list[tuple[float, Skill]]:
        """Every skill of the library with its likeness to `skill`, 0 to 1, the most alike first."""
        return self.to_terms(terms_of(skill))

    def to_terms(self, terms: Mapping[str, int]) -> list[tuple[float, Skill]]:
        count = len(self._skills) + 1
        having = self._having + Counter(dict.fromkeys(terms, 1))
        idf = {term: math.log((1 + count) / (1 + n)) + 1 for term, n in having.items()}
        wanted = _vector(terms, idf)
        scored = [
            (_cosine(wanted, _vector(own, idf)), skill) for own, skill in zip(self._terms, self._skills, strict=True)
        ]
        return sorted(scored, key=lambda pair: (-pair[0], pair[1].name))


def related(skills: Sequence[Skill], text: str, most: int) -> list[Skill]:
    """Those of `skills` that share the most with `text`, best first; none that shares nothing."""
    return [skill for score, skill in Similarity(skills).to_terms(Counter(words(text)))[:most] if score > 0]


def _vector(terms: Mapping[str, int], idf: Mapping[str, float]) -> dict[str, float]:
    return {term: (1 + math.log(n)) * idf[term] for term, n in terms.items()}


def _cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    small, large = (one, other) if len(one) < len(other) else (other, one)
    dot = sum(weight * large[term] for term, weight in small.items() if term in large)
    length = math.sqrt(sum(w * w for w in one.values()) * sum(w * w for w in other.values()))
    return dot / length if length else 0.0
