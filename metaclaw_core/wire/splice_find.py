"""Where a top-level key of a request body is: found by its bytes, proved by parsing as little as possible.

Anchor. In a valid JSON text the bytes ``"name"`` whose first quote has no backslash before it are always
one whole string token: a closing quote can't be followed by a letter, and a quote inside a string is
escaped. With ``:`` behind it that token is a key of *some* object. Nothing else can be this key except a
spelling with ``\\uXXXX``; where a body holds such an escape of a letter, all of it is walked.

Proof that the key is a top-level one, from whichever side is cheaper:
- from the front, members are decoded one by one up to the key. This holds for any bytes.
- to the end, members are decoded from the key on. If the object that holds the key closes exactly at the
  end of the body, then one bracket more closes than opens behind the key, so the key is at depth 1.
  If it closes earlier the key is nested. This holds if the body is valid JSON as a whole.
A key that is proved twice is refused, as readers differ in which of the two counts; where all of the body is
walked, so is any other top-level key that comes twice.

Limit: what lies on the other side is not parsed. A body that is broken there is not noticed, stays
exactly as broken as it was, and the upstream answers as it would have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from metaclaw_core.errors import SpliceError
from metaclaw_core.model import Json

WHITESPACE = " \t\n\r"
_skip_match = re.compile(r"[ \t\n\r]*").match
# \u0041 … \u005a, \u005f, \u0061 … \u007a: what a key of ours can be spelled with
_LETTER_ESCAPE = re.compile(r"\\u00(?:4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9a])", re.IGNORECASE)
# A walk per decoy is cheap, many are not: beyond this one walk over the whole body is cheaper.
_MAX_ANCHORS = 4


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


class Member(NamedTuple):
    name: str
    value: Json
    start: int  # of the value
    end: int  # behind the value
    close: int | None  # behind the object's closing brace if this is its last member


def skip(text: str, at: int) -> int:
    """Behind the white space at `at`."""
    match = _skip_match(text, at)
    return match.end() if match else at


def decode(text: str, at: int) -> tuple[Json, int]:
    """The JSON value that begins at `at`, and the place behind it."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError as e:
        raise SpliceError(f"the body is nested too deeply at byte {at}") from e
    except ValueError as e:  # JSONDecodeError, NaN, an integer of more than 4,300 digits
        raise SpliceError(f"the body is not JSON behind byte {at}: {e}") from e


def after(text: str, end: int, closer: str) -> tuple[bool, int]:
    """Behind an element that ends at `end`: (True, where the next one begins) or (False, behind `closer`)."""
    at = skip(text, end)
    if text.startswith(",", at):
        return True, skip(text, at + 1)
    if text.startswith(closer, at):
        return False, at + 1
    raise SpliceError(f"the body is not JSON at byte {at}: neither ',' nor '{closer}'")


def _key(text: str, at: int) -> tuple[str, int]:
    """The name of the member that begins at `at`, and where its value begins."""
    if not text.startswith('"', at):
        raise SpliceError(f"the body is not JSON at byte {at}: no key")
    name, end = decode(text, at)
    colon = skip(text, end)
    if not text.startswith(":", colon):
        raise SpliceError(f"the body is not JSON at byte {colon}: no ':'")
    return name, skip(text, colon + 1)


def members(text: str, at: int) -> Iterator[Member]:
    """The members from the key at `at` to the end of its object. An object without members is refused."""
    more = True
    while more:
        name, start = _key(text, at)
        value, end = decode(text, start)
        more, at = after(text, end, "}")
        yield Member(name, value, start, end, None if more else at)


def fields(text: str, at: int) -> dict[str, Member]:
    """The members of the object whose brace is at `at`, by name; a name that comes twice is refused."""
    found: dict[str, Member] = {}
    for member in members(text, skip(text, at + 1)):
        if member.name in found:
            raise SpliceError(f"the key {member.name!r} comes twice in one object")
        found[member.name] = member
    return found


class Body:
    """One request body as Latin-1 text: an index into `text` is an index into the bytes, UTF-8 or not."""

    def __init__(self, raw: bytes) -> None:
        self.text = raw.decode("latin-1")
        self._end = len(self.text.rstrip(WHITESPACE))
        brace = skip(self.text, 0)
        self.inside = brace + 1  # where a new first member would go
        self._first = skip(self.text, self.inside)
        if not self.text.startswith("{", brace):
            raise SpliceError("the body is not a JSON object in UTF-8")
        if not self.text.startswith('"', self._first):
            raise SpliceError("the body is an empty object, or no JSON")
        if not self.text.startswith("}", self._end - 1):
            raise SpliceError("the body is cut off")
        self._decoded: tuple[int, Json, int] = (-1, None, -1)
        self._all: dict[str, int] | None = None  # every top-level key, where the anchors are not enough
        # rfind: measured three times as fast as find and count for a needle that isn't there
        if self.text.rfind("\\u00") >= 0 and _LETTER_ESCAPE.search(self.text):
            self._all = self._walk()

    def value(self, start: int) -> tuple[Json, int]:
        """The value that begins at `start`, and the place behind it; the newest one is remembered."""
        if self._decoded[0] != start:
            self._decoded = (start, *decode(self.text, start))
        return self._decoded[1:]

    def find(self, name: str) -> int | None:
        """Where the value of a top-level key begins; None if it is proved absent."""
        if self._all is None:
            anchors = self._anchors(name)
            if len(anchors) <= _MAX_ANCHORS:
                top = [start for at, start in anchors if self._is_top(at)]
                if len(top) > 1:
                    raise SpliceError(f"the key {name!r} comes twice in the body")
                return top[0] if top else None
            self._all = self._walk()
        return self._all.get(name)

    def _anchors(self, name: str) -> list[tuple[int, int]]:
        """(key, value) places of whatever can be a key of this name at any depth, last first; stops above the limit."""
        text, token = self.text, f'"{name}"'
        found: list[tuple[int, int]] = []
        at = text.rfind(token)
        while at >= 0 and len(found) <= _MAX_ANCHORS:
            colon = skip(text, at + len(token))
            if text.startswith(":", colon) and not text.startswith("\\", at - 1):
                found.append((at, skip(text, colon + 1)))
            at = text.rfind(token, 0, at)
        return found

    def _is_top(self, at: int) -> bool:
        return self._is_top_from_front(at) if at < self._end // 4 else self._is_top_to_end(at)

    def _is_top_from_front(self, at: int) -> bool:
        text, key, more = self.text, self._first, True
        while key < at:
            if not more:
                raise SpliceError(f"the body goes on behind its end at byte {key}")
            end = decode(text, _key(text, key)[1])[1]
            more, key = after(text, end, "}")
        return key == at and more

    def _is_top_to_end(self, at: int) -> bool:
        first = last = None
        for last in members(self.text, at):
            first = first or last
        if first is None or last is None or last.close != self._end:
            return False
        self._decoded = (first.start, first.value, first.end)  # what the caller asks for next
        return True

    def _walk(self) -> dict[str, int]:
        """Every top-level key by a parse of the whole body, in whatever spelling."""
        found: dict[str, int] = {}
        close = None
        for member in members(self.text, self._first):
            if member.name in found:
                raise SpliceError(f"the key {member.name!r} comes twice in the body")
            found[member.name] = member.start
            close = member.close
        if close != self._end:
            raise SpliceError(f"the body goes on behind its end at byte {close}")
        return found
