"""The request in a body, read by what is known of a body before it.

An agent sends its history again and again. A `Reading` keeps where in the bytes each item of the history was and
which messages it gave, so that of the next body only what is new has to be decoded. The result is exactly what
``Dialect.parse_request`` gives, for every item is decoded or is byte for byte an item that was; nothing here knows
what an agent is, what a turn or a session.

Why that is exact. Where two bodies are the same up to the start of an item, a parser is in the same state there: inside
the same list of the same object. So it may begin there. If it then stands at the start of a known item (or at the
end of the list) and all bytes from there on are those of the known body, the rest is the same again; else the rest of
the body is decoded, too. An item that is the same bytes and is followed by a comma or the end of the list is the
same item. What isn't found this way (a body of another make, a key twice, NaN, UTF-16) is left to the full parse.

`slot` is that of ``Dialect.system_slot``; it is carried over where neither the leading messages nor anything in
front of the slot has changed.

Limits: the dialect must offer `HasHistory`; others are parsed in full. Decoded text is held beside the bytes, about
twice the body in all.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from typing import NoReturn

from metaclaw_core.errors import WireError
from metaclaw_core.model import Json, Message, Request, Role
from metaclaw_core.prefix import Likeness, common_suffix, likeness
from metaclaw_core.wire.base import Dialect, HasHistory, Items, Slot

_LEADING = (Role.SYSTEM, Role.DEVELOPER)
_SPACE = " \t\n\r"
_space = re.compile(r"[ \t\n\r]*").match
_space_bytes = re.compile(rb"[ \t\n\r]*").match


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_scan = json.JSONDecoder(parse_constant=_no_constant).scan_once  # type: ignore[attr-defined]  # (text, at) → (value, end)
_NOT_READ = (ValueError, IndexError, StopIteration, RecursionError, WireError)


@dataclass(slots=True)
class Reading:
    """A body and what it says; of its n items of history, where they are in the bytes and in the messages."""

    dialect: Dialect
    path: str
    body: bytes
    request: Request
    starts: list[int] = field(default_factory=list)  # (n,)
    ends: list[int] = field(default_factory=list)  # (n,) behind each item
    places: list[int] = field(default_factory=list)  # (n + 1,) index of an item's first message; -1: it begins none
    close: int = -1  # place of the list's closing bracket; -1: no places are known
    before: dict[str, Json] = field(default_factory=dict)  # the top-level members in front of the history
    _slot: Slot | None = None

    def slot(self) -> Slot:
        """Where a block goes. Raises SpliceError."""
        if self._slot is None:
            self._slot = self.dialect.system_slot(self.body)
        return self._slot


def read(dialect: Dialect, body: bytes, path: str) -> Reading:
    """A body of which nothing is known. Raises WireError as `parse_request` does."""
    known = _with_history(dialect)
    if known is not None:
        try:
            return _read(known, body, path)
        except _NOT_READ:
            pass  # whatever it is, the dialect's own parser decides, and has the words for it
    return Reading(dialect, path, body, dialect.parse_request(body, path))


def reread(old: Reading, body: bytes, path: str, like: Likeness | None = None) -> Reading | None:
    """`body` by what `old` says; None where that gives nothing, and then `read` must. `like`: of `body` to the old one."""
    dialect = _with_history(old.dialect)
    if dialect is None or old.close < 0 or path != old.path:
        return None
    try:
        return _reread(old, dialect, body, like or likeness(old.body, body))
    except _NOT_READ:
        return None


def _with_history(dialect: Dialect) -> HasHistory | None:
    found: HasHistory | None = dialect if hasattr(dialect, "read_items") else None  # type: ignore[assignment]
    return found


# --- a whole body -------------------------------------------------------------------------------


def _read(dialect: HasHistory, body: bytes, path: str) -> Reading:
    text = body.decode()
    at = _skip(text, 0)
    if text[at] != "{":
        raise ValueError("not an object")
    before: dict[str, Json] = {}
    at = _skip(text, at + 1)
    while True:
        name, at = _key(text, at)
        if name in before:
            raise ValueError("a key twice")
        if name == dialect.history and text[at] == "[":
            break
        before[name], at = _scan(text, at)
        at = _after(text, at)
    starts, ends, items, at = _items(text, at + 1)
    close = at - 1
    request = _request(dialect, before, _members(text, at), path)
    if not text.isascii():
        close = _to_bytes(text, close, starts, ends)
    made = dialect.read_items(items)
    messages = [*request.messages]
    places = _places(made, messages)
    return Reading(dialect, path, body, replace(request, messages=tuple(messages)), starts, ends, places, close, before)


def _request(dialect: HasHistory, before: dict[str, Json], after: dict[str, Json], path: str) -> Request:
    """The request without its history."""
    if dialect.history in before or not after.keys().isdisjoint((*before, dialect.history)):
        raise ValueError("a key twice")
    return dialect.read_request({**before, dialect.history: [], **after}, path)


def _key(text: str, at: int) -> tuple[str, int]:
    if text[at] != '"':
        raise ValueError("no key")
    name, at = _scan(text, at)
    at = _skip(text, at)
    if text[at] != ":":
        raise ValueError("no colon")
    return name, _skip(text, at + 1)


def _after(text: str, at: int) -> int:
    """Behind the comma that follows a member, where the next one begins."""
    at = _skip(text, at)
    if text[at] != ",":
        raise ValueError("no comma")
    return _skip(text, at + 1)


def _members(text: str, at: int) -> dict[str, Json]:
    """What follows the history to the end of the body."""
    found: dict[str, Json] = {}
    at = _skip(text, at)
    while text[at] == ",":
        name, at = _key(text, _skip(text, at + 1))
        if name in found:
            raise ValueError("a key twice")
        found[name], at = _scan(text, at)
        at = _skip(text, at)
    if text[at] != "}" or _skip(text, at + 1) != len(text):
        raise ValueError("not the end of an object")
    return found


def _items(text: str, at: int) -> tuple[list[int], list[int], list[Json], int]:
    """(where each item begins, ends, the items, behind the bracket) of the list whose first item or end is at `at`."""
    starts: list[int] = []
    ends: list[int] = []
    items: list[Json] = []
    at = _skip(text, at)
    if text[at] == "]":
        return starts, ends, items, at + 1
    while True:
        item, end = _scan(text, at)
        starts.append(at)
        ends.append(end)
        items.append(item)
        at = end if text[end] in ",]" else _skip(text, end)
        if text[at] == "]":
            return starts, ends, items, at + 1
        if text[at] != ",":
            raise ValueError("no comma")
        at += 1
        if text[at] != "{":
            at = _skip(text, at)


def _skip(text: str, at: int) -> int:
    match = _space(text, at)
    return match.end() if match else at


def _to_bytes(text: str, close: int, starts: list[int], ends: list[int]) -> int:
    """Places in `text` as places in its UTF-8, in the lists themselves and of `close`."""
    at = done = 0
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        done += len(text[at:start].encode())
        starts[i] = done
        done += len(text[start:end].encode())
        ends[i] = done
        at = end
    return done + len(text[at:close].encode())


def _places(made: Items, messages: list[Message]) -> list[int]:
    """Puts the messages of new items behind `messages`; where each item's begin, and the end."""
    places: list[int] = []
    for group in made:
        if group is None:
            places.append(-1)
        else:
            places.append(len(messages))
            messages += group
    places.append(len(messages))
    return places


# --- a body like one before ---------------------------------------------------------------------


class _History:
    """The history of the new body, as far as it is known."""

    def __init__(self, old: Reading, dialect: HasHistory, count: int) -> None:
        """Begins with the first `count` items of the old one."""
        self.starts, self.ends, self.places = old.starts[:count], old.ends[:count], old.places[:count]
        self.messages = list(old.request.messages[: old.places[count]])
        self._old, self._dialect = old, dialect
        self._waiting: list[Json] = []  # decoded and not yet read: neighbours may be one message

    def add_new(self, item: Json, start: int, end: int) -> None:
        self._waiting.append(item)
        self.starts.append(start)
        self.ends.append(end)

    def add_old(self, first: int, last: int, shift: int) -> None:
        """Items `first` to `last` (exclusive) of the old history, now `shift` bytes further on."""
        self.finish()
        old = self._old
        begin, end = old.places[first], old.places[last]
        moved = len(self.messages) - begin
        self.starts += [at + shift for at in old.starts[first:last]]
        self.ends += [at + shift for at in old.ends[first:last]]
        self.places += [place if place < 0 else place + moved for place in old.places[first:last]]
        self.messages += old.request.messages[begin:end]

    def finish(self) -> None:
        if self._waiting:
            self.places += _places(self._dialect.read_items(self._waiting), self.messages)[:-1]
            self._waiting = []


def _alone(old: Reading, dialect: HasHistory, k: int) -> bool:
    """Does the old item `k` give a message whatever its neighbours are?"""
    place = old.places[k]
    return not dialect.runs or (place >= 0 and old.request.messages[place].role is not Role.ASSISTANT)


def _reread(old: Reading, dialect: HasHistory, body: bytes, like: Likeness) -> Reading | None:
    n, size = len(old.starts), len(old.body)
    first = bisect_right(old.starts, like.prefix) - 1  # the first item that may be another
    if first < 0:
        return None
    while first > 0 and not _alone(old, dialect, first - 1):
        first -= 1
    history = _History(old, dialect, first)
    start = old.starts[first]
    same = like.suffix
    if same == min(size, len(body)) - like.prefix:  # it met the prefix: without what of that is read again it may be longer
        same = common_suffix(old.body, body, min(size, len(body)) - start, same)
    if same < size - old.close:
        return _to_the_end(old, dialect, body, history, first)
    last = bisect_left(old.starts, size - same, first)  # the first item from which on all is the same
    while last < n and not _alone(old, dialect, last):
        last += 1
    shift = len(body) - size
    stop = (old.starts[last] if last < n else old.close) + shift
    at, closed = _aligned(old, dialect, body, history, first, last, stop)
    if not closed and at < stop:
        text = body[at:stop].decode()
        if last < n:  # it ends with the comma in front of a known item
            text = text.rstrip(_SPACE)
            if not text.endswith(","):
                return None
            text = text[:-1]
        if _add_items(history, text + "]", at) != len(text) + 1:
            return None
    elif at != stop or closed != (last == n):
        return None
    if last < n:
        history.add_old(last, n, shift)
    history.finish()
    history.places.append(len(history.messages))
    return Reading(
        dialect,
        old.path,
        body,
        replace(old.request, messages=tuple(history.messages)),
        history.starts,
        history.ends,
        history.places,
        old.close + shift,
        old.before,
        _kept_slot(old, first, shift),
    )


def _to_the_end(old: Reading, dialect: HasHistory, body: bytes, history: _History, first: int) -> Reading:
    """What follows the history has changed: all of it is decoded."""
    at, closed = _aligned(old, dialect, body, history, first, len(old.starts), len(body))
    if closed:
        close = at
        members = _members(body[close + 1 :].decode(), 0)
    else:
        text = body[at:].decode()
        end = _add_items(history, text, at)
        close = at + len(text[: end - 1].encode())
        members = _members(text, end)
    history.finish()
    request = _request(dialect, old.before, members, old.path)
    moved = len(request.messages) - old.places[0]  # of the messages that come from elsewhere
    messages = (*request.messages, *history.messages[old.places[0] :])
    places = [place if place < 0 else place + moved for place in (*history.places, len(history.messages))]
    request = replace(request, messages=messages)
    return Reading(dialect, old.path, body, request, history.starts, history.ends, places, close, old.before)


def _aligned(
    old: Reading, dialect: HasHistory, body: bytes, history: _History, k: int, last: int, stop: int
) -> tuple[int, bool]:
    """Reads on from the old item `k` to the old item `last` as long as each item is the old one or has its length.

    (where it stands: at an item, or at the bracket; whether it is the bracket), at most about `stop`.
    """
    at, closed = old.starts[k], False
    while k < last and at < stop and not closed:
        start = old.starts[k]
        end = at + old.ends[k] - start
        if _alone(old, dialect, k) and body.startswith(old.body[start : old.ends[k]], at):
            history.add_old(k, k + 1, at - start)
        elif end > stop or (item := _exactly(body[at:end])) is None:
            break
        else:
            history.add_new(item, at, end)
        at, closed = _next(body, end)
        k += 1
    return at, closed


def _exactly(raw: bytes) -> Json:
    """The value that is all of `raw`; None if it isn't one."""
    try:
        text = raw.decode()
        item, end = _scan(text, 0)
    except _NOT_READ:
        return None
    return item if end == len(text) else None


def _next(body: bytes, end: int) -> tuple[int, bool]:
    """Behind an item that ends at `end`: (where the next one begins, False) or (the bracket's place, True)."""
    at = _skip_bytes(body, end)
    if body.startswith(b",", at):
        return _skip_bytes(body, at + 1), False
    if body.startswith(b"]", at):
        return at, True
    raise ValueError("neither a comma nor a bracket")


def _skip_bytes(body: bytes, at: int) -> int:
    match = _space_bytes(body, at)
    return match.end() if match else at


def _add_items(history: _History, text: str, at: int) -> int:
    """Reads items to the end of their list in `text`, which stands at `at` in the body; the place behind the bracket."""
    starts, ends, items, end = _items(text, 0)
    if not items:
        raise ValueError("no item behind a comma")
    if not text.isascii():
        _to_bytes(text, end, starts, ends)
    for item, a, b in zip(items, starts, ends, strict=True):
        history.add_new(item, at + a, at + b)
    return end


def _kept_slot(old: Reading, first: int, shift: int) -> Slot | None:
    """The known slot in the new body, if the items from `first` on have no part in it; None: it must be looked for."""
    slot = old._slot
    leading = next((i for i, m in enumerate(old.request.messages) if m.role not in _LEADING), None)
    if slot is None or leading is None or leading >= old.places[first]:
        return None
    if slot.at < old.starts[first]:
        return slot
    return replace(slot, at=slot.at + shift) if slot.at > old.close else None
