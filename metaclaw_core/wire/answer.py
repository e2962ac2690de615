"""The other direction of a dialect: an answer of our own, as JSON or as a stream of the client's own kind.

Design: what a model says is a sequence of events; an `AnswerWriter` turns them into bytes. It is made per request, holds
what the form needs (ids, counters, what was said so far) and does no I/O. A writer for a client that does not stream gives
nothing until `finish`, and then the whole JSON body. A tool call is one event: it is decided whole before any of it is sent.

`answer_writer` and `error_body` find the dialect's own writer: its attribute `answers`, an object that satisfies `Answers`.
The attribute is optional, because a dialect of another package may only read; then both functions raise WireError.

Limits: one answer per request (no n > 1), no media, no logprobs. Reasoning that the client did not ask for is left out
where the form says who gets it (see each `answer_*` module). A stop reason that the form has no word for becomes its
ordinary end. Events keep their order where the form has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from metaclaw_core.errors import WireError
from metaclaw_core.model import Json, Request, StopReason, Usage
from metaclaw_core.wire import by_name
from metaclaw_core.wire.jsonio import dumps

JSON_TYPE: Final = "application/json"  # media type of a whole answer and of every error body
SSE_TYPE: Final = "text/event-stream"
NDJSON_TYPE: Final = "application/x-ndjson"


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

    def feed(self, event: Event) -> bytes:
        """Raises WireError for a call whose arguments are no JSON object, where the form carries an object."""

    def keep_alive(self) -> bytes:
        """What may be sent while nothing is there to say, and changes nothing; b"" where the form knows no such thing."""

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        """The end. `stop_sequence`: the client's own stop string that ended it. STOP after a call means TOOL_CALLS."""

    def fail(self, message: str) -> bytes:
        """An error after the head has been sent, as the dialect says it inside a stream; nothing may follow it.

        For a client that does not stream no head has been sent yet: it is the body of an error 500.
        """


# --- what a dialect brings ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an answer before its first word."""

    request: Request
    model: str  # as the client shall read it
    response_id: str
    created: float  # unix seconds
    path: str = ""  # of the request; Gemini's query says which kind of stream is wanted


@dataclass(frozen=True, slots=True)
class End:
    stop: StopReason
    usage: Usage
    stop_sequence: str | None = None


class Answers(Protocol):
    """How one dialect answers."""

    def stream(self, head: Head) -> AnswerWriter: ...

    def whole(self, head: Head, said: Sequence[Event], end: End) -> Json:
        """The JSON body; `said` is `joined`."""

    def error(self, status: int, message: str, kind: str, code: str | None) -> Json: ...


def answer_writer(
    dialect: str,
    request: Request,
    *,
    model: str,
    response_id: str,
    created: float,
    stream: bool,
    path: str = "",
) -> AnswerWriter:
    """A new writer for the answer to `request`.

    `created` in unix seconds; `path` is the request's, with its query: Gemini says there which kind of stream it wants,
    and is answered with server-sent events where it is not given. Raises WireError for a dialect that can't answer.
    """
    answers = _answers(dialect)
    head = Head(request, model, response_id, created, path)
    return answers.stream(head) if stream else _Whole(answers, head)


def error_body(dialect: str, status: int, message: str, kind: str, code: str | None = None) -> bytes:
    """The body of an answer with `status` >= 400, of media type `JSON_TYPE`.

    `kind` and `code` are OpenAI's words ("invalid_request_error", "context_length_exceeded"); a dialect with words of its
    own takes them from the status. Raises WireError for a dialect that can't answer.
    """
    return dumps(_answers(dialect).error(status, message, kind, code)).encode()


def _answers(dialect: str) -> Answers:
    found: Answers | None = getattr(by_name(dialect), "answers", None)
    if found is None:
        raise WireError(f"dialect {dialect!r} can read requests but not answer them; its package has no `answers`")
    return found


# --- what the writers share ---------------------------------------------------------------------


def joined(events: Iterable[Event], *, reasoning: bool = True) -> list[Event]:
    """Adjacent text as one, adjacent reasoning as one, nothing empty; without reasoning if it isn't wanted."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Call):
            out.append(event)
        elif not event.text or (isinstance(event, ReasoningDelta) and not reasoning):
            continue
        elif isinstance(event, TextDelta) and isinstance(last, TextDelta):
            out[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            out[-1] = ReasoningDelta(last.text + event.text)
        else:
            out.append(event)
    return out


def stop_of(end: End, *, called: bool) -> StopReason:
    """A sampler ends a call with its ordinary stop token."""
    return StopReason.TOOL_CALLS if called and end.stop is StopReason.STOP else end.stop


def sse(data: Json, event: str | None = None) -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {dumps(data)}\n\n".encode()


class _Whole:
    """The writer for a client that does not stream."""

    media_type = JSON_TYPE

    def __init__(self, answers: Answers, head: Head) -> None:
        self._answers = answers
        self._head = head
        self._events: list[Event] = []

    def start(self) -> bytes:
        return b""

    def feed(self, event: Event) -> bytes:
        self._events.append(event)
        return b""

    def keep_alive(self) -> bytes:
        return b""

    def finish(self, stop: StopReason, usage: Usage, stop_sequence: str | None = None) -> bytes:
        end = End(stop, usage, stop_sequence)
        return dumps(self._answers.whole(self._head, joined(self._events), end)).encode()

    def fail(self, message: str) -> bytes:
        return dumps(self._answers.error(500, message, "server_error", None)).encode()
