"""Text at the end of the system prompt, put in and taken out as bytes.

A body is never re-serialised: one piece is inserted and everything else stays as the client wrote it
(big integers, lone surrogates, white space, and the prefix a provider's cache knows). `slot_*` finds the
place and proves it (see ``splice_find`` for how, and for what stays unproven); whatever it can't prove
raises SpliceError and the body passes unchanged. If a body is valid JSON so is the result, and vice versa.

What is inserted ends with a seal, one line for us that a model reads as a comment:
    <!-- metaclaw:<text>-<lead>-<before>-<after>:<digest> -->
The four numbers are lengths in bytes as escaped; the digest covers the whole piece. So `remove` needs no
search and no knowledge of dialects: it looks at the slot's place only, and a quotation of a block anywhere
else, in the text itself included, is just text. The seal comes last: a text that grows keeps its beginning
byte for byte. It depends on nothing but the text and the slot. It is no signature; it tells our block
from the client's words, not from a forgery by the client, who could only harm its own prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache

from metaclaw_core.errors import SpliceError
from metaclaw_core.model import Json
from metaclaw_core.wire.base import Slot
from metaclaw_core.wire.splice_find import WHITESPACE, Body, Member, after, fields, members, skip

_TEXT_BLOCK = b'{"type":"text","text":"', b'"}'
_INPUT_TEXT_BLOCK = b'{"type":"input_text","text":"', b'"}'
_PART = b'{"text":"', b'"}'
_LEADING_ROLES = ("system", "developer")
_MESSAGE_BLOCKS = {
    "openai_chat": _TEXT_BLOCK,
    "openai_responses": _INPUT_TEXT_BLOCK,
    "anthropic": _TEXT_BLOCK,
    "ollama": None,
}

_SEAL = re.compile(rb"\\n<!-- metaclaw:(\d{1,9})-(\d{1,3})-(\d{1,3})-(\d{1,3}):([0-9a-f]{16}) -->\Z")
_SEAL_ROOM = 80  # bytes; the longest seal has 58


# --- the block ----------------------------------------------------------------------------------


def render_block(inner: str) -> str:
    """The Markdown between the tags a model sees. `inner` that grows at its end keeps the beginning of the block."""
    return f"<metaclaw-skills>\n{inner}\n</metaclaw-skills>"


def insert(body: bytes, slot: Slot, text: str) -> bytes:
    """`body` with `text` and its seal at the slot's place. The same text and slot always give the same piece."""
    whole = memoryview(body)
    return b"".join((whole[: slot.at], _piece(slot.before, slot.lead, text, slot.after), whole[slot.at :]))


@lru_cache(maxsize=64)  # a session gets the same piece in each request
def _piece(before: bytes, lead_text: str, text: str, after_text: bytes) -> bytes:
    lead, inner = _escape(lead_text), _escape(text)
    numbers = b"%d-%d-%d-%d" % (len(inner), len(lead), len(before), len(after_text))
    seal = b"\\n<!-- metaclaw:%s:%s -->" % (numbers, _digest(before, lead, inner, after_text))
    return b"".join((before, lead, inner, seal, after_text))


def has_block(body: bytes, slot: Slot) -> bool:
    """Does a sealed block end at the slot's place? The digest is not checked: a block that somebody edited counts."""
    end = _text_end(body, slot)
    return end is not None and _SEAL.search(body, max(0, end - _SEAL_ROOM), end) is not None


def remove(body: bytes, slot: Slot) -> tuple[bytes, str] | None:
    """The body as it was before `insert`, and the text; None unless a whole block of ours ends at `slot`.

    `slot` is that of the injected `body`. A block that stands on another one leaves that one in place.
    """
    end = _text_end(body, slot)
    seal = None if end is None else _SEAL.search(body, max(0, end - _SEAL_ROOM), end)
    if end is None or seal is None:
        return None
    text_len, lead_len, before_len, after_len = (int(number) for number in seal.groups()[:4])
    text_at = seal.start() - text_len
    start = text_at - lead_len - before_len
    if start < 1:
        return None
    before, lead = body[start : start + before_len], body[text_at - lead_len : text_at]
    inner, tail = body[text_at : seal.start()], body[end : end + after_len]
    if _digest(before, lead, inner, tail) != seal[5] or not _stands_alone(body, start, before, lead):
        return None
    try:
        text = json.loads(b'"%s"' % inner)
    except ValueError:
        return None
    if _escape(text) != inner:
        return None
    whole = memoryview(body)
    return b"".join((whole[:start], whole[end + after_len :])), text


def _text_end(body: bytes, slot: Slot) -> int | None:
    """Where the text ends that a block at this slot would be the end of; None if nothing stands there."""
    if slot.form == "string":
        return slot.at
    if slot.form == "item" and body.endswith(slot.after, 0, slot.at):
        return slot.at - len(slot.after)
    return None


def _stands_alone(body: bytes, start: int, before: bytes, lead: bytes) -> bool:
    """Would `insert` have begun a piece here? In a string it must not split an escape; without a lead the string was empty."""
    if before:
        return True
    if not lead:
        return body.endswith(b'"', 0, start)
    at = start
    while body.endswith(b"\\", 0, at):
        at -= 1
    return (start - at) % 2 == 0


def _escape(text: str) -> bytes:
    """ASCII, so that a lone surrogate survives and the bytes fit a body of any encoding that JSON allows."""
    return json.dumps(text)[1:-1].encode("ascii")


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16].encode("ascii")


# --- the five places ----------------------------------------------------------------------------


def slot_openai_chat(body: bytes) -> Slot:
    """The last of the leading system and developer messages; without one, a new first message."""
    return _chat_slot(body, lists=True)


def slot_ollama(body: bytes) -> Slot:
    """As chat completions, but content is always a string."""
    return _chat_slot(body, lists=False)


def slot_openai_responses(body: bytes) -> Slot:
    """`instructions` where it is a string, else the leading messages of `input`, else a new `instructions`.

    `instructions: null` without a leading message is refused: a second key beside it would be a duplicate.
    """
    doc = Body(body)
    instructions = doc.find("instructions")
    if instructions is not None:
        value, end = doc.value(instructions)
        if isinstance(value, str):
            return _in_string(value, end)
        if value is not None:
            raise SpliceError("instructions is neither a string nor null")
    start = doc.find("input")
    if start is None:
        raise SpliceError("the body has no input")
    if doc.text.startswith("[", start):
        message = _last_leading(doc.text, start, typed=True)
        if message is not None:
            return _in_content(doc.text, message, _INPUT_TEXT_BLOCK)
    elif not doc.text.startswith('"', start):
        raise SpliceError("input is neither a string nor a list")
    if instructions is not None:
        raise SpliceError("instructions is null and input has no system message")
    return _new_key(doc, b'"instructions":"', b'",')


def slot_anthropic(body: bytes) -> Slot:
    """The end of a string, a block behind the last one (never with cache_control), or a new `system`."""
    doc = Body(body)
    start = doc.find("system")
    if start is None:
        messages = doc.find("messages")
        if messages is None or not doc.text.startswith("[", messages):
            raise SpliceError("the body has no list of messages")
        return _new_key(doc, b'"system":"', b'",')
    value, end = doc.value(start)
    if isinstance(value, str):
        return _in_string(value, end)
    if isinstance(value, list):
        return _in_list(doc.text, value, end, _TEXT_BLOCK)
    raise SpliceError("system is neither a string nor a list")


def slot_gemini(body: bytes) -> Slot:
    """A part behind the last one; in a single part that is no list, or a bare string, the end of the text."""
    doc = Body(body)
    camel, snake = doc.find("systemInstruction"), doc.find("system_instruction")
    if camel is not None and snake is not None:
        raise SpliceError("systemInstruction and system_instruction are both there")
    start = snake if camel is None else camel
    if start is None:
        contents = doc.find("contents")
        if contents is None or not doc.text.startswith(("[", "{"), contents):
            raise SpliceError("the body has no contents")
        return _new_key(doc, b'"systemInstruction":{"parts":[{"text":"', b'"}]},')
    if doc.text.startswith('"', start):
        return _in_string(*doc.value(start))
    parts = fields(doc.text, start).get("parts") if doc.text.startswith("{", start) else None
    if parts is None:
        raise SpliceError("the system instruction has no parts")
    if isinstance(parts.value, list):
        return _in_list(doc.text, parts.value, parts.end, _PART)
    text = fields(doc.text, parts.start).get("text") if isinstance(parts.value, dict) else None
    if text is None or not isinstance(text.value, str):
        raise SpliceError("the system instruction's parts hold no text")
    return _in_string(text.value, text.end)


def slot_message(dialect: str, message: bytes) -> Slot:
    """The end of the text of one message of a user, given alone; so the place is one in `message`.

    Raises SpliceError where it has no text that text can be added to, and for a dialect that isn't known here.
    """
    text = message.decode("latin-1")
    found = fields(text, 0)
    if dialect == "gemini":
        parts = found.get("parts")
        if parts is not None and isinstance(parts.value, list):
            return _in_list(text, parts.value, parts.end, _PART)
        raise SpliceError("the message has no list of parts")
    if dialect not in _MESSAGE_BLOCKS:
        raise SpliceError(f"messages of {dialect} are not known here")
    return _in_content(text, found, _MESSAGE_BLOCKS[dialect])


def _chat_slot(body: bytes, *, lists: bool) -> Slot:
    doc = Body(body)
    start = doc.find("messages")
    if start is None or not doc.text.startswith("[", start):
        raise SpliceError("the body has no list of messages")
    message = _last_leading(doc.text, start, typed=False)
    if message is None:
        return Slot(start + 1, b'{"role":"system","content":"', b'"},', "", "new")
    return _in_content(doc.text, message, _TEXT_BLOCK if lists else None)


def _last_leading(text: str, start: int, *, typed: bool) -> dict[str, Member] | None:
    """The last of the system and developer messages that the list at `start` begins with.

    `typed`: the items of Responses, which may be other things than messages and needn't have a role.
    """
    at = skip(text, start + 1)
    if text.startswith("]", at) and not typed:
        raise SpliceError("the list of messages is empty")
    last, more = None, not text.startswith("]", at)
    while more:
        if not text.startswith("{", at):
            raise SpliceError("a message is not an object")
        message = _leading_message(text, at, typed=typed)
        if message is None:
            break
        last, close = message
        more, at = after(text, close, "]")
    return last


def _leading_message(text: str, at: int, *, typed: bool) -> tuple[dict[str, Member], int] | None:
    """The message at `at` and the place behind it; None as soon as it shows that it isn't a leading one."""
    found: dict[str, Member] = {}
    twice = close = None
    for member in members(text, skip(text, at + 1)):
        close = member.close
        if member.name in found:
            twice = member.name  # no matter if the message turns out not to be a leading one
            continue
        if member.name == "role" and member.value not in _LEADING_ROLES:
            return None
        if typed and member.name == "type" and member.value != "message":
            return None
        found[member.name] = member
    if twice is not None:
        raise SpliceError(f"the key {twice!r} comes twice in a message")
    if "role" in found and close is not None:
        return found, close
    if typed:
        return None
    raise SpliceError("a message has no role")


def _in_content(text: str, message: dict[str, Member], block: tuple[bytes, bytes] | None) -> Slot:
    content = message.get("content")
    if content is not None and isinstance(content.value, str):
        return _in_string(content.value, content.end)
    if content is not None and block is not None and isinstance(content.value, list):
        return _in_list(text, content.value, content.end, block)
    raise SpliceError("the message has no content that text can be added to")


def _in_string(value: str, end: int) -> Slot:
    return Slot(end - 1, b"", b"", "\n\n" if value else "", "string")


def _in_list(text: str, items: list[Json], end: int, block: tuple[bytes, bytes]) -> Slot:
    """Behind the last item of the list that ends at `end`, before the white space that may follow it."""
    if not all(isinstance(item, dict) for item in items):
        raise SpliceError("an item of the content is not an object")
    before, close = block
    at = end - 1
    while text[at - 1] in WHITESPACE:
        at -= 1
    return Slot(at, b"," + before if items else before, close, "", "item")


def _new_key(doc: Body, before: bytes, close: bytes) -> Slot:
    """A first member; the body has at least one, so the comma in `close` is right."""
    return Slot(doc.inside, before, close, "", "new")
