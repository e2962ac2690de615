"""The other direction of a dialect: an answer of our own, as JSON or as a stream of the client's own kind.

Design: what a model says is a sequence of events; an `AnswerWriter` turns them into bytes. It is made per request, holds
what the form needs (ids, counters, what was said so far) and does no I/O. A writer for a client that does not stream gives
nothing until `finish`, and then the whole JSON body. A tool call is one event: it is decided whole before any of it is sent.

The functions `answer_writer` and `error_body` find the dialect's own writer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from metaclaw_core.model import StopReason, Usage


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A whole tool call. `arguments` is the raw JSON text of an object, as the model emitted it."""

    name: str
    arguments: str
    id: str


type Event = TextDelta | ReasoningDelta | Call


class AnswerWriter(Protocol):
    media_type: str  # of the body: "text/event-stream", "application/x-ndjson" or "application/json"

    def start(self) -> bytes:
        """What opens the answer; b"" where nothing does."""

    def feed(self, event: Event) -> bytes: ...

    def keep_alive(self) -> bytes:
        """What may be sent while nothing is there to say, and changes nothing; b"" where the form knows no such thing."""

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        """The end. `stop_sequence`: the client's own stop string that ended it."""

    def fail(self, message: str) -> bytes:
        """An error after the head has been sent, as the dialect says it inside a stream."""
