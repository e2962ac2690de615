"""What the evolver's model is asked: the instructions, the skills that are near, the conversation.

Design: two sizes. `FULL` for a model that the settings name; `SMALL` for the caller's own, whose share is
small: one new skill, a short transcript, no skills shown (what is the same again is found afterwards). The
human's words get most of the room. The system prompt of the conversation is never part of it.

Limits: tokens are estimated, upwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from metaclaw_core.learn import edits as editing
from metaclaw_core.learn.caller import most_tokens
from metaclaw_core.learn.similar import related
from metaclaw_core.learn.spans import Source, Told
from metaclaw_core.learn.transcript import Origin, Section, name_of, render
from metaclaw_core.skills.library import Scan


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked for and shown, in tokens."""

    transcript: int
    answer: int
    related: int  # skills named
    whole: int  # skills shown whole
    edits: int
    words: tuple[int, int]


FULL = Size(6_000, 2_500, 12, 3, editing.MAX_EDITS, (editing.MIN_WORDS, 400))
SMALL = Size(1_500, 900, 0, 0, 1, (editing.MIN_WORDS + 10, 110))
SMALLEST = 400  # tokens of transcript; with less the caller's model is not asked
SMALL_ANSWER = 500


def question(told: Told, scan: Scan, size: Size) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The messages, and the skills that may be changed: name → body."""
    transcript = render(_sections(told), size.transcript)
    known = {skill.name: skill.body for skill in scan.usable}
    system = _instructions(told, scan, size, transcript.fence)
    return [{"role": "system", "content": system}, {"role": "user", "content": transcript.text}], known


def _instructions(told: Told, scan: Scan, size: Size, fence: str) -> str:
    said = "\n".join(span.text for span in told.of(Source.HUMAN))
    near = related(scan.usable, said, size.related)
    whole = [skill for skill in near if skill.provenance is not None][: size.whole]
    lowest, highest = size.words
    return prompt(
        "evolve.j2", fence=fence, skills=near, whole=whole, min_words=lowest, max_words=highest, max_edits=size.edits
    )


def prompt_tokens(told: Told, scan: Scan, size: Size, transcript: int) -> int:
    """At least what a question with `transcript` tokens of conversation takes."""
    return most_tokens(_instructions(told, scan, size, "0" * 16)) + transcript + 32


def _sections(told: Told) -> list[Section]:
    """The segment for the model: the human's words get most of the room."""
    out: list[Section] = []
    outcomes = {outcome.turn: outcome for outcome in told.outcomes}
    last = max((span.turn for span in told.spans), default=0)
    for turn in range(1, last + 1):
        mine = [span for span in told.spans if span.turn == turn]
        for source, label, origin, share in _SHOWN:
            texts = [_shown(span.text, span.name, span.failed) for span in mine if span.source in source]
            if texts:
                out.append(Section(f"turn {turn}, {label}", origin, "\n".join(texts), share))
        outcome = outcomes.get(turn)
        if outcome is not None and (outcome.problem or outcome.score is not None):
            said = f"no answer: {outcome.problem}" if outcome.problem else f"score {outcome.score:+d}"
            out.append(Section(f"turn {turn}, how it went", Origin.TOOL, said, 0.2))
    return out


_SHOWN: tuple[tuple[tuple[Source, ...], str, Origin, float], ...] = (
    ((Source.HUMAN, Source.DOUBTED), "what the user said", Origin.HUMAN, 4.0),
    ((Source.QUOTED,), "what the user passed on from elsewhere", Origin.TOOL, 0.6),
    ((Source.ASSISTANT,), "what the agent said", Origin.ASSISTANT, 1.0),
    ((Source.ACTION,), "what the agent did", Origin.ASSISTANT, 0.8),
    ((Source.TOOL,), "what the tools brought", Origin.TOOL, 0.6),
)


def _shown(text: str, name: str, failed: bool) -> str:
    head = f"{name_of(name)}{' (an error)' if failed else ''}: " if name else ""
    return head + text


@cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("metaclaw_core.learn", "prompts"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - plain text for a model
    )


def prompt(name: str, **values: Any) -> str:
    return str(_environment().get_template(name).render(**values))
