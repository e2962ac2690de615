"""From the raw exchange to what it says: decoded, cleaned of our own block, parsed, hashed. Never raises.

Design: whatever is wrong with an exchange becomes the `reason` of a skipped turn in plain words, and
what could be read is kept beside it. The content key is made here, over the client's original body and
the answer as decoded and redacted, so that one exchange has the same key whether it came through the
proxy's spool, a mitmproxy file (which holds the injected body, still encoded) or a HAR (decoded text,
times rounded to microseconds).

With a `Recall` only what is new in a request is read; the answer is the same, whatever is remembered.

Limits: an answer that was cut has another key in a file that doesn't keep cut bodies; its flow id
then still tells that it is the same.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256

from metaclaw_core.decode import decode_body
from metaclaw_core.errors import SpliceError, WireError
from metaclaw_core.model import Exchange, Json, Request, Response
from metaclaw_core.redact import redact, redact_answer, redact_path, redact_text
from metaclaw_core.store.chain import message_id, pack_message, redact_message
from metaclaw_core.store.recall import Recall, Recalled, has
from metaclaw_core.store.spool import NOT_STORED
from metaclaw_core.wire import by_name
from metaclaw_core.wire.base import Dialect
from metaclaw_core.wire.beside import without_beside
from metaclaw_core.wire.jsonio import dumps
from metaclaw_core.wire.splice import remove

logger = logging.getLogger(__name__)

_PLACEHOLDER = b"[redacted:"
_SEAL = b"<!-- metaclaw:"  # cheap test before the slot is looked for
_SKILL_HEADING = re.compile(r"^### ([a-z0-9][a-z0-9-]{0,63})\n\n_[^\n]*_$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Injected:
    """What we had added to a request."""

    text: str
    skills: tuple[str, ...]  # () where a capture's block names none
    index_generation: int | None  # None: read out of a capture
    scores: tuple[float | None, ...] = ()  # one a skill; () where they are not known


@dataclass(frozen=True, slots=True)
class Reading:
    exchange: Exchange  # bodies as they came; path and error redacted
    content_key: str
    request: Request | None  # None: `reason` says why
    response: Response | None  # None: no answer, an error status, or one that can't be read
    reason: str | None  # why the turn is of no use to learning; None: it is
    error: str | None  # the proxy's or the provider's own words
    injected: Injected | None
    redacted: bool = False  # a secret was replaced in the request or the answer
    ids: Sequence[str] = ()  # (messages,) of the chain that begins with the request's first message
    shared: int = 0  # how many of `ids` the request had that it was read by
    tools: str | None = None  # blob id of the request's tools; None: it has none
    answer: Json = None  # the answer as it is stored; None: there is none
    answer_id: str | None = None  # of the answer behind `ids`

    @property
    def whole(self) -> bool:
        """Does the request itself hold what it follows? Else it goes on from an answer that it names."""
        return self.request is not None and self.request.previous_response_id is None


def read(exchange: Exchange, *, redacted: bool = False, recall: Recall | None = None) -> Reading:
    """Everything that one exchange alone tells. `redacted`: its bodies have been searched for secrets (a spool's have).
    `recall`: what exchanges before said; this one is added."""
    try:
        return _read(exchange, redacted, recall or Recall())
    except Exception as e:
        logger.exception("metaclaw: exchange %s can't be read", exchange.flow_id)
        key = sha256(f"{exchange.flow_id}\n{exchange.started_at!r}".encode("utf-8", "replace")).hexdigest()
        bare = replace(exchange, path=exchange.path.partition("?")[0])
        return Reading(bare, key, None, None, f"internal error: {type(e).__name__}: {e}", None, None)


def _read(exchange: Exchange, redacted: bool, recall: Recall) -> Reading:
    exchange = replace(exchange, path=redact_path(exchange.path))
    request_problem = response_problem = None
    body = answer = b""
    whole = True
    try:
        body = decode_body(exchange.request_body, exchange.request_encoding)[0]
        body = body if redacted else redact(body)[0]
    except WireError as e:
        request_problem = f"request body: {e}"
    try:
        answer, whole = decode_body(exchange.response_body, exchange.response_encoding)
        answer = answer if redacted else redact_answer(answer)[0]
    except WireError as e:
        response_problem = f"response body: {e}"

    live = exchange.injection
    injected = Injected(live.text, live.skills, live.index_generation, live.scores) if live else None
    request: Request | None = None
    said: Recalled | None = None
    try:
        dialect = by_name(exchange.dialect)
    except WireError as e:
        return Reading(exchange, content_key(exchange, body, answer), None, None, str(e), exchange.error, injected)
    near = recall.near(dialect, body, exchange.path, exchange.principal)
    if has(body, _SEAL, near):
        clean, removed = without_block(dialect, body, exchange.path)
        injected = injected or removed
        if clean is not body:
            body, near = clean, recall.near(dialect, clean, exchange.path, exchange.principal)
    key = content_key(exchange, body, answer)
    if not body and exchange.error is not None and exchange.error.startswith(NOT_STORED):
        request_problem = exchange.error
    if request_problem is None:
        try:
            said = recall.read(dialect, body, exchange.path, near)
            request = said.reading.request
        except WireError as e:
            request_problem = str(e)

    status = exchange.status_code
    response: Response | None = None
    error = None if exchange.error is None else redact_text(exchange.error)
    if status is None:
        response_problem = "no response"
    elif not 200 <= status < 300:
        response_problem = f"status {status}"
        if answer and status >= 400:
            error = error or dialect.parse_error(answer).message
    elif response_problem is None:
        response, response_problem = _response(dialect, exchange, request, answer, whole)
        if response is not None and response.error is not None:
            error = error or response.error.message
    if response is not None and response_problem is None and not exchange.complete:
        error = None  # the client hung up after the answer's last event, as the OpenAI SDK does at [DONE]
    marks = [mark for mark in (_SEAL, _PLACEHOLDER) if has(body, mark, near)]
    answered = response.message if response is not None else None
    content = None if answered is None else pack_message(answered)
    secret = _PLACEHOLDER in marks or _PLACEHOLDER in answer or (content is not None and _PLACEHOLDER in dumps(content).encode())
    reading = Reading(exchange, key, request, response, request_problem or response_problem, error, injected, secret)
    if said is None:
        return reading
    said.marks = marks
    recall.keep(exchange.principal, said)
    answer_id = None if answered is None else message_id(said.ids[-1] if said.ids else None, answered)
    return replace(reading, ids=said.ids, shared=said.shared, tools=said.tools, answer=content, answer_id=answer_id)


def _response(
    dialect: Dialect, exchange: Exchange, request: Request | None, answer: bytes, whole: bool
) -> tuple[Response | None, str | None]:
    """The answer and what is wrong with it."""
    cut = not (exchange.complete and whole)
    if not answer.strip():
        return None, "response cut" if cut else "empty response"
    try:
        if _is_stream(exchange.response_type, request, answer):
            parser = dialect.stream_parser()
            parser.feed(answer)
            response = parser.finish()
        else:
            response = dialect.parse_response(answer)
    except WireError as e:
        return None, "response cut" if cut else str(e)
    if response.message is not None:
        response = replace(response, message=redact_message(response.message))
    if response.error is not None:
        return response, "error in the response"
    if not response.complete:
        return response, "response cut"
    if response.message is None or not response.message.parts:
        return response, "empty response"
    return response, None


def _is_stream(media_type: str, request: Request | None, answer: bytes) -> bool:
    """The first bytes decide where they can, since servers mislabel: no dialect's whole answer is an array."""
    start = answer[:64].lstrip(b"\xef\xbb\xbf \r\n\t")
    if start.startswith((b"data:", b"event:", b"id:", b"retry:", b":", b"[")) or media_type == "application/x-ndjson":
        return True
    if request is not None and request.dialect == "ollama":
        return request.stream
    return media_type == "text/event-stream" and not start.startswith(b"{")


def without_block(dialect: Dialect, body: bytes, path: str) -> tuple[bytes, Injected | None]:
    """The client's own body, and what we had added to it (a capture holds the body as it was sent)."""
    texts: list[str] = []
    if _SEAL in body:
        with contextlib.suppress(SpliceError):
            if removed := remove(body, dialect.system_slot(body)):
                body = removed[0]
                texts.append(removed[1])
    if _SEAL in body:
        body, beside = without_beside(dialect, body, path)
        texts += beside
    if not texts:
        return body, None
    text = "\n\n".join(texts)
    return body, Injected(text, tuple(_SKILL_HEADING.findall(text)), None)


def content_key(exchange: Exchange, body: bytes, answer: bytes) -> str:
    """Equal for two records of one exchange: start in µs, URL without secrets, original body, answer."""
    started = datetime.fromtimestamp(exchange.started_at, UTC).isoformat(timespec="microseconds")
    url = f"{exchange.scheme}://{exchange.host.lower()}:{exchange.port}{exchange.path}"
    digest = sha256()
    for piece in (started.encode(), url.encode("utf-8", "surrogatepass"), body, answer):
        digest.update(b"%d:" % len(piece))
        digest.update(piece)
    return digest.hexdigest()
