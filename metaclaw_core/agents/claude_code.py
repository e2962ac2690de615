"""Claude Code, from the command line or through its agent SDK.

Design: it names itself in the User-Agent and in the first line of its system prompt, and its session in
`metadata.user_id`, in one of two forms. Its own notes travel in tagged blocks inside the human's message;
a block is cut only where its tags open at the start of a line. A message of nothing but blocks is not a human's.

Limits: written from what is publicly known of the client, not from recordings of our own. The arguments of a
slash command are part of its block and are cut with it. A subagent shares its parent's session id and is known
by its own system prompt only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

from metaclaw_core.agents.base import Identity, Prior
from metaclaw_core.agents.generic import humans, turn
from metaclaw_core.model import Hints, Kind, Message, Request, Role, Text

_BILLING = "x-anthropic-billing-header:"
_IDENTITIES = (
    "You are Claude Code, Anthropic's official CLI for Claude",
    "You are a Claude agent, built on Anthropic's Claude Agent SDK.",
)
_SUBAGENT = "You are an agent for Claude Code, Anthropic's official CLI for Claude"
_SUMMARISER = "You are a helpful AI assistant tasked with summarizing conversations."
_SUMMARISE = "Your task is to create a detailed summary of the conversation so far"
_CONTINUED = "This session is being continued from a previous conversation that ran out of context."
_INTERRUPTED = "[Request interrupted by user"

_USER_ID = re.compile(r"_session_([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\Z")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BLOCK = re.compile(
    r"^<(system-reminder|command-[a-z-]+|local-command-[a-z-]+)>.*?</\1>[ \t]*\n?", re.DOTALL | re.MULTILINE
)
_ASKS_FOR_TITLE = re.compile(r"\b(?:generate|write|extract|create|summari[sz]e|analy[sz]e)\b[^.]{0,160}\b(?:title|topic)\b", re.IGNORECASE)


class ClaudeCode:
    name = "claude_code"

    def recognises(self, request: Request, hints: Hints) -> bool:
        return hints.client == "claude-code" or any(
            text.startswith((*_IDENTITIES, _SUBAGENT)) for text in _system_texts(request)
        )

    def identify(self, request: Request, hints: Hints, prior: Prior | None = None) -> Identity:
        said = humans(request.messages, _words)
        session_id = hints.session_id or _session(request)
        identity = turn(self.name, request, hints, prior, said, session_id)
        side = _side_call(request, said)
        if side is Kind.SUBAGENT:
            return replace(identity, kind=side, user_text=said[0][1] if said else None, human_texts=())
        if side is not None:
            return replace(identity, kind=side, user_text=None, human_texts=())
        return identity


CLAUDE_CODE = ClaudeCode()


def _system_texts(request: Request) -> Iterator[str]:
    """The blocks of the system prompt without the billing line that some releases put first."""
    for message in request.messages:
        if message.role not in (Role.SYSTEM, Role.DEVELOPER):
            return
        for part in message.parts:
            if isinstance(part, Text) and not part.text.startswith(_BILLING):
                yield part.text


def _words(message: Message) -> str | None:
    texts = [p.text for p in message.parts if isinstance(p, Text)]
    own = "\n".join(cut for text in texts if (cut := _BLOCK.sub("", text).strip()))
    if (texts and not own) or own.startswith((_CONTINUED, _INTERRUPTED)):
        return None
    return own


def _session(request: Request) -> str | None:
    user_id = request.metadata.get("user_id")
    if not isinstance(user_id, str):
        return None
    if found := _USER_ID.search(user_id):
        return found[1]
    try:
        fields = json.loads(user_id)
    except ValueError:
        return None  # some other client's opaque user id
    named = fields.get("session_id") if isinstance(fields, dict) else None
    return named if isinstance(named, str) and _UUID.fullmatch(named) else None


def _side_call(request: Request, said: list[tuple[int, str]]) -> Kind | None:
    texts = tuple(_system_texts(request))
    last = said[-1][1] if said else ""
    if any(t.startswith(_SUMMARISER) for t in texts) or last.startswith(_SUMMARISE):
        return Kind.COMPACTION
    if any(t.startswith(_SUBAGENT) for t in texts):
        return Kind.SUBAGENT
    if request.tools:
        return None
    if last == "quota" or any(_ASKS_FOR_TITLE.search(t) for t in texts):
        return Kind.TITLE
    return None
