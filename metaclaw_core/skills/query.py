"""What to look for: the query that a conversation's human turns make.

Design: the newest turn speaks first. An older one joins in as far as the newer ones said little: the weight that
is left after a turn is w · (1 - (s / enough)²), where s is the score of the best skill for that turn alone. So
"yes, do it" hands on nearly everything to the request before it, a full request hands on nothing, and no list of
acknowledgements in any language is needed. Measured on composed conversations this beats a hard threshold with
decay by 5 points of recall after a change of subject and by 4 after one or three acknowledgements.

The caller gives the human's own words with the client's envelope stripped (`agents.Identity.human_texts`);
system prompts and tool results never come here.

Limits: a turn that is long and says nothing new ("I read all of it, looks good, but the colours, hm") counts by
its words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metaclaw_core.skills.tokens import capped, pairs, words

MAX_TURNS = 8
_ENOUGH = 2.0  # times the index's cut-off; flat between 1.8 and 2.2 on conversations
_MOST = 2.0  # weight of a term, however often a pasted log says it: a request says most of its words once
_LEAST = 0.1  # a smaller rest of weight changes no ranking


@dataclass(frozen=True, slots=True)
class Query:
    """The human turns that may take part, oldest first; the last one is what is being answered."""

    texts: tuple[str, ...]

    @classmethod
    def of(cls, texts: str | Sequence[str]) -> Query:
        return cls((texts,) if isinstance(texts, str) else tuple(texts[-MAX_TURNS:]))


def terms(text: str) -> Mapping[str, float]:
    """Term → weight for one turn: words and adjacent pairs; a repeat counts logarithmically, and in all at most double."""
    found = words(capped(text))
    found += pairs(found)
    once = dict.fromkeys(found, 1.0)
    if len(once) == len(found):
        return once
    return {term: min(1.0 + math.log(n), _MOST) for term, n in Counter(found).items()}


def turns(query: Query, cutoff: float, score: Callable[[str], NDArray[np.float64]]) -> list[tuple[str, float]]:
    """The turns that speak, newest first, with their weights. `score`: every skill's, for one turn alone."""
    weight, spoken = 1.0, []
    for text in reversed(query.texts):
        spoken.append((text, weight))
        if len(spoken) == len(query.texts):
            break  # nobody is left to hand anything on to
        best = float(score(text).max(initial=0.0))
        weight *= max(0.0, 1.0 - (best / (_ENOUGH * cutoff)) ** 2) if cutoff > 0 else 0.0
        if weight < _LEAST:
            break
    return spoken
