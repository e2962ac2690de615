"""Secrets out of text, before anything reaches the disk: the one function every writer calls.

Design: a credential has a shape (a vendor's prefix, a PEM frame, a JWT) and is replaced by a typed
placeholder ``[redacted:openai-key]``. The search runs over bytes: each shape has a literal anchor, all anchors
are looked for at once (Aho-Corasick with vector instructions), and the regular expression is tried only at a hit, so a
400 kB body without an anchor costs some 20 µs. The placeholder holds no quote or backslash, so a JSON body stays valid.

Limits: shapes only. A password in prose has no shape and stays. What a stream splits over its events is
found by `redact_answer` in the fields that it knows; assembled texts are redacted again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qsl, quote

from ahocorasick_rs import BytesAhoCorasick, MatchKind


@dataclass(frozen=True, slots=True)
class _Shape:
    kind: str
    anchor: bytes
    pattern: re.Pattern[bytes]  # matched at the anchor's position
    before: re.Pattern[bytes]  # must be found at the end of the six bytes in front of the anchor, b"" at the start


# The shape is not the tail of a longer word ("task-…"). A line break in a JSON body ends in a letter: "\nsk-…".
_NO_WORD = re.compile(rb"(?:^|[^A-Za-z0-9]|\\[bfnrt]|\\u[0-9a-fA-F]{4})\Z")
_ANY = re.compile(rb"")


# A private key goes to the line that ends it, but not out of its JSON string: a quote before a comma, colon or bracket
# may be the string's end. Without such a line (cut off, a list with a line an item) it is what looks like its lines.
# So whoever only speaks of "-----BEGIN PRIVATE KEY-----" loses these words and no more, and JSON stays valid.
_PEM_END = rb"-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----"
_PEM_TO_ITS_END = rb"(?:(?!\"\s*[,:}\]]|-----BEGIN ).){0,16384}?" + _PEM_END
_PEM_LINES = (
    rb"(?:(?:\s|\\+[nrt])*(?:Proc-Type|DEK-Info): [A-Za-z0-9,-]+)*"
    rb"(?:(?:\s|\\+[nrt])*[A-Za-z0-9+/=]{16,}|[\s\\\",+nrt]{1,200}?[A-Za-z0-9+/=]{40,})*"
    rb"(?:[\s\\\",+nrt]{1,200}[A-Za-z0-9+/=]*[\s\\\",+nrt]{0,200}" + _PEM_END + rb")?"
)


def _shape(kind: str, anchor: bytes, pattern: bytes, before: re.Pattern[bytes] = _NO_WORD) -> _Shape:
    return _Shape(kind, anchor, re.compile(pattern, re.DOTALL), before)  # DOTALL: a PEM block has lines


_SHAPES = (
    _shape("anthropic-key", b"sk-ant-", rb"sk-ant-[A-Za-z0-9_-]{8,}"),
    _shape("openai-key", b"sk-", rb"sk-(?:proj-|svcacct-|admin-|or-v1-|fake-)?[A-Za-z0-9_-]{12,}"),
    _shape("google-key", b"AIza", rb"AIza[A-Za-z0-9_-]{8,}"),
    _shape("google-oauth", b"ya29.", rb"ya29\.[A-Za-z0-9_-]{20,}"),
    _shape("aws-key-id", b"AKIA", rb"AKIA[A-Z0-9]{16}\b"),
    _shape("aws-key-id", b"ASIA", rb"ASIA[A-Z0-9]{16}\b"),
    _shape("github-token", b"ghp_", rb"ghp_[A-Za-z0-9]{20,}"),
    _shape("github-token", b"gho_", rb"gho_[A-Za-z0-9]{20,}"),
    _shape("github-token", b"ghs_", rb"ghs_[A-Za-z0-9]{20,}"),
    _shape("github-token", b"ghu_", rb"ghu_[A-Za-z0-9]{20,}"),
    _shape("github-token", b"github_pat_", rb"github_pat_[A-Za-z0-9_]{20,}"),
    _shape("gitlab-token", b"glpat-", rb"glpat-[A-Za-z0-9_-]{16,}"),
    _shape("slack-token", b"xox", rb"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
    _shape("slack-token", b"xapp-", rb"xapp-[A-Za-z0-9-]{10,}"),
    _shape("huggingface-token", b"hf_", rb"hf_[A-Za-z0-9]{20,}"),
    _shape("tinker-key", b"tml-", rb"tml-[A-Za-z0-9_-]{16,}"),
    _shape("stripe-key", b"k_live_", rb"k_live_[A-Za-z0-9]{16,}", _ANY),
    _shape("npm-token", b"npm_", rb"npm_[A-Za-z0-9]{30,}"),
    _shape("pypi-token", b"pypi-AgE", rb"pypi-AgE[A-Za-z0-9_-]{20,}"),
    _shape("telegram-token", b":AA", rb":AA[A-Za-z0-9_-]{33}\b", re.compile(rb"[0-9]\Z")),
    _shape("jwt", b"eyJ", rb"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    _shape(
        "private-key",
        b"-----BEGIN ",
        rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----(?:" + _PEM_TO_ITS_END + rb"|" + _PEM_LINES + rb")",
    ),
    _shape("bearer", b"earer ", rb"earer [A-Za-z0-9._~+/=-]{16,}", re.compile(rb"[Bb]\Z")),
)
_ANCHORS = [shape.anchor for shape in _SHAPES]
# Of anchors at one place the first is found, and none that begins within another: what may begin there is looked at then.
_find = BytesAhoCorasick(_ANCHORS, matchkind=MatchKind.LeftmostFirst).find_matches_as_indexes


def _may_begin_within(anchor: bytes) -> tuple[tuple[int, _Shape], ...]:
    """(offset in `anchor`, shape) of what may begin there or where `anchor` does, in that order."""
    return tuple(
        (at, shape)
        for at in range(len(anchor))
        for shape in _SHAPES
        if shape.anchor.startswith(anchor[at:]) or anchor[at:].startswith(shape.anchor)
    )


_WITHIN = [_may_begin_within(anchor) for anchor in _ANCHORS]


def redact(data: bytes) -> tuple[bytes, int]:
    """`data` with each secret replaced, and how many there were. Returns the same object if there was none."""
    hits = _hits(data)
    if not hits:
        return data, 0
    out: list[bytes] = []
    end = 0
    for start, stop, kind in hits:
        out += [data[end:start], _placeholder(kind)]
        end = stop
    out.append(data[end:])
    return b"".join(out), len(hits)


def _hits(data: bytes) -> list[tuple[int, int, str]]:
    """(start, end, kind) of each secret, in order, none inside another."""
    hits: list[tuple[int, int, str]] = []
    ends: dict[bytes, int] = {}  # by anchor: a shape's own match goes on to here
    for number, start, _ in _find(data):
        for offset, shape in _WITHIN[number]:
            at = start + offset
            if at < ends.get(shape.anchor, 0) or not data.startswith(shape.anchor, at):
                continue
            match = shape.pattern.match(data, at)
            if match and shape.before.search(data[max(0, at - 6) : at]):
                hits.append((at, match.end(), shape.kind))
                ends[shape.anchor] = match.end()
    hits.sort()
    apart: list[tuple[int, int, str]] = []
    for hit in hits:
        if not apart or hit[0] >= apart[-1][1]:  # else inside an earlier, longer hit
            apart.append(hit)
    return apart


def _placeholder(kind: str) -> bytes:
    return f"[redacted:{kind}]".encode()


# What grows over the events of a stream, in every dialect: the name of a field and its text.
_STREAMED = re.compile(
    rb'"(content|text|delta|arguments|partial_json|thinking|reasoning|reasoning_content|refusal)"\s*:\s*"'
    rb'([^"\\]*(?:\\.[^"\\]*)*)',  # to the quote, or to where the stream was cut
    re.DOTALL,
)
_STREAMS = (b"data:", b"event:", b":", b"id:", b"retry:", b"[")


def redact_answer(data: bytes) -> tuple[bytes, int]:
    """`redact` for an LLM's answer: where it is a stream, a secret that is spread over several events is found too.

    The first event of it gets the placeholder, the others lose their part. Fields of one name are taken for one text.
    """
    head = data[:64].lstrip()
    if not (head.startswith(_STREAMS) or (head.startswith(b"{") and b"}\n{" in data)):
        return redact(data)
    found = _STREAMED.findall(data)
    if not any(_hits(b"".join([text for name, text in found if name == one])) for one in {name for name, _ in found}):
        return redact(data)
    fields: dict[bytes, list[tuple[int, int]]] = {}
    for match in _STREAMED.finditer(data):
        fields.setdefault(match[1], []).append(match.span(2))
    changes: list[tuple[int, int, bytes]] = []
    for spans in fields.values():
        hits = _hits(b"".join(data[start:end] for start, end in spans))
        changes += _spread(hits, spans) if hits else []
    out: list[bytes] = []
    end = 0
    for start, stop, new in sorted(changes):
        out += [data[end:start], new]
        end = stop
    # The rest comes second: in one event the beginning of a secret may look like all of it.
    clean, count = redact(b"".join((*out, data[end:])) if changes else data)
    return clean, count + sum(bool(new) for _, _, new in changes)


def _spread(hits: list[tuple[int, int, str]], spans: list[tuple[int, int]]) -> list[tuple[int, int, bytes]]:
    """`hits` in the joined `spans` as changes of the body they are from."""
    changes: list[tuple[int, int, bytes]] = []
    at = 0  # where a span begins in the joined text
    remaining = iter(hits)
    hit = next(remaining, None)
    for start, end in spans:
        length = end - start
        while hit is not None and hit[0] < at + length:
            first, last = max(hit[0], at), min(hit[1], at + length)
            changes.append((start + first - at, start + last - at, _placeholder(hit[2]) if hit[0] >= at else b""))
            if hit[1] > at + length:
                break  # it goes on in the next span
            hit = next(remaining, None)
        at += length
    return changes


def redact_between(data: bytes, prefix: int, suffix: int) -> tuple[bytes, int]:
    """`redact` of a body of which the first `prefix` and the last `suffix` bytes are those of a redacted one.

    Only what is between is searched, out to the quotes around it: no shape goes over a quote but a private key, and of
    that a redacted body holds not even the first line. If there is a secret, all of `data` is searched.
    """
    start = max(0, data.rfind(b'"', 0, prefix))
    end = data.find(b'"', len(data) - suffix) + 1 or len(data)
    if (start, end) != (0, len(data)) and not _hits(data[start:end]):
        return data, 0
    return redact(data)


def redact_text(text: str) -> str:
    """The same for text; lone surrogates survive."""
    raw = text.encode("utf-8", "surrogatepass")
    clean, count = redact(raw)
    return clean.decode("utf-8", "surrogatepass") if count else text


_SECRET_PARAMETER = re.compile(r"key|token|secret|password|credential|signature|auth|session|^sig$|^code$", re.IGNORECASE)


@lru_cache(maxsize=64)
def redact_path(path: str) -> str:
    """A path with the values of secret query parameters replaced, and whatever else has the shape of a secret.

    Other parameters keep their place; a second pass changes nothing. `path` need not be a proper URL ("//host[" is
    none), and may hold the surrogates that stand for bytes which are no UTF-8. A fragment, which no client sends, goes.
    """
    path, _, query = path.partition("#")[0].partition("?")
    pairs = [(redact_text(k), redact_text(v)) for k, v in parse_qsl(query, keep_blank_values=True)]
    if pairs:
        path += "?" + "&".join(
            f"{_quoted(k)}={'[redacted]' if _SECRET_PARAMETER.search(k) else _quoted(v)}" for k, v in pairs
        )
    return redact_text(path)


def _quoted(text: str) -> str:
    return quote(text, safe="/:[]", errors="replace")


_SECRET_HEADER = re.compile(
    rb"authorization|cookie|api-?key|token(?!s)|secret|password|credential|signature|session(?![-_]id$)", re.IGNORECASE
)
_URL_HEADERS = (b"location", b"referer", b"content-location")


def redact_header(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header with its value replaced if its name says that it is a credential, else what is secret in the value.

    A session's id is no credential; a count of tokens is none either.
    """
    if _SECRET_HEADER.search(name):
        return name, b"[redacted]"
    if name.lower() in _URL_HEADERS:
        return name, redact_path(value.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    return name, redact(value)[0]
