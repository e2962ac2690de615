"""When is an assistant message of a request one of our own replies? A key that survives what clients do to a message.

Design: the key is a hash of the message's text and of its calls' names and arguments. Clients change the rest: they
invent or rewrite call ids (OpenClaw drops the ``_``), re-serialise arguments, send ``content: null`` for ``""``, cut a
text into blocks or move it before the calls, and leave reasoning out. Text is compared to the letter: a client that
edits it (OpenClaw glues an announcement's answer to the message before) has made another message.

Reasoning is no part of the key; the renderer compares it itself, because whether it may be missing depends on where the
message stands.

Limits: two replies of a session that differ in their reasoning only have the same key; the later one is found.
"""

from __future__ import annotations

import json
from hashlib import sha256

from metaclaw_core.errors import WireError
from metaclaw_core.model import Json, Message, Reasoning, Text, ToolCall
from metaclaw_core.wire.jsonio import canonical

FREE_FORM = "input"  # the one argument of a tool that takes free text (custom tools of the Responses API)


def reply_key(message: Message) -> str:
    """Equal for equal replies; hex."""
    pieces = [text_of(message), *(piece for call in message.tool_calls for piece in (call.name, _canonical(call)))]
    data = (piece.encode("utf-8", "surrogatepass") for piece in pieces)
    return sha256(b"".join(b"%d:%b" % (len(piece), piece) for piece in data)).hexdigest()


def text_of(message: Message) -> str:
    """What an assistant said, without joints: several blocks are one text that somebody cut."""
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def reasoning_of(message: Message) -> str:
    return "\n\n".join(part.text for part in message.parts if isinstance(part, Reasoning) and part.text).strip()


def arguments_of(call: ToolCall) -> dict[str, Json]:
    """The arguments as an object, as chat templates want them; free text is the argument `FREE_FORM`."""
    if call.extra.get("type") not in ("custom", "custom_tool_call"):
        try:
            value = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value
    return {FREE_FORM: call.arguments}


def _canonical(call: ToolCall) -> str:
    try:
        return canonical(arguments_of(call))
    except WireError:  # nested too deeply to be written again
        return call.arguments
