"""JSON5 read with the place of everything in it, so that one member can be put in or taken out and no other byte moves.

Design: a recursive reader of JSON5 (comments, single quotes, bare keys, trailing commas) that gives nodes with offsets
into the text. `insert_first` and `remove` change the text; put in and taken out again the text is what it was, byte
for byte, and where others changed something in between their change stays.

Limits: at most 100 levels deep. Escapes in bare keys are refused. Numbers and words are checked for their shape and
kept as they are written: nobody here needs their value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from metaclaw_core.errors import MetaClawError

_DEPTH = 100
_BLANK = re.compile(r"[\s\ufeff]*")
_COMMENT = re.compile(r"//[^\n\r\u2028\u2029]*|/\*.*?\*/", re.DOTALL)
_KEY = re.compile(r"[^\W\d][\w$\u200c\u200d]*|\$[\w$\u200c\u200d]*")
_WORD = re.compile(
    r"(?:true|false|null|[+-]?(?:Infinity|NaN|0[xX][0-9a-fA-F]+|(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?))"
    r"(?![\w$.+-])"
)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0"}
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})")
_LINE_END = re.compile(r"\r\n|[\n\r\u2028\u2029]")


class Json5Error(MetaClawError):
    """The text is no JSON5 that this reader understands; the message ends with the line."""


@dataclass(frozen=True, slots=True)
class Node:
    kind: Literal["object", "array", "string", "word"]
    start: int
    end: int  # behind the last character
    members: tuple[Member, ...] = ()  # of an object
    items: tuple[Node, ...] = ()  # of an array
    text: str = ""  # a string's value; a word as it is written

    def named(self, key: str) -> list[Member]:
        """The members of that name; JSON5 allows several."""
        return [member for member in self.members if member.key == key]


@dataclass(frozen=True, slots=True)
class Member:
    key: str
    start: int
    value: Node

    @property
    def end(self) -> int:
        return self.value.end


def parse(text: str) -> Node:
    """The one value in `text`. Raises Json5Error."""
    reader = _Reader(text)
    node = reader.value(0)
    reader.skip()
    if reader.at != len(text):
        raise reader.error("nothing more was expected")
    return node


def plain(node: Node) -> object:
    """The value without places, for comparing; a word is told from a string of the same letters."""
    if node.kind == "object":
        return [(member.key, plain(member.value)) for member in node.members]
    if node.kind == "array":
        return tuple(plain(item) for item in node.items)
    return (node.kind, node.text)


def insert_first(text: str, container: Node, member: str) -> str:
    """`text` with `member` as the first in an object, laid out like the one that was first before."""
    at = container.start + 1
    blank = _BLANK.match(text, at)
    space = blank.group() if blank and container.members else ""
    return text[:at] + space + member + ("," if container.members else "") + text[at:]


def remove(text: str, container: Node, member: Member) -> str:
    """`text` without `member`, the blanks before it, and one comma; comments stay."""
    start = member.start
    place = container.members.index(member)
    entry = container.members[place - 1].end if place else container.start + 1
    while start > entry and _BLANK.fullmatch(text[start - 1]):
        start -= 1
    if _ends_in_line_comment(text, entry, start):
        start = member.start  # its line must end, or it would swallow what follows
    comma = _comma(text, member.end, container.end)
    if comma is not None:
        return text[:start] + text[member.end : comma] + text[comma + 1 :]
    if place:
        before = _comma(text, entry, member.start)
        if before is not None:
            return text[:before] + text[before + 1 : start] + text[member.end :]
    return text[:start] + text[member.end :]


def _ends_in_line_comment(text: str, start: int, end: int) -> bool:
    comments = [found for found in _COMMENT.finditer(text, start, end) if found.end() == end]
    return any(found.group().startswith("//") for found in comments)


def _comma(text: str, start: int, end: int) -> int | None:
    """The comma behind a value, if there is one before `end`."""
    reader = _Reader(text, start)
    reader.skip()
    return reader.at if reader.at < end and text[reader.at] == "," else None


class _Reader:
    def __init__(self, text: str, at: int = 0) -> None:
        self.text = text
        self.at = at

    def error(self, what: str) -> Json5Error:
        return Json5Error(f"{what} in line {self.text.count(chr(10), 0, self.at) + 1}")

    def skip(self) -> None:
        """Blanks and comments."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self.at = blank.end() if blank else self.at
            comment = _COMMENT.match(self.text, self.at)
            if comment is None:
                return
            self.at = comment.end()

    def value(self, depth: int) -> Node:
        if depth > _DEPTH:
            raise self.error(f"more than {_DEPTH} levels")
        self.skip()
        start, mark = self.at, self.text[self.at : self.at + 1]
        if mark == "{":
            members = self._object(depth)
            return Node("object", start, self.at, members=members)
        if mark == "[":
            items = self._array(depth)
            return Node("array", start, self.at, items=items)
        if mark and mark in "\"'":
            text = self._string(mark)
            return Node("string", start, self.at, text=text)
        word = _WORD.match(self.text, self.at)
        if word is None:
            raise self.error("a value is missing")
        self.at = word.end()
        return Node("word", start, self.at, text=word.group())

    def _object(self, depth: int) -> tuple[Member, ...]:
        self.at += 1
        members: list[Member] = []
        while not self._closed("}", comma=bool(members)):
            start = self.at
            key = self._key()
            self.skip()
            if self.text[self.at : self.at + 1] != ":":
                raise self.error(f"a colon is missing after {key!r}")
            self.at += 1
            members.append(Member(key, start, self.value(depth + 1)))
        return tuple(members)

    def _array(self, depth: int) -> tuple[Node, ...]:
        self.at += 1
        items: list[Node] = []
        while not self._closed("]", comma=bool(items)):
            items.append(self.value(depth + 1))
        return tuple(items)

    def _closed(self, bracket: str, *, comma: bool) -> bool:
        """Move over a comma, which must be there between two entries, and over the closing bracket if it comes."""
        self.skip()
        if comma and self.text[self.at : self.at + 1] == ",":
            self.at += 1
            self.skip()
            comma = False
        if self.text[self.at : self.at + 1] == bracket:
            self.at += 1
            return True
        if comma:
            raise self.error("a comma is missing")
        return False

    def _key(self) -> str:
        mark = self.text[self.at : self.at + 1]
        if mark and mark in "\"'":
            return self._string(mark)
        name = _KEY.match(self.text, self.at)
        if name is None:
            raise self.error("a key is missing")
        self.at = name.end()
        return name.group()

    def _string(self, quote: str) -> str:
        out: list[str] = []
        self.at += 1
        while True:
            letter = self.text[self.at : self.at + 1]
            if not letter or letter in "\n\r":
                raise self.error("a string does not end")
            self.at += 1
            if letter == quote:
                return "".join(out)
            out.append(self._escape() if letter == "\\" else letter)

    def _escape(self) -> str:
        end = _LINE_END.match(self.text, self.at)
        if end is not None:
            self.at = end.end()
            return ""
        code = _HEX.match(self.text, self.at)
        if code is not None:
            self.at = code.end()
            return chr(int(code.group(1) or code.group(2), 16))
        letter = self.text[self.at : self.at + 1]
        if not letter or letter in "xu123456789":
            raise self.error("an escape is not valid")
        self.at += 1
        return _ESCAPES.get(letter, letter)
