"""Codex, the command line client.

Design: it names itself in `originator` and the User-Agent, sends its session as a header and again as
`prompt_cache_key`, and gives the model its surroundings as user messages of its own, each of which begins with
a fixed tag or heading. Those messages are not the human's; the human's are never wrapped.

Limits: written from the client's public source, not from recordings of our own. Its review subagents share the
session and look like turns of it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from metaclaw_core.agents.base import Identity, Prior
from metaclaw_core.agents.generic import humans, turn
from metaclaw_core.model import Hints, Kind, Message, Request, Text

_PERSONAS = ("You are Codex", "You are a coding agent running in the Codex CLI", "You are GPT-5.1 running in the Codex CLI")
_NOTES = (
    "<environment_context>",
    "<user_instructions>",
    "# AGENTS.md instructions",
    "<permissions instructions>",
    "<turn_aborted>",
    "<skill>",
    "<user_shell_command>",
    "<subagent_notification>",
)
_COMPACTION = "You are performing a CONTEXT CHECKPOINT COMPACTION."
_SUMMARY = "Another language model started to solve this problem and produced a summary of its thinking process."
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Codex:
    name = "codex"

    def recognises(self, request: Request, hints: Hints) -> bool:
        return hints.client == "codex" or (request.system or "").startswith(_PERSONAS)

    def identify(self, request: Request, hints: Hints, prior: Prior | None = None) -> Identity:
        said = humans(request.messages, _words)
        identity = turn(self.name, request, hints, prior, said, hints.session_id or _session(request))
        if said and said[-1][1].startswith(_COMPACTION):
            return replace(identity, kind=Kind.COMPACTION, user_text=None, human_texts=())
        return identity


CODEX = Codex()


def _words(message: Message) -> str | None:
    texts = [p.text for p in message.parts if isinstance(p, Text)]
    own = "\n".join(text for text in texts if not text.lstrip().startswith(_NOTES))
    if (texts and not own) or own.startswith(_SUMMARY):
        return None
    return own


def _session(request: Request) -> str | None:
    key = request.extra.get("prompt_cache_key")
    return key if isinstance(key, str) and _ID.fullmatch(key) else None
