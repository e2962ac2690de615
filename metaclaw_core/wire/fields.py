"""Typed access to parsed JSON, for the dialect parsers.

Design: a parser may not trust any type in a body. These helpers turn a wrong one into a `WireError`
that names the place and both types. JSON null counts as absent everywhere, as it does for the
providers. Token counts are the exception: a broken count costs the count (None), not the turn.

Limits: places are named by the caller ("messages[3]"); fields of JSON that is only kept are not checked.
"""

from __future__ import annotations

from collections.abc import Mapping

from metaclaw_core.errors import WireError
from metaclaw_core.model import ApiError, Json
from metaclaw_core.wire import jsonio

MAX_ERROR_MESSAGE = 2_000  # characters
_WORDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}


def optional[T](obj: Mapping[str, Json], key: str, kind: type[T], where: str) -> T | None:
    """The field, or None if it is absent or null."""
    value = obj.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise WireError(f"{where}.{key} is {type(value).__name__}, not {_WORDS[kind]}")


def required[T](obj: Mapping[str, Json], key: str, kind: type[T], where: str) -> T:
    value = obj.get(key)
    if isinstance(value, kind):
        return value
    optional(obj, key, kind, where)
    raise WireError(f"{where}.{key} is missing")


def as_object(value: Json, where: str) -> dict[str, Json]:
    if isinstance(value, dict):
        return value
    raise WireError(f"{where} is {type(value).__name__}, not an object")


def count(obj: Mapping[str, Json], key: str) -> int | None:
    """A token count; anything that is not a whole number from 0 on is unknown."""
    value = obj.get(key)
    if isinstance(value, float) and value.is_integer():  # some gateways compute in JavaScript or Lua
        value = int(value)
    return value if type(value) is int and value >= 0 else None


def stream_object(data: str | bytes) -> dict[str, Json] | None:
    """One record of a stream; None for what is not a JSON object, which a stream skips."""
    try:
        return jsonio.loads_object(data, "event")
    except WireError:
        return None


def plain_error(body: bytes) -> ApiError:
    """An error body that is not in the dialect's shape: a gateway's HTML, plain text, nothing."""
    return ApiError(message=body[: 4 * MAX_ERROR_MESSAGE].decode("utf-8", "replace")[:MAX_ERROR_MESSAGE].strip())
