"""Column types that take what the wire gives.

Design: PostgreSQL's text refuses NUL and both databases' drivers refuse lone surrogates, and an LLM
body may hold either. So free text is stored as ASCII JSON text (`SafeText`), values as JSON text
(`JsonText`), and content as a blob that is compressed above a size (`PackedJson`); all three come back
exactly as they went in. Short names that are searched for (models, ids, paths) stay plain text that
any SQL tool can read: `plain` makes them storable.

Limits: a `SafeText` column is quoted when read with other tools; search it with the store.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

import zstandard
from sqlalchemy import LargeBinary, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from metaclaw_core.errors import StoreError, WireError
from metaclaw_core.model import Json
from metaclaw_core.wire.jsonio import dumps, loads

_PACK_ABOVE = 256  # bytes; below it the frame costs more than it saves
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # no JSON text begins with it
_PLAIN_LENGTH = 255
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class SafeText(TypeDecorator[str]):
    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else dumps(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> str | None:
        return None if value is None else loads(value, "stored text")


class JsonText(TypeDecorator[Any]):
    """None is SQL NULL; a JSON null inside a value is kept."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Json, dialect: Dialect) -> str | None:
        return None if value is None else dumps(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Json:
        return None if value is None else loads(value, "stored JSON")


class PackedJson(TypeDecorator[Any]):
    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Json, dialect: Dialect) -> bytes | None:
        return None if value is None else pack(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Json:
        return None if value is None else unpack(bytes(value))


def pack(value: Json) -> bytes:
    raw = dumps(value).encode("ascii")
    return zstandard.compress(raw, 3) if len(raw) > _PACK_ABOVE else raw


def unpack(data: bytes) -> Json:
    """Raises StoreError for what `pack` never wrote."""
    try:
        return loads(zstandard.decompress(data) if data.startswith(_ZSTD_MAGIC) else data, "stored content")
    except (WireError, zstandard.ZstdError) as e:
        raise StoreError(f"The store holds damaged content ({e}); `metaclaw store verify` says where.") from e


def plain(text: str | None) -> str | None:
    """A short name as ordinary text: NUL and lone surrogates replaced, too long ones cut and told apart by a hash."""
    if text is None:
        return None
    clean = _UNSTORABLE.sub("\ufffd", text)
    if len(clean) <= _PLAIN_LENGTH:
        return clean
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{clean[: _PLAIN_LENGTH - 17]}~{digest}"
