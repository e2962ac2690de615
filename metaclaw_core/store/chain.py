"""Messages as a hash-linked chain: what is stored of a message, and what makes two of them the same.

Design: ``id = "v1:" + place + "-" + sha256(parent's hash, role, canonical content)``, so one id stands for a whole
conversation, equal prefixes share rows, and a session is recognised by its prefix. The place is handed down from the
first message that isn't the system's (it is the beginning of that one's hash; the system's are at zeros): it keeps a
conversation's ids next to each other in every index, and what a request adds to a large store touches a few pages there, not
one for each id. It takes no part in the hash. Ids that were made before there were places have none, and what follows them
has none either; the hash in them is the same.

The canonical content is what a client must send back unchanged for the conversation to be the same one:

- text, with neighbouring text parts joined by a newline and empty ones dropped, so that a string and a
  list of blocks are equal, and so are `content: null` and `""`;
- name and arguments of tool calls, the arguments as parsed JSON with sorted keys (the raw string where
  they aren't JSON), and the text and error flag of tool results;
- uninterpreted parts, without `cache_control`.

Not part of it: call ids (clients rewrite or invent them), cache marks, unknown fields, and reasoning.
Clients drop reasoning from the history, some at every turn, others only in later ones; with it in the
hash each drop would fork the conversation. The stored content keeps all of these as its first writer
had them. An answer that shares its id with an earlier, different one (same prompt, same text, other
reasoning) is kept in full on its turn.

Limits: a client that edits the text of an answer (trimming, joining) starts a fork; forks share all
rows before them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256

from metaclaw_core.model import Json, Message, Opaque, Part, Reasoning, Role, Text, ToolCall, ToolResult
from metaclaw_core.redact import redact_text
from metaclaw_core.wire.jsonio import canonical

PREFIX = "v1:"
_LEADING = "00000000"  # place of the system's messages: conversations share them
_END = len(PREFIX) + len(_LEADING)  # where "-" stands in an id that has a place


def message_id(parent: str | None, message: Message) -> str:
    """The id of `message` behind `parent`; None: it is the first."""
    return linked_id(parent, message.role, canonical_pieces(message))


def linked_id(parent: str | None, role: Role, canonical_content: Iterable[bytes]) -> str:
    """The same, of a message's `canonical_pieces`. All pieces are joined with their lengths in front, so that no two lists of
    pieces give the same bytes."""
    before = "" if parent is None else unplaced(parent)
    pieces = (before.encode(), role.value.encode(), *canonical_content)
    digest = sha256(b"".join([b"%d:%b" % (len(piece), piece) for piece in pieces])).hexdigest()
    if parent is not None and not _placed(parent):
        return PREFIX + digest
    place = _LEADING if parent is None else parent[len(PREFIX) : _END]
    if place == _LEADING and role not in (Role.SYSTEM, Role.DEVELOPER):
        place = digest[: len(_LEADING)]
    return f"{PREFIX}{place}-{digest}"


def rederived(stored: str, parent: str | None, message: Message) -> str:
    """What `stored`, the id of a message that is in the database, should be; without a place where it has none."""
    derived = message_id(parent, message)
    return derived if _placed(stored) else unplaced(derived)


def unplaced(message_id: str) -> str:
    """The id as it was made before there were places."""
    return PREFIX + message_id[_END + 1 :] if _placed(message_id) else message_id


def _placed(message_id: str) -> bool:
    return message_id[_END : _END + 1] == "-"


def chain_ids(messages: Iterable[Message], parent: str | None = None) -> list[str]:
    """The id of each message when they follow each other after `parent`."""
    ids: list[str] = []
    for message in messages:
        parent = message_id(parent, message)
        ids.append(parent)
    return ids


def canonical_pieces(message: Message) -> list[bytes]:
    """What takes part in the hash: each kind of part as its tag and a fixed number of values."""
    out: list[bytes] = []
    text: list[str] = []
    for part in message.parts:
        if isinstance(part, Text):
            if part.text:
                text.append(part.text)
            continue
        if isinstance(part, Reasoning):
            continue
        if text:
            out += [b"text", _bytes("\n".join(text))]
            text = []
        match part:
            case ToolCall():
                out += [b"call", _bytes(part.name), _arguments(part.arguments)]
            case ToolResult():
                out += [b"result", _bytes(part.text), b"error" if part.is_error else b""]
            case Opaque():
                out += [b"opaque", _bytes(part.type), canonical(_without_cache_control(part.raw)).encode()]
    if text:
        out += [b"text", _bytes("\n".join(text))]
    return out


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # lone surrogates are text, too


def _arguments(raw: str) -> bytes:
    return _small_arguments(raw) if len(raw) < 4096 else _parsed_arguments(raw)


def _parsed_arguments(raw: str) -> bytes:
    try:
        return b"json " + canonical(json.loads(raw)).encode()
    except (ValueError, RecursionError):
        return b"raw " + _bytes(raw)


_small_arguments = lru_cache(maxsize=4096)(_parsed_arguments)  # a history is hashed again at every request


def _without_cache_control(raw: Json) -> Json:
    return {k: v for k, v in raw.items() if k != "cache_control"} if isinstance(raw, dict) else raw


def blob_id(value: Json) -> str:
    """The id of content that stands outside the chain (tools, extra fields, injected text)."""
    return sha256(canonical(value).encode()).hexdigest()


# --- what is stored ---------------------------------------------------------------------------


def pack_message(message: Message) -> Json:
    """All of a message but its role, as JSON; empty fields are left out."""
    parts: list[Json] = []
    for part in message.parts:
        match part:
            case Text():
                parts.append(_lean(t="text", text=part.text, extra=dict(part.extra) or None))
            case Reasoning():
                parts.append(_lean(t="reasoning", text=part.text, opaque=part.opaque))
            case ToolCall():
                parts.append(
                    _lean(
                        t="call", name=part.name, arguments=part.arguments, id=part.id, extra=dict(part.extra) or None
                    )
                )
            case ToolResult():
                parts.append(
                    _lean(
                        t="result",
                        text=part.text,
                        call_id=part.call_id,
                        name=part.name,
                        is_error=part.is_error,
                        extra=dict(part.extra) or None,
                    )
                )
            case Opaque():
                parts.append({"t": "opaque", "type": part.type, "raw": part.raw})
    return _lean(parts=parts, extra=dict(message.extra) or None)


def _lean(**fields: Json) -> dict[str, Json]:
    return {k: v for k, v in fields.items() if v is not None}


def unpack_message(role: str, content: Json) -> Message:
    """The reverse of `pack_message`. Raises KeyError or TypeError for what it never wrote."""
    return Message(Role(role), tuple(map(_part, content["parts"])), content.get("extra", {}))


def _part(stored: dict[str, Json]) -> Part:
    fields = {k: v for k, v in stored.items() if k != "t"}
    return _PARTS[stored["t"]](**fields)


_PARTS: dict[str, type[Text] | type[Reasoning] | type[ToolCall] | type[ToolResult] | type[Opaque]] = {
    "text": Text,
    "reasoning": Reasoning,
    "call": ToolCall,
    "result": ToolResult,
    "opaque": Opaque,
}


def redact_message(message: Message) -> Message:
    """Secrets that a stream had split over two events, replaced in the assembled texts."""
    parts: list[Part] = []
    for part in message.parts:
        match part:
            case Text() | Reasoning() | ToolResult():
                parts.append(replace(part, text=redact_text(part.text)))
            case ToolCall():
                parts.append(replace(part, arguments=redact_text(part.arguments)))
            case Opaque():
                parts.append(part)
    return replace(message, parts=tuple(parts))
