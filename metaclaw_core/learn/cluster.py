"""Which tasks are alike, so that what one of them earned says what to expect of the next.

Design: leader clustering. A text goes to the leader it shares most words with; one that is like none becomes a leader
itself and never moves. So a text keeps its key for good, nothing is trained, and the state is a list of small sets. The
most frequent words of a text would be the other simple key, but a single other word gives another one, and a value
tracker whose keys never come again learns nothing. Words are those of the skill index, and leaders hold their hashes
only: what a user said is not readable in the trainer's state.

Limits: lexical, and the first text of a kind decides what is like it. With no idf, words that every task of a user
has join what is not alike; the tracker shrinks each cluster to the mean of all, so a poor cluster costs little.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Self

from metaclaw_core.skills.tokens import capped, words

ALIKE = 0.5  # cosine of two sets of words
MOST = 256  # leaders; after that a text joins the nearest, or OTHER
MOST_WORDS = 48  # of a text, the most frequent first
OTHER = "other"  # key of texts without words, and of what finds no place

type Terms = frozenset[int]


@dataclass(frozen=True, slots=True)
class Clusters:
    """The leaders so far; the key of one is its number."""

    leaders: tuple[Terms, ...] = ()

    def place(self, text: str) -> tuple[str, Clusters]:
        """The key of `text`, and the clusters with it: others only where it became a leader."""
        terms = terms_of(text)
        if not terms:
            return OTHER, self
        likeness, number = max(
            ((_cosine(terms, leader), -number) for number, leader in enumerate(self.leaders)), default=(0.0, 0)
        )
        full = len(self.leaders) >= MOST
        if likeness >= ALIKE or (full and likeness > 0):
            return str(-number), self
        if full:
            return OTHER, self
        return str(len(self.leaders)), Clusters((*self.leaders, terms))

    def to_json(self) -> list[list[int]]:
        return [sorted(leader) for leader in self.leaders]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        return cls(tuple(frozenset(int(term) for term in leader) for leader in value))


def terms_of(text: str) -> Terms:
    """Hashes of the words of `text`."""
    counts: Mapping[str, int] = Counter(words(capped(text)))
    chosen = sorted(counts, key=lambda word: -counts[word])[:MOST_WORDS]
    return frozenset(
        int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest()) for word in chosen
    )


def _cosine(one: Terms, other: Terms) -> float:
    return len(one & other) / math.sqrt(len(one) * len(other))
