"""The token ids of a reply, as they come, into text, reasoning and tool calls.

Design: three stages, each fed with any pieces and each holding back what is not decided. Ids become text (``tokens.
Detokenizer``), special tokens vanish unless they mean something; the text is searched for the client's stop strings, and
where one is complete the reply ends, whatever more was sampled; what is left is read by the family's grammar. Events of
any split of the ids join to the same answer.

A call is given whole, when its end has been read. One that can't be read is given as the text it is, to the letter, with
everything after it: nothing that the model may have meant as a part of it is executed. Names are not checked against
the declared tools: the client answers an unknown name with an error of its own, from which the model learns more than the
human would from marks in the text. Where the request declares no tools, marks are text like any other.

Limits: reasoning is recognised at the start of a reply only. Stop strings count in the whole text, in reasoning and in
calls, too, as the model wrote it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from metaclaw_core.model import Message, Part, Reasoning, Role, Text, ToolCall
from metaclaw_core.policy import families
from metaclaw_core.policy.families import HARMONY, Family, Schemas, Written
from metaclaw_core.policy.tokens import Detokenizer
from metaclaw_core.wire.answer import Call, Event, ReasoningDelta, TextDelta

_THINK, _THOUGHT = "<think>", "</think>"


def new_call_id(dialect: str) -> str:
    """In the form that the dialect's own provider gives."""
    return ("toolu_" if dialect == "anthropic" else "call_") + secrets.token_hex(12)


def held(text: str, marks: Collection[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = max(map(len, marks), default=0)
    for n in range(min(len(text), longest - 1), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks if len(mark) > n):
            return n
    return 0


type Piece = TextDelta | ReasoningDelta | Written


class Grammar(Protocol):
    malformed: bool

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """`last`: nothing follows, give everything."""


class Tagged:
    """Reasoning between tags at the start, calls between marks."""

    def __init__(self, family: Family, schemas: Schemas | None, *, thinking: bool) -> None:
        """`schemas`: of the declared tools; None: there are none. `thinking`: the prompt has opened the reasoning."""
        self.malformed = False
        self._family = family
        self._schemas = schemas
        self._text = ""
        self._open = ""  # the mark before the call that is being read
        self._gap = ""  # white space before it, which belongs to it
        self._searched = 0  # characters of the call in which its end was looked for in vain
        self._after_call = False
        self._read = self._thought if thinking else self._start
        self._trim = thinking

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._read(pieces, last):
            pass
        return pieces

    # Each reads what it can from `self._text` and says whether another state has to go on.

    def _start(self, pieces: list[Piece], last: bool) -> bool:
        rest = self._text.lstrip()
        if rest.startswith(_THINK):
            self._text, self._read, self._trim = rest[len(_THINK) :], self._thought, True
            return True
        if not last and _THINK.startswith(rest):
            return False
        if self._family.bare and self._schemas is not None and rest.startswith("{"):
            self._read = self._call
            return True
        self._read = self._say
        return True

    def _thought(self, pieces: list[Piece], last: bool) -> bool:
        if self._trim:
            self._text = self._text.lstrip("\n")
            self._trim = not self._text
        thought, end, rest = self._text.partition(_THOUGHT)
        if end:
            self._add(pieces, ReasoningDelta, thought.rstrip("\n"))
            self._text, self._read, self._trim = rest, self._say, True
            return True
        keep = 0 if last else held(self._text, (_THOUGHT,))
        ready = self._text[: len(self._text) - keep]
        ready = ready.rstrip("\n")
        self._add(pieces, ReasoningDelta, ready)
        self._text = "" if last else self._text[len(ready) :]
        return False

    def _say(self, pieces: list[Piece], last: bool) -> bool:
        if self._trim:
            self._text = self._text.lstrip("\n")
            self._trim = not self._text
        if self._schemas is None:
            self._add(pieces, TextDelta, self._text)
            self._text = ""
            return False
        said, mark, rest = self._text.partition(self._family.open)
        if mark:
            ready = said.rstrip()
            if ready:
                self._add(pieces, TextDelta, said[: len(ready)])
            self._gap, self._open, self._text = said[len(ready) :], mark, rest
            self._read, self._searched = self._call, 0
            return True
        if last:
            if not (self._after_call and not self._text.strip()):
                self._add(pieces, TextDelta, self._text)
            self._text = ""
            return False
        ready = self._text[: len(self._text) - held(self._text, (self._family.open,))].rstrip()
        if ready:
            self._after_call = False
            self._add(pieces, TextDelta, ready)
            self._text = self._text[len(ready) :]
        return False

    def _call(self, pieces: list[Piece], last: bool) -> bool:
        close = self._family.close
        while close is not None and (at := self._text.find(close, self._searched)) >= 0:
            calls = self._family.read(self._text[:at], self._schemas or {})
            self._searched = at + len(close)
            if calls is not None:  # else the mark may stand in a string of the arguments
                pieces += calls
                self._text, self._gap = self._text[self._searched :], ""
                self._after_call, self._read = True, self._say
                return True
        if not last:
            if close is not None:
                self._searched = max(self._searched, len(self._text) - len(close) + 1)
            return False
        calls = self._family.read(self._text, self._schemas or {}) if close is None else None
        if calls is not None:
            pieces += calls
        else:
            self.malformed = self.malformed or bool(self._open)
            self._add(pieces, TextDelta, self._gap + self._open + self._text)
        self._text, self._gap = "", ""
        return False

    @staticmethod
    def _add(pieces: list[Piece], kind: type[TextDelta] | type[ReasoningDelta], text: str) -> None:
        if text:
            pieces.append(kind(text))


class Verbatim:
    """All of a reply is text."""

    malformed = False

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        return [TextDelta(text)] if text else []


class Harmony:
    """gpt-oss: messages with a header that names channel and recipient; the prompt ends with ``<|start|>assistant``."""

    _STARTS = ("<|channel|>", "<|start|>", "assistant", "to=")
    _HEAD, _BODY = "<|message|>", ("<|end|>", "<|start|>")

    def __init__(self, family: Family, schemas: Schemas | None) -> None:
        self.malformed = False
        self._family = family
        self._schemas = schemas
        self._text = ""
        self._header: str | None = ""  # None: inside a body
        self._said: list[str] = []
        self._kind: type[TextDelta] | type[ReasoningDelta] | None = None  # None: a call
        self._name = ""
        self._raw = ""

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._head(pieces, last) if self._header is not None else self._body(pieces, last):
            pass
        return pieces

    def _head(self, pieces: list[Piece], last: bool) -> bool:
        rest = self._text.lstrip()
        if not rest.startswith(self._STARTS) and (last or not any(start.startswith(rest) for start in self._STARTS)):
            self._header, self._kind, self._raw = None, TextDelta, ""  # a reply without a header is its text
            return bool(rest)
        header, mark, rest = self._text.partition(self._HEAD)
        if not mark:
            return False  # of a header that was cut off nothing is said
        words = header.replace("<|", " <|").replace("|>", "|> ").split()
        channel = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "<|channel|>"), "final")
        to = next((word[3:] for word in words if word.startswith("to=")), None)
        self._header, self._text, self._raw = None, rest, header + mark
        if to is not None and self._schemas is not None:
            self._kind, self._name = None, to.removeprefix("functions.")
        else:
            self._kind = ReasoningDelta if channel == "analysis" else TextDelta
        return True

    def _body(self, pieces: list[Piece], last: bool) -> bool:
        ends = [(at, mark) for mark in self._BODY if (at := self._text.find(mark)) >= 0]
        if not ends and not last and self._kind is None:
            return False
        keep = 0 if last else held(self._text, self._BODY)
        at, mark = min(ends, default=(len(self._text) - keep, ""))
        body, self._text = self._text[:at], self._text[at + len(mark) :]
        if self._kind is not None:
            if body:
                pieces.append(self._kind(body))
        elif (calls := self._family.read(body.strip(), self._schemas or {})) is not None:
            pieces.append(Written(self._name, calls[0].arguments))
        else:
            self.malformed = True
            pieces.append(TextDelta(self._raw + body))
        if mark or last:
            self._header = ""
        return bool(mark)


def _grammar(family: Family | None, schemas: Schemas | None, *, thinking: bool) -> Grammar:
    if family is None:
        return Verbatim()
    return Harmony(family, schemas) if family is HARMONY else Tagged(family, schemas, thinking=thinking)


class ReplyReader:
    """One reply. Feed ids until `stopped` or until no more come, then `finish`; the rest is known after that."""

    def __init__(
        self,
        tokenizer: Any,
        family: Family | None,
        *,
        stop_ids: Collection[int],
        stops: Sequence[str] = (),
        schemas: Schemas | None = None,
        thinking: bool = False,
        call_id: Callable[[Written], str | None],
    ) -> None:
        """`family`: how the model writes; None: nothing in its text means anything. `stop_ids`, `stops`: what ends the
        reply. `schemas`: of the tools that may be called, by name; None: marks of calls are text. `thinking`: the prompt
        ends inside the reasoning. `call_id`: the id for a call; None: it gets "".
        """
        self.stopped = False
        """A stop id or a stop string was read: nothing more of the reply counts."""
        self.kept = 0
        """Ids that count: to be stored and trained on. A stop id, and the ids that completed a stop string, are among them."""
        self.shown = 0
        """Ids of them that make the answer as the client has it: without those of a stop string."""
        self.stop_sequence: str | None = None
        self.malformed = False
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self._stops = tuple(stop for stop in stops if stop)
        self._marks = families.marks_of(family, tokenizer) if family else {}
        self._hidden = families.special_ids(tokenizer) - self._marks.keys()
        self._grammar = _grammar(family, schemas, thinking=thinking)
        self._call_id = call_id
        self._detokenizer = Detokenizer(tokenizer)
        self._ids: list[int] = []
        self._waiting = ""  # text that may become a stop string
        self._passed = 0  # characters before it
        self._said: list[Event] = []

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """What is decided by these ids. Ids after the end are ignored."""
        text = ""
        run: list[int] = []
        for id in ids:
            if self.stopped:
                break
            self._ids.append(id)
            if id in self._stop_ids:
                self.stopped = True
            elif id in self._marks or id in self._hidden:
                text += self._detokenizer.feed(run) + self._detokenizer.finish() + self._marks.get(id, "")
                run = []
            else:
                run.append(id)
        text += self._detokenizer.feed(run)
        if self.stopped:
            text += self._detokenizer.finish()
        return self._give(self._before_stop(text))

    def finish(self) -> list[Event]:
        """The rest."""
        text = self._before_stop(self._detokenizer.finish()) + self._waiting
        self._waiting = ""
        if self.stop_sequence is None:
            self.kept = self.shown = len(self._ids)
        events = self._give(text, last=True)
        self.malformed = self._grammar.malformed
        return events

    @property
    def message(self) -> Message:
        """The whole answer: reasoning, text, calls."""
        thought = "".join(event.text for event in self._said if isinstance(event, ReasoningDelta))
        text = "".join(event.text for event in self._said if isinstance(event, TextDelta))
        parts: list[Part] = []
        if thought:
            parts.append(Reasoning(thought))
        if text:
            parts.append(Text(text))
        parts += [ToolCall(event.name, event.arguments, event.id) for event in self._said if isinstance(event, Call)]
        return Message(Role.ASSISTANT, tuple(parts))

    def _before_stop(self, new: str) -> str:
        if self.stop_sequence is not None:
            return ""
        text = self._waiting + new
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first, as if ids had come one by one
            end, at, self.stop_sequence = min(found)
            self.stopped = True
            self.kept, self.shown = self._ids_of(self._passed + end), self._ids_of(self._passed + at, whole=True)
            self._waiting = ""
            return text[:at]
        keep = held(text, self._stops)
        self._waiting = text[len(text) - keep :]
        self._passed += len(text) - keep
        return text[: len(text) - keep]

    def _ids_of(self, chars: int, *, whole: bool = False) -> int:
        """How many ids it takes for so many characters of the text; with `whole`, how many lie within them."""
        again = Detokenizer(self._tokenizer)
        length = 0
        for i, id in enumerate(self._ids):
            if id in self._marks or id in self._hidden:
                length += len(again.finish()) + len(self._marks.get(id, ""))
            elif id not in self._stop_ids:
                length += len(again.feed([id]))
            if length > chars and whole:
                return i
            if length >= chars and not whole:
                return i + 1
        return len(self._ids)

    def _give(self, text: str, *, last: bool = False) -> list[Event]:
        events: list[Event] = []
        for piece in self._grammar.feed(text, last=last):
            if isinstance(piece, Written):
                events.append(Call(piece.name, piece.arguments, self._call_id(piece) or ""))
            elif events and isinstance(before := events[-1], type(piece)):
                events[-1] = type(piece)(before.text + piece.text)
            else:
                events.append(piece)
        self._said += events
        return events
