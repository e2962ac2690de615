"""What OpenClaw wraps around a human's words, and how to get the words back.

Design: the wrappers are peeled from the start of the text in a loop, one known shape at a time, until
nothing known is left. Every rule is anchored (start, end or a whole line) and demands something only
the client writes: its marker, a fixed sentence, or a header that ends in a time with a zone. So "[ ] buy milk",
"[link](url)", "[WIP] fix this" and a pasted log line stay the human's. A date stamp is peeled once and
rules a channel header out: OpenClaw never stamps a text that begins with one.

What is peeled without being known (a header of a channel we have not met, a "… (untrusted …):" block
with another label) is counted, so that a new version of the client is noticed.

Seen on the wire: date stamp, sender block, media note and description, chat history, retry wording.
Read in the client's code only: reply quote, delivery hint, goal line, channel header, queued messages,
transcripts, old labels. Limits: after a failed turn whose text was kept for context, a *new* message can't be
told from the kept one (they are joined by a blank line): both are returned, as one text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"
MARK = "⟦openclaw:ctx⟧"  # ends each header line of the client's own blocks
QUEUED = (
    "[Queued user message from a previous active turn; preserved as context only."
    " Continue with the active prompt below.]\n"
)
MAX_WRAPPERS = 100  # a text that pretends to have more is left as it is
CONTINUE = "Continue the current task from the existing transcript, preserving completed work."

RUNTIME = re.compile(r"Runtime: agent=\S+ \| session=(\S+)(?: \| sessionId=(\S+))?(?: \| .*)?")  # a whole line
_STAMP = re.compile(r"\[(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) \d{4}-\d\d-\d\d \d\d:\d\d [^\]\n]+\] ?")

_CONTEXT = f"Context: {MARK}\n"  # all that follows is the channel's
_OLD_LABELS = (
    "Conversation info|Sender|Forwarded message context|Location|Structured object|Chat history since last reply"
    "|Thread starter|Reply target of current user message|Reply chain of current user message|Replied message"
)
_MARKED = re.compile(rf"[^\n]+ {MARK}[ \t]*\n")
_OLD = re.compile(rf"(?:{_OLD_LABELS}) \(untrusted[^)\n]*\):[ \t]*\n")
_UNTRUSTED = re.compile(r"[^\n]{1,120} \([Uu]ntrusted[^)\n]*\):[ \t]*\n(?=```json\n)")
_FENCE = re.compile(r"```json\n.*?\n```[ \t]*(?:\n+|\Z)", re.DOTALL)
_PARAGRAPH = re.compile(r".*?(?:\n\s*\n|\Z)", re.DOTALL)
_MEMORY = re.compile(r"Context:[ \t]*\n<active_memory_plugin>\n.*?\n</active_memory_plugin>\s*", re.DOTALL)

_LINES = re.compile(  # whole lines that the client puts in front
    r"(?:(?:"
    r"Delivery: (?:Final assistant text is not automatically delivered|to send a message, use the `message` tool\.|"
    r"No visible reply is delivered automatically)[^\n]*"
    r"|Active goal: [^\n]* — advance; keep active until fully achieved;[^\n]*"
    r"|\[media attached(?: \d+/\d+)?: [^\]\n]*\]"
    r"|\[media attached: \d+ files\]"
    r")(?:\n+|\Z))+"
)
_REPLYING = re.compile(r'Current message:\n\[Replying to: "(?:[^"\\\n]|\\.)*"\](?:\n#\S+:)?\s*')
_HISTORY = re.compile(
    r"\[(?:Chat messages since your last reply|Recent chat messages) - for context\]\n"
    r"(?:.*\n)?\[Current message - respond to this\]\n(?:User: )?",
    re.DOTALL,
)
_BATCH = re.compile(r"\[Queued messages while agent was busy\]\n+(?=---\nQueued #1\b)")
_BATCH_ITEM = re.compile(r"(?:\A|\n)---\nQueued #\d+(?: \(from [^\n]*\))?\n")
_MEDIA_ONE = re.compile(
    r"\[(?:Image|Video|Audio)\]\n(?:User text:\n(?P<user>.*?)\n)?(?P<label>Description|Transcript):\n(?P<out>.*)\Z", re.DOTALL
)
_MEDIA_MANY = re.compile(r"(?:User text:\n(?P<user>.*?)\n\n)?(?P<rest>\[(?:Image|Video|Audio)(?: \d+/\d+)?\]\n.*)\Z", re.DOTALL)
_MEDIA_SECTION = re.compile(
    r"\[(?:Image|Video|Audio)(?: \d+/\d+)?\]\n(?P<label>Description|Transcript):\n(?P<out>.*?)(?=\n\n\[(?:Image|Video|Audio)|\Z)",
    re.DOTALL,
)
_NO_WORDS = "[User sent media without caption]"

_CHANNELS = (
    "Telegram|WhatsApp|Discord|Slack|Signal|iMessage|BlueBubbles|Matrix|Mattermost|Teams|Google Chat|IRC|LINE|Nostr"
    "|Nextcloud Talk|Synology Chat|Twitch|Tlon|Zalo|Feishu|WebChat|SMS|Email|Channel"
)
# "[Telegram Ada id:42 +2m Wed 2026-11-25 07:24 UTC] ": words, then a time that ends in a zone, then the bracket.
_HEADER = re.compile(
    r"\[(?P<head>[A-Za-z][^\[\]\n]*?) (?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) )?\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)? "
    r"(?P<zone>[A-Z]{2,5}(?:[+-]\d{1,2}(?::\d\d)?)?|[+-]\d\d:?\d\d)\] "
)
_LOG_LEVEL = re.compile(r"(?:ERROR|WARN|WARNING|INFO|DEBUG|TRACE|FATAL|NOTICE|CRITICAL)\b", re.IGNORECASE)
_SPEAKER = re.compile(r"(?P<name>[^:\n]{1,80}): ")


@dataclass(frozen=True, slots=True)
class Spoken:
    """One user message without its wrapping."""

    text: str  # the words; "" for a picture without a caption and for a bare retry notice
    stamped: bool  # it carried the date stamp
    retry: bool  # it carried the wording of a repeated attempt
    unknown: int = 0  # wrappers dropped without being known


def split_runtime(text: str) -> tuple[str, re.Match[str] | None]:
    """(the text without the session line at its end, the line); the line is a paragraph of its own or it is none."""
    before, _, last = text.rstrip().rpartition("\n")
    if (not before or before.endswith("\n")) and (found := RUNTIME.fullmatch(last)):
        return before.removesuffix("\n"), found
    return text, None


def unwrap(text: str) -> Spoken:
    """The words in `text`, a user message that is neither a carrier nor a summary."""
    stamped = retry = False
    unknown = 0
    may_have_header = True  # no stamp was peeled since the last place where a header may stand
    text = text.strip("\n")
    for _ in range(MAX_WRAPPERS):
        before = text
        if (match := _STAMP.match(text)) and may_have_header:
            stamped, may_have_header = True, False
            text = text[match.end() :]
        if text.startswith(QUEUED):
            text = text.removeprefix(QUEUED)
            may_have_header = True
        if (at := text.rfind(CONTINUE)) >= 0 and "\n" not in text[at:] and text[:at][-2:] in ("", "\n\n"):
            retry = True
            text = text[:at].removesuffix("\n\n")
        if (at := text.find(_CONTEXT)) >= 0 and text[:at][-1:] in ("", "\n"):
            text = text[:at].rstrip("\n")
        for rule in (_MEMORY, _LINES, _REPLYING, _HISTORY):
            if match := rule.match(text):
                text = text[match.end() :]
        if match := (MARK in text and _MARKED.match(text)) or _OLD.match(text):
            text = _after_block(text, match.end())
        elif match := _UNTRUSTED.match(text):
            unknown += 1
            text = _after_block(text, match.end())
        elif may_have_header and (match := _HEADER.match(text)) and not _LOG_LEVEL.match(match["head"]):
            may_have_header = False
            if not re.match(rf"(?:{_CHANNELS})\b", match["head"]):
                unknown += 1
            text = _without_speaker(text[match.end() :], match["head"])
        if text == before:
            break
    if match := _BATCH.match(text):
        items = [unwrap(item) for item in _BATCH_ITEM.split(text[match.end() :]) if item.strip()]
        text = "\n\n".join(item.text for item in items if item.text)
        unknown += sum(item.unknown for item in items)
    return Spoken(_words(text).strip(), stamped, retry, unknown)


def _after_block(text: str, start: int) -> str:
    """What follows the block whose header ends at `start`: fenced JSON, or lines up to a blank one."""
    match = _FENCE.match(text, start) or _PARAGRAPH.match(text, start)
    return text[match.end() :].lstrip("\n") if match else text[start:]


def _without_speaker(text: str, head: str) -> str:
    """A channel header is followed by "name: " where the name is in the header or, in groups, ends in an id."""
    match = _SPEAKER.match(text)
    if match and (match["name"] in head or match["name"] in ("(self)", "(sender)") or re.search(r" \([^()]+\)$", match["name"])):
        return text[match.end() :]
    return text


def _words(text: str) -> str:
    """The human's part of a message about media: the caption, and what was said in a voice message."""
    if text.strip() == _NO_WORDS:
        return ""
    if match := _MEDIA_ONE.match(text):
        said = [match["user"], match["out"] if match["label"] == "Transcript" else None]
    elif match := _MEDIA_MANY.match(text):
        sections = list(_MEDIA_SECTION.finditer(match["rest"]))
        if not sections:
            return text
        said = [match["user"], *(m["out"] for m in sections if m["label"] == "Transcript")]
    else:
        return text
    return "\n".join(part for part in said if part)
