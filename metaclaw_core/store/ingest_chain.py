"""Where the messages of a request stand, and what the turn they belong to is called.

Design: see ``store.chain`` for what an id is. A request that continues a provider-side conversation
(`previous_response_id`) is appended to the answer it names; where it brings other instructions than
that one had, the history is chained anew under them, since that is what the model saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from typing import Any

from sqlalchemy import Row

from metaclaw_core.agents.base import Identity
from metaclaw_core.model import Message, Request, Role
from metaclaw_core.store.chain import chain_ids
from metaclaw_core.store.reading import Reading


@dataclass(frozen=True, slots=True)
class Chain:
    """Where a request's messages are: `ids[i]` belongs to `messages[i]`; they follow `parent`."""

    parent: str | None
    messages: tuple[Message, ...]
    ids: Sequence[str]
    system_tip: str | None
    history_known: bool
    shared: int = 0  # how many of `ids` a request before had, and so the database, as a rule

    @property
    def tip(self) -> str | None:
        return self.ids[-1] if self.ids else self.parent


def chain_of(
    reading: Reading, request: Request, prior: Row[Any] | None, load: Callable[[str], tuple[Message, ...]]
) -> Chain:
    """After the answer that `request` continues, else from the root. `prior`: the turn of that answer; `load`: the
    conversation that ends with an id."""
    sent = request.messages
    leading = _leading(sent)
    system_tip = reading.ids[leading - 1] if leading else None
    if prior is None or prior.response_tip is None:
        known = request.previous_response_id is None and "conversation" not in request.extra
        return Chain(None, sent, reading.ids, system_tip, known, reading.shared)
    known = prior.history_known is True
    if not leading or system_tip == prior.system_tip:
        new = sent[leading:]
        return Chain(prior.response_tip, new, chain_ids(new, prior.response_tip), prior.system_tip, known)
    # Instructions are not handed down by the provider: the history now stands under the new ones.
    before = load(prior.response_tip)
    rebased = (*sent[:leading], *before[_leading(before) :], *sent[leading:])
    return Chain(None, rebased, chain_ids(rebased), system_tip, known)


def _leading(messages: Sequence[Message]) -> int:
    return sum(1 for _ in takewhile(lambda m: m.role in (Role.SYSTEM, Role.DEVELOPER), messages))


def turn_id_of(
    principal: str, session: str | None, identity: Identity, chain: Chain, prior: Row[Any] | None
) -> str:
    """One name for all requests of a human turn: tool loop, retries, announcements of its own session."""
    if identity.trace is not None:
        return traced(principal, session, identity.trace)
    place = _human_place(chain.messages, identity.user_text)
    if place is None:
        if prior is not None and prior.turn_id is not None:
            return str(prior.turn_id)  # a tool loop whose human message is at the provider
        return _short(principal, session, chain.tip)
    # Not the message's own id: a retry rewrites the human's words, the text without the rewording is the same.
    before = chain.ids[place - 1] if place else chain.parent
    return _short(principal, session, f"{before}\n{identity.user_text or chain.messages[place].text}")


def traced(principal: str, session: str | None, trace: str, user_text: str | None = None) -> str:
    """The name of a turn that the client's trace tells; with `user_text` of a further one under the same trace."""
    return _short(principal, session, trace if user_text is None else f"{trace}\n{user_text}")


def _human_place(sent: Sequence[Message], user_text: str | None) -> int | None:
    """The last user message that is the human's text, else ends with it, else holds it, else the last one."""
    users = [(i, m.text) for i, m in enumerate(sent) if m.role is Role.USER]
    if user_text:
        for fits in (str.__eq__, str.endswith, str.__contains__):
            if places := [i for i, text in users if fits(text, user_text)]:
                return places[-1]
    return users[-1][0] if users else None


def _short(*parts: str | None) -> str:
    return sha256("\n".join(p or "" for p in parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
