"""What the requests of an agent have in common is written to the spool once: the writer's side.

Design: an agent sends its history again with every request. So a body is written whole now and then, as a *base*, and
the rows after it hold what differs: how many bytes of the base stand at the start and at the end, and those between. A
new body is compared with the newest one of a base, not with the base itself: what it shares with that one is known to
hold no secret and need not be searched, and of that the base has at least what the newest shared with it. A base may be
another session's; where the difference becomes too large, a new base is made.

`Bases` is memory only and may be wrong about the disk: the reader deletes a base that no row needs, and a transaction
may fail. So the writer looks, in the transaction that writes a row, whether the row's base is there.

Bounded in bytes; the least recently used go first. Not for several threads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from metaclaw_core.prefix import Likeness, likeness, longest
from metaclaw_core.redact import redact, redact_between

FROM_BYTES = 16 * 1024  # a smaller body stands for itself
_KEPT_BYTES = 3 << 20
_TRIED = 4  # of a caller's
_NEAR = 16 * 1024  # bytes, or a quarter of the body: that much may differ from a base
_SAME = 0.95  # of the body before: it is of the same session


@dataclass(slots=True)
class Base:
    """A body on disk, of which the last one that was written as a difference from it has both ends."""

    id: int  # never given twice in one file
    caller: str
    block: str | None  # the text that was injected into this request; the rows after it mostly have the same
    newest: bytes  # without secrets
    prefix: int  # bytes of the base that `newest` begins with, at least
    suffix: int  # and ends with; both all of it while it is the base itself


@dataclass(frozen=True, slots=True)
class Delta:
    """A body as ``base[:prefix] + between + base[len(base) - suffix:]``."""

    base: Base
    prefix: int
    suffix: int
    between: bytes


class Bases:
    def __init__(self, first_id: int = 1) -> None:
        self._next_id = first_id
        self._bases: dict[int, Base] = {}  # least recently used first
        self._bytes = 0
        self.unwritten: list[tuple[int, bytes, str | None]] = []  # (id, body, block) of what is on no disk yet

    def delta(self, body: bytes, caller: str, block: str | None, like: Likeness | None = None) -> tuple[bytes, Delta | None]:
        """(the body without secrets, how it is to be written; None: whole).

        `caller` says whose bodies may be alike; `block` is the injected text, for a base that has to be made; `like`
        may spare a comparison.
        """
        if len(body) < FROM_BYTES:
            return redact(body)[0], None
        base, prefix, suffix = self._nearest(body, caller, like)
        clean, secrets = redact_between(body, prefix, suffix)
        if secrets:
            body = clean
            base, prefix, suffix = self._nearest(body, caller)
        went_on = base is not None and prefix + suffix > _SAME * len(base.newest)
        if base is not None:
            prefix, suffix = min(prefix, base.prefix), min(suffix, base.suffix)
        if base is None or len(body) - prefix - suffix > max(_NEAR, len(body) // 4):
            if base is not None and went_on:
                self.forget([base.id])  # the new one stands for the same session
            base, prefix, suffix = self._make(body, caller, block), len(body), 0
        else:
            self.forget([base.id])
            base.newest, base.prefix, base.suffix = body, prefix, suffix
            self._keep(base)
        return body, Delta(base, prefix, suffix, body[prefix : len(body) - suffix])

    def forget(self, ids: Collection[int]) -> None:
        for base_id in ids:
            if (base := self._bases.pop(base_id, None)) is not None:
                self._bytes -= len(base.newest)

    def _nearest(self, body: bytes, caller: str, like: Likeness | None = None) -> tuple[Base | None, int, int]:
        """The base whose newest body shares most with `body`: how much at its start, and how much of the rest at its end."""
        best: tuple[Base | None, int, int] = (None, 0, 0)
        own = [base for base in reversed(self._bases.values()) if base.caller == caller]
        if like is not None and len(body) - like.shared <= _NEAR // 2:  # what is known already is not compared again
            for base in own:
                if base.newest is like.other:
                    return base, like.prefix, like.suffix
        place, _ = longest((base.newest for base in own), body)
        for base in [*own[place : place + 1], *own[:place], *own[place + 1 :]][:_TRIED]:
            this = like if like is not None and like.other is base.newest else likeness(base.newest, body)
            if this.shared > best[1] + best[2]:
                best = (base, this.prefix, this.suffix)
            if len(body) - this.shared <= _NEAR // 2:
                break
        return best

    def _make(self, body: bytes, caller: str, block: str | None) -> Base:
        base = Base(self._next_id, caller, block, body, len(body), len(body))
        self._next_id += 1
        self.unwritten.append((base.id, body, block))
        self._keep(base)
        return base

    def _keep(self, base: Base) -> None:
        self._bases[base.id] = base
        self._bytes += len(base.newest)
        while self._bytes > _KEPT_BYTES and len(self._bases) > 1:
            self.forget([next(iter(self._bases))])
