"""The skill index: which skills fit a text, on plain arrays and without a heavy import.

Design: two fields, *head* (name, description, trigger phrases: words and adjacent pairs) and *body* (words), each a
term-major sparse matrix of saturated counts (`Field`). A query term adds idf · count-part to the skills that have it:

    score(q, d) = Σ_t  weight_q(t) · Σ_field  idf(t) · tf · (k1 + 1) / (tf + k1 · (1 - b + b · |d| / mean|d|))

which is BM25 summed over two fields. The idf is taken at query time from the lengths of the posting lists, so a skill
can be added without touching what is there: its postings are inserted, and every weight is what a full build
would give, except that mean |d| stays that of the last build. `build` (scikit-learn) makes an index, `indexfile`
reads and writes it.

Scores have no natural unit: they grow with the number of skills and with how much text a skill has. So the cut-off
is calibrated on the library itself:

    cutoff = U · (0.45 + L / 15)

U is the weight of a skill's most telling terms (its best one in the head plus its best one in the body), averaged over
the skills; L the idf of a term that one skill has. In words: a text must say about as much as the one word that says
most of a skill, somewhat less in a small library, where chance agreement is rarer. Below that `search` finds nothing.
Measured at 10, 36, 44, 83, 200, 1,000 and 5,235 skills with long and short texts: 93 % or more of small talk is given
nothing; of requests 98 % or more are given something where skills have bodies, nine in ten where they are a line or two.

An `Index` is a handle on one immutable state: `add` and `remove` replace the state as a whole, so a search that
runs in another thread sees the old one or the new one.

Limits: a cut-off stops small talk; it can't notice that a text is on the subject of a skill that is no help.
Matching is lexical and doesn't cross languages, except through trigger phrases.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaclaw_core.skills import query as _query
from metaclaw_core.skills.content import decode, encode
from metaclaw_core.skills.query import Query
from metaclaw_core.skills.skill import Skill
from metaclaw_core.skills.tokens import pairs, words

BODY_CHARS = 8_000
"""Only the beginning of a body is indexed. Measured: more ranks no better."""


_SHOWN = 64  # skills; the same few are shown again and again
_KNOWN_TERMS = 2_000  # of the texts of late; a tenth of a second's work to find again
type Scores = NDArray[np.float64] | NDArray[np.float32]  # (skills,)
type Postings = tuple[NDArray[np.intp], NDArray[np.float32]]  # positions of skills, what a term adds to the score of each


class Hit(NamedTuple):
    name: str
    score: float


@dataclass(frozen=True, slots=True)
class Shape:
    """The two constants of a field's count part."""

    k1: float  # how fast repeats stop counting
    b: float  # how much a long text is held back, 0 to 1


HEAD = Shape(k1=1.0, b=0.4)  # a short text in which little is repeated and length is mostly substance
BODY = Shape(k1=1.2, b=0.75)


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """One field of all skills. Posting list of term t: `docs[starts[t]:starts[t + 1]]`, positions in any order."""

    vocabulary: Mapping[str, int]
    starts: NDArray[np.int64]  # (terms + 1,)
    docs: NDArray[np.intp]  # (postings,)
    parts: NDArray[np.float32]  # (postings,) tf · (k1 + 1) / (tf + k1 · (1 - b + b · |d| / mean|d|))
    mean_length: float  # terms per skill when it was built

    def postings(self, term: str, skills: int) -> Postings:
        """The skills that have `term`, of `skills` in all."""
        t = self.vocabulary.get(term)
        if t is None:
            return self.docs[:0], self.parts[:0]
        first, last = self.starts[t : t + 2].tolist()
        having = last - first
        idf = math.log1p((skills - having + 0.5) / (having + 0.5))
        return self.docs[first:last], self.parts[first:last] * np.float32(idf)

    def best_weights(self, skills: int) -> NDArray[np.float64]:
        """The weight of each skill's heaviest term, (skills,); 0 for one without terms."""
        having = np.diff(self.starts)
        idf = np.log1p((skills - having + 0.5) / (having + 0.5))
        best = np.zeros(skills)
        np.maximum.at(best, self.docs, np.repeat(idf, having) * self.parts)
        return best

    def with_doc(self, doc: int, terms: Sequence[str], shape: Shape) -> Field:
        """The field with one more skill, at position `doc`."""
        if not terms:
            return self
        counts = Counter(terms)
        new = [t for t in counts if t not in self.vocabulary]
        vocabulary: Mapping[str, int] = self.vocabulary
        if new:
            vocabulary = {**self.vocabulary, **{t: i for i, t in enumerate(new, len(self.vocabulary))}}
        mean = self.mean_length or float(len(terms))  # the first skill of an empty index is its own mean
        tf = np.fromiter(counts.values(), np.float32, len(counts))
        part = tf * (shape.k1 + 1) / (tf + shape.k1 * (1 - shape.b + shape.b * len(terms) / mean))
        at = np.fromiter((vocabulary[t] for t in counts), np.int64, len(counts))
        order = np.argsort(at)  # new postings at one place must come in the order of their terms
        at, part = at[order], part[order].astype(np.float32)
        grown = np.zeros(len(vocabulary) + 1, np.int64)
        grown[at + 1] = 1
        starts = np.concatenate([self.starts, np.full(len(new), self.starts[-1])])
        places = starts[at + 1]
        return Field(
            vocabulary=vocabulary,
            starts=starts + np.cumsum(grown),
            docs=np.insert(self.docs, places, doc),
            parts=np.insert(self.parts, places, part),
            mean_length=mean,
        )

    def without_doc(self, doc: int) -> Field:
        """The field without the skill at `doc`; later ones move up by one. Its terms stay in the vocabulary, empty."""
        keep = self.docs != doc
        kept = np.concatenate([[0], np.cumsum(keep)])
        docs = self.docs[keep]
        return replace(self, starts=kept[self.starts], docs=docs - (docs > doc), parts=self.parts[keep])


EMPTY_FIELD = Field({}, np.zeros(1, np.int64), np.zeros(0, np.intp), np.zeros(0, np.float32), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """All that an index is; rows of every array are skills in the order of `names`."""

    generation: int  # grows with every change
    names: tuple[str, ...]
    positions: Mapping[str, int]
    contents: tuple[bytes | memoryview, ...]  # see `content`
    categories: tuple[str | None, ...]  # for the template mode
    head: Field
    body: Field
    vectors: NDArray[np.float32] | None = None  # (skills, dimensions), unit length; a zero row: not embedded yet
    embedding_model: str | None = None  # that made `vectors`
    telling: float = 0.0  # U of the module's cut-off
    origin: str = ""  # what it was built from, as its builder recognises it again
    # Both are filled by use, and of this state only.
    known: dict[str, Postings] = field(init=False, default_factory=dict)  # by term
    shown: dict[int, Skill] = field(init=False, default_factory=dict)  # by position


EMPTY_STATE = State(0, (), {}, (), (), EMPTY_FIELD, EMPTY_FIELD)


def head_terms(skill: Skill) -> list[str]:
    found = words("\n".join((skill.name, skill.description, *skill.triggers)))
    return found + pairs(found)


def body_terms(skill: Skill) -> list[str]:
    return words(skill.body[:BODY_CHARS])


class Index:
    """See the module. Made by `build_index`, `load_index` or, empty, by `Index()`."""

    def __init__(self, state: State = EMPTY_STATE) -> None:
        self._state = state
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._state.names)

    def __contains__(self, name: object) -> bool:
        return name in self._state.positions

    @property
    def state(self) -> State:
        return self._state

    @property
    def generation(self) -> int:
        return self._state.generation

    @property
    def names(self) -> tuple[str, ...]:
        return self._state.names

    @property
    def cutoff(self) -> float:
        """A text whose best skill scores less is given nothing."""
        return cutoff_of(self._state)

    def skill(self, name: str) -> Skill | None:
        """The skill as it was indexed, without metadata and source; None: not in the index."""
        state = self._state
        at = state.positions.get(name)
        if at is None:
            return None
        shown = state.shown.get(at)
        if shown is None:
            if len(state.shown) >= _SHOWN:
                state.shown.clear()
            shown = state.shown[at] = decode(bytes(state.contents[at]))
        return shown

    def snapshot(self) -> Index:
        """The same index now, which later changes to this one don't reach."""
        return Index(self._state)

    def search(self, text: str | Sequence[str] | Query, k: int = 6, *, cutoff: float | None = None) -> list[Hit]:
        """The best `k` skills, best first, or none at all if the best one is below `cutoff` (default: the index's own).

        `text` is one human text, or the human turns of a conversation, oldest first.
        """
        state = self._state
        if not state.names or k < 1:
            return []
        query = text if isinstance(text, Query) else Query.of(text)
        scores = _scores(state, query)
        least = cutoff_of(state) if cutoff is None else cutoff
        found = top(scores, k)
        if not found or float(scores[found[0]]) < least:
            return []
        return [Hit(state.names[i], float(scores[i])) for i in found]

    def spoken(self, query: Query) -> list[tuple[str, float]]:
        """The turns of `query` that take part, newest first, with their weights."""
        state = self._state
        return _query.turns(query, cutoff_of(state), lambda text: score_terms(state, _query.terms(text)))

    def add(self, skill: Skill) -> Index:
        """Makes `skill` retrievable at once, in place of one of the same name, and returns this index.

        Some milliseconds at a thousand skills. Without a vector until the index is embedded anew.
        """
        return self.change((skill,))

    def remove(self, name: str) -> Index:
        """Takes a skill out and returns this index; an unknown name changes nothing."""
        return self.change((), (name,))

    def change(self, added: Iterable[Skill], removed: Iterable[str] = ()) -> Index:
        """`remove` and `add` for many in one generation; without any change it stays the same."""
        with self._writing:
            state = self._state
            for name in removed:
                if name in state.positions:
                    state = _without(state, name)
            for skill in added:
                state = _with(state, skill)
            if state is not self._state:
                self._state = calibrated(replace(state, generation=self._state.generation + 1))
        return self


_FEW = 200  # skills; so many are sorted faster than numpy is called


def top(scores: Scores, k: int) -> list[int]:
    """Positions of the `k` best scores above zero, best first, equal ones by position."""
    n = len(scores)
    if n <= _FEW:
        return [i for _, i in sorted((-score, i) for i, score in enumerate(scores.tolist()) if score > 0)[:k]]
    best: list[int] = scores.argpartition(n - k)[n - k :].tolist() if k < n else list(range(n))
    return [i for score, i in sorted((-float(scores[i]), i) for i in best) if score < 0]


def score_terms(state: State, terms: Mapping[str, float]) -> NDArray[np.float64]:
    """Every skill's score for weighted terms, (skills,)."""
    skills, head, body, known = len(state.names), state.head.vocabulary, state.body.vocabulary, state.known
    docs: list[NDArray[np.intp]] = []
    parts: list[NDArray[np.float32]] = []
    for term, weight in terms.items():
        found = known.get(term)
        if found is None:
            if term not in head and term not in body:
                continue
            found = known[term] = _postings(state, term)
            if len(known) > _KNOWN_TERMS:
                known.clear()
        docs.append(found[0])
        parts.append(found[1] if weight == 1.0 else found[1] * weight)
    return np.bincount(np.concatenate(docs), np.concatenate(parts), skills) if docs else np.zeros(skills)


def _postings(state: State, term: str) -> Postings:
    """`Field.postings` of both fields together; a skill may stand in it twice."""
    found = [part.postings(term, len(state.names)) for part in (state.head, state.body)]
    return np.concatenate([docs for docs, _ in found]), np.concatenate([parts for _, parts in found])


def cutoff_of(state: State) -> float:
    rarity = math.log1p((len(state.names) - 0.5) / 1.5) if state.names else 0.0
    return state.telling * (0.45 + rarity / 15)


def calibrated(state: State) -> State:
    """`state` with its `telling`; the last step of whoever changes the fields."""
    skills = len(state.names)
    if not skills:
        return replace(state, telling=0.0)
    return replace(state, telling=float((state.head.best_weights(skills) + state.body.best_weights(skills)).mean()))


def _scores(state: State, query: Query) -> NDArray[np.float64]:
    """The weighted sum over the turns that speak. Each is scored once: the sum of scores is the score of the sum."""
    single: dict[str, NDArray[np.float64]] = {}

    def score(text: str) -> NDArray[np.float64]:
        if text not in single:
            single[text] = score_terms(state, _query.terms(text))
        return single[text]

    spoken = _query.turns(query, cutoff_of(state), score)
    if len(spoken) == 1:
        return score(spoken[0][0])
    total = np.zeros(len(state.names))
    for text, weight in spoken:
        total += score(text) * weight
    return total


def _with(state: State, skill: Skill) -> State:
    if skill.name in state.positions:
        state = _without(state, skill.name)
    at = len(state.names)
    vectors = state.vectors
    if vectors is not None:
        vectors = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
    return replace(
        state,
        names=(*state.names, skill.name),
        positions={**state.positions, skill.name: at},
        contents=(*state.contents, encode(skill)),
        categories=(*state.categories, skill.category),
        head=state.head.with_doc(at, head_terms(skill), HEAD),
        body=state.body.with_doc(at, body_terms(skill), BODY),
        vectors=vectors,
    )


def _without(state: State, name: str) -> State:
    at = state.positions[name]
    names = state.names[:at] + state.names[at + 1 :]
    return replace(
        state,
        names=names,
        positions={n: i for i, n in enumerate(names)},
        contents=state.contents[:at] + state.contents[at + 1 :],
        categories=state.categories[:at] + state.categories[at + 1 :],
        head=state.head.without_doc(at),
        body=state.body.without_doc(at),
        vectors=None if state.vectors is None else np.delete(state.vectors, at, axis=0),
    )
