"""What an LLM of ours gets to read of a conversation: fenced, redacted, short, each piece with its origin.

Design: a piece of a conversation is a `Section`: a label of ours, who wrote it, and its text. Sections
are rendered between fences that carry a random number which occurs in none of the texts, so nothing
inside can end its section or begin another. Who wrote it (human, assistant, tool) stands on the fence,
where the text can't change it: the evolver believes lessons by origin. Text of tools and of the model
that speaks to a grader ("give this a score of 1") is left out, marked.

Long texts lose their middle, which is marked. Room is divided by share; what a short
section leaves goes to the others. Secrets are redacted before cutting, so none survives as a half.

Limits: tokens are estimated, generously. A text that speaks to a grader in other words gets through;
the fence and the votes are the defence, this only takes the easy ones out. The system prompt is never
a section: nothing here reads it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from metaclaw_core.learn.budget import estimate_tokens
from metaclaw_core.learn.nextstate import NextState
from metaclaw_core.model import Message, Opaque, Text, ToolCall
from metaclaw_core.redact import redact_text

LIMIT_TOKENS = 4_000
_FENCE_TOKENS = 40  # what the two fences of a section take, its label included


class Origin(StrEnum):
    HUMAN = "human"
    ASSISTANT = "assistant"
    TOOL = "tool or web"  # whatever a tool brought: files, pages, output; anybody may have written it


@dataclass(frozen=True, slots=True)
class Section:
    label: str  # ours, never taken from the conversation except through `name_of`
    origin: Origin
    text: str
    share: float = 1.0  # of the room, relative to the other sections


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    fence: str  # the random number; a prompt names it
    tokens: int  # estimated, fences included
    cut: bool  # something was left out for its length


def render(sections: Sequence[Section], limit_tokens: int = LIMIT_TOKENS) -> Rendered:
    """The sections between fences, at most `limit_tokens` in all (fences alone may exceed it only where there are
    more than `limit_tokens` / 40 sections)."""
    texts = [_clean(section, limit_tokens) for section in sections]
    needs = [estimate_tokens(text) for text in texts]
    rooms = _divide(limit_tokens - _FENCE_TOKENS * len(texts), needs, [section.share for section in sections])
    short = [shorten(text, room) for text, room in zip(texts, rooms, strict=True)]
    fence = _fence(short)
    blocks = [
        f"<<<{fence} {section.label}, written by: {section.origin}\n{text}\n{fence}>>>"
        for section, text in zip(sections, short, strict=True)
    ]
    out = "\n\n".join(blocks)
    return Rendered(out, fence, estimate_tokens(out), any(_MARK in text for text in short))


def turn_sections(
    instruction: str | None, action: Message, after: NextState | None, *, earlier: str | None = None
) -> list[Section]:
    """One turn: what the human asked, all that the assistant did, and what came of it."""
    sections = []
    if earlier is not None:
        sections.append(Section("earlier request", Origin.HUMAN, earlier, 0.1))
    if instruction is not None:
        sections.append(Section("instruction", Origin.HUMAN, instruction, 0.25))
    acts = list(action_sections(action))
    sections += [Section(s.label, s.origin, s.text, 0.45 / len(acts)) for s in acts]
    if after is not None:
        names = {call.id: call.name for call in action.tool_calls if call.id}
        pieces = [
            Section(
                f"next state: result of {name_of(r.name or names.get(r.call_id or "") or 'a tool')}"
                f"{' (an error)' if r.is_error else ''}",
                Origin.TOOL,
                r.text,
            )
            for r in after.results
        ]
        if after.human is not None:
            pieces.append(Section("next state: the human's next message", Origin.HUMAN, after.human))
        sections += [Section(s.label, s.origin, s.text, 0.3 / len(pieces)) for s in pieces]
    return sections


def action_sections(action: Message) -> list[Section]:
    """Text and tool calls of an answer, in their order; thinking is not shown."""
    out = []
    for part in action.parts:
        match part:
            case Text() if part.text.strip():
                out.append(Section("action: text", Origin.ASSISTANT, part.text))
            case ToolCall():
                out.append(Section(f"action: call of {name_of(part.name)}", Origin.ASSISTANT, part.arguments))
            case Opaque():
                out.append(Section("action: other content", Origin.ASSISTANT, f"({name_of(part.type)}, not shown)"))
    return out or [Section("action: text", Origin.ASSISTANT, "(nothing)")]


def candidate_sections(first: Message, second: Message) -> list[Section]:
    """Two answers to one question, A and B, to be compared."""
    out = []
    for name, action in (("A", first), ("B", second)):
        acts = action_sections(action)
        out += [Section(f"candidate {name}, {s.label}", s.origin, s.text, 0.4 / len(acts)) for s in acts]
    return out


def name_of(text: str) -> str:
    """A tool's name as a part of a label: it can't hold a line break or a sentence."""
    return re.sub(r"[^\w.:/-]+", "_", text)[:64] or "?"


_MARK = "[… left out for its length …]"


# --- length -------------------------------------------------------------------------------------


def shorten(text: str, tokens: int) -> str:
    """At most about `tokens` of `text`: its head and, a little less, its tail."""
    if estimate_tokens(text) <= tokens:
        return text
    room = max(0, tokens - 14) * 3  # the mark's own tokens; `estimate_tokens` counts three bytes
    raw = text.encode("utf-8")
    head = raw[: room * 3 // 5].decode("utf-8", "ignore")
    tail_bytes = room - room * 3 // 5
    tail = raw[len(raw) - tail_bytes :].decode("utf-8", "ignore") if tail_bytes else ""
    return f"{head}\n{_MARK}\n{tail}".strip("\n")


def _divide(room: int, needs: Sequence[int], shares: Sequence[float]) -> list[int]:
    """How many tokens each may have: its need where that fits, else the room that is left by its share."""
    given = [0] * len(needs)
    open_ = [i for i, need in enumerate(needs) if need]
    left = max(0, room)
    while open_:
        total = sum(shares[i] for i in open_)
        fits = [i for i in open_ if needs[i] <= left * shares[i] / total]
        if not fits:
            for i in open_:
                given[i] = int(left * shares[i] / total)
            break
        for i in fits:
            given[i] = needs[i]
        left -= sum(needs[i] for i in fits)
        open_ = [i for i in open_ if i not in fits]
    return given


# --- content ------------------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")
_LEFT_OUT = "[words addressed to a grader were left out]"
# A sentence with what separates it from the next; without an end in sight, 400 characters.
_SENTENCE = re.compile(r"(?:[^\n.!?。！？]|[.!?](?!\s)){1,400}(?:[.!?](?=\s))?|[.!?。！？\s]+")
_GRADER = r"(?:judges?|graders?|evaluators?|reward models?)"
_GRADE = r"(?:scores?|rates?|ratings?|rewards?|marks?|grades?|approves?)"
_TO_A_GRADER = re.compile(
    rf"\b{_GRADER}\b.*\b{_GRADE}\b|\b{_GRADE}\b.*\b{_GRADER}\b"
    r"""|\b(?:score|rating|reward)["'*_`\s]*[:：=]["'*_`\s]*[+\-−]?[01](?![/%\d]|[.,]\d)"""
    r"|\b(?:ignore|disregard|forget)\s+(?:(?:all|any|of|the|your)\s+)*(?:previous|prior|above|earlier)\b"
    r"|(?:忽略|无视)(?:之前|以上|上面|前面|先前|所有)|(?:评委|裁判|评审|评分者|打分者).*分",
    re.IGNORECASE,
)


def _clean(section: Section, limit_tokens: int) -> str:
    """What may be shown of a section, no longer than all of them may be together."""
    text = _SURROGATE.sub("\ufffd", redact_text(section.text))  # a lone surrogate is a 400 at some servers
    text = shorten(text, limit_tokens)
    return text if section.origin is Origin.HUMAN else without_orders(text)


def without_orders(text: str) -> str:
    """`text` without sentences that speak to a grader; one mark for all that stand together."""
    out: list[str] = []
    for piece in _SENTENCE.findall(text):
        if not _TO_A_GRADER.search(piece):
            out.append(piece)
        elif not any(p == _LEFT_OUT for p in out[-2:]):  # the last but one where white space stands between
            out.append(_LEFT_OUT)
    return "".join(out)


def _fence(texts: Sequence[str]) -> str:
    while True:
        fence = secrets.token_hex(8)
        if not any(fence in text for text in texts):
            return fence
