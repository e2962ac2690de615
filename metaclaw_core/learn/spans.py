"""What was said in a segment, by whom: the ground on which a lesson is believed.

Design: each text of a segment is a `Span` with its source. A human's message is split: his own words, and
what he only passed on (block quotes, fenced blocks, long quotations, mails, "the page says: …"). Only own
words can carry a lesson by themselves. A passage that a tool had brought before the human repeated it is
taken for a quotation, too. A human text that a later request of the same history no longer holds is not
believed (`segments`, on copies).

Tool results are taken from the first request that shows them. The system prompt is never looked at.

Limits: a quotation without any mark is the human's own word, unless a tool brought it before. What a
subagent did is the work of a tool: its words are nobody's wish.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, and_, or_, select

from metaclaw_core.learn.segments import holds, user_texts
from metaclaw_core.model import Kind, Message, Role
from metaclaw_core.redact import redact_text
from metaclaw_core.store.chain import unpack_message
from metaclaw_core.store.rollouts import Store
from metaclaw_core.store.tables import messages, turns

_TAIL = 64  # messages looked back for results
_ECHO_CHARS = 24  # a shorter passage may be repeated by chance


class Source(StrEnum):
    HUMAN = "human"  # the user's own words
    QUOTED = "quoted"  # passed on by the user
    DOUBTED = "doubted"  # in the user's place, but perhaps not his
    ASSISTANT = "assistant"
    ACTION = "action"  # arguments of a tool call
    TOOL = "tool"  # what a tool or a subagent brought


@dataclass(frozen=True, slots=True)
class Span:
    source: Source
    text: str  # redacted
    turn: int  # which human turn of the segment, from 1
    name: str = ""  # the tool's, for ACTION and TOOL
    failed: bool = False  # a tool result that is an error


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of how a human turn went; None: unknown."""

    turn: int
    score: int | None  # the judge's, of its last answer
    problem: str | None  # why it has no answer


@dataclass(frozen=True, slots=True)
class Told:
    spans: tuple[Span, ...]
    outcomes: tuple[Outcome, ...]

    def of(self, *sources: Source) -> list[Span]:
        return [span for span in self.spans if span.source in sources]

    @property
    def answered(self) -> bool:
        return any(span.source in (Source.ASSISTANT, Source.ACTION) for span in self.spans)


def tell(store: Store, segment: Row[Any]) -> Told:
    """All that was said and done in `segment`, oldest first."""
    with store.reading() as db:
        rows = _rows(db, segment)
        spans: list[Span] = []
        outcomes: dict[int, Outcome] = {}
        number = 0
        said: str | None = None
        for at, row in enumerate(rows):
            main = row.session == segment.session and row.kind in (Kind.MAIN.value, Kind.TOOL.value)
            if main and row.user_text and row.user_text != said:
                number, said = number + 1, row.user_text
                doubted = segment.trust is not None or _vanished(db, row, rows[at + 1 :])
                spans += human_spans(redact_text(row.user_text), number, spans, doubted=doubted)
            turn = max(number, 1)
            spans += _results(db, row, turn)
            spans += _answer(row, turn, main)
            if main:
                outcomes[turn] = Outcome(turn, row.score, None if row.response_tip else row.error or row.reason)
    return Told(tuple(spans), tuple(outcomes.values()))


def _rows(db: Connection, segment: Row[Any]) -> Sequence[Row[Any]]:
    """The segment's turns and those of the subagents that share a trace with one of them."""
    until = or_(
        turns.c.started_at < segment.ended_at,
        and_(turns.c.started_at == segment.ended_at, turns.c.id <= segment.last_turn),
    )
    own = db.execute(
        select(turns)
        .where(turns.c.session == segment.session, turns.c.started_at >= segment.started_at, until)
        .order_by(turns.c.started_at, turns.c.id)
    ).all()
    traces = {row.trace_id for row in own if row.trace_id}
    if not traces:
        return own
    theirs = db.execute(
        select(turns).where(
            turns.c.principal == segment.principal,
            turns.c.kind == Kind.SUBAGENT.value,
            turns.c.session != segment.session,
            turns.c.trace_id.in_(list(traces)[:500]),
        )
    ).all()
    return sorted([*own, *theirs], key=lambda row: (row.started_at, row.id))


def _vanished(db: Connection, row: Row[Any], later: Sequence[Row[Any]]) -> bool:
    """Does the next thing that the human said stand in the same history without this?"""
    for other in later:
        if other.session != row.session or other.kind != Kind.MAIN.value or other.user_text in (None, row.user_text):
            continue
        if other.retry or other.history_known is not True or other.history_mark != row.history_mark:
            return False
        visible = user_texts(db, other.prompt_tip)
        earlier = [text for text in user_texts(db, row.prompt_tip)[:-1] if len(text) > _ECHO_CHARS]
        same_history = not earlier or any(holds(visible, text) for text in earlier)
        return same_history and not holds(visible, row.user_text)
    return False


def _results(db: Connection, row: Row[Any], turn: int) -> Iterator[Span]:
    """The tool results that are new in this request: those behind the last answer in it."""
    found: list[Message] = []
    tip = row.prompt_tip
    for _ in range(_TAIL):
        stored = db.execute(select(messages).where(messages.c.id == tip)).first() if tip else None
        if stored is None or stored.role == Role.ASSISTANT.value:
            break
        found.append(unpack_message(stored.role, stored.content))
        tip = stored.parent
    for message in reversed(found):
        for result in message.tool_results:
            if result.text.strip():
                yield Span(Source.TOOL, redact_text(result.text), turn, result.name or "", bool(result.is_error))


def _answer(row: Row[Any], turn: int, main: bool) -> Iterator[Span]:
    if row.assistant_text:
        source = Source.ASSISTANT if main else Source.TOOL
        yield Span(source, redact_text(row.assistant_text), turn, "" if main else "subagent")
    for call in row.tool_calls or ():
        yield Span(Source.ACTION if main else Source.TOOL, redact_text(call["arguments"]), turn, call["name"])


# --- own words and quotations -------------------------------------------------------------------

_FENCED = re.compile(r"(?:```|~~~).*?(?:```|~~~|\Z)", re.DOTALL)
_BLOCK = re.compile(r"(?:^[ \t]*[>|│].*(?:\n|\Z))+", re.MULTILINE)
# A quotation of some length; a short one ("the 'Save' button") is a way of speaking.
_QUOTES = re.compile(
    r"“[^”]{16,}(?:”|\Z)|„[^“”]{16,}(?:[“”]|\Z)|«[^»]{16,}(?:»|\Z)|「[^」]{6,}(?:」|\Z)|『[^』]{6,}(?:』|\Z)|“[^”]*[\u4e00-\u9fff]{6,}[^”]*(?:”|\Z)"
    r"|‘[^’]{20,}’|(?<!\w)\"[^\"]{16,}(?:\"|\Z)|(?<!\w)\"[^\"]*[\u4e00-\u9fff]{6,}[^\"]*(?:\"|\Z)|(?<!\w)'[^'\n]{20,}'(?!\w)"
    r"|`[^`\n]{40,}`|<(\w+)[^>]*>.*?(?:</\1>|\Z)|\[[^\]\n]{40,}\]\([^)\n]*\)",
    re.DOTALL,
)
_MAIL = re.compile(
    r"^(?:(?:From|To|Subject|Von|Betreff|De|Asunto|发件人|主题|收件人)\s*[:：]"
    r"|-{2,}\s*(?:Original Message|Forwarded message|Begin forwarded|原始邮件|转发)|Begin forwarded message|On [^\n]{5,80} wrote:)",
    re.MULTILINE | re.IGNORECASE,
)
_THING = (
    r"(?:e-?mails?|mails?|messages?|pages?|web ?sites?|sites?|articles?|posts?|comments?|issues?|tickets?|logs?|outputs?|files?|documents?|docs?"
    r"|readme|texts?|transcripts?|reviews?|snippets?|notes?|chats?|tweets?|pdfs?|invoices?|errors?|responses?|results?|search results?|blogs?|forums?"
    r"|tool|console|terminal|vendor|supplier|customer|client|colleague|bot|ad|banner|popup|readme\.md)"
)
_HANDED = (
    r"summari[sz]e|translate|proofread|explain|analy[sz]e|extract|read|look at|check|review|debug|what (?:does|is|do)|here(?:'s|’s| is| are)|this is"
    r"|i (?:just )?(?:got|received|found|copied|saw|see)|we (?:got|received)|pasted?|pasting|copied|forward(?:ed|ing)?|quot(?:e|ed|ing)|verbatim|as follows"
)
# Words that somebody else said: "summarise this page: …", "the mail says that …". Up to the end of the text where the
# colon ends its line, else of the line or sentence.
_INTRODUCED = re.compile(
    rf"\b(?:{_HANDED})\b[^\n:]{{0,60}}(?:\b{_THING}\b[^\n:]{{0,40}})?[:：](?P<a>[ \t]*\n.*)"
    rf"|\b(?:{_HANDED})\b[^\n:]{{0,60}}\b{_THING}\b[^\n:]{{0,40}}[:：](?P<b>[^\n]+)"
    rf"|\b{_THING}\b[^\n.!?:]{{0,30}} (?:says?|said|reads?|states?|wrote|writes|goes|contains?|tells?|told|claims?|asks?|asked|wants?)\b[:：]?(?P<c>[ \t]*\n.*|[^\n.!?]+(?:[.!?](?=\S)[^\n.!?]*)*)"
    r"|\b(?:it|he|she|they) (?:says?|said|reads?|states?|wrote|writes)\s*[:：](?P<d>[ \t]*\n.*|[^\n]+)"
    r"|(?:网页|页面|网站|邮件|信件|文件|文档|日志|评论|帖子|文章|消息|输出|结果|博客|聊天记录|工单|报告|弹窗|广告|客服|对方|供应商|他|她|他们|README|readme|issue)"
    r"[^\n。！？:：]{0,12}(?:写着|写道|写的是|说|声称|显示|提到|要求|内容如下|原文如下|如下)[^\n。！？:：]{0,6}(?:[:：](?P<e>[ \t]*\n.*|[^\n]+)|(?P<f>[^\n。！？]+))"
    r"|(?:以下|下面|如下)(?:是|的|这)?[^\n。！？:：]{0,16}(?:邮件|文件|文档|日志|网页|文章|评论|消息|输出|内容|原文|文本|聊天记录)[^\n。！？:：]{0,6}[:：](?P<g>[ \t]*\n.*|[^\n]+)"
    r"|(?:总结|概括|翻译|看看|分析|解释|阅读|检查)[^\n。！？:：]{0,12}(?:邮件|文件|文档|日志|网页|文章|评论|消息|输出|内容|原文|文本|聊天记录)[^\n。！？:：]{0,6}[:：](?P<h>[ \t]*\n.*|[^\n]+)",
    re.DOTALL | re.IGNORECASE,
)


def human_spans(text: str, turn: int, before: Sequence[Span], *, doubted: bool = False) -> list[Span]:
    """A human's message as spans: his own words and what he passed on, in order. `before`: what was said until then."""
    marked = bytearray(len(text))  # 1: passed on
    for pattern in (_FENCED, _BLOCK, _QUOTES):
        for match in pattern.finditer(text):
            marked[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    if mail := _MAIL.search(text):
        marked[mail.start() :] = b"\1" * (len(text) - mail.start())
    for match in _INTRODUCED.finditer(text):
        group = next(name for name in "abcdefgh" if match.group(name) is not None)
        start, end = match.span(group)
        marked[start:end] = b"\1" * (end - start)
    brought = [plain(span.text) for span in before if span.source is Source.TOOL]
    out: list[Span] = []
    own = Source.DOUBTED if doubted else Source.HUMAN
    for passed_on, piece in _runs(text, marked):
        if not piece.strip():
            continue
        if passed_on:
            out.append(Span(Source.QUOTED, piece.strip(), turn))
            continue
        for sentence in sentences(piece):
            needle = plain(sentence)
            echoed = len(needle) >= _ECHO_CHARS // (3 if _has_cjk(needle) else 1) and any(
                needle in text for text in brought
            )
            source = Source.QUOTED if echoed else own
            if out and out[-1].source is source:
                out[-1] = Span(source, out[-1].text + sentence, turn)
            else:
                out.append(Span(source, sentence, turn))
    return [Span(span.source, span.text.strip(), turn) for span in out if _WORDS.search(span.text)]


def _runs(text: str, marked: bytearray) -> Iterator[tuple[bool, str]]:
    start = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or marked[at] != marked[start]:
            yield bool(marked[start]), text[start:at]
            start = at


_SENTENCE = re.compile(r"[^\n.!?。！？]*(?:[.!?。！？]+(?:\s+|(?=[^\x00-\x7f])|\Z)|[.!?]|\n+|\Z)")


def sentences(text: str) -> list[str]:
    """`text` cut behind each sentence and line; joined they are `text` again."""
    return [piece for piece in _SENTENCE.findall(text) if piece]


_WORDS = re.compile(r"\w")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def _has_cjk(text: str) -> bool:
    return _CJK.search(text) is not None


def plain(text: str) -> str:
    """For comparing words: NFKC, no case, one space for any white space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
