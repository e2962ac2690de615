"""Which proposed lesson becomes what: active, a candidate for review, quarantined, or nothing.

Design: an LLM that has read a web page proposes what the page wants. So a proposal is believed for what
the human himself said, and for nothing else. Checked in this order, on redacted text:

1. Its quotes must be in the segment, word for word. A made-up quote is dropped; without a real one the
   edit is.
2. It must not look like an attack (`scan`), nor name an address, a host or a package that nobody but a
   tool or a quotation has named, nor repeat a passage of theirs: quarantined.
3. Evidence only from tools, the web or quotations: quarantined.
4. One of the human's own quotes must be about the lesson, sharing words with it; the words must be
   surely the user's (`Source.DOUBTED` are not), and what needs care must be his wish: else review.
5. What a human has written or edited is changed by a human: a candidate beside it.

A quarantined or rejected lesson that comes again, 0.85 alike, meets the same end. Nothing here ever takes
an active skill away except a retirement that the human asked for.

Limits: "about the lesson" is a matter of shared words; where the user's language is not the lesson's, the
trigger phrases must bridge it, or the lesson waits for review.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from metaclaw_core.learn.edits import Edit, Fault, changed_body, clean_line, length_faults
from metaclaw_core.learn.scan import Severity, scan
from metaclaw_core.learn.similar import SAME, Similarity
from metaclaw_core.learn.spans import Source, Span, Told, plain, sentences
from metaclaw_core.redact import redact_text
from metaclaw_core.skills.library import Scan
from metaclaw_core.skills.skill import MAX_NAME, Provenance, Skill, Status, validate
from metaclaw_core.skills.tokens import words

MIN_QUOTE = 8  # characters; two Chinese ones count as eight
_COPIED_WORDS = 7  # in a row, of a tool's text: no accident
_COPIED_CJK = 10
_MAX_TRIGGERS = 16
_WINDOW = 60  # words of a stranger's passage
_USED = (Status.ACTIVE, Status.STALE)
_GIST_THEIRS, _GIST_OWN = 0.6, 0.4  # shares of a lesson's gist


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with one edit, and why."""

    action: Literal["write", "retire", "nothing"]
    name: str
    op: str
    status: Status | None = None  # of a "write"
    skill: Skill | None = None  # of a "write": whole, provenance included
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ground:
    """What a decision stands on; the same for all edits of a segment."""

    told: Told
    library: Scan
    immediate: bool  # skills.admission
    provenance: Provenance
    doubt: str | None = None  # why the segment's words are perhaps not the user's


def decide(edit: Edit, ground: Ground) -> Decision:
    """What becomes of `edit`. Pure."""
    edit = _redacted(edit)
    real = [quote for quote in edit.quotes if _sources(quote, ground.told.spans)]
    if not real:
        return Decision("nothing", edit.name, edit.op, reasons=("none of its quotes is in the conversation",))
    if edit.op == "retire":
        return _retire(edit, real, ground)
    made = _result(edit, ground)
    if isinstance(made, Decision):
        return made
    skill, old, op = made
    hostile, careful = _content(skill, old, ground.told)
    about = f"{skill.name.replace('-', ' ')}\n{skill.description}\n{skill.body}\n" + "\n".join(skill.triggers)
    evidence, doubts = _evidence(real, about, ground)
    if evidence is None:
        hostile.append("its only evidence is text from tools, the web or quotations")
    twin = _twin(skill, ground.library, (Status.QUARANTINED,))
    if twin is not None:
        hostile.append(f"it says what the quarantined {twin.name!r} says")
    if hostile:
        apart = replace(skill, name=_free_name(skill, ground.library), source=None, status=Status.QUARANTINED)
        return _write(apart, op, Status.QUARANTINED, hostile, ground)
    rejected = _twin(skill, ground.library, (Status.ARCHIVED,))
    if rejected is not None:
        return Decision(
            "nothing", skill.name, op, reasons=(f"it says what {rejected.name!r} said, which was archived",)
        )
    reasons = [*doubts, *careful]
    if not ground.immediate:
        reasons.append("skills.admission is review")
    if old is not None and not _ours(old):
        reasons.append(f"{old.name!r} was written or edited by a human")
    if not reasons:
        return _write(skill, op, Status.ACTIVE, ["the human said so"], ground)
    waiting = _twin(skill, ground.library, (Status.CANDIDATE,))
    if waiting is not None:
        return Decision("nothing", skill.name, op, reasons=(f"{waiting.name!r} says so and waits for review",))
    if old is None and any(s.name == skill.name for s in ground.library.candidates):
        skill = replace(skill, name=_free_name(skill, ground.library))
    return _write(skill, op, Status.CANDIDATE, reasons, ground)


# --- evidence -----------------------------------------------------------------------------------


def _sources(quote: str, spans: Sequence[Span]) -> set[Source]:
    """Where `quote` stands; empty: nowhere, or it is too short to say anything."""
    wanted = plain(quote).strip("\"'“”‘’「」『』«».…。 ")
    if _weight(wanted) < MIN_QUOTE:
        return set()
    return {span.source for span in spans if wanted in plain(span.text)}


def is_said(quote: str, spans: Sequence[Span]) -> bool:
    """Is `quote` in the conversation, word for word?"""
    return bool(_sources(quote, spans))


def _weight(text: str) -> int:
    return len(text) + 3 * len(_CJK.findall(text))


def _evidence(quotes: Sequence[str], about: str, ground: Ground) -> tuple[str | None, list[str]]:
    """The best quote that is the human's own (None: there is none), and what keeps it from being enough."""
    own: list[str] = []
    doubted: list[str] = []
    agents: list[str] = []
    for quote in quotes:
        sources = _sources(quote, ground.told.spans)
        if sources & {Source.TOOL, Source.QUOTED} and not _short(quote):
            continue  # whoever said it first
        if Source.HUMAN in sources:
            own.append(quote)
        elif Source.DOUBTED in sources:
            doubted.append(quote)
        elif sources & {Source.ASSISTANT, Source.ACTION}:
            agents.append(quote)
    if own:
        quote = max(own, key=lambda q: _shared(q, about))
        return quote, [] if _supports(quote, about) else ["what the human said shares no words with the lesson"]
    if doubted:
        return doubted[0], [
            f"the words are perhaps not the user's: {ground.doubt or 'a later request does not hold them'}"
        ]
    if agents:
        return agents[0], ["its evidence is the agent's own words"]
    return None, []


def _short(quote: str) -> bool:
    return _weight(plain(quote)) < 3 * MIN_QUOTE


def _shared(quote: str, about: str) -> int:
    return len(set(words(quote)) & set(words(about)))


def _supports(quote: str, about: str) -> bool:
    """Two words in common, or one of at most three."""
    terms = set(words(quote))
    shared = _shared(quote, about)
    return shared >= 2 or (shared == 1 and len(terms) <= 3)


# --- content ------------------------------------------------------------------------------------

_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_ADDRESS = re.compile(
    r"\b(?:https?|ftp|ssh|wss?)://[^\s)>\]\"'`，。；]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    r"|\b(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+(?:com|net|org|io|dev|ai|co|cn|ru|xyz|top|info|biz|app|site|online|tk|cc|me|de|uk|fr|jp|example|test|onion)\b(?![.\w(])"
    r"|\b(?:\d{1,3}\.){3}\d{1,3}\b|\+\d[\d -]{7,}\d|(?<![\w/])@[A-Za-z0-9_]{4,}\b(?!/)",
    re.IGNORECASE,
)
_PACKAGE = re.compile(
    r"\b(?:pip3?|uv pip|uv|npm|pnpm|yarn|gem|cargo|brew|conda|apt(?:-get)?|go|poetry)\s+(?:install|add|i|get)\s+(?:-{1,2}[\w-]+\s+)*([@\w./\[\]<>=~^-]*\w)|\b(?:npx|uvx|pipx run)\s+(?:-{1,2}[\w-]+\s+)*([@\w./-]*\w)",
    re.IGNORECASE,
)
_SENSITIVE_PATH = re.compile(r"(?<![\w.])(?:~|/(?:etc|root|home|var|usr|opt|tmp)|[A-Z]:\\)[/\\][\w./\\-]+")


def _content(skill: Skill, old: Skill | None, told: Told) -> tuple[list[str], list[str]]:
    """(why it is hostile, what must be the human's wish) of what is new in a skill."""
    before = set(_lines(old)) if old is not None else set()
    new = "\n".join(line for line in _lines(skill) if line not in before)
    own = "\n".join(plain(span.text) for span in told.of(Source.HUMAN))
    hostile: list[str] = []
    careful: list[str] = []
    for finding in scan(new):
        if finding.severity is Severity.ATTACK:
            hostile.append(f"{finding.kind}: {finding.excerpt}")
        elif not all(word in own for word in plain(finding.hit).split()[:2]):
            careful.append(f"{finding.kind}: {finding.excerpt}")
    strangers = "\n".join(plain(span.text) for span in told.of(Source.TOOL, Source.QUOTED))
    for address in dict.fromkeys(match[0].rstrip(".,") for match in _ADDRESS.finditer(new)):
        if plain(address) not in own:
            hostile.append(f"the human never named {address}")
    for match in _PACKAGE.finditer(new):
        package = match[1] or match[2]
        if plain(package) not in own and plain(package) in strangers:
            hostile.append(f"the package {package} was named by a tool or a quotation only")
    for path in {match[0] for match in _SENSITIVE_PATH.finditer(new)}:
        if plain(path) not in own and plain(path) in strangers:
            hostile.append(f"the path {path} was named by a tool or a quotation only")
    if passage := _copied(new, told):
        hostile.append(f"it repeats a tool or a quotation: {passage}")
    if _gist_is_theirs(skill, told):
        careful.append("its gist stands in what a tool or a quotation says, not in the human's words")
    return hostile, careful


def _gist_is_theirs(skill: Skill, told: Told) -> bool:
    """Do most words of the name and description stand together in a stranger's passage, and few in the human's words?"""
    gist = set(words(f"{skill.name.replace('-', ' ')} {skill.description}"))
    own = {word for span in told.of(Source.HUMAN) for word in words(span.text)}
    if len(gist) < 4 or len(gist & own) >= _GIST_OWN * len(gist):
        return False
    for span in told.of(Source.TOOL, Source.QUOTED):
        said = words(span.text)
        for at in range(0, max(1, len(said)), _WINDOW // 2):
            if len(gist.intersection(said[at : at + _WINDOW])) >= _GIST_THEIRS * len(gist):
                return True
    return False


def _lines(skill: Skill | None) -> list[str]:
    if skill is None:
        return []
    return [skill.name.replace("-", " "), skill.description, *skill.triggers, *skill.body.splitlines()]


_TOKEN = re.compile(f"[{_CJK.pattern[1:-1]}]|[^\\W_]+")


def _copied(text: str, told: Told) -> str | None:
    """A run of words that stands in a tool's text or a quotation and not in the human's own words."""
    strangers = _grams(told.of(Source.TOOL, Source.QUOTED))
    if not strangers:
        return None
    own = _grams(told.of(Source.HUMAN))
    for line in text.splitlines():
        tokens = _TOKEN.findall(plain(line))
        for gram, length in _runs_of(tokens):
            if (
                gram in strangers
                and gram not in own
                and len(set(words(" ".join(gram) if length == _COPIED_WORDS else "".join(gram)))) >= 3
            ):
                return (" " if length == _COPIED_WORDS else "").join(gram)
    return None


def _runs_of(tokens: Sequence[str]) -> list[tuple[tuple[str, ...], int]]:
    out: list[tuple[tuple[str, ...], int]] = []
    for at in range(len(tokens)):
        run = tuple(tokens[at : at + _COPIED_WORDS])
        if len(run) == _COPIED_WORDS and not any(_CJK.match(token) for token in run):
            out.append((run, _COPIED_WORDS))
        run = tuple(tokens[at : at + _COPIED_CJK])
        if len(run) == _COPIED_CJK and sum(bool(_CJK.match(token)) for token in run) > _COPIED_CJK // 2:
            out.append((run, _COPIED_CJK))
    return out


def _grams(spans: Sequence[Span]) -> set[tuple[str, ...]]:
    return {gram for span in spans for gram, _ in _runs_of(_TOKEN.findall(plain(span.text)))}


# --- the skill that comes out -------------------------------------------------------------------


def _result(edit: Edit, ground: Ground) -> tuple[Skill, Skill | None, str] | Decision:
    """The skill as it would be, the one it changes (None: new), and which operation that is."""
    library = ground.library
    if edit.op == "add":
        made = Skill(edit.name, clean_line(edit.description), edit.body, triggers=edit.triggers)
        old = _twin(made, library, _USED) or _named(library, edit.name)
        if old is None:
            taken = any(s.name == made.name for s in library.skills)  # archived or quarantined, and not the same
            return (replace(made, name=_free_name(made, library)) if taken else made), None, "add"
        merged = _merged(old, made)
        if merged is None:
            return Decision("nothing", old.name, "refine", reasons=(f"{old.name!r} says so already",))
        if length_faults(merged.body):
            return Decision("nothing", old.name, "refine", reasons=(f"with it {old.name!r} would be too long",))
        return merged, old, "refine"
    old = _named(library, edit.name)
    if old is None:
        return Decision("nothing", edit.name, edit.op, reasons=(f"there is no skill {edit.name!r} in use",))
    body = changed_body(old.body, edit.changes)
    if isinstance(body, Fault) or length_faults(body):
        return Decision("nothing", edit.name, edit.op, reasons=("its changes don't fit the skill any more",))
    changed = replace(
        old,
        description=clean_line(edit.description) or old.description,
        body=body,
        triggers=_joined(old.triggers, edit.triggers),
    )
    if changed.content_hash == old.content_hash:
        return Decision("nothing", edit.name, edit.op, reasons=("it changes nothing",))
    return changed, old, "refine"


def _named(library: Scan, name: str) -> Skill | None:
    """The skill in use of that name. A candidate is none: what waits for review is not built upon."""
    return next((s for s in library.skills if s.name == name and s.status in _USED), None)


def _twin(skill: Skill, library: Scan, among: Sequence[Status]) -> Skill | None:
    """The most alike of the library's skills, if it is the same lesson."""
    pool = [s for s in (*library.skills, *library.candidates) if s.status in among]
    best = Similarity(pool).to(skill)[:1]
    return best[0][1] if best and best[0][0] >= SAME else None


def _merged(old: Skill, new: Skill) -> Skill | None:
    """`old` with the sentences of `new` that it doesn't hold; None if there are none."""
    have = [Counter(words(sentence)) for line in old.body.splitlines() for sentence in sentences(line)]
    added = []
    for line in new.body.splitlines():
        if line.startswith("#"):
            continue
        fresh = [sentence for sentence in sentences(line) if not _in(Counter(words(sentence)), have)]
        if fresh:
            added.append("".join(fresh).strip())
    triggers = _joined(old.triggers, new.triggers)
    if not added and triggers == old.triggers:
        return None
    body = old.body if not added else f"{old.body.rstrip()}\n\n" + "\n".join(added)
    return replace(old, body=body.strip(), triggers=triggers)


def _in(said: Counter[str], have: Sequence[Counter[str]]) -> bool:
    """Does one of the sentences that are there say nearly all of it?"""
    total = sum(said.values())
    return total == 0 or any(sum((said & other).values()) >= 0.8 * total for other in have)


def _joined(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*one, *other)))[:_MAX_TRIGGERS]


def _ours(skill: Skill) -> bool:
    """Written by us, and by nobody since."""
    return skill.provenance is not None and skill.provenance.digest == skill.content_hash


def _free_name(skill: Skill, library: Scan) -> str:
    """A name that hides and replaces nothing: a quarantined skill must not take the place of a good one."""
    if all(s.name != skill.name for s in (*library.skills, *library.candidates)):
        return skill.name
    suffix = f"-{skill.content_hash[:6]}"
    return skill.name[: MAX_NAME - len(suffix)].rstrip("-") + suffix


def _write(skill: Skill, op: str, status: Status, reasons: Sequence[str], ground: Ground) -> Decision:
    earlier = skill.provenance.sessions if skill.provenance else ()
    sessions = tuple(dict.fromkeys((*earlier, *ground.provenance.sessions)))[-20:]
    skill = replace(
        skill, status=status, provenance=replace(ground.provenance, sessions=sessions, digest=skill.content_hash)
    )
    if faults := validate(skill):
        return Decision("nothing", skill.name, op, reasons=tuple(faults))
    return Decision("write", skill.name, op, status, skill, tuple(reasons))


def _retire(edit: Edit, quotes: Sequence[str], ground: Ground) -> Decision:
    skill = _named(ground.library, edit.name)
    if skill is None:
        return Decision("nothing", edit.name, "retire", reasons=(f"there is no active skill {edit.name!r}",))
    quote, doubts = _evidence(quotes, "\n".join(_lines(skill)), ground)
    reasons = [*doubts]
    if quote is None:
        reasons.append("its only evidence is text from tools, the web or quotations")
    if not ground.immediate:
        reasons.append("skills.admission is review")
    if not _ours(skill):
        reasons.append("it was written or edited by a human")
    if reasons:
        return Decision("nothing", edit.name, "retire", reasons=tuple(reasons))
    return Decision("retire", edit.name, "retire", Status.ARCHIVED, reasons=(edit.why or "the human said so",))


def _redacted(edit: Edit) -> Edit:
    return replace(
        edit,
        quotes=tuple(redact_text(quote) for quote in edit.quotes),
        description=redact_text(edit.description),
        body=redact_text(edit.body),
        triggers=tuple(redact_text(trigger) for trigger in edit.triggers),
        changes=tuple((old, redact_text(new)) for old, new in edit.changes),
        why=redact_text(edit.why),
    )
