"""Any client we know nothing of, and what the modules for known clients share.

Design: what every dialect shows is enough for a turn: the last user message opened it, and a tool result after
it makes the request a continuation. There is no session in it: the caller stitches requests together by their
longest common prefix. A short call without tools and history is still MAIN: with an unknown client nothing tells
a title from a question, and wrongly calling a question a side call would lose it.

Limits: a client that hides its own notes in user messages has them taken for the human's words.
"""

from __future__ import annotations

from collections.abc import Callable

from metaclaw_core.agents.base import Identity, Prior
from metaclaw_core.model import Hints, Kind, Message, Request, Role


def humans(messages: tuple[Message, ...], words: Callable[[Message], str | None]) -> list[tuple[int, str]]:
    """(index, words) of each user message in which a human speaks; `words` answers None where none does."""
    found = ((i, words(m)) for i, m in enumerate(messages) if m.role is Role.USER)
    return [(i, text) for i, text in found if text is not None]


def turn(
    agent: str,
    request: Request,
    hints: Hints,
    prior: Prior | None,
    said: list[tuple[int, str]],
    session_id: str | None = None,
) -> Identity:
    """MAIN or TOOL by what follows the last human message; without one, what the continued response belongs to."""
    user_text: str | None
    places: tuple[int, ...] = ()
    if said:
        opening, user_text = said[-1]
        tail = request.messages[opening + 1 :]
        texts, places = tuple(text for _, text in said), tuple(at for at, _ in said)
        kind = Kind.TOOL if any(m.role is Role.TOOL for m in tail) else Kind.MAIN
    elif prior is not None:
        user_text = prior.user_text
        texts = (user_text,) if user_text is not None else ()
        works = any(m.role is Role.TOOL for m in request.messages)
        kind = Kind.TOOL if prior.kind is Kind.MAIN and works else prior.kind
    else:
        return Identity(agent, Kind.UNKNOWN, session_id, None, None, (), False, hints.trace_id)
    return Identity(
        agent,
        kind,
        session_id or (prior.session_id if prior else None),
        prior.session_key if prior else None,
        user_text,
        texts,
        False,
        hints.trace_id,
        human_at=places,
    )


class Generic:
    name = "generic"

    def recognises(self, request: Request, hints: Hints) -> bool:
        return True

    def identify(self, request: Request, hints: Hints, prior: Prior | None = None) -> Identity:
        return turn(self.name, request, hints, prior, humans(request.messages, lambda message: message.text))


GENERIC = Generic()
