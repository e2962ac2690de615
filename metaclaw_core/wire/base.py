"""The dialect protocol: the single place where a wire format lives is one module that satisfies it.

Design: a dialect is a stateless object; a stream parser is made per stream and fed raw body bytes in
chunks of any size (content-encoding removed). Parsers keep parts, not bytes. Everything that a
dialect does not understand ends in an `extra` mapping or an `Opaque` part, never in the bin.

A body that is not the dialect's raises `WireError`; a stream never raises: what can't be understood
in it is skipped, and `finish` says with `complete` whether the end was seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from metaclaw_core.model import ApiError, Json, Message, Request, Response


@dataclass(frozen=True, slots=True)
class Route:
    """What method and path alone say about a request."""

    dialect: str
    model: str | None = None  # where the URL names it (Gemini)
    stream: bool | None = None  # where the URL decides it (Gemini)


@dataclass(frozen=True, slots=True)
class Slot:
    """The byte place where text can be added at the end of the system prompt.

    The new body is ``body[:at] + before + json_escape(text) + after + body[at:]`` (see ``wire.splice``).
    `lead` is put in front of the text: "\\n\\n" where it continues a string that isn't empty, else "".
    """

    at: int
    before: bytes
    after: bytes
    lead: str
    form: str  # "string" (inside a JSON string), "item" (a new list element), "new" (a new key or message)


class StreamParser(Protocol):
    def feed(self, chunk: bytes) -> None:
        """Any chunk of the decoded body; never raises."""

    def finish(self) -> Response:
        """The whole answer, once the stream has ended or broken off."""


class Dialect(Protocol):
    """One wire format. `name` is the module's name and is what the store keeps.

    One that can also answer has a further attribute, `answers` (`wire.answer.Answers`).
    """

    name: str

    def route(self, method: str, path: str) -> Route | None:
        """Is this request ours? `path` may carry a query. Cheap: called for each request of any host.

        Only generation calls: embeddings, token counts and model lists are None. A base path in front
        ("/openai/v1/…", "/api/v1/…") is accepted; the end of the path decides.
        """

    def parse_request(self, body: bytes, path: str) -> Request:
        """Raises WireError with a sentence for the store."""

    def parse_response(self, body: bytes) -> Response:
        """A whole JSON answer (not a stream, status < 400). Raises WireError."""

    def stream_parser(self) -> StreamParser: ...

    def parse_error(self, body: bytes) -> ApiError:
        """The error of an answer with status >= 400; never raises: unknown text becomes the message (≤ 2,000 characters)."""

    def system_slot(self, body: bytes) -> Slot:
        """Where text can be appended to the system prompt. Raises SpliceError: the body then passes unchanged."""


type Items = list[tuple[Message, ...] | None]
"""What each item of a history becomes; None: it belongs to the message that an item before it began."""


class HasHistory(Dialect, Protocol):
    """What a dialect offers beyond `Dialect` so that ``wire.reread`` need not read a known history again.

    The messages of a request are what the rest of the body gives (a system prompt of its own) followed by those of the
    items, and each item's depend on that item alone; where `runs`, neighbouring items of the assistant are one message.
    """

    history: str  # the top-level key under which the items are
    runs: bool

    def read_request(self, obj: dict[str, Json], path: str) -> Request:
        """`parse_request` of a decoded body; `obj` is not changed. Raises WireError."""

    def read_items(self, items: list[Json]) -> Items:
        """As many as `items`. Raises WireError."""


def rest(obj: Mapping[str, Json], known: Iterable[str]) -> dict[str, Json]:
    """The fields of `obj` that are not in `known`, in their order."""
    skip = frozenset(known)
    return {k: v for k, v in obj.items() if k not in skip}
