"""`retrieval_mode: template`: skills by the kind of task, found by keywords, for a small hand-sorted library.

Design: a skill's `metaclaw-category` is one of the categories below, `general`, `common_mistakes` or any other word.
The newest human turn that names a kind of task decides; the category with most of its keywords in it wins. What is
given then: `general` (up to top_k), that category (up to task_specific_top_k) and `common_mistakes` (up to 5),
inside each the better match first. No keyword, no skills. A category of the user's own making has its
name's words for keywords.

Keywords are matched as whole words after the tokeniser, so "tomorrow" has no "row" in it.

Limits: keywords are English. TF-IDF ranks far better; this exists for people who sort by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metaclaw_core.skills.index import Hit, Index, score_terms
from metaclaw_core.skills.query import Query, terms
from metaclaw_core.skills.retrieve import Options, Retrieval
from metaclaw_core.skills.tokens import words

GENERAL, MISTAKES = "general", "common_mistakes"
_MISTAKES_TOP_K = 5

_KEYWORDS = {
    "coding": "code coding bug debug compile compiler function class method refactor test unittest pytest python javascript"
    " typescript rust golang java sql api library repository git commit merge docker stack trace exception regex script",
    "research": "research paper papers literature study studies survey citation cite arxiv source sources evidence hypothesis"
    " compare investigate bibliography journal",
    "data_analysis": "data dataset csv excel spreadsheet pandas numpy chart plot graph statistics statistical regression"
    " correlation average median column row pivot dashboard metric",
    "security": "security secure vulnerability exploit cve password credential secret encrypt encryption authentication"
    " authorization permission xss injection attack phishing malware firewall",
    "communication": "email mail letter message reply slack draft announcement newsletter tone wording rewrite translate"
    " presentation slides speech",
    "productivity": "todo task tasks calendar schedule meeting agenda reminder deadline plan planning priority prioritize notes"
    " organize checklist",
    "automation": "automate automation cron workflow pipeline script batch webhook deploy deployment ci trigger scrape scraping"
    " bot scheduled backup",
    "agentic": "agent agents subagent tool tools browser shell terminal files folder directory search web multi-step",
}


class Template:
    name = "template"

    def __init__(self, options: Options) -> None:
        self._task_top_k = options.task_specific_top_k
        self._keywords = {category: frozenset(words(text)) for category, text in _KEYWORDS.items()}

    async def retrieve(self, texts: Sequence[str], index: Index, k: int) -> Retrieval:
        state = index.state
        by_category: dict[str, list[str]] = {}
        for name, of in zip(state.names, state.categories, strict=True):
            if of:
                by_category.setdefault(of, []).append(name)
        own = {c: frozenset(words(c)) for c in by_category if c not in self._keywords and c not in (GENERAL, MISTAKES)}
        for text in reversed(Query.of(texts).texts):
            category = _category(text, {**self._keywords, **own})
            if category is not None:
                scores = dict(zip(state.names, score_terms(state, terms(text)).tolist(), strict=True))
                chosen = [
                    name
                    for part, most in ((GENERAL, k), (category, self._task_top_k), (MISTAKES, _MISTAKES_TOP_K))
                    for name in sorted(by_category.get(part, []), key=lambda n: -scores[n])[:most]
                ]
                # One score for all: membership is what was decided, and no later cut may undo it.
                return Retrieval(tuple(Hit(name, 1.0) for name in chosen), self.name)
        return Retrieval((), self.name)

    async def aclose(self) -> None:
        pass


def _category(text: str, keywords: Mapping[str, frozenset[str]]) -> str | None:
    """The category with most keywords in `text`, of equals the first; None: no keyword."""
    found = set(terms(text))
    best = max(keywords, key=lambda c: len(keywords[c] & found))
    return best if keywords[best] & found else None
